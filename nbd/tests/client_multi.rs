//! One export over several connections: who is asked what, flushes, and what is refused.

mod client_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use brep_block::{BlockDevice, ErrorKind, FlushLevel, Memory, Result, WriteFlags, conformance};
use brep_nbd::Endpoint;
use brep_nbd::client::{ClientError, ConnectOptions, MultiConnection, ReconnectPolicy};
use brep_nbd::proto::wire::{Command, Errno};
use brep_nbd::server;
use bytes::Bytes;
use client_support::pair::{PATIENCE, soon};
use client_support::scripted::{Export, Listener, Server};
use futures_util::future::join_all;
use futures_util::join;

/// Writable, with flushes and without several connections.
const ALONE: u16 = 0x0c6d;

/// Accepts as many clients as there are exports, one after the other.
async fn accept(listener: &Listener, exports: &[Export]) -> Vec<Server> {
    let mut servers = Vec::new();
    for export in exports {
        servers.push(soon(listener.accept(*export)).await);
    }
    servers
}

async fn multi(
    exports: &[Export],
    count: usize,
) -> (std::result::Result<Arc<MultiConnection>, ClientError>, Vec<Server>, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    let (disk, servers) = soon(async {
        join!(MultiConnection::connect(&options, count), accept(&listener, exports))
    })
    .await;
    (disk, servers, directory)
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}

async fn answer(server: &mut Server, command: Command) {
    let (header, _) = soon(server.expect_request()).await;
    assert_eq!(header.command, command);
    server.simple(header.cookie, Errno::OK, &[]).await;
}

#[tokio::test]
async fn requests_go_to_the_connections_in_turn() {
    let (disk, mut servers, _directory) = multi(&[Export::default(); 4], 4).await;
    let disk = disk.expect("connected");
    assert_eq!(disk.connections(), 4);
    let flags = WriteFlags::default();
    let writes = (0..8u64).map(|n| disk.write(n * 512, Bytes::from_static(&[1; 512]), flags));
    let serving = async {
        for server in &mut servers {
            answer(server, Command::WRITE).await;
            answer(server, Command::WRITE).await;
        }
    };
    let (written, ()) = soon(async { join!(join_all(writes), serving) }).await;
    written.into_iter().for_each(|written| written.expect("written"));
}

#[tokio::test(start_paused = true)]
async fn connections_that_a_server_has_no_place_for_are_done_without() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    // The others stay in the queue of the socket: nobody says anything to them.
    let exports = [Export::default(); 2];
    let serving = accept(&listener, &exports);
    let (disk, servers) = join!(MultiConnection::connect(&options, 4), serving);
    assert_eq!((disk.expect("connected").connections(), servers.len()), (2, 2));
}

#[tokio::test]
async fn a_server_that_does_not_allow_it_gets_one_connection() {
    let alone = Export { flags: ALONE, ..Export::default() };
    let (disk, _servers, _directory) = multi(&[alone], 4).await;
    assert_eq!(disk.expect("connected").connections(), 1);
}

#[tokio::test]
async fn connections_that_see_different_exports_are_refused() {
    let good = Export::default();
    for (other, said) in [
        (Export { size: 1 << 20, ..good }, "bytes"),
        (Export { flags: good.flags | 2, ..good }, "read-only"),
        (Export { flags: ALONE, ..good }, "several connections"),
    ] {
        let (disk, _servers, _directory) = multi(&[good, other], 2).await;
        let error = disk.expect_err("refused");
        assert!(matches!(error, ClientError::Incompatible { .. }), "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[tokio::test]
async fn one_flush_covers_all_unless_one_of_them_has_ended() {
    let (disk, mut servers, _directory) = multi(&[Export::default(); 3], 3).await;
    let disk = disk.expect("connected");
    let (flushed, ()) = soon(async {
        join!(disk.flush(FlushLevel::Durable), answer(&mut servers[0], Command::FLUSH))
    })
    .await;
    flushed.expect("flushed");

    // What it had acknowledged may be gone with it.
    servers.pop();
    let lost = async {
        loop {
            match disk.flush(FlushLevel::Process).await {
                Err(error) => return error,
                Ok(()) => tokio::task::yield_now().await,
            }
        }
    };
    assert_eq!(soon(lost).await.kind(), ErrorKind::NotConnected);
    assert_eq!(kind(soon(disk.flush(FlushLevel::Durable)).await), ErrorKind::NotConnected);
}

#[tokio::test]
async fn an_error_of_any_connection_reaches_its_caller() {
    let (disk, mut servers, _directory) = multi(&[Export::default(); 4], 4).await;
    let disk = disk.expect("connected");
    let flags = WriteFlags::default();
    let writes = (0..4u64).map(|n| disk.write(n * 512, Bytes::from_static(&[1; 512]), flags));
    let serving = async {
        for (n, server) in servers.iter_mut().enumerate() {
            let (header, _) = soon(server.expect_request()).await;
            let error = if n == 2 { Errno::ENOSPC } else { Errno::OK };
            server.simple(header.cookie, error, &[]).await;
        }
    };
    let (written, ()) = soon(async { join!(join_all(writes), serving) }).await;
    let failed: Vec<_> = written.into_iter().filter_map(Result::err).collect();
    let [error] = &failed[..] else { panic!("one has failed: {failed:?}") };
    assert_eq!((error.kind(), error.offset(), error.length()), (ErrorKind::NoSpace, 1024, 512));
}

#[tokio::test]
async fn a_lost_connection_comes_back_by_itself_and_is_refused_if_it_may_not_be_shared() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    let policy = ReconnectPolicy {
        delay: PATIENCE,
        pause_first: Duration::from_millis(1),
        pause_max: Duration::from_millis(10),
        ..ReconnectPolicy::default()
    };
    let export = Export::default();
    // The first one only asks.
    let exports = [export; 3];
    let (disk, mut servers) = soon(async {
        join!(MultiConnection::open(&options, &policy, 2), accept(&listener, &exports))
    })
    .await;
    let disk = disk.expect("connected");
    assert_eq!(disk.connections(), 2);
    drop(servers.remove(1));
    // Two requests: one for each connection, whose turn it may be.
    let flags = WriteFlags::default();
    let writes = [0, 512].map(|at| disk.write(at, Bytes::from_static(&[1; 512]), flags));
    let serving = async {
        // It is refused as long as it may not be shared.
        soon(listener.accept(Export { flags: ALONE, ..export })).await;
        let mut back = soon(listener.accept(export)).await;
        join!(answer(&mut back, Command::WRITE), answer(&mut servers[1], Command::WRITE));
        back
    };
    let (written, _back) = soon(async { join!(join_all(writes), serving) }).await;
    written.into_iter().for_each(|written| written.expect("written"));
}

#[tokio::test(start_paused = true)]
async fn connections_that_come_back_are_done_without_too_where_there_is_no_place_for_them() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    let policy = ReconnectPolicy { delay: PATIENCE, ..ReconnectPolicy::default() };
    // The one that asks, and two more.
    let exports = [Export::default(); 3];
    let opening = MultiConnection::open(&options, &policy, 4);
    let (disk, _servers) = soon(async { join!(opening, accept(&listener, &exports)) }).await;
    assert_eq!(disk.expect("connected").connections(), 2);
}

#[tokio::test]
async fn it_is_a_device_like_any_other() {
    let directory = tempfile::tempdir().expect("a directory");
    let count = AtomicUsize::new(0);
    let make = async |size| {
        let exports = server::StaticExports::new();
        exports.add(server::Export::new("disk", Memory::new("disk", size)).multi_conn(true));
        let served = server::Server::new(Arc::new(exports), server::ServerConfig::default());
        let name = format!("{}.sock", count.fetch_add(1, Ordering::Relaxed));
        let endpoint = Endpoint::Unix { path: directory.path().join(name) };
        let listener = server::Server::bind(&endpoint).await.expect("bound");
        tokio::spawn(async move { served.serve(listener).await });
        let options = ConnectOptions::new(endpoint, "disk");
        let disk = MultiConnection::connect(&options, 4).await.expect("connected");
        assert_eq!(disk.connections(), 4);
        disk
    };
    conformance::run(make, conformance::Options::default()).await.expect("conforms");
}
