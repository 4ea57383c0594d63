//! What a side remembers: the record, its file, and what each transition makes of it.
//!
//! Every function here that changes a [`Record`] only computes; [`RecordStore::save`] is the one
//! place that makes it persistent.
mod disks;
mod lines;
mod record;
mod shared;
mod store;

pub use disks::{AddedDisk, RemovedDisk};
pub use lines::Lines;

pub use record::{
    BufferRef, DiskRecord, PrimaryRecord, Promotion, Record, Role, SecondaryRecord, Target,
};
pub(crate) use shared::SharedRecord;
pub(crate) use store::RESTART;
pub use store::RecordStore;
#[cfg(test)]
pub(crate) use store::faults;
