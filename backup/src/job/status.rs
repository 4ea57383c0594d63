use std::fmt;
use std::sync::Arc;

use brep_block::{Error, Operation};

use super::options::ErrorAction;
use crate::bitmap::BitmapError;

/// Where a job is in its life. [`Ready`](Self::Ready) and [`Standby`](Self::Standby) exist for
/// jobs that are completed by command; a backup is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum JobStatus {
    Undefined,
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    Waiting,
    Pending,
    Aborting,
    Concluded,
    Null,
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            JobStatus::Undefined => "undefined",
            JobStatus::Created => "created",
            JobStatus::Running => "running",
            JobStatus::Paused => "paused",
            JobStatus::Ready => "ready",
            JobStatus::Standby => "standby",
            JobStatus::Waiting => "waiting",
            JobStatus::Pending => "pending",
            JobStatus::Aborting => "aborting",
            JobStatus::Concluded => "concluded",
            JobStatus::Null => "null",
        })
    }
}

/// A command to a job, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Cancel,
    Pause,
    Resume,
    SetSpeed,
    Complete,
    Finalize,
    Dismiss,
}

impl Verb {
    pub(super) fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }

    pub(super) fn allowed_in(self, status: JobStatus) -> bool {
        use JobStatus::{Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let at_work = matches!(status, Created | Running | Paused | Ready | Standby);
        match self {
            Verb::Cancel => at_work || matches!(status, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed => at_work,
            Verb::Complete => status == Ready,
            Verb::Finalize => status == Pending,
            Verb::Dismiss => status == JobStatus::Concluded,
        }
    }
}

/// Whether the job was stopped by an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// It was not, or it has been resumed since.
    #[default]
    Ok,
    /// By a lack of space.
    NoSpace,
    /// By another one.
    Failed,
}

impl fmt::Display for IoStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoStatus::Ok => "ok",
            IoStatus::NoSpace => "nospace",
            IoStatus::Failed => "failed",
        })
    }
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
    /// It failed.
    Failed(Error),
}

/// What `query-block-jobs` tells of a job; its type is `backup`.
#[derive(Debug, Clone)]
pub struct JobInfo {
    /// The name of the job.
    pub id: String,
    /// How far it is.
    pub progress: Progress,
    /// Whether it is at work: not paused, and not waiting for its speed or for a command.
    pub busy: bool,
    /// Whether it was paused, by a command or by an error.
    pub paused: bool,
    /// Bytes per second; 0 is no limit.
    pub speed: u64,
    /// Whether an error has stopped it.
    pub io_status: IoStatus,
    /// Where it is in its life.
    pub status: JobStatus,
    /// Whether it ends without [`Job::finalize`](crate::Job::finalize).
    pub auto_finalize: bool,
    /// Whether it goes without [`Job::dismiss`](crate::Job::dismiss).
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<Error>,
}

/// What happens to a job. In brackets, the event of the QEMU monitor.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum JobEvent {
    /// It goes on to another status (`JOB_STATUS_CHANGE`).
    StatusChange {
        /// The name of the job.
        id: String,
        /// The new status.
        status: JobStatus,
    },
    /// The background copy has met an error (`BLOCK_JOB_ERROR`).
    Error {
        /// The name of the job.
        id: String,
        /// A read of the source, or a write to the target.
        operation: Operation,
        /// What is done about it.
        action: ErrorAction,
        /// The error.
        error: Error,
    },
    /// It has copied everything and waits to be finalized (`BLOCK_JOB_PENDING`).
    Pending {
        /// The name of the job.
        id: String,
    },
    /// It has ended, with an error if there is one (`BLOCK_JOB_COMPLETED`).
    Completed(JobInfo),
    /// It was cancelled (`BLOCK_JOB_CANCELLED`).
    Cancelled(JobInfo),
}

/// Who is told what happens, in order. It must not call the job: it is called in the midst of
/// things; a channel is what it is for.
pub type EventSink = Arc<dyn Fn(JobEvent) + Send + Sync>;

/// Why a call on a job failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// Only a job that copies nothing by itself can begin anew.
    #[error("The backup job only supports block checkpoint in sync=none mode")]
    CheckpointUnsupported,
    /// There is no such job. Holds its name.
    #[error("Block job '{0}' not found")]
    NotFound(String),
    /// There is such a job already. Holds its name.
    #[error("job ID '{0}' is in use: choose another, or dismiss that job if it has ended")]
    IdInUse(String),
    /// A job runs on the device.
    #[error("{node} is busy: job '{job}' uses it")]
    DeviceInUse {
        /// The name of the device.
        node: String,
        /// The name of the job.
        job: String,
    },
    /// Only a resumed job, or a forced cancel. Holds the name of the job.
    #[error("The block job for device '{0}' is currently paused")]
    Paused(String),
    /// It is paused already. Holds its name.
    #[error("block job '{0}' is paused already")]
    AlreadyPaused(String),
    /// It is not paused. Holds its name.
    #[error("block job '{0}' is not paused")]
    NotPaused(String),
    /// It is not in a state for that.
    #[error("job '{id}' in state '{status}' cannot take the command '{command}'")]
    WrongState {
        /// The name of the job.
        id: String,
        /// Its state.
        status: JobStatus,
        /// What it was told.
        command: &'static str,
    },
    /// The options do not fit together, or one is out of its range.
    #[error("{0}")]
    Invalid(String),
    /// The bitmap cannot be used.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] Error),
}
