#![doc = include_str!("../README.md")]
mod ahead;
mod bitmap;
mod change;
mod checks;
mod copy;
mod counters;
mod deadline;
mod epoch;
mod filter;
mod inline;
mod job;
mod live;
mod memory;
mod options;
mod rate;
mod target;
mod unit_set;
mod view;

pub use bitmap::{BitmapError, BitmapInfo, BitmapState, Bitmaps};
pub use filter::CopyBeforeWrite;
pub use job::{
    BitmapMode, ErrorAction, EventSink, IoStatus, Job, JobEnd, JobError, JobEvent, JobInfo,
    JobOptions, JobStatus, Jobs, OnError, Progress, SyncMode,
};
pub use live::LiveDisk;
pub use options::{CbwOptions, CbwStats, Copied, OnCopyError};
pub use view::SnapshotAccess;
