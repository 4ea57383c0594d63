use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ClientError, ConnectOptions};
use crate::proto::client::{
    ExportInfo, Goal, Handshake, HandshakeError, HandshakeOptions, ListedExport, Outcome, Progress,
};
use crate::proto::wire::{OptionCode, TransmissionMode};
use crate::tls::TlsClient;
use crate::{Endpoint, Stream};

/// How much is received at a time during the handshake, in bytes.
const RECEIVE_SIZE: usize = 16 << 10;

/// A stream after its handshake, and what came along with the last reply.
#[derive(Debug)]
pub(super) struct Negotiated {
    pub(super) stream: Stream,
    pub(super) outcome: Outcome,
    pub(super) rest: BytesMut,
}

/// A connection that a private option has turned into something else.
#[derive(Debug)]
pub struct PrivateConnection {
    /// The data of the server's reply; empty if it only acknowledged.
    pub reply: Bytes,
    /// The connection, from the end of the acknowledgement on.
    pub stream: Stream,
    /// What has been received of it already.
    pub rest: Bytes,
}

/// Connects, begins TLS if there is `tls`, sends one private option, and hands the connection
/// over. `timeout` bounds all of it.
///
/// # Errors
/// [`ClientError::Unsupported`] if the server does not know the option; everything else that can
/// go wrong until then.
pub async fn connect_private(
    endpoint: &Endpoint,
    tls: Option<&TlsClient>,
    option: u32,
    data: Bytes,
    timeout: Duration,
) -> Result<PrivateConnection, ClientError> {
    let options = HandshakeOptions {
        private_options: vec![(OptionCode(option), data)],
        ..without_export(Goal::Private)
    };
    let negotiated = negotiate(endpoint, tls, options, timeout).await?;
    let Negotiated { stream, mut outcome, rest } = negotiated;
    let reply = outcome.private_replies.pop().unwrap_or_default();
    Ok(PrivateConnection { reply, stream, rest: rest.freeze() })
}

/// The exports that a server is willing to list.
///
/// # Errors
/// No connection, a refusal, a violation of the protocol, or no answer within `timeout`.
pub async fn list_exports(
    endpoint: &Endpoint,
    tls: Option<&TlsClient>,
    timeout: Duration,
) -> Result<Vec<ListedExport>, ClientError> {
    let options = without_export(Goal::List);
    Ok(negotiate(endpoint, tls, options, timeout).await?.outcome.exports)
}

fn without_export(goal: Goal) -> HandshakeOptions {
    HandshakeOptions {
        goal,
        export: String::new(),
        private_options: Vec::new(),
        mode_max: TransmissionMode::Simple,
        contexts: Vec::new(),
        tls: false,
    }
}

/// What a server says of one of its exports, without opening it: size, flags, block sizes,
/// in which mode it would be used, and which meta contexts there are.
///
/// # Errors
/// As for [`list_exports`].
pub async fn describe_export(
    endpoint: &Endpoint,
    tls: Option<&TlsClient>,
    export: &str,
    timeout: Duration,
) -> Result<(ExportInfo, Outcome), ClientError> {
    let options = HandshakeOptions {
        export: export.to_owned(),
        mode_max: TransmissionMode::Extended,
        ..without_export(Goal::Describe)
    };
    let mut outcome = negotiate(endpoint, tls, options, timeout).await?.outcome;
    let info = outcome.export.take().ok_or_else(|| ClientError::Handshake {
        server: endpoint.to_string(),
        source: HandshakeError::NoExportInfo,
    })?;
    Ok((info, outcome))
}

/// Opens the export that the options name.
pub(super) async fn open(options: &ConnectOptions) -> Result<Negotiated, ClientError> {
    let private_options =
        options.private_options.iter().map(|(n, data)| (OptionCode(*n), data.clone())).collect();
    let handshake = HandshakeOptions {
        export: options.export.clone(),
        private_options,
        mode_max: options.mode_max,
        contexts: options.contexts.clone(),
        ..without_export(Goal::Transmit)
    };
    negotiate(&options.endpoint, options.tls.as_ref(), handshake, options.connect_timeout).await
}

async fn negotiate(
    endpoint: &Endpoint,
    tls: Option<&TlsClient>,
    mut options: HandshakeOptions,
    timeout: Duration,
) -> Result<Negotiated, ClientError> {
    options.tls = tls.is_some();
    let deadline = tokio::time::Instant::now() + timeout;
    let stream = endpoint.connect(timeout).await.map_err(|source| ClientError::Connect {
        server: endpoint.to_string(),
        source: Arc::new(source),
    })?;
    let handshake = shake_hands(endpoint, tls, stream, options);
    before(deadline, handshake).await.unwrap_or_else(|| {
        Err(ClientError::HandshakeTimedOut { server: endpoint.to_string(), timeout })
    })
}

async fn before<T>(deadline: tokio::time::Instant, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout_at(deadline, work).await.ok()
}

async fn shake_hands(
    endpoint: &Endpoint,
    tls: Option<&TlsClient>,
    mut stream: Stream,
    options: HandshakeOptions,
) -> Result<Negotiated, ClientError> {
    let server = || endpoint.to_string();
    let goal = options.goal;
    let mut handshake = Handshake::new(options);
    let mut input = BytesMut::new();
    loop {
        let progress = handshake.advance(&mut input).map_err(|source| {
            tracing::debug!(server = %endpoint, %source, "handshake failed");
            stream.say_goodbye(&handshake.abort());
            refused(server(), goal, source)
        })?;
        send(&mut stream, handshake.take_output()).await.map_err(|e| lost(server(), e))?;
        match (progress, tls) {
            (Progress::Done(outcome), _) => return Ok(Negotiated { stream, outcome, rest: input }),
            (Progress::StartTls, Some(tls)) => {
                let secured = tls.connect(endpoint, stream).await;
                stream = secured
                    .map_err(|e| ClientError::Tls { server: server(), source: Arc::new(e) })?;
                handshake.tls_started();
                continue;
            }
            (Progress::Input, _) | (Progress::StartTls, None) => {}
        }
        input.reserve(RECEIVE_SIZE);
        if stream.read_buf(&mut input).await.map_err(|e| lost(server(), e))? == 0 {
            return Err(ClientError::HandshakeClosed { server: server(), hint: hint(&handshake) });
        }
    }
}

async fn send(stream: &mut Stream, mut output: Bytes) -> io::Result<()> {
    stream.write_all_buf(&mut output).await?;
    stream.flush().await
}

/// With TLS 1.3 a server tells only after the handshake that it does not accept us.
fn lost(server: String, source: io::Error) -> ClientError {
    let of_tls = source.get_ref().is_some_and(|source| source.is::<rustls::Error>());
    let source = Arc::new(source);
    match of_tls {
        true => ClientError::Tls { server, source },
        false => ClientError::Lost { server, source },
    }
}

fn refused(server: String, goal: Goal, source: HandshakeError) -> ClientError {
    match source {
        HandshakeError::Unsupported(_) | HandshakeError::NotFixedNewstyle(_)
            if goal == Goal::Private =>
        {
            ClientError::Unsupported { server }
        }
        source => ClientError::Handshake { server, source },
    }
}

fn hint(handshake: &Handshake) -> &'static str {
    if handshake.asks_by_name_only() { " (is the name of the export right?)" } else { "" }
}
