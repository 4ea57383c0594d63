//! Block nodes and jobs, as a manager knows them.

use serde_json::{Value, json};

use super::{Arguments, CommandResult};
use crate::control::{CommandError, ErrorClass};
use crate::status::{DiskState, DiskStatus, Progress, Status};

/// One layer of a disk.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) name: String,
    /// The driver: `quorum`, `nbd`, `raw`, `qcow2`, `replication`.
    pub(crate) driver: &'static str,
    /// A file, or what identifies it otherwise.
    pub(crate) file: String,
    pub(crate) size: u64,
    /// The layers below, the upper first.
    pub(crate) backing: Vec<Node>,
}

impl Node {
    /// An entry of `query-named-block-nodes`; `flat` leaves out the images below.
    pub(crate) fn to_value(&self, flat: bool) -> Value {
        let mut node = json!({
            "node-name": self.name,
            "drv": self.driver,
            "ro": false,
            "file": self.file,
            "backing_file_depth": self.backing.len(),
            "encrypted": false,
            "detect_zeroes": "off",
            "write_threshold": 0,
            "bps": 0, "bps_rd": 0, "bps_wr": 0,
            "iops": 0, "iops_rd": 0, "iops_wr": 0,
            "cache": { "writeback": true, "direct": false, "no-flush": false },
            "image": self.image(flat),
        });
        if let Some(below) = self.backing.first() {
            node["backing_file"] = json!(below.file);
        }
        node
    }

    fn image(&self, flat: bool) -> Value {
        let mut image = json!({
            "filename": self.file,
            "format": self.driver,
            "virtual-size": self.size,
        });
        if let (Some(below), false) = (self.backing.split_first(), flat) {
            let (first, rest) = below;
            let below = Node { backing: rest.to_vec(), ..first.clone() };
            image["backing-image"] = below.image(false);
        }
        image
    }
}

/// Work in the background that a manager knows as a block job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobKind {
    /// The merge after a failover.
    Commit,
    /// The copy to the other side.
    Mirror,
}

/// A job; its id is the disk's name.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) kind: JobKind,
    pub(crate) device: String,
    pub(crate) len: u64,
    pub(crate) offset: u64,
    /// Bytes a second at most; 0: no limit.
    pub(crate) speed: u64,
}

impl Job {
    /// A job that has done all.
    pub(crate) fn ended(kind: JobKind, device: &str, len: u64) -> Self {
        Job { kind, device: device.to_owned(), len, offset: len, speed: 0 }
    }

    fn kind(&self) -> &'static str {
        match self.kind {
            JobKind::Commit => "commit",
            JobKind::Mirror => "mirror",
        }
    }

    fn to_value(&self) -> Value {
        json!({
            "type": self.kind(),
            "device": self.device,
            "len": self.len,
            "offset": self.offset,
            "busy": true,
            "paused": false,
            "speed": self.speed,
            "io-status": "ok",
            "ready": false,
            "status": "running",
            "auto-finalize": true,
            "auto-dismiss": true,
        })
    }

    /// The data of `BLOCK_JOB_COMPLETED`.
    pub(crate) fn completed(&self) -> Value {
        json!({
            "type": self.kind(),
            "device": self.device,
            "len": self.len,
            "offset": self.len,
            "speed": 0,
        })
    }
}

/// The jobs of a side.
pub(crate) fn jobs(status: &Status) -> Vec<Job> {
    let of = |disk: &DiskStatus| {
        let job = |kind, progress: Progress| Job {
            kind,
            device: disk.name.clone(),
            len: progress.total,
            offset: progress.done,
            speed: match kind {
                JobKind::Mirror => status.resync.and_then(|r| r.rate_limit).unwrap_or(0),
                JobKind::Commit => 0,
            },
        };
        let is_copied = matches!(disk.state, DiskState::Resyncing | DiskState::Joining);
        let copying = disk.progress.filter(|_| is_copied);
        let merge = disk.merging.map(|progress| job(JobKind::Commit, progress));
        merge.or_else(|| copying.map(|progress| job(JobKind::Mirror, progress)))
    };
    status.disks.iter().filter_map(of).collect()
}

/// The answer to `query-block-jobs`.
pub(crate) fn jobs_value(status: &Status) -> Value {
    jobs(status).iter().map(Job::to_value).collect()
}

/// The answer to a command about a job: none of them can be influenced.
pub(crate) fn check_job(status: &Status, arguments: Arguments<'_>) -> CommandError {
    let id = arguments.text("device").or(arguments.text("id")).unwrap_or_default();
    match jobs(status).iter().find(|job| job.device == id) {
        Some(job) => CommandError::refused(format!(
            "The block job for device '{id}' ({}) is part of the replication: it goes on by itself \
             until its end",
            job.kind()
        )),
        None => {
            CommandError::new(ErrorClass::DeviceNotActive, 3, format!("Block job '{id}' not found"))
        }
    }
}

/// Checks that each instance of a `yank` exists among `instances`.
pub(crate) fn check_yank(instances: &Value, arguments: Arguments<'_>) -> CommandResult<()> {
    let known = instances.as_array().map(Vec::as_slice).unwrap_or_default();
    for wanted in arguments.objects("instances") {
        if !known.iter().any(|instance| instance.as_object() == Some(wanted.0)) {
            let text = format!("Instance not found: {}", Value::Object(wanted.0.clone()));
            return Err(CommandError::new(ErrorClass::DeviceNotFound, 3, text));
        }
    }
    Ok(())
}

/// The answer to `query-xen-replication-status`: `error` is what get_error would say.
pub(crate) fn replication_status(error: Option<String>) -> Value {
    match error {
        Some(text) => json!({ "error": true, "desc": text }),
        None => json!({ "error": false }),
    }
}
