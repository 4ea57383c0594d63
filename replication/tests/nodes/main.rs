//! The cases of block replication against the nodes. T: the cases of the original's own test
//! program; D: cases that follow from what its calls are said to do; `series_sNN`: the rows of the
//! original's own tables, as `docs/internals/original-cases.md` numbers them.
#![allow(missing_docs)]

mod all_disks;
mod dispatch;
mod failover;
mod granularity;
mod nbd_child;
mod primary;
mod primary_nbd;
mod races;
mod secondary;

mod stages;
mod start_and_end;
mod support;
mod targets;
