use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};
use thiserror::Error;

use super::CommandError;
use super::json::to_line;

/// Longest message that a server may send, in bytes.
const LINE_BYTES_MAX: usize = 16 << 20;
/// Events that are kept while a command is waited for; the oldest are dropped first.
const EVENTS_MAX: usize = 1024;

/// Why a command could not be sent or was not executed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The socket could not be connected to.
    #[error("control socket {path}: {cause}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// What is listening there does not speak this protocol.
    #[error("control socket {path}: not a brep control socket ({reason})")]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// No answer came in time.
    #[error("control socket {path}: no answer within {timeout:?}")]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The connection ended.
    #[error("control socket {path}: the connection ended: {cause}")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// The command was refused or failed.
    #[error("{0}")]
    Command(CommandError),
}

impl ClientError {
    /// The exit code of a program that ends because of this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Command(error) => error.exit_code,
            _ => 1,
        }
    }
}

/// Something that happened, as the server told it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The name, in capitals.
    pub name: String,
    /// What belongs to it; null if nothing does.
    pub data: Value,
    /// Seconds since 1970, with microseconds; negative if the server's clock failed.
    pub timestamp: (i64, i64),
    /// Its number; none if it is for this client alone, such as `EVENTS_LOST`.
    pub sequence: Option<u64>,
}

/// A client of the control socket that waits for its answers.
///
/// After an error other than [`ClientError::Command`] the connection is of no more use.
#[derive(Debug)]
pub struct ControlClient {
    stream: UnixStream,
    path: PathBuf,
    timeout: Duration,
    input: Vec<u8>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl ControlClient {
    /// Connects, reads the greeting, and negotiates, all within `timeout`, which is also what
    /// later commands may take each.
    ///
    /// # Errors
    /// If nobody listens there, or not within the time, or somebody who speaks something else.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let deadline = deadline_after(timeout);
        let stream = connect_until(path, deadline)
            .map_err(|cause| ClientError::Connect { path: path.to_owned(), cause })?;
        let mut client = ControlClient {
            stream,
            path: path.to_owned(),
            timeout,
            input: Vec::new(),
            events: VecDeque::new(),
            next_id: 1,
        };
        let greeting = client.message_until(deadline)?;
        if let Some(error) = greeting.get("error") {
            return Err(ClientError::Command(CommandError::from_value(error)));
        }
        if greeting.pointer("/QMP/version/brep").is_none() {
            return Err(client.foreign("another greeting"));
        }
        client.execute_until("qmp_capabilities", json!({}), deadline)?;
        Ok(client)
    }

    /// Changes how long each later command may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Executes a command and returns its answer. `arguments` is an object or null. Events that
    /// come meanwhile are kept for [`next_event`](Self::next_event).
    ///
    /// # Errors
    /// [`ClientError::Command`] if the server refused it or it failed; everything else is about
    /// the connection, and leaves open whether the command was executed.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.execute_until(command, arguments, deadline_after(self.timeout))
    }

    /// The next event, or `None` if none comes within `timeout`.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        let deadline = deadline_after(timeout);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.message_until(deadline) {
                Ok(message) => self.keep_event(&message),
                Err(ClientError::TimedOut { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn execute_until(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.write_until(&to_line(&request), deadline)?;
        loop {
            let mut message = self.message_until(deadline)?;
            if message.get("id").and_then(Value::as_u64) != Some(id) {
                self.keep_event(&message);
            } else if let Some(error) = message.get("error") {
                return Err(ClientError::Command(CommandError::from_value(error)));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    fn keep_event(&mut self, message: &Value) {
        let Some(name) = message.get("event").and_then(Value::as_str) else { return };
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        let time = |key| message["timestamp"][key].as_i64().unwrap_or(-1);
        self.events.push_back(Event {
            name: name.to_owned(),
            data: message.get("data").cloned().unwrap_or(Value::Null),
            timestamp: (time("seconds"), time("microseconds")),
            sequence: message.get("sequence").and_then(Value::as_u64),
        });
    }

    fn write_until(&mut self, line: &[u8], deadline: Instant) -> Result<(), ClientError> {
        let remaining = self.remaining(deadline)?;
        self.stream
            .set_write_timeout(Some(remaining))
            .and_then(|()| self.stream.write_all(line))
            .map_err(|error| self.broken(error))
    }

    fn message_until(&mut self, deadline: Instant) -> Result<Value, ClientError> {
        loop {
            if let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return match serde_json::from_slice::<Value>(&line) {
                    Ok(message) if message.is_object() => Ok(message),
                    _ => Err(self.foreign("it does not speak JSON")),
                };
            }
            if self.input.len() > LINE_BYTES_MAX {
                return Err(self.foreign("a message without end"));
            }
            let remaining = self.remaining(deadline)?;
            let mut chunk = [0; 8192];
            let read = self
                .stream
                .set_read_timeout(Some(remaining))
                .and_then(|()| self.stream.read(&mut chunk));
            match read {
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.input.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    fn remaining(&self, deadline: Instant) -> Result<Duration, ClientError> {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() { Err(self.timed_out()) } else { Ok(remaining) }
    }

    fn broken(&self, cause: io::Error) -> ClientError {
        match cause.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timed_out(),
            _ => ClientError::Closed { path: self.path.clone(), cause },
        }
    }

    fn timed_out(&self) -> ClientError {
        ClientError::TimedOut { path: self.path.clone(), timeout: self.timeout }
    }

    fn foreign(&self, reason: &str) -> ClientError {
        ClientError::Foreign { path: self.path.clone(), reason: reason.to_owned() }
    }
}

/// A time that no sum can overflow.
fn deadline_after(timeout: Duration) -> Instant {
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + timeout.min(LONGEST)
}

/// Connects without ever waiting in the kernel: the backlog of a stopped process may be full,
/// and a blocking connect would hang there.
fn connect_until(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::AGAIN) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it takes no connections"));
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
