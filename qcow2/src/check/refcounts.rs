//! Comparing the refcounts with the references, and making them right.

use brep_block::{FlushLevel, Result};
use bytes::{BufMut, Bytes, BytesMut};

use super::{CheckMode, Checker};
use crate::alloc::TABLE_MASK;
use crate::entry::{Entry, Host};
use crate::geometry::{COPIED, OFFSET_MASK};
use crate::growth::Layout;
use crate::header::{REFCOUNT_TABLE_MAX, encode_table, field, u64_at};
use crate::refcount;

impl Checker {
    /// Compares, and repairs as far as the mode goes.
    pub(super) async fn compare(&mut self) -> Result<()> {
        self.find_uncounted();
        if self.rebuild && self.mode == CheckMode::RepairAll && !self.blind {
            return self.rebuild_refcounts().await;
        }
        for index in 0..self.refcount_table.len() {
            let offset = self.refcount_table[index] & TABLE_MASK;
            if offset != 0 {
                self.compare_block(index as u64, offset).await?;
            }
        }
        Ok(())
    }

    /// Clusters that are used and that no refcount block describes.
    fn find_uncounted(&mut self) {
        let epb = self.g.block_entries();
        let described = |cluster: u64| {
            self.refcount_table.get((cluster / epb) as usize).is_some_and(|entry| *entry != 0)
        };
        let uncounted: Vec<u64> =
            self.counts.counted(0).map(|(c, _)| c).filter(|c| !described(*c)).collect();
        for cluster in uncounted {
            self.structural(format!("cluster {cluster} is used, but has no refcount"));
        }
    }

    async fn compare_block(&mut self, index: u64, offset: u64) -> Result<()> {
        let (epb, order) = (self.g.block_entries(), self.g.refcount_order);
        let mut data = self.file.read(offset, self.g.cluster_len()).await?.to_vec();
        let mut changed = false;
        for i in 0..epb {
            let cluster = index * epb + i;
            let (stored, used) = (refcount::get(&data, order, i), self.counts.get(cluster));
            if stored == used {
                continue;
            }
            let beyond = cluster >= self.file_clusters;
            let repair = if stored > used && beyond {
                // It takes no space, so nobody needs to be told.
                self.mode != CheckMode::Report && !self.blind
            } else if stored > used {
                let what = format!("cluster {cluster} is leaked: refcount {stored}, used {used}");
                self.report.leaks += 1;
                self.say(what);
                self.mode != CheckMode::Report && !self.blind
            } else {
                let what = format!("cluster {cluster}: refcount {stored}, but used {used} times");
                self.corruption(what);
                self.mode == CheckMode::RepairAll && used <= refcount::max(order)
            };
            if !repair {
                continue;
            }
            refcount::set(&mut data, order, i, used);
            changed = true;
            match stored > used {
                true if beyond => {}
                true => {
                    self.report.leaks -= 1;
                    self.report.leaks_fixed += 1;
                }
                false => self.fixed(),
            }
        }
        if changed {
            self.file.write(offset, Bytes::from(data)).await?;
        }
        Ok(())
    }

    /// Writes a new refcount structure behind everything else and switches to it.
    async fn rebuild_refcounts(&mut self) -> Result<()> {
        self.forget_old_structure();
        let g = self.g;
        let order = g.refcount_order;
        if self.counts.counted(0).any(|(_, count)| count > refcount::max(order)) {
            self.say("a cluster is used more often than a refcount can hold".into());
            return Ok(());
        }
        let base = self.counts.end().max(self.file_clusters);
        let layout = Layout::new(&g, base, 0, 1);
        if layout.table << g.cluster_bits > REFCOUNT_TABLE_MAX {
            self.say("the file is too large for a new refcount table".into());
            return Ok(());
        }
        let mut table = vec![0u64; (layout.table << g.cluster_bits) as usize / 8];
        let table_first = base + layout.blocks;
        (table_first..table_first + layout.table).for_each(|c| self.counts.add(c, 1));
        // Only blocks that count something are made. A block counts itself, which may make one
        // more of them: those that describe blocks come last, so one pass from below suffices
        // once they are known.
        let mut needed = vec![false; layout.blocks as usize];
        let epb = g.block_entries();
        let mut mark = |cluster: u64| {
            needed.get_mut((cluster / epb) as usize).is_some_and(|n| !std::mem::replace(n, true))
        };
        self.counts.counted(0).for_each(|(cluster, _)| {
            mark(cluster);
        });
        (base..table_first).for_each(|cluster| {
            mark(cluster);
        });
        let blocks: Vec<u64> =
            (0..layout.blocks).filter(|i| needed.get(*i as usize) == Some(&true)).collect();
        blocks.iter().for_each(|i| self.counts.add(base + i, 1));
        for index in blocks {
            let mut data = vec![0; g.cluster_len()];
            let first = index * epb;
            let counted = self.counts.counted(first).take_while(|(c, _)| *c < first + epb);
            counted.for_each(|(c, count)| refcount::set(&mut data, order, c - first, count));
            let offset = (base + index) << g.cluster_bits;
            self.file.write(offset, Bytes::from(data)).await?;
            if let Some(entry) = table.get_mut(index as usize) {
                *entry = offset;
            }
        }
        let table_offset = table_first << g.cluster_bits;
        self.file.write(table_offset, encode_table(&table)).await?;
        self.file.flush(FlushLevel::Durable).await?;
        let mut switch = BytesMut::with_capacity(12);
        switch.put_u64(table_offset);
        switch.put_u32(layout.table as u32);
        self.file.write(field::REFCOUNT_TABLE, switch.freeze()).await?;
        self.file.flush(FlushLevel::Durable).await?;
        self.refcount_table = table;
        self.report.corruptions -= self.structural;
        self.report.corruptions_fixed += self.structural;
        Ok(())
    }

    /// Nothing refers to the old table and blocks any more.
    fn forget_old_structure(&mut self) {
        let bits = self.g.cluster_bits;
        let first = self.header.refcount_table_offset >> bits;
        let table = u64::from(self.header.refcount_table_clusters);
        let in_file = !self.refcount_table.is_empty();
        let table = (first..first + table).filter(|_| in_file);
        let old: Vec<u64> = table.chain(self.blocks.iter().copied()).collect();
        for cluster in old {
            match self.counts.get(cluster) {
                0 => {}
                count => {
                    self.counts.clear(cluster);
                    self.counts.add(cluster, (count - 1) as u32);
                }
            }
        }
    }

    /// Every flag "may be written in place" must say whether the refcount is exactly 1.
    pub(super) async fn check_copied(&mut self) -> Result<()> {
        for index in 0..self.l1.len() {
            let entry = self.l1[index];
            let offset = entry & OFFSET_MASK;
            if offset == 0 || !self.l2.contains_key(&offset) {
                continue;
            }
            let right = with_flag(entry, self.counts.get(offset >> self.g.cluster_bits) == 1);
            if entry != right {
                self.corruption(format!("L1 entry {index} has a wrong COPIED flag: {entry:#x}"));
                let at = self.header.l1_offset + index as u64 * 8;
                self.fix_flag(at, right).await?;
            }
        }
        let active = self.l2.iter().filter(|(_, usage)| usage.active);
        let tables: Vec<u64> = active.map(|(offset, _)| *offset).collect();
        for offset in tables {
            self.check_copied_in(offset).await?;
        }
        Ok(())
    }

    async fn check_copied_in(&mut self, table: u64) -> Result<()> {
        let data = self.file.read(table, self.g.cluster_len()).await?;
        let size = self.g.entry_size() as usize;
        for (index, entry) in data.chunks_exact(size).enumerate() {
            let (word, bitmap) = (u64_at(entry, 0), u64_at(entry, 8));
            let decoded = Entry::decode(&self.g, word, bitmap);
            let Ok(Entry { host: Host::Cluster { offset, .. }, .. }) = decoded else { continue };
            let right = with_flag(word, self.counts.get(offset >> self.g.cluster_bits) == 1);
            if word != right {
                let at = table + (index * size) as u64;
                self.corruption(format!("L2 entry at {at:#x} has a wrong COPIED flag: {word:#x}"));
                self.fix_flag(at, right).await?;
            }
        }
        Ok(())
    }

    async fn fix_flag(&mut self, at: u64, word: u64) -> Result<()> {
        // With counts that may be too low, setting the flag could allow a write to shared data.
        if self.mode == CheckMode::RepairAll && (!self.blind || word & COPIED == 0) {
            self.file.write(at, Bytes::copy_from_slice(&word.to_be_bytes())).await?;
            self.fixed();
        }
        Ok(())
    }
}

fn with_flag(entry: u64, copied: bool) -> u64 {
    if copied { entry | COPIED } else { entry & !COPIED }
}
