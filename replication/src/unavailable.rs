use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, WriteFlags,
    ZeroFlags,
};
use bytes::Bytes;

/// A disk that cannot be used now: every request fails and says why.
#[derive(Debug)]
pub(crate) struct Unavailable {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) reason: &'static str,
}

impl Unavailable {
    fn fail<T>(&self, operation: Operation, offset: u64, len: u64) -> Io<'_, T> {
        Io::err(Error::new(operation, ErrorKind::Io, &self.name, self.reason).at(offset, len))
    }
}

impl BlockDevice for Unavailable {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.fail(Operation::Read, offset, len as u64)
    }
    fn write(&self, offset: u64, data: Bytes, _: WriteFlags) -> Io<'_, ()> {
        self.fail(Operation::Write, offset, data.len() as u64)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> Io<'_, ()> {
        self.fail(Operation::WriteZeroes, offset, len)
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.fail(Operation::Discard, offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.fail(Operation::BlockStatus, offset, len)
    }
    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        self.fail(Operation::Flush, 0, 0)
    }
}
