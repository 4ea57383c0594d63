//! Zeroing and discarding: changes of the mapping without data.

use brep_block::{ErrorKind, LockMode, Operation, Result, ZeroFlags, zeroes};

use crate::entry::{BadEntry, Entry, Host};
use crate::image::Image;
use crate::map::L2Table;
use crate::write::Change;

/// Longest piece of zeroes that is written as data.
const ZEROES_MAX: u64 = 1 << 20;
/// L2 tables that are changed before other tasks get a turn.
const TABLES_PER_TURN: u64 = 16;

impl Image {
    /// Makes a range read as zeroes. What is smaller than a sub-cluster is written as data, the
    /// rest only marked.
    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable(Operation::WriteZeroes)?;
        let _guard = self.ranges.lock(self.whole_clusters(offset, len), LockMode::Exclusive).await;
        self.check_writable(Operation::WriteZeroes)?;
        let unit = if self.g.version >= 3 {
            self.g.subcluster_size()
        } else if self.backing.is_none() {
            self.g.cluster_size()
        } else {
            u64::MAX
        };
        let end = offset + len;
        // The last unit of the disk may be a short one.
        let at_end = end == self.size() && unit != u64::MAX;
        let covered_end = if at_end { end.next_multiple_of(unit) } else { end };
        let first = if unit == u64::MAX { None } else { offset.checked_next_multiple_of(unit) };
        let middle = first.map(|from| (from, covered_end / unit * unit)).filter(|(a, b)| a < b);
        if flags.fast && middle != Some((offset, covered_end)) {
            let what = "zeroing this range would write data";
            return Err(self.error(Operation::WriteZeroes, ErrorKind::Unsupported, what));
        }
        match middle {
            None => self.write_zero_data(offset, end).await?,
            Some((from, to)) => {
                self.write_zero_data(offset, from).await?;
                self.mark_zero(from, to, flags.may_unmap).await?;
                self.write_zero_data(to.min(end), end).await?;
            }
        }
        if flags.fua { self.flush_durable().await } else { Ok(()) }
    }

    async fn write_zero_data(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let len = ZEROES_MAX.min(to - at);
            self.write_mapped(at, &zeroes(len as usize)).await?;
            at += len;
        }
        Ok(())
    }

    /// Marks whole sub-clusters as zero. The caller holds the clusters.
    async fn mark_zero(&self, from: u64, to: u64, unmap: bool) -> Result<()> {
        let mut at = from;
        let mut turns = 0;
        while at < to {
            let end = to.min((at / self.g.l2_coverage() + 1) * self.g.l2_coverage());
            turns += 1;
            if turns % TABLES_PER_TURN == 0 {
                tokio::task::yield_now().await;
            }
            let missing = self.map.l1_entry(self.g.l1_index(at)) == 0;
            if missing && self.g.version < 3 {
                at = end;
                continue;
            }
            let table = self.writable_l2(Operation::WriteZeroes, self.g.l1_index(at)).await?;
            let (changes, by_data) = self.plan_zero(&table, at, end, unmap).await?;
            self.relink(&table, &changes).await?;
            self.drop_replaced(&changes, unmap).await?;
            for (from, to) in by_data {
                self.write_zero_data(from, to).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// The new entries of a range, and what of it has to be written as data: compressed clusters
    /// have no sub-clusters that could be marked.
    async fn plan_zero(
        &self,
        table: &L2Table,
        from: u64,
        to: u64,
        unmap: bool,
    ) -> Result<(Vec<Change>, Vec<(u64, u64)>)> {
        let g = &self.g;
        let mut by_data = Vec::new();
        let changes = self
            .plan_changes(Operation::WriteZeroes, table, from, to, |cluster, old| {
                let start = from.max(cluster) - cluster;
                let end = (to - cluster).min(g.cluster_size());
                let covered = g.covered(start, end);
                let whole = covered == g.all_subclusters();
                if matches!(old.host, Host::Compressed { .. }) && !whole {
                    by_data.push((cluster + start, cluster + end));
                    return old;
                }
                if g.version < 3 {
                    return Entry::UNALLOCATED;
                }
                let alloc = old.alloc & !covered;
                let keep = match old.host {
                    Host::Cluster { copied, .. } => alloc != 0 || (copied && !unmap),
                    Host::None | Host::Compressed { .. } => false,
                };
                let host = if keep { old.host } else { Host::None };
                Entry { host, alloc, zero: old.zero | covered }
            })
            .await?;
        Ok((changes, by_data))
    }

    /// New entries for the clusters of a range within one table.
    pub(crate) async fn plan_changes(
        &self,
        operation: Operation,
        table: &L2Table,
        from: u64,
        to: u64,
        mut new: impl FnMut(u64, Entry) -> Entry,
    ) -> Result<Vec<Change>> {
        let g = &self.g;
        let mut changes = Vec::new();
        let mut bad: Option<(u64, BadEntry)> = None;
        let mut cluster = g.cluster_start(from);
        table.visit(g, g.l2_index(from), |index, entry| {
            match entry {
                Ok(old) => changes.push(Change { index, old, new: new(cluster, old) }),
                Err(what) => bad = Some((cluster, what)),
            }
            cluster += g.cluster_size();
            bad.is_none() && cluster < to
        });
        match bad {
            None => Ok(changes),
            Some((at, what)) => {
                let what = format!("bad L2 entry: {what}");
                Err(self.corrupt(operation, at, g.cluster_size(), what).await)
            }
        }
    }

    /// Drops whole clusters of a range; parts of clusters are left alone. With a layer below they
    /// read as zeroes from then on: its old contents must not come back.
    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable(Operation::Discard)?;
        let g = &self.g;
        if g.version < 3 && self.backing.is_some() {
            let what = "a version 2 image over a backing device cannot discard";
            return Err(self.error(Operation::Discard, ErrorKind::Unsupported, what));
        }
        let mut end = offset + len;
        if end == self.size() {
            end = end.next_multiple_of(g.cluster_size());
        }
        let from = offset.next_multiple_of(g.cluster_size());
        let to = g.cluster_start(end);
        if from >= to {
            return Ok(());
        }
        let _guard = self.ranges.lock(from..to, LockMode::Exclusive).await;
        self.check_writable(Operation::Discard)?;
        let mut at = from;
        let mut turns = 0;
        while at < to {
            let end = to.min((at / g.l2_coverage() + 1) * g.l2_coverage());
            turns += 1;
            if turns % TABLES_PER_TURN == 0 {
                tokio::task::yield_now().await;
            }
            self.discard_in_table(at, end).await?;
            at = end;
        }
        Ok(())
    }

    async fn discard_in_table(&self, from: u64, to: u64) -> Result<()> {
        let l1_index = self.g.l1_index(from);
        if self.map.l1_entry(l1_index) == 0 && self.beyond_backing(from) {
            return Ok(());
        }
        let table = self.writable_l2(Operation::Discard, l1_index).await?;
        let zero = Entry { host: Host::None, alloc: 0, zero: self.g.all_subclusters() };
        let changes = self
            .plan_changes(Operation::Discard, &table, from, to, |cluster, old| {
                if old == Entry::UNALLOCATED && self.beyond_backing(cluster) {
                    old
                } else if self.g.version >= 3 {
                    zero
                } else {
                    Entry::UNALLOCATED
                }
            })
            .await?;
        self.relink(&table, &changes).await?;
        self.drop_replaced(&changes, true).await
    }
}
