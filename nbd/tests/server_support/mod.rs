//! A server on a unix socket, and a client that sends whatever a test wants it to send.
#![allow(dead_code, unreachable_pub)]

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, Memory};
use brep_nbd::Endpoint;
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkHeader, ChunkType, ClientFlags, Command, CommandFlags, Errno,
    ExtendedChunkHeader, INIT_MAGIC, OPTION_MAGIC, OptionCode, OptionHeader, OptionReplyHeader,
    ReplyType, RequestHeader, SimpleReply,
};
use brep_nbd::server::{Connection, Export, Exports, Server, ServerConfig, StaticExports};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Size of the export "disk", in bytes: no multiple of 512.
pub const SIZE: u64 = (1 << 20) + 100;

/// A running server.
pub struct Fixture {
    pub server: Arc<Server>,
    pub path: PathBuf,
    _directory: TempDir,
}

impl Fixture {
    /// Serves what `exports` has.
    pub async fn serve(exports: Arc<dyn Exports>, config: ServerConfig) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let server = Server::new(exports, config);
        let endpoint = Endpoint::Unix { path: path.clone() };
        let listener = Server::bind(&endpoint).await.expect("a socket");
        tokio::spawn({
            let server = Arc::clone(&server);
            async move { server.serve(listener).await }
        });
        Fixture { server, path, _directory: directory }
    }

    /// Serves one device as "disk", writable and with the default limits.
    pub async fn device(device: Arc<dyn BlockDevice>) -> Self {
        Self::device_with(device, ServerConfig::default()).await
    }

    pub async fn device_with(device: Arc<dyn BlockDevice>, config: ServerConfig) -> Self {
        let exports = StaticExports::new();
        exports.add(Export::new("disk", device));
        Self::serve(Arc::new(exports), config).await
    }

    /// Serves a device in memory as "disk", and the same read-only as "read-only".
    pub async fn memory() -> Self {
        let device = Memory::new("memory", SIZE);
        let exports = StaticExports::new();
        exports.add(Export::new("disk", device.clone()).description("a disk"));
        exports.add(Export::new("read-only", device).read_only(true));
        Self::serve(Arc::new(exports), ServerConfig::default()).await
    }

    pub async fn connect(&self) -> Raw {
        Raw { stream: UnixStream::connect(&self.path).await.expect("a connection") }
    }

    /// A client that has been greeted and may send options.
    pub async fn client(&self) -> Raw {
        let mut raw = self.connect().await;
        raw.greet().await;
        raw
    }

    /// A client in the transmission phase of "disk".
    pub async fn session(&self, structured: bool) -> Raw {
        let mut raw = self.client().await;
        if structured {
            raw.structured().await;
            raw.select_allocation("disk").await;
        }
        raw.go("disk").await;
        raw
    }

    /// A client in the transmission phase of "disk", with extended headers and the state of ranges.
    pub async fn extended(&self) -> Raw {
        let mut raw = self.client().await;
        assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ACK);
        raw.select_allocation("disk").await;
        raw.go("disk").await;
        raw
    }

    /// The newest connection.
    pub async fn connection(&self) -> Arc<Connection> {
        until(|| self.server.connections().pop()).await
    }
}

/// Waits for a condition, at most ten seconds.
pub async fn until<T>(mut condition: impl FnMut() -> Option<T>) -> T {
    within(async {
        loop {
            if let Some(value) = condition() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
}

/// Nothing in these tests takes long, unless it hangs.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it hangs")
}

/// A client that obeys nothing by itself.
pub struct Raw {
    pub stream: UnixStream,
}

impl Raw {
    pub async fn send(&mut self, bytes: &[u8]) {
        within(self.stream.write_all(bytes)).await.expect("sent");
    }

    pub async fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        within(self.stream.read_exact(&mut bytes)).await.expect("received");
        bytes
    }

    async fn array<const N: usize>(&mut self) -> [u8; N] {
        self.receive(N).await.try_into().expect("as long as asked for")
    }

    /// The other side has closed, and nothing more has come.
    pub async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match within(self.stream.read_to_end(&mut rest)).await {
            Ok(_) => rest.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub async fn greet(&mut self) {
        self.greeting().await;
        let flags = ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES);
        self.send(&flags.0.to_be_bytes()).await;
    }

    pub async fn greeting(&mut self) {
        let greeting = self.receive(18).await;
        assert_eq!(greeting[..8], INIT_MAGIC.to_be_bytes());
        assert_eq!(greeting[8..16], OPTION_MAGIC.to_be_bytes());
        assert_eq!(greeting[16..], [0, 3]);
    }

    pub async fn option_reply(&mut self) -> (OptionReplyHeader, Vec<u8>) {
        let header = OptionReplyHeader::decode(&self.array().await).expect("a reply");
        let data = self.receive(header.len as usize).await;
        (header, data)
    }

    /// All replies to an option, up to `ACK` or an error.
    pub async fn option(&mut self, option: OptionCode, data: &[u8]) -> Vec<(ReplyType, Vec<u8>)> {
        self.send(&option_bytes(option, data)).await;
        self.replies(option).await
    }

    pub async fn replies(&mut self, option: OptionCode) -> Vec<(ReplyType, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let (header, data) = self.option_reply().await;
            assert_eq!(header.option, option);
            replies.push((header.kind, data));
            if header.kind == ReplyType::ACK || header.kind.is_error() {
                return replies;
            }
        }
    }

    /// The last reply to an option: `ACK` or an error.
    pub async fn outcome(&mut self, option: OptionCode, data: &[u8]) -> ReplyType {
        self.option(option, data).await.pop().expect("at least one").0
    }

    pub async fn structured(&mut self) {
        assert_eq!(self.outcome(OptionCode::STRUCTURED_REPLY, &[]).await, ReplyType::ACK);
    }

    pub async fn select_allocation(&mut self, export: &str) {
        let data = meta_data(export, &["base:allocation"]);
        let replies = self.option(OptionCode::SET_META_CONTEXT, &data).await;
        assert_eq!(replies.len(), 2, "{replies:?}");
    }

    pub async fn go(&mut self, export: &str) {
        let outcome = self.outcome(OptionCode::GO, &info_data(export, &[])).await;
        assert_eq!(outcome, ReplyType::ACK);
    }

    pub async fn request(&mut self, header: RequestHeader, payload: &[u8]) {
        self.send(&request_bytes(header, payload)).await;
    }

    pub async fn simple(&mut self) -> (Errno, u64) {
        let reply = SimpleReply::decode(&self.array().await).expect("a simple reply");
        (reply.error, reply.cookie)
    }

    pub async fn chunk(&mut self) -> (ChunkHeader, Vec<u8>) {
        let header = ChunkHeader::decode(&self.array().await).expect("a chunk");
        let payload = self.receive(header.len as usize).await;
        (header, payload)
    }

    pub async fn extended_request(&mut self, header: RequestHeader, payload: &[u8]) {
        self.send(&[&header.encode_extended()[..], payload].concat()).await;
    }

    pub async fn extended_chunk(&mut self) -> (ExtendedChunkHeader, Vec<u8>) {
        let header = ExtendedChunkHeader::decode(&self.array().await).expect("an extended chunk");
        let payload = self.receive(header.len as usize).await;
        (header, payload)
    }

    /// What the only chunk of a reply to an extended request says: success, or an error.
    pub async fn extended_outcome(&mut self, request: RequestHeader) -> Errno {
        let (chunk, payload) = self.extended_chunk().await;
        assert_eq!((chunk.cookie, chunk.offset), (request.cookie, request.offset));
        assert_eq!(chunk.flags, ChunkFlags::DONE);
        match chunk.kind {
            ChunkType::NONE => Errno::OK,
            ChunkType::ERROR => {
                Errno(u32::from_be_bytes(payload[..4].try_into().expect("an error number")))
            }
            kind => panic!("{kind} {payload:?}"),
        }
    }

    /// A read in simple mode.
    pub async fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.request(request(Command::READ, 77, offset, len), &[]).await;
        assert_eq!(self.simple().await, (Errno::OK, 77));
        self.receive(len as usize).await
    }

    /// A write in either mode.
    pub async fn write(&mut self, offset: u64, data: &[u8]) -> Errno {
        let len = data.len() as u32;
        self.request(request(Command::WRITE, 78, offset, len), data).await;
        let (error, cookie) = self.simple().await;
        assert_eq!(cookie, 78);
        error
    }
}

pub fn request(command: Command, cookie: u64, offset: u64, len: u32) -> RequestHeader {
    RequestHeader { flags: CommandFlags::NONE, command, cookie, offset, len: len.into() }
}

pub fn request_bytes(header: RequestHeader, payload: &[u8]) -> Vec<u8> {
    [&header.encode()[..], payload].concat()
}

pub fn option_bytes(option: OptionCode, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader { option, len: data.len() as u32 };
    [&header.encode()[..], data].concat()
}

pub fn info_data(export: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend((infos.len() as u16).to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

pub fn meta_data(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}
