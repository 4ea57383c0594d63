//! Counting references: header, mapping, snapshots, refcount structure, bitmaps.

use brep_block::Result;
use bytes::Bytes;

use super::{CheckMode, Checker};
use crate::alloc::TABLE_MASK;
use crate::entry::{Entry, Host};
use crate::geometry::{COPIED, OFFSET_MASK};
use crate::header::{SNAPSHOTS_MAX, byte_at, decode_table, u16_at, u32_at, u64_at};
use crate::snapshot::{self, LoadError};

/// Entries of inactive L1 tables, or of bitmap tables, that are looked at in all.
const ENTRIES_MAX: u64 = 1 << 24;
/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
/// Bits of an uncompressed L2 entry that must be zero, bit 0 apart.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;

impl Checker {
    pub(super) async fn scan(&mut self) -> Result<()> {
        let cluster = self.g.cluster_size();
        self.reference("header", 0, cluster, 1);
        self.scan_active_l1().await?;
        self.scan_snapshots().await?;
        let tables: Vec<u64> = self.l2.keys().copied().collect();
        for offset in tables {
            self.scan_l2(offset).await?;
        }
        self.scan_refcount_table().await?;
        self.scan_bitmaps().await?;
        self.drop_shared_blocks();
        Ok(())
    }

    /// Counts a range of the file. False, and nothing is counted, if it lies outside the file.
    fn reference(&mut self, what: &str, offset: u64, len: u64, times: u32) -> bool {
        if len == 0 {
            return true;
        }
        let bits = self.g.cluster_bits;
        let end = offset.checked_add(len).map(|end| self.g.clusters(end));
        match end {
            Some(end) if end <= self.file_clusters => {
                (offset >> bits..end).for_each(|cluster| self.counts.add(cluster, times));
                true
            }
            _ => {
                self.blind = true;
                self.corruption(format!("{what} at {offset:#x} lies beyond the end of the file"));
                false
            }
        }
    }

    async fn scan_active_l1(&mut self) -> Result<()> {
        let (offset, len) = (self.header.l1_offset, self.header.l1_entries as usize * 8);
        if self.reference("active L1 table", offset, len as u64, 1) {
            self.l1 = decode_table(&self.file.read(offset, len).await?);
            for index in 0..self.l1.len() {
                self.scan_l1_entry(index, self.l1[index], true);
            }
        }
        Ok(())
    }

    fn scan_l1_entry(&mut self, index: usize, entry: u64, active: bool) {
        if entry & L1_RESERVED != 0 {
            self.corruption(format!("L1 entry {index} has reserved bits set: {entry:#x}"));
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return;
        }
        if !self.g.is_aligned(offset) {
            self.blind = true;
            return self.corruption(format!("L2 table at {offset:#x} is not aligned"));
        }
        if offset >> self.g.cluster_bits >= self.file_clusters {
            self.blind = true;
            let what = format!("L2 table at {offset:#x} lies beyond the end of the file");
            return self.corruption(what);
        }
        let table = self.l2.entry(offset).or_default();
        table.references = table.references.saturating_add(1);
        table.active |= active;
    }

    async fn scan_snapshots(&mut self) -> Result<()> {
        if self.header.snapshots > SNAPSHOTS_MAX {
            self.blind = true;
            self.corruption(format!("too many snapshots: {}", self.header.snapshots));
            return Ok(());
        }
        let (snapshots, len) = match snapshot::load(&self.file, &self.header).await {
            Ok(loaded) => loaded,
            Err(LoadError::Device(error)) => return Err(error),
            Err(LoadError::Format(error)) => {
                self.blind = true;
                self.corruption(error.to_string());
                return Ok(());
            }
        };
        self.reference("snapshot table", self.header.snapshots_offset, len, 1);
        let entries: u64 = snapshots.iter().map(|s| u64::from(s.l1_entries)).sum();
        if entries > ENTRIES_MAX {
            self.blind = true;
            self.report.check_errors += 1;
            self.say("the L1 tables of the snapshots are too large to be checked".into());
            return Ok(());
        }
        for snapshot in snapshots {
            let len = u64::from(snapshot.l1_entries) * 8;
            if !self.reference("inactive L1 table", snapshot.l1_offset, len, 1) {
                continue;
            }
            let table = decode_table(&self.file.read(snapshot.l1_offset, len as usize).await?);
            for (index, entry) in table.into_iter().enumerate() {
                self.scan_l1_entry(index, entry, false);
            }
        }
        Ok(())
    }

    async fn scan_l2(&mut self, offset: u64) -> Result<()> {
        let usage = self.l2.get(&offset).copied().unwrap_or_default();
        self.reference("L2 table", offset, self.g.cluster_size(), usage.references);
        let data = self.file.read(offset, self.g.cluster_len()).await?;
        let size = self.g.entry_size() as usize;
        for (index, entry) in data.chunks_exact(size).enumerate() {
            let (word, bitmap) = (u64_at(entry, 0), u64_at(entry, 8));
            if word == 0 && bitmap == 0 {
                continue;
            }
            let at = offset + (index * size) as u64;
            if let Some(fixed) = self.scan_entry(at, word, bitmap, usage) {
                let data = Bytes::copy_from_slice(&fixed.to_be_bytes());
                self.file.write(at, data).await?;
                self.fixed();
            }
        }
        Ok(())
    }

    /// Counts what an L2 entry refers to. Returns what the entry has to become, if it can be
    /// repaired on its own.
    fn scan_entry(&mut self, at: u64, word: u64, bitmap: u64, usage: super::L2Use) -> Option<u64> {
        let reserved = L2_RESERVED | u64::from(self.g.extended_l2);
        if word & COMPRESSED == 0 && word & reserved != 0 {
            self.corruption(format!("L2 entry at {at:#x} has reserved bits set: {word:#x}"));
        }
        let entry = match Entry::decode(&self.g, word, bitmap) {
            Ok(entry) => entry,
            Err(what) => {
                self.corruption(format!("L2 entry at {at:#x}: {what}"));
                let offset = word & OFFSET_MASK;
                let plain_zero = !self.g.extended_l2 && self.g.version >= 3 && word & 1 == 1;
                if word & COMPRESSED == 0 && !self.g.is_aligned(offset) && plain_zero {
                    return (self.mode == CheckMode::RepairAll).then_some(1);
                }
                self.blind = true;
                return None;
            }
        };
        if usage.active && entry.host != Host::None {
            self.report.allocated_clusters += 1;
        }
        match entry.host {
            Host::None => {}
            Host::Cluster { offset, .. } => {
                let size = self.g.cluster_size();
                self.reference("data cluster", offset, size, usage.references);
            }
            Host::Compressed { offset, len } => {
                self.report.compressed_clusters += u64::from(usage.active);
                self.reference("compressed cluster", offset, len, usage.references);
            }
        }
        None
    }

    async fn scan_refcount_table(&mut self) -> Result<()> {
        let offset = self.header.refcount_table_offset;
        let len = u64::from(self.header.refcount_table_clusters) << self.g.cluster_bits;
        let end = offset.saturating_add(len);
        if len == 0 || self.g.clusters(end) > self.file_clusters {
            self.structural("there is no refcount table in the file".into());
            return Ok(());
        }
        self.reference("refcount table", offset, len, 1);
        self.refcount_table = decode_table(&self.file.read(offset, len as usize).await?);
        for index in 0..self.refcount_table.len() {
            let entry = self.refcount_table[index];
            let block = entry & TABLE_MASK;
            if entry == 0 {
                continue;
            }
            let inside = block >> self.g.cluster_bits < self.file_clusters;
            if entry & !TABLE_MASK != 0 || block == 0 || !self.g.is_aligned(block) || !inside {
                self.structural(format!("refcount table entry {index} is invalid: {entry:#x}"));
                self.refcount_table[index] = 0;
                continue;
            }
            self.blocks.push(block >> self.g.cluster_bits);
            self.counts.add(block >> self.g.cluster_bits, 1);
        }
        Ok(())
    }

    /// A block that is something else too cannot be trusted, nor written.
    fn drop_shared_blocks(&mut self) {
        for index in 0..self.refcount_table.len() {
            let cluster = self.refcount_table[index] >> self.g.cluster_bits;
            if cluster != 0 && self.counts.get(cluster) != 1 {
                self.structural(format!("refcount block {index} is referenced more than once"));
                self.refcount_table[index] = 0;
            }
        }
    }

    async fn scan_bitmaps(&mut self) -> Result<()> {
        let Some(bitmaps) = self.header.bitmaps() else { return Ok(()) };
        let (offset, size) = (bitmaps.directory_offset, bitmaps.directory_size);
        if !self.reference("bitmap directory", offset, size, 1) {
            return Ok(());
        }
        let directory = self.file.read(offset, size as usize).await?;
        let mut rest = &directory[..];
        let mut budget = ENTRIES_MAX;
        for _ in 0..bitmaps.count {
            let lengths = usize::from(u16_at(rest, 18)) + u32_at(rest, 20) as usize;
            let len = (24 + lengths).next_multiple_of(8);
            if rest.len() < 24 || rest.len() < len || byte_at(rest, 16) != 1 {
                self.blind = true;
                self.corruption("bitmap directory is damaged".into());
                break;
            }
            let (table, entries) = (u64_at(rest, 0), u64::from(u32_at(rest, 8)));
            let Some(left) = budget.checked_sub(entries) else {
                self.blind = true;
                self.report.check_errors += 1;
                self.say("the bitmap tables are too large to be checked".into());
                break;
            };
            budget = left;
            self.scan_bitmap(table, entries).await?;
            rest = &rest[len..];
        }
        Ok(())
    }

    async fn scan_bitmap(&mut self, table: u64, entries: u64) -> Result<()> {
        if !self.g.is_aligned(table) {
            self.blind = true;
            self.corruption(format!("bitmap table at {table:#x} is not aligned"));
            return Ok(());
        }
        if !self.reference("bitmap table", table, entries * 8, 1) {
            return Ok(());
        }
        let data = self.file.read(table, entries as usize * 8).await?;
        for entry in decode_table(&data) {
            let offset = entry & OFFSET_MASK;
            if !self.g.is_aligned(offset) {
                self.blind = true;
                self.corruption(format!("bitmap data at {offset:#x} is not aligned"));
            } else if offset != 0 {
                self.reference("bitmap data", offset, self.g.cluster_size(), 1);
            }
        }
        Ok(())
    }
}
