//! Drives the handshake's state machine over a socket, within its deadline.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::connection::{Connection, Stop};
use super::exports::{Export, Exports, PrivateReply, Takeover};
use crate::Stream;
use crate::proto::server::{Agreed, Ending, Handshake, OptionError, OptionErrorCode, Step};

/// Most bytes that are asked of the socket at once.
const READ_LEN_MAX: usize = 64 << 10;

/// How a handshake has ended well.
pub(super) enum Outcome {
    /// Requests follow, beginning with what `input` holds.
    Transmission { export: Export, agreed: Box<Agreed>, input: BytesMut },
    /// Something other than NBD follows, beginning with what `input` holds.
    Takeover { then: Takeover, input: BytesMut },
}

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("{0}")]
    Ending(#[from] Ending),
    #[error("{0}")]
    Socket(#[from] io::Error),
    #[error("the client closed the connection")]
    Eof,
    #[error("the handshake took too long")]
    TimedOut,
    #[error("the connection was closed by the server")]
    Stopped,
}

pub(super) struct Driver<'a> {
    stream: &'a mut Stream,
    connection: &'a Arc<Connection>,
    exports: &'a dyn Exports,
    deadline: Instant,
    handshake: Handshake,
    input: BytesMut,
    opened: Option<Export>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        stream: &'a mut Stream,
        connection: &'a Arc<Connection>,
        exports: &'a dyn Exports,
        timeout: Duration,
    ) -> Self {
        Driver {
            stream,
            connection,
            exports,
            deadline: Instant::now() + timeout,
            handshake: Handshake::new(),
            input: BytesMut::with_capacity(1024),
            opened: None,
        }
    }

    pub(super) async fn run(mut self) -> Result<Outcome, HandshakeError> {
        loop {
            if self.connection.stop_level() >= Stop::ShutDown {
                self.handshake.shut_down();
            }
            let step = self.handshake.step(&mut self.input);
            // Sent before the next answer, so that the output never grows beyond that to one
            // option.
            self.send().await?;
            match step {
                Step::Input(missing) => self.receive(missing).await?,
                Step::List => self.handshake.listed(&self.exports.list()),
                Step::Open(name) => self.open(&name),
                Step::Private { option, data } => {
                    if let Some(then) = self.private(option, data).await? {
                        self.send().await?;
                        return Ok(Outcome::Takeover { then, input: self.input });
                    }
                }
                Step::Transmission(agreed) => return self.transmission(agreed),
                Step::Close(ending) => return Err(ending.into()),
            }
        }
    }

    fn open(&mut self, name: &str) {
        match self.exports.open(name, self.connection) {
            Ok(export) => {
                self.handshake.opened(Ok(export.info()));
                self.opened = Some(export);
            }
            Err(error) => self.handshake.opened(Err(error)),
        }
    }

    fn transmission(self, agreed: Box<Agreed>) -> Result<Outcome, HandshakeError> {
        // The option that leads here is the last one that was opened.
        let export = self.opened.ok_or(HandshakeError::Stopped)?;
        self.exports.begin(&export, self.connection);
        Ok(Outcome::Transmission { export, agreed, input: self.input })
    }

    async fn private(
        &mut self,
        option: u32,
        data: Bytes,
    ) -> Result<Option<Takeover>, HandshakeError> {
        let started = Instant::now();
        let reply = tokio::select! {
            biased;
            () = self.connection.stopped(Stop::Close) => return Err(HandshakeError::Stopped),
            reply = self.exports.private_option(self.connection, option, data) => reply,
        };
        self.deadline += started.elapsed();
        let mut takeover = None;
        self.handshake.answered(match reply {
            PrivateReply::Unsupported => {
                Err(OptionError::new(OptionErrorCode::Unsup, "unknown option"))
            }
            PrivateReply::Ack(data) => Ok(data),
            PrivateReply::Error(error) => Err(error),
            PrivateReply::Takeover { reply, then } => {
                takeover = Some(then);
                Ok(reply)
            }
        });
        Ok(takeover)
    }

    async fn send(&mut self) -> Result<(), HandshakeError> {
        let output = self.handshake.take_output();
        if output.is_empty() {
            return Ok(());
        }
        let stop = self.connection.stopped(Stop::Close);
        bounded(self.deadline, stop, self.stream.write_all(&output)).await
    }

    async fn receive(&mut self, missing: usize) -> Result<(), HandshakeError> {
        self.input.reserve(missing.min(READ_LEN_MAX));
        // What has been received is answered also in a shutdown; nothing more is waited for.
        let stop = self.connection.stopped(Stop::ShutDown);
        match bounded(self.deadline, stop, self.stream.read_buf(&mut self.input)).await? {
            0 => Err(HandshakeError::Eof),
            _ => Ok(()),
        }
    }
}

async fn bounded<T>(
    deadline: Instant,
    stop: impl Future<Output = ()>,
    operation: impl Future<Output = io::Result<T>>,
) -> Result<T, HandshakeError> {
    tokio::select! {
        biased;
        () = stop => Err(HandshakeError::Stopped),
        result = timeout_at(deadline, operation) => match result {
            Ok(result) => Ok(result?),
            Err(_) => Err(HandshakeError::TimedOut),
        },
    }
}
