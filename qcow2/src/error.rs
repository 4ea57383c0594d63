//! Why an image cannot be opened, in terms of the format.

use brep_block::{Error, ErrorKind, Operation};

/// What is wrong with the contents of an image, or what in it is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum FormatError {
    #[error("image is not in qcow2 format")]
    BadMagic,
    #[error("unsupported qcow2 version {0}")]
    UnsupportedVersion(u32),
    #[error("unsupported cluster size (cluster_bits {0}, supported are 9 to 21)")]
    UnsupportedClusterSize(u32),
    #[error("qcow2 header too short ({0} bytes)")]
    HeaderTooShort(u32),
    #[error("qcow2 header exceeds cluster size ({0} bytes)")]
    HeaderTooLong(u32),
    #[error("invalid backing file offset {0}")]
    BackingOffset(u64),
    #[error("backing file name too long ({0} bytes)")]
    BackingNameTooLong(u32),
    #[error("unsupported compression type {0}")]
    UnknownCompressionType(u8),
    #[error("compression type incompatible feature bit must {} be set", if *.0 { "not" } else { "" })]
    CompressionBit(bool),
    #[error("unsupported qcow2 feature(s): {0}")]
    UnsupportedFeatures(String),
    #[error("image is corrupt; it cannot be opened read/write before it has been repaired")]
    MarkedCorrupt,
    #[error("unsupported sub-cluster size ({0} bytes)")]
    SubclusterSize(u64),
    #[error("reference count entry width too large (order {0})")]
    RefcountOrder(u32),
    #[error("image does not contain a reference count table")]
    NoRefcountTable,
    #[error("reference count table too large ({0} clusters)")]
    RefcountTableTooLarge(u32),
    #[error("reference count table offset invalid ({0})")]
    RefcountTableOffset(u64),
    #[error("snapshot table too large ({0} snapshots)")]
    TooManySnapshots(u32),
    #[error("snapshot table offset invalid ({0})")]
    SnapshotTableOffset(u64),
    #[error("snapshot table invalid: {0}")]
    SnapshotTable(&'static str),
    #[error("active L1 table too large ({0} entries)")]
    L1TooLarge(u32),
    #[error("active L1 table offset invalid ({0})")]
    L1Offset(u64),
    #[error("image is too big ({0} bytes)")]
    TooBig(u64),
    #[error("L1 table is too small ({have} entries, {need} needed)")]
    L1TooSmall { have: u32, need: u64 },
    #[error("active L1 table ends at {end}, beyond the end of the file ({file}): truncated?")]
    L1BeyondEnd { end: u64, file: u64 },
    #[error("header extension {0:#010x} too large")]
    ExtensionTooLarge(u32),
    #[error("backing format name too long ({0} bytes)")]
    BackingFormatName(usize),
    #[error("bitmaps extension: {0}")]
    BitmapsExtension(&'static str),
    #[error("encryption header: {0}")]
    CryptoExtension(&'static str),
    #[error("encrypted images are not supported (method {0})")]
    Encrypted(u32),
    #[error("images with an external data file are not supported")]
    ExternalDataFile,
    #[error("an external data file name can only be set in an image that has such a file")]
    SuperfluousDataFile,
    #[error("the image names the backing file {0:?}, but no backing device was given")]
    BackingNotGiven(String),
    #[error("metadata overlaps: {0}")]
    Overlap(&'static str),
    #[error("could not repair dirty image: {0}")]
    DirtyNotRepaired(String),
    #[error("invalid option: {0}")]
    InvalidOption(String),
}

impl FormatError {
    /// The class under which a device reports this.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnsupportedVersion(_)
            | Self::UnknownCompressionType(_)
            | Self::UnsupportedFeatures(_)
            | Self::Encrypted(_)
            | Self::ExternalDataFile => ErrorKind::Unsupported,
            Self::MarkedCorrupt | Self::DirtyNotRepaired(_) | Self::Overlap(_) => {
                ErrorKind::Corrupt
            }
            _ => ErrorKind::InvalidInput,
        }
    }
}

/// Why opening, creating or checking an image failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The contents are not acceptable.
    #[error("{node}: {error}")]
    Format {
        /// The name that was given to the image.
        node: String,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The file below failed.
    #[error(transparent)]
    Device(#[from] Error),
}

impl OpenError {
    pub(crate) fn format(node: &str, error: FormatError) -> Self {
        OpenError::Format { node: node.to_owned(), error }
    }

    /// The format error, if it is one.
    #[must_use]
    pub fn format_error(&self) -> Option<&FormatError> {
        match self {
            OpenError::Format { error, .. } => Some(error),
            OpenError::Device(_) => None,
        }
    }
}

impl From<OpenError> for Error {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Format { node, error } => {
                Error::new(Operation::Open, error.kind(), node, error.to_string())
            }
            OpenError::Device(error) => error,
        }
    }
}
