//! Copies from one device to another.

mod device;
mod range;

pub use device::{CopyOptions, copy_device};
pub use range::copy_range;
