//! What a simulator puts in the place of the network. No release has this.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::ReadBuf;

use crate::{Endpoint, Stream};

/// A future of a simulated network.
pub type Pending<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

/// Connects whoever asks in this thread.
pub trait Network {
    /// Connects to whoever listens there.
    fn connect(&self, endpoint: &Endpoint) -> Pending<Stream>;

    /// Listens.
    ///
    /// # Errors
    /// The address is in use.
    fn bind(&self, endpoint: &Endpoint) -> io::Result<Arc<dyn Acceptor>>;
}

/// A place where somebody listens, until it is dropped.
pub trait Acceptor: Send + Sync + fmt::Debug {
    /// The next one that connects.
    fn accept(&self) -> Pending<Stream>;
}

/// One end of a connection.
pub trait Pipe: Send + Sync + fmt::Debug {
    /// Whether something can be read, or the end has been reached.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Whether something can be written, or never again.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Reads what is there; nothing at the end.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is nothing yet.
    fn try_read(&self, buffer: &mut ReadBuf<'_>) -> io::Result<()>;

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none.
    fn try_write(&self, data: &[u8]) -> io::Result<usize>;

    /// Ends the direction from here to the other side.
    fn close(&self);

    /// Ends both directions at once.
    fn abort(&self);

    /// The other side, for messages.
    fn peer(&self) -> String;
}

thread_local! {
    static NETWORK: RefCell<Option<Rc<dyn Network>>> = const { RefCell::new(None) };
}

/// From now on this thread connects and listens there; with `None`, on real sockets again.
pub fn install(network: Option<Rc<dyn Network>>) {
    NETWORK.set(network);
}

pub(crate) fn connect(endpoint: &Endpoint) -> Option<Pending<Stream>> {
    let network = NETWORK.with_borrow(Clone::clone)?;
    Some(network.connect(endpoint))
}

pub(crate) fn bind(endpoint: &Endpoint) -> Option<io::Result<Arc<dyn Acceptor>>> {
    let network = NETWORK.with_borrow(Clone::clone)?;
    Some(network.bind(endpoint))
}

fn try_write_vectored(pipe: &dyn Pipe, buffers: &[io::IoSlice<'_>]) -> io::Result<usize> {
    let mut written = 0;
    for buffer in buffers.iter().filter(|buffer| !buffer.is_empty()) {
        match pipe.try_write(buffer) {
            Ok(some) if some == buffer.len() => written += some,
            Ok(some) => return Ok(written + some),
            Err(_) if written > 0 => return Ok(written),
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

pub(crate) fn poll_read(
    pipe: &dyn Pipe,
    cx: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    std::task::ready!(pipe.poll_readable(cx))?;
    Poll::Ready(pipe.try_read(buffer))
}

pub(crate) fn poll_write(
    pipe: &dyn Pipe,
    cx: &mut Context<'_>,
    buffers: &[io::IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    std::task::ready!(pipe.poll_writable(cx))?;
    Poll::Ready(try_write_vectored(pipe, buffers))
}
