#![doc = include_str!("../README.md")]

mod buffer;
pub mod conformance;
mod copy;
mod decorator;
mod detach;
mod device;
mod error;
mod io;
mod memory;
#[cfg(feature = "simulation")]
pub mod plant;
mod pool;
mod range_lock;
mod raw;
pub mod storage;

pub use buffer::{is_zero, zeroes};
pub use copy::{CopyOptions, copy_device, copy_range};
pub use decorator::{
    Count, Counts, Fault, Hang, Part, Power, PowerCut, PowerLoss, ReadOnly, Rule, Serialise, Times,
};
pub use detach::{detach, start};
pub use device::{
    BlockDevice, BlockStatus, FlushLevel, Limits, Replication, ReplicationMode, Staging,
    StatusFlags, WriteFlags, ZeroFlags,
};
pub use error::{Error, ErrorKind, Operation, Result};
pub use io::Io;
pub use memory::Memory;
pub use pool::Buffer;
pub use range_lock::{LockMode, RangeGuard, RangeLock};
pub use raw::{CacheMode, RawFile, RawFileOptions};
