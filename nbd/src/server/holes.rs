//! When a read asks the device for holes.

use crate::proto::server::{Action, ReadChunk};

/// Shorter reads are answered with data at once: asking costs about as much as reading.
const READ_LEN_MIN: usize = 64 << 10;
/// After this many reads in a row without a hole, most are no longer asked for.
const BARREN_MAX: u32 = 8;
/// But one in this many still is.
const PROBE_INTERVAL: u32 = 16;

/// Leaving holes out of replies saves the most on a sparse disk, and asking for them costs the
/// most on a full one (some file systems look at every page). So it depends on what was found.
#[derive(Debug, Default)]
pub(super) struct HoleSearch {
    /// Reads since the last hole.
    barren: u32,
}

impl HoleSearch {
    pub(super) fn are_worth_asking_for(&mut self, action: &Action) -> bool {
        let Action::Read { len, dont_fragment, .. } = action else { return false };
        if *dont_fragment || *len < READ_LEN_MIN {
            return false;
        }
        let ask = self.barren < BARREN_MAX || self.barren.is_multiple_of(PROBE_INTERVAL);
        self.barren = self.barren.wrapping_add(1);
        ask
    }

    pub(super) fn found(&mut self, chunks: &[ReadChunk]) {
        if chunks.iter().any(|chunk| matches!(chunk, ReadChunk::Hole { .. })) {
            self.barren = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(len: usize, dont_fragment: bool) -> Action {
        Action::Read { offset: 0, len, dont_fragment }
    }

    #[test]
    fn a_full_disk_is_asked_rarely_and_a_sparse_one_always() {
        let mut search = HoleSearch::default();
        let asked = (0..1000).filter(|_| search.are_worth_asking_for(&read(1 << 20, false)));
        let asked = asked.count();
        assert!((50..80).contains(&asked), "{asked}");

        search.found(&[ReadChunk::Hole { offset: 0, len: 5 }]);
        for _ in 0..100 {
            assert!(search.are_worth_asking_for(&read(1 << 20, false)));
            search.found(&[ReadChunk::Hole { offset: 0, len: 5 }]);
        }
    }

    #[test]
    fn small_reads_and_those_in_one_piece_do_not_count() {
        let mut search = HoleSearch::default();
        for _ in 0..100 {
            assert!(!search.are_worth_asking_for(&read(4096, false)));
            assert!(!search.are_worth_asking_for(&read(1 << 20, true)));
        }
        assert!(search.are_worth_asking_for(&read(1 << 20, false)));
    }
}
