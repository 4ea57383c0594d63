use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

#[cfg(feature = "simulation")]
use crate::simulation;
use crate::tls::{TlsPeer, TlsStream};

/// How long a TCP connection may be idle before the kernel probes the other side, and the pause
/// between probes: a dead peer is noticed after about a minute even if nothing is being sent.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// A connected byte stream, over TCP or a unix socket, in the clear or inside TLS.
///
/// Reads and writes go through [`AsyncRead`] and [`AsyncWrite`], vectored writes included. What
/// has been written to TLS may wait there until it is flushed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// TCP, without delays (`TCP_NODELAY`) and with keepalive probes.
    Tcp(TcpStream),
    /// A unix domain socket.
    Unix(UnixStream),
    /// One of the others, inside TLS.
    Tls(Box<TlsStream>),
    /// Whatever a simulator has put in their place.
    #[cfg(feature = "simulation")]
    Simulated(std::sync::Arc<dyn crate::simulation::Pipe>),
}

impl TryFrom<TcpStream> for Stream {
    type Error = io::Error;

    /// Sets the socket options that NBD wants.
    fn try_from(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let keepalive =
            TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL);
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        Ok(Stream::Tcp(stream))
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Stream::Unix(stream)
    }
}

impl Stream {
    /// Sends some last words and the end of the stream, as far as that is possible without
    /// waiting: a courtesy to somebody who may not be there any more.
    pub(crate) fn say_goodbye(&mut self, words: &[u8]) {
        let mut cx = Context::from_waker(Waker::noop());
        let mut stream = Pin::new(self);
        if !words.is_empty() {
            let _ = stream.as_mut().poll_write(&mut cx, words);
        }
        let _ = stream.as_mut().poll_shutdown(&mut cx);
    }

    /// The same stream, woken by the runtime in which this is called: for one that was accepted in
    /// another. TLS stays where it began.
    ///
    /// # Errors
    /// The socket cannot be registered.
    pub(crate) fn rehome(self) -> io::Result<Self> {
        Ok(match self {
            Stream::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream.into_std()?)?),
            Stream::Unix(stream) => Stream::Unix(UnixStream::from_std(stream.into_std()?)?),
            other => other,
        })
    }

    /// Who is on the other side, if the stream is inside TLS.
    #[must_use]
    pub fn tls_peer(&self) -> Option<&Arc<TlsPeer>> {
        match self {
            Stream::Tls(stream) => Some(stream.peer()),
            _ => None,
        }
    }

    /// Ends both directions at once; whoever waits on the stream wakes up.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn shutdown_now(&self) -> io::Result<()> {
        let socket = match self {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Unix(stream) => SockRef::from(stream),
            Stream::Tls(stream) => return stream.plain().shutdown_now(),
            #[cfg(feature = "simulation")]
            Stream::Simulated(pipe) => {
                pipe.abort();
                return Ok(());
            }
        };
        socket.shutdown(std::net::Shutdown::Both)
    }

    /// The other side, for messages.
    #[must_use]
    pub fn peer(&self) -> String {
        match self {
            Stream::Tcp(stream) => match stream.peer_addr() {
                Ok(address) => address.to_string(),
                Err(_) => "a lost TCP connection".to_owned(),
            },
            Stream::Unix(stream) => match stream.peer_cred() {
                Ok(credentials) => format!("unix socket, uid {}", credentials.uid()),
                Err(_) => "a lost unix socket".to_owned(),
            },
            Stream::Tls(stream) => stream.plain().peer(),
            #[cfg(feature = "simulation")]
            Stream::Simulated(pipe) => pipe.peer(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(feature = "simulation")]
            Stream::Simulated(pipe) => simulation::poll_read(&**pipe, cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(feature = "simulation")]
            Stream::Simulated(pipe) => simulation::poll_write(&**pipe, cx, &[IoSlice::new(buf)]),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            #[cfg(feature = "simulation")]
            Stream::Simulated(pipe) => simulation::poll_write(&**pipe, cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(feature = "simulation")]
            Stream::Simulated(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(feature = "simulation")]
            Stream::Simulated(pipe) => {
                pipe.close();
                Poll::Ready(Ok(()))
            }
        }
    }
}
