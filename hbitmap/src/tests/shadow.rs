use crate::HBitmap;

pub(super) const L1: u64 = 64;
pub(super) const L2: u64 = 4096;
pub(super) const L3: u64 = 262_144;

/// A bitmap of granularity 0 next to an array of bools that gets the same calls.
pub(super) struct Shadow {
    pub(super) map: HBitmap,
    pub(super) bits: Vec<bool>,
}

impl Shadow {
    pub(super) fn new(size: u64) -> Self {
        Shadow { map: HBitmap::new(size, 0).unwrap(), bits: vec![false; size as usize] }
    }

    pub(super) fn set(&mut self, start: u64, count: u64) {
        let range = &mut self.bits[start as usize..(start + count) as usize];
        let changes = range.contains(&false);
        range.fill(true);
        assert_eq!(self.map.set(start, count), changes);
        self.check(0);
    }

    pub(super) fn reset(&mut self, start: u64, count: u64) {
        let range = &mut self.bits[start as usize..(start + count) as usize];
        let changes = range.contains(&true);
        range.fill(false);
        assert_eq!(self.map.reset(start, count), changes);
        self.check(0);
    }

    pub(super) fn reset_all(&mut self) {
        self.bits.fill(false);
        self.map.reset_all();
        self.check(0);
    }

    pub(super) fn truncate(&mut self, size: u64) {
        self.bits.resize(size as usize, false);
        self.map.truncate(size).unwrap();
        self.check(0);
    }

    /// Iterating from `first` yields exactly the set bits from there on, and `get` agrees.
    pub(super) fn check(&self, first: u64) {
        let set = || (0..).zip(&self.bits).filter(|(_, bit)| **bit).map(|(i, _)| i);
        assert!(self.map.iter(first).eq(set().filter(|i| *i >= first)), "iteration from {first}");
        assert_eq!(self.map.count(), set().count() as u64);
        assert!(self.map.iter(first).all(|i| self.map.get(i)));
        self.map.levels().check();
    }

    pub(super) fn check_get(&self) {
        for (i, bit) in (0..).zip(&self.bits) {
            assert_eq!(self.map.get(i), *bit, "bit {i}");
        }
    }
}
