use std::fmt;
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::levels::Levels;
use crate::{Error, Result};

/// Most bits that a bitmap can have, as a power of two.
pub(crate) const BITS_MAX_LOG2: u32 = 41;
const GRANULARITY_MAX_LOG2: u32 = 63;

/// A hierarchical bitmap: a set of numbers below a size, kept in groups of a power of two.
///
/// The numbers are called *items*; for dirty tracking they are the bytes of a disk, and a group
/// is a *granule*. Item `i` belongs to bit `i >> granularity_log2`. Finding the next dirty item
/// costs a few look-ups however sparse the map is, and [`reset_all`](HBitmap::reset_all) costs
/// the same however full it is.
///
/// Memory is allocated, by the page, where bits are set: an empty map of any size takes a few
/// hundred bytes, a full one an eighth of a byte per group and 1.6 % more.
///
/// Positions that are out of range are errors of the program, and panic, like an index into a
/// slice; queries that take a range clip it to the map.
#[derive(Clone)]
pub struct HBitmap {
    levels: Levels,
    size: u64,
    granularity_log2: u32,
}

/// What [`HBitmap::status`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Whether the first item is in a set group.
    pub dirty: bool,
    /// How many items from the first one on share its state, within the range asked for.
    pub count: u64,
}

impl HBitmap {
    /// An empty bitmap for `size` items in groups of `2^granularity_log2`.
    ///
    /// # Errors
    /// [`Error::Impossible`] if `size` exceeds 2⁶³ − 1, the granularity 63, or the number of
    /// groups 2⁴¹.
    pub fn new(size: u64, granularity_log2: u32) -> Result<Self> {
        let bits = bits_for(size, granularity_log2)?;
        Ok(HBitmap { levels: Levels::new(bits), size, granularity_log2 })
    }

    /// The number of items.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The number of items in a group, as a power of two.
    pub fn granularity_log2(&self) -> u32 {
        self.granularity_log2
    }

    /// The number of items in a group.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_log2
    }

    /// The number of groups, and so of bits.
    pub fn bits(&self) -> u64 {
        self.levels.bits()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.levels.count() == 0
    }

    /// The number of items in set groups, a partial last group counted as if it were whole. So
    /// this can exceed the size; [`dirty_bytes`](HBitmap::dirty_bytes) is exact.
    pub fn count(&self) -> u64 {
        self.levels.count() << self.granularity_log2
    }

    /// The number of items in set groups, never more than the size. Items are bytes where the
    /// map describes a disk.
    pub fn dirty_bytes(&self) -> u64 {
        let beyond = self.size_rounded_up() - self.size;
        if beyond > 0 && self.levels.get(self.bits() - 1) {
            self.count() - beyond
        } else {
            self.count()
        }
    }

    /// Memory held, in bytes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.levels.memory_bytes()
    }

    /// Sets all groups that `[start, start + count)` touches. Returns whether one of them was
    /// clear before.
    ///
    /// # Panics
    /// If the range is not empty and its last group does not exist.
    pub fn set(&mut self, start: u64, count: u64) -> bool {
        match self.groups(start, count) {
            Some((first, last)) => self.levels.set(first, last) > 0,
            None => false,
        }
    }

    /// Clears the groups of `[start, start + count)`. Returns whether one of them was set before.
    ///
    /// # Panics
    /// If the range is not made of whole groups. The last group of the map is whole both at the
    /// size and at the size rounded up.
    pub fn reset(&mut self, start: u64, count: u64) -> bool {
        match self.whole_groups(start, count) {
            Some((first, last)) => self.levels.reset(first, last) > 0,
            None => false,
        }
    }

    /// Clears everything, in constant time. Memory is kept for what is set next;
    /// [`shrink`](HBitmap::shrink) gives it back.
    pub fn reset_all(&mut self) {
        self.levels.clear();
    }

    /// Moves the contents out and leaves an empty map, in constant time. Memory moves too.
    #[must_use]
    pub fn take(&mut self) -> HBitmap {
        let empty = HBitmap { levels: Levels::new(self.bits()), ..*self };
        std::mem::replace(self, empty)
    }

    /// Gives back memory that holds no set bit.
    pub fn shrink(&mut self) {
        self.levels.shrink();
    }

    /// Whether the group of item `item` is set.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn get(&self, item: u64) -> bool {
        let bit = item >> self.granularity_log2;
        assert!(bit < self.bits(), "item {item} is out of range, size {}", self.size);
        self.levels.get(bit)
    }

    /// The first item in `range` that is in a set group; the range is clipped to the map.
    pub fn next_dirty(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return None;
        }
        let bit = self.levels.next_set(range.start >> self.granularity_log2)?;
        let item = (bit << self.granularity_log2).max(range.start);
        (item < end).then_some(item)
    }

    /// The first item in `range` that is in a clear group; the range is clipped to the map.
    pub fn next_zero(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return None;
        }
        let bits_end = ((end - 1) >> self.granularity_log2) + 1;
        let bit = self.levels.next_clear(range.start >> self.granularity_log2, bits_end)?;
        Some((bit << self.granularity_log2).max(range.start))
    }

    /// The first run of dirty items in `range`, at most `max` items of it; the range is clipped
    /// to the map. Neither end is rounded to groups. `None` if there is none, or if `max` is 0.
    pub fn next_dirty_area(&self, range: Range<u64>, max: u64) -> Option<Range<u64>> {
        if max == 0 {
            return None;
        }
        let start = self.next_dirty(range.clone())?;
        let end = range.end.min(self.size).min(start.saturating_add(max));
        Some(start..self.next_zero(start..end).unwrap_or(end))
    }

    /// Whether item `start` is dirty, and how many items from there on are in the same state,
    /// `count` at most.
    ///
    /// # Panics
    /// If `start` is not below the size.
    pub fn status(&self, start: u64, count: u64) -> Status {
        assert!(start < self.size, "item {start} is out of range, size {}", self.size);
        let end = start.saturating_add(count).min(self.size);
        let dirty = self.get(start);
        let other = if dirty { self.next_zero(start..end) } else { self.next_dirty(start..end) };
        Status { dirty, count: other.unwrap_or(end) - start }
    }

    /// Changes the number of items. What is added is clear. What is cut off is forgotten, but a
    /// last group that remains in part keeps its bit.
    ///
    /// # Errors
    /// As [`new`](HBitmap::new); the map is then unchanged.
    pub fn truncate(&mut self, size: u64) -> Result<()> {
        let bits = bits_for(size, self.granularity_log2)?;
        if bits != self.bits() {
            self.levels.resize(bits);
        }
        self.size = size;
        Ok(())
    }

    /// Sets everything that is set in `other`. Where the granularities differ, a finer group sets
    /// the coarser one that it lies in, a coarser group all the finer ones inside it.
    ///
    /// # Errors
    /// [`Error::SizesDiffer`]; nothing has changed then.
    pub fn or_assign(&mut self, other: &HBitmap) -> Result<()> {
        self.check_same_size(other)?;
        if self.granularity_log2 == other.granularity_log2 {
            for (word, bits) in other.words() {
                self.levels.or_word(word, bits);
            }
        } else {
            for area in other.dirty_areas(0..u64::MAX) {
                self.set(area.start, area.end - area.start);
            }
        }
        Ok(())
    }

    /// Makes this map the union of `a` and `b`, whatever it held before. For a union with itself
    /// there is [`or_assign`](HBitmap::or_assign).
    ///
    /// # Errors
    /// [`Error::SizesDiffer`]; nothing has changed then.
    pub fn merge(&mut self, a: &HBitmap, b: &HBitmap) -> Result<()> {
        self.check_same_size(a)?;
        self.check_same_size(b)?;
        self.reset_all();
        self.or_assign(a)?;
        self.or_assign(b)
    }

    /// SHA-256 over the bits, as words of the host. Two maps of the same size and granularity
    /// are equal if and only if their hashes are.
    pub fn sha256(&self) -> [u8; 32] {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut hash = Sha256::new();
        let mut at = 0;
        let skip = |hash: &mut Sha256, words: u64| {
            let mut left = words * 8;
            while left > 0 {
                let len = left.min(ZEROES.len() as u64);
                hash.update(&ZEROES[..len as usize]);
                left -= len;
            }
        };
        for (word, bits) in self.words() {
            skip(&mut hash, word - at);
            hash.update(bits.to_ne_bytes());
            at = word + 1;
        }
        skip(&mut hash, self.levels.words() - at);
        hash.finalize().into()
    }

    pub(crate) fn levels(&self) -> &Levels {
        &self.levels
    }

    pub(crate) fn levels_mut(&mut self) -> &mut Levels {
        &mut self.levels
    }

    /// The words of the last level that are not zero, in order.
    pub(crate) fn words(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (word, bits) = self.levels.next_word(at)?;
            at = word + 1;
            Some((word, bits))
        })
    }

    /// First and last group that a range touches; `None` if it is empty.
    pub(crate) fn groups(&self, start: u64, count: u64) -> Option<(u64, u64)> {
        let last_item = start.checked_add(count.checked_sub(1)?);
        let last = last_item.map(|item| item >> self.granularity_log2);
        match last {
            Some(last) if last < self.bits() => Some((start >> self.granularity_log2, last)),
            _ => panic!("{count} items from {start} are out of range, size {}", self.size),
        }
    }

    /// The same, of a range that must consist of whole groups.
    pub(crate) fn whole_groups(&self, start: u64, count: u64) -> Option<(u64, u64)> {
        let groups = self.groups(start, count)?;
        let inside = self.granularity() - 1;
        assert!(
            start & inside == 0 && (count & inside == 0 || start + count == self.size),
            "{count} items from {start} are not whole groups of {}",
            self.granularity()
        );
        Some(groups)
    }

    fn size_rounded_up(&self) -> u64 {
        self.bits() << self.granularity_log2
    }

    fn check_same_size(&self, other: &HBitmap) -> Result<()> {
        if self.size == other.size {
            Ok(())
        } else {
            Err(Error::SizesDiffer { left: self.size, right: other.size })
        }
    }
}

/// The number of groups, if such a bitmap can exist.
fn bits_for(size: u64, granularity_log2: u32) -> Result<u64> {
    let impossible = Error::Impossible { size, granularity_log2 };
    if size > i64::MAX as u64 || granularity_log2 > GRANULARITY_MAX_LOG2 {
        return Err(impossible);
    }
    let bits = size.div_ceil(1 << granularity_log2);
    if bits > 1 << BITS_MAX_LOG2 { Err(impossible) } else { Ok(bits) }
}

/// Same size, same granularity, same bits.
impl PartialEq for HBitmap {
    fn eq(&self, other: &Self) -> bool {
        self.size == other.size
            && self.granularity_log2 == other.granularity_log2
            && self.levels.count() == other.levels.count()
            && self.words().eq(other.words())
    }
}

impl Eq for HBitmap {}

impl fmt::Debug for HBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HBitmap")
            .field("size", &self.size)
            .field("granularity", &self.granularity())
            .field("dirty", &self.dirty_bytes())
            .finish()
    }
}
