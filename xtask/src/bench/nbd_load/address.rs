use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};

/// Where a server is.
#[derive(Clone)]
pub(super) enum Address {
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = std::convert::Infallible;

    /// Paths have a slash.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.contains('/') {
            true => Address::Unix(text.into()),
            false => Address::Tcp(text.to_owned()),
        })
    }
}

impl Address {
    pub(super) fn connect(&self) -> Result<Socket> {
        match self {
            Address::Unix(path) => {
                let socket = UnixStream::connect(path);
                let socket = socket.with_context(|| format!("cannot connect to {path:?}"))?;
                Ok(Socket::Unix(socket))
            }
            Address::Tcp(address) => {
                let socket = TcpStream::connect(address);
                let socket = socket.with_context(|| format!("cannot connect to {address}"))?;
                socket.set_nodelay(true)?;
                Ok(Socket::Tcp(socket))
            }
        }
    }
}

pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.read(buf),
            Socket::Unix(socket) => socket.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.write(buf),
            Socket::Unix(socket) => socket.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.write_vectored(bufs),
            Socket::Unix(socket) => socket.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
