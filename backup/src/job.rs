use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, Error, FlushLevel, LockMode, Result};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::copy::copy_units;
use crate::filter::CopyBeforeWrite;
use crate::options::CbwOptions;
use crate::rate::RateLimit;

/// Most bytes that the background copies under one lock: a guest's write waits no longer.
const BACKGROUND_BYTES_MAX: u64 = 1 << 20;

/// What a job copies by itself (spec: backup, sync modes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SyncMode {
    /// Everything; the result is the source at the moment when the job started.
    #[default]
    Full,
    /// Nothing: only what is about to be overwritten. Ends by cancel only.
    None,
}

/// How a [`Job`] works.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// The name of the job.
    pub id: String,
    /// What it copies.
    pub sync: SyncMode,
    /// Bytes per second in the background; 0 is no limit. Copies for a guest's request are never
    /// held back, but count.
    pub speed: u64,
    /// The filter that the guest's requests go through.
    pub filter: CbwOptions,
}

impl JobOptions {
    /// A job without a speed limit; its filter has the same name.
    #[must_use]
    pub fn new(id: impl Into<String>, sync: SyncMode) -> Self {
        let id = id.into();
        JobOptions { filter: CbwOptions::new(id.clone()), id, sync, speed: 0 }
    }
}

/// Why a call on a job failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// Only a job that copies nothing by itself can begin anew.
    #[error("The backup job only supports block checkpoint in sync=none mode")]
    CheckpointUnsupported,
    /// The job has ended. Holds its name.
    #[error("The job {0} has ended")]
    Ended(String),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] Error),
}

/// How far a job is. The unit is arbitrary: only the ratio means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Copied so far, for the guest's requests too. Equal to `len` after a success.
    pub offset: u64,
    /// All that there is to copy.
    pub len: u64,
}

/// How a job ended.
#[derive(Debug, Clone)]
pub enum JobEnd {
    /// The target is the source as it was at the start, on stable storage.
    Completed,
    /// It was cancelled; what was copied stays in the target.
    Cancelled,
    /// The background copy failed.
    Failed(Error),
}

/// A backup job: a [`CopyBeforeWrite`] filter, and a background copy if the mode has one.
///
/// The guest has to go through [`filter`](Self::filter) as long as the job runs; when it has
/// ended the filter only passes through. Dropping the job cancels it.
pub struct Job {
    inner: Arc<Inner>,
}

struct Inner {
    id: String,
    sync: SyncMode,
    filter: Arc<CopyBeforeWrite>,
    control: watch::Sender<Control>,
    end: watch::Sender<Option<JobEnd>>,
}

#[derive(Debug, Clone, Copy)]
struct Control {
    paused: bool,
    cancelled: bool,
    speed: u64,
}

impl Job {
    /// Starts a job, whose background part is a task of the current tokio runtime.
    ///
    /// # Errors
    /// As [`CopyBeforeWrite::new`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: JobOptions,
    ) -> std::result::Result<Self, JobError> {
        let filter = CopyBeforeWrite::new(source, target, options.filter)?;
        let control = Control { paused: false, cancelled: false, speed: options.speed };
        let inner = Arc::new(Inner {
            id: options.id,
            sync: options.sync,
            filter,
            control: watch::Sender::new(control),
            end: watch::Sender::new(None),
        });
        let task = Arc::clone(&inner);
        tokio::spawn(async move { task.run().await });
        Ok(Job { inner })
    }

    /// The name of the job.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// What it copies by itself.
    #[must_use]
    pub fn sync(&self) -> SyncMode {
        self.inner.sync
    }

    /// The device that the guest has to use.
    #[must_use]
    pub fn filter(&self) -> &Arc<CopyBeforeWrite> {
        &self.inner.filter
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let len = self.inner.filter.size();
        if matches!(*self.inner.end.borrow(), Some(JobEnd::Completed)) {
            return Progress { offset: len, len };
        }
        Progress { offset: self.inner.copied_bytes().min(len), len }
    }

    /// Begins anew from the current content: every unit is to be copied again. The caller has
    /// drained the guest's requests, and empties the target.
    ///
    /// # Errors
    /// [`JobError::CheckpointUnsupported`] with any mode but [`SyncMode::None`];
    /// [`JobError::Ended`]; as [`CopyBeforeWrite::checkpoint`].
    pub fn checkpoint(&self) -> std::result::Result<(), JobError> {
        if self.inner.sync != SyncMode::None {
            return Err(JobError::CheckpointUnsupported);
        }
        if self.inner.end.borrow().is_some() {
            return Err(JobError::Ended(self.inner.id.clone()));
        }
        Ok(self.inner.filter.checkpoint()?)
    }

    /// Stops the background copy at the next point. The guest's requests go on copying.
    pub fn pause(&self) {
        self.inner.control.send_modify(|control| control.paused = true);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.inner.control.send_modify(|control| control.paused = false);
    }

    /// Changes the speed, in bytes per second; 0 is no limit. Takes effect at once.
    pub fn set_speed(&self, speed: u64) {
        self.inner.control.send_modify(|control| control.speed = speed);
    }

    /// Cancels the job, and waits until no copy is in flight. What was copied stays. A job that
    /// has ended keeps its end.
    pub async fn cancel(&self) -> JobEnd {
        self.inner.control.send_modify(|control| control.cancelled = true);
        self.wait().await
    }

    /// Waits until the job has ended, and no copy is in flight.
    pub async fn wait(&self) -> JobEnd {
        let mut end = self.inner.end.subscribe();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(end)) => end.clone(),
            // The sender lives in `inner`, which we hold.
            _ => JobEnd::Cancelled,
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.inner.control.send_modify(|control| control.cancelled = true);
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("id", &self.inner.id)
            .field("sync", &self.inner.sync)
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

/// Whether the background copy is to go on.
#[derive(PartialEq, Eq)]
enum Step {
    Go,
    Cancelled,
}

impl Inner {
    async fn run(&self) {
        let result = match self.sync {
            SyncMode::Full => self.copy_everything().await,
            SyncMode::None => {
                self.until_cancelled().await;
                Ok(Step::Cancelled)
            }
        };
        // From here on nothing begins to copy; what is copying ends.
        self.filter.set_enabled(false);
        self.filter.shared().drain_copies().await;
        let end = match result {
            Ok(Step::Go) => JobEnd::Completed,
            Ok(Step::Cancelled) => JobEnd::Cancelled,
            Err(error) => JobEnd::Failed(error),
        };
        self.end.send_replace(Some(end));
    }

    async fn copy_everything(&self) -> Result<Step> {
        let shared = self.filter.shared();
        let epoch = shared.epoch();
        let size = shared.source.size();
        let units_max = (BACKGROUND_BYTES_MAX / epoch.unit.bytes()).max(1);
        let (started, mut limit) = (Instant::now(), RateLimit::default());
        let end = size.div_ceil(epoch.unit.bytes());
        let mut at = 0;
        while at < end {
            let (copied, count) = epoch.status(at..end);
            if copied {
                at += count;
                continue;
            }
            if self.may_copy(started, &mut limit).await == Step::Cancelled {
                return Ok(Step::Cancelled);
            }
            let units = at..at + count.min(units_max);
            let _ticket = shared.enter();
            let bytes = epoch.unit.bytes_of(&units, size);
            let _guard = shared.locks.lock(bytes, LockMode::Exclusive).await;
            // The guest may have been here first.
            if !epoch.holds(&units) {
                copy_units(shared, &epoch, &units).await?;
            }
            at = units.end;
        }
        epoch.target.flush(FlushLevel::Durable).await?;
        Ok(Step::Go)
    }

    /// Waits until the background may copy: not paused, and within the speed.
    async fn may_copy(&self, started: Instant, limit: &mut RateLimit) -> Step {
        // A copy that finishes inline would keep other tasks from running.
        tokio::task::yield_now().await;
        let mut changes = self.control.subscribe();
        loop {
            let control = *changes.borrow_and_update();
            if control.cancelled {
                return Step::Cancelled;
            }
            let delay = limit.delay(started.elapsed(), self.copied_bytes(), control.speed);
            if !control.paused && delay == Duration::ZERO {
                return Step::Go;
            }
            let sleep = if control.paused { Duration::from_secs(3600) } else { delay };
            // Either way the question is asked again.
            let _ = tokio::time::timeout(sleep, changes.changed()).await;
        }
    }

    async fn until_cancelled(&self) {
        // The sender lives as long as we do.
        let _ = self.control.subscribe().wait_for(|control| control.cancelled).await;
    }

    fn copied_bytes(&self) -> u64 {
        self.filter.stats().copied_units.saturating_mul(self.filter.unit_bytes())
    }
}
