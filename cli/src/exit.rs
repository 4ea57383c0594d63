//! How a command ends: a message for people and a code for scripts.
use std::fmt;

use brep_replication::control::ClientError;

/// The exit codes that all commands share (`image check` and `image compare` have their own).
pub(crate) const OK: u8 = 0;
pub(crate) const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const REFUSED: u8 = 3;

/// The outcome of a command: its exit code, or why it failed.
pub(crate) type Outcome = Result<u8, Failure>;

/// A failed command.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) error: anyhow::Error,
}

impl Failure {
    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self::new(FAILED, message)
    }

    /// What was typed makes no sense.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(USAGE, message)
    }

    pub(crate) fn new(code: u8, message: impl fmt::Display) -> Self {
        Failure { code, error: anyhow::anyhow!("{message}") }
    }

    /// The same failure, with what was being done in front.
    pub(crate) fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Self {
        Failure { error: self.error.context(what), ..self }
    }

    /// The same failure under another exit code.
    pub(crate) fn with_code(self, code: u8) -> Self {
        Failure { code, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.error.to_string();
        for cause in self.error.chain().skip(1).map(ToString::to_string) {
            // Some errors say themselves what they come from.
            if !text.ends_with(&cause) {
                text.push_str(": ");
                text.push_str(&cause);
            }
        }
        f.write_str(&text)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Failure { code: FAILED, error }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure { code: FAILED, error: error.into() }
    }
}

impl From<brep_block::Error> for Failure {
    fn from(error: brep_block::Error) -> Self {
        Failure { code: error.exit_code(), error: error.into() }
    }
}

impl From<brep_replication::Error> for Failure {
    fn from(error: brep_replication::Error) -> Self {
        Failure { code: error.exit_code(), error: error.into() }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Failure { code: error.exit_code(), error: error.into() }
    }
}
