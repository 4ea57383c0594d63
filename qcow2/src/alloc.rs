//! Clusters of the file: which are free, and their refcounts (specification §4).
//!
//! A cluster goes through these states: *free* (refcount 0), *pooled* (refcount 1 in the file,
//! nobody refers to it), *used*. Pooling raises many refcounts with one write (and, where the
//! order on stable storage matters, one flush), so that most allocations cost no I/O at all. What
//! is pooled when the process dies is leaked, which `check` repairs.

use std::collections::HashMap;

use brep_block::{ErrorKind, Operation, Result};
use bytes::Bytes;

use crate::geometry::Geometry;
use crate::image::{Image, lock};
use crate::interval::IntervalSet;
use crate::refcount;
use crate::regions::Kind;

/// Separate intervals of free clusters that are remembered; the rest is found again by scanning.
const INTERVALS_MAX: usize = 1 << 18;
/// Bytes that the pool may hold, as far as `POOL_MIN` lets it.
const POOL_BYTES_MAX: u64 = 16 << 20;
const POOL_MIN: u64 = 8;
const POOL_MAX: u64 = 256;
/// References that wait for a durable flush before one is made for their sake.
const DEFERRED_MAX: usize = 4096;

/// Entries of the refcount table: bits 9 to 63 hold the offset of a block.
pub(crate) const TABLE_MASK: u64 = !0x1ff;

/// Refcounts and free clusters.
#[derive(Debug)]
pub(crate) struct Allocator {
    pub(crate) table_offset: u64,
    /// The refcount table as it stands in the file; its length is a whole number of clusters.
    pub(crate) table: Vec<u64>,
    pub(crate) blocks: BlockCache,
    /// Free clusters below this index are in `free`; above it nothing is known.
    pub(crate) frontier: u64,
    pub(crate) free: IntervalSet,
    /// The part of `free` that may occupy space in the file.
    pub(crate) occupied: IntervalSet,
    /// How many clusters the next refill takes.
    batch: u64,
}

impl Allocator {
    pub(crate) fn new(table_offset: u64, table: Vec<u64>, g: &Geometry) -> Self {
        Allocator {
            table_offset,
            table,
            blocks: BlockCache::new(((4 << 20) >> g.cluster_bits).max(4) as usize),
            frontier: 0,
            free: IntervalSet::default(),
            occupied: IntervalSet::default(),
            batch: POOL_MIN,
        }
    }

    /// Notes that clusters are free. `occupied` says that they take space in the file.
    pub(crate) fn add_free(&mut self, range: std::ops::Range<u64>, occupied: bool) {
        let range = range.start..range.end.min(self.frontier);
        if range.is_empty() {
            return;
        }
        self.free.insert(range.clone());
        if occupied {
            self.occupied.insert(range);
        } else {
            self.occupied.remove(range);
        }
        while self.free.intervals() > INTERVALS_MAX {
            let Some(last) = self.free.last() else { return };
            self.free.remove(last.clone());
            self.occupied.remove(last.clone());
            self.frontier = last.start;
        }
    }
}

/// Refcount blocks in memory; like the L2 tables never newer than the file.
#[derive(Debug)]
pub(crate) struct BlockCache {
    blocks: HashMap<u64, (Vec<u8>, u64)>,
    clock: u64,
    max: usize,
}

impl BlockCache {
    fn new(max: usize) -> Self {
        BlockCache { blocks: HashMap::new(), clock: 0, max }
    }

    fn get(&mut self, index: u64) -> Option<&mut Vec<u8>> {
        self.clock += 1;
        let clock = self.clock;
        let (block, used) = self.blocks.get_mut(&index)?;
        *used = clock;
        Some(block)
    }

    fn insert(&mut self, index: u64, block: Vec<u8>) {
        while self.blocks.len() >= self.max {
            let oldest = self.blocks.iter().min_by_key(|(_, (_, used))| *used);
            let Some(oldest) = oldest.map(|(index, _)| *index) else { break };
            self.blocks.remove(&oldest);
        }
        self.clock += 1;
        self.blocks.insert(index, (block, self.clock));
    }
}

/// Clusters whose refcount is 1 already and that wait to be used.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) clusters: IntervalSet,
    /// Clusters from this index on have never been written: they read as zeroes.
    pub(crate) touched_end: u64,
}

impl Pool {
    pub(crate) fn new(touched_end: u64) -> Self {
        Pool { clusters: IntervalSet::default(), touched_end }
    }
}

/// Neighbouring clusters that were just allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// They read as zeroes.
    pub(crate) fresh: bool,
}

impl Image {
    /// Takes between 1 and `max` neighbouring clusters. Their refcounts are in the file (and on
    /// stable storage, for an ordered image).
    pub(crate) async fn allocate(&self, max: u64) -> Result<Run> {
        loop {
            if let Some(run) = self.take_pooled(max) {
                return Ok(run);
            }
            let mut alloc = self.alloc.lock().await;
            if lock(&self.pool).clusters.is_empty() {
                self.refill(&mut alloc, max).await?;
            }
        }
    }

    fn take_pooled(&self, max: u64) -> Option<Run> {
        let growable = self.file.growable();
        let mut pool = lock(&self.pool);
        let range = pool.clusters.take_first(max.max(1))?;
        let fresh = growable && range.start >= pool.touched_end;
        pool.touched_end = pool.touched_end.max(range.end);
        Some(Run { first: range.start, count: range.end - range.start, fresh })
    }

    /// Returns clusters that were allocated and that nothing refers to.
    pub(crate) fn give_back(&self, first: u64, count: u64) {
        lock(&self.pool).clusters.insert(first..first + count);
    }

    /// Raises the refcounts of some free clusters and puts them into the pool.
    async fn refill(&self, alloc: &mut Allocator, want: u64) -> Result<()> {
        let limit = (POOL_BYTES_MAX >> self.g.cluster_bits).clamp(POOL_MIN, POOL_MAX);
        let epb = self.g.block_entries();
        while alloc.free.is_empty() {
            self.advance(alloc).await?;
        }
        let Some(free) = alloc.free.first() else { return Ok(()) };
        let block = free.start / epb;
        let want = alloc.batch.max(want.min(limit));
        let run = free.start..free.end.min((block + 1) * epb).min(free.start + want);
        alloc.batch = (alloc.batch * 2).min(limit);
        let taken = lock(&self.regions).find(run.clone());
        if let Some(kind) = taken {
            let what = format!("{} in clusters {run:?} that count as free", kind.name());
            return Err(self.corrupt(Operation::Write, run.start, 0, what).await);
        }
        let end = run.end << self.g.cluster_bits;
        if self.ordered && self.file.growable() && self.file.size() < end {
            // After a power loss no mapping may lead beyond the end of the file.
            self.file.truncate(end).await?;
        }
        let ones = run.clone().map(|cluster| (cluster % epb, 1)).collect::<Vec<_>>();
        self.set_refcounts(alloc, block, &ones).await?;
        alloc.free.remove(run.clone());
        alloc.occupied.remove(run.clone());
        // Not before this flush may anything refer to these clusters.
        self.order().await?;
        lock(&self.pool).clusters.insert(run);
        Ok(())
    }

    /// Learns which clusters of the next refcount block are free; makes the block if need be.
    pub(crate) async fn advance(&self, alloc: &mut Allocator) -> Result<()> {
        let epb = self.g.block_entries();
        let block = alloc.frontier / epb;
        let Some(&entry) = alloc.table.get(block as usize) else {
            return self.grow_table(alloc).await;
        };
        if entry & TABLE_MASK == 0 {
            self.new_block(alloc, block).await?;
        }
        let end = (block + 1) * epb;
        let from = alloc.frontier;
        let order = self.g.refcount_order;
        let data = self.block(alloc, block).await?;
        let mut found = IntervalSet::default();
        let mut at = from;
        while at < end {
            let next = (at..end).find(|c| refcount::get(data, order, c % epb) == 0);
            let Some(start) = next else { break };
            let stop = (start..end).find(|c| refcount::get(data, order, c % epb) != 0);
            at = stop.unwrap_or(end);
            found.insert(start..at);
        }
        alloc.frontier = end;
        let touched = lock(&self.pool).touched_end;
        for range in found.iter() {
            let split = touched.clamp(range.start, range.end);
            alloc.add_free(range.start..split, true);
            alloc.add_free(split..range.end, false);
        }
        Ok(())
    }

    /// The contents of a refcount block, which the table must have.
    async fn block<'a>(&self, alloc: &'a mut Allocator, index: u64) -> Result<&'a mut Vec<u8>> {
        if alloc.blocks.get(index).is_none() {
            let offset = self.block_offset(alloc, index).await?;
            let data = self.file.read(offset, self.g.cluster_len()).await?;
            alloc.blocks.insert(index, data.to_vec());
        }
        // It was there or has just been inserted.
        alloc.blocks.get(index).ok_or_else(|| {
            self.error(Operation::Write, ErrorKind::Io, "refcount block vanished from the cache")
        })
    }

    /// Where a refcount block lies; an error if that place cannot be right.
    async fn block_offset(&self, alloc: &Allocator, index: u64) -> Result<u64> {
        let offset = alloc.table.get(index as usize).copied().unwrap_or(0) & TABLE_MASK;
        let cluster = offset >> self.g.cluster_bits;
        let valid = offset != 0
            && self.g.is_aligned(offset)
            && offset < self.file_limit()
            && lock(&self.regions).is_sole_table(cluster, Kind::RefcountBlock);
        if valid {
            return Ok(offset);
        }
        let what = format!("refcount block {index} at invalid offset {offset:#x}");
        Err(self.corrupt(Operation::Write, offset, self.g.cluster_size(), what).await)
    }

    /// Writes new counts of one block: pairs of index in the block, ascending, and count.
    pub(crate) async fn set_refcounts(
        &self,
        alloc: &mut Allocator,
        block: u64,
        counts: &[(u64, u64)],
    ) -> Result<()> {
        let (Some(first), Some(last)) = (counts.first(), counts.last()) else { return Ok(()) };
        let order = self.g.refcount_order;
        let span = refcount::byte_span(order, first.0, last.0);
        let offset = self.block_offset(alloc, block).await?;
        let data = self.block(alloc, block).await?;
        let base = ((span.start as u64) * 8) >> order;
        let mut new = data.get(span.clone()).unwrap_or_default().to_vec();
        counts.iter().for_each(|(i, count)| refcount::set(&mut new, order, i - base, *count));
        let new = Bytes::from(new);
        let at = offset + span.start as u64;
        self.write_live("write of refcounts", at, new.clone()).await?;
        if let Some(old) = self.block(alloc, block).await?.get_mut(span) {
            old.copy_from_slice(&new);
        }
        Ok(())
    }

    /// Makes a refcount block at the start of what it describes.
    async fn new_block(&self, alloc: &mut Allocator, index: u64) -> Result<()> {
        let cluster = index * self.g.block_entries();
        self.check_unclaimed(cluster..cluster + 1).await?;
        let mut data = vec![0; self.g.cluster_len()];
        refcount::set(&mut data, self.g.refcount_order, 0, 1);
        let offset = cluster << self.g.cluster_bits;
        self.file.write(offset, Bytes::from(data.clone())).await?;
        self.order().await?;
        let at = alloc.table_offset + index * 8;
        let entry = Bytes::copy_from_slice(&offset.to_be_bytes());
        self.write_live("write of a refcount table entry", at, entry).await?;
        if let Some(entry) = alloc.table.get_mut(index as usize) {
            *entry = offset;
        }
        alloc.blocks.insert(index, data);
        lock(&self.regions).insert_table(cluster, Kind::RefcountBlock);
        self.touch(cluster + 1);
        Ok(())
    }

    pub(crate) fn touch(&self, end: u64) {
        let mut pool = lock(&self.pool);
        pool.touched_end = pool.touched_end.max(end);
    }

    /// New metadata may go to these clusters: nothing known lies there.
    pub(crate) async fn check_unclaimed(&self, range: std::ops::Range<u64>) -> Result<()> {
        if range.end > 1 << (56 - self.g.cluster_bits) {
            return Err(self.error(Operation::Write, ErrorKind::NoSpace, "image file too large"));
        }
        let kind = lock(&self.regions).find(range.clone());
        let Some(kind) = kind else { return Ok(()) };
        let what = format!("{} in clusters {range:?} that count as free", kind.name());
        Err(self.corrupt(Operation::Write, range.start << self.g.cluster_bits, 0, what).await)
    }

    /// Drops one reference per mention of a cluster, now or after the next durable flush, as the
    /// order demands: whatever referred to them must be gone from the file before.
    pub(crate) async fn drop_references(&self, clusters: Vec<u64>, punch: bool) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        *lock(&self.inflated) = None;
        if !self.ordered {
            return self.release(clusters, punch).await;
        }
        let waiting = {
            let mut deferred = lock(&self.deferred);
            let list = if punch { &mut deferred.punch } else { &mut deferred.recycle };
            list.extend(clusters);
            deferred.len()
        };
        if waiting > DEFERRED_MAX { self.flush_durable().await } else { Ok(()) }
    }

    /// Drops references at once. A cluster becomes allocatable only when its hole is punched:
    /// otherwise the hole could hit its next owner.
    pub(crate) async fn release(&self, mut clusters: Vec<u64>, punch: bool) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        clusters.sort_unstable();
        if punch {
            let last = self.last_references(&clusters).await?;
            for run in last.iter() {
                let bits = self.g.cluster_bits;
                self.file.punch(run.start << bits, (run.end - run.start) << bits).await;
            }
        }
        let mut alloc = self.alloc.lock().await;
        self.release_sorted(&mut alloc, &clusters, punch).await
    }

    /// Those of the clusters that lose their last reference. (Nobody but us can hold one, so
    /// that this cannot change meanwhile.)
    async fn last_references(&self, clusters: &[u64]) -> Result<IntervalSet> {
        let mut alloc = self.alloc.lock().await;
        let epb = self.g.block_entries();
        let mut last = IntervalSet::default();
        for same in clusters.chunk_by(|a, b| a == b) {
            let data = self.block(&mut alloc, same[0] / epb).await?;
            if refcount::get(data, self.g.refcount_order, same[0] % epb) == same.len() as u64 {
                last.insert(same[0]..same[0] + 1);
            }
        }
        Ok(last)
    }

    /// The same for a caller that holds the lock; `clusters` is sorted.
    pub(crate) async fn release_sorted(
        &self,
        alloc: &mut Allocator,
        clusters: &[u64],
        punched: bool,
    ) -> Result<()> {
        let (epb, order) = (self.g.block_entries(), self.g.refcount_order);
        for group in clusters.chunk_by(|a, b| a / epb == b / epb) {
            let block = group[0] / epb;
            let data = self.block(alloc, block).await?;
            let mut counts = Vec::with_capacity(group.len());
            let mut bad = None;
            for same in group.chunk_by(|a, b| a == b) {
                let old = refcount::get(data, order, same[0] % epb);
                match old.checked_sub(same.len() as u64) {
                    Some(new) => counts.push((same[0] % epb, new)),
                    None => bad = bad.or(Some((same[0], "refcount would fall below zero"))),
                }
            }
            bad = bad.or_else(|| {
                let regions = lock(&self.regions);
                let free = counts.iter().filter(|(_, n)| *n == 0).map(|(i, _)| block * epb + i);
                free.into_iter()
                    .find(|c| regions.find(*c..*c + 1).is_some())
                    .map(|c| (c, "metadata would become free"))
            });
            if let Some((cluster, what)) = bad {
                let at = cluster << self.g.cluster_bits;
                let what = format!("{what} (cluster {cluster})");
                return Err(self.corrupt(Operation::Write, at, self.g.cluster_size(), what).await);
            }
            self.set_refcounts(alloc, block, &counts).await?;
            let touched_end = lock(&self.pool).touched_end;
            for (index, _) in counts.iter().filter(|(_, count)| *count == 0) {
                let cluster = block * epb + index;
                alloc.add_free(cluster..cluster + 1, !punched && cluster < touched_end);
            }
        }
        Ok(())
    }

    /// Gives the pool's clusters back to the file.
    pub(crate) async fn drain_pool(&self) -> Result<()> {
        let pooled = std::mem::take(&mut lock(&self.pool).clusters);
        let clusters: Vec<u64> = pooled.iter().flatten().collect();
        self.release(clusters, false).await
    }
}
