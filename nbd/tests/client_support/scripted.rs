//! A server that a test drives by hand, over a unix socket.

use std::path::PathBuf;

use brep_nbd::Endpoint;
use brep_nbd::client::ConnectOptions;
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, Errno, INIT_MAGIC, OPTION_MAGIC, OptionCode,
    OptionHeader, OptionReplyHeader, ReplyType, RequestHeader, SimpleReply,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// What the scripted server says of its export.
#[derive(Clone, Copy)]
pub(crate) struct Export {
    pub(crate) size: u64,
    pub(crate) flags: u16,
    /// Minimum, preferred, maximum.
    pub(crate) block_sizes: Option<[u32; 3]>,
    pub(crate) structured: bool,
}

impl Default for Export {
    /// 1 GiB; can do everything that the protocol has, without structured replies.
    fn default() -> Self {
        Export { size: 1 << 30, flags: 0x0d6d, block_sizes: None, structured: false }
    }
}

pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    pub(crate) fn bind(directory: &std::path::Path) -> Self {
        let path = directory.join("scripted.sock");
        let _ = std::fs::remove_file(&path);
        Listener { listener: UnixListener::bind(&path).expect("bound"), path }
    }

    pub(crate) fn options(&self) -> ConnectOptions {
        let endpoint = Endpoint::Unix { path: self.path.clone() };
        ConnectOptions { name: "disk".into(), ..ConnectOptions::new(endpoint, "vda") }
    }

    /// Accepts without saying anything.
    pub(crate) async fn accept_raw(&self) -> UnixStream {
        self.listener.accept().await.expect("accepted").0
    }

    /// Accepts a client and takes it through the handshake.
    pub(crate) async fn accept(&self, export: Export) -> Server {
        let mut server = Server { stream: self.accept_raw().await };
        server.handshake(export).await;
        server
    }
}

/// The server's end of a connection. Everything fails loudly: the test is the peer.
pub(crate) struct Server {
    pub(crate) stream: UnixStream,
}

impl Server {
    async fn handshake(&mut self, export: Export) {
        self.stream.write_u64(INIT_MAGIC).await.expect("sent");
        self.stream.write_u64(OPTION_MAGIC).await.expect("sent");
        self.stream.write_u16(3).await.expect("sent");
        assert_eq!(self.stream.read_u32().await.expect("client flags"), 3);
        loop {
            let mut head = [0; OptionHeader::SIZE];
            self.stream.read_exact(&mut head).await.expect("an option");
            let header = OptionHeader::decode(&head).expect("an option");
            let mut data = vec![0; header.len as usize];
            self.stream.read_exact(&mut data).await.expect("its data");
            let option = header.option;
            match option {
                OptionCode::STRUCTURED_REPLY if export.structured => {
                    self.option_reply(option, ReplyType::ACK, &[]).await;
                }
                OptionCode::SET_META_CONTEXT => {
                    let context = [&1u32.to_be_bytes()[..], b"base:allocation"].concat();
                    self.option_reply(option, ReplyType::META_CONTEXT, &context).await;
                    self.option_reply(option, ReplyType::ACK, &[]).await;
                }
                OptionCode::GO => {
                    self.describe(export).await;
                    self.option_reply(option, ReplyType::ACK, &[]).await;
                    return;
                }
                _ => self.option_reply(option, ReplyType::ERR_UNSUP, &[]).await,
            }
        }
    }

    async fn describe(&mut self, export: Export) {
        let info = [&[0, 0][..], &export.size.to_be_bytes(), &export.flags.to_be_bytes()].concat();
        self.option_reply(OptionCode::GO, ReplyType::INFO, &info).await;
        if let Some(sizes) = export.block_sizes {
            let sizes: Vec<u8> = sizes.iter().flat_map(|size| size.to_be_bytes()).collect();
            let info = [&[0, 3][..], &sizes].concat();
            self.option_reply(OptionCode::GO, ReplyType::INFO, &info).await;
        }
    }

    async fn option_reply(&mut self, option: OptionCode, kind: ReplyType, data: &[u8]) {
        let header = OptionReplyHeader { option, kind, len: data.len() as u32 };
        self.stream.write_all(&header.encode()).await.expect("sent");
        self.stream.write_all(data).await.expect("sent");
    }

    /// The next request, with its payload; `None` if the client has closed.
    pub(crate) async fn request(&mut self) -> Option<(RequestHeader, Vec<u8>)> {
        let mut head = [0; RequestHeader::SIZE];
        self.stream.read_exact(&mut head).await.ok()?;
        let header = RequestHeader::decode(&head).expect("a request");
        let len = if header.command == Command::WRITE { header.len as usize } else { 0 };
        let mut payload = vec![0; len];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some((header, payload))
    }

    pub(crate) async fn expect_request(&mut self) -> (RequestHeader, Vec<u8>) {
        self.request().await.expect("a request")
    }

    pub(crate) async fn simple(&mut self, cookie: u64, error: Errno, data: &[u8]) {
        let reply = SimpleReply { error, cookie };
        self.send(&[&reply.encode()[..], data].concat()).await;
    }

    pub(crate) async fn chunk(&mut self, cookie: u64, kind: ChunkType, done: bool, data: &[u8]) {
        let flags = ChunkFlags::NONE.with_if(done, ChunkFlags::DONE);
        let header = ChunkHeader { flags, kind, cookie, len: data.len() as u32 };
        self.send(&[&header.encode()[..], data].concat()).await;
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("sent");
    }
}
