use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ClientError, ConnectOptions};
use crate::proto::client::{
    ExportInfo, Goal, Handshake, HandshakeError, HandshakeOptions, ListedExport, Outcome,
};
use crate::proto::wire::OptionCode;
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

/// Connects, sends one private option, and hands the connection over. `timeout` bounds all of
/// it.
///
/// # Errors
/// [`ClientError::Unsupported`] if the server does not know the option; everything else that can
/// go wrong until then.
pub async fn connect_private(
    endpoint: &Endpoint,
    option: u32,
    data: Bytes,
    timeout: Duration,
) -> Result<PrivateConnection, ClientError> {
    let options = HandshakeOptions {
        goal: Goal::Private,
        export: String::new(),
        private_options: vec![(OptionCode(option), data)],
        structured_replies: false,
    };
    let Negotiated { stream, mut outcome, rest } = negotiate(endpoint, options, timeout).await?;
    let reply = outcome.private_replies.pop().unwrap_or_default();
    Ok(PrivateConnection { reply, stream, rest: rest.freeze() })
}

/// The exports that a server is willing to list.
///
/// # Errors
/// No connection, a refusal, a violation of the protocol, or no answer within `timeout`.
pub async fn list_exports(
    endpoint: &Endpoint,
    timeout: Duration,
) -> Result<Vec<ListedExport>, ClientError> {
    let options = HandshakeOptions {
        goal: Goal::List,
        export: String::new(),
        private_options: Vec::new(),
        structured_replies: false,
    };
    Ok(negotiate(endpoint, options, timeout).await?.outcome.exports)
}

/// What a server says of one of its exports, without opening it: size, flags, block sizes, and
/// whether structured replies and `base:allocation` are there.
///
/// # Errors
/// As for [`list_exports`].
pub async fn describe_export(
    endpoint: &Endpoint,
    export: &str,
    timeout: Duration,
) -> Result<(ExportInfo, Outcome), ClientError> {
    let options = HandshakeOptions {
        goal: Goal::Describe,
        export: export.to_owned(),
        private_options: Vec::new(),
        structured_replies: true,
    };
    let mut outcome = negotiate(endpoint, options, timeout).await?.outcome;
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
        goal: Goal::Transmit,
        export: options.export.clone(),
        private_options,
        structured_replies: options.want_structured,
    };
    negotiate(&options.endpoint, handshake, options.connect_timeout).await
}

async fn negotiate(
    endpoint: &Endpoint,
    options: HandshakeOptions,
    timeout: Duration,
) -> Result<Negotiated, ClientError> {
    let deadline = tokio::time::Instant::now() + timeout;
    let mut stream = endpoint.connect(timeout).await.map_err(|source| ClientError::Connect {
        server: endpoint.to_string(),
        source: Arc::new(source),
    })?;
    let mut rest = BytesMut::new();
    let handshake = shake_hands(endpoint, &mut stream, &mut rest, options);
    let outcome = before(deadline, handshake).await.unwrap_or_else(|| {
        Err(ClientError::HandshakeTimedOut { server: endpoint.to_string(), timeout })
    })?;
    Ok(Negotiated { stream, outcome, rest })
}

async fn before<T>(deadline: tokio::time::Instant, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout_at(deadline, work).await.ok()
}

async fn shake_hands(
    endpoint: &Endpoint,
    stream: &mut Stream,
    input: &mut BytesMut,
    options: HandshakeOptions,
) -> Result<Outcome, ClientError> {
    let server = || endpoint.to_string();
    let lost = |source| ClientError::Lost { server: server(), source: Arc::new(source) };
    let goal = options.goal;
    let mut handshake = Handshake::new(options);
    loop {
        let advanced = handshake.advance(input);
        if let Err(source) = &advanced {
            let farewell = handshake.abort();
            tracing::debug!(server = %endpoint, %source, "handshake failed");
            // The server may be gone, or not listening: this is a courtesy.
            let _ = stream.try_write_vectored(&[std::io::IoSlice::new(&farewell)]);
        }
        let done = advanced.map_err(|source| refused(server(), goal, source))?;
        let mut output = handshake.take_output();
        stream.write_all_buf(&mut output).await.map_err(lost)?;
        if let Some(outcome) = done {
            return Ok(outcome);
        }
        input.reserve(RECEIVE_SIZE);
        if stream.read_buf(input).await.map_err(lost)? == 0 {
            return Err(ClientError::HandshakeClosed { server: server(), hint: hint(&handshake) });
        }
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
