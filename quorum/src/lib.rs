#![doc = include_str!("../README.md")]
mod changes;
mod error;
mod events;
mod join;
mod members;
mod options;
mod quorum;
mod reads;
mod replication;
mod tally;

pub use error::QuorumError;
pub use events::{EventSink, QuorumEvent, QuorumOperation};
pub use options::{Child, QuorumOptions, ReadPattern};
pub use quorum::Quorum;
