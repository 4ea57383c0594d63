use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::event::Subscription;
use super::frame::{Frame, Framer};
use super::json::{to_double_quotes, to_line};
use super::request::Request;
use super::server::ServerLimits;
use super::{ArgumentKind, ArgumentSpec, CommandError, CommandSpec, ErrorClass, EventBus, Handler};

const NEGOTIATE: CommandSpec = CommandSpec::new(
    "qmp_capabilities",
    &[ArgumentSpec::optional("enable", ArgumentKind::Strings)],
);
const QUERY_COMMANDS: CommandSpec =
    CommandSpec::new("query-commands", &[]).returning("[CommandInfo]").allow_oob();
const QUERY_VERSION: CommandSpec =
    CommandSpec::new("query-version", &[]).returning("VersionInfo").allow_oob();

/// The commands that the server executes by itself.
pub const SERVER_COMMANDS: &[CommandSpec] = &[NEGOTIATE, QUERY_COMMANDS, QUERY_VERSION];

/// The capability by which a client says that it knows of out-of-band execution.
const OOB: &str = "oob";

type Outcome = Result<Value, CommandError>;
type Execution = BoxFuture<'static, Outcome>;

/// One client of the control socket.
pub(super) struct Connection {
    stream: UnixStream,
    handler: Arc<dyn Handler>,
    bus: EventBus,
    limits: ServerLimits,
    framer: Framer,
    /// Present once the client has negotiated.
    events: Option<Subscription>,
    /// The client may have commands executed out of band.
    oob: bool,
    /// What is to be executed and answered in order. Bounded: nothing is read while it is full.
    queue: VecDeque<Queued>,
    in_band: Option<Running>,
    out_of_band: Option<Running>,
    /// The client will send no more.
    at_end: bool,
}

/// A message whose turn has not come.
struct Queued {
    request: Result<(String, Map<String, Value>), CommandError>,
    id: Option<Value>,
}

/// A command that is being executed, and the id of its answer.
struct Running {
    execution: Execution,
    id: Option<Value>,
}

/// What a connection waits for.
enum Progress {
    Event(Arc<[u8]>),
    InBand(Outcome),
    OutOfBand(Outcome),
    Received(io::Result<usize>),
    ShutDown,
}

impl Connection {
    pub(super) fn new(
        stream: UnixStream,
        handler: Arc<dyn Handler>,
        bus: EventBus,
        limits: ServerLimits,
    ) -> Self {
        Connection {
            stream,
            handler,
            bus,
            limits,
            framer: Framer::new(limits.message_bytes_max),
            events: None,
            oob: false,
            queue: VecDeque::new(),
            in_band: None,
            out_of_band: None,
            at_end: false,
        }
    }

    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        if let Err(error) = self.converse(&shutdown).await {
            tracing::debug!("control client: {error}");
        }
        // Commands are run to their end even if the client has left.
        for running in [self.in_band.take(), self.out_of_band.take()].into_iter().flatten() {
            let _ = running.execution.await;
        }
    }

    async fn converse(&mut self, shutdown: &CancellationToken) -> io::Result<()> {
        let greeting = json!({ "version": version(), "capabilities": [OOB] });
        self.send(&to_line(&json!({ "QMP": greeting }))).await?;
        let deadline = tokio::time::Instant::now() + self.limits.negotiation_timeout;
        loop {
            self.take_input().await?;
            if self.is_done() {
                return Ok(());
            }
            let progress = match self.events.is_some() {
                true => self.progress(shutdown).await,
                false => tokio::time::timeout_at(deadline, self.progress(shutdown))
                    .await
                    .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no negotiation"))?,
            };
            match progress {
                Progress::Event(event) => self.send(&event).await?,
                Progress::InBand(outcome) => {
                    let id = self.in_band.take().and_then(|running| running.id);
                    self.reply(outcome, id).await?;
                }
                Progress::OutOfBand(outcome) => {
                    let id = self.out_of_band.take().and_then(|running| running.id);
                    self.reply(outcome, id).await?;
                }
                Progress::Received(count) => self.at_end = count? == 0,
                Progress::ShutDown => return self.shut_down().await,
            }
        }
    }

    /// Answers what is being executed, and sends the events that have come; takes no more.
    async fn shut_down(&mut self) -> io::Result<()> {
        for running in [self.out_of_band.take(), self.in_band.take()].into_iter().flatten() {
            let outcome = running.execution.await;
            self.reply(outcome, running.id).await?;
        }
        while let Some(event) = self.events.as_mut().and_then(Subscription::waiting) {
            self.send(&event).await?;
        }
        Ok(())
    }

    /// Nothing more will come, and everything that came has been answered.
    fn is_done(&self) -> bool {
        self.at_end && self.queue.is_empty() && !self.is_busy()
    }

    fn is_busy(&self) -> bool {
        self.in_band.is_some() || self.out_of_band.is_some()
    }

    /// Whether the next message may be looked at.
    fn has_room(&self) -> bool {
        match self.oob {
            true => self.out_of_band.is_none() && self.queue.len() < self.limits.queued_max,
            false => !self.is_busy() && self.queue.is_empty(),
        }
    }

    /// Waits for the next thing to happen. Dropping it loses nothing.
    async fn progress(&mut self, shutdown: &CancellationToken) -> Progress {
        let reads = !self.at_end && self.has_room();
        tokio::select! {
            outcome = outcome_of(&mut self.out_of_band) => Progress::OutOfBand(outcome),
            outcome = outcome_of(&mut self.in_band) => Progress::InBand(outcome),
            event = next_event(&mut self.events) => Progress::Event(event),
            () = shutdown.cancelled() => Progress::ShutDown,
            received = receive(&mut self.stream, self.framer.input()), if reads => {
                Progress::Received(received)
            }
        }
    }

    /// Goes through what has arrived and what is queued, as far as that is possible now.
    async fn take_input(&mut self) -> io::Result<()> {
        loop {
            if self.in_band.is_none()
                && let Some(next) = self.queue.pop_front()
            {
                match next.request {
                    Ok((command, arguments)) => self.begin(&command, arguments, next.id).await?,
                    Err(error) => self.reply(Err(error), next.id).await?,
                }
            } else if self.has_room()
                && let Some(frame) = self.framer.next()
            {
                self.take_frame(frame).await?;
            } else {
                return Ok(());
            }
        }
    }

    async fn take_frame(&mut self, frame: Frame) -> io::Result<()> {
        let max = self.limits.message_bytes_max;
        let parsed = match &frame {
            Frame::Message(message) => parse(message),
            Frame::Reset => Err(invalid_json("a control character in a message")),
            Frame::TooLong => Err(CommandError::usage(format!("message longer than {max} bytes"))),
        };
        let (request, id) = match parsed.map(|message| Request::parse(message, self.oob)) {
            Ok(Ok(request)) if request.out_of_band => return self.begin_oob(request).await,
            Ok(Ok(request)) => (Ok((request.command, request.arguments)), request.id),
            Ok(Err(malformed)) => (Err(malformed.error), malformed.id),
            Err(error) => (Err(error), None),
        };
        self.queue.push_back(Queued { request, id });
        Ok(())
    }

    async fn begin_oob(&mut self, request: Request) -> io::Result<()> {
        let Request { command, arguments, id, .. } = request;
        match self.find(&command) {
            Ok(spec) if !spec.out_of_band => {
                let desc = format!("The command {command} cannot be executed out of band");
                self.reply(Err(CommandError::usage(desc)), id).await
            }
            Ok(spec) => match self.execute(spec, arguments) {
                Ok(execution) => {
                    self.out_of_band = Some(Running { execution, id });
                    Ok(())
                }
                Err(outcome) => self.reply(outcome, id).await,
            },
            Err(error) => self.reply(Err(error), id).await,
        }
    }

    async fn begin(
        &mut self,
        command: &str,
        arguments: Map<String, Value>,
        id: Option<Value>,
    ) -> io::Result<()> {
        let begun = match self.find(command) {
            Ok(spec) => self.execute(spec, arguments),
            Err(error) => Err(Err(error)),
        };
        match begun {
            Ok(execution) => {
                self.in_band = Some(Running { execution, id });
                Ok(())
            }
            Err(outcome) => self.reply(outcome, id).await,
        }
    }

    /// The command of this name, in the present phase of the connection.
    fn find(&self, command: &str) -> Result<CommandSpec, CommandError> {
        let not_found = |desc| CommandError::new(ErrorClass::CommandNotFound, 2, desc);
        let negotiates = command == NEGOTIATE.name;
        match self.events.is_some() {
            false if negotiates => Ok(NEGOTIATE),
            false => Err(not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned(),
            )),
            true => SERVER_COMMANDS
                .iter()
                .chain(self.handler.commands())
                .find(|spec| spec.name == command && !negotiates)
                .copied()
                .ok_or_else(|| not_found(format!("The command {command} has not been found"))),
        }
    }

    /// Begins to execute a command, or gives its outcome if that is known at once.
    fn execute(
        &mut self,
        spec: CommandSpec,
        arguments: Map<String, Value>,
    ) -> Result<Execution, Outcome> {
        if let Err(error) = spec.check(&arguments) {
            return Err(Err(error));
        }
        if spec.name == NEGOTIATE.name {
            Err(self.negotiate(&arguments))
        } else if spec.name == QUERY_COMMANDS.name {
            Err(Ok(self.command_names()))
        } else if spec.name == QUERY_VERSION.name {
            Err(Ok(version()))
        } else {
            let handler = Arc::clone(&self.handler);
            Ok(Box::pin(async move { handler.execute(spec.name, arguments).await }))
        }
    }

    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Outcome {
        let wanted = arguments.get("enable").and_then(Value::as_array).into_iter().flatten();
        let wanted: Vec<_> = wanted.filter_map(Value::as_str).collect();
        if let Some(name) = wanted.iter().find(|name| **name != OOB) {
            let desc = format!("Parameter 'enable' does not accept value '{name}'");
            return Err(CommandError::usage(desc));
        }
        self.oob = !wanted.is_empty();
        self.events = Some(self.bus.subscribe());
        Ok(json!({}))
    }

    fn command_names(&self) -> Value {
        let names = SERVER_COMMANDS.iter().chain(self.handler.commands()).map(|spec| spec.name);
        names.map(|name| json!({ "name": name })).collect()
    }

    async fn reply(&mut self, outcome: Outcome, id: Option<Value>) -> io::Result<()> {
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

/// Takes in what has arrived; 0 at the end of the stream. Dropping it loses nothing.
async fn receive(stream: &mut UnixStream, input: &mut BytesMut) -> io::Result<usize> {
    input.reserve(4096);
    stream.read_buf(input).await
}

async fn outcome_of(running: &mut Option<Running>) -> Outcome {
    match running {
        Some(running) => running.execution.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn next_event(events: &mut Option<Subscription>) -> Arc<[u8]> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

fn parse(message: &[u8]) -> Result<Value, CommandError> {
    let text = std::str::from_utf8(message).map_err(|_| invalid_json("not UTF-8"))?;
    serde_json::from_str(&to_double_quotes(text)).map_err(invalid_json)
}

fn invalid_json(reason: impl std::fmt::Display) -> CommandError {
    CommandError::usage(format!("Invalid JSON syntax: {reason}"))
}

/// The protocol's level in the words of its clients, which look for `qemu`, and our own version.
fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": { "major": 7, "minor": 2, "micro": 0 },
        "brep": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("brep-", env!("CARGO_PKG_VERSION")),
    })
}
