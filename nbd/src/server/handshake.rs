//! Drives the handshake's state machine over a socket, within its deadline.

use std::future::Future;
use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::admission::{Entrance, Slot};
use super::config::ServerConfig;
use super::connection::{Connection, Stop};
use super::exports::{Export, Exports, Home, PrivateReply, Takeover, Wanted};
use crate::Stream;
use crate::proto::server::{
    Agreed, Ending, Handshake, OptionError, OptionErrorCode, Step, TlsPolicy,
};
use crate::tls::TlsServer;

/// Most bytes that are asked of the socket at once.
const READ_LEN_MAX: usize = 64 << 10;

/// How a handshake has ended well.
pub(super) enum Outcome {
    /// Requests follow, beginning with what `input` holds.
    Transmission {
        stream: Stream,
        export: Export,
        agreed: Box<Agreed>,
        input: BytesMut,
        slot: Option<Slot>,
    },
    /// Something other than NBD follows, beginning with what `input` holds.
    Takeover { stream: Stream, then: Takeover, input: BytesMut, slot: Option<Slot> },
    /// Another server goes on with it.
    Moved { home: Home, handshake: Box<Moved> },
}

/// A handshake that another server goes on with.
pub(super) struct Moved {
    pub(super) stream: Stream,
    handshake: Handshake,
    input: BytesMut,
    deadline: Instant,
}

impl Moved {
    /// Registers the stream with the runtime in which this is called.
    pub(super) fn rehome(mut self: Box<Self>) -> io::Result<Box<Self>> {
        self.stream = self.stream.rehome()?;
        Ok(self)
    }
}

/// Where a handshake begins.
pub(super) enum Begin {
    /// At its beginning.
    New(Stream, TlsPolicy),
    /// Where another server has left it.
    Moved(Box<Moved>),
}

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("{0}")]
    Ending(#[from] Ending),
    #[error("{0}")]
    Socket(#[from] io::Error),
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("the client closed the connection")]
    Eof,
    #[error("the handshake took too long")]
    TimedOut,
    #[error("the connection was closed by the server")]
    Stopped,
}

pub(super) struct Driver<'a> {
    stream: Stream,
    connection: &'a Arc<Connection>,
    entrance: Entrance,
    exports: &'a dyn Exports,
    tls: Option<&'a TlsServer>,
    deadline: Instant,
    handshake: Handshake,
    input: BytesMut,
    opened: Option<Export>,
    slot: Option<Slot>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        begin: Begin,
        connection: &'a Arc<Connection>,
        entrance: Entrance,
        exports: &'a dyn Exports,
        config: &'a ServerConfig,
    ) -> Self {
        let Moved { stream, handshake, input, deadline } = match begin {
            Begin::Moved(moved) => *moved,
            Begin::New(stream, policy) => Moved {
                stream,
                handshake: Handshake::new().with_tls(policy),
                input: BytesMut::with_capacity(1024),
                deadline: Instant::now() + config.handshake_timeout,
            },
        };
        connection.set_tls_peer(stream.tls_peer());
        let tls = config.tls.as_ref();
        Driver {
            stream,
            connection,
            entrance,
            exports,
            tls,
            deadline,
            handshake,
            input,
            opened: None,
            slot: None,
        }
    }

    pub(super) async fn run(mut self) -> Result<Outcome, HandshakeError> {
        loop {
            if self.connection.stop_level() >= Stop::ShutDown {
                self.handshake.shut_down();
            }
            let step = self.handshake.step(&mut self.input);
            if matches!(step, Step::Transmission(_)) {
                self.take_slot().await?;
            }
            // Sent before the next answer, so that the output never grows beyond that to one
            // option.
            self.send().await?;
            let wanted = match &step {
                Step::Open(name) => Some(Wanted::Export(name)),
                Step::Private { option, data } => Some(Wanted::Private(*option, data)),
                _ => None,
            };
            if let Some(home) = wanted.and_then(|wanted| self.exports.home(wanted)) {
                // Asked there again.
                let Driver { stream, handshake, input, deadline, .. } = self;
                let handshake = Box::new(Moved { stream, handshake, input, deadline });
                return Ok(Outcome::Moved { home, handshake });
            }
            match step {
                Step::Input(missing) => self.receive(missing).await?,
                Step::StartTls => {
                    let tls = self.tls.ok_or(HandshakeError::Stopped)?;
                    let stop = self.connection.stopped(Stop::ShutDown);
                    let secured = bounded(self.deadline, stop, tls.accept(self.stream)).await;
                    self.stream = secured.map_err(HandshakeError::in_tls)?;
                    self.connection.set_tls_peer(self.stream.tls_peer());
                    self.handshake.tls_started();
                    self.opened = None;
                }
                Step::List => self.handshake.listed(&self.exports.list()),
                Step::Open(name) => self.open(&name),
                Step::Private { option, data } => {
                    if let Some(then) = self.private(option, data).await? {
                        self.take_slot().await?;
                        self.send().await?;
                        let Driver { stream, input, slot, .. } = self;
                        return Ok(Outcome::Takeover { stream, then, input, slot });
                    }
                }
                Step::Transmission(agreed) => return self.transmission(agreed),
                Step::Close(ending) => {
                    self.stream.say_goodbye(&[]);
                    return Err(ending.into());
                }
            }
        }
    }

    fn open(&mut self, name: &str) {
        let opened = self.exports.open(name, self.connection);
        match opened.and_then(|export| export.admit(self.connection)) {
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
        let Driver { stream, input, slot, .. } = self;
        Ok(Outcome::Transmission { stream, export, agreed, input, slot })
    }

    /// Waits for a slot, for as long as the client does: until then it shall not believe that it is
    /// in. What it sends meanwhile is part of the input.
    async fn take_slot(&mut self) -> Result<(), HandshakeError> {
        self.slot = self.entrance.try_slot();
        if self.slot.is_some() {
            return Ok(());
        }
        let started = Instant::now();
        let Driver { stream, input, entrance, connection, .. } = self;
        let has_left = async {
            while input.len() < READ_LEN_MAX {
                input.reserve(1024);
                if !matches!(stream.read_buf(input).await, Ok(1..)) {
                    return;
                }
            }
            std::future::pending().await
        };
        let slot = tokio::select! {
            biased;
            () = connection.stopped(Stop::ShutDown) => return Err(HandshakeError::Stopped),
            slot = entrance.slot() => slot,
            () = has_left => return Err(HandshakeError::Eof),
        };
        self.slot = Some(slot);
        self.deadline += started.elapsed();
        Ok(())
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
        let send = async {
            self.stream.write_all(&output).await?;
            self.stream.flush().await
        };
        bounded(self.deadline, stop, send).await
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

impl HandshakeError {
    /// What goes wrong with the socket while TLS begins.
    fn in_tls(self) -> Self {
        match self {
            HandshakeError::Socket(error) => HandshakeError::Tls(error),
            other => other,
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
