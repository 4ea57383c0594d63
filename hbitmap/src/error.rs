use std::io;
use std::path::{Path, PathBuf};

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a bitmap or with its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bitmap that was asked for cannot exist.
    #[error("a bitmap of {size} items with a granularity of 2^{granularity_log2} is not possible")]
    Impossible {
        /// In items.
        size: u64,
        /// As a power of two.
        granularity_log2: u32,
    },
    /// Two bitmaps that describe different numbers of items cannot be combined.
    #[error("bitmaps of {left} and {right} items cannot be combined")]
    SizesDiffer {
        /// Items of the bitmap that was to change.
        left: u64,
        /// Items of the other one.
        right: u64,
    },
    /// A part to be serialised or deserialised is not one that the format allows, or its buffer
    /// has the wrong length.
    #[error("no such part: {count} items from {start}, {len} bytes: {reason}")]
    Part {
        /// First item.
        start: u64,
        /// Number of items.
        count: u64,
        /// Length of the buffer in bytes.
        len: usize,
        /// The rule that was broken.
        reason: &'static str,
    },
    /// The file is not a bitmap file, or of a version that this crate does not know.
    #[error("{}: not a bitmap file: {reason}", path.display())]
    NotABitmap {
        /// The file.
        path: PathBuf,
        /// What gave it away.
        reason: String,
    },
    /// A sound bitmap file, but of something else.
    #[error("{}: a bitmap of something else: {reason}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs from what was expected.
        reason: String,
    },
    /// The contents of the file are not what was written to it. The file is left as it is; what
    /// it described is not known any more.
    #[error("{}: corrupt: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The file was in use when the machine lost power (or it comes from another machine), so
    /// that it may lack bits that had been set. The file is left as it is. See
    /// [`AfterPowerLoss`](crate::AfterPowerLoss).
    #[error("{}: was in use when power was lost; bits may be missing", path.display())]
    PowerLost {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else has the file open.
    #[error("{}: in use by another process", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// An earlier flush failed; what is on stable storage is not known until the file has been
    /// opened again.
    #[error("{}: an earlier flush failed; open the file again", path.display())]
    Sticky {
        /// The file.
        path: PathBuf,
    },
    /// The maps are not in a state that allows the change of roles.
    #[error("{}: {reason}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What stands against it.
        reason: &'static str,
    },
    /// The operating system reported a failure.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The reason.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }
}
