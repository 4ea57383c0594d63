use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::connection::Connection;
use crate::Stream;
use crate::tls::TlsPeer;

/// The byte stream of a connection that no longer speaks NBD. It begins with what the client had
/// sent after the option that ended the handshake.
///
/// When the connection is closed, or its server shuts down, reads return the end of the stream
/// and writes fail with [`io::ErrorKind::BrokenPipe`], also those that are waiting.
#[derive(Debug)]
pub struct TakenStream {
    stream: Stream,
    early: BytesMut,
    stopping: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl TakenStream {
    pub(super) fn new(stream: Stream, early: BytesMut, connection: &Connection) -> Self {
        TakenStream { stream, early, stopping: Box::pin(connection.stopping()) }
    }

    /// Who is on the other side, if the stream is inside TLS.
    #[must_use]
    pub fn tls_peer(&self) -> Option<&Arc<TlsPeer>> {
        self.stream.tls_peer()
    }

    fn is_stopping(&mut self, cx: &mut Context<'_>) -> bool {
        self.stopping.as_mut().poll(cx).is_ready()
    }
}

impl AsyncRead for TakenStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_stopping(cx) {
            return Poll::Ready(Ok(()));
        }
        if !self.early.is_empty() {
            let count = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early[..count]);
            self.early.advance(count);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TakenStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_stopping(cx) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.is_stopping(cx) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
