use std::sync::Arc;

use bytes::Bytes;

use crate::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Result,
    WriteFlags, ZeroFlags,
};

/// A part of a device, as a device: one partition of a disk, for instance.
///
/// Errors tell the range on the whole device.
#[derive(Debug)]
pub struct Part {
    inner: Arc<dyn BlockDevice>,
    start: u64,
    size: u64,
}

impl Part {
    /// `size` bytes of `inner` from `start` on, under the same name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the part does not lie within the device, or does not begin
    /// and end where one of its blocks does.
    pub fn new(inner: Arc<dyn BlockDevice>, start: u64, size: u64) -> Result<Arc<Self>> {
        inner.check_range(Operation::Read, start, size)?;
        let block = u64::from(inner.limits().block_size);
        let end = start + size;
        let whole =
            start.is_multiple_of(block) && (end.is_multiple_of(block) || end == inner.size());
        if !whole {
            let detail = format!("the part has to consist of whole blocks of {block} bytes");
            let error = Error::new(Operation::Open, ErrorKind::InvalidInput, inner.name(), detail);
            return Err(error.at(start, size));
        }
        Ok(Arc::new(Part { inner, start, size }))
    }

    /// Where a range lies on the whole device, if it lies within the part.
    fn place(&self, operation: Operation, offset: u64, len: u64) -> Result<u64> {
        let this: &dyn BlockDevice = self;
        // A length of 0 succeeds wherever it is.
        this.check_range(operation, if len == 0 { 0 } else { offset }, len)?;
        Ok(self.start + offset.min(self.size))
    }
}

impl BlockDevice for Part {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { growable: false, ..self.inner.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        match self.place(Operation::Read, offset, len as u64) {
            Ok(at) => self.inner.read(at, len),
            Err(error) => Io::err(error),
        }
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        match self.place(Operation::Write, offset, data.len() as u64) {
            Ok(at) => self.inner.write(at, data, flags),
            Err(error) => Io::err(error),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        match self.place(Operation::WriteZeroes, offset, len) {
            Ok(at) => self.inner.write_zeroes(at, len, flags),
            Err(error) => Io::err(error),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        match self.place(Operation::Discard, offset, len) {
            Ok(at) => self.inner.discard(at, len),
            Err(error) => Io::err(error),
        }
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        match self.place(Operation::BlockStatus, offset, len) {
            Ok(at) => self.inner.block_status(at, len),
            Err(error) => Io::err(error),
        }
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.inner.flush(level)
    }
}
