use std::fmt;

/// The result of a replication operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done, and who is to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// It was tried and failed: a file, a socket, a peer. Exit code 1.
    Failed,
    /// What was asked for makes no sense. Exit code 2.
    Usage,
    /// The state forbids it. Exit code 3; the text names the command that resolves it.
    Refused,
}

/// A failed replication operation: a sentence for the operator and a class for the program.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// Something was tried and failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Failed, message: message.into() }
    }

    /// An argument is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Usage, message: message.into() }
    }

    /// The state forbids it.
    pub fn refused(message: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Refused, message: message.into() }
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The process exit code: 1 failed, 2 usage, 3 refused because of the state.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Failed => 1,
            ErrorKind::Usage => 2,
            ErrorKind::Refused => 3,
        }
    }

    /// The same failure, with what was being done in front.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<brep_block::Error> for Error {
    fn from(error: brep_block::Error) -> Self {
        let kind = match error.exit_code() {
            3 => ErrorKind::Refused,
            _ => ErrorKind::Failed,
        };
        Error { kind, message: error.to_string() }
    }
}
