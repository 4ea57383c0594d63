//! The maps: what the peer is not known to have.

use std::ops::Range;
use std::path::Path;

use brep_hbitmap::{Error as MapError, Identity, LastStop, MapSet, Options, Role, Tag};
use sha2::{Digest, Sha256};

use super::{Core, Group};
use crate::link::CopyMode;
use crate::{Error, Result, SetId};

/// Bytes that one bit of a map stands for, as a power of two: 64 KiB.
const GRANULE_LOG2: u32 = 16;

/// The tag of maps that hold every difference to a peer that has the last checkpoint. Maps that
/// were made anew do not have it: nobody knows what they should hold.
const KNOWN: Tag = Tag { id: [0; 16], number: 1 };

/// Opens a disk's maps. What cannot be trusted is made anew, and everything differs.
///
/// # Errors
/// The file is in use, or cannot be read or written.
pub(super) fn open_maps(
    state_dir: &Path,
    set: Option<SetId>,
    disk: &str,
    size: u64,
) -> Result<MapSet> {
    let path = state_dir.join(format!("{disk}.maps"));
    let options = Options::new(identity(set, disk), size, GRANULE_LOG2);
    let failed = |e: MapError| Error::failed(format!("dirty maps of disk {disk}: {e}"));
    match MapSet::open(&path, &options) {
        Ok(mut maps) => {
            if maps.last_stop() != LastStop::Clean {
                // What was on its way when the process was killed is not known.
                maps.all_to_differs();
            }
            return Ok(maps);
        }
        Err(MapError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(error @ (MapError::Locked { .. } | MapError::Io { .. })) => return Err(failed(error)),
        Err(error) => {
            tracing::warn!(disk, %error, "the dirty maps are made anew: everything may differ");
            brep_block::storage::remove(&path)
                .map_err(|e| Error::failed(format!("{}: {e}", path.display())))?;
        }
    }
    let mut maps = MapSet::create(&path, &options, Tag::default()).map_err(failed)?;
    maps.set(Role::Differs, 0, size);
    Ok(maps)
}

/// Maps belong to a disk of a set.
fn identity(set: Option<SetId>, disk: &str) -> Identity {
    let mut hash = Sha256::new();
    hash.update(set.map_or([0; 16], |s| s.0.into_bytes()));
    hash.update(disk);
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize()[..16]);
    Identity(id)
}

/// Brings the maps to what they have to be when a session begins.
pub(super) fn begin_copy(maps: &mut MapSet, copy: CopyMode, size: u64) {
    match copy {
        CopyMode::Full | CopyMode::Compare => {
            maps.set(Role::Differs, 0, size);
        }
        // The peer may have been given something else meanwhile.
        CopyMode::Changed => maps.all_to_differs(),
        // The peer has what it acknowledged. A clean stop may have left a cut behind; it is void.
        CopyMode::Missing => maps.void_pending(),
    }
    maps.set_tag(Role::Differs, KNOWN);
}

impl Group {
    /// Bytes that the peer is not known to have.
    pub(crate) fn bytes_behind(&self, disk: usize) -> u64 {
        self.core().maps.get(disk).map_or(0, |maps| maps.map(Role::Differs).dirty_bytes())
    }

    /// Whether the maps hold every difference to a peer that has the last checkpoint. Not so if
    /// they, or the power, were lost.
    pub(crate) fn maps_are_known(&self) -> bool {
        self.core().maps.iter().all(|maps| maps.tag(Role::Differs) == KNOWN)
    }

    /// A flush of a disk has failed: it may have lost what the peer has, and nobody knows what.
    pub(crate) fn distrust_maps(&self, disk: usize) {
        if let Some(maps) = self.core().maps.get_mut(disk) {
            maps.set_tag(Role::Differs, Tag::default());
        }
    }

    /// The first range of a disk, from `offset` on, that differs; at most `max` bytes.
    pub(crate) fn next_different(&self, disk: usize, offset: u64, max: u64) -> Option<Range<u64>> {
        let core = self.core();
        let map = core.maps.get(disk)?.map(Role::Differs);
        let granule = map.granularity();
        let area = map.next_dirty_area(offset..map.size(), max)?;
        // Whole granules: a bit is cleared for all of it.
        let start = area.start - area.start % granule;
        let end = area.end.next_multiple_of(granule).min(map.size());
        Some(start..end)
    }

    /// The range, made longer to at most `len` bytes, as far as whole granules differ.
    pub(crate) fn extend_range(&self, disk: usize, range: &Range<u64>, len: u64) -> Range<u64> {
        let core = self.core();
        let Some(maps) = core.maps.get(disk) else { return range.clone() };
        let map = maps.map(Role::Differs);
        let limit = range.start.saturating_add(len).min(map.size());
        let end = map.next_zero(range.start..limit).unwrap_or(limit);
        let end = if end == map.size() { end } else { end - end % map.granularity() };
        range.start..end.max(range.end)
    }

    /// Takes whole granules as equal while they are compared. They differ again when the result is
    /// dropped, unless they were found equal.
    pub(crate) fn assume_equal(&self, disk: usize, range: Range<u64>) -> AssumedEqual<'_> {
        self.core().clear_different(disk, range.start, range.end - range.start);
        AssumedEqual { group: self, disk, range, confirmed: false }
    }

    /// Whether any range of any disk differs.
    pub(crate) fn has_differences(&self) -> bool {
        self.core().maps.iter().any(|maps| !maps.map(Role::Differs).is_empty())
    }

    /// Puts the maps on stable storage and closes them.
    ///
    /// # Errors
    /// A file could not be written.
    pub(crate) fn close_maps(&self) -> Result<()> {
        let mut core = self.core();
        let in_flight = !core.ages.is_empty() || !core.epochs.is_settled();
        let mut result = Ok(());
        for mut maps in std::mem::take(&mut core.maps) {
            if in_flight {
                // Nobody will hear how that ends.
                maps.all_to_differs();
            }
            result = result.and(maps.close().map_err(|e| Error::failed(e.to_string())));
        }
        result
    }
}

/// Granules that count as equal until they have been compared.
pub(crate) struct AssumedEqual<'a> {
    group: &'a Group,
    disk: usize,
    range: Range<u64>,
    confirmed: bool,
}

impl AssumedEqual<'_> {
    /// They are equal.
    pub(crate) fn confirm(mut self) {
        self.confirmed = true;
    }
}

impl Drop for AssumedEqual<'_> {
    fn drop(&mut self) {
        if !self.confirmed {
            let (start, end) = (self.range.start, self.range.end);
            self.group.core().mark(self.disk, Role::Differs, start, end - start);
        }
    }
}

impl Core {
    /// Marks whole granules as on their way.
    pub(super) fn clear_different(&mut self, disk: usize, offset: u64, len: u64) {
        if let Some(maps) = self.maps.get_mut(disk) {
            maps.transfer(Role::Differs, Role::Open, offset, len);
        }
    }

    pub(super) fn mark(&mut self, disk: usize, role: Role, offset: u64, len: u64) {
        if let Some(maps) = self.maps.get_mut(disk)
            && len > 0
        {
            maps.set(role, offset, len);
        }
    }
}
