//! What is in flight: a word in the file for every request that has begun and not ended.

use crate::Error;

/// Words for what is in flight, of a set of maps: a multiple of what fits into a page.
pub(super) const IN_FLIGHT_WORDS: u64 = 8192;

/// The word in which everything is noted that finds no word of its own.
const SHARED: u32 = 0;
/// The number of groups takes the lower bits of a word, the first group the rest.
const COUNT_BITS: u32 = 23;
/// This many groups, or more: to the end of the map.
const COUNT_MAX: u64 = (1 << COUNT_BITS) - 1;

/// A request that has begun, and stays in flight until it has ended in as many places as was said
/// when it began.
#[derive(Debug, Clone, Copy)]
#[must_use = "what is in flight stays so until it is ended"]
pub struct InFlight(u32);

/// Which words are taken.
#[derive(Debug, Default)]
pub(super) struct InFlightWords {
    /// For each word that was taken at any time, but the shared one: how often its request has yet to
    /// end.
    left: Vec<u8>,
    /// Words among these that are free.
    free: Vec<u32>,
    /// How often those in the shared word have yet to end.
    shared: u64,
}

impl InFlightWords {
    /// The word, and what it is to hold, of a request for groups `first` to `last`.
    pub(super) fn begin(
        &mut self,
        (first, last): (u64, u64),
        ends: u8,
        words: u64,
    ) -> (InFlight, u64) {
        let own = self.free.pop().or_else(|| {
            let next = SHARED + 1 + self.left.len() as u32;
            (u64::from(next) < words).then(|| {
                self.left.push(0);
                next
            })
        });
        match own {
            Some(word) => {
                self.left[place(word)] = ends;
                let count = (last - first + 1).min(COUNT_MAX);
                (InFlight(word), first << COUNT_BITS | count)
            }
            None => {
                self.shared += u64::from(ends);
                (InFlight(SHARED), COUNT_MAX)
            }
        }
    }

    /// The word to be cleared, if it has now ended everywhere.
    pub(super) fn end(&mut self, InFlight(word): InFlight) -> Option<u32> {
        if word == SHARED {
            assert!(self.shared > 0, "a request has ended more often than it began");
            self.shared -= 1;
            return (self.shared == 0).then_some(SHARED);
        }
        let left = &mut self.left[place(word)];
        assert!(*left > 0, "a request has ended more often than it began");
        *left -= 1;
        (*left == 0).then(|| {
            self.free.push(word);
            word
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.left.len() && self.shared == 0
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.free.capacity() * size_of::<u32>() + self.left.capacity()
    }
}

fn place(word: u32) -> usize {
    (word - SHARED - 1) as usize
}

/// A word of the file that is taken, as its first and its last group.
fn decode(word: u64, bits: u64) -> Result<(u64, u64), &'static str> {
    let (first, count) = (word >> COUNT_BITS, word & COUNT_MAX);
    let last = match count {
        0 => return Err("a request in flight has no length"),
        COUNT_MAX => bits.saturating_sub(1),
        count => first + count - 1,
    };
    if first > last || last >= bits {
        return Err("a request in flight lies beyond the end");
    }
    Ok((first, last))
}

impl super::file::MapFile {
    pub(super) fn begin_in_flight(&mut self, start: u64, count: u64, ends: u8) -> Option<InFlight> {
        let groups = self.maps[0].groups(start, count).filter(|_| ends > 0)?;
        let (request, value) = self.in_flight.begin(groups, ends, self.layout.in_flight);
        self.words.store(self.layout.in_flight_words().start + u64::from(request.0), value);
        Some(request)
    }

    pub(super) fn end_in_flight(&mut self, request: InFlight) {
        if let Some(word) = self.in_flight.end(request) {
            self.words.store(self.layout.in_flight_words().start + u64::from(word), 0);
        }
    }

    /// Sets in map `to` what is set in one of `from` and was in flight, as the file says; then
    /// nothing is in flight any more.
    pub(super) fn interrupted_to(&mut self, to: usize, from: &[usize]) -> crate::Result<()> {
        let bits = self.maps[to].bits();
        // All of them before the first change: a file that is refused is left as it is.
        let groups: Result<Vec<_>, _> =
            self.taken_words().map(|index| decode(self.words.load(index), bits)).collect();
        let groups = groups
            .map_err(|reason| Error::Corrupt { path: self.path.clone(), reason: reason.into() })?;
        let log2 = self.header.granularity_log2;
        for (first, last) in groups {
            let range = first << log2..((last + 1) << log2).min(self.header.size);
            for from in from {
                let areas: Vec<_> = self.maps[*from].dirty_areas(range.clone()).collect();
                for area in areas {
                    self.set(to, area.start, area.end - area.start);
                }
            }
        }
        self.forget_in_flight();
        Ok(())
    }

    /// Notes in this file what is in flight in another one of the same granularity, or of another
    /// one if nothing is.
    pub(super) fn copy_in_flight(&mut self, other: &Self) -> crate::Result<()> {
        let same = self.header.granularity_log2 == other.header.granularity_log2
            && self.layout.in_flight == other.layout.in_flight;
        if !same && !other.in_flight.is_empty() {
            let reason = "requests are in flight";
            return Err(Error::State { path: self.path.clone(), reason });
        }
        for index in other.taken_words() {
            let place = index - other.layout.in_flight_words().start;
            self.words.store(self.layout.in_flight_words().start + place, other.words.load(index));
        }
        Ok(())
    }

    /// Nothing is in flight, whatever the file says.
    pub(super) fn forget_in_flight(&mut self) {
        self.taken_words().for_each(|index| self.words.store(index, 0));
        self.in_flight = InFlightWords::default();
    }

    fn taken_words(&self) -> impl Iterator<Item = u64> + '_ {
        self.layout.in_flight_words().filter(|index| self.words.load(*index) != 0)
    }
}
