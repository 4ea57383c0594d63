use std::fmt;
use std::sync::Arc;

/// The result of a device operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What a device was asked to do when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Operation {
    Open,
    Read,
    Write,
    WriteZeroes,
    Discard,
    BlockStatus,
    Flush,
    Truncate,
    Control,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Open => "open",
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::WriteZeroes => "write zeroes",
            Operation::Discard => "discard",
            Operation::BlockStatus => "block status",
            Operation::Flush => "flush",
            Operation::Truncate => "truncate",
            Operation::Control => "control",
        })
    }
}

/// Why an operation failed, as far as a program needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The range or an argument is not acceptable (beyond the end, misaligned). `EINVAL`.
    InvalidInput,
    /// The device does not take writes. `EPERM`.
    ReadOnly,
    /// No space left, or a write beyond the end. `ENOSPC`.
    NoSpace,
    /// The operation is not supported by this device. `ENOTSUP`.
    Unsupported,
    /// A device that is reached over a network is not connected. `EIO`.
    NotConnected,
    /// The operation took longer than its deadline. `EIO`.
    TimedOut,
    /// The device is going away. `ESHUTDOWN`.
    Shutdown,
    /// Somebody else has the device locked. `EBUSY`.
    Locked,
    /// The contents of an image are not what its format demands. `EIO`.
    Corrupt,
    /// An earlier failure (a failed durable flush, a failed metadata write) has left the device
    /// in a state that only reopening and checking ends. `EIO`.
    Sticky,
    /// Anything else that the device or the operating system reported. `EIO` unless
    /// [`Error::errno`] says otherwise.
    Io,
}

/// A failed device operation: what, where, why.
///
/// Cloning is cheap, so that one failure can be reported to several waiters.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    operation: Operation,
    kind: ErrorKind,
    node: String,
    offset: u64,
    len: u64,
    errno: i32,
    detail: String,
}

impl Error {
    /// A failure of `operation` on the device called `node`.
    pub fn new(
        operation: Operation,
        kind: ErrorKind,
        node: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        Error(Arc::new(Inner {
            operation,
            kind,
            node: node.into(),
            offset: 0,
            len: 0,
            errno: default_errno(kind),
            detail: detail.into(),
        }))
    }

    /// A failure that the operating system reported.
    pub fn from_os(operation: Operation, node: impl Into<String>, error: &std::io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(5);
        let kind = match errno {
            22 => ErrorKind::InvalidInput,
            1 | 13 | 30 => ErrorKind::ReadOnly,
            28 | 122 | 27 => ErrorKind::NoSpace,
            95 => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        let mut this = Self::new(operation, kind, node, error.to_string());
        this.edit().errno = errno;
        this
    }

    /// The same failure, with the range that was being worked on.
    #[must_use]
    pub fn at(mut self, offset: u64, len: u64) -> Self {
        let inner = self.edit();
        inner.offset = offset;
        inner.len = len;
        self
    }

    /// The same failure, with the error number that the operating system gave, if it gave one.
    #[must_use]
    pub fn with_errno(mut self, errno: Option<i32>) -> Self {
        if let Some(errno) = errno {
            self.edit().errno = errno;
        }
        self
    }

    /// The same failure, seen by an operation at a higher level on another node.
    #[must_use]
    pub fn within(mut self, operation: Operation, node: &str, offset: u64, len: u64) -> Self {
        let detail = format!("{self}");
        let inner = self.edit();
        inner.operation = operation;
        inner.node = node.to_owned();
        inner.offset = offset;
        inner.len = len;
        inner.detail = detail;
        self
    }

    fn edit(&mut self) -> &mut Inner {
        if Arc::get_mut(&mut self.0).is_none() {
            let old = &self.0;
            self.0 = Arc::new(Inner {
                operation: old.operation,
                kind: old.kind,
                node: old.node.clone(),
                offset: old.offset,
                len: old.len,
                errno: old.errno,
                detail: old.detail.clone(),
            });
        }
        Arc::get_mut(&mut self.0).expect("just made unique")
    }

    /// What was being done.
    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The name of the device that failed.
    pub fn node(&self) -> &str {
        &self.0.node
    }

    /// First byte of the range, in bytes.
    pub fn offset(&self) -> u64 {
        self.0.offset
    }

    /// Length of the range, in bytes.
    pub fn length(&self) -> u64 {
        self.0.len
    }

    /// The Linux error number.
    pub fn errno(&self) -> i32 {
        self.0.errno
    }

    /// The reason in words, without operation and node.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// The error number to be sent in an NBD reply: one of those that the protocol lists.
    /// `EROFS` and `EACCES` become `EPERM`; `EDQUOT` and `EFBIG` become `ENOSPC`; what the
    /// protocol does not list becomes `EIO`.
    pub fn nbd_errno(&self) -> u32 {
        match self.0.errno {
            1 | 13 | 30 => 1,
            12 => 12,
            22 => 22,
            27 | 28 | 122 => 28,
            75 => 75,
            95 => 95,
            108 => 108,
            _ => 5,
        }
    }

    /// The exit code of a command that ends with this error: 3 if the state forbids the
    /// operation, else 1.
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            ErrorKind::Locked | ErrorKind::ReadOnly => 3,
            _ => 1,
        }
    }
}

fn default_errno(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::InvalidInput => 22,
        ErrorKind::ReadOnly => 1,
        ErrorKind::NoSpace => 28,
        ErrorKind::Unsupported => 95,
        ErrorKind::Shutdown => 108,
        ErrorKind::Locked => 16,
        ErrorKind::TimedOut
        | ErrorKind::NotConnected
        | ErrorKind::Corrupt
        | ErrorKind::Sticky
        | ErrorKind::Io => 5,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        write!(f, "{}: {}", e.node, e.operation)?;
        if e.len > 0 || e.offset > 0 {
            write!(f, " of {} bytes at {}", e.len, e.offset)?;
        }
        write!(f, ": {}", e.detail)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}, errno {}, {self})", self.0.kind, self.0.errno)
    }
}

impl std::error::Error for Error {}
