//! Emptying an image and giving back its space (specification §9).

use brep_block::{LockMode, Operation, Result, zeroes};
use bytes::{BufMut, Bytes, BytesMut};

use crate::alloc::Allocator;
use crate::geometry::OFFSET_MASK;
use crate::header::{extension, field, incompatible};
use crate::image::{Deferred, Image, lock};
use crate::refcount;
use crate::regions::{Kind, Regions};

/// References that are dropped in one go.
const BATCH: usize = 1 << 16;
/// Space that one call of `release_space` gives back, in bytes.
const RELEASE_MAX: u64 = 16 << 20;
/// Refcount blocks that one call of `release_space` looks into.
const SCAN_MAX: usize = 4;

/// What happens to the space of an image that is emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MakeEmpty {
    /// It is given back to the file system.
    Release,
    /// It is kept in the file, and the next writes use it again.
    Keep,
}

impl Image {
    pub(crate) async fn make_empty(&self, how: MakeEmpty) -> Result<()> {
        self.check_writable(Operation::Control)?;
        let _all = self.ranges.lock(0..u64::MAX, LockMode::Exclusive).await;
        let _structure = self.structure.lock().await;
        self.check_writable(Operation::Control)?;
        *lock(&self.inflated) = None;
        self.forget_staged();
        match how {
            MakeEmpty::Keep => self.forget_mapping().await,
            MakeEmpty::Release if self.can_start_over() => self.start_over().await,
            MakeEmpty::Release => {
                self.forget_mapping().await?;
                self.flush_durable().await?;
                while self.release_space(0).await? > 0 {}
                Ok(())
            }
        }
    }

    /// Empties the L1 table, then drops what only it had found. A crash in between leaks.
    async fn forget_mapping(&self) -> Result<()> {
        let (tables, at, len) = {
            let l1 = lock(&self.map.l1);
            let used = l1.entries.iter().enumerate().filter(|(_, e)| **e != 0);
            let tables: Vec<(usize, u64)> = used.map(|(i, e)| (i, e & OFFSET_MASK)).collect();
            let (Some((first, _)), Some((last, _))) = (tables.first(), tables.last()) else {
                return Ok(());
            };
            let (at, len) = (l1.offset + *first as u64 * 8, (last - first + 1) * 8);
            (tables, at, len)
        };
        self.write_live("emptying of the L1 table", at, zeroes(len)).await?;
        for (index, _) in &tables {
            if let Some(entry) = lock(&self.map.l1).entries.get_mut(*index) {
                *entry = 0;
            }
        }
        self.order().await?;
        let mut clusters = Vec::new();
        let mut result = Ok(());
        for (_, offset) in tables.into_iter().filter(|(_, offset)| *offset != 0) {
            // A table that cannot be read leaks what it maps; the image is empty all the same.
            let collected = self.collect_references(offset, &mut clusters).await;
            result = result.and(collected);
            self.map.forget(offset);
            lock(&self.regions).remove_table(offset >> self.g.cluster_bits);
            if clusters.len() >= BATCH {
                self.release(std::mem::take(&mut clusters), false).await?;
            }
        }
        self.release(clusters, false).await?;
        // The next writes take what has space in the file before what has none.
        self.drain_pool().await?;
        result
    }

    /// The table's own cluster and everything that it refers to.
    async fn collect_references(&self, offset: u64, clusters: &mut Vec<u64>) -> Result<()> {
        let table = self.load_l2(Operation::Control, offset).await?;
        clusters.push(offset >> self.g.cluster_bits);
        let mut bad = None;
        table.visit(&self.g, 0, |_, entry| {
            match entry {
                Ok(entry) => {
                    if let Some((first, count)) = entry.references(&self.g) {
                        clusters.extend(first..first + count);
                    }
                }
                Err(what) => bad = Some(what),
            }
            true
        });
        match bad {
            None => Ok(()),
            Some(what) => {
                let what = format!("bad L2 entry: {what}");
                Err(self.corrupt(Operation::Control, offset, self.g.cluster_size(), what).await)
            }
        }
    }

    /// Whether all of the file may be laid out anew.
    fn can_start_over(&self) -> bool {
        let clusters = self.l1_clusters() + 3;
        self.g.version >= 3
            && self.snapshots.is_empty()
            && lock(&self.header).extension(extension::BITMAPS).is_none()
            && clusters <= self.g.block_entries()
    }

    fn l1_clusters(&self) -> u64 {
        self.g.clusters(lock(&self.map.l1).entries.len() as u64 * 8)
    }

    /// Lays the file out as if it were new: header, refcount table, one block, L1 table. The
    /// dirty bit covers the time in which nothing fits together.
    async fn start_over(&self) -> Result<()> {
        self.set_dirty(true).await?;
        self.barrier().await?;
        let mut alloc = self.alloc.lock().await;
        let result = self.lay_out_anew(&mut alloc).await;
        if let Err(error) = &result {
            self.eject(error);
        }
        result
    }

    async fn lay_out_anew(&self, alloc: &mut Allocator) -> Result<()> {
        let g = self.g;
        let bits = g.cluster_bits;
        let l1_clusters = self.l1_clusters();
        let used = 3 + l1_clusters;
        let (l1_offset, l1_len) = {
            let l1 = lock(&self.map.l1);
            (l1.offset, l1.entries.len())
        };
        self.file.write(l1_offset, zeroes(l1_len * 8)).await?;
        // What follows may overwrite what the old table maps.
        self.barrier().await?;
        self.file.write(1 << bits, zeroes(((used - 1) << bits) as usize)).await?;
        self.barrier().await?;
        let mut switch = BytesMut::with_capacity(20);
        switch.put_u64(3 << bits);
        switch.put_u64(1 << bits);
        switch.put_u32(1);
        {
            let _io = self.header_io.lock().await;
            self.file.write(field::L1_OFFSET, switch.freeze()).await?;
            let mut header = lock(&self.header);
            header.l1_offset = 3 << bits;
            header.refcount_table_offset = 1 << bits;
            header.refcount_table_clusters = 1;
        }
        self.barrier().await?;
        let mut block = vec![0; g.cluster_len()];
        (0..used).for_each(|i| refcount::set(&mut block, g.refcount_order, i, 1));
        self.file.write(2 << bits, Bytes::from(block)).await?;
        let entry = (2u64 << bits).to_be_bytes();
        self.file.write(1 << bits, Bytes::copy_from_slice(&entry)).await?;

        let mut table = vec![0; g.cluster_len() / 8];
        if let Some(first) = table.first_mut() {
            *first = 2 << bits;
        }
        *alloc = Allocator::new(1 << bits, table, &g);
        {
            let mut l1 = lock(&self.map.l1);
            l1.offset = 3 << bits;
            l1.entries.fill(0);
        }
        self.map.forget_all();
        *lock(&self.deferred) = Deferred::default();
        *lock(&self.regions) = new_regions(used);
        self.file.truncate(used << bits).await?;
        {
            let mut pool = lock(&self.pool);
            pool.clusters.clear();
            pool.touched_end = used;
        }
        self.barrier().await?;
        self.set_dirty(false).await
    }

    /// Sets or clears the dirty bit in the file.
    pub(crate) async fn set_dirty(&self, dirty: bool) -> Result<()> {
        let _io = self.header_io.lock().await;
        let bits = {
            let mut header = lock(&self.header);
            header.incompatible &= !incompatible::DIRTY;
            header.incompatible |= if dirty { incompatible::DIRTY } else { 0 };
            header.incompatible
        };
        let data = Bytes::copy_from_slice(&bits.to_be_bytes());
        self.write_live("write of the dirty bit", field::INCOMPATIBLE, data).await
    }

    /// Gives back space of free clusters beyond the first `keep` bytes of it, the highest first.
    /// Does a bounded amount of work, and says how many bytes it dealt with: 0 at the end.
    pub(crate) async fn release_space(&self, keep: u64) -> Result<u64> {
        self.check_writable(Operation::Control)?;
        let bits = self.g.cluster_bits;
        let run = {
            let mut alloc = self.alloc.lock().await;
            self.look_ahead(&mut alloc).await?;
            let surplus = alloc.occupied.len().saturating_sub(keep.div_ceil(1 << bits));
            let Some(last) = alloc.occupied.last().filter(|_| surplus > 0) else { return Ok(0) };
            let count = (RELEASE_MAX >> bits).max(1).min(surplus);
            let run = last.end.saturating_sub(count).max(last.start)..last.end;
            // Nobody gets these clusters while their hole is being punched.
            alloc.free.remove(run.clone());
            alloc.occupied.remove(run.clone());
            run
        };
        let bytes = (run.end - run.start) << bits;
        self.file.punch(run.start << bits, bytes).await;
        self.alloc.lock().await.add_free(run, false);
        Ok(bytes)
    }

    /// Learns about some more free clusters inside the file.
    async fn look_ahead(&self, alloc: &mut Allocator) -> Result<()> {
        let end = lock(&self.pool).touched_end;
        for _ in 0..SCAN_MAX {
            let block = (alloc.frontier / self.g.block_entries()) as usize;
            let exists = alloc.table.get(block).is_some_and(|e| *e != 0);
            if alloc.frontier >= end || !exists {
                break;
            }
            self.advance(alloc).await?;
        }
        Ok(())
    }
}

/// The regions of an image that has just been laid out.
fn new_regions(used: u64) -> Regions {
    let mut regions = Regions::default();
    // These do not overlap.
    let _ = regions.insert_fixed(0..1, Kind::Header);
    let _ = regions.insert_fixed(1..2, Kind::RefcountTable);
    let _ = regions.insert_fixed(3..used, Kind::L1);
    regions.insert_table(2, Kind::RefcountBlock);
    regions
}
