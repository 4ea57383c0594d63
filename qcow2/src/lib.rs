#![doc = include_str!("../README.md")]

mod alloc;
mod bitmap;
mod check;
mod create;
mod device;
mod empty;
mod entry;
mod error;
mod file;
mod geometry;
mod growth;
mod header;
mod image;
mod info;
mod interval;
mod map;
mod open;
mod read;
mod refcount;
mod regions;
mod resize;
mod snapshot;
mod stage;
mod write;
mod zero;

pub use bitmap::{Bitmap, BitmapInfo};
pub use check::{CheckMode, CheckReport, check};
pub use create::{BackingName, CreateOptions};
pub use device::Qcow2;
pub use empty::MakeEmpty;
pub use error::{FormatError, OpenError};
pub use header::extension;
pub use info::Info;
pub use open::OpenOptions;
pub use snapshot::Snapshot;
