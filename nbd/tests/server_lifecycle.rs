//! Connections that are closed, drained, taken over and shut down.

mod server_support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brep_block::{BlockDevice, Fault, Memory, Operation, Rule};
use brep_nbd::Endpoint;
use brep_nbd::proto::wire::{
    Command, Errno, OptionCode, PRIVATE_OPTION_BASE, PRIVATE_REPLY, ReplyType,
};
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, OptionErrorCode, PrivateReply,
    Server, ServerConfig, StaticExports,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, future};
use server_support::{
    Fixture, SIZE, info_data, option_bytes, request, request_bytes, until, within,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn write(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    request_bytes(request(Command::WRITE, cookie, offset, data.len() as u32), data)
}

async fn content(device: &dyn BlockDevice, len: usize) -> Bytes {
    device.read(0, len).await.expect("readable")
}

#[tokio::test]
async fn a_closed_connection_is_closed_only_when_its_operations_have_completed() {
    let memory = Memory::new("memory", SIZE);
    let fault = Fault::new(memory.clone());
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let connection = fixture.connection().await;
    let hang = fault.hang(Rule::new(Operation::Write));
    raw.send(&write(1, 0, b"late")).await;
    within(hang.reached(1)).await;

    connection.close();
    raw.send(&write(2, 4, b"never")).await;
    let mut closed = Box::pin(connection.closed());
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!((&mut closed).now_or_never().is_none(), "closed while an operation runs");
    }
    assert_eq!(content(&*memory, 9).await, [0; 9][..]);

    hang.release();
    within(closed).await;
    assert_eq!(content(&*memory, 9).await, b"late\0\0\0\0\0"[..]);
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert!(raw.is_closed().await);
    assert!(fixture.server.connections().is_empty());
}

#[tokio::test]
async fn operations_that_end_do_not_end_their_connection() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let connection = fixture.connection().await;
    for cookie in 0..3 {
        let hang = fault.hang(Rule::new(Operation::Write));
        raw.send(&write(cookie, 0, b"x")).await;
        within(hang.reached(1)).await;
        hang.release();
        assert_eq!(raw.simple().await, (Errno::OK, cookie));
        assert!(!connection.is_closed());
    }
    drop(raw);
    within(connection.closed()).await;
}

#[tokio::test]
async fn an_operation_outlives_the_client_that_asked_for_it() {
    let memory = Memory::new("memory", SIZE);
    let fault = Fault::new(memory.clone());
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let connection = fixture.connection().await;
    let hang = fault.hang(Rule::new(Operation::Write));
    raw.send(&write(1, 0, b"late")).await;
    within(hang.reached(1)).await;
    drop(raw);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!connection.is_closed());
    hang.release();
    within(connection.closed()).await;
    assert_eq!(content(&*memory, 4).await, b"late"[..]);
    assert_eq!(fixture.server.bytes_in_flight(), 0);
}

#[tokio::test]
async fn complete_requests_before_an_end_inside_a_request_are_finished() {
    let memory = Memory::new("memory", SIZE);
    let fixture = Fixture::device(memory.clone()).await;
    let mut raw = fixture.session(false).await;
    let connection = fixture.connection().await;
    let mut bytes = write(1, 0, b"whole");
    let half = write(2, 5, b"half");
    bytes.extend(&half[..half.len() - 1]);
    raw.send(&bytes).await;
    raw.stream.shutdown().await.unwrap();
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert!(raw.is_closed().await);
    within(connection.closed()).await;
    assert_eq!(content(&*memory, 9).await, b"whole\0\0\0\0"[..]);
}

#[tokio::test]
async fn outstanding_requests_are_answered_before_a_disconnect_takes_effect() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Write));
    let disconnect = request_bytes(request(Command::DISC, 2, 0, 0), &[]);
    raw.send(&[write(1, 0, b"x"), disconnect, write(3, 0, b"y")].concat()).await;
    within(hang.reached(1)).await;
    hang.release();
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert!(raw.is_closed().await, "a request after the disconnect was answered");
}

#[tokio::test]
async fn a_lost_operation_is_answered_with_an_error() {
    let fixture = Fixture::device(Arc::new(Panics(Memory::new("memory", SIZE)))).await;
    let mut raw = fixture.session(false).await;
    let connection = fixture.connection().await;
    raw.send(&write(1, 0, b"x")).await;
    assert_eq!(raw.simple().await, (Errno::EIO, 1));
    assert_eq!(raw.read(0, 1).await, [0]);
    drop(raw);
    within(connection.closed()).await;
}

#[tokio::test]
async fn a_shutdown_finishes_what_runs_refuses_what_comes_and_closes() {
    let memory = Memory::new("memory", SIZE);
    let fault = Fault::new(memory.clone());
    let fixture = Fixture::device(fault.clone()).await;
    let mut idle = fixture.session(false).await;
    let mut silent = fixture.connect().await;
    silent.greeting().await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Write));
    raw.send(&write(1, 0, b"late")).await;
    within(hang.reached(1)).await;

    let server = Arc::clone(&fixture.server);
    let shutdown = tokio::spawn(async move { server.shutdown(Duration::from_secs(60)).await });
    assert!(idle.is_closed().await);
    assert!(silent.is_closed().await);
    raw.send(&write(2, 4, b"refused")).await;
    assert_eq!(raw.simple().await, (Errno::ESHUTDOWN, 2));
    hang.release();
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert!(raw.is_closed().await);
    within(shutdown).await.unwrap();
    assert_eq!(content(&*memory, 6).await, b"late\0\0"[..]);
    assert!(tokio::net::UnixStream::connect(&fixture.path).await.is_err());
    assert!(!fixture.path.exists(), "the socket is left behind");
}

#[tokio::test]
async fn removing_an_export_drains_its_connections_and_no_others() {
    let memory = Memory::new("memory", SIZE);
    let fault = Fault::new(memory.clone());
    let exports = Arc::new(StaticExports::new());
    assert!(exports.add(Export::new("disk", fault.clone())));
    assert!(exports.add(Export::new("other", Memory::new("other", SIZE))));
    assert!(!exports.add(Export::new("disk", Memory::new("third", SIZE))), "the name is taken");
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut other = fixture.client().await;
    other.option(OptionCode::INFO, &info_data("disk", &[])).await;
    other.go("other").await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Write));
    raw.send(&write(1, 0, b"late")).await;
    within(hang.reached(1)).await;

    let mut removal = Box::pin(exports.remove("disk"));
    assert!((&mut removal).now_or_never().is_none());
    let mut late = fixture.client().await;
    let outcome = late.outcome(OptionCode::GO, &info_data("disk", &[])).await;
    assert_eq!(outcome, ReplyType::ERR_UNKNOWN);
    hang.release();
    assert!(within(removal).await);
    assert_eq!(content(&*memory, 4).await, b"late"[..]);
    assert_eq!(other.read(0, 1).await, [0]);
    assert!(!within(exports.remove("disk")).await);
}

#[tokio::test]
async fn an_export_that_is_handed_over_answers_what_it_has_begun_and_refuses_what_comes() {
    let memory = Memory::new("memory", SIZE);
    let fault = Fault::new(memory.clone());
    let exports = Arc::new(StaticExports::new());
    assert!(exports.add(Export::new("disk", fault.clone())));
    assert!(exports.add(Export::new("other", Memory::new("other", SIZE))));
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut other = fixture.client().await;
    other.go("other").await;
    let mut idle = fixture.session(false).await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Write));
    raw.send(&write(1, 0, b"late")).await;
    within(hang.reached(1)).await;

    let mut handed = Box::pin(exports.hand_over("disk", Duration::from_secs(60)));
    assert!((&mut handed).now_or_never().is_none());
    assert!(idle.is_closed().await);
    raw.send(&write(2, 4, b"refused")).await;
    assert_eq!(raw.simple().await, (Errno::ESHUTDOWN, 2));
    assert!((&mut handed).now_or_never().is_none(), "a write still runs");
    hang.release();
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert!(raw.is_closed().await);
    assert!(within(handed).await);
    assert_eq!(content(&*memory, 6).await, b"late\0\0"[..]);
    assert_eq!(other.read(0, 1).await, [0]);
    assert!(!within(exports.hand_over("disk", Duration::ZERO)).await);
}

#[tokio::test(start_paused = true)]
async fn a_hand_over_does_not_wait_for_a_client_that_takes_no_answers() {
    let exports = Arc::new(StaticExports::new());
    assert!(exports.add(Export::new("disk", Memory::new("memory", 64 << 20))));
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut deaf = fixture.session(false).await;
    deaf.send(&request_bytes(request(Command::READ, 1, 0, 32 << 20), &[])).await;
    until(|| (fixture.server.bytes_in_flight() > 1 << 20).then_some(())).await;
    let started = tokio::time::Instant::now();
    assert!(within(exports.hand_over("disk", Duration::from_secs(5))).await);
    assert!((5..7).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    until(|| fixture.server.connections().is_empty().then_some(())).await;
}

#[tokio::test]
async fn an_end_between_requests_closes_without_a_word() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.session(false).await;
    assert_eq!(raw.read(0, 1).await, [0]);
    tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await.expect("ended");
    assert!(raw.is_closed().await);
    until(|| fixture.server.connections().is_empty().then_some(())).await;
}

#[tokio::test]
async fn replacing_an_export_ends_the_sessions_of_the_old_one() {
    let exports = Arc::new(StaticExports::new());
    exports.add(Export::new("disk", Memory::new("old", 1 << 20)));
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut old = fixture.session(false).await;
    let device = Memory::new("new", 2 << 20);
    within(exports.replace(Export::new("disk", device))).await;
    assert!(old.is_closed().await);
    let mut new = fixture.session(false).await;
    assert_eq!(new.read((2 << 20) - 1, 1).await, [0]);
}

/// Answers private options: +0 echoes, +1 takes the stream over, +2 refuses, +3 waits for ever.
#[derive(Default)]
struct Private {
    taken: Arc<Mutex<Vec<u8>>>,
    ended: Arc<AtomicUsize>,
    waiting: AtomicUsize,
}

impl Exports for Private {
    fn list(&self) -> Vec<ExportDescription> {
        Vec::new()
    }

    fn open(&self, name: &str, _: &Arc<Connection>) -> Result<Export, OptionError> {
        Err(OptionError::unknown_export(name))
    }

    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<Connection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        Box::pin(async move {
            match option - PRIVATE_OPTION_BASE {
                0 => {
                    connection.set_data(Arc::new(data.clone()));
                    PrivateReply::Ack(data)
                }
                1 => self.takeover(),
                2 => PrivateReply::Error(OptionError::new(OptionErrorCode::Policy, "not for you")),
                _ => {
                    self.waiting.fetch_add(1, Ordering::SeqCst);
                    future::pending().await
                }
            }
        })
    }
}

impl Private {
    /// Everything that comes is kept, and sent back.
    fn takeover(&self) -> PrivateReply {
        let (taken, ended) = (Arc::clone(&self.taken), Arc::clone(&self.ended));
        let then = Box::new(move |mut stream: brep_nbd::server::TakenStream| {
            async move {
                let mut buffer = [0; 3];
                loop {
                    let count = stream.read(&mut buffer).await.unwrap_or(0);
                    if count == 0 {
                        break;
                    }
                    taken.lock().unwrap().extend(&buffer[..count]);
                    stream.write_all(&buffer[..count]).await.expect("sent");
                }
                ended.fetch_add(1, Ordering::SeqCst);
            }
            .boxed()
        });
        PrivateReply::Takeover { reply: Bytes::from_static(b"welcome"), then }
    }
}

fn private(number: u32) -> OptionCode {
    OptionCode(PRIVATE_OPTION_BASE + number)
}

#[tokio::test]
async fn private_options_are_answered_by_the_user_of_the_server() {
    let fixture = Fixture::serve(Arc::new(Private::default()), ServerConfig::default()).await;
    let mut raw = fixture.client().await;
    let replies = raw.option(private(0), b"ping").await;
    assert_eq!(replies, [(PRIVATE_REPLY, b"ping".to_vec()), (ReplyType::ACK, vec![])]);
    let data = fixture.connection().await.data().expect("attached");
    assert_eq!(data.downcast_ref::<Bytes>().unwrap(), &b"ping"[..]);
    let replies = raw.option(private(0), b"").await;
    assert_eq!(replies, [(ReplyType::ACK, vec![])]);
    let replies = raw.option(private(2), b"").await;
    assert_eq!(replies, [(ReplyType::ERR_POLICY, b"not for you".to_vec())]);
    assert_eq!(raw.outcome(OptionCode::LIST, &[]).await, ReplyType::ACK);
}

#[tokio::test]
async fn a_stream_that_is_taken_over_begins_with_what_was_sent_after_the_option() {
    let exports = Arc::new(Private::default());
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut raw = fixture.client().await;
    let connection = fixture.connection().await;
    let mut bytes = option_bytes(private(1), b"");
    bytes.extend(b"early bytes");
    raw.send(&bytes).await;
    let replies = raw.replies(private(1)).await;
    assert_eq!(replies, [(PRIVATE_REPLY, b"welcome".to_vec()), (ReplyType::ACK, vec![])]);
    assert_eq!(raw.receive(11).await, b"early bytes");
    raw.send(b", late bytes").await;
    assert_eq!(raw.receive(12).await, b", late bytes");
    assert_eq!(*exports.taken.lock().unwrap(), b"early bytes, late bytes");

    connection.close();
    assert!(raw.is_closed().await);
    within(connection.closed()).await;
    assert_eq!(exports.ended.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_shutdown_ends_streams_that_were_taken_over() {
    let exports = Arc::new(Private::default());
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut raw = fixture.client().await;
    assert_eq!(raw.outcome(private(1), b"").await, ReplyType::ACK);
    within(fixture.server.shutdown(Duration::from_secs(60))).await;
    assert!(raw.is_closed().await);
    assert_eq!(exports.ended.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_of_the_handshake_stands_still_while_the_server_thinks() {
    let exports = Arc::new(Private::default());
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut raw = fixture.client().await;
    let connection = fixture.connection().await;
    raw.send(&option_bytes(private(3), b"")).await;
    until(|| (exports.waiting.load(Ordering::SeqCst) == 1).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(!connection.is_closed());
    connection.close();
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn options_that_arrive_before_a_shutdown_ends_are_refused_with_shutdown() {
    let gate = Arc::new(Gate::default());
    let fixture = Fixture::serve(gate.clone(), ServerConfig::default()).await;
    let mut raw = fixture.client().await;
    raw.send(&[option_bytes(private(0), b""), option_bytes(OptionCode::LIST, b"")].concat()).await;
    within(gate.entered.notified()).await;
    let server = Arc::clone(&fixture.server);
    let shutdown = tokio::spawn(async move { server.shutdown(Duration::from_secs(60)).await });
    // The listener goes when the shutdown begins.
    until(|| (!fixture.path.exists()).then_some(())).await;
    gate.open.notify_one();
    assert_eq!(raw.replies(private(0)).await, [(ReplyType::ACK, vec![])]);
    assert_eq!(raw.replies(OptionCode::LIST).await[0].0, ReplyType::ERR_SHUTDOWN);
    assert!(raw.is_closed().await);
    within(shutdown).await.unwrap();
}

/// A private option that is answered when the test wants it.
#[derive(Default)]
struct Gate {
    entered: tokio::sync::Notify,
    open: tokio::sync::Notify,
}

impl Exports for Gate {
    fn list(&self) -> Vec<ExportDescription> {
        Vec::new()
    }

    fn open(&self, name: &str, _: &Arc<Connection>) -> Result<Export, OptionError> {
        Err(OptionError::unknown_export(name))
    }

    fn private_option<'a>(
        &'a self,
        _: &'a Arc<Connection>,
        _: u32,
        _: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        Box::pin(async move {
            self.entered.notify_one();
            self.open.notified().await;
            PrivateReply::Ack(Bytes::new())
        })
    }
}

#[tokio::test]
async fn an_address_that_is_taken_is_named_with_what_to_do() {
    let fixture = Fixture::memory().await;
    let endpoint = Endpoint::Unix { path: fixture.path.clone() };
    let error = Server::bind(&endpoint).await.expect_err("taken").to_string();
    assert!(error.contains(fixture.path.to_str().unwrap()) && error.contains("another server"));

    let tcp = Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
    let listener = Server::bind(&tcp).await.expect("a port");
    let error = Server::bind(listener.endpoint()).await.expect_err("taken").to_string();
    assert!(error.contains("127.0.0.1:") && error.contains("another program"), "{error}");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    let error = Server::bind(&Endpoint::Unix { path: path.clone() }).await.expect_err("a file");
    assert!(error.to_string().contains("no socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let path = directory.path().join("missing/socket");
    let error = Server::bind(&Endpoint::Unix { path }).await.expect_err("no directory");
    assert!(error.to_string().contains("create the directory"), "{error}");
}

#[tokio::test]
async fn a_socket_that_a_dead_server_left_behind_is_replaced_and_private() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let endpoint = Endpoint::Unix { path: path.clone() };
    let listener = Server::bind(&endpoint).await.expect("replaced");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(listener);
    assert!(!path.exists());
}

/// A device whose writes do not finish at once, and then panic.
#[derive(Debug)]
struct Panics(Arc<Memory>);

impl BlockDevice for Panics {
    fn name(&self) -> &str {
        "panics"
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn limits(&self) -> brep_block::Limits {
        self.0.limits()
    }

    fn read(&self, offset: u64, len: usize) -> brep_block::Io<'_, Bytes> {
        self.0.read(offset, len)
    }

    fn write(&self, _: u64, _: Bytes, _: brep_block::WriteFlags) -> brep_block::Io<'_, ()> {
        brep_block::Io::future(async {
            tokio::task::yield_now().await;
            panic!("on purpose")
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: brep_block::ZeroFlags,
    ) -> brep_block::Io<'_, ()> {
        self.0.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> brep_block::Io<'_, ()> {
        self.0.discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> brep_block::Io<'_, brep_block::BlockStatus> {
        self.0.block_status(offset, len)
    }

    fn flush(&self, level: brep_block::FlushLevel) -> brep_block::Io<'_, ()> {
        self.0.flush(level)
    }
}
