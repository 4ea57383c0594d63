mod background;
mod options;
mod registry;
mod run;
mod status;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use brep_block::{BlockDevice, Error, ErrorKind, LockMode, Operation, Result as DeviceResult};
use tokio::sync::watch;

pub use options::{BitmapMode, ErrorAction, JobOptions, OnError, SyncMode};
pub use registry::Jobs;
pub use status::{EventSink, IoStatus, JobEnd, JobError, JobEvent, JobInfo, JobStatus, Progress};

use crate::copy::CopyFailure;
use crate::filter::CopyBeforeWrite;
use crate::live::LiveDisk;
use crate::view::SnapshotAccess;
use registry::Registry;
use status::Verb;

/// A backup job: a [`CopyBeforeWrite`] filter under a [`LiveDisk`], and a background copy if the
/// mode has one. Made by [`Jobs::start`].
///
/// The handle is not the job: that one goes on until it has ended, whoever holds this.
pub struct Job {
    options: JobOptions,
    bitmap: Option<(String, BitmapMode)>,
    disk: Arc<LiveDisk>,
    filter: Arc<CopyBeforeWrite>,
    /// Bytes that there are to copy, in whole units.
    len_bytes: AtomicU64,
    state: watch::Sender<State>,
    registry: Arc<Registry>,
}

#[derive(Debug)]
struct State {
    status: JobStatus,
    busy: bool,
    paused: bool,
    cancelled: bool,
    finalized: bool,
    speed: u64,
    io_status: IoStatus,
    end: Option<JobEnd>,
}

impl Job {
    /// The name of the job.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// What it copies by itself.
    #[must_use]
    pub fn sync(&self) -> SyncMode {
        self.options.sync
    }

    /// The filter that the guest's changes go through while the job runs. Afterwards it does
    /// nothing, and the target is let go of.
    #[must_use]
    pub fn filter(&self) -> &Arc<CopyBeforeWrite> {
        &self.filter
    }

    /// The disk as it was when the job started, for as long as it runs; after that, and for what
    /// the mode or the bitmap leaves out, it answers `EACCES`.
    #[must_use]
    pub fn snapshot(&self, name: impl Into<String>) -> Arc<SnapshotAccess> {
        SnapshotAccess::new(name, &self.filter)
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress_at(self.state.borrow().end.as_ref())
    }

    fn progress_at(&self, end: Option<&JobEnd>) -> Progress {
        let len = self.len_bytes.load(Ordering::Relaxed).min(self.filter.size());
        match end {
            Some(JobEnd::Completed) => Progress { offset: len, len },
            _ => Progress { offset: self.copied_bytes().min(len), len },
        }
    }

    /// What there is to tell of it.
    #[must_use]
    pub fn info(&self) -> JobInfo {
        let state = self.state.borrow();
        self.info_at(&state, state.end.as_ref())
    }

    fn info_at(&self, state: &State, end: Option<&JobEnd>) -> JobInfo {
        JobInfo {
            id: self.options.id.clone(),
            progress: self.progress_at(end),
            busy: state.busy,
            paused: state.paused,
            speed: state.speed,
            io_status: state.io_status,
            status: state.status,
            auto_finalize: self.options.auto_finalize,
            auto_dismiss: self.options.auto_dismiss,
            error: match end {
                Some(JobEnd::Failed(error)) => Some(error.clone()),
                _ => None,
            },
        }
    }

    /// Stops the background copy at the next point. The guest's requests go on copying.
    ///
    /// # Errors
    /// If it is paused already, or is not at work.
    pub fn pause(&self) -> Result<(), JobError> {
        self.command(Verb::Pause, |job, state| {
            if std::mem::replace(&mut state.paused, true) {
                return Err(JobError::AlreadyPaused(job.options.id.clone()));
            }
            Ok(())
        })
    }

    /// Lets it go on, also if an error has stopped it: what failed is tried again.
    ///
    /// # Errors
    /// If it is not paused, or is not at work.
    pub fn resume(&self) -> Result<(), JobError> {
        self.command(Verb::Resume, |job, state| {
            if !std::mem::replace(&mut state.paused, false) {
                return Err(JobError::NotPaused(job.options.id.clone()));
            }
            state.io_status = IoStatus::Ok;
            Ok(())
        })
    }

    /// Changes the speed, in bytes per second; 0 is no limit. Takes effect at once.
    ///
    /// # Errors
    /// If it is not at work.
    pub fn set_speed(&self, speed: u64) -> Result<(), JobError> {
        self.command(Verb::SetSpeed, |_, state| {
            state.speed = speed;
            Ok(())
        })
    }

    /// Cancels the job: it begins no more copies, and ends when those in flight have ended. What
    /// was copied stays. [`wait`](Self::wait) tells when.
    ///
    /// # Errors
    /// If it has ended; if it is paused, unless `force`.
    pub fn cancel(&self, force: bool) -> Result<(), JobError> {
        self.command(Verb::Cancel, |job, state| {
            if state.paused && !force {
                return Err(JobError::Paused(job.options.id.clone()));
            }
            state.cancelled = true;
            Ok(())
        })
    }

    /// Is refused: a backup ends by itself, or by [`cancel`](Self::cancel).
    ///
    /// # Errors
    /// Always.
    pub fn complete(&self) -> Result<(), JobError> {
        self.command(Verb::Complete, |_, _| Ok(()))
    }

    /// Lets a pending job end.
    ///
    /// # Errors
    /// If it is not pending.
    pub fn finalize(&self) -> Result<(), JobError> {
        self.command(Verb::Finalize, |_, state| {
            state.finalized = true;
            Ok(())
        })
    }

    /// Forgets a job that has ended; its name is free then.
    ///
    /// # Errors
    /// If it has not ended.
    pub fn dismiss(&self) -> Result<(), JobError> {
        self.command(Verb::Dismiss, |job, state| {
            job.registry.remove(&job.options.id);
            job.change_status(state, JobStatus::Null);
            Ok(())
        })
    }

    /// Waits until the job has ended, and no copy is in flight.
    pub async fn wait(&self) -> JobEnd {
        let mut state = self.state.subscribe();
        match state.wait_for(|state| state.end.is_some()).await {
            Ok(state) => state.end.clone().unwrap_or(JobEnd::Cancelled),
            // The sender lives in `self`.
            Err(_) => JobEnd::Cancelled,
        }
    }

    /// Begins anew from the current content: every unit is to be copied again. The guest's
    /// changes are held back, and no reader of the snapshot is under way, while `empty` runs: it
    /// empties the target, which this call does not touch. Progress goes on counting.
    ///
    /// If `empty` fails, or this future is dropped, the snapshot is lost until the next checkpoint
    /// succeeds, and the job copies nothing; it goes on.
    ///
    /// # Errors
    /// [`JobError::CheckpointUnsupported`] with any mode but [`SyncMode::None`];
    /// [`JobError::WrongState`] if the job has ended; what `empty` says.
    pub async fn checkpoint(
        &self,
        empty: impl Future<Output = DeviceResult<()>>,
    ) -> Result<(), JobError> {
        if self.options.sync != SyncMode::None {
            return Err(JobError::CheckpointUnsupported);
        }
        let quiet = self.disk.quiet().await;
        if !quiet.as_ref().is_some_and(|filter| Arc::ptr_eq(filter, &self.filter)) {
            let status = self.state.borrow().status;
            let id = self.options.id.clone();
            return Err(JobError::WrongState { id, status, command: "checkpoint" });
        }
        let everything = 0..self.filter.shared().source.size();
        let _readers = self.filter.locks().lock(everything, LockMode::Exclusive).await;
        self.filter.shared().epoch().set_broken();
        empty.await?;
        // A copy that outlived its deadline may still be writing to the old target.
        self.filter.checkpoint()?;
        Ok(())
    }

    fn command(
        &self,
        verb: Verb,
        act: impl FnOnce(&Self, &mut State) -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        let mut result = Ok(());
        self.state.send_modify(|state| {
            let status = state.status;
            result = if verb.allowed_in(status) {
                act(self, state)
            } else {
                let id = self.options.id.clone();
                Err(JobError::WrongState { id, status, command: verb.name() })
            };
        });
        result
    }

    fn change_status(&self, state: &mut State, status: JobStatus) {
        if state.status != status {
            state.status = status;
            self.emit(JobEvent::StatusChange { id: self.options.id.clone(), status });
        }
    }

    /// Called under the lock of the state, so that events come in the order of what they tell.
    fn emit(&self, event: JobEvent) {
        if !self.options.internal {
            self.registry.emit(event);
        }
    }

    /// Decides about a failed copy, and tells of it.
    fn decide(&self, failure: &CopyFailure) -> ErrorAction {
        let policy = match failure.operation {
            Operation::Read => self.options.on_source_error,
            _ => self.options.on_target_error,
        };
        let action = policy.action(&failure.error);
        self.state.send_modify(|state| {
            self.emit(JobEvent::Error {
                id: self.options.id.clone(),
                operation: failure.operation,
                action,
                error: failure.error.clone(),
            });
            if action == ErrorAction::Stop {
                state.paused = true;
                state.io_status = match failure.error.kind() {
                    ErrorKind::NoSpace => IoStatus::NoSpace,
                    _ => IoStatus::Failed,
                };
            }
        });
        action
    }

    fn is_cancelled(&self) -> bool {
        self.state.borrow().cancelled
    }

    /// The snapshot was given up for a guest's request.
    fn given_up(&self) -> Option<Error> {
        let shared = self.filter.shared();
        if !shared.epoch().is_broken() {
            return None;
        }
        let why = "the snapshot was given up, so that a guest's request could go on";
        let lost = Error::new(Operation::Write, ErrorKind::Io, &*self.options.id, why);
        Some(shared.counters.stats().last_error.unwrap_or(lost))
    }

    fn copied_bytes(&self) -> u64 {
        self.filter.stats().copied_units.saturating_mul(self.filter.unit_bytes())
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("id", &self.options.id)
            .field("sync", &self.options.sync)
            .field("status", &self.state.borrow().status)
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}
