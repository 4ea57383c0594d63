//! Maps whose disk grows, or whose bits are to stand for more or less than before.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::history::{options, scratch, tag};
use crate::persist::crash::{Killed, fail_directory_flushes_after, kill_after};
use crate::{Error, Identity, LastStop, MapSet, Options, Role};

const GROUP: u64 = 1 << super::history::GRANULARITY_LOG2;
const SIZE: u64 = super::history::SIZE;
const ROLES: [Role; 3] = [Role::Open, Role::Pending, Role::Differs];

fn dirty(maps: &MapSet, role: Role) -> Vec<(u64, u64)> {
    maps.map(role).dirty_areas(0..u64::MAX).map(|area| (area.start, area.end)).collect()
}

fn sized(size: u64, granularity_log2: u32) -> Options {
    Options::new(Identity([7; 16]), size, granularity_log2).boot_id([1; 16])
}

fn with_all_roles(path: &Path) -> MapSet {
    let mut maps = MapSet::create(path, &options(), tag(1)).unwrap();
    maps.set(Role::Open, 100 * GROUP, 10 * GROUP);
    maps.rotate(tag(2)).unwrap();
    maps.set(Role::Open, 300 * GROUP, 10 * GROUP);
    maps.set(Role::Differs, 500 * GROUP, 10 * GROUP);
    maps
}

fn check(maps: &MapSet) {
    assert_eq!(dirty(maps, Role::Pending), [(100 * GROUP, 110 * GROUP)]);
    assert_eq!(dirty(maps, Role::Open), [(300 * GROUP, 310 * GROUP)]);
    assert_eq!(dirty(maps, Role::Differs)[0], (500 * GROUP, 510 * GROUP));
    assert_eq!(ROLES.map(|role| maps.tag(role).number), [2, 1, 1]);
    ROLES.iter().for_each(|role| maps.map(*role).levels().check());
}

#[test]
fn maps_grow_with_their_disk_while_requests_are_in_flight() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut maps = with_all_roles(&path);
    let in_flight = maps.begin_in_flight(305 * GROUP, GROUP, 1).unwrap();
    let _another = maps.begin_in_flight(105 * GROUP, GROUP, 1);
    let grown = 3 * SIZE + 5;
    maps.grow(grown).unwrap();
    check(&maps);
    assert_eq!(dirty(&maps, Role::Differs)[1..], [(SIZE / GROUP * GROUP, grown)], "what is new");
    assert!(matches!(maps.grow(SIZE), Err(Error::State { .. })));
    maps.set(Role::Open, grown - 1, 1);
    maps.end_in_flight(in_flight);
    drop(maps);
    assert!(matches!(MapSet::open(&path, &options()), Err(Error::Foreign { .. })));
    let maps = MapSet::open(&path, &sized(grown, 4)).unwrap();
    assert_eq!(maps.last_stop(), LastStop::Killed);
    assert!(maps.map(Role::Open).get(grown - 1));
    assert!(maps.map(Role::Differs).get(105 * GROUP), "it was in flight");
    assert!(!maps.map(Role::Differs).get(305 * GROUP), "it had ended");
}

#[test]
fn a_kill_while_maps_grow_leaves_the_old_or_the_new_ones() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let grown = 2 * SIZE;
    let mut points = 0;
    loop {
        let _ = fs::remove_file(&path);
        let mut maps = with_all_roles(&path);
        kill_after(points);
        let run = catch_unwind(AssertUnwindSafe(|| maps.grow(grown).unwrap()));
        kill_after(u64::MAX);
        let killed = match run {
            Err(payload) if !payload.is::<Killed>() => std::panic::resume_unwind(payload),
            run => run.is_err(),
        };
        drop(maps);
        // Whoever opens them then finds the disk grown.
        let maps = MapSet::open(&path, &sized(grown, 4)).unwrap();
        check(&maps);
        assert!(maps.map(Role::Differs).get(grown - 1));
        if !killed {
            break;
        }
        points += 1;
    }
    assert!(points > 100, "it must have stored something");
}

#[test]
fn maps_of_another_granularity_are_converted_and_lose_nothing() {
    let directory = scratch();
    let path = directory.path().join("maps");
    drop(with_all_roles(&path));
    for (log2, open) in [(7, (296 * GROUP, 312 * GROUP)), (4, (296 * GROUP, 312 * GROUP))] {
        let maps = MapSet::open(&path, &sized(SIZE, log2)).unwrap();
        assert_eq!(maps.map(Role::Open).granularity_log2(), log2);
        assert_eq!(dirty(&maps, Role::Open), [open]);
        drop(maps);
        let maps = MapSet::open(&path, &sized(SIZE, 9).keep_granularity()).unwrap();
        assert_eq!(maps.map(Role::Open).granularity_log2(), log2);
        assert!(maps.has_pending() && maps.tag(Role::Pending) == tag(1));
        maps.close().unwrap();
    }
}

/// Heap and mapping together, with every bit of every map set.
#[test]
fn the_maps_of_a_disk_of_16_tib_fit_into_64_mib() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let size = 16 << 40;
    let options = Options::new(Identity([7; 16]), size, Options::granularity_log2_for(size));
    let mut maps = MapSet::create(&path, &options, tag(0)).unwrap();
    maps.set(Role::Open, 0, size);
    maps.rotate(tag(1)).unwrap();
    maps.set(Role::Open, 0, size);
    maps.set(Role::Differs, 0, size);
    let mapped = fs::metadata(&path).unwrap().len();
    let bytes = maps.memory_bytes() as u64 + mapped;
    assert!(bytes <= 64 << 20, "{bytes} bytes");
    assert!(maps.map(Role::Pending).dirty_bytes() == size, "they must be full");
}

#[test]
fn the_granularity_follows_the_size_and_has_bounds() {
    let log2 = Options::granularity_log2_for;
    assert_eq!([log2(0), log2(1 << 30), log2(4 << 40)], [16; 3]);
    assert_eq!([log2((4 << 40) + 1), log2(8 << 40)], [17; 2]);
    assert_eq!(log2(16 << 40), 18);
    assert_eq!(log2(i64::MAX as u64), 24, "beyond 1 PiB the maps grow");
}

/// What has the name of the file is the file: a kill must find what is in use.
#[test]
fn maps_that_have_grown_are_in_use_although_their_name_cannot_be_flushed() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut maps = with_all_roles(&path);
    // That of the new file under its first name; then, under the old one's.
    for flushes in [0, 1] {
        fail_directory_flushes_after(flushes);
        let grown = maps.grow(2 * SIZE);
        fail_directory_flushes_after(u64::MAX);
        assert_eq!(grown.is_ok(), flushes == 1, "{grown:?}");
    }
    check(&maps);
    maps.set(Role::Open, 2 * SIZE - 1, 1);
    assert!(matches!(maps.flush(), Err(Error::Sticky { .. })));
    assert!(matches!(maps.flusher().run(), Err(Error::Sticky { .. })));
    drop(maps);
    let maps = MapSet::open(&path, &sized(2 * SIZE, 4)).unwrap();
    assert!(maps.map(Role::Open).get(2 * SIZE - 1));
}
