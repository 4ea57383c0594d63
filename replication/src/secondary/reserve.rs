//! Room that is kept for a failover: a file in the state directory that is given up when a failover
//! needs its room for maps, top layers and the record.

use std::io;
use std::path::Path;

use brep_block::storage::{self, PlainFile};

use super::group::Group;
use super::room::SPACE_MIN_BYTES;
use crate::primary::MapsOf;
use crate::{Error, Result};

const NAME: &str = "reserve";

/// Written at a time.
const PIECE_LEN: usize = 64 << 10;

/// For the record, whatever it grows by, and for names in the directory.
const SIDE_BYTES: u64 = 512 << 10;

/// For an activity log and the first clusters of a top layer, besides what grows with the disk.
const DISK_BYTES: u64 = 512 << 10;

/// A top layer's tables take a byte of so many of the disk, at most.
const TABLES_SHARE: u64 = 1 << 24;

impl Group {
    /// Keeps the room that a failover takes, if there is so much and some for pre-images. Where it is
    /// kept already this does nothing.
    pub(super) async fn reserve_room(&self) {
        if self.record().is_primary() {
            return;
        }
        let reserved = async {
            let bytes = self.failover_bytes()?;
            let path = self.config.state_dir.join(NAME);
            let space = self.space_bytes().await.map(|space| space.saturating_sub(SPACE_MIN_BYTES));
            let reserved = storage::beside(move || reserve(&path, bytes, space)).await;
            reserved.and_then(|reserved| reserved).map_err(|e| Error::failed(e.to_string()))
        };
        let result = reserved.await;
        let unreserved = std::mem::replace(&mut self.core().unreserved, result.is_err());
        if let Err(error) = result
            && !unreserved
        {
            tracing::warn!(
                %error,
                "no room is kept for a failover: it would fail if the file system were full"
            );
        }
    }

    /// Gives the room back: it is needed now, or never.
    pub(super) fn release_room(&self) {
        match storage::remove(self.config.state_dir.join(NAME)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "the room that was kept for a failover is not given back");
            }
            _ => {}
        }
    }

    /// What a failover writes to the state directory before the disks are served, at most.
    fn failover_bytes(&self) -> Result<u64> {
        let mut bytes = SIDE_BYTES;
        for disk in self.disks() {
            let maps = MapsOf::new(&self.side, &disk.name, disk.size()).file_len()?;
            bytes += maps + DISK_BYTES + disk.size() / TABLES_SHARE;
        }
        Ok(bytes)
    }
}

/// Makes the file at least so long. Bytes that are written take their room on more file systems than
/// bytes that are only asked for, and bytes without a pattern where the file system compresses.
fn reserve(path: &Path, bytes: u64, space: Option<u64>) -> io::Result<()> {
    let file = storage::open_file(path)?;
    let len = file.len()?;
    let enough = space.is_none_or(|space| space >= bytes.saturating_sub(len));
    let reserved = match enough {
        true => lengthen(&*file, len, bytes),
        false => Err(io::ErrorKind::StorageFull.into()),
    };
    reserved.inspect_err(|_| {
        // Some of it is of no use, and takes the room of pre-images.
        let _ = storage::remove(path);
    })
}

fn lengthen(file: &dyn PlainFile, len: u64, bytes: u64) -> io::Result<()> {
    if len >= bytes {
        return Ok(());
    }
    let mut at = len;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut piece = vec![0; PIECE_LEN];
    while at < bytes {
        for word in piece.chunks_exact_mut(8) {
            // Xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let len = PIECE_LEN.min(usize::try_from(bytes - at).unwrap_or(PIECE_LEN));
        file.write_all_at(&piece[..len], at)?;
        at += len as u64;
    }
    // A file system that puts blocks off finds out now whether it has them.
    file.sync_data()
}
