//! Backup jobs, row by row (spec: backup).

#[path = "../common/mod.rs"]
mod common;

mod bitmaps;
mod control;
mod errors;
mod modes;
mod refusals;
mod rig;
