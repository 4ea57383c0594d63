//! Growing the disk, and ending the use of an image.

use brep_block::{ErrorKind, FlushLevel, LockMode, Operation, Result, ZeroFlags, zeroes};
use bytes::{BufMut, Bytes, BytesMut};

use crate::header::{L1_ENTRIES_MAX, encode_table, field};
use crate::image::{Image, lock};
use crate::regions::Kind;

impl Image {
    /// Makes the disk larger. New bytes read as zeroes.
    pub(crate) async fn grow(&self, size: u64) -> Result<()> {
        let unsupported = |what: &str| {
            Err(self.error(Operation::Truncate, ErrorKind::Unsupported, what).at(size, 0))
        };
        let _all = self.ranges.lock(0..u64::MAX, LockMode::Exclusive).await;
        let _structure = self.structure.lock().await;
        self.check_writable(Operation::Truncate)?;
        let old = self.size();
        if size == old {
            return Ok(());
        }
        if size < old {
            return unsupported("an image cannot shrink");
        }
        if !size.is_multiple_of(512) {
            let what = "the size must be a multiple of 512 bytes";
            return Err(self.error(Operation::Truncate, ErrorKind::InvalidInput, what));
        }
        if !self.snapshots.is_empty() {
            return unsupported("an image with snapshots cannot grow");
        }
        if !self.beyond_backing(old) {
            return unsupported("the backing device is larger than the disk");
        }
        let entries = self.g.l1_entries(size);
        if size > i64::MAX as u64 || entries > L1_ENTRIES_MAX {
            let what = "too large for an image with this cluster size";
            return Err(self.error(Operation::Truncate, ErrorKind::InvalidInput, what));
        }
        if entries as usize > lock(&self.map.l1).entries.len() {
            self.grow_l1(entries as usize).await?;
        }
        {
            let _io = self.header_io.lock().await;
            let data = Bytes::copy_from_slice(&size.to_be_bytes());
            self.write_live("write of the size", field::SIZE, data).await?;
            lock(&self.header).size = size;
            self.size.store(size, std::sync::atomic::Ordering::Release);
        }
        drop(_structure);
        drop(_all);
        // What another program left beyond the old end of the last cluster must not appear.
        let rest = (old.next_multiple_of(self.g.cluster_size())).min(size) - old;
        if rest > 0 {
            self.write_zeroes(old, rest, ZeroFlags::default()).await?;
        }
        Ok(())
    }

    async fn grow_l1(&self, entries: usize) -> Result<()> {
        let g = &self.g;
        let mut words = lock(&self.map.l1).entries.clone();
        let (old_offset, old_len) = (lock(&self.map.l1).offset, words.len());
        words.resize(entries, 0);
        let clusters = g.clusters(entries as u64 * 8);
        let first = self.allocate_row(clusters).await?;
        let offset = first << g.cluster_bits;
        self.file.write(offset, zeroes((clusters << g.cluster_bits) as usize)).await?;
        self.file.write(offset, encode_table(&words)).await?;
        self.order().await?;
        {
            let _io = self.header_io.lock().await;
            // Size, encryption method, L1 length and offset are neighbours.
            let mut data = BytesMut::with_capacity(24);
            data.put_u64(self.size());
            data.put_u32(0);
            data.put_u32(entries as u32);
            data.put_u64(offset);
            self.write_live("switch of the L1 table", field::SIZE, data.freeze()).await?;
            let mut header = lock(&self.header);
            header.l1_entries = entries as u32;
            header.l1_offset = offset;
        }
        {
            let mut regions = lock(&self.regions);
            regions.remove_fixed(old_offset >> g.cluster_bits);
            // The clusters have just been allocated, so nothing lies there.
            let _ = regions.insert_fixed(first..first + clusters, Kind::L1);
            let mut l1 = lock(&self.map.l1);
            l1.offset = offset;
            l1.entries = words;
        }
        let old_first = old_offset >> g.cluster_bits;
        let old = (old_first..old_first + g.clusters(old_len as u64 * 8)).collect();
        self.drop_references(old, false).await
    }

    /// Allocates exactly `count` neighbouring clusters.
    async fn allocate_row(&self, count: u64) -> Result<u64> {
        let mut spare = Vec::new();
        let mut row = self.allocate(count).await?;
        while row.count < count {
            let more = self.allocate(count - row.count).await?;
            if more.first == row.first + row.count {
                row.count += more.count;
            } else {
                spare.push(row);
                row = more;
            }
        }
        for run in spare {
            self.release((run.first..run.first + run.count).collect(), false).await?;
        }
        Ok(row.first)
    }

    /// Makes everything durable and gives back what had been set aside.
    pub(crate) async fn close(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let _all = self.ranges.lock(0..u64::MAX, LockMode::Exclusive).await;
        self.check_health(Operation::Flush)?;
        self.flush_durable().await?;
        self.forget_staged();
        self.drain_pool().await?;
        self.file.flush(FlushLevel::Durable).await?;
        self.mark_closed();
        Ok(())
    }
}
