//! Random calls against a plain vector of bits.

use std::ops::Range;

use proptest::prelude::*;

use crate::HBitmap;

#[derive(Debug, Clone)]
enum Step {
    Set(u64, u64),
    Reset(u64, u64),
    ResetAll,
    Truncate(u64),
    Or(Vec<(u64, u64)>, u32),
    Serialize(u64, u64),
    Ones(u64, u64),
    Take,
    Shrink,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (any::<u64>(), prop_oneof![0..4u64, 0..200u64, 0..40_000u64]);
    prop_oneof![
        6 => range().prop_map(|(a, b)| Step::Set(a, b)),
        4 => range().prop_map(|(a, b)| Step::Reset(a, b)),
        1 => Just(Step::ResetAll),
        1 => prop_oneof![0..300u64, 0..40_000u64].prop_map(Step::Truncate),
        1 => (prop::collection::vec(range(), 0..4), 0..6u32).prop_map(|(a, g)| Step::Or(a, g)),
        1 => range().prop_map(|(a, b)| Step::Serialize(a, b)),
        1 => range().prop_map(|(a, b)| Step::Ones(a, b)),
        1 => Just(Step::Take),
        1 => Just(Step::Shrink),
    ]
}

/// One bool per group.
struct Model {
    groups: Vec<bool>,
    size: u64,
    granularity_log2: u32,
}

impl Model {
    fn mark(&mut self, start: u64, count: u64, value: bool) {
        for item in start..start + count {
            self.groups[(item >> self.granularity_log2) as usize] = value;
        }
    }

    /// Any two numbers as a range inside the map.
    fn clip(&self, start: u64, count: u64) -> (u64, u64) {
        if self.size == 0 {
            return (0, 0);
        }
        let start = start % self.size;
        (start, count.min(self.size - start))
    }

    /// The same with both ends on a multiple of `align`, or at the end of the map.
    fn clip_to(&self, start: u64, count: u64, align: u64) -> (u64, u64) {
        let (start, count) = self.clip(start, count);
        let end = (start + count).next_multiple_of(align).min(self.size);
        (start / align * align, end - start / align * align)
    }

    fn check(&self, map: &HBitmap) {
        map.levels().check();
        let granularity = 1 << self.granularity_log2;
        let set: Vec<u64> = (0..).zip(&self.groups).filter(|(_, g)| **g).map(|(i, _)| i).collect();
        assert!(map.iter(0).eq(set.iter().map(|bit| bit * granularity)));
        assert_eq!(map.count(), set.len() as u64 * granularity);
        let exact: u64 = set.iter().map(|bit| granularity.min(self.size - bit * granularity)).sum();
        assert_eq!(map.dirty_bytes(), exact);
        let areas: u64 = map.dirty_areas(0..u64::MAX).map(|area| area.end - area.start).sum();
        assert_eq!(areas, exact);
        for range in [0..u64::MAX, 0..self.size / 2, self.size / 3..self.size, 65..1000, 7..7] {
            let one_by_one = OneByOne { map, range: range.clone() };
            assert!(map.dirty_areas(range.clone()).eq(one_by_one), "{range:?}");
        }
    }
}

/// Areas as they are found without remembering anything.
struct OneByOne<'a> {
    map: &'a HBitmap,
    range: Range<u64>,
}

impl Iterator for OneByOne<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let area = self.map.next_dirty_area(self.range.clone(), u64::MAX)?;
        self.range.start = area.end;
        Some(area)
    }
}

fn apply(map: &mut HBitmap, model: &mut Model, step: Step) {
    let granularity = 1 << model.granularity_log2;
    match step {
        Step::Set(start, count) => {
            let (start, count) = model.clip(start, count);
            let before = model.groups.iter().filter(|g| **g).count();
            model.mark(start, count, true);
            let after = model.groups.iter().filter(|g| **g).count();
            assert_eq!(map.set(start, count), after > before);
        }
        Step::Reset(start, count) => {
            let (start, count) = model.clip_to(start, count, granularity);
            let before = model.groups.iter().filter(|g| **g).count();
            model.mark(start, count, false);
            let after = model.groups.iter().filter(|g| **g).count();
            assert_eq!(map.reset(start, count), after < before);
        }
        Step::ResetAll => {
            model.groups.fill(false);
            map.reset_all();
        }
        Step::Truncate(size) => {
            model.size = size;
            model.groups.resize(size.div_ceil(granularity) as usize, false);
            map.truncate(size).unwrap();
        }
        Step::Or(ranges, granularity_log2) => {
            let mut other = HBitmap::new(model.size, granularity_log2).unwrap();
            for (start, count) in ranges {
                let (start, count) = model.clip(start, count);
                other.set(start, count);
            }
            for item in (0..model.size).filter(|item| other.get(*item)).collect::<Vec<_>>() {
                model.mark(item, 1, true);
            }
            map.or_assign(&other).unwrap();
        }
        Step::Serialize(start, count) => {
            let (start, count) = model.clip_to(start, count, 64 * granularity);
            let mut bytes = vec![0; map.serialization_size(start, count).unwrap()];
            map.serialize_part(start, count, &mut bytes).unwrap();
            let before = map.sha256();
            map.deserialize_zeroes(start, count).unwrap();
            assert_eq!(map.next_dirty(start..start + count), None);
            map.deserialize_part(start, count, &bytes).unwrap();
            assert_eq!(map.sha256(), before);
        }
        Step::Ones(start, count) => {
            let (start, count) = model.clip_to(start, count, 64 * granularity);
            model.mark(start, count, true);
            map.deserialize_ones(start, count).unwrap();
        }
        Step::Take => {
            let taken = map.take();
            assert!(map.is_empty());
            map.or_assign(&taken).unwrap();
        }
        Step::Shrink => map.shrink(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn a_bitmap_does_what_a_vector_of_bits_does(
        size in prop_oneof![0..300u64, 0..40_000u64],
        granularity_log2 in 0..5u32,
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut map = HBitmap::new(size, granularity_log2).unwrap();
        let groups = vec![false; map.bits() as usize];
        let mut model = Model { groups, size, granularity_log2 };
        for step in steps {
            apply(&mut map, &mut model, step);
            model.check(&map);
        }
    }

    #[test]
    fn searches_find_what_a_scan_finds(
        size in 1..6000u64,
        granularity_log2 in 0..5u32,
        dirty in prop::collection::vec((any::<u64>(), 0..300u64), 0..12),
        queries in prop::collection::vec((any::<u64>(), 0..7000u64), 1..40),
    ) {
        let mut map = HBitmap::new(size, granularity_log2).unwrap();
        for (start, count) in dirty {
            let start = start % size;
            map.set(start, count.min(size - start));
        }
        for (start, count) in queries {
            let start = start % size;
            let end = (start + count).min(size);
            let scan = |from: u64, state| (from..end).find(|item| map.get(*item) == state);
            let dirty = scan(start, true);
            prop_assert_eq!(map.next_dirty(start..start + count), dirty);
            prop_assert_eq!(map.next_zero(start..start + count), scan(start, false));
            let area = dirty.map(|from| from..scan(from, false).unwrap_or(end));
            prop_assert_eq!(map.next_dirty_area(start..start + count, u64::MAX), area);
            let status = map.status(start, count);
            prop_assert_eq!(status.dirty, map.get(start));
            prop_assert_eq!(start + status.count, scan(start, !status.dirty).unwrap_or(end));
        }
    }
}
