use std::ops::Range;

use brep_block::{BlockDevice, Operation, Result, WriteFlags, ZeroFlags};
use bytes::Bytes;

/// A request that changes a range of a device.
pub(crate) enum Change {
    Write(Bytes, WriteFlags),
    Zeroes(ZeroFlags),
    Discard,
}

impl Change {
    pub(crate) fn operation(&self) -> Operation {
        match self {
            Change::Write(..) => Operation::Write,
            Change::Zeroes(_) => Operation::WriteZeroes,
            Change::Discard => Operation::Discard,
        }
    }

    pub(crate) async fn apply(self, device: &dyn BlockDevice, bytes: &Range<u64>) -> Result<()> {
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        match self {
            Change::Write(data, flags) => device.write(offset, data, flags).await,
            Change::Zeroes(flags) => device.write_zeroes(offset, len, flags).await,
            Change::Discard => device.discard(offset, len).await,
        }
    }
}
