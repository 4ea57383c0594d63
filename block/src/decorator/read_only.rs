use std::sync::Arc;

use bytes::Bytes;

use crate::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, WriteFlags,
    ZeroFlags,
};

/// A view that takes no writes.
#[derive(Debug)]
pub struct ReadOnly {
    inner: Arc<dyn BlockDevice>,
}

impl ReadOnly {
    /// A view of `inner`, under the same name.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(ReadOnly { inner })
    }

    fn refuse<T>(&self, operation: Operation, offset: u64, len: u64) -> Io<'_, T> {
        let detail = "the device is open for reading only";
        Io::err(Error::new(operation, ErrorKind::ReadOnly, self.name(), detail).at(offset, len))
    }
}

impl BlockDevice for ReadOnly {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        Limits {
            read_only: true,
            growable: false,
            can_discard: false,
            fast_zero: false,
            ..self.inner.limits()
        }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.inner.read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, _flags: WriteFlags) -> Io<'_, ()> {
        self.refuse(Operation::Write, offset, data.len() as u64)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> Io<'_, ()> {
        self.refuse(Operation::WriteZeroes, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.refuse(Operation::Discard, offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.inner.block_status(offset, len)
    }

    /// What this view lets through has nothing to be made durable, but what others wrote has.
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.inner.flush(level)
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.refuse(Operation::Truncate, size, 0)
    }
}
