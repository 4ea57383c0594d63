//! A copy from one server to another, over several connections with many requests in flight: an
//! error at any of them is told (as nbdcopy once did not, CVE-2022-0485).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{
    BlockDevice, CopyOptions, ErrorKind, Fault, FlushLevel, Memory, Operation, Rule, WriteFlags,
    copy_device,
};
use brep_nbd::Endpoint;
use brep_nbd::client::{ConnectOptions, MultiConnection};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use bytes::Bytes;
use tokio::time::timeout;

const PIECE_LEN: u32 = 16 << 10;
const PIECES: u64 = 20;
const SIZE: u64 = PIECES * PIECE_LEN as u64;
const PATIENCE: Duration = Duration::from_secs(10);

fn pattern() -> Bytes {
    (0..SIZE).map(|at| (at / 512 % 255 + 1) as u8).collect()
}

/// A disk over four connections to a server of its own.
async fn served(
    directory: &Path,
    name: &str,
    device: Arc<dyn BlockDevice>,
) -> Arc<dyn BlockDevice> {
    let exports = StaticExports::new();
    exports.add(Export::new(name, device).multi_conn(true));
    let server = Server::new(Arc::new(exports), ServerConfig::default());
    let endpoint = Endpoint::Unix { path: directory.join(format!("{name}.sock")) };
    let listener = Server::bind(&endpoint).await.expect("bound");
    tokio::spawn(async move { server.serve(listener).await });
    let options = ConnectOptions { name: name.into(), ..ConnectOptions::new(endpoint, name) };
    let disk = MultiConnection::connect(&options, 4).await.expect("connected");
    assert_eq!(disk.connections(), 4);
    disk
}

struct Copy {
    source: Arc<Fault>,
    target: Arc<Fault>,
    disks: [Arc<dyn BlockDevice>; 2],
    _directory: tempfile::TempDir,
}

async fn prepared() -> Copy {
    let directory = tempfile::tempdir().expect("a directory");
    let memory = Memory::new("source", SIZE);
    memory.write(0, pattern(), WriteFlags::default()).await.expect("written");
    let (source, target) = (Fault::new(memory), Fault::new(Memory::new("target", SIZE)));
    let disks = [
        served(directory.path(), "source", Arc::clone(&source) as _).await,
        served(directory.path(), "target", Arc::clone(&target) as _).await,
    ];
    Copy { source, target, disks, _directory: directory }
}

async fn copy(disks: &[Arc<dyn BlockDevice>; 2]) -> brep_block::Result<()> {
    let options = CopyOptions { requests_max: 8, request_len: PIECE_LEN, ..CopyOptions::default() };
    let copying = async {
        copy_device(&disks[0], &disks[1], &options, |_| {}).await?;
        disks[1].flush(FlushLevel::Durable).await
    };
    timeout(PATIENCE, copying).await.expect("it hangs")
}

#[tokio::test]
async fn everything_arrives() {
    let Copy { target, disks, .. } = prepared().await;
    copy(&disks).await.expect("copied");
    assert_eq!(target.read(0, SIZE as usize).await.expect("read"), pattern());
}

#[tokio::test]
async fn an_error_at_the_nth_of_many_requests_is_never_lost() {
    for operation in [Operation::Read, Operation::Write] {
        for n in 1..=PIECES {
            let Copy { source, target, disks, _directory } = prepared().await;
            let failing = if operation == Operation::Read { source } else { target };
            failing.fail(Rule::new(operation).nth(n).errno(28));
            failing.delay(Rule::new(operation).forever(), Duration::from_millis(1));
            let error = copy(&disks).await.expect_err("an error");
            let side = if operation == Operation::Read { "source" } else { "target" };
            assert_eq!((error.node(), error.kind()), (side, ErrorKind::NoSpace), "{n}: {error}");
            assert_eq!((error.operation(), error.length()), (operation, PIECE_LEN.into()), "{n}");
            assert!(error.offset().is_multiple_of(PIECE_LEN.into()), "{error}");
        }
    }
}

#[tokio::test]
async fn an_error_of_the_flush_at_the_end_is_never_lost() {
    let Copy { target, disks, .. } = prepared().await;
    target.fail(Rule::new(Operation::Flush));
    let error = copy(&disks).await.expect_err("an error");
    assert_eq!(error.operation(), Operation::Flush);
}
