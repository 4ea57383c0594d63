//! What guests may see: the writes of one line, by disk and sector.

use crate::file::SECTOR;

/// Instead of a stamp: a mixture, or what belongs elsewhere.
pub(crate) const MIXTURE: u64 = u64::MAX;

/// A write of a guest to a sector. Times are the world's ticks.
#[derive(Debug, Clone, Copy)]
struct Write {
    /// What the sector holds afterwards; 0: zeroes.
    stamp: u64,
    start: u64,
    /// When the guest was answered; the end of time while it was not.
    end: u64,
    /// It was answered with success. If not, it may have happened or not.
    acked: bool,
    /// It needs no flush to survive a loss of power.
    through: bool,
    /// When a loss of power may have taken it, though it was answered: from then on it may have
    /// happened or not. The end of time if nothing can take it, or has.
    doubtful_from: u64,
    /// It may have left whatever its image's file held there before.
    anything: bool,
}

impl Write {
    fn new(stamp: u64, start: u64) -> Self {
        let (end, doubtful_from) = (u64::MAX, u64::MAX);
        Write { stamp, start, end, acked: false, through: false, doubtful_from, anything: false }
    }

    /// Whether it may have left this.
    fn leaves(&self, stamp: u64) -> bool {
        self.anything || self.stamp == stamp
    }

    /// It is known to have happened, as far as is known at a time.
    fn counts(&self, at: u64) -> bool {
        self.acked && self.doubtful_from > at
    }
}

/// The writes of a line.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// By disk and sector; the first is what was there before.
    sectors: Vec<Vec<Vec<Write>>>,
    /// By disk: what had been answered before this time is on stable storage.
    flushed: Vec<u64>,
}

/// A write that has begun, in the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    disk: usize,
    first: u64,
    count: u64,
    start: u64,
}

impl Model {
    /// Disks with these contents.
    pub(crate) fn new(contents: &[Vec<u64>]) -> Self {
        let first = |stamp: &u64| {
            vec![Write { end: 0, acked: true, through: true, ..Write::new(*stamp, 0) }]
        };
        let sectors = contents.iter().map(|disk| disk.iter().map(first).collect()).collect();
        Model { sectors, flushed: vec![0; contents.len()] }
    }

    /// What was there before the first write.
    pub(crate) fn first(&self) -> Vec<Vec<u64>> {
        let first = |writes: &Vec<Write>| writes.first().map_or(0, |write| write.stamp);
        self.sectors.iter().map(|disk| disk.iter().map(first).collect()).collect()
    }

    /// By disk, in sectors.
    pub(crate) fn sizes(&self) -> Vec<u64> {
        self.sectors.iter().map(|disk| disk.len() as u64).collect()
    }

    /// A disk has this many sectors from now on; what is new is zeroes.
    pub(crate) fn grow(&mut self, disk: usize, sectors: u64) {
        let disk = &mut self.sectors[disk];
        if disk.len() < sectors as usize {
            let zeroes = Write { end: 0, acked: true, through: true, ..Write::new(0, 0) };
            disk.resize(sectors as usize, vec![zeroes]);
        }
    }

    /// A disk comes; what it held before.
    pub(crate) fn add_disk(&mut self, disk: usize, contents: &[u64]) {
        let Model { mut sectors, .. } = Model::new(&[contents.to_vec()]);
        self.sectors.resize(self.sectors.len().max(disk + 1), Vec::new());
        self.flushed.resize(self.sectors.len(), 0);
        self.sectors[disk] = std::mem::take(&mut sectors[0]);
    }

    /// Disks of zeroes.
    pub(crate) fn blank(disks: usize, bytes: u64) -> Self {
        Self::new(&vec![vec![0; (bytes / SECTOR) as usize]; disks])
    }

    pub(crate) fn begin(
        &mut self,
        disk: usize,
        first: u64,
        count: u64,
        stamp: u64,
        start: u64,
    ) -> Begun {
        for sector in &mut self.sectors[disk][first as usize..(first + count) as usize] {
            sector.push(Write::new(stamp, start));
        }
        Begun { disk, first, count, start }
    }

    /// It was answered. `through`: it does not need a flush.
    pub(crate) fn end(&mut self, begun: Begun, end: u64, acked: bool, through: bool) {
        let Begun { disk, first, count, start } = begun;
        for sector in &mut self.sectors[disk][first as usize..(first + count) as usize] {
            if let Some(write) = sector.iter_mut().rev().find(|write| write.start == start) {
                (write.end, write.acked, write.through) = (end, acked, through);
            }
        }
    }

    /// A flush that began at this time was answered with success.
    pub(crate) fn flushed(&mut self, disk: usize, start: u64) {
        self.flushed[disk] = self.flushed[disk].max(start);
    }

    /// The machine that has the disks has lost its power. `mapped`: what was written since the
    /// beginning lies in an image, whose mapping may be left without the data.
    pub(crate) fn power_lost(&mut self, now: u64, mapped: bool) {
        for (disk, flushed) in self.sectors.iter_mut().zip(&self.flushed) {
            for writes in disk {
                for write in &mut *writes {
                    if !write.through && write.end >= *flushed {
                        write.doubtful_from = write.doubtful_from.min(now);
                    }
                }
                if mapped && let Some(start) = mapped_anew(writes, now) {
                    writes.push(Write { end: now, anything: true, ..Write::new(MIXTURE, start) });
                }
            }
        }
    }

    /// Why a read from `start` to `end` may not have seen `stamp`.
    pub(crate) fn check_read(
        &self,
        disk: usize,
        sector: u64,
        stamp: u64,
        (start, end): (u64, u64),
    ) -> Result<(), String> {
        let writes = &self.sectors[disk][sector as usize];
        // Whatever had ended when this one began was overwritten before the read.
        let last =
            writes.iter().filter(|o| o.counts(start) && o.end < start).map(|o| o.start).max();
        let last = last.unwrap_or(0);
        let allowed = writes.iter().any(|w| w.leaves(stamp) && w.start < end && w.end >= last);
        if allowed {
            return Ok(());
        }
        Err(format!("disk {disk} sector {sector} has {stamp}; {}", Self::tell(writes)))
    }

    /// Why contents are not all disks at one moment from `from` to `to`, as far as the order of
    /// writes is known: everything that was answered before it, nothing that began after it.
    pub(crate) fn check_cut(
        &self,
        contents: &[Vec<u64>],
        moments: (u64, u64),
    ) -> Result<(), String> {
        let sectors = contents.iter().enumerate().flat_map(|(disk, sectors)| {
            sectors.iter().enumerate().map(move |(sector, stamp)| ((disk, sector), *stamp))
        });
        self.check_moment(sectors, moments)
    }

    /// The same of some sectors, by disk and place.
    pub(crate) fn check_moment(
        &self,
        contents: impl Iterator<Item = ((usize, usize), u64)>,
        (from, to): (u64, u64),
    ) -> Result<(), String> {
        let mut moments = vec![(from, to)];
        let mut narrowed = String::from("given");
        for ((disk, index), stamp) in contents {
            // It may have grown without a word to the guest.
            let Some(writes) = self.sectors[disk].get(index) else {
                if stamp == 0 {
                    continue;
                }
                return Err(format!("disk {disk} sector {index}, which is new, has {stamp}"));
            };
            if let [only] = writes.as_slice()
                && only.stamp == stamp
            {
                continue;
            }
            let possible = moments_of(writes, stamp, to);
            let mut left: Vec<_> = moments
                .iter()
                .flat_map(|m| possible.iter().map(|p| (m.0.max(p.0), m.1.min(p.1))))
                .filter(|(low, high)| low <= high)
                .collect();
            if left.is_empty() {
                return Err(format!(
                    "disk {disk} sector {index} has {stamp}, which fits at {possible:?}; {}; all \
                     before at {moments:?}, because of: {narrowed}",
                    Self::tell(writes)
                ));
            }
            left.sort_unstable();
            left.dedup();
            if left != moments {
                let writes = Self::tell(writes);
                narrowed = format!("disk {disk} sector {index} has {stamp}; {writes}");
            }
            moments = left;
        }
        Ok(())
    }

    fn tell(writes: &[Write]) -> String {
        let tell = |w: &Write| {
            let end = if w.end == u64::MAX { "...".to_owned() } else { w.end.to_string() };
            format!(
                "{}@{}-{end}{}",
                w.stamp,
                w.start,
                if w.counts(u64::MAX - 1) { "" } else { "?" }
            )
        };
        let last = writes.iter().rev().take(8).rev().map(tell);
        format!("writes: {}", last.collect::<Vec<_>>().join(" "))
    }
}

/// When the image may have got a place for a sector whose data a loss of power has taken: nothing had
/// been written there before, or it had become zeroes, which have no place.
fn mapped_anew(writes: &[Write], now: u64) -> Option<u64> {
    let since = writes.get(1..)?;
    let safe = since.iter().rposition(|write| write.stamp != 0 && write.counts(now));
    let later = &since[safe.map_or(0, |index| index + 1)..];
    let had_no_place = safe.is_none() || later.iter().any(|write| write.stamp == 0);
    let lost = later.iter().find(|write| write.stamp != 0 && !write.counts(now))?;
    had_no_place.then_some(lost.start)
}

/// When a sector with these writes can have held `stamp` at a cut, which was made at `to` at the
/// latest.
fn moments_of(writes: &[Write], stamp: u64, to: u64) -> Vec<(u64, u64)> {
    let of_stamp = writes.iter().enumerate().filter(|(_, w)| w.leaves(stamp));
    let moments = of_stamp.map(|(index, w)| {
        // They are in the order in which they began.
        let later = writes[index..].iter().filter(|o| o.counts(to) && o.start > w.end);
        (w.start, later.map(|o| o.end).min().unwrap_or(u64::MAX))
    });
    moments.filter(|(low, high)| low <= high).collect()
}

/// What a sector with this stamp holds.
pub(crate) fn fill(disk: usize, first: u64, count: u64, stamp: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity((count * SECTOR) as usize);
    for sector in first..first + count {
        let place = place(disk, sector, stamp);
        for _ in 0..SECTOR / 16 {
            data.extend_from_slice(&stamp.to_le_bytes());
            data.extend_from_slice(&place.to_le_bytes());
        }
    }
    data
}

fn place(disk: usize, sector: u64, stamp: u64) -> u64 {
    if stamp == 0 {
        return 0;
    }
    (sector + 1 + ((disk as u64) << 40)).wrapping_mul(stamp | 1)
}

/// The stamp of a sector; none if it is a mixture, or belongs elsewhere.
pub(crate) fn stamp_of(disk: usize, sector: u64, data: &[u8]) -> Option<u64> {
    let (words, _) = data.as_chunks::<8>();
    let first = u64::from_le_bytes(words[0]);
    let second = u64::from_le_bytes(words[1]);
    let pair = [words[0], words[1]];
    let uniform = words.chunks(2).all(|chunk| chunk == pair);
    (uniform && second == place(disk, sector, first)).then_some(first)
}

/// The stamps of a whole disk, and [`MIXTURE`].
pub(crate) fn stamps(disk: usize, data: &[u8]) -> Vec<u64> {
    let sectors = (0..).zip(data.chunks(SECTOR as usize));
    sectors.map(|(sector, data)| stamp_of(disk, sector, data).unwrap_or(MIXTURE)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_sector() -> Model {
        Model::blank(1, SECTOR)
    }

    #[test]
    fn what_was_overwritten_before_a_read_is_not_read() {
        let mut model = one_sector();
        let write = model.begin(0, 0, 1, 7, 1);
        assert!(model.check_read(0, 0, 0, (2, 3)).is_ok());
        assert!(model.check_read(0, 0, 7, (2, 3)).is_ok());
        model.end(write, 4, true, false);
        assert!(model.check_read(0, 0, 0, (5, 6)).is_err());
        assert!(model.check_read(0, 0, 9, (5, 6)).is_err());
        let failed = model.begin(0, 0, 1, 8, 7);
        model.end(failed, 8, false, false);
        assert!(model.check_read(0, 0, 7, (9, 10)).is_ok());
        assert!(model.check_read(0, 0, 8, (9, 10)).is_ok());
    }

    #[test]
    fn a_cut_has_everything_up_to_one_moment() {
        let mut model = Model::blank(2, SECTOR);
        let first = model.begin(0, 0, 1, 7, 1);
        model.end(first, 2, true, false);
        let second = model.begin(1, 0, 1, 8, 3);
        model.end(second, 4, true, false);
        let cut = |a, b, from, to| model.check_cut(&[vec![a], vec![b]], (from, to));
        assert!(cut(0, 0, 0, 9).is_ok());
        assert!(cut(7, 0, 0, 9).is_ok());
        assert!(cut(7, 8, 0, 9).is_ok());
        assert!(cut(0, 8, 0, 9).is_err(), "the second without the first");
        assert!(cut(7, 0, 5, 9).is_err(), "too old");
        assert!(cut(7, 8, 0, 2).is_err(), "too new");
    }

    #[test]
    fn a_loss_of_power_takes_what_was_not_flushed_and_nothing_else() {
        let mut model = one_sector();
        for (stamp, start) in [(7, 1), (8, 3)] {
            let write = model.begin(0, 0, 1, stamp, start);
            model.end(write, start + 1, true, false);
            model.flushed(0, 3);
        }
        assert!(model.check_read(0, 0, 7, (5, 6)).is_err(), "power is there");
        model.power_lost(7, false);
        assert!(model.check_cut(&[vec![7]], (5, 6)).is_err(), "a cut from before");
        assert!(model.check_cut(&[vec![7]], (8, 8)).is_ok());
        assert!(model.check_cut(&[vec![8]], (8, 8)).is_ok());
        assert!(model.check_read(0, 0, 7, (8, 9)).is_ok());
        assert!(model.check_read(0, 0, 8, (8, 9)).is_ok());
        assert!(model.check_read(0, 0, 0, (8, 9)).is_err(), "it was flushed");
        let through = model.begin(0, 0, 1, 9, 10);
        model.end(through, 11, true, true);
        model.power_lost(12, false);
        assert!(model.check_read(0, 0, 8, (13, 14)).is_err());
    }

    #[test]
    fn what_an_image_has_mapped_and_not_flushed_may_be_anything() {
        let after = |flushed: bool, mapped| {
            let mut model = Model::new(&[vec![5]]);
            let write = model.begin(0, 0, 1, 7, 1);
            model.end(write, 2, true, false);
            if flushed {
                model.flushed(0, 3);
            }
            let write = model.begin(0, 0, 1, 8, 3);
            model.end(write, 4, true, false);
            model.power_lost(5, mapped);
            [MIXTURE, 5, 7, 8].map(|stamp| model.check_read(0, 0, stamp, (6, 7)).is_ok())
        };
        assert_eq!(after(false, false), [false, true, true, true]);
        assert_eq!(after(false, true), [true; 4]);
        assert_eq!(after(true, true), [false, false, true, true], "its data was there");
        let mut model = Model::new(&[vec![5]]);
        for (stamp, start) in [(7, 1), (0, 3), (8, 6)] {
            let write = model.begin(0, 0, 1, stamp, start);
            model.end(write, start + 1, true, false);
            model.flushed(0, 5);
        }
        model.power_lost(8, true);
        assert!(model.check_read(0, 0, MIXTURE, (9, 10)).is_ok(), "zeroes have no place");
    }

    #[test]
    fn a_torn_sector_has_no_stamp() {
        let mut data = fill(1, 3, 1, 99);
        assert_eq!(stamp_of(1, 3, &data), Some(99));
        assert_eq!(stamp_of(0, 3, &data), None);
        data[300] ^= 1;
        assert_eq!(stamp_of(1, 3, &data), None);
    }
}
