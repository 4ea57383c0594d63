//! What the maps of a side tell: what it has written, and since when.

use std::ops::Range;

use brep_hbitmap::{MapSet, Role};

use crate::Commit;
use crate::link::MapsInfo;
use crate::primary::Since;
use crate::status::Written;

/// What maps hold, as hello tells it. None: it is not known.
pub(crate) fn describe<'a>(maps: impl Iterator<Item = &'a MapSet>) -> Option<MapsInfo> {
    let mut since: Option<Commit> = None;
    let mut bytes = Vec::new();
    for maps in maps {
        let all = [Role::Open, Role::Pending, Role::Differs].map(|r| maps.map(r).dirty_bytes());
        bytes.push(all.iter().sum::<u64>().min(maps.map(Role::Differs).size()));
        let oldest = if maps.has_pending() { Role::Pending } else { Role::Open };
        for role in [Role::Differs, oldest] {
            match Since::of(maps.tag(role)) {
                Since::Unknown => return None,
                Since::Ever => {}
                // All together count since the latest of them; epochs grow on every way.
                Since::Commit(commit) if since.is_some_and(|s| s.epoch >= commit.epoch) => {}
                Since::Commit(commit) => since = Some(commit),
            }
        }
    }
    Some(MapsInfo { since, bytes })
}

/// The first range, from `offset` on, that is in any of a disk's maps.
fn next_written(maps: &MapSet, offset: u64) -> Option<Range<u64>> {
    let all = [Role::Open, Role::Pending, Role::Differs].map(|role| maps.map(role));
    let size = all[0].size();
    let first = |at: u64| {
        all.iter().filter_map(|map| map.next_dirty_area(at..size, u64::MAX)).min_by_key(|a| a.start)
    };
    let mut area = first(offset)?;
    // Ranges of different maps that touch are one.
    while area.end < size
        && let Some(next) = first(area.end)
        && next.start == area.end
    {
        area.end = next.end;
    }
    Some(area)
}

/// The ranges that were written, from `offset` on, at most `max` of them: first byte and number of
/// bytes. And where those that follow begin, if there are any.
pub(crate) fn written_ranges(
    maps: &MapSet,
    offset: u64,
    max: usize,
) -> (Vec<(u64, u64)>, Option<u64>) {
    let mut ranges = Vec::new();
    let mut at = offset;
    while let Some(area) = next_written(maps, at) {
        if ranges.len() == max {
            return (ranges, Some(area.start));
        }
        ranges.push((area.start, area.end - area.start));
        at = area.end;
        if at == maps.map(Role::Differs).size() {
            break;
        }
    }
    (ranges, None)
}

/// What the maps of some disks hold, as status shows it. `disks` are their names, in order.
pub(crate) fn show_written<'a>(
    disks: impl Iterator<Item = &'a str>,
    maps: impl Iterator<Item = &'a MapSet>,
) -> Vec<Written> {
    let maps: Vec<_> = maps.collect();
    let info = describe(maps.iter().copied());
    let shown = |(index, disk): (usize, &str)| {
        let (ranges, next) = maps.get(index).filter(|_| info.is_some()).map_or_else(
            || (Vec::new(), Some(0)),
            |maps| written_ranges(maps, 0, Written::SHOWN_MAX),
        );
        let bytes = info.as_ref().and_then(|info| info.bytes.get(index).copied());
        Written { disk: disk.to_owned(), bytes, ranges, complete: next.is_none() }
    };
    disks.enumerate().map(shown).collect()
}
