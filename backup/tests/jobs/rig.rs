//! A disk in use, a target, and jobs whose events are noted.

use std::sync::{Arc, Mutex};

use brep_backup::{
    BitmapMode, Job, JobError, JobEvent, JobOptions, JobStatus, Jobs, LiveDisk, SyncMode,
};
use brep_block::{BlockDevice, Result, WriteFlags};
use bytes::Bytes;

use crate::common::Probe;

pub const UNIT: u64 = 64 << 10;
pub const MIB: u64 = 1 << 20;
/// The last unit is short.
pub const SIZE: u64 = (4 << 20) + 300;

pub struct Rig {
    pub source: Arc<Probe>,
    pub target: Arc<Probe>,
    pub disk: Arc<LiveDisk>,
    pub jobs: Jobs,
    events: Arc<Mutex<Vec<String>>>,
}

fn words(event: JobEvent) -> String {
    match event {
        JobEvent::StatusChange { status, .. } => status.to_string(),
        JobEvent::Error { operation, action, .. } => format!("ERROR {operation} {action}"),
        JobEvent::Pending { .. } => "PENDING".to_owned(),
        JobEvent::Completed(info) if info.error.is_some() => "COMPLETED with error".to_owned(),
        JobEvent::Completed(_) => "COMPLETED".to_owned(),
        JobEvent::Cancelled(_) => "CANCELLED".to_owned(),
        _ => "unknown".to_owned(),
    }
}

impl Rig {
    /// The disk is full of 0x11, the target of zeroes.
    pub fn new() -> Self {
        Self::with(Probe::new("disk", SIZE), Probe::new("target", SIZE))
    }

    pub fn slow() -> Self {
        Self::with(Probe::slow("disk", SIZE, 3), Probe::slow("target", SIZE, 3))
    }

    pub fn with(source: Arc<Probe>, target: Arc<Probe>) -> Self {
        source.fill(0x11);
        let disk = LiveDisk::new("vda", source.clone());
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let jobs = Jobs::new(move |event| sink.lock().unwrap().push(words(event)));
        Rig { source, target, disk, jobs, events }
    }

    pub async fn try_start(&self, options: JobOptions) -> std::result::Result<Arc<Job>, JobError> {
        self.jobs.start(&self.disk, self.target.clone(), options).await
    }

    pub async fn start(&self, options: JobOptions) -> Arc<Job> {
        self.try_start(options).await.unwrap()
    }

    /// Starts a job of a mode, without any further options.
    pub async fn sync(&self, sync: SyncMode) -> Arc<Job> {
        self.start(JobOptions::new("job0", sync)).await
    }

    pub async fn with_bitmap(&self, sync: SyncMode, mode: BitmapMode) -> Arc<Job> {
        self.start(JobOptions::new("job0", sync).bitmap("b", mode)).await
    }

    /// As the guest.
    pub async fn write(&self, offset: u64, len: usize, byte: u8) -> Result<()> {
        self.disk.write(offset, Bytes::from(vec![byte; len]), WriteFlags::default()).await
    }

    /// What happened since the last call.
    pub fn events(&self) -> Vec<String> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    pub fn dirty_bytes(&self) -> u64 {
        self.disk.bitmaps().query()[0].count
    }
}

/// Lets the other tasks run until the job is in a status.
pub async fn until(job: &Job, status: JobStatus) {
    for _ in 0..100_000 {
        if job.info().status == status {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("still {:?}, not {status:?}", job.info());
}

pub async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}
