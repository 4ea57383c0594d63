#![doc = include_str!("../README.md")]
mod changes;
mod child_change;
mod error;
mod events;
mod join;
mod members;
pub mod option_text;
mod options;
mod quorum;
mod rate_limit;
mod reads;
mod replication;
mod tally;

pub use child_change::ChildChange;
pub use error::QuorumError;
pub use events::{EventSink, QuorumEvent, QuorumOperation};
pub use options::{Child, QuorumOptions, ReadPattern, Settings};
pub use quorum::Quorum;
pub use rate_limit::RateLimit;
