use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::status::Progress;

/// The rate is that of so long.
const WINDOW: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(500);

/// How far a copy has come, and how fast it goes.
#[derive(Debug)]
pub(super) struct CopyProgress {
    /// Bytes to be copied, one entry a disk.
    totals: Vec<u64>,
    /// Bytes in all that had been done, and when; at most the last [`WINDOW`].
    marks: VecDeque<(Instant, u64)>,
}

impl CopyProgress {
    /// A copy begins that has so much to do on each disk.
    pub(super) fn begin(totals: Vec<u64>, now: Instant) -> Self {
        CopyProgress { totals, marks: VecDeque::from([(now, 0)]) }
    }

    /// How far a disk is that still lacks so many bytes.
    pub(super) fn of_disk(&self, disk: usize, behind: u64) -> Progress {
        let total = self.totals.get(disk).copied().unwrap_or_default().max(behind);
        Progress { done: total - behind, total }
    }

    /// All disks together.
    pub(super) fn of_all(&self, behind: &[u64]) -> Progress {
        let each = behind.iter().enumerate().map(|(disk, behind)| self.of_disk(disk, *behind));
        each.fold(Progress { done: 0, total: 0 }, |sum, disk| Progress {
            done: sum.done + disk.done,
            total: sum.total + disk.total,
        })
    }

    /// Something has been done.
    pub(super) fn note(&mut self, now: Instant, behind: &[u64]) {
        if self.marks.back().is_some_and(|(last, _)| now < *last + STEP) {
            return;
        }
        self.marks.push_back((now, self.of_all(behind).done));
        while self.marks.len() > 2 && self.marks[1].0 + WINDOW < now {
            self.marks.pop_front();
        }
    }

    /// Bytes a second of late.
    pub(super) fn rate(&self, now: Instant, done: u64) -> u64 {
        let Some((since, before)) = self.marks.front() else { return 0 };
        let elapsed = now.saturating_duration_since(*since).as_secs_f64();
        if elapsed < 0.001 {
            return 0;
        }
        // A rate of bytes that exist fits.
        (done.saturating_sub(*before) as f64 / elapsed) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds_and_the_total_what_there_was_to_do() {
        let start = Instant::now();
        let mut progress = CopyProgress::begin(vec![1000, 500], start);
        for second in 1..=30 {
            let behind = [1000 - second * 20, 500];
            progress.note(start + Duration::from_secs(second), &behind);
            progress.note(start + Duration::from_secs(second), &[0, 0]);
        }
        let now = start + Duration::from_secs(30);
        let all = progress.of_all(&[400, 500]);
        assert_eq!(all, Progress { done: 600, total: 1500 });
        assert_eq!(progress.rate(now, all.done), 20);
        assert_eq!(progress.of_disk(0, 2000), Progress { done: 0, total: 2000 }, "more has come");
    }
}
