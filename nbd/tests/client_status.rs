//! The state of ranges and the size of an export, by our client at our server.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{
    BlockDevice, CopyOptions, ErrorKind, FlushLevel, Io, Memory, WriteFlags, copy_device,
};
use brep_nbd::Endpoint;
use brep_nbd::client::{ConnectOptions, Connection, MultiConnection};
use brep_nbd::proto::client::Extent;
use brep_nbd::proto::wire::TransmissionMode;
use brep_nbd::server::{ContextStatus, Export, MetaContext, Server, ServerConfig, StaticExports};
use bytes::Bytes;
use tokio::time::timeout;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

async fn serve(directory: &Path, export: Export) -> (Arc<Server>, ConnectOptions) {
    let exports = StaticExports::new();
    let name = export.canonical_name.clone();
    exports.add(export);
    let server = Server::new(Arc::new(exports), ServerConfig::default());
    let endpoint = Endpoint::Unix { path: directory.join("server.sock") };
    let listener = Server::bind(&endpoint).await.expect("bound");
    let serving = Arc::clone(&server);
    tokio::spawn(async move { serving.serve(listener).await });
    (server, ConnectOptions::new(endpoint, name))
}

fn requests(server: &Server) -> u64 {
    server.connections().iter().map(|connection| connection.counters().requests).sum()
}

/// What the device knows of as one, in bytes.
const PIECE: u64 = 64 << 10;

/// A piece of data, a piece of nothing, and so on.
async fn scattered(size: u64) -> Arc<Memory> {
    let device = Memory::new("scattered", size);
    for at in (0..size).step_by(2 * PIECE as usize) {
        let data = Bytes::from(vec![(at / PIECE % 255 + 1) as u8; 4096]);
        device.write(at, data, WriteFlags::default()).await.expect("written");
    }
    device
}

#[tokio::test]
async fn a_scattered_disk_is_looked_through_and_copied_with_few_requests() {
    let (size, extents) = (128 * MIB, 2048);
    for mode_max in [TransmissionMode::Structured, TransmissionMode::Extended] {
        let directory = tempfile::tempdir().expect("a directory");
        let device = scattered(size).await;
        let (server, options) = serve(directory.path(), Export::new("", device.clone())).await;
        let options = ConnectOptions { mode_max, ..options };
        let disk = soon(MultiConnection::connect(&options, 1)).await.expect("connected");
        let (mut at, mut found) = (0, 0);
        while at < size {
            for status in soon(disk.extents(at, size - at)).await.expect("extents") {
                assert_eq!(
                    (status.len, status.flags.zero),
                    (PIECE, !at.is_multiple_of(2 * PIECE)),
                    "{at}"
                );
                (at, found) = (at + status.len, found + 1);
            }
        }
        assert_eq!((at, found), (size, extents));
        let asked = requests(&server);
        assert!(asked <= extents / 1024 + 1, "{asked} requests for {extents} extents");

        let target: Arc<dyn BlockDevice> = Memory::new("target", size);
        let source: Arc<dyn BlockDevice> = disk;
        let options = CopyOptions::default();
        let copy = copy_device(&source, &target, &options, |_| {});
        soon(copy).await.expect("copied");
        for at in (0..size).step_by(16 << 20) {
            let copied = soon(target.read(at, 16 << 20)).await.expect("read");
            assert!(copied == soon(device.read(at, 16 << 20)).await.expect("read"), "{at}");
        }
        let (asked, reads) = (requests(&server) - asked, extents / 2);
        assert!(asked <= reads + extents / 1024 + 1, "{asked} requests for {reads} reads");
    }
}

#[tokio::test]
async fn one_extent_is_asked_for_where_one_is_wanted() {
    let directory = tempfile::tempdir().expect("a directory");
    let (_server, options) = serve(directory.path(), Export::new("", scattered(MIB).await)).await;
    let disk = soon(Connection::connect(&options)).await.expect("connected");
    let status = soon(disk.block_status(PIECE, MIB - PIECE)).await.expect("a status");
    assert!(status.len == PIECE && status.flags.zero);
}

/// Says the number of the mebibyte, and reaches at most as far as told.
#[derive(Debug)]
struct Mebibytes(u64);

impl MetaContext for Mebibytes {
    fn status(&self, offset: u64, len: u64) -> Io<'_, ContextStatus> {
        let rest = (MIB - offset % MIB).min(self.0).min(len);
        Io::ok(ContextStatus { len: rest, flags: (offset / MIB) as u32 })
    }
}

#[tokio::test]
async fn several_contexts_are_asked_for_at_a_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let export = Export::new("", Memory::new("memory", 4 * MIB))
        .context("x:whole", Arc::new(Mebibytes(MIB)))
        .dirty_bitmap("night", Arc::new(Mebibytes(4096)));
    let (server, options) = serve(directory.path(), export).await;
    let contexts = ["qemu:dirty-bitmap:night", "x:none", "base:allocation", "x:whole"];
    let options = ConnectOptions { contexts: contexts.map(String::from).to_vec(), ..options };
    let disk = soon(Connection::connect(&options)).await.expect("connected");
    assert!(disk.has_block_status());
    let names: Vec<&str> = disk.contexts().iter().map(|c| c.name.as_str()).collect();
    let found = soon(disk.start_meta_status(MIB / 2, 3 * MIB)).await.expect("extents");
    assert_eq!((names.len(), found.len(), requests(&server)), (3, 3, 1));
    for (name, extents) in names.iter().zip(found) {
        let of = |len, flags| Extent { len, flags };
        let expected = match *name {
            "base:allocation" => vec![of(3 * MIB, 3)],
            _ => vec![of(MIB / 2, 0), of(MIB, 1), of(MIB, 2), of(MIB / 2, 3)],
        };
        assert_eq!(extents, expected, "{name}");
    }
    let status = soon(disk.block_status(0, 4 * MIB)).await.expect("a status");
    assert!(status.len == 4 * MIB && status.flags.zero);

    let none = ConnectOptions { contexts: Vec::new(), ..options };
    let disk = soon(Connection::connect(&none)).await.expect("connected");
    let error = soon(disk.start_meta_status(0, 4096)).await.expect_err("no context");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(soon(disk.block_status(0, 4096)).await.expect("a status").flags.data);
}

#[tokio::test]
async fn an_export_is_resized_by_its_client() {
    let directory = tempfile::tempdir().expect("a directory");
    let device = Memory::new("memory", MIB);
    let export = Export::new("", device.clone()).resizable(true);
    let (_server, options) = serve(directory.path(), export).await;
    let disk = soon(Connection::connect(&options)).await.expect("connected");
    let write = |at| disk.write(at, Bytes::from_static(b"end"), WriteFlags::default());
    assert_eq!(soon(write(2 * MIB - 3)).await.expect_err("beyond").kind(), ErrorKind::NoSpace);
    soon(disk.truncate(2 * MIB)).await.expect("grown");
    assert_eq!((disk.size(), device.size()), (2 * MIB, 2 * MIB));
    soon(write(2 * MIB - 3)).await.expect("inside");
    soon(disk.truncate(4096)).await.expect("shrunk");
    assert_eq!(soon(write(4096)).await.expect_err("beyond").kind(), ErrorKind::NoSpace);
    assert_eq!(soon(disk.read(4090, 6)).await.expect("read"), [0; 6][..]);
    let error = soon(disk.truncate(1 << 63)).await.expect_err("no size");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    soon(disk.flush(FlushLevel::Durable)).await.expect("flushed");
}

#[tokio::test]
async fn an_export_that_is_not_resizable_is_not_asked() {
    let directory = tempfile::tempdir().expect("a directory");
    let export = Export::new("", Memory::new("memory", MIB));
    let (server, options) = serve(directory.path(), export).await;
    let disk = soon(Connection::connect(&options)).await.expect("connected");
    let error = soon(disk.truncate(2 * MIB)).await.expect_err("not offered");
    assert_eq!((error.kind(), disk.size()), (ErrorKind::Unsupported, MIB));
    assert_eq!(requests(&server), 0);
}
