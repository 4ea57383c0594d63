//! Small devices that join buffers and disks.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Staging, StatusFlags, WriteFlags, ZeroFlags,
    zeroes,
};
use bytes::Bytes;

/// What lies below a buffer: nothing at first, which reads as zeroes, and later a view.
pub(crate) struct Below {
    size: AtomicU64,
    device: Mutex<Option<Arc<dyn BlockDevice>>>,
}

impl Below {
    pub(crate) fn nothing(size: u64) -> Arc<Self> {
        Arc::new(Below { size: AtomicU64::new(size), device: Mutex::new(None) })
    }

    /// The disk has grown.
    pub(crate) fn grow(&self, size: u64) {
        self.size.fetch_max(size, Ordering::AcqRel);
    }

    /// Puts something else below. Nobody may be reading.
    pub(crate) fn set(&self, device: Option<Arc<dyn BlockDevice>>) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = device;
    }

    fn device(&self) -> Option<Arc<dyn BlockDevice>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Below {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Below").field(&self.device()).finish()
    }
}

const NOTHING: StatusFlags = StatusFlags { data: false, zero: true, allocated: false };

impl BlockDevice for Below {
    fn name(&self) -> &str {
        "below"
    }
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
    fn limits(&self) -> Limits {
        Limits { read_only: true, ..Limits::default() }
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        match self.device() {
            None => Io::ok(zeroes(len)),
            Some(device) => Io::future(async move { device.read(offset, len).await }),
        }
    }
    fn write(&self, offset: u64, data: Bytes, _: WriteFlags) -> Io<'_, ()> {
        refuse(brep_block::Operation::Write, offset, data.len() as u64)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> Io<'_, ()> {
        refuse(brep_block::Operation::WriteZeroes, offset, len)
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        refuse(brep_block::Operation::Discard, offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        match self.device() {
            None => Io::ok(BlockStatus { len, flags: NOTHING }),
            Some(device) => Io::future(async move {
                let mut status = device.block_status(offset, len).await?;
                status.flags.allocated = false;
                Ok(status)
            }),
        }
    }
    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        Io::ok(())
    }
}

fn refuse(operation: brep_block::Operation, offset: u64, len: u64) -> Io<'static, ()> {
    let kind = brep_block::ErrorKind::ReadOnly;
    Io::err(brep_block::Error::new(operation, kind, "below", "read-only").at(offset, len))
}

/// A device of which only the first bytes are used: a buffer, whose size is a multiple of 512,
/// for a disk whose size is not.
#[derive(Debug)]
pub(crate) struct Cropped {
    device: Arc<dyn BlockDevice>,
    size: u64,
}

/// `device` with exactly `size` bytes.
pub(crate) fn cropped(device: Arc<dyn BlockDevice>, size: u64) -> Arc<dyn BlockDevice> {
    if device.size() == size { device } else { Arc::new(Cropped { device, size }) }
}

impl BlockDevice for Cropped {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn limits(&self) -> Limits {
        self.device.limits()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.device.read(offset, len)
    }
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.device.write(offset, data, flags)
    }
    /// What lies beyond the end is zero and may as well be zeroed: so the last unit is whole, and
    /// needs no data.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let to_end = offset.checked_add(len) == Some(self.size);
        let len = if to_end { self.device.size() - offset } else { len };
        self.device.write_zeroes(offset, len, flags)
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.device.discard(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.device.block_status(offset, len)
    }
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.device.flush(level)
    }
    fn staging(&self) -> Option<&dyn Staging> {
        self.device.staging()
    }
}
