use brep_block::{BlockDevice, Operation, Result, WriteFlags, ZeroFlags};
use bytes::Bytes;

/// A change of contents, wherever it goes.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Write(Bytes, WriteFlags),
    Zeroes(u64, ZeroFlags),
}

impl Change {
    /// The same, without asking for stable storage.
    pub(crate) fn without_fua(&self) -> Self {
        match self.clone() {
            Change::Write(data, _) => Change::Write(data, WriteFlags::default()),
            Change::Zeroes(len, flags) => Change::Zeroes(len, ZeroFlags { fua: false, ..flags }),
        }
    }

    /// Bytes that it changes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Change::Write(data, _) => data.len() as u64,
            Change::Zeroes(len, _) => *len,
        }
    }

    pub(crate) fn operation(&self) -> Operation {
        match self {
            Change::Write(..) => Operation::Write,
            Change::Zeroes(..) => Operation::WriteZeroes,
        }
    }

    /// A part of it.
    pub(crate) fn part(&self, from: u64, len: u64) -> Change {
        match self {
            // A part of data that is in memory: both ends fit.
            Change::Write(data, flags) => {
                Change::Write(data.slice(from as usize..(from + len) as usize), *flags)
            }
            Change::Zeroes(_, flags) => Change::Zeroes(len, *flags),
        }
    }

    /// Carries it out.
    pub(crate) async fn apply(self, device: &dyn BlockDevice, offset: u64) -> Result<()> {
        match self {
            Change::Write(data, flags) => device.write(offset, data, flags).await,
            Change::Zeroes(len, flags) => device.write_zeroes(offset, len, flags).await,
        }
    }
}
