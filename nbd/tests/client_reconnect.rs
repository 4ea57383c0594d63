//! The client that connects later: server absent, late, lost, restarted, changed.

mod client_support;

use std::future::Future;
use std::time::Duration;

use brep_block::{BlockDevice, ErrorKind, FlushLevel, Result, WriteFlags};
use brep_nbd::client::{Client, ClientError, ClientStatus, ConnectOptions, ReconnectPolicy};
use brep_nbd::proto::wire::{Command, Errno};
use bytes::Bytes;
use client_support::scripted::{Export, Listener, Server};
use client_support::{QemuNbd, pattern};
use futures_util::join;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("this hangs")
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}

/// Short pauses: what is waited for is always a condition.
fn policy(delay: Duration) -> ReconnectPolicy {
    ReconnectPolicy {
        delay,
        pause_first: Duration::from_millis(1),
        pause_max: Duration::from_millis(10),
        ..ReconnectPolicy::default()
    }
}

struct Pair {
    client: Client,
    listener: Listener,
    server: Server,
    /// Where the socket lies: bound by every user, or it would be removed.
    directory: tempfile::TempDir,
}

async fn pair(export: Export, policy: ReconnectPolicy) -> Pair {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let client = Client::new(listener.options(), policy);
    let (connected, server) =
        soon(async { join!(client.connect(), listener.accept(export)) }).await;
    connected.expect("connected");
    Pair { client, listener, server, directory }
}

async fn until_reconnecting(client: &Client) {
    soon(client.wait_for_status(|s| matches!(s, ClientStatus::Reconnecting { .. }))).await;
}

async fn until_connected(client: &Client) {
    soon(client.wait_for_status(|s| matches!(s, ClientStatus::Connected))).await;
}

#[tokio::test]
async fn before_it_connects_its_size_is_zero_and_requests_fail() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let client = Client::new(listener.options(), policy(PATIENCE));
    drop(listener);
    assert_eq!(client.size(), 0);
    let error = client.read(0, 512).await.expect_err("not connected");
    assert_eq!((error.kind(), error.detail()), (ErrorKind::NotConnected, "not connected"));
    let data = Bytes::from_static(b"data");
    let flags = WriteFlags::default();
    assert_eq!(kind(client.write(0, data, flags).await), ErrorKind::NotConnected);
    assert_eq!(kind(client.flush(FlushLevel::Durable).await), ErrorKind::NotConnected);
    assert!(client.connect().await.is_err());
    assert_eq!(client.size(), 0);
    assert!(matches!(client.status(), ClientStatus::Disconnected));
}

#[tokio::test]
async fn a_server_that_comes_late_is_waited_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    drop(listener);
    let waiting = ReconnectPolicy { open_timeout: PATIENCE, ..policy(Duration::ZERO) };
    let client = Client::new(options, waiting);
    let (connected, server) = soon(async {
        join!(client.connect(), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Listener::bind(directory.path()).accept(Export::default()).await
        })
    })
    .await;
    connected.expect("connected");
    assert_eq!(client.size(), 1 << 30);
    drop(server);
}

#[tokio::test]
async fn without_a_delay_requests_fail_at_once_and_a_later_one_finds_the_new_connection() {
    let Pair { client, listener, server, directory: _directory } =
        pair(Export::default(), policy(Duration::ZERO)).await;
    let pending = client.read(0, 512);
    drop(server);
    assert_eq!(kind(soon(pending).await), ErrorKind::NotConnected);
    let mut server = soon(listener.accept(Export::default())).await;
    until_connected(&client).await;
    let (read, ()) = join!(client.read(0, 4), async {
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::OK, b"back").await;
    });
    assert_eq!(read.expect("read"), "back");
}

#[tokio::test]
async fn with_a_delay_interrupted_and_new_requests_are_sent_over_the_next_connection() {
    let Pair { client, listener, mut server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    let interrupted = client.write(0, Bytes::from_static(b"data"), WriteFlags::default());
    soon(server.expect_request()).await;
    drop(server);
    let serve = async {
        until_reconnecting(&client).await;
        let read = client.read(4096, 4);
        let answering = async {
            let mut server = soon(listener.accept(Export::default())).await;
            for _ in 0..2 {
                let (header, payload) = soon(server.expect_request()).await;
                if header.command == Command::WRITE {
                    assert_eq!((header.offset, &payload[..]), (0, &b"data"[..]));
                    server.simple(header.cookie, Errno::OK, &[]).await;
                } else {
                    server.simple(header.cookie, Errno::OK, b"read").await;
                }
            }
        };
        join!(read, answering).0
    };
    let (written, read) = soon(async { join!(interrupted, serve) }).await;
    written.expect("written the second time");
    assert_eq!(read.expect("read"), "read");
}

#[tokio::test(start_paused = true)]
async fn the_delay_has_an_end() {
    let delay = Duration::from_secs(7);
    let Pair { client, listener, server, directory: _directory } =
        pair(Export::default(), policy(delay)).await;
    let pending = client.read(0, 512);
    drop((server, listener));
    let lost = tokio::time::Instant::now();
    assert_eq!(kind(pending.await), ErrorKind::NotConnected);
    assert!(lost.elapsed() >= delay && lost.elapsed() < 2 * delay, "{:?}", lost.elapsed());
    // Later ones do not wait again.
    let later = tokio::time::Instant::now();
    assert_eq!(kind(client.read(0, 512).await), ErrorKind::NotConnected);
    assert!(later.elapsed() < Duration::from_secs(1));
    assert!(matches!(client.status(), ClientStatus::Reconnecting { .. }));
}

#[tokio::test]
async fn disconnecting_ends_the_waiting() {
    let Pair { client, listener, server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    drop((server, listener));
    until_reconnecting(&client).await;
    let pending = client.read(0, 512);
    let (result, ()) = soon(async { join!(pending, client.disconnect()) }).await;
    assert_eq!(kind(result), ErrorKind::NotConnected);
    assert_eq!(client.size(), 0);
    assert!(matches!(client.status(), ClientStatus::Disconnected));
}

#[tokio::test]
async fn disconnecting_says_goodbye() {
    let Pair { client, listener: _listener, mut server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    let ((), request) = soon(async { join!(client.disconnect(), server.expect_request()) }).await;
    assert_eq!(request.0.command, Command::DISC);
}

#[tokio::test]
async fn a_violation_is_not_connected_to_again_but_by_command() {
    let Pair { client, listener, mut server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    let pending = client.read(0, 512);
    soon(server.expect_request()).await;
    server.send(&[0xff; 16]).await;
    assert_eq!(kind(soon(pending).await), ErrorKind::NotConnected);
    let status = soon(client.wait_for_status(|s| matches!(s, ClientStatus::Failed { .. }))).await;
    let ClientStatus::Failed { reason } = status else { panic!("{status:?}") };
    assert!(matches!(reason, ClientError::Violation { .. }));
    let error = client.read(0, 1).await.expect_err("given up");
    assert!(error.detail().contains("violated"), "{error}");
    let (connected, _server) =
        soon(async { join!(client.connect(), listener.accept(Export::default())) }).await;
    connected.expect("by command");
}

#[tokio::test]
async fn an_export_that_came_back_as_something_less_is_refused() {
    let smaller = Export { size: 1 << 20, ..Export::default() };
    let read_only = Export { flags: 0x050f, ..Export::default() };
    let no_flush = Export { flags: 1, ..Export::default() };
    let coarser = Export { block_sizes: Some([4096, 4096, 1 << 20]), ..Export::default() };
    for (worse, word) in
        [(smaller, "bytes"), (read_only, "read-only"), (no_flush, "flushed"), (coarser, "blocks")]
    {
        let Pair { client, listener, server, directory: _directory } =
            pair(Export::default(), policy(Duration::ZERO)).await;
        drop(server);
        let mut server = soon(listener.accept(worse)).await;
        assert_eq!(soon(server.expect_request()).await.0.command, Command::DISC);
        let refused = |status: &ClientStatus| match status {
            ClientStatus::Reconnecting { reason, .. } => reason.to_string().contains(word),
            _ => false,
        };
        soon(client.wait_for_status(refused)).await;
        assert_eq!(client.size(), 1 << 30);
        // A larger one is taken, but its new part is not used.
        let larger = Export { size: 2 << 30, ..Export::default() };
        let _server = soon(listener.accept(larger)).await;
        until_connected(&client).await;
        assert_eq!(client.size(), 1 << 30);
        assert_eq!(kind(client.read(1 << 30, 1).await), ErrorKind::InvalidInput);
    }
}

#[tokio::test]
async fn a_failed_flush_stays_failed_over_a_reconnect() {
    let Pair { client, listener, mut server, directory: _directory } =
        pair(Export::default(), policy(Duration::ZERO)).await;
    let (flushed, ()) = join!(client.flush(FlushLevel::Durable), async {
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::EIO, &[]).await;
    });
    assert_eq!(kind(flushed), ErrorKind::Io);
    drop(server);
    let server = soon(listener.accept(Export::default())).await;
    until_connected(&client).await;
    assert_eq!(kind(client.flush(FlushLevel::Durable).await), ErrorKind::Sticky);
    drop(server);
}

#[tokio::test]
async fn a_flush_that_was_pending_when_another_failed_does_not_succeed_later() {
    let Pair { client, listener, mut server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    let flush = || client.flush(FlushLevel::Durable);
    let (first, second) = (flush(), flush());
    let (header, _) = soon(server.expect_request()).await;
    soon(server.expect_request()).await;
    server.simple(header.cookie, Errno::EIO, &[]).await;
    assert_eq!(kind(soon(first).await), ErrorKind::Io);
    drop(server);
    let serving = async {
        let mut server = soon(listener.accept(Export::default())).await;
        // A flush that is sent again would be answered.
        let (header, _) = server.expect_request().await;
        server.simple(header.cookie, Errno::OK, &[]).await;
    };
    let second = tokio::select! {
        second = soon(second) => second,
        () = serving => panic!("it was sent again"),
    };
    assert_eq!(kind(second), ErrorKind::Sticky);
}

#[tokio::test]
async fn what_a_leaving_server_refuses_is_sent_again_to_the_next_one() {
    let Pair { client, listener, mut server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    let write = client.write(0, Bytes::from_static(&[1; 512]), WriteFlags::default());
    let serving = async {
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::ESHUTDOWN, &[]).await;
        // We do not stay with it until it goes.
        assert_eq!(soon(server.expect_request()).await.0.command, Command::DISC);
        let mut next = soon(listener.accept(Export::default())).await;
        let (header, data) = soon(next.expect_request()).await;
        assert_eq!((header.command, data), (Command::WRITE, vec![1; 512]));
        next.simple(header.cookie, Errno::OK, &[]).await;
        next
    };
    let (written, _next) = soon(async { join!(write, serving) }).await;
    written.expect("written by the next one");
}

#[tokio::test]
async fn a_flush_that_a_leaving_server_refuses_has_not_failed() {
    let Pair { client, listener, mut server, directory: _directory } =
        pair(Export::default(), policy(PATIENCE)).await;
    let flush = client.flush(FlushLevel::Durable);
    let serving = async {
        let (header, _) = soon(server.expect_request()).await;
        assert_eq!(header.command, Command::FLUSH);
        server.simple(header.cookie, Errno::ESHUTDOWN, &[]).await;
        let mut next = soon(listener.accept(Export::default())).await;
        let (header, _) = soon(next.expect_request()).await;
        assert_eq!(header.command, Command::FLUSH);
        next.simple(header.cookie, Errno::OK, &[]).await;
        next
    };
    let (flushed, mut next) = soon(async { join!(flush, serving) }).await;
    flushed.expect("flushed by the next one");
    let flush = client.flush(FlushLevel::Durable);
    let serving = async {
        let (header, _) = soon(next.expect_request()).await;
        next.simple(header.cookie, Errno::OK, &[]).await;
    };
    soon(async { join!(flush, serving) }).await.0.expect("and so is every later one");
}

#[tokio::test]
async fn a_server_that_lets_everybody_in_and_sends_them_away_is_not_asked_without_end() {
    let pauses = ReconnectPolicy {
        pause_first: Duration::from_millis(200),
        pause_max: Duration::from_secs(5),
        ..policy(PATIENCE)
    };
    let Pair { client, listener, server, directory: _directory } =
        pair(Export::default(), pauses).await;
    drop(server);
    let mut accepted = 0;
    // At most: a slow machine makes fewer of it.
    let _ = timeout(Duration::from_millis(1200), async {
        loop {
            drop(listener.accept(Export::default()).await);
            accepted += 1;
        }
    })
    .await;
    assert!((1..=4).contains(&accepted), "{accepted} in 1.2 s");
    drop(client);
}

#[tokio::test]
async fn a_write_that_took_too_long_is_not_sent_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options =
        ConnectOptions { request_timeout: Duration::from_millis(50), ..listener.options() };
    let client = Client::new(options, policy(PATIENCE));
    let (connected, mut server) =
        soon(async { join!(client.connect(), listener.accept(Export::default())) }).await;
    connected.expect("connected");
    let write = client.write(0, Bytes::from_static(&[1; 512]), WriteFlags::default());
    let (written, _) = soon(async { join!(write, server.expect_request()) }).await;
    assert_eq!(kind(written), ErrorKind::TimedOut);
    // A read may be: nothing comes of it twice.
    let read = client.read(0, 512);
    let serving = async {
        let mut next = soon(listener.accept(Export::default())).await;
        let (header, _) = soon(next.expect_request()).await;
        assert_eq!(header.command, Command::READ);
        next.simple(header.cookie, Errno::OK, &[7; 512]).await;
        next
    };
    let (read, _next) = soon(async { join!(read, serving) }).await;
    assert_eq!(read.expect("read"), [7; 512][..]);
}

#[tokio::test(start_paused = true)]
async fn attempts_pause_for_up_to_1_2_4_8_and_then_16_seconds() {
    let Pair { client, listener, server, directory: _directory } =
        pair(Export::default(), ReconnectPolicy::default()).await;
    drop((server, listener));
    let is_new_reason = |status: &ClientStatus| match status {
        ClientStatus::Reconnecting { reason, .. } => matches!(reason, ClientError::Connect { .. }),
        _ => false,
    };
    client.wait_for_status(is_new_reason).await;
    let mut last = tokio::time::Instant::now();
    let mut pauses = Vec::new();
    while pauses.len() < 6 {
        // The status is set once per attempt.
        let mut first = true;
        client.wait_for_status(|_| !std::mem::replace(&mut first, false)).await;
        pauses.push(last.elapsed().as_secs_f64());
        last = tokio::time::Instant::now();
    }
    // Up to a quarter is left out, by chance; timers may be late by a moment.
    for (pause, longest) in pauses.iter().zip([1.0, 2.0, 4.0, 8.0, 16.0, 16.0]) {
        assert!(*pause > longest * 0.74 && *pause < longest + 0.1, "{pauses:?}");
    }
}

#[tokio::test]
async fn a_restarted_server_goes_on_with_the_same_disk() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk.raw");
    let mut shadow = pattern(1 << 20, 1);
    std::fs::write(&path, &shadow).expect("written");
    let mut server = QemuNbd::start(directory.path(), &path, &[]);
    let options: ConnectOptions = server.options("");
    let client = Client::new(options, policy(PATIENCE));
    client.connect().await.expect("connected");
    for round in 0..5u64 {
        let offset = round * 100_000;
        let data = pattern(70_000, round);
        shadow[offset as usize..][..data.len()].copy_from_slice(&data);
        let write = client.write(offset, Bytes::from(data), WriteFlags::default());
        // Before, while, or after the write is carried out.
        server.kill();
        server = QemuNbd::start(directory.path(), &path, &[]);
        soon(write).await.expect("written");
    }
    assert_eq!(soon(client.read(0, 1 << 20)).await.expect("read"), shadow);
    soon(client.disconnect()).await;
    drop(server);
    assert!(std::fs::read(&path).expect("read") == shadow, "the file differs");
}
