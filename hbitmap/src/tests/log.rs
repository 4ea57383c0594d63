//! The activity log, against a model of what a loss of power may take away.

use std::collections::BTreeMap;
use std::path::Path;

use super::history::Random;
use crate::{ActivityLog, Error, Identity, LogWrite};

const IDENTITY: Identity = Identity([5; 16]);
const MIB: u64 = 1 << 20;
const EXTENT: u64 = 4 * MIB;
const SIZE: u64 = 10_000 * EXTENT - 7;
const SLOT: usize = ActivityLog::FILE_LEN as usize / 2;

/// A log in its file.
struct Owner {
    log: ActivityLog,
    file: Vec<u8>,
}

impl Owner {
    fn new() -> Self {
        let mut log = ActivityLog::new(IDENTITY, SIZE);
        let write = log.clear();
        let mut this = Owner { log, file: vec![0; ActivityLog::FILE_LEN as usize] };
        this.put(&write);
        this.log.written();
        this
    }

    fn put(&mut self, write: &LogWrite) {
        self.file[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
    }

    /// Until a range is hot.
    fn heat(&mut self, start: u64, count: u64) {
        while !self.log.heat(start, count) {
            let write = self.log.next_write().expect("there is room");
            self.put(&write);
            self.log.written();
        }
    }
}

/// What a loss of power leaves, in extents.
fn hot(file: &[u8]) -> Vec<u64> {
    let (_, hot) = ActivityLog::load(Path::new("log"), file, IDENTITY, SIZE).unwrap();
    hot.iter().map(|range| range.start / EXTENT).collect()
}

#[test]
fn nothing_is_hot_before_it_is_on_stable_storage() {
    let mut owner = Owner::new();
    assert!(!owner.log.heat(EXTENT - 1, 2));
    assert!(!owner.log.heat(9 * EXTENT, 1));
    let write = owner.log.next_write().unwrap();
    assert!(owner.log.next_write().is_none(), "one write at a time");
    assert!(!owner.log.heat(EXTENT, 1), "it is on its way");
    assert!(!owner.log.heat(20 * EXTENT, 1));
    assert_eq!(hot(&owner.file), []);
    owner.put(&write);
    owner.log.written();
    assert!(owner.log.heat(EXTENT - 1, 2) && owner.log.heat(9 * EXTENT, 1));
    assert_eq!(hot(&owner.file), [0, 1, 9], "one write has served both");
    assert!(!owner.log.heat(20 * EXTENT, 1), "that came too late for it");
    owner.heat(20 * EXTENT, 1);
    assert_eq!(hot(&owner.file), [0, 1, 9, 20]);
}

#[test]
fn an_extent_leaves_only_when_its_bits_are_durable_and_its_place_is_needed() {
    let mut owner = Owner::new();
    let capacity = ActivityLog::CAPACITY as u64;
    for extent in 0..capacity {
        owner.heat(extent * EXTENT, 1);
    }
    assert!(owner.log.wants_sync());
    assert!(!owner.log.heat(capacity * EXTENT, 1));
    assert!(owner.log.next_write().is_none() && owner.log.is_full());
    let sync = owner.log.begin_sync();
    owner.heat(0, 1);
    assert!(owner.log.next_write().is_none(), "it has not ended");
    owner.log.synced(sync);
    owner.heat(capacity * EXTENT, 1);
    let left = hot(&owner.file);
    assert!(left.contains(&0), "it was touched after the sync had begun");
    assert!(left.contains(&capacity) && left.len() < capacity as usize);
}

#[test]
fn extents_that_nobody_touches_leave_when_something_is_written() {
    let mut owner = Owner::new();
    owner.heat(0, 100 * EXTENT);
    let sync = |owner: &mut Owner| {
        let sync = owner.log.begin_sync();
        owner.log.synced(sync);
    };
    for _ in 0..20 {
        sync(&mut owner);
        owner.heat(0, 50 * EXTENT);
    }
    assert!(owner.log.next_write().is_none(), "fifty are not worth a write");
    owner.heat(200 * EXTENT, 1);
    assert_eq!(hot(&owner.file), (0..50).chain([200]).collect::<Vec<_>>());
    owner.heat(300 * EXTENT, 100 * EXTENT);
    for _ in 0..20 {
        sync(&mut owner);
    }
    let write = owner.log.next_write().expect("many are worth one");
    owner.put(&write);
    owner.log.written();
    assert_eq!(hot(&owner.file), []);
}

#[test]
fn a_torn_write_leaves_the_log_before_it() {
    let mut owner = Owner::new();
    owner.heat(0, 1);
    owner.heat(7 * EXTENT, 1);
    assert!(!owner.log.heat(9 * EXTENT, 1));
    let write = owner.log.next_write().unwrap();
    for torn in (0..SLOT).step_by(512).chain([1, 12, SLOT - 1]) {
        let mut file = owner.file.clone();
        file[write.offset as usize..][..torn].copy_from_slice(&write.bytes[..torn]);
        let left = hot(&file);
        // What was not changed by the rest of the write cannot be missed.
        assert!(left == [0, 7] || left == [0, 7, 9] && torn >= 512, "{torn}: {left:?}");
    }
}

#[test]
fn whose_log_it_is_and_whether_it_is_whole_is_told() {
    let mut owner = Owner::new();
    owner.heat(3 * EXTENT, 1);
    let load = |file: &[u8], identity| {
        ActivityLog::load(Path::new("a.log"), file, identity, SIZE).map(|(_, hot)| hot)
    };
    let foreign = load(&owner.file, Identity([6; 16]));
    assert!(matches!(foreign, Err(Error::Foreign { .. })));
    assert!(matches!(load(&[], IDENTITY), Err(Error::NotABitmap { .. })));
    let zeroes = vec![0; ActivityLog::FILE_LEN as usize];
    assert!(matches!(load(&zeroes, IDENTITY), Err(Error::NotABitmap { .. })));
    let mut file = owner.file.clone();
    file[100] ^= 1;
    file[SLOT + 100] ^= 1;
    assert!(matches!(load(&file, IDENTITY), Err(Error::Corrupt { .. })));
    assert!(matches!(load(&owner.file[..SLOT / 2], IDENTITY), Err(Error::Corrupt { .. })));
    // A log goes on where it was, and the disk may have grown.
    let (mut log, hot) =
        ActivityLog::load(Path::new("a.log"), &owner.file, IDENTITY, 2 * SIZE).unwrap();
    assert!(hot.len() == 1 && hot[0] == (3 * EXTENT..4 * EXTENT));
    let write = log.clear();
    owner.put(&write);
    log.written();
    assert_eq!(load(&owner.file, IDENTITY).unwrap(), []);
}

#[test]
fn the_last_extent_ends_with_the_disk() {
    let mut owner = Owner::new();
    owner.heat(SIZE - 1, 1);
    let (_, hot) = ActivityLog::load(Path::new("log"), &owner.file, IDENTITY, SIZE).unwrap();
    assert!(hot.len() == 1 && hot[0] == (9_999 * EXTENT..SIZE));
}

/// Whenever the power is lost: every extent with a bit that is not durable is hot.
#[test]
fn random_histories_never_lose_a_bit_that_was_not_durable() {
    for seed in 0..2 {
        let mut random = Random(seed);
        let mut owner = Owner::new();
        let mut writing: Option<LogWrite> = None;
        let mut syncing: Option<(crate::Sync, u64)> = None;
        // Extents with bits that are in memory only, and when the last of them was set.
        let mut volatile = BTreeMap::new();
        for now in 0..3_000_u64 {
            match random.below(10) {
                0..=5 => {
                    // A few extents often, the others seldom.
                    let most = if random.below(3) > 0 { 9_999 } else { 50 };
                    let extent = random.below(most);
                    let last = (extent + 9).min(9_999);
                    if owner.log.heat(extent * EXTENT + 5, (last - extent) * EXTENT) {
                        volatile.extend((extent..=last).map(|extent| (extent, now)));
                    }
                }
                6 => writing = writing.or_else(|| owner.log.next_write()),
                7 => {
                    if let Some(write) = writing.take() {
                        owner.put(&write);
                        owner.log.written();
                    }
                }
                8 if syncing.is_none() && random.below(50) == 0 => {
                    syncing = Some((owner.log.begin_sync(), now));
                }
                9 if random.below(50) == 0 => {
                    if let Some((sync, begun)) = syncing.take() {
                        owner.log.synced(sync);
                        volatile.retain(|_, touched| *touched > begun);
                    }
                }
                _ => {}
            }
            if now % 100 == 0 {
                let mut file = owner.file.clone();
                if let Some(write) = &writing {
                    let torn = random.below(SLOT as u64) as usize;
                    file[write.offset as usize..][..torn].copy_from_slice(&write.bytes[..torn]);
                }
                let left = hot(&file);
                let lost = volatile.keys().find(|extent| left.binary_search(extent).is_err());
                assert_eq!(lost, None, "seed {seed}, step {now}");
                assert!(left.len() <= ActivityLog::CAPACITY);
            }
        }
        assert!(owner.log.hot_extents() > 3000, "the log must have been full");
    }
}
