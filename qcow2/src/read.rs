//! Looking up and reading.

use std::ops::Range;

use brep_block::{BlockStatus, Operation, Result, StatusFlags, zeroes};
use bytes::{Bytes, BytesMut};
use flate2::{Decompress, FlushDecompress, Status};

use crate::entry::{Entry, Host};
use crate::geometry::Geometry;
use crate::image::{Image, Inflated, lock};

/// Where the bytes of a guest range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// In the file, from this offset on.
    Data(u64),
    Zero {
        /// A host cluster is kept for it.
        reserved: bool,
    },
    /// In the layer below, if there is one.
    Backing,
    /// `skip` bytes into what inflating the data at `offset` gives.
    Compressed { offset: u64, len: u64, skip: u64 },
}

impl Source {
    /// The source of what follows `len` bytes later, if it goes on seamlessly.
    fn after(self, len: u64) -> Source {
        match self {
            Source::Data(offset) => Source::Data(offset + len),
            Source::Compressed { offset, len: stored, skip } => {
                Source::Compressed { offset, len: stored, skip: skip + len }
            }
            other => other,
        }
    }
}

/// A part of the disk with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) len: u64,
    pub(crate) source: Source,
}

/// The first extent of a cluster's bytes `at..`, which does not reach beyond the cluster.
fn first_extent(g: &Geometry, entry: &Entry, at: u64) -> Extent {
    let cluster = g.cluster_size();
    if let Host::Compressed { offset, len } = entry.host {
        let source = Source::Compressed { offset, len, skip: at };
        return Extent { len: cluster - at, source };
    }
    let sub = g.subcluster_of(at);
    let state = |bit: u32| (entry.alloc >> bit & 1, entry.zero >> bit & 1);
    let first = state(sub);
    let end = (sub + 1..g.subclusters()).find(|bit| state(*bit) != first);
    let end = u64::from(end.unwrap_or(g.subclusters())) * g.subcluster_size();
    let source = match (first, entry.host) {
        ((1, _), Host::Cluster { offset, .. }) => Source::Data(offset + at),
        ((_, 1), host) => Source::Zero { reserved: host != Host::None },
        _ => Source::Backing,
    };
    Extent { len: end - at, source }
}

impl Image {
    /// The longest run from `offset` on, at most `len` bytes and within one L2 table, that can
    /// be read in one go. `len` is at least 1 and the range lies inside the disk, rounded up to
    /// clusters.
    pub(crate) async fn extent(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> Result<Extent> {
        let g = &self.g;
        let l1_index = g.l1_index(offset);
        let Some(table) = self.l2(operation, l1_index).await? else {
            let end = self.map.next_used(l1_index + 1, g.l1_index(offset + len - 1) + 1);
            let end = end.map_or(offset + len, |i| i as u64 * g.l2_coverage());
            return Ok(Extent { len: (end - offset).min(len), source: Source::Backing });
        };
        let mut found: Option<Extent> = None;
        let mut bad = None;
        table.visit(g, g.l2_index(offset), |_, entry| {
            let entry = match entry {
                Ok(entry) => entry,
                Err(what) => {
                    bad = Some(what);
                    return false;
                }
            };
            let so_far = found.map_or(0, |e| e.len);
            let mut at = g.in_cluster(offset + so_far);
            loop {
                let next = first_extent(g, &entry, at);
                match &mut found {
                    None => found = Some(next),
                    Some(all) if all.source.after(all.len) == next.source => all.len += next.len,
                    Some(_) => return false,
                }
                at += next.len;
                if at >= g.cluster_size() {
                    return found.is_none_or(|e| e.len < len);
                }
            }
        });
        match (found, bad) {
            (Some(extent), _) => Ok(Extent { len: extent.len.min(len), ..extent }),
            (None, what) => {
                let what = format!("bad L2 entry: {}", what.unwrap_or("missing"));
                Err(self.corrupt(operation, offset, len, what).await)
            }
        }
    }

    /// Reads a range. The caller holds its clusters.
    pub(crate) async fn read_mapped(&self, offset: u64, len: usize) -> Result<Bytes> {
        let extent = self.extent(Operation::Read, offset, len as u64).await?;
        if extent.len == len as u64 {
            return self.read_extent(offset, extent).await;
        }
        let mut out = BytesMut::with_capacity(len);
        out.extend_from_slice(&self.read_extent(offset, extent).await?);
        while out.len() < len {
            let at = offset + out.len() as u64;
            let extent = self.extent(Operation::Read, at, (len - out.len()) as u64).await?;
            match extent.source {
                Source::Zero { .. } => out.resize(out.len() + extent.len as usize, 0),
                _ => out.extend_from_slice(&self.read_extent(at, extent).await?),
            }
        }
        Ok(out.freeze())
    }

    async fn read_extent(&self, guest: u64, extent: Extent) -> Result<Bytes> {
        let len = extent.len as usize;
        match extent.source {
            Source::Data(host) => self.file.read(host, len).await,
            Source::Zero { .. } => Ok(zeroes(len)),
            Source::Backing => self.read_backing(guest, len).await,
            Source::Compressed { offset, len: stored, skip } => {
                let cluster = self.inflate(guest, offset, stored).await?;
                Ok(cluster.slice(skip as usize..skip as usize + len))
            }
        }
    }

    /// Reads the layer below: zeroes beyond its end or without one.
    pub(crate) async fn read_backing(&self, offset: u64, len: usize) -> Result<Bytes> {
        let Some(backing) = &self.backing else { return Ok(zeroes(len)) };
        let inside = backing.size().saturating_sub(offset).min(len as u64) as usize;
        if inside == len {
            return backing.read(offset, len).await;
        }
        if inside == 0 {
            return Ok(zeroes(len));
        }
        let mut out = BytesMut::with_capacity(len);
        out.extend_from_slice(&backing.read(offset, inside).await?);
        out.resize(len, 0);
        Ok(out.freeze())
    }

    /// Whether the layer below has nothing to say about a range.
    pub(crate) fn beyond_backing(&self, offset: u64) -> bool {
        self.backing.as_ref().is_none_or(|backing| offset >= backing.size())
    }

    /// The contents of a compressed cluster: exactly one cluster of bytes.
    async fn inflate(&self, guest: u64, offset: u64, len: u64) -> Result<Bytes> {
        if let Some(last) = &*lock(&self.inflated)
            && (last.offset, last.len) == (offset, len)
        {
            return Ok(last.data.clone());
        }
        if offset >= self.file.size() {
            let what = "compressed cluster beyond the end of the file";
            return Err(self.corrupt(Operation::Read, guest, 0, what).await);
        }
        let stored = self.file.read(offset, len as usize).await?;
        let mut data = vec![0; self.g.cluster_len()];
        let mut inflater = Decompress::new(false);
        let result = inflater.decompress(&stored, &mut data, FlushDecompress::Finish);
        let whole = inflater.total_out() == data.len() as u64;
        let ended = matches!(result, Ok(Status::StreamEnd | Status::Ok | Status::BufError));
        if !ended || !whole {
            let what = format!("compressed cluster at {offset} does not inflate to a cluster");
            // Only this cluster is lost: that is an error of the data, not of the metadata.
            let kind = brep_block::ErrorKind::Corrupt;
            return Err(self.error(Operation::Read, kind, what).at(guest, self.g.cluster_size()));
        }
        let data = Bytes::from(data);
        *lock(&self.inflated) = Some(Inflated { offset, len, data: data.clone() });
        Ok(data)
    }

    /// The state of this layer alone: at least 1 and at most `len` bytes that share it.
    pub(crate) async fn layer_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        const TABLES_MAX: usize = 64;
        let mut status: Option<BlockStatus> = None;
        let mut tables = 0;
        loop {
            let done = status.map_or(0, |s| s.len);
            if done >= len {
                break;
            }
            let extent = self.extent(Operation::BlockStatus, offset + done, len - done).await?;
            let flags = layer_flags(extent.source);
            match &mut status {
                None => status = Some(BlockStatus { len: extent.len, flags }),
                Some(all) if all.flags == flags => all.len += extent.len,
                Some(_) => break,
            }
            tables += usize::from(extent.source != Source::Backing);
            if tables > TABLES_MAX {
                break;
            }
        }
        Ok(status.unwrap_or(BlockStatus { len: len.max(1), flags: StatusFlags::default() }))
    }

    /// The state of a range, with what the layer below says about what is not allocated here.
    pub(crate) async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let mut status = self.layer_status(offset, len).await?;
        if status.flags.allocated {
            return Ok(status);
        }
        if self.beyond_backing(offset) {
            status.flags.zero = true;
        } else if let Some(backing) = &self.backing {
            let len = status.len.min(backing.size() - offset);
            let below = backing.block_status(offset, len).await?;
            status.len = below.len.clamp(1, len);
            status.flags.data = below.flags.data;
            status.flags.zero = below.flags.zero;
        }
        Ok(status)
    }

    /// The first range at or after `offset` whose content comes from this layer.
    pub(crate) async fn next_allocated(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.size();
        let mut at = offset;
        let mut start = None;
        while at < size {
            let status = self.layer_status(at, size - at).await?;
            match (status.flags.allocated, start) {
                (true, None) => start = Some(at),
                (false, Some(start)) => return Ok(Some(start..at)),
                _ => {}
            }
            at += status.len;
        }
        Ok(start.map(|start| start..size))
    }
}

fn layer_flags(source: Source) -> StatusFlags {
    match source {
        Source::Data(_) | Source::Compressed { .. } => {
            StatusFlags { data: true, zero: false, allocated: true }
        }
        Source::Zero { .. } => StatusFlags { data: false, zero: true, allocated: true },
        Source::Backing => StatusFlags { data: false, zero: false, allocated: false },
    }
}
