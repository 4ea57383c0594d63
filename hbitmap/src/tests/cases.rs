use super::shadow::{L1, L2, L3, Shadow};
use crate::HBitmap;

fn map(size: u64, granularity_log2: u32) -> HBitmap {
    HBitmap::new(size, granularity_log2).unwrap()
}

#[test]
fn size_0() {
    let mut map = map(0, 0);
    assert_eq!((map.count(), map.size(), map.is_empty()), (0, 0, true));
    assert_eq!(map.iter(0).next(), None);
    assert_eq!(map.next_dirty(0..u64::MAX), None);
    assert_eq!(map.next_zero(0..u64::MAX), None);
    map.reset_all();
    assert!(!map.set(0, 0));
    map.levels().check();
}

#[test]
fn size_unaligned() {
    let mut shadow = Shadow::new(L3 + 23);
    shadow.set(0, 1);
    shadow.set(L3 + 22, 1);
    assert_eq!(shadow.map.iter(0).collect::<Vec<_>>(), [0, L3 + 22]);
}

#[test]
fn iter_empty() {
    assert_eq!(map(L1, 0).iter(0).next(), None);
}

#[test]
fn iter_partial() {
    let mut shadow = Shadow::new(L3);
    shadow.set(0, L3);
    for first in [1, L1 - 1, L1, L1 * 2 - 1, L2 - 1, L2, L2 + 1, L2 + L1, L2 + L1 * 2 - 1]
        .into_iter()
        .chain([L2 * 2 - 1, L2 * 2, L2 * 2 + 1, L2 * 2 + L1, L2 * 2 + L1 * 2 - 1, L3 / 2])
    {
        shadow.check(first);
    }
}

#[test]
fn iter_starts_with_the_group_that_contains_first() {
    let mut map = map(16, 1);
    map.set(0, 9);
    assert_eq!(map.iter(0).collect::<Vec<_>>(), [0, 2, 4, 6, 8]);
    map.reset(0, 4);
    assert_eq!(map.iter(0).collect::<Vec<_>>(), [4, 6, 8]);
    map.set(9, 2);
    assert_eq!(map.iter(0).collect::<Vec<_>>(), [4, 6, 8, 10]);
    assert_eq!(map.iter(7).next(), Some(6));
    assert_eq!(map.cursor(7).next(&map), Some(6));
}

#[test]
fn get_all() {
    let mut shadow = Shadow::new(L3);
    shadow.set(0, L3);
    shadow.check_get();
    assert_eq!(shadow.map.count(), L3);
}

#[test]
fn get_some() {
    let mut shadow = Shadow::new(2 * L2);
    for bit in [10, L1 - 1, L1, L2 - 1, L2] {
        shadow.set(bit, 1);
        shadow.check_get();
    }
}

#[test]
fn set_all() {
    Shadow::new(L3).set(0, L3);
}

#[test]
fn set_one() {
    let mut shadow = Shadow::new(2 * L2);
    for bit in [10, L1 - 1, L1, L2 - 1, L2] {
        shadow.set(bit, 1);
    }
}

#[test]
fn set_two_elem() {
    let mut shadow = Shadow::new(2 * L2);
    shadow.set(L1 - 1, 2);
    shadow.set(L1 * 2 - 1, 4);
    shadow.set(L1 * 4, L1 + 1);
    shadow.set(L1 * 8 - 1, L1 + 1);
    shadow.set(L2 - 1, 2);
    shadow.set(L2 + L1 - 1, 8);
    shadow.set(L2 + L1 * 4, L1 + 1);
    shadow.set(L2 + L1 * 8 - 1, L1 + 1);
}

#[test]
fn set_general() {
    let mut shadow = Shadow::new(2 * L3);
    shadow.set(L1 - 1, L1 + 2);
    shadow.set(L1 * 3 - 1, L1 + 2);
    shadow.set(L1 * 5, L1 * 2 + 1);
    shadow.set(L1 * 8 - 1, L1 * 2 + 1);
    shadow.set(L2 - 1, L1 + 2);
    shadow.set(L2 + L1 * 2 - 1, L1 + 2);
    shadow.set(L2 + L1 * 4, L1 * 2 + 1);
    shadow.set(L2 + L1 * 7 - 1, L1 * 2 + 1);
    shadow.set(L2 * 2 - 1, L3 * 2 - L2 * 2);
}

#[test]
fn set_twice() {
    let mut shadow = Shadow::new(3 * L1);
    shadow.set(0, L1 * 3);
    assert!(!shadow.map.set(L1, 1));
    assert_eq!(shadow.map.count(), L1 * 3);
}

#[test]
fn reset_empty() {
    let mut shadow = Shadow::new(L3);
    shadow.reset(0, L3);
    assert_eq!(shadow.map.count(), 0);
}

#[test]
fn reset_all() {
    let mut shadow = Shadow::new(2 * L3);
    for (start, count) in [
        (L1 - 1, L1 + 2),
        (0, L1 * 3),
        (L2, L1),
        (L2, L3 - L2 + 1),
        (L3 - 1, 3),
        (0, L3 * 2),
        (L3 / 2, L3),
    ] {
        shadow.set(start, count);
        shadow.reset_all();
        assert!(shadow.map.is_empty());
        shadow.check_get();
    }
}

/// Row: §9.2.
#[test]
fn series_s09_reset_all_keeps_size_and_granularity() {
    let mut map = map(L2 + 5, 3);
    map.set(0, L2 + 5);
    map.reset_all();
    assert_eq!((map.size(), map.granularity(), map.count()), (L2 + 5, 8, 0));
    map.set(L2 + 4, 1);
    map.set(9, 1);
    assert!(map.get(8) && map.get(15) && !map.get(7) && !map.get(16));
    // The last group is cut off by the size.
    assert_eq!(map.dirty_bytes(), 8 + 5);
}

#[test]
fn granularity() {
    let mut map = map(L1, 1);
    map.set(0, 1);
    assert_eq!(map.count(), 2);
    map.set(2, 1);
    assert_eq!(map.count(), 4);
    map.set(0, 3);
    assert_eq!(map.count(), 4);
    map.reset(0, 2);
    assert_eq!(map.count(), 2);
}

#[test]
fn truncate_nop() {
    let mut shadow = Shadow::new(L2);
    shadow.set(0, 1);
    shadow.set(L2 - 1, 1);
    shadow.truncate(L2);
    assert_eq!(shadow.map.count(), 2);
}

#[test]
fn truncate_grow_negligible() {
    let mut map = map(L2 - 1, 1);
    map.set(0, 1);
    map.set(L2 - 2, 1);
    map.truncate(L2).unwrap();
    assert!(map.get(0) && map.get(L2 - 2));
    assert_eq!((map.count(), map.dirty_bytes(), map.size()), (4, 4, L2));
}

#[test]
fn truncate_shrink_negligible() {
    let mut map = map(L2, 1);
    map.set(0, 1);
    map.set(L2 - 2, 1);
    map.set(L2 - 1, 1);
    map.truncate(L2 - 1).unwrap();
    assert!(map.get(0) && map.get(L2 - 2));
    assert_eq!((map.count(), map.dirty_bytes(), map.size()), (4, 3, L2 - 1));
}

#[test]
fn truncate_grow_tiny() {
    let mut map = map(L2 - 2, 1);
    map.set(0, 1);
    map.set(L2 - 3, 1);
    map.truncate(L2 - 1).unwrap();
    assert!(map.get(0) && map.get(L2 - 3) && !map.get(L2 - 2));
    assert_eq!(map.count(), 4);
}

#[test]
fn truncate_grow_small() {
    let mut shadow = Shadow::new(L2 + 1);
    shadow.set(0, 1);
    shadow.set(L2, 1);
    shadow.truncate(L2 + 1 + 4);
    shadow.check_get();
}

/// Sets 0, the new last, the first truncated and the last bit, and truncates.
fn shrink_drops_what_is_beyond(size: u64, by: u64) {
    let mut shadow = Shadow::new(size);
    for bit in [0, size - by - 1, size - by, size - 1] {
        shadow.set(bit, 1);
    }
    shadow.truncate(size - by);
    assert_eq!(shadow.map.iter(0).collect::<Vec<_>>(), [0, size - by - 1]);
    shadow.truncate(size);
    assert_eq!(shadow.map.count(), 2, "what was cut off must not come back");
}

#[test]
fn truncate_shrink_small() {
    shrink_drops_what_is_beyond(L2, 4);
}

#[test]
fn truncate_shrink_medium() {
    shrink_drops_what_is_beyond(L2 + 1, 4);
}

#[test]
fn truncate_shrink_large() {
    shrink_drops_what_is_beyond(L2, L1);
}

#[test]
fn truncate_grow_large() {
    let mut shadow = Shadow::new(L2);
    shadow.set(0, 1);
    shadow.set(L2 - 1, 1);
    shadow.truncate(L2 + L1);
    shadow.check_get();
}

#[test]
fn serialize_align() {
    assert_eq!(map(L3 * 2, 3).serialization_align(), Some(512));
    assert_eq!(map(L3, 57).serialization_align(), Some(1 << 63));
    assert_eq!(map(L3, 58).serialization_align(), None);
    assert!(map(L3, 58).serialization_size(0, L3).is_err());
}

const POSITIONS: [u64; 8] = [0, 1, L1 - 1, L1, L2 - 1, L2, L2 + 1, L3 - 1];

fn bit_of(bytes: &[u8], bit: u64) -> bool {
    bytes[bit as usize / 8] >> (bit % 8) & 1 != 0
}

#[test]
fn serialize_basic() {
    let mut map = map(L3, 0);
    let mut buffer = vec![0; map.serialization_size(0, L3).unwrap()];
    assert_eq!(buffer.len() as u64, L3 / 8);
    for position in POSITIONS {
        for count in POSITIONS.map(|count| count.min(L3 - position)) {
            map.reset_all();
            map.set(position, count);
            map.serialize_part(0, L3, &mut buffer).unwrap();
            for bit in 0..L3 {
                assert_eq!(bit_of(&buffer, bit), (position..position + count).contains(&bit));
            }
            let original = map.clone();
            map.reset_all();
            map.deserialize_part(0, L3, &buffer).unwrap();
            assert_eq!((&map, map.sha256()), (&original, original.sha256()));
            assert_eq!(map.count(), count);
            map.levels().check();
        }
    }
}

#[test]
fn serialize_part() {
    let mut map = map(L3, 0);
    for position in POSITIONS {
        map.set(position, 1);
    }
    let mut copy = HBitmap::new(L3, 0).unwrap();
    let mut buffer = vec![0; map.serialization_size(0, L2).unwrap()];
    for start in (0..L3).step_by(L2 as usize) {
        map.serialize_part(start, L2, &mut buffer).unwrap();
        for bit in 0..L2 {
            assert_eq!(bit_of(&buffer, bit), POSITIONS.contains(&(start + bit)));
        }
        copy.deserialize_part(start, L2, &buffer).unwrap();
    }
    assert_eq!(copy, map);
}

#[test]
fn iter_iter_and_reset() {
    let mut map = map(L1 * 2, 0);
    map.set(0, map.size());
    let mut cursor = map.cursor(L1 - 1);
    assert_eq!(cursor.next(&map), Some(L1 - 1));
    map.reset_all();
    assert_eq!(cursor.next(&map), None);
}

/// The first item in a range whose group is in `state`, by looking at each.
fn scan(map: &HBitmap, start: u64, count: u64, state: bool) -> Option<u64> {
    let end = start.saturating_add(count).min(map.size());
    (start..end).find(|item| map.get(*item) == state)
}

fn check_next(map: &HBitmap, start: u64, count: u64) {
    let range = start..start.saturating_add(count);
    assert_eq!(map.next_dirty(range.clone()), scan(map, start, count, true), "{range:?}");
    assert_eq!(map.next_zero(range.clone()), scan(map, start, count, false), "{range:?}");
}

fn next_x(granularity_log2: u32) {
    let max = i64::MAX as u64;
    let mut map = map(L3, granularity_log2);
    check_next(&map, 0, max);
    check_next(&map, L3 - 1, max);
    check_next(&map, 0, 1);
    check_next(&map, L3 - 1, 1);

    map.set(L2, 1);
    for (start, count) in [
        (0, max),
        (L2 - 1, max),
        (L2 - 1, 1),
        (L2 - 1, 2),
        (L2, 1),
        (L2, max),
        (L2 + 1, max),
        (L2 + 1, 1),
        (0, L2),
        (0, L2 + 1),
    ] {
        check_next(&map, start, count);
    }

    map.set(L2 + 5, L1);
    for (start, count) in [
        (0, max),
        (L2 + 1, max),
        (L2 + 2, max),
        (L2 + 5, max),
        (L2 + 5 + L1 - 1, max),
        (L2 + 5 + L1, max),
        (L2 + 5 + L1 + 1, max),
        (L2 + 1, L1),
        (L2 + 1, 4),
        (L2 + 1, 5),
        (L2 + 5, L1),
        (L2 + 5, L1 + 1),
        (L2 + L1, 5),
        (L2 + L1, 6),
    ] {
        check_next(&map, start, count);
    }

    map.set(L2 * 2, L3 - L2 * 2);
    for (start, count) in [
        (L2 * 2 - L1, max),
        (L2 * 2 - 2, max),
        (L2 * 2 - 1, max),
        (L2 * 2 - 1, 1),
        (L2 * 2, max),
        (L2 * 2 + 1, max),
        (L2 * 2 + L1, max),
        (L3 - 1, max),
        (L2 * 2 - 1, 2),
        (L2 * 2, 1),
    ] {
        check_next(&map, start, count);
    }

    map.set(0, L3);
    check_next(&map, 0, max);
    check_next(&map, L3 / 2, L3);
    assert_eq!(map.next_dirty(0..0), None);
    assert_eq!(map.next_zero(L3..u64::MAX), None);
}

#[test]
fn next_zero_next_x_0() {
    next_x(0);
}

#[test]
fn next_zero_next_x_4() {
    next_x(4);
}

fn check_areas(map: &HBitmap, start: u64) {
    for count in [0, 1, 3, 5, 8, L1, L2, i64::MAX as u64] {
        for max in [1, 3, 5, 10, u64::MAX] {
            let end = start.saturating_add(count).min(map.size());
            let expected = scan(map, start, count, true).map(|first| {
                let last = scan(map, first, end - first, false).unwrap_or(end);
                first..last.min(first.saturating_add(max))
            });
            let range = start..start.saturating_add(count);
            assert_eq!(map.next_dirty_area(range, max), expected, "{start} {count} {max}");
        }
    }
    assert_eq!(map.next_dirty_area(start..u64::MAX, 0), None);
}

fn next_dirty_area(granularity_log2: u32) {
    let mut map = map(L3, granularity_log2);
    check_areas(&map, 0);
    check_areas(&map, L3 - 1);
    map.set(L2, 1);
    for start in [0, 1, L2 - 1, L2, L2 + 1] {
        check_areas(&map, start);
    }
    map.set(L2 + 5, L1);
    for start in [0, L2 - 2, L2, L2 + 1, L2 + 4, L2 + 5, L2 + 6, L2 + L1, L2 + L1 + 5] {
        check_areas(&map, start);
    }
    map.set(L2 * 2, L3 - L2 * 2);
    for start in [L2 * 2 - L1, L2 * 2 - 1, L2 * 2, L2 * 2 + 1, L3 - 1] {
        check_areas(&map, start);
    }
    map.set(0, L3);
    for start in [0, 1, L3 / 2, L3 - 1] {
        check_areas(&map, start);
    }
}

#[test]
fn next_dirty_area_0() {
    next_dirty_area(0);
}

#[test]
fn next_dirty_area_1() {
    next_dirty_area(1);
}

#[test]
fn next_dirty_area_after_truncate() {
    let mut map = map(L1, 0);
    map.truncate(L1 * 2).unwrap();
    map.set(L1 + 1, 1);
    assert_eq!(map.next_dirty_area(0..u64::MAX, u64::MAX), Some(L1 + 1..L1 + 2));
}
