//! The snapshot table (specification §5): read only, for its clusters and for `info`.

use bytes::Bytes;

use crate::FormatError;
use crate::file::File;
use crate::geometry::Geometry;
use crate::header::{Header, L1_ENTRIES_MAX, u16_at, u32_at, u64_at};

const EXTRA_MAX: u32 = 1024;
const TABLE_MAX: u64 = 64 << 20;
const CHUNK: usize = 64 << 10;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Unique among the snapshots of an image.
    pub id: String,
    /// Given by the user; need not be unique.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub date_s: u32,
    /// Size of the disk when it was taken, in bytes.
    pub disk_size: u64,
    /// Size of the saved machine state, in bytes.
    pub vm_state_size: u64,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
}

/// What a snapshot table could not be read for.
#[derive(Debug)]
pub(crate) enum LoadError {
    Format(FormatError),
    Device(brep_block::Error),
}

impl From<brep_block::Error> for LoadError {
    fn from(error: brep_block::Error) -> Self {
        LoadError::Device(error)
    }
}

/// Reads the table; also returns its length in bytes.
pub(crate) async fn load(file: &File, header: &Header) -> Result<(Vec<Snapshot>, u64), LoadError> {
    let mut reader = Reader { file, at: header.snapshots_offset, buffer: Bytes::new() };
    let mut snapshots = Vec::new();
    for _ in 0..header.snapshots {
        let snapshot = reader.next(&header.geometry, header.size).await?;
        if reader.at - header.snapshots_offset > TABLE_MAX {
            return Err(bad("snapshot table is too big"));
        }
        snapshots.push(snapshot);
    }
    Ok((snapshots, reader.at - header.snapshots_offset))
}

fn bad(what: &'static str) -> LoadError {
    LoadError::Format(FormatError::SnapshotTable(what))
}

struct Reader<'a> {
    file: &'a File,
    /// Offset in the file of the next entry, which is also the start of `buffer`.
    at: u64,
    buffer: Bytes,
}

impl Reader<'_> {
    async fn next(&mut self, g: &Geometry, size: u64) -> Result<Snapshot, LoadError> {
        if self.at >= self.file.size() {
            return Err(bad("beyond the end of the file"));
        }
        let head = self.peek(40).await?;
        let (id_len, name_len) = (u16_at(&head, 12) as usize, u16_at(&head, 14) as usize);
        let extra_len = u32_at(&head, 36);
        if extra_len > EXTRA_MAX {
            return Err(bad("too much extra metadata"));
        }
        if g.version >= 3 && extra_len < 16 {
            return Err(bad("too little extra metadata"));
        }
        let id_at = 40 + extra_len as usize;
        let len = id_at + id_len + name_len;
        let entry = self.peek(len).await?;
        let (l1_offset, l1_entries) = (u64_at(&entry, 0), u32_at(&entry, 8));
        if !g.is_aligned(l1_offset) || l1_offset >= 1 << 56 {
            return Err(bad("L1 table offset invalid"));
        }
        if u64::from(l1_entries) > L1_ENTRIES_MAX {
            return Err(bad("L1 table too large"));
        }
        let small = u64::from(u32_at(&entry, 32));
        let text = |from: usize, len: usize| {
            String::from_utf8_lossy(entry.get(from..from + len).unwrap_or_default()).into_owned()
        };
        let snapshot = Snapshot {
            id: text(id_at, id_len),
            name: text(id_at + id_len, name_len),
            date_s: u32_at(&entry, 16),
            disk_size: if extra_len >= 16 { u64_at(&entry, 48) } else { size },
            vm_state_size: if extra_len >= 8 { u64_at(&entry, 40) } else { small },
            l1_offset,
            l1_entries,
        };
        let padded = len.next_multiple_of(8);
        self.at += padded as u64;
        self.buffer = self.buffer.slice(padded.min(self.buffer.len())..);
        Ok(snapshot)
    }

    async fn peek(&mut self, len: usize) -> Result<Bytes, LoadError> {
        if self.buffer.len() < len {
            self.buffer = self.file.read(self.at, CHUNK.max(len)).await?;
        }
        Ok(self.buffer.slice(..len))
    }
}
