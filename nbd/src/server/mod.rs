//! An NBD server: serves block devices to clients over TCP and unix sockets.
//!
//! A [`Server`] asks its [`Exports`] what there is and gives each client its [`Export`];
//! [`StaticExports`] is a table of them. Every client is a [`Connection`], which can be watched,
//! closed, and drained.

mod admission;
mod arriving;
mod budget;
mod config;
mod connection;
mod contexts;
mod execute;
mod exports;
mod handshake;
mod holes;
mod listener;
mod running;
mod seats;
mod session;
mod static_exports;
mod taken;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::config::ServerConfig;
pub use self::connection::{Connection, Counters};
pub use self::contexts::{ContextStatus, MetaContext};
pub use self::exports::{Export, Exports, Home, PrivateReply, Takeover, Wanted};
pub use self::listener::{BindError, Listener};
pub use self::static_exports::StaticExports;
pub use self::taken::TakenStream;
pub use crate::proto::server::{ExportDescription, OptionError, OptionErrorCode};

use self::admission::{Admission, Entrance};
use self::budget::Budget;
use self::connection::Stop;
use self::contexts::Target;
use self::handshake::{Begin, Driver, HandshakeError, Moved, Outcome};
use self::seats::Seats;
use self::session::Session;
use crate::proto::server::{Ending, TlsPolicy};
use crate::{Endpoint, Stream};

/// How long to wait before accepting again when the system is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long connections that are cut off may take to say so.
const LEAVE_TIME: Duration = Duration::from_secs(1);

/// Serves exports to any number of clients on any number of listeners.
///
/// Connections run as tasks of the runtime in which [`serve`](Self::serve) is called, or of those that
/// [`ServerConfig::runtimes`] names. A connection on a current-thread runtime stays in one thread,
/// which is the fastest way.
pub struct Server {
    exports: Arc<dyn Exports>,
    config: ServerConfig,
    budget: Budget,
    seats: Seats,
    admission: Arc<Admission>,
    connections: Mutex<BTreeMap<u64, Arc<Connection>>>,
    next_id: AtomicU64,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// A server that serves nobody yet.
    pub fn new(exports: Arc<dyn Exports>, config: ServerConfig) -> Arc<Self> {
        Arc::new(Server {
            budget: Budget::new(config.server_bytes_max),
            seats: Seats::new(&config.runtimes),
            admission: Admission::new(&config),
            exports,
            config,
            connections: Mutex::default(),
            next_id: AtomicU64::new(1),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Listens; see [`Listener::bind`]. Clients connect from now on and wait for
    /// [`serve`](Self::serve).
    ///
    /// # Errors
    /// If the address is not to be had.
    pub async fn bind(endpoint: &Endpoint) -> Result<Listener, BindError> {
        Listener::bind(endpoint).await
    }

    /// Accepts clients until the server is shut down. May run for several listeners at a time.
    /// Dropping the future stops accepting; connections go on.
    pub async fn serve(self: &Arc<Self>, listener: Listener) {
        let policy = self.config.tls_policy(listener.tls_optional);
        let accepting = async {
            loop {
                match listener.accept().await {
                    Ok(stream) => {
                        // Without room the others wait in the queue of the socket.
                        self.admission.room().await;
                        self.spawn(stream, policy);
                    }
                    // The client has gone again before it was accepted.
                    Err(error) if is_of_the_client(&error) => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept NBD clients on {}", listener.endpoint());
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = self.stopping.cancelled() => {}
            () = accepting => {}
        }
    }

    /// Ends the server: no client is accepted any more; requests that are being worked on are
    /// finished and answered, later ones refused with `ESHUTDOWN`, options with `ERR_SHUTDOWN`;
    /// then each connection is closed. What is not done after `grace` is answered with `ESHUTDOWN`
    /// too, and the remaining connections are closed without waiting for anybody. Operations that
    /// still run on a device then go on, long ones to the end of a piece: [`Connection::closed`]
    /// tells when they have ended.
    pub async fn shutdown(&self, grace: Duration) {
        self.stopping.cancel();
        self.tasks.close();
        for connection in self.connections() {
            connection.stop(Stop::ShutDown);
        }
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_err() {
            for connection in self.connections() {
                connection.stop(Stop::Abort);
            }
            // They need nothing but their turn. A device that blocks a thread may keep it from them.
            if tokio::time::timeout(LEAVE_TIME, self.tasks.wait()).await.is_err() {
                tracing::warn!("NBD connections are left behind: a device holds their thread up");
            }
        }
    }

    /// The connections there are, oldest first.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        self.table().values().cloned().collect()
    }

    /// Payload bytes that requests and unsent replies of all connections hold.
    pub fn bytes_in_flight(&self) -> u64 {
        self.budget.used()
    }

    fn spawn(self: &Arc<Self>, stream: Stream, policy: TlsPolicy) {
        let mut registration = self.register(stream.peer());
        let Some((runtime, seat)) = self.seats.take() else {
            self.tasks.spawn(async move {
                registration.run(Begin::New(stream, policy)).await;
            });
            return;
        };
        let seated = async move {
            let _seat = seat;
            match stream.rehome() {
                Ok(stream) => registration.run(Begin::New(stream, policy)).await,
                Err(error) => tracing::warn!(%error, "an NBD client is lost"),
            }
        };
        self.tasks.spawn_on(seated, runtime);
    }

    /// Goes on with a client of another server, in `runtime`.
    fn adopt(self: &Arc<Self>, moved: Box<Moved>, runtime: &tokio::runtime::Handle) {
        let server = Arc::clone(self);
        let adopted = async move {
            tokio::select! {
                biased;
                () = server.stopping.cancelled() => return,
                () = server.admission.room() => {}
            }
            let mut registration = server.register(moved.stream.peer());
            match moved.rehome() {
                Ok(moved) => registration.run(Begin::Moved(moved)).await,
                Err(error) => tracing::warn!(%error, "an NBD client is lost"),
            }
        };
        self.tasks.spawn_on(adopted, runtime);
    }

    fn register(self: &Arc<Self>, peer: String) -> Registration {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Connection::new(id, peer);
        self.table().insert(id, Arc::clone(&connection));
        if self.stopping.is_cancelled() {
            connection.stop(Stop::ShutDown);
        }
        let entrance = Some(self.admission.enter(&connection));
        Registration { server: Arc::clone(self), connection, entrance }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Connection>>> {
        // No code that can panic runs under this lock.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("config", &self.config).finish_non_exhaustive()
    }
}

fn is_of_the_client(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted | Kind::ConnectionReset | Kind::Interrupted | Kind::NotConnected
    )
}

/// A connection in the server's table; it leaves the table however its task ends.
struct Registration {
    server: Arc<Server>,
    connection: Arc<Connection>,
    entrance: Option<Entrance>,
}

impl Registration {
    async fn run(&mut self, begin: Begin) {
        let Registration { server, connection, entrance } = self;
        let Some(entrance) = entrance.take() else { return };
        let handshake = Driver::new(begin, connection, entrance, &*server.exports, &server.config);
        match handshake.run().await {
            Ok(Outcome::Transmission { stream, export, agreed, input, slot: _slot }) => {
                connection.set_export_name(&export.canonical_name);
                let (config, budget) = (&server.config, &server.budget);
                let connection = Arc::clone(connection);
                let target = Target::new(export, &agreed, Arc::clone(&connection));
                Session::new(stream, connection, target, agreed, input, config, budget).run().await;
            }
            Ok(Outcome::Takeover { stream, then, input, slot: _slot }) => {
                let stream = TakenStream::new(stream, input, connection);
                tokio::select! {
                    biased;
                    () = connection.stopped(Stop::Abort) => {}
                    () = then(stream) => {}
                }
            }
            Ok(Outcome::Moved { home, handshake }) => home.server.adopt(handshake, &home.runtime),
            Err(HandshakeError::Ending(Ending::Aborted) | HandshakeError::Eof) => {}
            Err(error) => {
                tracing::info!(peer = connection.peer(), "an NBD handshake ended: {error}");
            }
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.server.table().remove(&self.connection.id());
        self.connection.release();
    }
}
