//! Writes in two steps: data first, where nothing finds it, and later the mapping.

use std::ops::Range;

use brep_block::{ErrorKind, LockMode, Operation, Result};
use bytes::{Bytes, BytesMut};

use crate::entry::{Entry, Host};
use crate::image::{Image, lock};
use crate::map::L2Table;

impl Image {
    /// Writes data to where `publish` will map it. Whole sub-clusters, but for the end of the disk.
    pub(crate) async fn stage(&self, offset: u64, data: Bytes) -> Result<()> {
        self.check_writable(Operation::Write)?;
        let data = self.whole_subclusters(offset, data)?;
        let range = self.whole_clusters(offset, data.len() as u64);
        let _guard = self.ranges.lock(range, LockMode::Exclusive).await;
        self.check_writable(Operation::Write)?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (host, len) = self.place_staged(at, (data.len() - done) as u64).await?;
            self.write_data(host, data.slice(done..done + len)).await?;
            done += len;
        }
        Ok(())
    }

    /// The same data with the last sub-cluster filled up, where the disk ends in it.
    fn whole_subclusters(&self, offset: u64, data: Bytes) -> Result<Bytes> {
        let sub = self.g.subcluster_size();
        let end = offset + data.len() as u64;
        let whole_end = end.next_multiple_of(sub);
        if !offset.is_multiple_of(sub) || (end != whole_end && whole_end < self.size()) {
            let what = format!("only whole units of {sub} bytes can be staged");
            let error = self.error(Operation::Write, ErrorKind::InvalidInput, what);
            return Err(error.at(offset, data.len() as u64));
        }
        if end == whole_end {
            return Ok(data);
        }
        let mut padded = BytesMut::from(&*data);
        padded.resize((whole_end - offset) as usize, 0);
        Ok(padded.freeze())
    }

    /// Where the first bytes of a range are staged, and how many of them lie there in a row.
    async fn place_staged(&self, at: u64, len: u64) -> Result<(u64, usize)> {
        let first = self.host_for_stage(at).await?;
        let mut run = (self.g.cluster_size() - self.g.in_cluster(at)).min(len);
        while run < len {
            let host = self.host_for_stage(at + run).await?;
            if host != first + run {
                break;
            }
            run += self.g.cluster_size().min(len - run);
        }
        Ok((first, run as usize))
    }

    /// The host offset that a guest offset has, or will have. The caller holds the cluster.
    async fn host_for_stage(&self, at: u64) -> Result<u64> {
        let g = &self.g;
        let cluster = at >> g.cluster_bits;
        let known = lock(&self.staged).get(&cluster).copied();
        let host = match known {
            Some(host) => host << g.cluster_bits,
            None => match self.entry_at(at).await?.host {
                Host::Cluster { offset, copied: true } => offset,
                Host::None => {
                    let run = self.allocate(1).await?;
                    lock(&self.staged).insert(cluster, run.first);
                    run.first << g.cluster_bits
                }
                Host::Cluster { .. } | Host::Compressed { .. } => {
                    let what = "nothing can be staged in a cluster that others use";
                    let error = self.error(Operation::Write, ErrorKind::Unsupported, what);
                    return Err(error.at(at, 0));
                }
            },
        };
        Ok(host + g.in_cluster(at))
    }

    async fn entry_at(&self, at: u64) -> Result<Entry> {
        let Some(table) = self.l2(Operation::Write, self.g.l1_index(at)).await? else {
            return Ok(Entry::UNALLOCATED);
        };
        let mut found = Ok(Entry::UNALLOCATED);
        table.visit(&self.g, self.g.l2_index(at), |_, entry| {
            found = entry;
            false
        });
        match found {
            Ok(entry) => Ok(entry),
            Err(what) => {
                let what = format!("bad L2 entry: {what}");
                Err(self.corrupt(Operation::Write, at, self.g.cluster_size(), what).await)
            }
        }
    }

    /// Maps what was staged.
    pub(crate) async fn publish(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable(Operation::Write)?;
        let _guard = self.ranges.lock(self.whole_clusters(offset, len), LockMode::Exclusive).await;
        self.check_writable(Operation::Write)?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let stop = end.min((at / self.g.l2_coverage() + 1) * self.g.l2_coverage());
            let table = self.writable_l2(Operation::Write, self.g.l1_index(at)).await?;
            self.publish_in_table(&table, at..stop).await?;
            at = stop;
        }
        Ok(())
    }

    async fn publish_in_table(&self, table: &L2Table, range: Range<u64>) -> Result<()> {
        let g = &self.g;
        let mut missing = None;
        let changes = self
            .plan_changes(Operation::Write, table, range.start, range.end, |cluster, old| {
                let from = range.start.max(cluster) - cluster;
                let to = (range.end - cluster).min(g.cluster_size());
                let touched = g.touched(from, to);
                let staged = lock(&self.staged).get(&(cluster >> g.cluster_bits)).copied();
                let host = staged.map(|host| host << g.cluster_bits).or(old.own_host());
                let Some(offset) = host else {
                    missing = Some(cluster);
                    return old;
                };
                Entry {
                    host: Host::Cluster { offset, copied: true },
                    alloc: old.alloc | touched,
                    zero: old.zero & !touched,
                }
            })
            .await?;
        if let Some(cluster) = missing {
            let what = "nothing was staged here that could be published";
            let error = self.error(Operation::Write, ErrorKind::InvalidInput, what);
            return Err(error.at(cluster, g.cluster_size()));
        }
        self.relink(table, &changes).await?;
        let mut staged = lock(&self.staged);
        for cluster in range.start >> g.cluster_bits..g.clusters(range.end) {
            staged.remove(&cluster);
        }
        Ok(())
    }

    /// What was staged and not published is not needed any more. The caller holds all clusters.
    pub(crate) fn forget_staged(&self) {
        let staged = std::mem::take(&mut *lock(&self.staged));
        staged.into_values().for_each(|host| self.give_back(host, 1));
    }
}
