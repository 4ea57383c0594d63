#![doc = include_str!("../README.md")]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("a bitmap of 2^41 bits needs 64-bit addresses");

mod bitmap;
mod error;
mod iter;
mod levels;
pub mod persist;
mod serialize;
#[cfg(test)]
mod tests;

pub use bitmap::{HBitmap, Status};
pub use error::{Error, Result};
pub use iter::{Cursor, DirtyAreas, Iter};
pub use persist::{
    ActivityLog, AfterPowerLoss, Identity, InFlight, LastStop, LogWrite, MapFlush, MapSet, Options,
    PersistentBitmap, Role, Sync, Tag,
};
