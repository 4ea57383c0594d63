//! The cases of block replication against the nodes. T: the cases of the original's own test
//! program; D: cases that follow from what its calls are said to do.
#![allow(missing_docs)]

mod all_disks;
mod failover;
mod granularity;
mod primary;
mod primary_nbd;
mod races;
mod secondary;
mod support;
