use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use brep_block::{Operation, Result};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::options::{ErrorAction, SyncMode};
use super::run::Step;
use super::status::JobStatus;
use super::{Job, State};
use crate::copy::{CopyFailure, copy_units};
use crate::epoch::Epoch;
use crate::filter::Shared;
use crate::rate::RateLimit;

/// Most bytes that are copied under one lock, unless the options say otherwise: a guest's write
/// waits no longer.
const CHUNK_BYTES: u64 = 1 << 20;
/// Most bytes whose allocation is asked for by one call.
const STATUS_BYTES_MAX: u64 = 1 << 30;
/// Time between two attempts at what fails and is to be ignored.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// Until a change of the state wakes the sleeper.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// The background copy of a job.
pub(super) struct Background {
    job: Arc<Job>,
    epoch: Arc<Epoch>,
    started: Instant,
    limit: RateLimit,
    workers: JoinSet<std::result::Result<(), CopyFailure>>,
    /// Handed to workers and not counted as copied yet.
    dispatched_bytes: Arc<AtomicU64>,
}

/// What a pass has met and not done with yet.
type Failed = Option<(CopyFailure, ErrorAction)>;

/// How a pass over all units ended.
enum Pass {
    Complete,
    Cancelled,
    /// What failed is still to be copied.
    Failed(CopyFailure, ErrorAction),
}

impl Background {
    pub(super) fn new(job: &Arc<Job>) -> Self {
        Background {
            job: Arc::clone(job),
            epoch: job.filter.shared().epoch(),
            started: Instant::now(),
            limit: RateLimit::default(),
            workers: JoinSet::new(),
            dispatched_bytes: Arc::default(),
        }
    }

    pub(super) async fn run(mut self) -> Result<Step> {
        let sync = self.job.options.sync;
        match sync {
            SyncMode::None => return Ok(self.until_cancelled().await),
            SyncMode::Top if self.leave_out_lower_layers().await? == Step::Cancelled => {
                return Ok(Step::Cancelled);
            }
            _ => {}
        }
        let mut units_max = u64::MAX;
        loop {
            match self.pass(units_max).await? {
                Pass::Complete => return Ok(Step::Go),
                Pass::Cancelled => return Ok(Step::Cancelled),
                Pass::Failed(failure, ErrorAction::Report) => return Err(failure.error),
                // The next pass begins by waiting for the resume.
                Pass::Failed(_, ErrorAction::Stop) => {}
                Pass::Failed(_, ErrorAction::Ignore) => self.sleep(RETRY_DELAY).await,
            }
            // What does not fail by itself is to get through.
            units_max = 1;
        }
    }

    /// Copies what is still to copy, in ascending order.
    async fn pass(&mut self, units_max: u64) -> Result<Pass> {
        let mut failed = None;
        let mut at = 0;
        while let Some(next) = self.next_to_copy(at) {
            let step = self.wait_for_turn(&mut failed).await?;
            if step == Step::Cancelled || ends_pass(failed.as_ref()) {
                break;
            }
            let units = next.start..next.end.min(next.start + self.chunk_units(units_max));
            at = units.end;
            self.dispatch(units);
            if self.workers.len() >= self.job.options.workers as usize {
                self.join_one(&mut failed).await;
            }
        }
        while self.join_one(&mut failed).await {}
        Ok(match failed {
            _ if self.job.is_cancelled() => Pass::Cancelled,
            Some((failure, action)) => Pass::Failed(failure, action),
            None if self.stand_still(&mut None).await == Step::Cancelled => Pass::Cancelled,
            None => Pass::Complete,
        })
    }

    /// The first run of units that are not copied, from a unit on.
    fn next_to_copy(&self, mut at: u64) -> Option<Range<u64>> {
        let shared = self.job.filter.shared();
        let end = shared.source.size().div_ceil(self.epoch.unit.bytes());
        while at < end {
            let (copied, count) = self.epoch.status(at..end);
            if !copied {
                return Some(at..at + count);
            }
            at += count;
        }
        None
    }

    fn chunk_units(&self, units_max: u64) -> u64 {
        let unit_bytes = self.epoch.unit.bytes();
        let chunk = match self.job.options.chunk_bytes_max {
            0 => CHUNK_BYTES,
            bytes => bytes,
        };
        let speed = self.job.state.borrow().speed;
        let quota = if speed == 0 { u64::MAX } else { RateLimit::quota_bytes(speed) };
        (chunk.min(quota) / unit_bytes).clamp(1, units_max)
    }

    fn dispatch(&mut self, units: Range<u64>) {
        let shared = Arc::clone(self.job.filter.shared());
        let epoch = Arc::clone(&self.epoch);
        let bytes = (units.end - units.start) * self.epoch.unit.bytes();
        let counted = Dispatched::new(&self.dispatched_bytes, bytes);
        let ticket = shared.enter();
        self.workers.spawn(async move {
            let _counted = (counted, ticket);
            copy_in_background(&shared, &epoch, &units).await
        });
    }

    /// Waits for a worker, if there is one.
    async fn join_one(&mut self, failed: &mut Failed) -> bool {
        let Some(joined) = self.workers.join_next().await else { return false };
        self.note(joined, failed);
        true
    }

    fn note(
        &self,
        joined: std::result::Result<std::result::Result<(), CopyFailure>, tokio::task::JoinError>,
        failed: &mut Failed,
    ) {
        match joined {
            Ok(Ok(())) => {}
            // One failure is told of in a pass that ends with it.
            Ok(Err(_)) if ends_pass(failed.as_ref()) => {}
            Ok(Err(failure)) => {
                let action = self.job.decide(&failure);
                *failed = Some((failure, action));
            }
            Err(error) => {
                if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
                // Else the runtime is shutting down.
            }
        }
    }

    /// Waits until the next copy may begin: not paused, and within the speed.
    async fn wait_for_turn(&mut self, failed: &mut Failed) -> Result<Step> {
        // Copies that end inline would keep other tasks from running.
        tokio::task::yield_now().await;
        loop {
            while let Some(joined) = self.workers.try_join_next() {
                self.note(joined, failed);
            }
            if let Some(error) = self.job.given_up() {
                return Err(error);
            }
            let mut changes = self.job.state.subscribe();
            if self.stand_still(failed).await == Step::Cancelled {
                return Ok(Step::Cancelled);
            }
            if ends_pass(failed.as_ref()) {
                return Ok(Step::Go);
            }
            let speed = self.job.state.borrow().speed;
            let total = self.job.copied_bytes() + self.dispatched_bytes.load(Ordering::Relaxed);
            let delay = self.limit.delay(self.started.elapsed(), total, speed);
            if delay == Duration::ZERO {
                return Ok(Step::Go);
            }
            self.wait_for_change(&mut changes, delay).await;
        }
    }

    /// Waits while the job is paused.
    async fn stand_still(&mut self, failed: &mut Failed) -> Step {
        let mut changes = self.job.state.subscribe();
        loop {
            let (cancelled, paused) = {
                let state = changes.borrow_and_update();
                (state.cancelled, state.paused)
            };
            if cancelled {
                return Step::Cancelled;
            }
            if !paused {
                self.job.enter_status(JobStatus::Running);
                return Step::Go;
            }
            // Paused is only who stands still.
            while self.join_one(failed).await {}
            if ends_pass(failed.as_ref()) {
                return Step::Go;
            }
            self.job.enter_status(JobStatus::Paused);
            self.wait_for_change(&mut changes, FOR_EVER).await;
        }
    }

    async fn wait_for_change(&self, changes: &mut watch::Receiver<State>, limit: Duration) {
        self.job.set_busy(false);
        // Either way the question is asked again.
        let _ = tokio::time::timeout(limit, changes.changed()).await;
        self.job.set_busy(true);
    }

    async fn sleep(&self, delay: Duration) {
        let mut changes = self.job.state.subscribe();
        self.wait_for_change(&mut changes, delay).await;
    }

    /// A job that copies nothing by itself.
    async fn until_cancelled(&mut self) -> Step {
        let mut changes = self.job.state.subscribe();
        while self.stand_still(&mut None).await == Step::Go {
            self.wait_for_change(&mut changes, FOR_EVER).await;
        }
        Step::Cancelled
    }

    /// Leaves out every unit of which nothing is allocated in the source's own layer.
    async fn leave_out_lower_layers(&mut self) -> Result<Step> {
        let shared = Arc::clone(self.job.filter.shared());
        let (unit, size) = (self.epoch.unit.bytes(), shared.source.size());
        let (mut at, mut run_start) = (0, 0);
        while at < size {
            tokio::task::yield_now().await;
            if self.stand_still(&mut None).await == Step::Cancelled {
                return Ok(Step::Cancelled);
            }
            let asked = (size - at).min(STATUS_BYTES_MAX);
            let (allocated, len) = match shared.source.block_status(at, asked).await {
                Ok(status) => (status.flags.allocated, status.len.clamp(1, asked)),
                Err(error) => {
                    let failure = CopyFailure { operation: Operation::Read, error };
                    match self.job.decide(&failure) {
                        ErrorAction::Report => return Err(failure.error),
                        ErrorAction::Stop => continue,
                        // Copied to be on the safe side.
                        ErrorAction::Ignore => (true, (unit - at % unit).min(asked)),
                    }
                }
            };
            at += len;
            if allocated {
                run_start = at;
                continue;
            }
            let end = if at == size { size.div_ceil(unit) } else { at / unit };
            let units = run_start.div_ceil(unit)..end;
            if !units.is_empty() {
                // What a guest has changed meanwhile is copied already, and stays in.
                self.job.exclude_bytes(self.epoch.exclude(units) * unit);
                run_start = at - at % unit;
            }
        }
        Ok(Step::Go)
    }
}

async fn copy_in_background(
    shared: &Shared,
    epoch: &Epoch,
    units: &Range<u64>,
) -> std::result::Result<(), CopyFailure> {
    let _guard = shared.lock_units(epoch, units).await;
    // The guest may have been here first.
    if epoch.holds(units) {
        return Ok(());
    }
    copy_units(shared, epoch, units).await
}

/// Whether no more copies are to begin in this pass.
fn ends_pass(failed: Option<&(CopyFailure, ErrorAction)>) -> bool {
    failed.is_some_and(|(_, action)| *action != ErrorAction::Ignore)
}

/// Bytes that a worker has been given.
struct Dispatched(Arc<AtomicU64>, u64);

impl Dispatched {
    fn new(total: &Arc<AtomicU64>, bytes: u64) -> Self {
        total.fetch_add(bytes, Ordering::Relaxed);
        Dispatched(Arc::clone(total), bytes)
    }
}

impl Drop for Dispatched {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
