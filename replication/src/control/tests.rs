//! Every row of the bad-input table, and what comes of good input, over a real socket.
mod limits;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct TestHandler {
    executed: AtomicU32,
    entered: Notify,
    release: Notify,
    state: AtomicU32,
}

impl Handler for TestHandler {
    fn commands(&self) -> &'static [CommandSpec] {
        const WAIT: ArgumentKind = ArgumentKind::Enum(&["cut", "commit"]);
        const PATH: &[ArgumentSpec] = &[ArgumentSpec::required("path", ArgumentKind::String)];
        const ADDRESS: ArgumentKind = ArgumentKind::Union(&[("unix", PATH), ("none", &[])]);
        const COMMANDS: &[CommandSpec] = &[
            CommandSpec::new("query-status", &[]).allow_oob(),
            CommandSpec::new(
                "checkpoint",
                &[
                    ArgumentSpec::required("wait", WAIT),
                    ArgumentSpec::optional("timeout", ArgumentKind::Integer),
                    ArgumentSpec::optional("force", ArgumentKind::Boolean),
                    ArgumentSpec::optional("name", ArgumentKind::String),
                    ArgumentSpec::optional("names", ArgumentKind::Strings),
                    ArgumentSpec::optional("addr", ADDRESS),
                    ArgumentSpec::optional("list", ArgumentKind::Objects(PATH)),
                ],
            ),
            CommandSpec::new("hang", &[]),
            CommandSpec::new("refuse", &[]),
        ];
        COMMANDS
    }

    fn execute(
        &self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'_, Result<Value, CommandError>> {
        self.executed.fetch_add(1, Ordering::SeqCst);
        let command = command.to_owned();
        async move {
            match command.as_str() {
                "query-status" => Ok(json!({ "state": "running" })),
                "checkpoint" => Ok(Value::Object(arguments)),
                "hang" => {
                    self.entered.notify_one();
                    self.release.notified().await;
                    Ok(Value::Null)
                }
                _ => Err(CommandError::refused("not now")),
            }
        }
        .boxed()
    }

    fn state(&self) -> Option<Value> {
        Some(json!({ "number": self.state.load(Ordering::SeqCst) }))
    }
}

struct Server {
    path: PathBuf,
    handler: Arc<TestHandler>,
    events: EventBus,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        Self::start_with(ServerLimits::default())
    }

    fn start_with(limits: ServerLimits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let handler = Arc::new(TestHandler::default());
        let events = EventBus::new();
        let shutdown = CancellationToken::new();
        let server = ControlServer::bind(&path).unwrap().with_limits(limits);
        let task = tokio::spawn(server.serve(handler.clone(), events.clone(), shutdown.clone()));
        Server { path, handler, events, shutdown, task, _directory: directory }
    }
}

struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects and reads the greeting.
    async fn connect(path: &Path) -> Self {
        let stream = BufReader::new(UnixStream::connect(path).await.unwrap());
        let mut client = Client { stream };
        let greeting = client.message().await;
        assert!(greeting["QMP"]["version"]["brep"]["major"].is_u64(), "{greeting}");
        assert!(greeting["QMP"]["capabilities"].is_array(), "{greeting}");
        client
    }

    async fn negotiated(path: &Path) -> Self {
        let mut client = Self::connect(path).await;
        let answer = client.ask(r#"{"execute":"qmp_capabilities"}"#).await;
        assert_eq!(answer, json!({ "return": {} }));
        client
    }

    async fn negotiated_oob(path: &Path) -> Self {
        let mut client = Self::connect(path).await;
        let answer =
            client.ask("{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}").await;
        assert_eq!(answer, json!({ "return": {} }));
        client
    }

    async fn send(&mut self, text: &[u8]) {
        self.stream.get_mut().write_all(text).await.unwrap();
    }

    async fn message(&mut self) -> Value {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        let count = tokio::time::timeout(DEADLINE, read).await.expect("an answer").unwrap();
        assert!(count > 0, "the server closed the connection");
        assert!(line.is_ascii() && line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    async fn ask(&mut self, line: &str) -> Value {
        self.send(line.as_bytes()).await;
        self.send(b"\r\n").await;
        self.message().await
    }

    async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        matches!(
            tokio::time::timeout(DEADLINE, self.stream.read_to_end(&mut rest)).await,
            Ok(Ok(_)) | Ok(Err(_))
        )
    }
}

#[tokio::test]
async fn every_row_of_the_bad_input_table_is_answered_and_executes_nothing() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let rows: &[(&str, &str, &str)] = &[
        ("{\x01", "GenericError", "Invalid JSON syntax"),
        ("{]", "GenericError", "Invalid JSON syntax"),
        ("{\"a\" \"b\"}", "GenericError", "Invalid JSON syntax"),
        ("\"a\"", "GenericError", "QMP input must be a JSON object"),
        ("]", "GenericError", "Invalid JSON syntax"),
        ("nonsense", "GenericError", "Invalid JSON syntax"),
        (&deep, "GenericError", "Invalid JSON syntax"),
        ("[]", "GenericError", "QMP input must be a JSON object"),
        ("12", "GenericError", "QMP input must be a JSON object"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        (r#"{"execute":1}"#, "GenericError", "QMP input member 'execute' must be a string"),
        (
            r#"{"execute":"checkpoint","arguments":[]}"#,
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute":"query-status","x":1}"#,
            "GenericError",
            "QMP input member 'x' is unexpected",
        ),
        (r#"{"execute":"nope"}"#, "CommandNotFound", "The command nope has not been found"),
        (
            r#"{"execute":"qmp_capabilities"}"#,
            "CommandNotFound",
            "The command qmp_capabilities has not been found",
        ),
        (r#"{"execute":"checkpoint"}"#, "GenericError", "Parameter 'wait' is missing"),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":1}}"#,
            "GenericError",
            "Invalid parameter type for 'wait', expected: string",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","timeout":"5"}}"#,
            "GenericError",
            "Invalid parameter type for 'timeout', expected: integer",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","force":0}}"#,
            "GenericError",
            "Invalid parameter type for 'force', expected: boolean",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","name":null}}"#,
            "GenericError",
            "Invalid parameter type for 'name', expected: string",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","y":1}}"#,
            "GenericError",
            "Parameter 'y' is unexpected",
        ),
        (
            r#"{"execute":"query-status","arguments":{"y":1}}"#,
            "GenericError",
            "Parameter 'y' is unexpected",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"never"}}"#,
            "GenericError",
            "Parameter 'wait' does not accept value 'never'",
        ),
        (
            r#"{"exec-oob":"query-status"}"#,
            "GenericError",
            "QMP input member 'exec-oob' is unexpected",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","names":["a",1]}}"#,
            "GenericError",
            "Invalid parameter type for 'names[1]', expected: string",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","addr":"x"}}"#,
            "GenericError",
            "Invalid parameter type for 'addr', expected: object",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","addr":{}}}"#,
            "GenericError",
            "Parameter 'addr.type' is missing",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","addr":{"type":"fd"}}}"#,
            "GenericError",
            "Parameter 'addr.type' does not accept value 'fd'",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","addr":{"type":"unix","data":{}}}}"#,
            "GenericError",
            "Parameter 'addr.data.path' is missing",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","addr":{"type":"none","data":{"y":1}}}}"#,
            "GenericError",
            "Parameter 'addr.data.y' is unexpected",
        ),
        (
            r#"{"execute":"checkpoint","arguments":{"wait":"cut","list":[{"path":"x"},{"path":1}]}}"#,
            "GenericError",
            "Invalid parameter type for 'list[1].path', expected: string",
        ),
    ];
    for (input, class, desc) in rows {
        let answer = client.ask(input).await;
        assert_eq!(answer["error"]["class"], *class, "{input:.60}: {answer}");
        let said = answer["error"]["desc"].as_str().unwrap();
        assert!(said.starts_with(desc), "{input:.60}: {said}");
        assert_eq!(answer["error"]["exit-code"], 2, "{input:.60}");
    }
    assert_eq!(server.handler.executed.load(Ordering::SeqCst), 0);
    let answer = client.ask(r#"{"execute":"query-status"}"#).await;
    assert_eq!(answer, json!({ "return": { "state": "running" } }));
}

#[tokio::test]
async fn invalid_utf8_is_refused_and_the_connection_stays() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    client.send(b"{\"execute\":\"\xff\xfe\"}\n").await;
    assert_eq!(client.message().await["error"]["class"], "GenericError");
    assert!(client.ask(r#"{"execute":"query-status"}"#).await.get("return").is_some());
}

#[tokio::test]
async fn ids_of_any_kind_are_echoed_in_answers_and_errors() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    for id in [json!(7), json!("ü"), json!(null), json!({ "a": [1, "x"] })] {
        let request = json!({ "execute": "query-status", "id": id });
        assert_eq!(client.ask(&request.to_string()).await["id"], id);
        let request = json!({ "execute": "nope", "id": id });
        assert_eq!(client.ask(&request.to_string()).await["id"], id);
        let request = json!({ "id": id });
        assert_eq!(client.ask(&request.to_string()).await["id"], id);
    }
    assert!(client.ask(r#"{"execute":"query-status"}"#).await.get("id").is_none());
}

#[tokio::test]
async fn before_negotiation_no_command_is_found_and_no_event_comes() {
    let server = Server::start();
    let mut client = Client::connect(&server.path).await;
    let answer = client.ask(r#"{"execute":"query-status"}"#).await;
    assert_eq!(answer["error"]["class"], "CommandNotFound");
    let answer = client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}"#).await;
    assert_eq!(answer["error"]["desc"], "Parameter 'enable' does not accept value 'x'");
    server.events.emit("EARLY", Value::Null);
    let answer = client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#).await;
    assert_eq!(answer, json!({ "return": {} }));
    server.events.emit("LATE", json!({ "disk": "vda" }));
    let event = client.message().await;
    assert_eq!(event["event"], "LATE");
    assert_eq!(event["data"], json!({ "disk": "vda" }));
    assert!(event["timestamp"]["seconds"].as_i64().unwrap() > 0);
    assert!(event["timestamp"]["microseconds"].is_i64());
}

#[tokio::test]
async fn single_quotes_whitespace_and_several_messages_on_a_line_are_understood() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    client
        .send(b"\r\n \t\n{'execute': 'query-status', 'id': 1} {\"execute\":\"refuse\",\"id\":2}\n")
        .await;
    assert_eq!(client.message().await["id"], 1);
    let refused = client.message().await;
    assert_eq!((&refused["id"], &refused["error"]["exit-code"]), (&json!(2), &json!(3)));
}

#[tokio::test]
async fn a_message_may_span_lines_and_needs_no_end_of_line() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    client.send(b"{\n  \"execute\":\r\n    \"query-status\"\n}").await;
    assert_eq!(client.message().await, json!({ "return": { "state": "running" } }));
}

#[tokio::test]
async fn commands_that_came_before_the_end_of_the_stream_are_answered() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    client.send(b"{'execute':'query-status','id':1}{'execute':'query-status','id':2}").await;
    client.stream.get_mut().shutdown().await.unwrap();
    assert_eq!(client.message().await["id"], 1);
    assert_eq!(client.message().await["id"], 2);
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn out_of_band_commands_pass_those_that_are_queued() {
    let server = Server::start();
    let mut client = Client::negotiated_oob(&server.path).await;
    client.send(b"{'execute':'hang','id':1}{'execute':'query-status','id':2}").await;
    tokio::time::timeout(DEADLINE, server.handler.entered.notified()).await.unwrap();
    let answer = client.ask("{'exec-oob':'query-status','id':'now'}").await;
    assert_eq!(answer, json!({ "return": { "state": "running" }, "id": "now" }));
    let answer = client.ask("{'exec-oob':'refuse','id':3}").await;
    assert_eq!(answer["error"]["desc"], "The command refuse cannot be executed out of band");
    let answer = client.ask("{'exec-oob':'nope','id':4}").await;
    assert_eq!(answer["error"]["class"], "CommandNotFound");
    // What is no command has no band: it is answered in its turn.
    client.send(b"{'exec-oob':7,'id':5}").await;
    server.handler.release.notify_one();
    for id in [1, 2, 5] {
        assert_eq!(client.message().await["id"], id);
    }
}

#[tokio::test]
async fn events_that_came_before_the_end_are_sent() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    server.events.emit("SHUTDOWN", Value::Null);
    server.shutdown.cancel();
    assert_eq!(client.message().await["event"], "SHUTDOWN");
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn a_control_character_resets_a_confused_parser() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    client.send(b"{\"execute\":\x01").await;
    assert_eq!(client.message().await["error"]["class"], "GenericError");
    assert!(client.ask(r#"{"execute":"query-status"}"#).await.get("return").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_state_that_has_changed_is_told_once() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    server.handler.state.store(7, Ordering::SeqCst);
    let told = client.message().await;
    assert_eq!((&told["event"], &told["data"]), (&json!("BREP_STATE"), &json!({ "number": 7 })));
    tokio::time::sleep(Duration::from_secs(60)).await;
    server.events.emit("TICK", Value::Null);
    assert_eq!(client.message().await["event"], "TICK");
    // It is looked at after each event, not only now and then.
    server.handler.state.store(8, Ordering::SeqCst);
    server.events.emit("TICK", Value::Null);
    assert_eq!(client.message().await["event"], "TICK");
    assert_eq!(client.message().await["data"]["number"], 8);
}

#[tokio::test]
async fn shutdown_lets_the_running_command_end_and_removes_the_socket() {
    let server = Server::start();
    let mut client = Client::negotiated(&server.path).await;
    client.send(b"{\"execute\":\"hang\"}\n").await;
    tokio::time::timeout(DEADLINE, server.handler.entered.notified()).await.unwrap();
    server.shutdown.cancel();
    server.handler.release.notify_one();
    assert_eq!(client.message().await, json!({ "return": {} }));
    assert!(client.is_closed().await);
    tokio::time::timeout(DEADLINE, server.task).await.unwrap().unwrap().unwrap();
    assert!(!server.path.exists());
}

#[tokio::test]
async fn the_socket_is_private_and_only_a_dead_one_is_replaced() {
    let server = Server::start();
    let mode = std::fs::metadata(&server.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = ControlServer::bind(&server.path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("control.sock"), "{error}");

    let stale = server.path.with_file_name("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(ControlServer::bind(&stale).is_ok());

    let file = server.path.with_file_name("file");
    std::fs::write(&file, "data").unwrap();
    assert!(ControlServer::bind(&file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
}

#[tokio::test]
async fn the_client_negotiates_executes_and_keeps_events() {
    let server = Server::start();
    let path = server.path.clone();
    let events = server.events.clone();
    let client = tokio::task::spawn_blocking(move || {
        let mut client = ControlClient::connect(&path, DEADLINE).unwrap();
        events.emit("TICK", json!({ "n": 1 }));
        let status = client.execute("query-status", Value::Null).unwrap();
        assert_eq!(status["state"], "running");
        let echoed = client.execute("checkpoint", json!({ "wait": "commit" })).unwrap();
        assert_eq!(echoed["wait"], "commit");
        let refused = client.execute("refuse", Value::Null).unwrap_err();
        assert_eq!((refused.exit_code(), refused.to_string().as_str()), (3, "not now"));
        let event = client.next_event(DEADLINE).unwrap().unwrap();
        assert_eq!((event.name.as_str(), &event.data["n"]), ("TICK", &json!(1)));
        client.set_timeout(Duration::from_millis(30));
        assert!(matches!(client.execute("hang", Value::Null), Err(ClientError::TimedOut { .. })));
    });
    tokio::time::timeout(DEADLINE, client).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_client_refuses_other_servers_and_absent_ones() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.sock");
    let absent = ControlClient::connect(&path, DEADLINE).unwrap_err();
    assert!(matches!(absent, ClientError::Connect { .. }), "{absent}");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        use std::io::Write;
        for greeting in [&b"SSH-2.0-x\r\n"[..], b"{\"QMP\":{}}\r\n", b"{\"QMP\""] {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting).unwrap();
        }
    });
    let client = tokio::task::spawn_blocking(move || {
        for _ in 0..2 {
            let error = ControlClient::connect(&path, DEADLINE).unwrap_err();
            assert!(matches!(error, ClientError::Foreign { .. }), "{error}");
        }
        let error = ControlClient::connect(&path, DEADLINE).unwrap_err();
        assert!(matches!(error, ClientError::Closed { .. }), "{error}");
    });
    tokio::time::timeout(DEADLINE, client).await.unwrap().unwrap();
    other.join().unwrap();
}
