use std::iter::FusedIterator;
use std::ops::Range;

use crate::HBitmap;

/// A place in a bitmap that remembers no contents, so that the map may change between two steps.
///
/// Bits that are reset ahead of the cursor are not returned; bits that are set behind it, and
/// nothing else, are missed. It survives [`truncate`](HBitmap::truncate).
#[derive(Debug, Clone, Copy)]
pub struct Cursor {
    bit: u64,
}

impl Cursor {
    /// The next set group of `map`, as the position of its first item.
    pub fn next(&mut self, map: &HBitmap) -> Option<u64> {
        let bit = map.levels().next_set(self.bit)?;
        self.bit = bit + 1;
        Some(bit << map.granularity_log2())
    }
}

/// The set groups of a bitmap, in order, each as the position of its first item.
#[derive(Debug, Clone)]
pub struct Iter<'a> {
    map: &'a HBitmap,
    /// The next word to look for.
    word: u64,
    /// What is left of the word before it.
    bits: u64,
}

impl Iterator for Iter<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.bits == 0 {
            let (word, bits) = self.map.levels().next_word(self.word)?;
            self.word = word + 1;
            self.bits = bits;
        }
        let bit = (self.word - 1) << 6 | u64::from(self.bits.trailing_zeros());
        self.bits &= self.bits - 1;
        Some(bit << self.map.granularity_log2())
    }
}

impl FusedIterator for Iter<'_> {}

/// The runs of dirty items of a bitmap, in order. See [`HBitmap::dirty_areas`].
#[derive(Debug, Clone)]
pub struct DirtyAreas<'a> {
    map: &'a HBitmap,
    range: Range<u64>,
}

impl Iterator for DirtyAreas<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let area = self.map.next_dirty_area(self.range.clone(), u64::MAX)?;
        self.range.start = area.end;
        Some(area)
    }
}

impl FusedIterator for DirtyAreas<'_> {}

impl HBitmap {
    /// The set groups from the one that contains `first` on, each as the position of its first
    /// item; so the first one returned may be less than `first`. Nothing if `first` is not below
    /// the size.
    pub fn iter(&self, first: u64) -> Iter<'_> {
        let bit = first >> self.granularity_log2();
        let (word, bits) = if first < self.size() {
            (bit / 64, self.levels().word(bit / 64) & (!0 << (bit % 64)))
        } else {
            (self.levels().words(), 0)
        };
        Iter { map: self, word: word + 1, bits }
    }

    /// The same for a map that changes meanwhile.
    pub fn cursor(&self, first: u64) -> Cursor {
        Cursor { bit: first >> self.granularity_log2() }
    }

    /// The runs of dirty items in `range`, each as long as possible; the range is clipped to the
    /// map, and neither end is rounded to groups.
    pub fn dirty_areas(&self, range: Range<u64>) -> DirtyAreas<'_> {
        DirtyAreas { map: self, range }
    }
}
