use std::collections::BTreeMap;
use std::ops::Range;

/// Units per leaf: 512 bytes of bits, so that one scattered write costs little and a leaf still
/// covers 8 MiB of disk at 2 KiB units.
const LEAF_UNITS: u64 = 4096;
const LEAF_WORDS: usize = 64;

/// A sparse set of unit numbers. Memory grows with what was inserted; a fully covered leaf costs
/// nothing but its place in the map.
#[derive(Debug, Default)]
pub(crate) struct UnitSet {
    leaves: BTreeMap<u64, Leaf>,
}

#[derive(Debug)]
enum Leaf {
    Full,
    Part { bits: Box<[u64; LEAF_WORDS]>, count: u32 },
}

impl Leaf {
    fn contains(&self, index: u32) -> bool {
        match self {
            Leaf::Full => true,
            Leaf::Part { bits, .. } => bits[word(index)] & bit(index) != 0,
        }
    }

    /// First index at or after `from` whose membership differs from `member`.
    fn run_end(&self, from: u32, member: bool) -> u32 {
        let Leaf::Part { bits, .. } = self else {
            return if member { LEAF_UNITS as u32 } else { from };
        };
        let mut mask = !0u64 << (from % 64);
        for (i, &bits) in bits.iter().enumerate().skip(word(from)) {
            let differing = if member { !bits } else { bits } & mask;
            if differing != 0 {
                return i as u32 * 64 + differing.trailing_zeros();
            }
            mask = !0;
        }
        LEAF_UNITS as u32
    }

    fn insert(&mut self, range: Range<u32>) {
        let Leaf::Part { bits, count } = self else { return };
        let mut at = range.start;
        while at < range.end {
            let n = (64 - at % 64).min(range.end - at);
            let mask = (!0u64 >> (64 - n)) << (at % 64);
            let word = &mut bits[word(at)];
            *count += (mask & !*word).count_ones();
            *word |= mask;
            at += n;
        }
        if u64::from(*count) == LEAF_UNITS {
            *self = Leaf::Full;
        }
    }
}

fn word(index: u32) -> usize {
    (index / 64) as usize
}

fn bit(index: u32) -> u64 {
    1 << (index % 64)
}

/// Leaf number and the index in that leaf.
fn split(unit: u64) -> (u64, u32) {
    (unit / LEAF_UNITS, (unit % LEAF_UNITS) as u32)
}

impl UnitSet {
    /// Whether `range.start` is in the set, and how many units from there on, inside the range,
    /// are in the same state. The range must not be empty.
    pub(crate) fn status(&self, range: Range<u64>) -> (bool, u64) {
        let (first, index) = split(range.start);
        let member = self.leaves.get(&first).is_some_and(|leaf| leaf.contains(index));
        let end = if member {
            self.end_of_members(range.start, range.end)
        } else {
            self.end_of_others(range.start, range.end)
        };
        (member, end.min(range.end) - range.start)
    }

    fn end_of_members(&self, mut at: u64, end: u64) -> u64 {
        while at < end {
            let (number, index) = split(at);
            let Some(leaf) = self.leaves.get(&number) else { return at };
            let stop = leaf.run_end(index, true);
            at = number * LEAF_UNITS + u64::from(stop);
            if u64::from(stop) < LEAF_UNITS {
                return at;
            }
        }
        at
    }

    fn end_of_others(&self, at: u64, end: u64) -> u64 {
        let (first, index) = split(at);
        let last = split(end - 1).0;
        for (&number, leaf) in self.leaves.range(first..=last) {
            let from = if number == first { index } else { 0 };
            let stop = leaf.run_end(from, false);
            if u64::from(stop) < LEAF_UNITS {
                return number * LEAF_UNITS + u64::from(stop);
            }
        }
        end
    }

    /// Whether the whole range is in the set.
    pub(crate) fn contains_all(&self, range: Range<u64>) -> bool {
        let len = range.end - range.start;
        len == 0 || self.status(range) == (true, len)
    }

    /// Adds every unit of the range.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let (number, index) = split(at);
            let n = (LEAF_UNITS - u64::from(index)).min(range.end - at);
            if n == LEAF_UNITS {
                self.leaves.insert(number, Leaf::Full);
            } else {
                self.leaves
                    .entry(number)
                    .or_insert_with(|| Leaf::Part { bits: Box::new([0; LEAF_WORDS]), count: 0 })
                    .insert(index..index + n as u32);
            }
            at += n;
        }
    }

    /// How many leaves the set has: what dropping it costs.
    pub(crate) fn leaf_count(&self) -> usize {
        self.leaves.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn an_empty_set_is_one_run_of_any_length() {
        let set = UnitSet::default();
        assert_eq!(set.status(0..1 << 40), (false, 1 << 40));
        assert!(!set.contains_all(5..6));
        assert!(set.contains_all(5..5));
    }

    #[test]
    fn a_full_leaf_takes_no_bits() {
        let mut set = UnitSet::default();
        set.insert(0..LEAF_UNITS * 3);
        assert!(set.leaves.values().all(|leaf| matches!(leaf, Leaf::Full)));
        for unit in LEAF_UNITS * 3..LEAF_UNITS * 4 {
            set.insert(unit..unit + 1);
        }
        assert!(matches!(set.leaves[&3], Leaf::Full));
        assert_eq!(set.status(0..1 << 33), (true, LEAF_UNITS * 4));
    }

    #[test]
    fn agrees_with_a_plain_set_on_random_ranges() {
        let end = LEAF_UNITS * 3 + 100;
        let mut set = UnitSet::default();
        let mut model = BTreeSet::new();
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..200 {
            let start = random(end);
            let limit = if random(4) == 0 { 5000 } else { 70 };
            let stop = (start + 1 + random(limit)).min(end);
            set.insert(start..stop);
            model.extend(start..stop);
            let from = random(end);
            let member = model.contains(&from);
            let run = (from..end).take_while(|u| model.contains(u) == member).count() as u64;
            assert_eq!(set.status(from..end), (member, run), "from {from}");
        }
    }
}
