#![doc = include_str!("../README.md")]
mod copy;
mod counters;
mod epoch;
mod filter;
mod inline;
mod job;
mod options;
mod rate;
mod unit_set;
mod view;

pub use filter::CopyBeforeWrite;
pub use job::{Job, JobEnd, JobError, JobOptions, Progress, SyncMode};
pub use options::{CbwOptions, CbwStats, Copied, OnCopyError};
pub use view::SnapshotAccess;
