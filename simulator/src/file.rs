//! A file: what its machine reads, and what a loss of power would leave of it.

use std::collections::BTreeMap;
use std::ops::Range;

use brep_block::is_zero;

use crate::rng::Rng;
use crate::world::Life;

/// What a disk writes as a whole.
pub(crate) const SECTOR: u64 = 512;

/// What is written back as a whole of a file that is mapped.
pub(crate) const PAGE: u64 = 4096;

/// Versions of a sector that are remembered between two flushes, the newest among them.
const VERSIONS_MAX: usize = 5;

/// Contents of a sector; none: zeroes.
type Sector = Option<Box<[u8; SECTOR as usize]>>;

fn put(sector: &Sector, place: &mut [u8]) {
    match sector {
        Some(data) => place.copy_from_slice(&data[..place.len()]),
        None => place.fill(0),
    }
}

/// What of the changes since the last flush a loss of power leaves, in quarters: all, none, and what
/// lies between.
pub(crate) type Keep = u64;
pub(crate) const KEEPS: u64 = 5;

/// A file in the page cache of a machine, and on its stable storage.
#[derive(Debug, Default)]
pub(crate) struct FileData {
    pub(crate) data: Vec<u8>,
    /// Who has it open, by a number that is never used twice.
    pub(crate) owner: Option<(Life, u64)>,
    pub(crate) opened: u64,
    /// Flushes that have begun.
    flushes: u64,
    /// By number: sectors that are not on stable storage as they are.
    unstable: BTreeMap<u64, Unstable>,
    stable_len: u64,
    /// Lengths since, with the flushes that had begun.
    lens: Vec<(u64, u64)>,
}

/// A sector that was changed: what stable storage has for sure, and what it had since. Each version
/// with the number of flushes that had begun when it was made.
#[derive(Debug)]
struct Unstable {
    stable: Sector,
    since: Vec<(u64, Sector)>,
}

/// A flush that has begun: it covers what was changed before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flush(u64);

/// What became of the changes of a file that were not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// There were none.
    Stable,
    Whole,
    Nothing,
    Torn,
}

impl FileData {
    fn sector(&self, number: u64) -> Sector {
        let data = &self.data[self.place(number)];
        if is_zero(data) {
            return None;
        }
        let mut sector = Box::new([0; SECTOR as usize]);
        sector[..data.len()].copy_from_slice(data);
        Some(sector)
    }

    /// Where a sector lies, as far as the file reaches.
    fn place(&self, number: u64) -> Range<usize> {
        let start = ((number * SECTOR) as usize).min(self.data.len());
        start..(start + SECTOR as usize).min(self.data.len())
    }

    fn change(&mut self, range: Range<u64>, apply: impl FnOnce(&mut [u8])) {
        if range.is_empty() {
            return;
        }
        if (self.data.len() as u64) < range.end {
            self.set_len(range.end);
        }
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        for number in sectors.clone() {
            if !self.unstable.contains_key(&number) {
                let stable = self.sector(number);
                self.unstable.insert(number, Unstable { stable, since: Vec::new() });
            }
        }
        apply(&mut self.data[range.start as usize..range.end as usize]);
        let flushes = self.flushes;
        for number in sectors {
            let now = self.sector(number);
            if let Some(unstable) = self.unstable.get_mut(&number) {
                unstable.push(flushes, now);
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        self.data.resize(len as usize, 0);
        self.lens.push((self.flushes, len));
        if self.lens.len() > VERSIONS_MAX {
            drop_one(&mut self.lens);
        }
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.change(offset..offset + data.len() as u64, |place| place.copy_from_slice(data));
    }

    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        self.change(offset..offset + len, |place| place.fill(0));
    }

    pub(crate) fn truncate(&mut self, size: u64) {
        let len = self.data.len() as u64;
        if size < len {
            // What is cut off may come back.
            self.zero(size, len - size);
        }
        if size != len {
            self.set_len(size);
        }
    }

    pub(crate) fn begin_flush(&mut self) -> Flush {
        self.flushes += 1;
        Flush(self.flushes)
    }

    /// What was changed in these bytes before the flush began is on stable storage.
    pub(crate) fn end_flush(&mut self, Flush(flush): Flush, bytes: Range<u64>) {
        let sectors = bytes.start / SECTOR..bytes.end.div_ceil(SECTOR);
        let stable: Vec<u64> = self
            .unstable
            .range_mut(sectors)
            .filter_map(|(number, unstable)| unstable.end_flush(flush).then_some(*number))
            .collect();
        for number in stable {
            self.unstable.remove(&number);
        }
        if let Some(covered) = self.lens.iter().rposition(|(begun, _)| *begun < flush) {
            self.stable_len = self.lens[covered].1;
            self.lens.drain(..=covered);
        }
    }

    /// Everything is on stable storage.
    pub(crate) fn sync(&mut self) {
        let flush = self.begin_flush();
        self.end_flush(flush, 0..u64::MAX);
    }

    /// The machine loses its power.
    pub(crate) fn lose_power(&mut self, rng: &mut Rng, keep: Keep) -> Left {
        self.owner = None;
        let lens = std::mem::take(&mut self.lens);
        let unstable = std::mem::take(&mut self.unstable);
        let longest = lens.iter().map(|(_, len)| *len).max().unwrap_or(0).max(self.stable_len);
        self.data.resize(longest as usize, 0);
        let (mut kept, mut lost) = (0, 0);
        for (number, unstable) in &unstable {
            let sector = match rng.below(4) < keep {
                true => unstable.since.last().map_or(&unstable.stable, |(_, newest)| newest),
                false => unstable.older(rng),
            };
            let newest = unstable.since.last().is_some_and(|(_, newest)| newest == sector);
            *(if newest { &mut kept } else { &mut lost }) += 1;
            let place = self.place(*number);
            put(sector, &mut self.data[place]);
        }
        if let Some((_, newest)) = lens.last() {
            let len = match rng.below(4) < keep {
                true => *newest,
                false => {
                    let older = rng.below(lens.len() as u64) as usize;
                    older.checked_sub(1).map_or(self.stable_len, |index| lens[index].1)
                }
            };
            self.stable_len = len;
        }
        self.data.resize(self.stable_len as usize, 0);
        match (kept, lost) {
            (0, 0) => Left::Stable,
            (_, 0) => Left::Whole,
            (0, _) => Left::Nothing,
            _ => Left::Torn,
        }
    }
}

/// Forgets one of several that were made between the same two flushes, never the last of them: a
/// flush makes that one stable.
fn drop_one<T>(since: &mut Vec<(u64, T)>) {
    let same = since.windows(2).position(|pair| pair[0].0 == pair[1].0);
    if let Some(index) = same {
        since.remove(index);
    }
}

impl Unstable {
    fn push(&mut self, flushes: u64, sector: Sector) {
        self.since.push((flushes, sector));
        if self.since.len() > VERSIONS_MAX {
            drop_one(&mut self.since);
        }
    }

    /// True: it is on stable storage as it is.
    fn end_flush(&mut self, flush: u64) -> bool {
        if let Some(covered) = self.since.iter().rposition(|(begun, _)| *begun < flush)
            && let Some((_, sector)) = self.since.drain(..=covered).next_back()
        {
            self.stable = sector;
        }
        self.since.is_empty()
    }

    /// Some version but the newest: most often the one that is stable for sure.
    fn older(&self, rng: &mut Rng) -> &Sector {
        if rng.chance(600) {
            return &self.stable;
        }
        let index = rng.below(self.since.len().max(1) as u64) as usize;
        index.checked_sub(1).map_or(&self.stable, |index| &self.since[index].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(mut file: FileData, seed: u64) -> FileData {
        file.lose_power(&mut Rng::new(seed), seed % KEEPS);
        file
    }

    fn after_some(make: impl Fn() -> FileData) -> Vec<Vec<u8>> {
        let mut contents: Vec<_> = (0..400).map(|seed| lost(make(), seed).data).collect();
        contents.sort();
        contents.dedup();
        contents
    }

    fn bytes(file: &[(u8, usize)]) -> Vec<u8> {
        file.iter().flat_map(|(byte, count)| vec![*byte; *count]).collect()
    }

    #[test]
    fn what_was_flushed_survives_and_nothing_else_for_sure() {
        let make = || {
            let mut file = FileData::default();
            file.write(0, &[1; 1024]);
            file.sync();
            file.write(512, &[2; 512]);
            file
        };
        let possible = [bytes(&[(1, 1024)]), bytes(&[(1, 512), (2, 512)])];
        assert_eq!(after_some(make), possible);
    }

    #[test]
    fn a_flush_covers_what_was_written_before_it_began() {
        let make = || {
            let mut file = FileData::default();
            file.write(0, &[1; 512]);
            let flush = file.begin_flush();
            file.write(0, &[2; 512]);
            file.end_flush(flush, 0..u64::MAX);
            file
        };
        assert_eq!(after_some(make), [bytes(&[(1, 512)]), bytes(&[(2, 512)])]);
    }

    #[test]
    fn the_last_version_before_a_flush_is_never_forgotten() {
        let make = || {
            let mut file = FileData::default();
            file.write(0, &[0; 512]);
            file.sync();
            for value in 1..20 {
                file.write(0, &[value; 512]);
            }
            let flush = file.begin_flush();
            for value in 20..40 {
                file.write(0, &[value; 512]);
            }
            file.end_flush(flush, 0..u64::MAX);
            file
        };
        let left = after_some(make);
        assert!(left.contains(&bytes(&[(19, 512)])) && left.contains(&bytes(&[(39, 512)])));
        assert!(left.iter().all(|data| data[0] >= 19));
    }

    #[test]
    fn sectors_are_kept_and_lost_one_by_one() {
        let make = || {
            let mut file = FileData::default();
            file.write(0, &[1; 1024]);
            file.sync();
            file.write(0, &[2; 1024]);
            file
        };
        assert_eq!(after_some(make).len(), 4);
    }

    #[test]
    fn what_was_cut_off_may_come_back_and_growth_may_be_lost() {
        let make = || {
            let mut file = FileData::default();
            file.write(0, &[1; 1024]);
            file.sync();
            file.truncate(512);
            file
        };
        let left = after_some(make);
        assert!(left.contains(&bytes(&[(1, 512)])) && left.contains(&bytes(&[(1, 1024)])));
        let grown = || {
            let mut file = FileData::default();
            file.write(0, &[1; 512]);
            file.sync();
            file.write(512, &[2; 512]);
            file
        };
        let left = after_some(grown);
        assert!(left.contains(&bytes(&[(1, 512)])));
        assert!(left.contains(&bytes(&[(1, 512), (2, 512)])));
        assert!(left.contains(&bytes(&[(1, 512), (0, 512)])));
    }
}
