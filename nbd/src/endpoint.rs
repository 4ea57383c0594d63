use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;

use crate::Stream;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A TCP port.
    Tcp {
        /// Host name or literal address; IPv6 without brackets.
        host: String,
        /// Port number.
        port: u16,
    },
    /// A unix domain socket.
    Unix {
        /// Path of the socket.
        path: PathBuf,
    },
}

impl Endpoint {
    /// Whether nobody outside this machine can be reached through it: a unix socket, a literal
    /// loopback address, or the name `localhost`. Other names are never looked up to decide this.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        match self {
            Endpoint::Unix { .. } => true,
            Endpoint::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(address) => address.to_canonical().is_loopback(),
                Err(_) => host.eq_ignore_ascii_case("localhost"),
            },
        }
    }

    /// The socket addresses behind a TCP endpoint, in the resolver's order; none for a unix
    /// socket.
    ///
    /// # Errors
    /// What the resolver says.
    pub async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        match self {
            Endpoint::Unix { .. } => Ok(Vec::new()),
            Endpoint::Tcp { host, port } => match host.parse::<IpAddr>() {
                Ok(address) => Ok(vec![SocketAddr::new(address, *port)]),
                Err(_) => Ok(tokio::net::lookup_host((host.as_str(), *port)).await?.collect()),
            },
        }
    }

    /// Connects. Every address of a host name is tried in turn, each for an equal share of the time;
    /// `timeout` bounds all of it, the name look-up included.
    ///
    /// # Errors
    /// The last address's error, or [`io::ErrorKind::TimedOut`].
    pub async fn connect(&self, timeout: Duration) -> io::Result<Stream> {
        #[cfg(feature = "simulation")]
        if let Some(connecting) = crate::simulation::connect(self) {
            return within(timeout, connecting).await;
        }
        match self {
            Endpoint::Unix { path } => {
                let stream = within(timeout, UnixStream::connect(path)).await?;
                Ok(Stream::from(stream))
            }
            Endpoint::Tcp { .. } => within(timeout, self.connect_tcp(timeout)).await,
        }
    }

    async fn connect_tcp(&self, timeout: Duration) -> io::Result<Stream> {
        let deadline = Instant::now() + timeout;
        let addresses = self.resolve().await?;
        Stream::try_from(first_of(addresses, deadline, TcpStream::connect).await?)
    }
}

/// Tries one after the other. Each has an equal share of the time that is left, so that one that
/// does not answer leaves some to the next.
async fn first_of<T, F: Future<Output = io::Result<T>>>(
    addresses: Vec<SocketAddr>,
    deadline: Instant,
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T> {
    let mut failure =
        io::Error::new(io::ErrorKind::NotFound, "the host name has no usable address");
    for (untried, address) in (1..=addresses.len() as u32).rev().zip(addresses) {
        let share = deadline.saturating_duration_since(Instant::now()) / untried;
        match within(share, connect(address)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn within<T>(
    timeout: Duration,
    operation: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match tokio::time::timeout(timeout, operation).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no connection within {timeout:?}"),
        )),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "{host}:{port}"),
            Endpoint::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_leaves_time_for_the_next_one() {
        let addresses: Vec<SocketAddr> =
            ["[2001:db8::1]:10809", "192.0.2.1:10809"].map(|a| a.parse().unwrap()).into();
        let timeout = Duration::from_secs(10);
        let connect = |address: SocketAddr| async move {
            match address.is_ipv6() {
                true => std::future::pending().await,
                false => Ok(address),
            }
        };
        let begun = Instant::now();
        let found = first_of(addresses.clone(), begun + timeout, connect).await.unwrap();
        assert_eq!((found, begun.elapsed()), (addresses[1], timeout / 2));

        let begun = Instant::now();
        let never = |_| std::future::pending::<io::Result<()>>();
        let error = first_of(addresses, begun + timeout, never).await.unwrap_err();
        assert_eq!((error.kind(), begun.elapsed()), (io::ErrorKind::TimedOut, timeout));
    }
}
