#![doc = include_str!("../README.md")]
mod change;
mod commands;
pub mod config;
pub mod control;
mod daemon;
mod door;
mod error;
mod errors;
mod gate;
mod guest;
mod ids;
mod image;
mod layer;
mod link;
mod merge;
pub mod node;
mod primary;
mod random;
mod reception;
mod secondary;
mod side;
#[cfg(feature = "simulation")]
pub mod simulation;
mod state;
pub mod status;
mod table;
#[cfg(test)]
mod tests;
mod tls;
// The tests of the crate's inside share a harness with those of its outside.
#[cfg(test)]
extern crate self as brep_replication;
mod unavailable;
mod view;
mod written;

pub use error::{Error, ErrorKind, Result};
pub use ids::{Commit, Epoch, Generation, SetId};
pub use reception::{SharedListener, run_groups};
pub use secondary::{Discard, would_discard};
pub use side::{remove_disk_of_stopped, run};
