use super::shadow::{L1, L2, L3, Shadow};
use crate::{Error, HBitmap, Status};

/// A disk of 16 TiB in granules of 64 KiB.
fn large_disk() -> HBitmap {
    HBitmap::new(16 << 40, 16).unwrap()
}

#[test]
fn impossible_maps_are_refused() {
    for (size, granularity_log2) in [(i64::MAX as u64 + 1, 63), (1 << 42, 0), (1, 64), (1, 999)] {
        let refused = HBitmap::new(size, granularity_log2);
        assert!(matches!(refused, Err(Error::Impossible { size: s, .. }) if s == size));
    }
    let mut map = HBitmap::new(1, 0).unwrap();
    assert!(map.truncate(1 << 42).is_err());
    assert_eq!(map.size(), 1);
}

#[test]
fn the_largest_maps_work_at_both_ends() {
    for (size, granularity_log2) in [(1 << 41, 0), (i64::MAX as u64, 63), (i64::MAX as u64, 22)] {
        let mut map = HBitmap::new(size, granularity_log2).unwrap();
        map.set(size - 1, 1);
        map.set(0, 1);
        assert!(map.get(0) && map.get(size - 1));
        let last = (size - 1) >> granularity_log2 << granularity_log2;
        assert_eq!(map.iter(1 << granularity_log2 >> 1).last(), Some(last));
        map.reset(last, size - last);
        map.reset_all();
        assert!(map.is_empty());
    }
}

#[test]
fn clearing_one_word_clears_its_parent_only_if_the_word_became_zero() {
    let mut shadow = Shadow::new(2 * L3);
    shadow.set(L2 - 3, 6);
    shadow.reset(L2 - 3, 2);
    shadow.reset(L2 - 1, 1);
    shadow.reset(L2, 3);
    assert!(shadow.map.is_empty());
}

#[test]
fn clearing_several_words_clears_several_parents() {
    let mut shadow = Shadow::new(2 * L3);
    shadow.set(0, 2 * L3);
    shadow.reset(L1 / 2, L3 + L2);
    shadow.reset(L3 + L2 + L1, L2 * 3);
    shadow.reset(0, 2 * L3);
}

/// Series v3, section 9: clearing every bit in one call.
#[test]
fn s9_reset_all_clears_every_bit_and_keeps_size_and_granularity() {
    for (size, granularity_log2) in [(0, 0), (1, 0), (L2 + 1, 0), (2 * L3 + 23, 3), (1 << 40, 16)] {
        let empty = HBitmap::new(size, granularity_log2).unwrap();
        let mut map = empty.clone();
        map.set(0, size.min(L3));
        map.set(size - size.min(1), size.min(1));
        map.reset_all();
        assert_eq!((map.size(), map.granularity_log2()), (size, granularity_log2));
        assert_eq!((map.count(), map.dirty_bytes(), map.iter(0).next()), (0, 0, None));
        assert_eq!(map, empty);
        map.set(size - size.min(1), size.min(1));
        assert_eq!(map.count(), empty.granularity() * size.min(1), "it can be filled again");
    }
}

#[test]
fn old_contents_do_not_shine_through_after_reset_all() {
    let mut shadow = Shadow::new(2 * L3);
    shadow.set(0, 2 * L3);
    shadow.reset_all();
    // Neighbours in the same word, the same parent and the same chunk were all set before.
    for bit in [5, L1, L2 + 7, L3 - 1, L3, 2 * L3 - 1] {
        shadow.set(bit, 1);
        shadow.check_get();
    }
    shadow.reset_all();
    let mut ones = HBitmap::new(2 * L3, 0).unwrap();
    ones.set(L2, 2);
    shadow.map.or_assign(&ones).unwrap();
    assert_eq!(shadow.map.iter(0).collect::<Vec<_>>(), [L2, L2 + 1]);
    assert_eq!(shadow.map, ones);
}

#[test]
fn old_contents_do_not_shine_through_after_shrinking_and_growing() {
    for small in [0, 1, L1, L1 + 1, L2, L2 + 1] {
        let mut shadow = Shadow::new(L3);
        shadow.set(0, L3);
        shadow.truncate(small);
        shadow.truncate(L3);
        shadow.set(L3 - 1, 1);
        shadow.reset_all();
        shadow.truncate(small);
        shadow.truncate(L3);
        shadow.check_get();
    }
}

#[test]
fn reset_accepts_whole_groups_only() {
    let reset = |start, count| {
        std::panic::catch_unwind(|| {
            let mut map = HBitmap::new(100, 3).unwrap();
            map.set(0, 100);
            map.reset(start, count)
        })
    };
    for (start, count) in [(0, 8), (8, 88), (96, 4), (96, 8), (0, 100), (0, 104)] {
        assert!(reset(start, count).unwrap(), "{start} {count}");
    }
    for (start, count) in [(1, 8), (0, 4), (96, 3), (96, 5), (4, 96), (0, 112), (104, 8)] {
        assert!(reset(start, count).is_err(), "{start} {count}");
    }
    assert!(!reset(3, 0).unwrap());
}

#[test]
fn positions_out_of_range_panic() {
    let panics = |f: fn(&mut HBitmap)| {
        let mut map = HBitmap::new(100, 3).unwrap();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(&mut map))).is_err()
    };
    assert!(panics(|map| _ = map.get(104)));
    assert!(panics(|map| _ = map.set(104, 1)));
    assert!(panics(|map| _ = map.set(0, 105)));
    assert!(panics(|map| _ = map.set(u64::MAX, 2)));
    assert!(panics(|map| _ = map.status(100, 1)));
    assert!(!panics(|map| assert!(map.set(103, 1) && map.get(100))));
}

#[test]
fn status_counts_the_run_of_the_first_item() {
    let mut map = HBitmap::new(100, 3).unwrap();
    map.set(16, 10);
    assert_eq!(map.status(0, 100), Status { dirty: false, count: 16 });
    assert_eq!(map.status(17, 100), Status { dirty: true, count: 15 });
    assert_eq!(map.status(17, 4), Status { dirty: true, count: 4 });
    assert_eq!(map.status(32, u64::MAX), Status { dirty: false, count: 68 });
    assert_eq!(map.status(32, 0), Status { dirty: false, count: 0 });
}

#[test]
fn a_partial_last_group_counts_by_its_real_size() {
    let mut map = HBitmap::new(100, 3).unwrap();
    assert_eq!(map.dirty_bytes(), 0);
    map.set(0, 100);
    assert_eq!((map.count(), map.dirty_bytes()), (104, 100));
    map.reset(96, 4);
    assert_eq!((map.count(), map.dirty_bytes()), (96, 96));
}

#[test]
fn merging_a_finer_map_sets_the_groups_it_lies_in() {
    let mut fine = HBitmap::new(100, 1).unwrap();
    let mut coarse = HBitmap::new(100, 3).unwrap();
    fine.set(15, 2);
    coarse.set(96, 1);
    let mut both = HBitmap::new(100, 3).unwrap();
    both.set(50, 1);
    both.merge(&fine, &coarse).unwrap();
    assert_eq!(both.iter(0).collect::<Vec<_>>(), [8, 16, 96]);
    let mut both = HBitmap::new(100, 1).unwrap();
    both.merge(&coarse, &fine).unwrap();
    assert_eq!(both.iter(0).collect::<Vec<_>>(), [14, 16, 96, 98]);
}

#[test]
fn merging_empty_maps_empties_the_result() {
    let empty = HBitmap::new(100, 0).unwrap();
    let mut map = empty.clone();
    map.set(3, 1);
    map.or_assign(&empty).unwrap();
    assert_eq!(map.count(), 1);
    map.merge(&empty, &empty).unwrap();
    assert!(map.is_empty());
}

#[test]
fn maps_of_different_sizes_do_not_merge() {
    let mut map = HBitmap::new(100, 0).unwrap();
    map.set(3, 1);
    let other = HBitmap::new(101, 0).unwrap();
    let same = HBitmap::new(100, 0).unwrap();
    assert!(matches!(map.or_assign(&other), Err(Error::SizesDiffer { left: 100, right: 101 })));
    assert!(map.merge(&same, &other).is_err());
    assert_eq!(map.count(), 1);
}

#[test]
fn parts_that_the_format_does_not_allow_are_refused() {
    let mut map = HBitmap::new(1000, 1).unwrap();
    map.set(0, 1000);
    assert_eq!(map.serialization_size(0, 0).unwrap(), 0);
    assert_eq!(map.serialization_size(0, 128).unwrap(), 8);
    assert_eq!(map.serialization_size(896, 104).unwrap(), 8);
    for (start, count, len) in [
        (1, 128, 8),
        (0, 127, 8),
        (64, 936, 64),
        (0, 1001, 64),
        (1024, 128, 8),
        (u64::MAX, 2, 8),
        (0, 128, 7),
        (0, 128, 16),
    ] {
        assert!(map.serialize_part(start, count, &mut vec![0; len]).is_err(), "{start} {count}");
        assert!(map.deserialize_part(start, count, &vec![0; len]).is_err(), "{start} {count}");
    }
    assert_eq!(map.count(), 1000);
}

#[test]
fn ones_beyond_the_end_are_neither_counted_nor_found() {
    let mut map = HBitmap::new(70, 0).unwrap();
    map.deserialize_part(0, 70, &[0xff; 16]).unwrap();
    assert_eq!((map.count(), map.iter(0).last()), (70, Some(69)));
    map.reset_all();
    map.deserialize_ones(64, 6).unwrap();
    assert_eq!((map.count(), map.iter(0).last()), (6, Some(69)));
    map.truncate(128).unwrap();
    assert_eq!(map.count(), 6);
    map.deserialize_zeroes(0, 128).unwrap();
    assert!(map.is_empty());
}

#[test]
fn the_hash_is_that_of_the_words() {
    use sha2::{Digest, Sha256};
    let mut map = HBitmap::new(L3 + 1, 0).unwrap();
    map.set(L2 + 1, L2);
    let mut bytes = vec![0; map.serialization_size(0, L3 + 1).unwrap()];
    map.serialize_part(0, L3 + 1, &mut bytes).unwrap();
    let expected: [u8; 32] = Sha256::digest(&bytes).into();
    if cfg!(target_endian = "little") {
        assert_eq!(map.sha256(), expected);
    }
    let empty: [u8; 32] = Sha256::digest([0; 8]).into();
    assert_eq!(HBitmap::new(0, 0).unwrap().sha256(), empty);
}

#[test]
fn an_empty_map_of_a_large_disk_costs_little_memory() {
    let mut map = large_disk();
    assert!(map.memory_bytes() < 1024);
    map.set(0, 1);
    map.set(map.size() - 1, 1);
    assert!(map.memory_bytes() < 128 << 10, "{}", map.memory_bytes());
    map.set(0, map.size());
    assert!(map.memory_bytes() < 34 << 20, "{}", map.memory_bytes());
    map.reset_all();
    map.set(1 << 40, 1);
    map.shrink();
    assert!(map.memory_bytes() < 128 << 10, "{}", map.memory_bytes());
    assert_eq!(map.iter(0).collect::<Vec<_>>(), [1 << 40]);
    map.levels().check();
}

#[test]
fn take_leaves_an_empty_map_of_the_same_shape() {
    let mut map = large_disk();
    map.set(1 << 40, 1 << 20);
    let taken = map.take();
    assert_eq!(taken.dirty_bytes(), 1 << 20);
    assert!(map.is_empty());
    assert_eq!((map.size(), map.granularity_log2()), (taken.size(), 16));
    assert!(map.set(1 << 40, 1));
}
