//! The life of a job, from its start to its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use brep_block::FlushLevel;

use super::Job;
use super::background::Background;
use super::options::BitmapMode;
use super::status::{JobEnd, JobEvent, JobStatus};
use crate::bitmap::Settle;

/// Whether the job is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Go,
    Cancelled,
}

impl Job {
    pub(super) async fn run(self: Arc<Self>) {
        self.enter_status(JobStatus::Running);
        let copied = Background::new(&self).run().await;
        let end = match copied {
            Ok(Step::Go) => self.complete_copy().await,
            Ok(Step::Cancelled) => JobEnd::Cancelled,
            Err(error) => JobEnd::Failed(error),
        };
        self.conclude(end).await;
    }

    /// Everything is copied.
    async fn complete_copy(&self) -> JobEnd {
        if let Err(error) = self.filter.target().flush(FlushLevel::Durable).await {
            return JobEnd::Failed(error);
        }
        // Looked at after the last copy: a guest's request may have given the snapshot up.
        if let Some(error) = self.given_up() {
            return JobEnd::Failed(error);
        }
        self.enter_status(JobStatus::Waiting);
        self.enter_status(JobStatus::Pending);
        if !self.options.auto_finalize {
            self.state.send_modify(|state| {
                state.busy = false;
                self.emit(JobEvent::Pending { id: self.options.id.clone() });
            });
        }
        let mut state = self.state.subscribe();
        let auto = self.options.auto_finalize;
        let decided = state.wait_for(|state| auto || state.finalized || state.cancelled).await;
        match decided {
            Ok(state) if state.cancelled => JobEnd::Cancelled,
            _ => JobEnd::Completed,
        }
    }

    async fn conclude(&self, end: JobEnd) {
        if !matches!(end, JobEnd::Completed) {
            self.state.send_modify(|state| {
                if state.status == JobStatus::Paused {
                    self.change_status(state, JobStatus::Running);
                }
                self.change_status(state, JobStatus::Aborting);
            });
        }
        // From here on nothing begins to copy, and what is copying ends.
        self.filter.set_enabled(false);
        self.filter.shared().drain_copies().await;
        if let Some((name, mode)) = &self.bitmap {
            let how = self.settle(*mode, &end).await;
            self.disk.bitmaps().settle(name, how);
        }
        if !matches!(end, JobEnd::Completed)
            && let Err(error) = self.filter.target().flush(FlushLevel::Process).await
        {
            tracing::warn!(job = %self.options.id, %error, "what was copied may not be found");
        }
        // Before guests pass by the filter: its snapshot is over.
        self.filter.shared().epoch().set_broken();
        self.disk.remove_filter().await;
        self.filter.shared().release_target();
        self.registry.release_devices(&self.options.id);
        self.state.send_modify(|state| {
            state.busy = false;
            state.paused = false;
            let info = self.info_at(state, Some(&end));
            self.emit(match end {
                JobEnd::Cancelled => JobEvent::Cancelled(info),
                JobEnd::Completed | JobEnd::Failed(_) => JobEvent::Completed(info),
            });
            self.change_status(state, JobStatus::Concluded);
            if self.options.auto_dismiss {
                self.registry.remove(&self.options.id);
                self.change_status(state, JobStatus::Null);
            }
            // Told to those who wait only when the name is free.
            state.end = Some(end);
        });
    }

    async fn settle(&self, mode: BitmapMode, end: &JobEnd) -> Settle {
        match (mode, end) {
            (BitmapMode::Never, _) => Settle::Merge,
            (_, JobEnd::Completed) => Settle::Replace,
            (BitmapMode::OnSuccess, _) => Settle::Merge,
            (BitmapMode::Always, _) => {
                // What the bitmap forgets has to be in the target.
                let safe = self.filter.target().flush(FlushLevel::Durable).await.is_ok();
                Settle::ReplaceAnd(self.filter.shared().not_copied(safe))
            }
        }
    }

    pub(super) fn enter_status(&self, status: JobStatus) {
        // Who waits for a change is not woken by none.
        self.state.send_if_modified(|state| {
            let changes = state.status != status;
            self.change_status(state, status);
            changes
        });
    }

    pub(super) fn set_busy(&self, busy: bool) {
        self.state.send_if_modified(|state| {
            state.busy = busy;
            // Nobody waits for this.
            false
        });
    }

    pub(super) fn exclude_bytes(&self, bytes: u64) {
        self.len_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}
