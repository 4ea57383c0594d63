use std::any::Any;
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};

use futures_util::task::AtomicWaker;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::tls::TlsPeer;

/// How urgently a connection has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stop {
    /// It goes on.
    No,
    /// Requests in flight are finished and answered, later ones refused; then it ends.
    ShutDown,
    /// Nothing more is read; requests in flight are finished; then it ends.
    Close,
    /// What is not done is answered with `ESHUTDOWN`, as far as the client takes that without
    /// being waited for; then it ends.
    Abort,
}

impl Stop {
    fn from_level(level: u8) -> Self {
        match level {
            0 => Stop::No,
            1 => Stop::ShutDown,
            2 => Stop::Close,
            _ => Stop::Abort,
        }
    }
}

/// What a connection has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Requests that were received, refused ones included.
    pub requests: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Bytes that came over the socket during transmission.
    pub bytes_received: u64,
    /// Bytes that went over the socket during transmission.
    pub bytes_sent: u64,
}

/// One client of a server, from the moment it was accepted.
pub struct Connection {
    id: u64,
    peer: String,
    stop: AtomicU8,
    /// Wakes the one task that runs this connection.
    task: AtomicWaker,
    stopping: CancellationToken,
    /// The connection's task, and what goes on behind it.
    active: AtomicUsize,
    ended: CancellationToken,
    export_name: OnceLock<String>,
    tls_peer: OnceLock<Arc<TlsPeer>>,
    data: Mutex<Option<Arc<dyn Any + Send + Sync>>>,
    /// The client has announced its end.
    disconnected: AtomicBool,
    pub(super) requests: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
}

impl Connection {
    /// Lasts until [`release`](Self::release).
    pub(super) fn new(id: u64, peer: String) -> Arc<Self> {
        Arc::new(Connection {
            id,
            peer,
            stop: AtomicU8::new(Stop::No as u8),
            task: AtomicWaker::new(),
            stopping: CancellationToken::new(),
            active: AtomicUsize::new(1),
            ended: CancellationToken::new(),
            export_name: OnceLock::new(),
            tls_peer: OnceLock::new(),
            data: Mutex::default(),
            disconnected: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
        })
    }

    /// Unique within the server; later connections have higher ones.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The other side, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The canonical name of the export in use; none during the handshake.
    pub fn export_name(&self) -> Option<&str> {
        self.export_name.get().map(String::as_str)
    }

    /// Whose certificate the client has shown; none as long as it speaks in the clear.
    pub fn tls_peer(&self) -> Option<&Arc<TlsPeer>> {
        self.tls_peer.get()
    }

    /// Ends the connection: no further request is read, those that were started finish, then the
    /// socket is closed. Returns at once; [`closed`](Self::closed) waits. A byte stream that was
    /// taken over reads as ended from now on.
    pub fn close(&self) {
        self.stop(Stop::Close);
    }

    /// Ends the connection more gently: what has been started is finished and answered, what still
    /// comes until then is refused with `ESHUTDOWN`, then the socket is closed. A client that does
    /// not take its answers is waited for; [`close`](Self::close) ends that.
    pub fn shut_down(&self) {
        self.stop(Stop::ShutDown);
    }

    /// Resolves when the connection has ended *and* every operation that it started on a device
    /// has completed: after that it changes nothing any more. A client that does not take its
    /// replies does not delay this.
    pub async fn closed(&self) {
        self.ended.cancelled().await;
    }

    /// Whether [`closed`](Self::closed) would resolve at once.
    pub fn is_closed(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Whether the client has ended the transmission itself, by `NBD_CMD_DISC`; if not, requests
    /// of it may have been lost on the way.
    pub fn has_disconnected(&self) -> bool {
        self.disconnected.load(Ordering::Acquire)
    }

    pub(super) fn note_disconnect(&self) {
        self.disconnected.store(true, Ordering::Release);
    }

    /// Attaches something of the user's, in place of what was attached before.
    pub fn set_data(&self, data: Arc<dyn Any + Send + Sync>) {
        *lock(&self.data) = Some(data);
    }

    /// What the user has attached.
    pub fn data(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        lock(&self.data).clone()
    }

    /// What the connection has done so far.
    pub fn counters(&self) -> Counters {
        Counters {
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            bytes_received: self.bytes_received.load(Ordering::Relaxed),
            bytes_sent: self.bytes_sent.load(Ordering::Relaxed),
        }
    }

    pub(super) fn set_tls_peer(&self, peer: Option<&Arc<TlsPeer>>) {
        // TLS begins once.
        let _ = peer.map(|peer| self.tls_peer.set(Arc::clone(peer)));
    }

    pub(super) fn set_export_name(&self, name: &str) {
        // A connection chooses its export once.
        let _ = self.export_name.set(name.to_owned());
    }

    /// Asks the connection to end, or to end sooner than it was asked before.
    pub(super) fn stop(&self, stop: Stop) {
        self.stop.fetch_max(stop as u8, Ordering::AcqRel);
        self.stopping.cancel();
        self.task.wake();
    }

    pub(super) fn stop_level(&self) -> Stop {
        Stop::from_level(self.stop.load(Ordering::Acquire))
    }

    /// Resolves when the connection is asked to end at least this urgently. Only for the
    /// connection's own task: there is one waker.
    pub(super) async fn stopped(&self, stop: Stop) {
        poll_fn(|cx| {
            self.register(cx.waker());
            if self.stop_level() >= stop { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// For whoever runs next to the connection's task.
    pub(super) fn stopping(&self) -> WaitForCancellationFutureOwned {
        self.stopping.clone().cancelled_owned()
    }

    /// The connection's task is to be woken by stops.
    pub(super) fn register(&self, waker: &Waker) {
        self.task.register(waker);
    }

    /// The connection's task, or something that went on behind it, has come to its end.
    pub(super) fn release(&self) {
        if self.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.ended.cancel();
        }
    }

    /// From now on the connection has not ended before what is returned is dropped.
    pub(super) fn hold(self: &Arc<Self>) -> Held {
        self.active.fetch_add(1, Ordering::AcqRel);
        Held(Arc::clone(self))
    }
}

/// Something of a connection that goes on.
pub(super) struct Held(Arc<Connection>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("id", &self.id)
            .field("peer", &self.peer)
            .field("export", &self.export_name())
            .field("stop", &self.stop_level())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
