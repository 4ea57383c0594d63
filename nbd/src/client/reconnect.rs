use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Result,
    WriteFlags, ZeroFlags,
};
use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::opened::Opened;
use super::{ClientError, ConnectOptions, Connection, ReconnectPolicy};

/// A device that connects later, and connects again when its connection was lost.
///
/// Until [`connect`](Self::connect) has succeeded its size is 0 and its requests fail with
/// [`ErrorKind::NotConnected`]. After a connection was lost, requests either fail at once or wait
/// for the next one and are sent again, as the [`ReconnectPolicy`] says. A server that violates
/// the protocol is not connected to again, except by an explicit `connect`. An export that came
/// back smaller, read-only, without flushes or with larger blocks is refused, and tried again
/// later; one that came back larger keeps its old size here.
///
/// The server's cache is not ours to know: if the *server's machine* lost power while it was
/// away, writes that had been acknowledged and not flushed are gone, and a later flush succeeds
/// all the same. Nor is it known whether a server that is still there goes on with a write whose
/// connection was lost: sent again, it may be overtaken by the first one after later writes to the same
/// place. An owner to whom this matters uses a [`Connection`], which ends when it is lost.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: ConnectOptions,
    policy: ReconnectPolicy,
    state: watch::Sender<State>,
    /// One attempt of [`Client::connect`] or [`Client::disconnect`] at a time.
    changing: tokio::sync::Mutex<()>,
    /// A flush has failed since the last explicit connect.
    flush_failed: AtomicBool,
}

#[derive(Debug, Clone)]
struct State {
    status: Status,
    /// What the export was when it was opened: it holds across reconnects.
    opened: Option<Opened>,
    keeper: Option<AbortHandle>,
    /// Counts explicit connects and disconnects: what a keeper of an earlier one still says in
    /// another thread is not heard.
    generation: u64,
}

#[derive(Debug, Clone)]
enum Status {
    Disconnected,
    Connected(Arc<Connection>),
    Reconnecting { since: Instant, reason: ClientError },
    Failed(ClientError),
}

/// How a [`Client`] stands.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ClientStatus {
    /// Not connected, and not trying.
    Disconnected,
    /// Connected.
    Connected,
    /// The connection was lost; attempts go on.
    Reconnecting {
        /// When it was lost.
        since: Instant,
        /// Why, or why the last attempt failed.
        reason: ClientError,
    },
    /// Given up.
    Failed {
        /// Why.
        reason: ClientError,
    },
}

impl Client {
    /// A device without a connection.
    #[must_use]
    pub fn new(options: ConnectOptions, policy: ReconnectPolicy) -> Self {
        let state =
            State { status: Status::Disconnected, opened: None, keeper: None, generation: 0 };
        Client {
            shared: Arc::new(Shared {
                options,
                policy,
                state: watch::Sender::new(state),
                changing: tokio::sync::Mutex::default(),
                flush_failed: AtomicBool::new(false),
            }),
        }
    }

    /// Connects, if it is not connected: afresh, so that the export may be another one than
    /// before. Attempts in the background end first.
    ///
    /// # Errors
    /// The last attempt's.
    pub async fn connect(&self) -> std::result::Result<(), ClientError> {
        let shared = &self.shared;
        let _changing = shared.changing.lock().await;
        if let Status::Connected(connection) = &shared.state.borrow().status
            && connection.failure().is_none()
        {
            return Ok(());
        }
        shared.stop_keeper(Status::Disconnected);
        let attempt = || Connection::connect(&shared.options);
        let connection = shared.policy.attempt(attempt).await?;
        shared.flush_failed.store(false, Ordering::Relaxed);
        shared.open(connection);
        Ok(())
    }

    /// Ends the connection once everything pending is answered, or the attempts at getting a new
    /// one. Requests that wait for one fail.
    pub async fn disconnect(&self) {
        let _changing = self.shared.changing.lock().await;
        if let Status::Connected(connection) = self.shared.stop_keeper(Status::Disconnected) {
            connection.close();
            connection.failed().await;
        }
    }

    /// How it stands now.
    #[must_use]
    pub fn status(&self) -> ClientStatus {
        self.shared.state.borrow().status.public()
    }

    /// Waits until the status is one that `accept` accepts, and returns it.
    pub async fn wait_for_status(
        &self,
        mut accept: impl FnMut(&ClientStatus) -> bool,
    ) -> ClientStatus {
        let mut states = self.shared.state.subscribe();
        loop {
            let status = states.borrow_and_update().status.public();
            // The sender lives as long as we do: waiting can't fail.
            if accept(&status) || states.changed().await.is_err() {
                return status;
            }
        }
    }

    /// The connection, if there is one now.
    #[must_use]
    pub fn connection(&self) -> Option<Arc<Connection>> {
        match &self.shared.state.borrow().status {
            Status::Connected(connection) => Some(Arc::clone(connection)),
            _ => None,
        }
    }

    /// The export may have grown since it was opened: its new part is not ours.
    fn check_range(&self, request: RequestRange) -> Result<()> {
        let RequestRange { operation, offset, len } = request;
        let opened = self.shared.state.borrow().opened;
        let Some(Opened { size, .. }) = opened else { return Ok(()) };
        if len == 0 || (offset <= size && len <= size - offset) {
            return Ok(());
        }
        (self as &dyn BlockDevice).check_range(operation, offset, len)
    }

    /// Sends a request over the connection that there is, or as the policy says.
    fn run<T: Send + 'static>(
        &self,
        request: RequestRange,
        start: impl Fn(&Connection) -> Io<'static, T> + Send + Sync + 'static,
    ) -> Io<'_, T> {
        if let Err(error) = self.check_range(request) {
            return Io::err(error);
        }
        let waits = !self.shared.policy.delay.is_zero();
        let connection = match &self.shared.state.borrow().status {
            Status::Connected(connection) => Arc::clone(connection),
            Status::Reconnecting { .. } if waits => {
                let shared = Arc::clone(&self.shared);
                return Io::future(shared.run_later(request, start, None));
            }
            status => return Io::err(self.shared.unconnected(request, status)),
        };
        match start(&connection) {
            done @ Io::Ready(Ok(_)) => done,
            io if !waits => io,
            io => {
                let shared = Arc::clone(&self.shared);
                Io::future(shared.run_later(request, start, Some((connection, io))))
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // What is pending on the connection is still answered.
        self.shared.stop_keeper(Status::Disconnected);
    }
}

/// What a request is called in an error.
#[derive(Debug, Clone, Copy)]
struct RequestRange {
    operation: Operation,
    offset: u64,
    len: u64,
}

impl RequestRange {
    fn changes(self) -> bool {
        matches!(self.operation, Operation::Write | Operation::WriteZeroes | Operation::Discard)
    }
}

impl Shared {
    /// Adopts a first connection, and starts the task that replaces it when it is lost.
    fn open(self: &Arc<Self>, connection: Arc<Connection>) {
        let opened = Opened::of(&connection);
        self.state.send_modify(|state| {
            state.generation += 1;
            let keeper = Keeper { shared: Arc::clone(self), generation: state.generation, opened };
            let keeper = tokio::spawn(keeper.run(Arc::clone(&connection)));
            state.status = Status::Connected(connection);
            state.opened = Some(opened);
            state.keeper = Some(keeper.abort_handle());
        });
    }

    /// Returns the status that there was.
    fn stop_keeper(&self, status: Status) -> Status {
        let mut old = Status::Disconnected;
        self.state.send_modify(|state| {
            if let Some(keeper) = state.keeper.take() {
                keeper.abort();
            }
            state.generation += 1;
            state.opened = None;
            old = std::mem::replace(&mut state.status, status);
        });
        old
    }

    fn unconnected(&self, request: RequestRange, status: &Status) -> Error {
        let reason = match status {
            Status::Reconnecting { reason, .. } | Status::Failed(reason) => reason.clone(),
            Status::Disconnected | Status::Connected(_) => ClientError::NotConnected,
        };
        let RequestRange { operation, offset, len } = request;
        Error::new(operation, reason.kind(), self.options.name.as_str(), reason.to_string())
            .at(offset, len)
    }

    /// Awaits a request, and sends it again over later connections until the delay is over.
    async fn run_later<T: Send + 'static>(
        self: Arc<Self>,
        request: RequestRange,
        start: impl Fn(&Connection) -> Io<'static, T> + Send + Sync + 'static,
        mut sent: Option<(Arc<Connection>, Io<'static, T>)>,
    ) -> Result<T> {
        let mut give_up: Option<Instant> = None;
        loop {
            if let Some((connection, io)) = sent.take() {
                let result = io.await;
                let again = match &result {
                    Ok(_) => false,
                    Err(error) => match error.kind() {
                        ErrorKind::NotConnected => true,
                        // The server may carry it out at any time: sent again, it could undo what
                        // is written after it.
                        ErrorKind::TimedOut => !request.changes() && connection.failure().is_some(),
                        // Not begun, as no further one will be: the server is leaving.
                        ErrorKind::Shutdown => {
                            connection.close();
                            true
                        }
                        _ => false,
                    },
                };
                if !again || give_up.is_some_and(|deadline| deadline <= Instant::now()) {
                    return result;
                }
                self.wait_until_replaced(&connection).await;
                if connection.flush_has_failed() {
                    self.flush_failed.store(true, Ordering::Relaxed);
                }
            }
            let connection = self.wait_for_connection(request, &mut give_up).await?;
            if request.operation == Operation::Flush {
                self.check_flushes()?;
            }
            let io = start(&connection);
            sent = Some((connection, io));
        }
    }

    /// What a server could not flush may be told once only, and on a connection that has ended.
    fn check_flushes(&self) -> Result<()> {
        if !self.flush_failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let detail = "a flush has failed before the last reconnect; what was lost is not known";
        Err(Error::new(Operation::Flush, ErrorKind::Sticky, self.options.name.as_str(), detail))
    }

    /// The keeper may hear of the end a little later than we do.
    async fn wait_until_replaced(&self, old: &Arc<Connection>) {
        let mut states = self.state.subscribe();
        let other = |state: &State| match &state.status {
            Status::Connected(connection) => !Arc::ptr_eq(connection, old),
            _ => true,
        };
        // Fails only if there is no sender, and we are it.
        let _ = states.wait_for(other).await;
    }

    async fn wait_for_connection(
        &self,
        request: RequestRange,
        give_up: &mut Option<Instant>,
    ) -> Result<Arc<Connection>> {
        let mut states = self.state.subscribe();
        loop {
            let status = states.borrow_and_update().status.clone();
            let deadline = match &status {
                Status::Connected(connection) => return Ok(Arc::clone(connection)),
                Status::Reconnecting { since, .. } => {
                    *give_up.get_or_insert(*since + self.policy.delay)
                }
                Status::Disconnected | Status::Failed(_) => {
                    return Err(self.unconnected(request, &status));
                }
            };
            if timeout_at(deadline, states.changed()).await.is_err() {
                return Err(self.unconnected(request, &status));
            }
        }
    }
}

/// The task that replaces a connection each time it is lost.
struct Keeper {
    shared: Arc<Shared>,
    generation: u64,
    opened: Opened,
}

impl Keeper {
    /// Waits for the connection's end and gets another one, for ever.
    async fn run(self, mut connection: Arc<Connection>) {
        let device = self.shared.options.name.as_str();
        let policy = &self.shared.policy;
        let mut pauses = policy.pauses();
        loop {
            let begun = Instant::now();
            let reason = connection.failed().await;
            if connection.flush_has_failed() {
                self.shared.flush_failed.store(true, Ordering::Relaxed);
            }
            drop(connection);
            tracing::warn!(device, %reason, "connection lost");
            if reason.is_permanent() {
                return self.set(Status::Failed(reason));
            }
            let since = Instant::now();
            self.set(Status::Reconnecting { since, reason });
            // One that was let in and sent away at once would come back as fast as it can.
            if since - begun < policy.pause_first {
                sleep(pauses.next().unwrap_or(policy.pause_max)).await;
            } else {
                pauses = policy.pauses();
            }
            match self.reconnect(since).await {
                Ok(new) => connection = new,
                Err(reason) => return self.set(Status::Failed(reason)),
            }
            tracing::info!(device, "connected again");
            self.set(Status::Connected(Arc::clone(&connection)));
        }
    }

    async fn reconnect(&self, since: Instant) -> std::result::Result<Arc<Connection>, ClientError> {
        let policy = &self.shared.policy;
        let mut pauses = policy.pauses();
        loop {
            let attempt = Connection::connect(&self.shared.options).await;
            let checked = attempt.and_then(|new| {
                self.opened.check(&new, &self.shared.options)?;
                Ok(new)
            });
            let reason = match checked {
                Ok(connection) => return Ok(connection),
                Err(reason) if reason.is_permanent() => return Err(reason),
                Err(reason) => reason,
            };
            tracing::debug!(device = self.shared.options.name, %reason, "no connection yet");
            self.set(Status::Reconnecting { since, reason });
            sleep(pauses.next().unwrap_or(policy.pause_max)).await;
        }
    }

    fn set(&self, status: Status) {
        self.shared.state.send_modify(|state| {
            if state.generation == self.generation {
                state.status = status;
            }
        });
    }
}

impl Status {
    fn public(&self) -> ClientStatus {
        match self {
            Status::Disconnected => ClientStatus::Disconnected,
            Status::Connected(_) => ClientStatus::Connected,
            Status::Reconnecting { since, reason } => {
                ClientStatus::Reconnecting { since: *since, reason: reason.clone() }
            }
            Status::Failed(reason) => ClientStatus::Failed { reason: reason.clone() },
        }
    }
}

impl BlockDevice for Client {
    fn name(&self) -> &str {
        &self.shared.options.name
    }

    fn size(&self) -> u64 {
        self.shared.state.borrow().opened.map_or(0, |opened| opened.size)
    }

    fn limits(&self) -> Limits {
        self.shared.state.borrow().opened.map_or_else(Limits::default, |opened| opened.limits)
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let request = RequestRange { operation: Operation::Read, offset, len: len as u64 };
        self.run(request, move |connection| connection.start_read(offset, len))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        let request = RequestRange { operation: Operation::Write, offset, len };
        self.run(request, move |connection| connection.start_write(offset, data.clone(), flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let request = RequestRange { operation: Operation::WriteZeroes, offset, len };
        self.run(request, move |connection| connection.start_write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let request = RequestRange { operation: Operation::Discard, offset, len };
        self.run(request, move |connection| connection.start_discard(offset, len))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        let request = RequestRange { operation: Operation::BlockStatus, offset, len };
        self.run(request, move |connection| connection.start_block_status(offset, len))
    }

    fn extents(&self, offset: u64, len: u64) -> Io<'_, Vec<BlockStatus>> {
        let request = RequestRange { operation: Operation::BlockStatus, offset, len };
        self.run(request, move |connection| connection.start_extents(offset, len))
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        let request = RequestRange { operation: Operation::Flush, offset: 0, len: 0 };
        if let Err(error) = self.shared.check_flushes() {
            return Io::err(error);
        }
        self.run(request, move |connection| connection.start_flush(level))
    }
}
