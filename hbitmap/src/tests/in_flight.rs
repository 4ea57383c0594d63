//! What a set of maps remembers of requests that have begun and not ended.

use super::history::{SIZE, options, scratch, tag};
use crate::{LastStop, MapSet, Role};

const GROUP: u64 = 1 << super::history::GRANULARITY_LOG2;

fn dirty(maps: &MapSet, role: Role) -> Vec<(u64, u64)> {
    maps.map(role).dirty_areas(0..SIZE).map(|area| (area.start / GROUP, area.end / GROUP)).collect()
}

#[test]
fn a_kill_makes_what_is_in_flight_differ_and_keeps_the_rest_where_it_was() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut maps = MapSet::create(&path, &options(), tag(0)).unwrap();
    maps.set(Role::Open, 0, 100 * GROUP);
    let ended = maps.begin_in_flight(0, 10 * GROUP, 2).unwrap();
    let first = maps.begin_in_flight(50 * GROUP, 5 * GROUP, 2).unwrap();
    maps.rotate(tag(1)).unwrap();
    maps.set(Role::Open, 200 * GROUP, 10 * GROUP);
    let _second = maps.begin_in_flight(200 * GROUP + 1, 1, 1);
    maps.end_in_flight(ended);
    maps.end_in_flight(ended);
    maps.end_in_flight(first);
    assert!(maps.is_in_flight());
    drop(maps);
    let maps = MapSet::open(&path, &options()).unwrap();
    assert_eq!((maps.last_stop(), maps.is_in_flight()), (LastStop::Killed, false));
    assert_eq!(dirty(&maps, Role::Differs), [(50, 55), (200, 201)]);
    assert_eq!(dirty(&maps, Role::Pending), [(0, 100)]);
    assert_eq!(dirty(&maps, Role::Open), [(200, 210)]);
    drop(maps);
    let maps = MapSet::open(&path, &options()).unwrap();
    assert_eq!(dirty(&maps, Role::Differs), [(50, 55), (200, 201)], "not more at the second kill");
}

#[test]
fn what_is_in_flight_at_a_clean_stop_differs() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut maps = MapSet::create(&path, &options(), tag(0)).unwrap();
    maps.set(Role::Open, 0, 100 * GROUP);
    let _request = maps.begin_in_flight(50 * GROUP, 5 * GROUP, 2);
    maps.close().unwrap();
    let maps = MapSet::open(&path, &options()).unwrap();
    assert_eq!(maps.last_stop(), LastStop::Clean);
    assert_eq!(dirty(&maps, Role::Differs), [(50, 55)]);
}

#[test]
fn more_requests_than_there_is_room_for_make_everything_written_count_as_in_flight() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut maps = MapSet::create(&path, &options(), tag(0)).unwrap();
    maps.set(Role::Open, 7 * GROUP, 20_000 * GROUP);
    let mut requests: Vec<_> =
        (0..8191).map(|n| maps.begin_in_flight((7 + n) * GROUP, 1, 1).unwrap()).collect();
    let mut too_many: Vec<_> =
        (0..3).map(|_| maps.begin_in_flight(15_000 * GROUP, 1, 1).unwrap()).collect();
    for request in requests.drain(1..) {
        maps.end_in_flight(request);
    }
    for request in too_many.drain(1..) {
        maps.end_in_flight(request);
    }
    drop(maps);
    let mut maps = MapSet::open(&path, &options()).unwrap();
    assert_eq!(dirty(&maps, Role::Differs), [(7, 20_007)], "everything that may be meant, no more");
    maps.reset_all(Role::Differs);
    let last = maps.begin_in_flight(9 * GROUP, 1, 1).unwrap();
    maps.end_in_flight(last);
    drop(maps);
    let maps = MapSet::open(&path, &options()).unwrap();
    assert_eq!(dirty(&maps, Role::Differs), [], "room again, and nothing left behind");
}
