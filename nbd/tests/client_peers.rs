//! The client against our own server, and against nbdkit in its stranger moods.

mod client_support;

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brep_block::conformance::{self, Options};
use brep_block::{BlockDevice, Memory, WriteFlags};
use brep_nbd::Endpoint;
use brep_nbd::client::{
    Client, ClientError, ConnectOptions, Connection, ReconnectPolicy, connect_private,
    describe_export, list_exports,
};
use brep_nbd::proto::wire::{PRIVATE_OPTION_BASE, TransmissionFlags, TransmissionMode};
use brep_nbd::server::{
    Connection as ServerConnection, Export, ExportDescription, Exports, OptionError, PrivateReply,
    Server, ServerConfig, StaticExports,
};
use bytes::Bytes;
use client_support::pattern;
use futures_util::future::{BoxFuture, join_all};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PATIENCE: Duration = Duration::from_secs(10);

/// A server of ours in this runtime, at a TCP port of its own.
async fn serve(exports: Arc<dyn Exports>) -> (Arc<Server>, Endpoint) {
    let server = Server::new(exports, ServerConfig::default());
    let any = Endpoint::Tcp { host: "127.0.0.1".into(), port: 0 };
    let listener = Server::bind(&any).await.expect("bound");
    let endpoint = listener.endpoint().clone();
    let accepting = Arc::clone(&server);
    tokio::spawn(async move { accepting.serve(listener).await });
    (server, endpoint)
}

#[tokio::test]
async fn a_connection_to_our_own_server_is_a_block_device() {
    let exports = Arc::new(StaticExports::new());
    let (_server, endpoint) = serve(Arc::clone(&exports) as Arc<dyn Exports>).await;
    let count = std::cell::Cell::new(0);
    let make = async |size| {
        count.set(count.get() + 1);
        let name = format!("disk{}", count.get());
        exports.add(Export::new(&*name, Memory::new(&*name, size)));
        let options = ConnectOptions::new(endpoint.clone(), name);
        Connection::connect(&options).await.expect("connected")
    };
    conformance::run(make, Options::default()).await.expect("conforms");
}

#[tokio::test]
async fn a_connection_without_extended_headers_is_a_block_device() {
    for mode_max in [TransmissionMode::Simple, TransmissionMode::Structured] {
        conforms_in(mode_max).await;
    }
}

async fn conforms_in(mode_max: TransmissionMode) {
    let exports = Arc::new(StaticExports::new());
    let (_server, endpoint) = serve(Arc::clone(&exports) as Arc<dyn Exports>).await;
    let count = std::cell::Cell::new(0);
    let make = async |size| {
        count.set(count.get() + 1);
        let name = format!("disk{}", count.get());
        exports.add(Export::new(&*name, Memory::new(&*name, size)));
        let options = ConnectOptions::new(endpoint.clone(), name);
        let options = ConnectOptions { mode_max, ..options };
        let disk = Connection::connect(&options).await.expect("connected");
        assert_eq!(disk.mode(), mode_max);
        assert_eq!(disk.has_block_status(), mode_max.is_structured());
        disk
    };
    conformance::run(make, Options::default().operations(100)).await.expect("conforms");
}

#[tokio::test]
async fn a_client_that_reconnects_is_a_block_device() {
    let exports = Arc::new(StaticExports::new());
    let (_server, endpoint) = serve(Arc::clone(&exports) as Arc<dyn Exports>).await;
    let count = std::cell::Cell::new(0);
    let make = async |size| {
        count.set(count.get() + 1);
        let name = format!("disk{}", count.get());
        exports.add(Export::new(&*name, Memory::new(&*name, size)));
        let policy = ReconnectPolicy { delay: PATIENCE, ..ReconnectPolicy::default() };
        let client = Client::new(ConnectOptions::new(endpoint.clone(), name), policy);
        client.connect().await.expect("connected");
        Arc::new(client)
    };
    conformance::run(make, Options::default()).await.expect("conforms");
}

#[tokio::test]
async fn our_own_server_is_listed_and_described() {
    let exports = StaticExports::new();
    exports.add(Export::new("vda", Memory::new("vda", 12_345)).description("the first"));
    exports.add(Export::new("vdb", Memory::new("vdb", 0)).read_only(true));
    let (_server, endpoint) = serve(Arc::new(exports)).await;
    let listed = list_exports(&endpoint, None, PATIENCE).await.expect("listed");
    let names: Vec<_> = listed.iter().map(|e| (e.name.as_str(), e.description.as_str())).collect();
    assert_eq!(names, [("vda", "the first"), ("vdb", "")]);
    let (vda, _) = describe_export(&endpoint, None, "vda", PATIENCE).await.expect("described");
    assert_eq!((vda.size, vda.canonical_name.as_deref()), (12_345, Some("vda")));
    let (vdb, _) = describe_export(&endpoint, None, "vdb", PATIENCE).await.expect("described");
    assert!(vdb.flags.contains(TransmissionFlags::READ_ONLY));
    let absent = describe_export(&endpoint, None, "vdc", PATIENCE).await.expect_err("absent");
    assert!(matches!(absent, ClientError::Handshake { .. }), "{absent}");
}

/// Exports that know two private options: one that binds a connection to a session, one that
/// turns it into a link, which echoes.
struct PrivateExports {
    disks: StaticExports,
    token: &'static [u8],
}

impl Exports for PrivateExports {
    fn list(&self) -> Vec<ExportDescription> {
        self.disks.list()
    }

    fn open(&self, name: &str, connection: &Arc<ServerConnection>) -> Result<Export, OptionError> {
        self.disks.open(name, connection)
    }

    fn private_option<'a>(
        &'a self,
        _: &'a Arc<ServerConnection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        let reply = match option - PRIVATE_OPTION_BASE {
            1 if data == self.token => PrivateReply::Ack(Bytes::from_static(b"slot 3")),
            1 => PrivateReply::Error(OptionError::unknown_export("a stale token")),
            2 => PrivateReply::Takeover {
                reply: Bytes::from_static(b"welcome"),
                then: Box::new(|mut stream| {
                    Box::pin(async move {
                        let mut buffer = [0; 64];
                        while let Ok(len @ 1..) = stream.read(&mut buffer).await {
                            let _ = stream.write_all(&buffer[..len]).await;
                        }
                    })
                }),
            },
            _ => PrivateReply::Unsupported,
        };
        Box::pin(std::future::ready(reply))
    }
}

#[tokio::test]
async fn private_options_bind_a_connection_or_turn_it_into_a_link() {
    let exports = PrivateExports { disks: StaticExports::new(), token: b"token" };
    exports.disks.add(Export::new("vda", Memory::new("vda", 4096)));
    let (_server, endpoint) = serve(Arc::new(exports)).await;
    let mut options = ConnectOptions::new(endpoint.clone(), "vda");
    options.private_options = vec![(PRIVATE_OPTION_BASE + 1, Bytes::from_static(b"token"))];
    let disk = Connection::connect(&options).await.expect("bound");
    assert_eq!(disk.private_replies(), [&b"slot 3"[..]]);
    disk.write(0, Bytes::from_static(b"data"), WriteFlags::default()).await.expect("written");

    options.private_options[0].1 = Bytes::from_static(b"old token");
    let refused = Connection::connect(&options).await.expect_err("a stale token");
    assert!(refused.to_string().contains("stale token"), "{refused}");

    let hello = Bytes::from_static(b"hello");
    let link =
        connect_private(&endpoint, None, PRIVATE_OPTION_BASE + 2, hello.clone(), PATIENCE).await;
    let mut link = link.expect("a link");
    assert_eq!((&link.reply[..], link.rest.len()), (&b"welcome"[..], 0));
    link.stream.write_all(b"ping").await.expect("sent");
    let mut echo = [0; 4];
    link.stream.read_exact(&mut echo).await.expect("echoed");
    assert_eq!(echo, *b"ping");

    let unknown = connect_private(&endpoint, None, PRIVATE_OPTION_BASE + 3, hello, PATIENCE).await;
    assert!(matches!(unknown, Err(ClientError::Unsupported { .. })));
}

#[tokio::test]
async fn a_server_that_goes_away_ends_its_connections() {
    let exports = StaticExports::new();
    exports.add(Export::new("vda", Memory::new("vda", 4096)));
    let (server, endpoint) = serve(Arc::new(exports)).await;
    let disk = Connection::connect(&ConnectOptions::new(endpoint, "vda")).await.expect("connected");
    disk.read(0, 4096).await.expect("read");
    server.shutdown(PATIENCE).await;
    let reason = tokio::time::timeout(PATIENCE, disk.failed()).await.expect("it is told");
    assert!(matches!(reason, ClientError::ClosedByServer { .. } | ClientError::Lost { .. }));
}

/// An nbdkit that is killed when it is dropped.
struct Nbdkit {
    child: Child,
    socket: PathBuf,
}

impl Nbdkit {
    /// `None` if there is no nbdkit, or not this plugin or filter.
    fn start(directory: &Path, arguments: &[&str]) -> Option<Self> {
        let socket = directory.join("nbdkit.sock");
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let deadline = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            if child.try_wait().is_ok_and(|status| status.is_some()) {
                return None;
            }
            assert!(Instant::now() < deadline, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(Nbdkit { child, socket })
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions::new(Endpoint::Unix { path: self.socket.clone() }, "")
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

macro_rules! nbdkit_or_skip {
    ($test:literal, $directory:expr, $arguments:expr) => {
        match Nbdkit::start($directory, $arguments) {
            Some(server) => server,
            None => {
                eprintln!("SKIP: {}: nbdkit not found", $test);
                return;
            }
        }
    };
}

#[tokio::test]
async fn a_connection_to_nbdkit_is_a_block_device_in_each_of_its_handshakes() {
    // Simple replies only; and no fixed newstyle, nor anything else but `EXPORT_NAME`.
    let moods: [&[&str]; 2] = [&["--no-sr"], &["--mask-handshake=0"]];
    for mood in moods {
        let directory = tempfile::tempdir().expect("a directory");
        drop(nbdkit_or_skip!("nbdkit_moods", directory.path(), &["memory", "1M"]));
        let servers = RefCell::new(Vec::new());
        let make = async |size: u64| {
            let directory = tempfile::tempdir().expect("a directory");
            let size = format!("size={size}");
            let arguments = [mood, &["memory", &size]].concat();
            let server = Nbdkit::start(directory.path(), &arguments).expect("nbdkit");
            let options = server.options();
            servers.borrow_mut().push((server, directory));
            Connection::connect(&options).await.expect("connected")
        };
        let options = Options::default().operations(100);
        conformance::run(make, options).await.unwrap_or_else(|error| panic!("{mood:?}: {error}"));
    }
}

#[tokio::test]
async fn errors_that_nbdkit_throws_in_reach_the_request_that_they_belong_to() {
    let directory = tempfile::tempdir().expect("a directory");
    let arguments =
        ["--filter=error", "memory", "8M", "error-pread=ENOSPC", "error-pread-rate=20%"];
    let server = nbdkit_or_skip!("nbdkit_errors", directory.path(), &arguments);
    let disk = Connection::connect(&server.options()).await.expect("connected");
    let content = pattern(8 << 20, 1);
    for (index, piece) in content.chunks(1 << 20).enumerate() {
        let data = Bytes::copy_from_slice(piece);
        disk.write((index as u64) << 20, data, WriteFlags::default()).await.expect("written");
    }
    let reads = (0..500u64).map(|index| disk.read(index * 4096, 4096));
    let mut outcomes = HashSet::new();
    for (index, result) in join_all(reads).await.into_iter().enumerate() {
        outcomes.insert(result.is_ok());
        match result {
            Ok(data) => assert_eq!(data, content[index * 4096..][..4096]),
            Err(error) => {
                assert_eq!((error.offset(), error.errno()), (index as u64 * 4096, 28));
            }
        }
    }
    assert_eq!(outcomes.len(), 2, "both happen in 500 reads of which every fifth fails");
    assert!(disk.failure().is_none());
}

#[tokio::test]
async fn the_block_sizes_of_nbdkit_are_obeyed() {
    let directory = tempfile::tempdir().expect("a directory");
    let arguments = [
        "--filter=blocksize-policy",
        "memory",
        "8M",
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ];
    let server = nbdkit_or_skip!("nbdkit_block_sizes", directory.path(), &arguments);
    let disk = Connection::connect(&server.options()).await.expect("connected");
    let limits = disk.limits();
    assert_eq!((limits.block_size, limits.preferred_size), (4096, 65_536));
    let content = Bytes::from(pattern(1 << 20, 2));
    disk.write(4096, content.clone(), WriteFlags::default()).await.expect("in pieces");
    assert_eq!(disk.read(4096, 1 << 20).await.expect("in pieces"), content);
}
