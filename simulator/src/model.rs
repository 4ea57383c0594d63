//! What guests may see: the writes of one line, by disk and sector.

use crate::file::SECTOR;

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
}

/// The writes of a line.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// By disk and sector; the first is what was there before.
    sectors: Vec<Vec<Vec<Write>>>,
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
        let first = |stamp: &u64| vec![Write { stamp: *stamp, start: 0, end: 0, acked: true }];
        let sectors = contents.iter().map(|disk| disk.iter().map(first).collect()).collect();
        Model { sectors }
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
            sector.push(Write { stamp, start, end: u64::MAX, acked: false });
        }
        Begun { disk, first, count, start }
    }

    pub(crate) fn end(&mut self, begun: Begun, end: u64, acked: bool) {
        let Begun { disk, first, count, start } = begun;
        for sector in &mut self.sectors[disk][first as usize..(first + count) as usize] {
            if let Some(write) = sector.iter_mut().rev().find(|write| write.start == start) {
                (write.end, write.acked) = (end, acked);
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
        let last = writes.iter().filter(|o| o.acked && o.end < start).map(|o| o.start).max();
        let last = last.unwrap_or(0);
        let allowed = writes.iter().any(|w| w.stamp == stamp && w.start < end && w.end >= last);
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
        (from, to): (u64, u64),
    ) -> Result<(), String> {
        let mut moments = vec![(from, to)];
        for (disk, sectors) in contents.iter().enumerate() {
            for (index, stamp) in sectors.iter().enumerate() {
                let writes = &self.sectors[disk][index];
                if let [only] = writes.as_slice()
                    && only.stamp == *stamp
                {
                    continue;
                }
                let possible = moments_of(writes, *stamp);
                let left: Vec<_> = moments
                    .iter()
                    .flat_map(|m| possible.iter().map(|p| (m.0.max(p.0), m.1.min(p.1))))
                    .filter(|(low, high)| low <= high)
                    .collect();
                if left.is_empty() {
                    return Err(format!(
                        "disk {disk} sector {index} has {stamp}, which fits at {possible:?}; all \
                         before at {moments:?}; {}",
                        Self::tell(writes)
                    ));
                }
                moments = left;
                moments.sort_unstable();
                moments.dedup();
            }
        }
        Ok(())
    }

    fn tell(writes: &[Write]) -> String {
        let tell = |w: &Write| {
            let end = if w.end == u64::MAX { "...".to_owned() } else { w.end.to_string() };
            format!("{}@{}-{end}{}", w.stamp, w.start, if w.acked { "" } else { "?" })
        };
        let last = writes.iter().rev().take(8).rev().map(tell);
        format!("writes: {}", last.collect::<Vec<_>>().join(" "))
    }
}

/// When a sector with these writes can have held `stamp` at a cut.
fn moments_of(writes: &[Write], stamp: u64) -> Vec<(u64, u64)> {
    let of_stamp = writes.iter().enumerate().filter(|(_, w)| w.stamp == stamp);
    let moments = of_stamp.map(|(index, w)| {
        // They are in the order in which they began.
        let later = writes[index..].iter().filter(|o| o.acked && o.start > w.end);
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

/// The stamps of a whole disk.
pub(crate) fn stamps(disk: usize, data: &[u8]) -> Result<Vec<u64>, String> {
    data.chunks(SECTOR as usize)
        .enumerate()
        .map(|(sector, data)| {
            stamp_of(disk, sector as u64, data)
                .ok_or_else(|| format!("disk {disk} sector {sector} is a mixture"))
        })
        .collect()
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
        model.end(write, 4, true);
        assert!(model.check_read(0, 0, 0, (5, 6)).is_err());
        assert!(model.check_read(0, 0, 9, (5, 6)).is_err());
        let failed = model.begin(0, 0, 1, 8, 7);
        model.end(failed, 8, false);
        assert!(model.check_read(0, 0, 7, (9, 10)).is_ok());
        assert!(model.check_read(0, 0, 8, (9, 10)).is_ok());
    }

    #[test]
    fn a_cut_has_everything_up_to_one_moment() {
        let mut model = Model::blank(2, SECTOR);
        let first = model.begin(0, 0, 1, 7, 1);
        model.end(first, 2, true);
        let second = model.begin(1, 0, 1, 8, 3);
        model.end(second, 4, true);
        let cut = |a, b, from, to| model.check_cut(&[vec![a], vec![b]], (from, to));
        assert!(cut(0, 0, 0, 9).is_ok());
        assert!(cut(7, 0, 0, 9).is_ok());
        assert!(cut(7, 8, 0, 9).is_ok());
        assert!(cut(0, 8, 0, 9).is_err(), "the second without the first");
        assert!(cut(7, 0, 5, 9).is_err(), "too old");
        assert!(cut(7, 8, 0, 2).is_err(), "too new");
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
