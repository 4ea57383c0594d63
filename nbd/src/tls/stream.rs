use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::ProtocolVersion;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::subject::subject;
use crate::Stream;

/// Who is on the other side of a TLS connection, and how it is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPeer {
    /// The subject of the other side's certificate, as RFC 4514 writes it: `CN=alpha,O=Example`.
    pub subject: String,
    /// Version of the protocol: `TLS 1.3`.
    pub version: &'static str,
}

impl fmt::Display for TlsPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.version, self.subject)
    }
}

/// A stream inside TLS.
///
/// What has been written may wait in it until it is flushed.
#[derive(Debug)]
pub struct TlsStream {
    stream: tokio_rustls::TlsStream<Box<Stream>>,
    peer: Arc<TlsPeer>,
}

impl TlsStream {
    pub(super) fn new(stream: tokio_rustls::TlsStream<Box<Stream>>) -> io::Result<Self> {
        let (_, session) = stream.get_ref();
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        let certificate =
            certificate.ok_or_else(|| refused("the other side has no certificate"))?;
        let version = match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
            Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
            _ => return Err(refused("neither TLS 1.2 nor 1.3")),
        };
        let subject =
            subject(certificate).ok_or_else(|| refused("its certificate is malformed"))?;
        Ok(TlsStream { peer: Arc::new(TlsPeer { subject, version }), stream })
    }

    /// Who is on the other side.
    #[must_use]
    pub fn peer(&self) -> &Arc<TlsPeer> {
        &self.peer
    }

    pub(crate) fn plain(&self) -> &Stream {
        self.stream.get_ref().0
    }
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.stream).poll_read(cx, buf)) {
            // Many end without a farewell of TLS. That somebody in between may have cut the
            // connection off is nothing new: whoever speaks NBD says himself when he is done.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
