//! Where the file is known to hold data.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Beyond this many runs all are forgotten: each of them is short then, and soon found again.
const RUNS_MAX: usize = 1024;

/// Runs of data that the file system has told of.
///
/// Where a run ends is expensive to ask: a file system in memory looks at every page of it. Data
/// becomes a hole only by what this device does, since nobody else writes to the file. Were a
/// hole taken for data, it would still be read as the zeroes that it is.
#[derive(Debug, Default)]
pub(super) struct DataRuns {
    runs: Mutex<Runs>,
}

#[derive(Debug, Default)]
struct Runs {
    /// The start of each run, by its end.
    starts: BTreeMap<u64, u64>,
    forgotten: Forgotten,
}

/// How often something was forgotten: what was found out before that may be outdated.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Forgotten(u64);

impl DataRuns {
    /// The end of the known run of data that holds this byte.
    pub(super) fn end(&self, offset: u64) -> Option<u64> {
        let runs = self.lock();
        let (&end, &start) = runs.starts.range(offset + 1..).next()?;
        (start <= offset).then_some(end)
    }

    /// To be taken before the file system is asked.
    pub(super) fn forgotten(&self) -> Forgotten {
        self.lock().forgotten
    }

    /// Notes what the file system has told, unless something has been forgotten since.
    pub(super) fn insert(&self, start: u64, end: u64, since: Forgotten) {
        let mut runs = self.lock();
        if runs.forgotten != since {
            return;
        }
        if runs.starts.len() >= RUNS_MAX {
            runs.starts.clear();
        }
        // A run that was told earlier from another place on ends where this one ends.
        runs.starts.entry(end).and_modify(|known| *known = start.min(*known)).or_insert(start);
    }

    /// A hole may have been made between these bytes.
    pub(super) fn forget(&self, start: u64, end: u64) {
        let mut runs = self.lock();
        runs.forgotten.0 += 1;
        while let Some((&run_end, _)) =
            runs.starts.range(start + 1..).next().filter(|(_, run_start)| **run_start < end)
        {
            runs.starts.remove(&run_end);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Runs> {
        // The map is consistent whenever the lock is released, by a panic too.
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(runs: &[(u64, u64)]) -> DataRuns {
        let known = DataRuns::default();
        for &(start, end) in runs {
            known.insert(start, end, known.forgotten());
        }
        known
    }

    #[test]
    fn a_byte_of_a_run_knows_its_end_and_one_beside_it_does_not() {
        let runs = known(&[(10, 20), (30, 40)]);
        let ends: Vec<_> = [9, 10, 19, 20, 30, 39, 40].map(|at| runs.end(at)).into();
        assert_eq!(ends, [None, Some(20), Some(20), None, Some(40), Some(40), None]);
    }

    #[test]
    fn a_run_grows_towards_its_start() {
        let runs = known(&[(15, 20), (10, 20), (18, 20)]);
        assert_eq!((runs.end(9), runs.end(10)), (None, Some(20)));
    }

    #[test]
    fn a_hole_drops_the_runs_that_it_touches() {
        let runs = known(&[(10, 20), (30, 40), (50, 60)]);
        runs.forget(19, 31);
        assert_eq!((runs.end(15), runs.end(35), runs.end(55)), (None, None, Some(60)));
        runs.forget(60, 70);
        assert_eq!(runs.end(55), Some(60));
    }

    #[test]
    fn an_answer_that_a_hole_has_overtaken_is_not_kept() {
        let runs = DataRuns::default();
        let before = runs.forgotten();
        runs.forget(0, 5);
        runs.insert(0, 10, before);
        assert_eq!(runs.end(0), None);
    }

    #[test]
    fn the_number_of_runs_is_bounded() {
        let runs = known(&[]);
        for at in 0..3 * RUNS_MAX as u64 {
            runs.insert(at * 2, at * 2 + 1, runs.forgotten());
        }
        assert!(runs.lock().starts.len() <= RUNS_MAX);
    }
}
