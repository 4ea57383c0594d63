use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::proto::client::{HandshakeError, ReplyError};
use brep_block::ErrorKind;

/// Why there is no connection, or no longer.
///
/// Cloning is cheap: one lost connection is told to everybody who waits for it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ClientError {
    #[error("cannot connect to {server}: {source}")]
    Connect { server: String, source: Arc<io::Error> },
    /// The server accepted the connection but did not answer in time.
    #[error("{server} did not finish the handshake within {timeout:?}")]
    HandshakeTimedOut { server: String, timeout: Duration },
    #[error("{server} closed the connection during the handshake{hint}")]
    HandshakeClosed { server: String, hint: &'static str },
    #[error("{server}: {source}")]
    Handshake { server: String, source: HandshakeError },
    /// The server does not know the private option: it is something else than brep.
    #[error("{server} does not support this option")]
    Unsupported { server: String },
    /// TLS came to nothing: a certificate was not accepted, or the names do not fit.
    #[error("no TLS with {server}: {source}")]
    Tls { server: String, source: Arc<io::Error> },
    #[error("connection to {server} lost: {source}")]
    Lost { server: String, source: Arc<io::Error> },
    #[error("connection to {server} lost: the server closed it")]
    ClosedByServer { server: String },
    #[error("{server} violated the protocol: {source}")]
    Violation { server: String, source: ReplyError },
    #[error("{server} did not answer a request within {timeout:?}")]
    RequestTimedOut { server: String, timeout: Duration },
    /// [`close`](crate::client::Connection::close) or
    /// [`kill`](crate::client::Connection::kill) was called.
    #[error("connection to {server} closed")]
    Closed { server: String },
    #[error("not connected")]
    NotConnected,
    /// What came back after a reconnect is not what was lost.
    #[error("{server}: the export has changed: {reason}")]
    Incompatible { server: String, reason: String },
    #[error("the runtime that the connection to {server} ran on has ended")]
    RuntimeEnded { server: String },
}

impl ClientError {
    /// The server broke the protocol: trying again can't help.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            ClientError::Handshake { source, .. } => source.is_violation(),
            ClientError::Violation { .. } => true,
            _ => false,
        }
    }

    /// The kind with which requests fail because of this.
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            ClientError::RequestTimedOut { .. } => ErrorKind::TimedOut,
            _ => ErrorKind::NotConnected,
        }
    }
}
