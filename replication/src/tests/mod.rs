//! Pairs in one process whose disks fail or hang.
#[path = "../../tests/common/mod.rs"]
mod common;
mod copy;
mod failover;
