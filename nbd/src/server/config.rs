use std::time::Duration;

use tokio::runtime::Handle;

use crate::proto::server::TlsPolicy;
use crate::tls::TlsServer;

/// The limits of a server. Every default bounds what a stranger can cost, and is far from what a
/// well-behaved client notices.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerConfig {
    /// How long a client may take from connecting to the end of its handshake. Time that the
    /// server itself needs for an answer does not count. Default: 10 s, as other servers do.
    pub handshake_timeout: Duration,
    /// Most connections at a time that use an export; further ones wait at the end of their
    /// handshake until one closes. Default: 1024.
    pub connections_max: usize,
    /// Most connections at a time that are in their handshake. The next one takes the place of the
    /// oldest, which has had a second then, or waits until there is one. Default: 256.
    pub handshakes_max: usize,
    /// Most requests of one connection that are being worked on. Default: 128.
    pub requests_in_flight_max: usize,
    /// Most payload bytes, of requests being worked on and of replies not yet sent, of one
    /// connection. A single request is always let in. Default: 64 MiB.
    pub connection_bytes_max: u64,
    /// The same for all connections together. It is shared so that each connection may use at
    /// most as much as is still free: those that hold much leave room for those that hold little.
    /// Default: 512 MiB.
    pub server_bytes_max: u64,
    /// A client that takes none of its replies for this long is disconnected. Default: never; it
    /// costs a bounded amount of memory, and a paused virtual machine is no error.
    pub write_timeout: Option<Duration>,
    /// Where connections are served: each in the runtime that has the fewest, where it stays. For
    /// current-thread runtimes, each driven by a thread of its own until the server has ended; the
    /// devices have to do well in several threads. Default: none, which means the runtime in which
    /// [`Server::serve`](super::Server::serve) is called.
    pub runtimes: Vec<Handle>,
    /// What TLS needs; without it there is none. Default: none.
    pub tls: Option<TlsServer>,
    /// Clients have to begin TLS before anything else; if not, they may, and have to before
    /// private options. Only with [`tls`](Self::tls), and not where a
    /// [`Listener`](super::Listener::tls_optional) leaves it to them. Default: yes.
    pub tls_required: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            handshake_timeout: Duration::from_secs(10),
            connections_max: 1024,
            handshakes_max: 256,
            requests_in_flight_max: 128,
            connection_bytes_max: 64 << 20,
            server_bytes_max: 512 << 20,
            write_timeout: None,
            runtimes: Vec::new(),
            tls: None,
            tls_required: true,
        }
    }
}

impl ServerConfig {
    pub(super) fn tls_policy(&self, tls_optional: bool) -> TlsPolicy {
        match &self.tls {
            None => TlsPolicy::Off,
            Some(_) if self.tls_required && !tls_optional => TlsPolicy::Required,
            Some(_) => TlsPolicy::Optional,
        }
    }

    /// Sets [`handshake_timeout`](Self::handshake_timeout).
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    /// Sets [`connections_max`](Self::connections_max).
    #[must_use]
    pub fn connections_max(mut self, count: usize) -> Self {
        self.connections_max = count;
        self
    }

    /// Sets [`handshakes_max`](Self::handshakes_max).
    #[must_use]
    pub fn handshakes_max(mut self, count: usize) -> Self {
        self.handshakes_max = count;
        self
    }

    /// Sets [`requests_in_flight_max`](Self::requests_in_flight_max).
    #[must_use]
    pub fn requests_in_flight_max(mut self, count: usize) -> Self {
        self.requests_in_flight_max = count;
        self
    }

    /// Sets [`connection_bytes_max`](Self::connection_bytes_max).
    #[must_use]
    pub fn connection_bytes_max(mut self, bytes: u64) -> Self {
        self.connection_bytes_max = bytes;
        self
    }

    /// Sets [`server_bytes_max`](Self::server_bytes_max).
    #[must_use]
    pub fn server_bytes_max(mut self, bytes: u64) -> Self {
        self.server_bytes_max = bytes;
        self
    }

    /// Sets [`write_timeout`](Self::write_timeout).
    #[must_use]
    pub fn write_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.write_timeout = timeout;
        self
    }

    /// Sets [`runtimes`](Self::runtimes).
    #[must_use]
    pub fn runtimes(mut self, runtimes: Vec<Handle>) -> Self {
        self.runtimes = runtimes;
        self
    }

    /// Sets [`tls`](Self::tls) and [`tls_required`](Self::tls_required).
    #[must_use]
    pub fn tls(mut self, tls: Option<TlsServer>, required: bool) -> Self {
        self.tls = tls;
        self.tls_required = required;
        self
    }
}
