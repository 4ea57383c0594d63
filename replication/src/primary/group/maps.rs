//! The maps: what the peer is not known to have.

use std::ops::Range;

use brep_hbitmap::HBitmap;

use super::{Core, Group};

impl Group {
    /// Bytes that the peer is not known to have.
    pub(crate) fn bytes_behind(&self, disk: usize) -> u64 {
        self.core().differs.get(disk).map_or(0, HBitmap::dirty_bytes)
    }

    /// The first range of a disk, from `offset` on, that differs; at most `max` bytes.
    pub(crate) fn next_different(&self, disk: usize, offset: u64, max: u64) -> Option<Range<u64>> {
        let core = self.core();
        let map = core.differs.get(disk)?;
        let granule = map.granularity();
        let area = map.next_dirty_area(offset..map.size(), max)?;
        // Whole granules: a bit is cleared for all of it.
        let start = area.start - area.start % granule;
        let end = area.end.next_multiple_of(granule).min(map.size());
        Some(start..end)
    }

    /// The range, made longer to `len` bytes as far as whole granules go.
    pub(crate) fn extend_range(&self, disk: usize, range: &Range<u64>, len: u64) -> Range<u64> {
        let core = self.core();
        let Some(map) = core.differs.get(disk) else { return range.clone() };
        let end = range.start.saturating_add(len).min(map.size());
        let end = if end == map.size() { end } else { end - end % map.granularity() };
        range.start..end.max(range.end)
    }

    /// Marks whole granules as equal, before they are read and sent.
    pub(crate) fn clear_different(&self, disk: usize, range: &Range<u64>) {
        if let Some(map) = self.core().differs.get_mut(disk) {
            map.reset(range.start, range.end - range.start);
        }
    }

    /// Marks a range as different.
    pub(crate) fn mark_different(&self, disk: usize, range: &Range<u64>) {
        self.core().mark(disk, range.start, range.end - range.start);
    }

    /// Whether any range of any disk differs.
    pub(crate) fn has_differences(&self) -> bool {
        self.core().differs.iter().any(|map| !map.is_empty())
    }
}

impl Core {
    pub(super) fn mark(&mut self, disk: usize, offset: u64, len: u64) {
        if let Some(map) = self.differs.get_mut(disk)
            && len > 0
        {
            map.set(offset, len);
        }
    }
}
