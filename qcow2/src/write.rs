//! Writing: in place, or to new clusters with what surrounds the written bytes copied.
//!
//! The order in the file is: refcounts, data, mapping, and only then the release of what was
//! mapped before. When a write has completed, all of it is in the file.

use std::ops::Range;

use brep_block::{ErrorKind, LockMode, Operation, Result};
use bytes::{Bytes, BytesMut};

use crate::entry::{Entry, Host};
use crate::header::encode_table;
use crate::image::{Image, lock};
use crate::map::L2Table;
use crate::regions::Kind;

/// Parts up to this size are joined into one write rather than written one by one.
const JOIN_MAX: usize = 256 << 10;

/// A new mapping for the cluster at an index of an L2 table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    pub(crate) index: usize,
    pub(crate) old: Entry,
    pub(crate) new: Entry,
}

/// What a write does to one cluster. Offsets are guest offsets.
#[derive(Debug, Clone, Copy)]
struct Piece {
    change: Change,
    cluster: u64,
    /// Host offset of the cluster that is written.
    host: u64,
    allocated: bool,
    /// What the guest writes.
    from: u64,
    to: u64,
    /// What is written in all: `head..from` and `to..tail` are copied.
    head: u64,
    tail: u64,
}

/// A write to neighbouring bytes of the file.
struct Segment {
    host: u64,
    head: Bytes,
    /// Which bytes of the guest's data.
    data: Range<usize>,
    tail: Bytes,
}

impl Segment {
    fn end(&self) -> u64 {
        self.host + (self.head.len() + self.data.len() + self.tail.len()) as u64
    }
}

impl Image {
    /// The clusters that a range touches, as a range of bytes for the lock.
    pub(crate) fn whole_clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset + len;
        self.g.cluster_start(offset)..end.next_multiple_of(self.g.cluster_size())
    }

    /// Writes all of `data`.
    pub(crate) async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        self.check_writable(Operation::Write)?;
        let range = self.whole_clusters(offset, data.len() as u64);
        if !self.write_in_place(range.clone(), offset, &data).await? {
            let _guard = self.ranges.lock(range, LockMode::Exclusive).await;
            self.check_writable(Operation::Write)?;
            self.write_mapped(offset, &data).await?;
        }
        if fua { self.flush_durable().await } else { Ok(()) }
    }

    /// Writes where every touched sub-cluster is allocated and ours alone. False, with nothing
    /// done, if that does not hold.
    async fn write_in_place(&self, range: Range<u64>, offset: u64, data: &Bytes) -> Result<bool> {
        // Known without the lock, but only a hint: saves the lock for allocating writes.
        if let Some(table) = self.map.cached_for(self.g.l1_index(offset))
            && self.run_in_place(&table, offset, data.len()).is_none()
        {
            return Ok(false);
        }
        let _guard = self.ranges.lock(range, LockMode::Shared).await;
        let mut runs = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let l1_index = self.g.l1_index(at);
            if self.map.l1_entry(l1_index) & crate::geometry::COPIED == 0 {
                return Ok(false);
            }
            let Some(table) = self.l2(Operation::Write, l1_index).await? else {
                return Ok(false);
            };
            let Some((host, len)) = self.run_in_place(&table, at, data.len() - done) else {
                return Ok(false);
            };
            runs.push((host, done..done + len));
            done += len;
        }
        for (host, part) in runs {
            self.write_data(host, data.slice(part)).await?;
        }
        Ok(true)
    }

    /// The longest run from `offset` on that can be written in place: its host offset and
    /// length, at most `len` and within one L2 table.
    fn run_in_place(&self, table: &L2Table, offset: u64, len: usize) -> Option<(u64, usize)> {
        let g = &self.g;
        let end = offset + len as u64;
        let mut start = None;
        let mut at = offset;
        table.visit(g, g.l2_index(offset), |_, entry| {
            let in_cluster = g.in_cluster(at);
            let to = g.cluster_size().min(in_cluster + (end - at));
            let touched = g.touched(in_cluster, to);
            let host = entry.ok().filter(|e| e.alloc & touched == touched);
            let Some(host) = host.and_then(|e| e.own_host()) else {
                // All or nothing: a part in place would only make the rest a second request.
                return false;
            };
            let first = *start.get_or_insert(host + in_cluster);
            if first + (at - offset) != host + in_cluster {
                return false;
            }
            at += to - in_cluster;
            at < end
        });
        start.map(|host| (host, (at - offset) as usize)).filter(|(_, len)| *len > 0)
    }

    /// Writes guest data to its host clusters, which must not be metadata.
    pub(crate) async fn write_data(&self, host: u64, data: Bytes) -> Result<()> {
        let end = host + data.len() as u64;
        self.check_data_range(host..end).await?;
        self.file.write(host, data).await
    }

    async fn check_data_range(&self, host: Range<u64>) -> Result<()> {
        let bits = self.g.cluster_bits;
        let clusters = host.start >> bits..self.g.clusters(host.end);
        let metadata = lock(&self.regions).find(clusters);
        let what = match metadata {
            Some(kind) => format!("data write to {host:#x?} would overwrite the {}", kind.name()),
            None if host.end > self.file_limit() => {
                format!("data write to {host:#x?} lies beyond the end of the file")
            }
            None => return Ok(()),
        };
        let len = host.end - host.start;
        Err(self.corrupt(Operation::Write, host.start, len, what).await)
    }

    /// Writes with the range's clusters held exclusively.
    pub(crate) async fn write_mapped(&self, offset: u64, data: &Bytes) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let room = self.g.l2_coverage() - at % self.g.l2_coverage();
            let len = (data.len() - done).min(usize::try_from(room).unwrap_or(usize::MAX));
            self.write_in_table(at, data.slice(done..done + len)).await?;
            done += len;
        }
        Ok(())
    }

    async fn write_in_table(&self, offset: u64, data: Bytes) -> Result<()> {
        let table = self.writable_l2(Operation::Write, self.g.l1_index(offset)).await?;
        let mut pieces = self.plan(&table, offset, data.len() as u64).await?;
        #[cfg(feature = "simulation")]
        if brep_block::plant::is(brep_block::plant::Plant::MappingBeforeData) {
            self.allocate_pieces(&mut pieces).await?;
            let changes: Vec<Change> = pieces.iter().map(|p| p.change).collect();
            self.relink(&table, &changes).await?;
        }
        if let Err(error) = self.write_pieces(&mut pieces, offset, &data).await {
            for piece in pieces.iter().filter(|p| p.allocated) {
                self.give_back(piece.host >> self.g.cluster_bits, 1);
            }
            return Err(error);
        }
        let changes: Vec<Change> = pieces.iter().map(|p| p.change).collect();
        self.relink(&table, &changes).await?;
        self.drop_replaced(&changes, false).await
    }

    /// What happens to each cluster, hosts of new ones apart.
    async fn plan(&self, table: &L2Table, offset: u64, len: u64) -> Result<Vec<Piece>> {
        let g = &self.g;
        let end = offset + len;
        let mut pieces = Vec::with_capacity((g.clusters(g.in_cluster(offset) + len)) as usize);
        let mut bad = None;
        table.visit(g, g.l2_index(offset), |index, entry| {
            let cluster = g.cluster_start(offset) + pieces.len() as u64 * g.cluster_size();
            match entry {
                Ok(old) => {
                    let from = offset.max(cluster);
                    let to = end.min(cluster + g.cluster_size());
                    pieces.push(self.plan_piece(index, old, cluster, from..to));
                }
                Err(what) => bad = Some((cluster, what)),
            }
            bad.is_none() && cluster + g.cluster_size() < end
        });
        match bad {
            None => Ok(pieces),
            Some((at, what)) => {
                let what = format!("bad L2 entry: {what}");
                Err(self.corrupt(Operation::Write, at, g.cluster_size(), what).await)
            }
        }
    }

    fn plan_piece(&self, index: usize, old: Entry, cluster: u64, guest: Range<u64>) -> Piece {
        let g = &self.g;
        let (from, to) = (guest.start - cluster, guest.end - cluster);
        let touched = g.touched(from, to);
        let sub = g.subcluster_size();
        // Sub-clusters whose content has to be in the new host cluster.
        let (host, keep) = match old.host {
            Host::Cluster { offset, copied: true } => (offset, 0),
            Host::Compressed { .. } => (0, g.all_subclusters()),
            Host::Cluster { .. } | Host::None => (0, old.alloc),
        };
        let in_place = if host == 0 { 0 } else { old.alloc };
        let (mut head, mut tail) = (from, to);
        if in_place >> g.subcluster_of(from) & 1 == 0 {
            head = from / sub * sub;
        }
        if in_place >> g.subcluster_of(to - 1) & 1 == 0 {
            tail = to.next_multiple_of(sub);
        }
        if keep != 0 {
            head = head.min(u64::from(keep.trailing_zeros()) * sub);
            tail = tail.max(u64::from(32 - keep.leading_zeros()) * sub);
        }
        let new = Entry {
            host: Host::Cluster { offset: host, copied: true },
            alloc: old.alloc | keep | touched,
            zero: old.zero & !touched,
        };
        Piece {
            change: Change { index, old, new },
            cluster,
            host,
            allocated: false,
            from: guest.start,
            to: guest.end,
            head: cluster + head,
            tail: cluster + tail,
        }
    }

    /// Allocates what the pieces lack, and writes their data with what surrounds it.
    async fn write_pieces(&self, pieces: &mut [Piece], offset: u64, data: &Bytes) -> Result<()> {
        self.allocate_pieces(pieces).await?;
        let mut segments: Vec<Segment> = Vec::new();
        let mut copied = false;
        for piece in pieces.iter() {
            let head = self.copy_out(piece.head, piece.from).await?;
            let tail = self.copy_out(piece.to, piece.tail).await?;
            copied |= !head.is_empty() || !tail.is_empty();
            let data = (piece.from - offset) as usize..(piece.to - offset) as usize;
            let host = piece.host + (piece.head - piece.cluster);
            match segments.last_mut() {
                Some(last) if last.end() == host && last.tail.is_empty() && head.is_empty() => {
                    last.data.end = data.end;
                    last.tail = tail;
                }
                _ => segments.push(Segment { host, head, data, tail }),
            }
        }
        for segment in segments {
            self.write_segment(segment, data).await?;
        }
        // What was copied had been safe at its old place: it must not be found at the new one
        // before it is safe there.
        if copied { self.order().await } else { Ok(()) }
    }

    async fn copy_out(&self, from: u64, to: u64) -> Result<Bytes> {
        if from == to {
            return Ok(Bytes::new());
        }
        self.read_mapped(from, (to - from) as usize).await
    }

    async fn allocate_pieces(&self, pieces: &mut [Piece]) -> Result<()> {
        let mut next = 0;
        while next < pieces.len() {
            let wanting = |p: &Piece| p.host == 0;
            let Some(first) = pieces[next..].iter().position(wanting) else { return Ok(()) };
            next += first;
            let count = pieces[next..].iter().take_while(|p| wanting(p)).count();
            let run = self.allocate(count as u64).await?;
            for (i, piece) in pieces[next..next + run.count as usize].iter_mut().enumerate() {
                piece.host = (run.first + i as u64) << self.g.cluster_bits;
                piece.change.new.host = Host::Cluster { offset: piece.host, copied: true };
                piece.allocated = true;
                if run.fresh {
                    self.spare_zeroes(piece);
                }
            }
            next += run.count as usize;
        }
        Ok(())
    }

    /// A host cluster that reads as zeroes needs no zeroes written around the data.
    fn spare_zeroes(&self, piece: &mut Piece) {
        let g = &self.g;
        let old = piece.change.old;
        if old.alloc != 0 || matches!(old.host, Host::Compressed { .. }) {
            return;
        }
        let reads_zero = |at: u64, sub: u64| {
            old.zero >> g.subcluster_of(sub - piece.cluster) & 1 == 1 || self.beyond_backing(at)
        };
        let (head, tail) = (piece.head, piece.tail);
        if reads_zero(head, head) {
            piece.head = piece.from;
        }
        if tail > piece.to && reads_zero(piece.to, tail - 1) {
            piece.tail = piece.to;
        }
    }

    async fn write_segment(&self, segment: Segment, data: &Bytes) -> Result<()> {
        let Segment { host, head, data: range, tail } = segment;
        let body = data.slice(range);
        if head.is_empty() && tail.is_empty() {
            return self.write_data(host, body).await;
        }
        let len = head.len() + body.len() + tail.len();
        if len <= JOIN_MAX {
            let mut all = BytesMut::with_capacity(len);
            [&head, &body, &tail].into_iter().for_each(|part| all.extend_from_slice(part));
            return self.write_data(host, all.freeze()).await;
        }
        let mut at = host;
        for part in [head, body, tail] {
            let len = part.len() as u64;
            if len > 0 {
                self.write_data(at, part).await?;
            }
            at += len;
        }
        Ok(())
    }

    /// Writes changed entries, which are neighbours, to the file and then to memory.
    pub(crate) async fn relink(&self, table: &L2Table, changes: &[Change]) -> Result<()> {
        let g = &self.g;
        let changed = |c: &Change| c.old != c.new;
        let Some(first) = changes.iter().position(changed) else { return Ok(()) };
        let last = changes.iter().rposition(changed).unwrap_or(first);
        let changes = &changes[first..=last];
        let (from, to) = (changes[0].index, changes[0].index + changes.len());
        if !lock(&self.regions).is_sole_table(table.offset >> g.cluster_bits, Kind::L2) {
            let what = "L2 table is not metadata any more";
            return Err(self.error(Operation::Write, ErrorKind::Io, what));
        }
        let mut words = table.words(g, from, to);
        for change in changes.iter().filter(|c| changed(c)) {
            let at = (change.index - from) * g.entry_words();
            let (word, bitmap) = change.new.encode(g);
            words[at] = word;
            if g.extended_l2 {
                words[at + 1] = bitmap;
            }
        }
        let at = table.offset + from as u64 * g.entry_size();
        self.write_live("write of L2 entries", at, encode_table(&words)).await?;
        table.store(g, from, &words);
        Ok(())
    }

    /// Drops the references of old mappings to host clusters that the new ones do not use.
    pub(crate) async fn drop_replaced(&self, changes: &[Change], punch: bool) -> Result<()> {
        let offset = |host: Host| match host {
            Host::Cluster { offset, .. } => Some(offset),
            Host::None | Host::Compressed { .. } => None,
        };
        let replaced = changes.iter().filter(|c| {
            c.old.host != Host::None
                && (offset(c.old.host).is_none() || offset(c.old.host) != offset(c.new.host))
        });
        let clusters = replaced
            .filter_map(|c| c.old.references(&self.g))
            .flat_map(|(first, count)| first..first + count)
            .collect();
        self.drop_references(clusters, punch).await
    }
}
