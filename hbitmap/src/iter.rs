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
    /// The next bit to look for.
    from: u64,
    /// What is left of the word before it.
    bits: u64,
}

impl Iterator for Iter<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.bits == 0 {
            let (word, bits) = self.map.levels().next_bits(self.from)?;
            (self.from, self.bits) = ((word + 1) << 6, bits);
        }
        let bit = self.from - 64 + u64::from(self.bits.trailing_zeros());
        self.bits &= self.bits - 1;
        Some(bit << self.map.granularity_log2())
    }
}

impl FusedIterator for Iter<'_> {}

/// The runs of dirty items of a bitmap, in order. See [`HBitmap::dirty_areas`].
#[derive(Debug, Clone)]
pub struct DirtyAreas<'a> {
    map: &'a HBitmap,
    /// In items, inside the map.
    range: Range<u64>,
    /// The next bit to look for.
    from: u64,
    /// What is left of the word before it.
    bits: u64,
}

impl DirtyAreas<'_> {
    /// The next run of set bits. What a word says of several runs is looked up once.
    fn next_run(&mut self) -> Option<Range<u64>> {
        let levels = self.map.levels();
        if self.bits == 0 {
            let (word, bits) = levels.next_bits(self.from)?;
            (self.from, self.bits) = ((word + 1) << 6, bits);
        }
        let base = self.from - 64;
        let low = self.bits.trailing_zeros();
        let high = low + (self.bits >> low).trailing_ones();
        let start = base + u64::from(low);
        if high < 64 {
            self.bits &= !0 << high;
            return Some(start..base + u64::from(high));
        }
        self.bits = 0;
        self.from = levels.next_clear(self.from, levels.bits()).unwrap_or(levels.bits());
        Some(start..self.from)
    }
}

impl Iterator for DirtyAreas<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let run = self.next_run()?;
        let log2 = self.map.granularity_log2();
        let start = (run.start << log2).max(self.range.start);
        let end = (run.end << log2).min(self.range.end);
        if start >= end {
            // Beyond the range. There it ends, also for who asks again.
            (self.from, self.bits) = (self.map.bits(), 0);
            return None;
        }
        Some(start..end)
    }
}

impl FusedIterator for DirtyAreas<'_> {}

impl HBitmap {
    /// The set groups from the one that contains `first` on, each as the position of its first
    /// item; so the first one returned may be less than `first`. Nothing if `first` is not below
    /// the size.
    pub fn iter(&self, first: u64) -> Iter<'_> {
        let from = if first < self.size() { first >> self.granularity_log2() } else { self.bits() };
        Iter { map: self, from, bits: 0 }
    }

    /// The same for a map that changes meanwhile.
    pub fn cursor(&self, first: u64) -> Cursor {
        Cursor { bit: first >> self.granularity_log2() }
    }

    /// The runs of dirty items in `range`, each as long as possible; the range is clipped to the
    /// map, and neither end is rounded to groups.
    pub fn dirty_areas(&self, range: Range<u64>) -> DirtyAreas<'_> {
        let range = range.start..range.end.min(self.size());
        let from =
            if range.is_empty() { self.bits() } else { range.start >> self.granularity_log2() };
        DirtyAreas { map: self, range, from, bits: 0 }
    }
}
