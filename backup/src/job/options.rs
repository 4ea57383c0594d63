use std::fmt;
use std::str::FromStr;

use brep_block::{Error, ErrorKind};

use super::JobError;
use crate::options::{CbwOptions, OnCopyError};

/// Most pieces that a job copies at a time.
const WORKERS_MAX: u32 = 64;

/// What a job copies by itself (spec: backup, sync modes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SyncMode {
    /// Everything; the result is the source at the moment when the job started.
    #[default]
    Full,
    /// What is allocated in the source's own layer, not in its backing device: the target, over
    /// the same backing device, is the source at the moment when the job started. The same as
    /// [`Full`](Self::Full) for a source without layers.
    Top,
    /// Nothing: only what is about to be overwritten. Ends by cancel only.
    None,
    /// What is dirty in a bitmap: the target, over the previous backup, is the source at the
    /// moment when the job started. [`Bitmap`](Self::Bitmap) with [`BitmapMode::OnSuccess`].
    Incremental,
    /// The same, with any bitmap mode.
    Bitmap,
}

impl SyncMode {
    /// Whether a bitmap says what to copy.
    pub(super) fn follows_bitmap(self) -> bool {
        matches!(self, SyncMode::Incremental | SyncMode::Bitmap)
    }
}

/// What happens to the bitmap when the job ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BitmapMode {
    /// After a success it has only what was written during the job, otherwise it has also what
    /// it had before: the next job copies all of it.
    #[default]
    OnSuccess,
    /// It keeps what it had; what was written during the job is added.
    Never,
    /// It has what was written during the job, and what was not copied: after a failure or a
    /// cancel the next job goes on where this one stopped, into the same target.
    Always,
}

/// What to do when the background copy meets an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The job fails with it.
    #[default]
    Report,
    /// Copy the rest, then try again, until it is copied or the job is cancelled.
    Ignore,
    /// [`Stop`](Self::Stop) if there is no space left, else [`Report`](Self::Report).
    Enospc,
    /// Pause the job. It tries again when it is resumed.
    Stop,
    /// For jobs the same as [`Enospc`](Self::Enospc).
    Auto,
}

/// What was done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ErrorAction {
    Report,
    Ignore,
    Stop,
}

impl OnError {
    pub(super) fn action(self, error: &Error) -> ErrorAction {
        let no_space = error.kind() == ErrorKind::NoSpace;
        match self {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if no_space => ErrorAction::Stop,
            OnError::Report | OnError::Enospc | OnError::Auto => ErrorAction::Report,
        }
    }
}

/// How a [`Job`](crate::Job) works.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// The name of the job.
    pub id: String,
    /// What it copies.
    pub sync: SyncMode,
    /// A bitmap of the disk: what is to be copied, or, with [`SyncMode::Full`] and
    /// [`SyncMode::Top`], what begins anew with this job.
    pub bitmap: Option<String>,
    /// What happens to it at the end. To be given with every bitmap, except that
    /// [`SyncMode::Incremental`] knows only [`BitmapMode::OnSuccess`].
    pub bitmap_mode: Option<BitmapMode>,
    /// Bytes per second in the background; 0 is no limit. Copies for a guest's request are never
    /// held back, but count.
    pub speed: u64,
    /// What to do when the source cannot be read.
    pub on_source_error: OnError,
    /// What to do when the target cannot be written.
    pub on_target_error: OnError,
    /// Pieces that are copied at a time in the background: 1 to 64.
    pub workers: u32,
    /// Most bytes that are copied at a time by each, and that a guest's request may have to wait
    /// for; at least a unit. 0 stands for 1 MiB.
    pub chunk_bytes_max: u64,
    /// Otherwise a job that has copied everything waits, [`JobStatus::Pending`], for
    /// [`Job::finalize`].
    ///
    /// [`JobStatus::Pending`]: crate::JobStatus::Pending
    /// [`Job::finalize`]: crate::Job::finalize
    pub auto_finalize: bool,
    /// Otherwise a job that has ended stays, and its name with it, until [`Job::dismiss`].
    ///
    /// [`Job::dismiss`]: crate::Job::dismiss
    pub auto_dismiss: bool,
    /// To compress what is written. No target can: refused.
    pub compress: bool,
    /// A part of something larger: no events, and not in [`Jobs::query`](crate::Jobs::query).
    pub internal: bool,
    /// The filter that the guest's requests go through. Its unit is at least what the target
    /// allocates at a time. What happens in it is the guest's affair: neither speed nor error
    /// policies hold there.
    pub filter: CbwOptions,
}

impl JobOptions {
    /// A job without a speed limit that reports errors; its filter has the same name. Pre-images
    /// are kept safe from the end of the process in [`SyncMode::None`] only: with the others the
    /// target is of worth when the job has succeeded.
    #[must_use]
    pub fn new(id: impl Into<String>, sync: SyncMode) -> Self {
        let id = id.into();
        let mut filter = CbwOptions::new(id.clone());
        if sync != SyncMode::None {
            filter.barrier = None;
        }
        JobOptions {
            id,
            sync,
            bitmap: None,
            bitmap_mode: None,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            workers: 16,
            chunk_bytes_max: 0,
            auto_finalize: true,
            auto_dismiss: true,
            compress: false,
            internal: false,
            filter,
        }
    }

    /// The same with a bitmap.
    #[must_use]
    pub fn bitmap(mut self, name: impl Into<String>, mode: BitmapMode) -> Self {
        self.bitmap = Some(name.into());
        self.bitmap_mode = Some(mode);
        self
    }

    /// What the options say of a bitmap: its name and its mode.
    pub(super) fn check(&self) -> Result<Option<(String, BitmapMode)>, JobError> {
        let invalid = |why: &str| Err(JobError::Invalid(why.to_owned()));
        if self.id.is_empty() {
            return invalid("a job needs an ID");
        }
        if self.compress {
            return invalid("compress: the target cannot write compressed data");
        }
        if !(1..=WORKERS_MAX).contains(&self.workers) {
            return Err(JobError::Invalid(format!(
                "max-workers: {} is not from 1 to {WORKERS_MAX}",
                self.workers
            )));
        }
        let mode = match (self.sync, self.bitmap_mode) {
            (SyncMode::Incremental, None) => Some(BitmapMode::OnSuccess),
            (SyncMode::Incremental, Some(mode)) if mode != BitmapMode::OnSuccess => {
                return invalid("sync=incremental works with bitmap mode on-success only");
            }
            (_, mode) => mode,
        };
        match (&self.bitmap, mode) {
            (None, _) if self.sync.follows_bitmap() => {
                Err(JobError::Invalid(format!("sync={} needs a bitmap", self.sync)))
            }
            (None, Some(_)) => invalid("a bitmap mode was given, but no bitmap"),
            (None, None) => Ok(None),
            (Some(_), None) => invalid("a bitmap was given, but no bitmap mode"),
            (Some(_), Some(_)) if self.sync == SyncMode::None => {
                invalid("sync=none copies nothing that a bitmap could name")
            }
            (Some(_), Some(BitmapMode::Never)) if self.sync != SyncMode::Bitmap => {
                invalid("bitmap mode never works with sync=bitmap only")
            }
            (Some(name), Some(mode)) => Ok(Some((name.clone(), mode))),
        }
    }
}

/// Reads one of some names.
fn named<T: Copy>(what: &str, text: &str, names: &[(&str, T)]) -> Result<T, JobError> {
    let found = names.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = names.iter().map(|(name, _)| *name).collect();
        JobError::Invalid(format!("{what}: '{text}' is none of {}", names.join(", ")))
    })
}

impl FromStr for SyncMode {
    type Err = JobError;

    fn from_str(text: &str) -> Result<Self, JobError> {
        let names = [
            ("full", SyncMode::Full),
            ("top", SyncMode::Top),
            ("none", SyncMode::None),
            ("incremental", SyncMode::Incremental),
            ("bitmap", SyncMode::Bitmap),
        ];
        named("sync", text, &names)
    }
}

impl FromStr for BitmapMode {
    type Err = JobError;

    fn from_str(text: &str) -> Result<Self, JobError> {
        let names = [
            ("on-success", BitmapMode::OnSuccess),
            ("never", BitmapMode::Never),
            ("always", BitmapMode::Always),
        ];
        named("bitmap-mode", text, &names)
    }
}

impl FromStr for OnError {
    type Err = JobError;

    fn from_str(text: &str) -> Result<Self, JobError> {
        let names = [
            ("report", OnError::Report),
            ("ignore", OnError::Ignore),
            ("enospc", OnError::Enospc),
            ("stop", OnError::Stop),
            ("auto", OnError::Auto),
        ];
        named("error policy", text, &names)
    }
}

impl FromStr for OnCopyError {
    type Err = JobError;

    fn from_str(text: &str) -> Result<Self, JobError> {
        let names = [
            ("break-guest-write", OnCopyError::BreakGuestWrite),
            ("break-snapshot", OnCopyError::BreakSnapshot),
        ];
        named("on-cbw-error", text, &names)
    }
}

impl fmt::Display for SyncMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SyncMode::Full => "full",
            SyncMode::Top => "top",
            SyncMode::None => "none",
            SyncMode::Incremental => "incremental",
            SyncMode::Bitmap => "bitmap",
        })
    }
}

impl fmt::Display for ErrorAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorAction::Report => "report",
            ErrorAction::Ignore => "ignore",
            ErrorAction::Stop => "stop",
        })
    }
}
