use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::{Endpoint, Stream};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// Why an address cannot be listened on, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {endpoint}: {source}{advice}")]
pub struct BindError {
    /// The address.
    pub endpoint: Endpoint,
    /// What the operating system said.
    pub source: io::Error,
    advice: &'static str,
}

impl BindError {
    fn new(endpoint: &Endpoint, source: io::Error) -> Self {
        let unix = matches!(endpoint, Endpoint::Unix { .. });
        let advice = match source.kind() {
            io::ErrorKind::AddrInUse if unix => {
                " (another server answers on this socket: stop it, or choose another path)"
            }
            io::ErrorKind::AddrInUse => {
                " (another program listens there: stop it, or choose another port)"
            }
            io::ErrorKind::AlreadyExists => {
                " (the path exists and is no socket: remove it, or choose another path)"
            }
            io::ErrorKind::PermissionDenied if unix => {
                " (choose a directory that you may write to)"
            }
            io::ErrorKind::PermissionDenied => " (choose a port from 1024 on)",
            io::ErrorKind::NotFound if unix => " (create the directory first)",
            io::ErrorKind::AddrNotAvailable => " (no interface of this machine has this address)",
            io::ErrorKind::InvalidInput if unix => " (a socket's path has at most 107 bytes)",
            _ => "",
        };
        BindError { endpoint: endpoint.clone(), source, advice }
    }
}

/// A socket that listens.
///
/// The path of a unix socket is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    endpoint: Endpoint,
    pub(super) tls_optional: bool,
    /// Removes the path of a unix socket in the end.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
    #[cfg(feature = "simulation")]
    Simulated(std::sync::Arc<dyn crate::simulation::Acceptor>),
}

/// A socket's name in the file system: ours as long as the inode is the same.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.id.is_some() && self.id == file_id(&self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

impl Listener {
    fn new(socket: Listening, endpoint: Endpoint, file: Option<SocketFile>) -> Self {
        Listener { socket, endpoint, tls_optional: false, _file: file }
    }

    /// Who connects here need not begin TLS, whatever
    /// [`ServerConfig::tls_required`](super::ServerConfig::tls_required) says.
    #[must_use]
    pub fn tls_optional(mut self) -> Self {
        self.tls_optional = true;
        self
    }

    /// Listens on a TCP port (0: any free one) or a unix socket, which only its owner may use.
    /// A unix socket that nobody answers on any more is replaced.
    ///
    /// # Errors
    /// If that is not possible; the error says what to do.
    pub async fn bind(endpoint: &Endpoint) -> Result<Self, BindError> {
        #[cfg(feature = "simulation")]
        if let Some(bound) = crate::simulation::bind(endpoint) {
            let bound = bound.map_err(|e| BindError::new(endpoint, e))?;
            let (socket, endpoint) = (Listening::Simulated(bound), endpoint.clone());
            return Ok(Listener::new(socket, endpoint, None));
        }
        let result = match endpoint {
            Endpoint::Unix { path } => {
                bind_unix(path).await.map(|(socket, file)| (socket, Some(file)))
            }
            Endpoint::Tcp { .. } => bind_tcp(endpoint).await.map(|socket| (socket, None)),
        };
        let (socket, file) = result.map_err(|error| BindError::new(endpoint, error))?;
        let mut endpoint = endpoint.clone();
        if let (Listening::Tcp(socket), Endpoint::Tcp { port, .. }) = (&socket, &mut endpoint) {
            match socket.local_addr() {
                Ok(address) => *port = address.port(),
                Err(error) => return Err(BindError::new(&endpoint, error)),
            }
        }
        Ok(Listener::new(socket, endpoint, file))
    }

    /// Takes over a socket that listens already, as service managers pass them. The path of a
    /// unix socket is not removed in the end: it is whoever's who made it. Needs a tokio runtime.
    ///
    /// # Errors
    /// It is no stream socket that listens on TCP or on a path.
    pub fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let refuse = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
        if !rustix::net::sockopt::socket_acceptconn(&socket)? {
            return Err(refuse("the socket that was passed does not listen"));
        }
        let socket = Socket::from(socket);
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        if let Some(address) = address.as_socket() {
            let endpoint = Endpoint::Tcp { host: address.ip().to_string(), port: address.port() };
            let socket = Listening::Tcp(TcpListener::from_std(socket.into())?);
            return Ok(Listener::new(socket, endpoint, None));
        }
        let path = address.as_pathname().ok_or_else(|| {
            refuse("the socket that was passed listens neither on TCP nor on a path")
        })?;
        let endpoint = Endpoint::Unix { path: path.to_owned() };
        let socket = Listening::Unix(UnixListener::from_std(socket.into())?);
        Ok(Listener::new(socket, endpoint, None))
    }

    /// Where it listens; the port is the real one even if any was asked for.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether others than its owner can connect: on TCP, and on a unix socket whose mode lets them
    /// (or does not say).
    pub fn is_shared(&self) -> bool {
        const WRITABLE_FOR_OTHERS: u32 = 0o022;
        match &self.endpoint {
            Endpoint::Tcp { .. } => true,
            Endpoint::Unix { path } => match std::fs::metadata(path) {
                Ok(metadata) => metadata.permissions().mode() & WRITABLE_FOR_OTHERS != 0,
                Err(_) => true,
            },
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Listening::Tcp(socket) => Stream::try_from(socket.accept().await?.0),
            Listening::Unix(socket) => Ok(Stream::from(socket.accept().await?.0)),
            #[cfg(feature = "simulation")]
            Listening::Simulated(acceptor) => acceptor.accept().await,
        }
    }
}

async fn bind_tcp(endpoint: &Endpoint) -> io::Result<Listening> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for address in endpoint.resolve().await? {
        match listen_tcp(&address.into(), Domain::for_address(address)) {
            Ok(socket) => return Ok(Listening::Tcp(socket)),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn listen_tcp(address: &SockAddr, domain: Domain) -> io::Result<TcpListener> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // A restarted server gets its port back although old connections linger.
    socket.set_reuse_address(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG as i32)?;
    TcpListener::from_std(socket.into())
}

async fn bind_unix(path: &Path) -> io::Result<(Listening, SocketFile)> {
    let address = SockAddr::unix(path)?;
    match listen_unix(path, &address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path).await?;
            listen_unix(path, &address)
        }
        result => result,
    }
}

fn listen_unix(path: &Path, address: &SockAddr) -> io::Result<(Listening, SocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(address)?;
    let file = SocketFile { path: path.to_owned(), id: file_id(path) };
    // Nobody can connect before `listen`, so nobody slips in before the mode is set.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG as i32)?;
    Ok((Listening::Unix(UnixListener::from_std(socket.into())?), file))
}

/// Removes a socket that its server has left behind.
async fn remove_stale(path: &Path) -> io::Result<()> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists"));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        // Somebody answers, or we may not know.
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}
