//! What can be typed, and what a job is told by a command: the same.

use std::path::PathBuf;
use std::time::Duration;

use brep_backup::{JobError, JobOptions, SyncMode};
use brep_nbd::NbdUri;
use clap::Parser;
use serde::Deserialize;

/// Serves a disk, and copies it while it is in use.
#[derive(Parser)]
pub(crate) struct Args {
    /// Where to serve, an NBD URI; the exports are `disk` and `snapshot`
    #[arg(long, value_name = "URI")]
    pub(crate) listen: NbdUri,
    /// Backing files of the source, from the top to the base
    #[arg(long, value_name = "FILE")]
    pub(crate) backing: Vec<PathBuf>,
    /// A job to begin with, if there is a `--target`
    #[command(flatten)]
    pub(crate) job: BackupArgs,
    /// The disk: qcow2 if it is so named, else raw
    pub(crate) source: PathBuf,
}

/// A backup job, by flags or by `blockdev-backup`.
#[derive(clap::Args, Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct BackupArgs {
    /// Where to copy to; made if it does not exist: qcow2 if it is so named, else raw
    #[arg(long, value_name = "FILE")]
    pub(crate) target: Option<PathBuf>,
    /// Backing files of the target, from the top to the base
    #[arg(long, value_name = "FILE")]
    pub(crate) target_backing: Vec<PathBuf>,
    /// The job's name [default: job0]
    #[arg(long)]
    job_id: Option<String>,
    /// full, top, none, incremental or bitmap [default: full]
    #[arg(long)]
    sync: Option<String>,
    /// The bitmap of a job; it has to be there
    #[arg(long)]
    bitmap: Option<String>,
    /// on-success, never or always
    #[arg(long)]
    bitmap_mode: Option<String>,
    /// Bytes per second in the background; 0 is no limit
    #[arg(long)]
    speed: Option<u64>,
    /// report, ignore, enospc, stop or auto
    #[arg(long)]
    on_source_error: Option<String>,
    /// report, ignore, enospc, stop or auto
    #[arg(long)]
    on_target_error: Option<String>,
    /// break-guest-write or break-snapshot
    #[arg(long)]
    on_cbw_error: Option<String>,
    /// Seconds that a guest's write waits for its copy at most; 0 is no limit
    #[arg(long)]
    cbw_timeout: Option<u64>,
    /// Pieces that are copied at a time
    #[arg(long)]
    max_workers: Option<u32>,
    /// Most bytes of a piece
    #[arg(long)]
    max_chunk: Option<u64>,
    /// Whether to end without block-job-finalize
    #[arg(long)]
    auto_finalize: Option<bool>,
    /// Whether to be forgotten without block-job-dismiss
    #[arg(long)]
    auto_dismiss: Option<bool>,
    /// To compress: refused
    #[arg(long)]
    compress: Option<bool>,
}

impl BackupArgs {
    pub(crate) fn options(&self) -> Result<JobOptions, JobError> {
        let sync = self.sync.as_deref().map_or(Ok(SyncMode::Full), str::parse)?;
        let mut options = JobOptions::new(self.job_id.as_deref().unwrap_or("job0"), sync);
        options.bitmap.clone_from(&self.bitmap);
        options.bitmap_mode = self.bitmap_mode.as_deref().map(str::parse).transpose()?;
        if let Some(policy) = &self.on_source_error {
            options.on_source_error = policy.parse()?;
        }
        if let Some(policy) = &self.on_target_error {
            options.on_target_error = policy.parse()?;
        }
        if let Some(what) = &self.on_cbw_error {
            options.filter.on_copy_error = what.parse()?;
        }
        let seconds = self.cbw_timeout.filter(|&seconds| seconds > 0);
        options.filter.copy_timeout = seconds.map(Duration::from_secs);
        options.speed = self.speed.unwrap_or(options.speed);
        options.workers = self.max_workers.unwrap_or(options.workers);
        options.chunk_bytes_max = self.max_chunk.unwrap_or(options.chunk_bytes_max);
        options.auto_finalize = self.auto_finalize.unwrap_or(options.auto_finalize);
        options.auto_dismiss = self.auto_dismiss.unwrap_or(options.auto_dismiss);
        options.compress = self.compress.unwrap_or(options.compress);
        Ok(options)
    }
}
