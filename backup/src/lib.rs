#![doc = include_str!("../README.md")]
mod copy;
mod counters;
mod epoch;
mod filter;
mod options;
mod start;
mod unit_set;
mod view;

pub use filter::CopyBeforeWrite;
pub use options::{CbwOptions, CbwStats, Copied, OnCopyError};
pub use view::SnapshotAccess;
