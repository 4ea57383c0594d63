use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::event::event_line;
use super::json::{to_double_quotes, to_line};
use super::request::Request;
use super::{ArgumentKind, ArgumentSpec, CommandError, CommandSpec, ErrorClass, EventBus, Handler};

/// What a client of the control socket is allowed.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ServerLimits {
    /// Clients at the same time. One more is told so and closed. 64 by default.
    pub clients_max: usize,
    /// Length of a message. A longer one is skipped and answered with an error. 64 KiB by
    /// default.
    pub line_bytes_max: usize,
    /// How long a client may take to negotiate before it is closed. 30 s by default.
    pub negotiation_timeout: Duration,
    /// How long a client may leave an answer unread before it is closed. 10 s by default.
    pub write_timeout: Duration,
    /// How long running commands may go on after the shutdown began. 5 s by default.
    pub grace_period: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        ServerLimits {
            clients_max: 64,
            line_bytes_max: 64 << 10,
            negotiation_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(10),
            grace_period: Duration::from_secs(5),
        }
    }
}

/// The server's end of the control socket.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    limits: ServerLimits,
}

impl ControlServer {
    /// Binds the socket, with mode 0600; clients can connect from now on, and are served by
    /// [`serve`](Self::serve). A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// If another instance listens there, if something that is no socket has the name, and what
    /// the operating system reports. The message names the path.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = super::listener::bind(path)?;
        Ok(ControlServer { listener, path: path.to_owned(), limits: ServerLimits::default() })
    }

    /// Replaces the limits.
    #[must_use]
    pub fn with_limits(mut self, limits: ServerLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Serves clients until `shutdown` is cancelled; then takes no more commands, lets running
    /// ones end within the grace period, and removes the socket.
    ///
    /// # Errors
    /// If the socket cannot be used with the current runtime.
    pub async fn serve(
        self,
        handler: Arc<dyn Handler>,
        events: EventBus,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let listener = tokio::net::UnixListener::from_std(self.listener)?;
        let mut clients = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_) = clients.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) if clients.len() >= self.limits.clients_max => turn_away(&stream),
                    Ok((stream, _)) => {
                        let connection =
                            Connection::new(stream, handler.clone(), events.clone(), self.limits);
                        clients.spawn(connection.run(shutdown.clone()));
                    }
                    Err(error) => {
                        tracing::warn!("control socket: accept: {error}");
                        // Out of descriptors, most likely: trying again at once would spin.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        drop(listener);
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!("control socket {}: remove: {error}", self.path.display());
        }
        let ended = async { while clients.join_next().await.is_some() {} };
        if tokio::time::timeout(self.limits.grace_period, ended).await.is_err() {
            tracing::warn!("control socket: commands that did not end were given up");
        }
        Ok(())
    }
}

/// Binds a control socket and serves it until `shutdown` is cancelled.
///
/// # Errors
/// As [`ControlServer::bind`] and [`ControlServer::serve`].
pub async fn serve(
    path: &Path,
    handler: Arc<dyn Handler>,
    events: EventBus,
    shutdown: CancellationToken,
) -> io::Result<()> {
    ControlServer::bind(path)?.serve(handler, events, shutdown).await
}

/// Says why to a client that is one too many, if it can be said without waiting.
fn turn_away(stream: &UnixStream) {
    let error = CommandError::failed("too many clients on this control socket");
    let _ = stream.try_write(&to_line(&json!({ "error": error.to_value() })));
}

const NEGOTIATE: CommandSpec = CommandSpec::new(
    "qmp_capabilities",
    &[ArgumentSpec::optional("enable", ArgumentKind::Strings)],
);
const QUERY_COMMANDS: CommandSpec = CommandSpec::new("query-commands", &[]);
const QUERY_VERSION: CommandSpec = CommandSpec::new("query-version", &[]);

struct Connection {
    stream: UnixStream,
    handler: Arc<dyn Handler>,
    bus: EventBus,
    /// Present once the client has negotiated.
    events: Option<broadcast::Receiver<Arc<[u8]>>>,
    input: Vec<u8>,
    /// The rest of a line that was too long is being skipped.
    skipping: bool,
    limits: ServerLimits,
}

impl Connection {
    fn new(
        stream: UnixStream,
        handler: Arc<dyn Handler>,
        bus: EventBus,
        limits: ServerLimits,
    ) -> Self {
        let input = Vec::with_capacity(1024);
        Connection { stream, handler, bus, events: None, input, skipping: false, limits }
    }

    async fn run(mut self, shutdown: CancellationToken) {
        if let Err(error) = self.converse(&shutdown).await {
            tracing::debug!("control client: {error}");
        }
    }

    async fn converse(&mut self, shutdown: &CancellationToken) -> io::Result<()> {
        self.send(&to_line(&json!({ "QMP": { "version": version(), "capabilities": [] } })))
            .await?;
        let deadline = tokio::time::Instant::now() + self.limits.negotiation_timeout;
        while self.events.is_none() {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                received = tokio::time::timeout_at(deadline, self.receive()) => match received {
                    Ok(more) => if !more? { return Ok(()) },
                    Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "no negotiation")),
                }
            }
            self.answer_input().await?;
        }
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                event = next_event(&mut self.events) => self.send(&event).await?,
                more = receive(&mut self.stream, &mut self.input) => {
                    if !more? { return Ok(()) }
                    self.answer_input().await?;
                }
            }
        }
    }

    async fn receive(&mut self) -> io::Result<bool> {
        receive(&mut self.stream, &mut self.input).await
    }

    /// Answers every complete line of the input, in order.
    async fn answer_input(&mut self) -> io::Result<()> {
        // A control character ends a line too: QMP clients use one to reset a confused parser.
        while let Some(end) = self.input.iter().position(|&byte| byte < 0x20 && byte != b'\t') {
            let line: Vec<u8> = self.input.drain(..=end).take(end).collect();
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if line.len() > self.limits.line_bytes_max {
                self.reject_long_line().await?;
            } else if !line.iter().all(|byte| byte.is_ascii_whitespace()) {
                self.answer_line(&line).await?;
            }
        }
        if self.skipping {
            self.input.clear();
        } else if self.input.len() > self.limits.line_bytes_max {
            self.skipping = true;
            self.input.clear();
            self.reject_long_line().await?;
        }
        Ok(())
    }

    async fn reject_long_line(&mut self) -> io::Result<()> {
        let desc = format!("message longer than {} bytes", self.limits.line_bytes_max);
        self.reply(Err(CommandError::usage(desc)), None).await
    }

    async fn answer_line(&mut self, line: &[u8]) -> io::Result<()> {
        let Ok(text) = std::str::from_utf8(line) else {
            return self.reply(Err(invalid_json("not UTF-8")), None).await;
        };
        let text = to_double_quotes(text);
        for message in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
            match message.map(Request::parse) {
                Ok(Ok(request)) => {
                    let outcome = self.execute(&request.command, request.arguments).await?;
                    self.reply(outcome, request.id).await?;
                }
                Ok(Err(malformed)) => self.reply(Err(malformed.error), malformed.id).await?,
                Err(error) => return self.reply(Err(invalid_json(&error)), None).await,
            }
        }
        Ok(())
    }

    async fn execute(
        &mut self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> io::Result<Result<Value, CommandError>> {
        let handler = self.handler.clone();
        Ok(match (command, self.events.is_some()) {
            ("qmp_capabilities", false) => self.negotiate(&arguments),
            (_, false) => Err(CommandError::new(
                ErrorClass::CommandNotFound,
                2,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            ("query-commands", true) => {
                QUERY_COMMANDS.check(&arguments).map(|()| self.command_names())
            }
            ("query-version", true) => QUERY_VERSION.check(&arguments).map(|()| version()),
            _ => match handler.commands().iter().find(|spec| spec.name == command) {
                Some(spec) => match spec.check(&arguments) {
                    Ok(()) => return self.attend(handler.execute(spec.name, arguments)).await,
                    Err(error) => Err(error),
                },
                None => Err(CommandError::new(
                    ErrorClass::CommandNotFound,
                    2,
                    format!("The command {command} has not been found"),
                )),
            },
        })
    }

    /// Waits for a command of the handler; events go on meanwhile. The command is run to its end
    /// even if the client has left.
    async fn attend(
        &mut self,
        mut command: BoxFuture<'_, Result<Value, CommandError>>,
    ) -> io::Result<Result<Value, CommandError>> {
        loop {
            let event = tokio::select! {
                biased;
                outcome = &mut command => return Ok(outcome),
                event = next_event(&mut self.events) => event,
            };
            if let Err(error) = self.send(&event).await {
                // Its outcome has no reader any more.
                let _ = command.await;
                return Err(error);
            }
        }
    }

    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Result<Value, CommandError> {
        NEGOTIATE.check(arguments)?;
        let wanted = arguments.get("enable").and_then(Value::as_array);
        if let Some(name) = wanted.into_iter().flatten().next() {
            let name = name.as_str().unwrap_or_default();
            let desc = format!("Parameter 'enable' does not accept value '{name}'");
            return Err(CommandError::usage(desc));
        }
        self.events = Some(self.bus.subscribe());
        Ok(json!({}))
    }

    fn command_names(&self) -> Value {
        let own = [QUERY_COMMANDS.name, QUERY_VERSION.name];
        let names = own.into_iter().chain(self.handler.commands().iter().map(|spec| spec.name));
        names.map(|name| json!({ "name": name })).collect()
    }

    async fn reply(
        &mut self,
        outcome: Result<Value, CommandError>,
        id: Option<Value>,
    ) -> io::Result<()> {
        let mut reply = match outcome {
            Ok(Value::Null) => json!({ "return": {} }),
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": error.to_value() }),
        };
        if let Some(id) = id {
            reply["id"] = id;
        }
        self.send(&to_line(&reply)).await
    }

    /// Sends one message. A client that does not read loses events meanwhile (the bus drops
    /// them), and in the end its connection.
    async fn send(&mut self, line: &[u8]) -> io::Result<()> {
        match tokio::time::timeout(self.limits.write_timeout, self.stream.write_all(line)).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")),
        }
    }
}

/// Takes in what has arrived; false at the end of the stream. Dropping it loses nothing.
async fn receive(stream: &mut UnixStream, input: &mut Vec<u8>) -> io::Result<bool> {
    input.reserve(4096);
    Ok(stream.read_buf(input).await? > 0)
}

async fn next_event(events: &mut Option<broadcast::Receiver<Arc<[u8]>>>) -> Arc<[u8]> {
    let Some(receiver) = events else { return std::future::pending().await };
    match receiver.recv().await {
        Ok(event) => event,
        Err(RecvError::Lagged(count)) => {
            event_line("EVENTS_LOST", json!({ "count": count })).into()
        }
        Err(RecvError::Closed) => std::future::pending().await,
    }
}

fn invalid_json(reason: impl std::fmt::Display) -> CommandError {
    CommandError::usage(format!("Invalid JSON syntax: {reason}"))
}

fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "brep": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": "",
    })
}
