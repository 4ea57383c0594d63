//! The copy as the group sees it: how fast it may go, and how far it has come.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use tokio::time::{Instant, sleep_until};

use super::{Core, Group};
use crate::config::ResyncLimits;
use crate::primary::pace::{Pace, Turn};
use crate::status::{Progress, ResyncStatus};

impl Group {
    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many bytes of a copy may go.
    pub(crate) async fn turn(&self, bytes: u64) {
        loop {
            let changed = self.pace_changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            let turn = self.pace().turn(Instant::now(), bytes);
            match turn {
                Turn::Now => return,
                Turn::At(time) => tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(time) => {}
                },
            }
        }
    }

    pub(crate) fn resync_limits(&self) -> ResyncLimits {
        self.pace().limits()
    }

    /// Other limits for the copy, also for one that runs.
    pub(crate) fn set_resync_limits(&self, limits: ResyncLimits) {
        self.pace().set_limits(limits);
        self.measure_guest();
        self.pace_changed.notify_waiters();
    }

    /// The guest's writes are timed while a copy wants to know how long they take.
    fn measure_guest(&self) {
        let wanted = self.pace().is_adaptive() && self.core().is_copying();
        self.measuring.store(wanted, Ordering::Relaxed);
    }

    /// The time at which a write of the guest begins, if a copy wants to know.
    pub(crate) fn time_write(&self) -> Option<Instant> {
        self.measuring.load(Ordering::Relaxed).then(Instant::now)
    }

    /// A write of the guest that was timed has ended.
    pub(crate) fn note_write(&self, begun: Option<Instant>) {
        if let Some(begun) = begun {
            let now = Instant::now();
            self.pace().sample(now, now.saturating_duration_since(begun));
        }
    }

    /// The copy has ended, but for its checkpoint.
    pub(crate) fn end_copy(&self) {
        {
            let mut core = self.core();
            (core.copying, core.comparing, core.settling) = (false, false, true);
        }
        self.measure_guest();
    }

    /// So many bytes were compared, and at most so many of them differed.
    pub(crate) fn note_compared(&self, compared: u64, differing: u64) {
        self.counters.compared_bytes.fetch_add(compared, Ordering::Relaxed);
        self.counters.differing_bytes.fetch_add(differing, Ordering::Relaxed);
    }

    /// A part of the copy has been done.
    pub(crate) fn note_progress(&self) {
        let mut core = self.core();
        let behind = core.all_bytes_behind();
        if let Some(progress) = &mut core.progress {
            progress.note(Instant::now(), &behind);
        }
    }

    /// How far the copy is, while one runs.
    pub(crate) fn resync_status(&self) -> Option<ResyncStatus> {
        let limits = self.pace().limits();
        let paced = self.pace().rate();
        let core = self.core();
        let progress = core.progress.as_ref().filter(|_| core.is_copying())?;
        let all = progress.of_all(&core.all_bytes_behind());
        let rate = progress.rate(Instant::now(), all.done);
        Some(ResyncStatus {
            done: all.done,
            total: all.total,
            rate,
            // What went before a limit was given says nothing of what comes.
            left_s: (all.total - all.done).checked_div(paced.map_or(rate, |most| rate.min(most))),
            rate_limit: limits.rate,
            latency_factor: limits.latency_factor,
            paced_rate: paced,
        })
    }
}

impl Core {
    /// How far a disk is that lacks so many bytes, while a copy runs.
    pub(crate) fn copy_progress(&self, disk: usize, behind: u64) -> Option<Progress> {
        let progress = self.progress.as_ref().filter(|_| self.is_copying())?;
        Some(progress.of_disk(disk, behind))
    }
}
