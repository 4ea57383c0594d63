//! TLS: who gets in, what is refused, and that nothing said in the clear counts.

mod abuse;
mod certificates;
mod peers;
mod support;

use std::sync::Arc;

use brep_block::conformance::{self, Options};
use brep_block::{BlockDevice, Memory, WriteFlags};
use brep_nbd::client::{Connection, connect_private, describe_export, list_exports};
use brep_nbd::proto::wire::PRIVATE_OPTION_BASE;
use brep_nbd::server::{
    Connection as ServerConnection, Export, ExportDescription, Exports, OptionError, PrivateReply,
    ServerConfig, StaticExports,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use support::{PATIENCE, Pki, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn a_connection_over_tls_is_a_block_device() {
    let pki = Pki::new();
    let exports = Arc::new(StaticExports::new());
    let (_server, endpoint) = serve(Arc::clone(&exports) as _, pki.required()).await;
    let count = std::cell::Cell::new(0);
    let make = async |size| {
        count.set(count.get() + 1);
        let name = format!("disk{}", count.get());
        exports.add(Export::new(&*name, Memory::new(&*name, size)));
        let connection = Connection::connect(&pki.options(&endpoint, &name)).await.unwrap();
        assert_eq!(connection.tls_peer().unwrap().to_string(), "TLS 1.3, CN=server");
        connection
    };
    conformance::run(make, Options::default()).await.expect("conforms");
}

#[tokio::test]
async fn large_transfers_in_both_directions_end() {
    let pki = Pki::new();
    let exports = StaticExports::new();
    exports.add(Export::new("disk", Memory::new("disk", 16 << 20)));
    let (server, endpoint) = serve(Arc::new(exports), pki.required()).await;
    let disk = Connection::connect(&pki.options(&endpoint, "disk")).await.unwrap();
    let data = Bytes::from((0..251).collect::<Vec<u8>>().repeat((2 << 20) / 251));
    let writes = (0..7).map(|n| disk.write(n * (2 << 20), data.clone(), WriteFlags::default()));
    futures_util::future::try_join_all(writes).await.unwrap();
    let reads = (0..7).map(|n| disk.read(n * (2 << 20), data.len()));
    let read = tokio::time::timeout(PATIENCE, futures_util::future::try_join_all(reads));
    assert!(read.await.expect("it hangs").unwrap().iter().all(|read| *read == data));
    let connection = server.connections().remove(0);
    assert_eq!(connection.tls_peer().unwrap().subject, "CN=client");
    disk.close();
    tokio::time::timeout(PATIENCE, connection.closed()).await.expect("it hangs");
    assert!(connection.has_disconnected());
}

#[tokio::test]
async fn exports_are_listed_and_described_over_tls() {
    let pki = Pki::new();
    let exports = StaticExports::new();
    exports.add(Export::new("disk", Memory::new("disk", 4096)));
    let (_server, endpoint) = serve(Arc::new(exports), pki.required()).await;
    let tls = pki.client();
    let listed = list_exports(&endpoint, Some(&tls), PATIENCE).await.unwrap();
    assert_eq!(listed[0].name, "disk");
    let (disk, _) = describe_export(&endpoint, Some(&tls), "disk", PATIENCE).await.unwrap();
    assert_eq!(disk.size, 4096);
}

/// Has one private option, which turns the connection into an echo.
struct Echo;

impl Exports for Echo {
    fn list(&self) -> Vec<ExportDescription> {
        Vec::new()
    }

    fn open(&self, name: &str, _: &Arc<ServerConnection>) -> Result<Export, OptionError> {
        Err(OptionError::unknown_export(name))
    }

    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<ServerConnection>,
        _option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        assert!(connection.tls_peer().is_some(), "a private option came in the clear");
        Box::pin(std::future::ready(PrivateReply::Takeover {
            reply: data,
            then: Box::new(|stream| {
                Box::pin(async move {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                        writer.write_all(&buffer[..count]).await.unwrap();
                        writer.flush().await.unwrap();
                    }
                })
            }),
        }))
    }
}

#[tokio::test]
async fn a_stream_that_was_taken_over_stays_inside_tls() {
    let pki = Pki::new();
    let (_server, endpoint) = serve(Arc::new(Echo), pki.required()).await;
    let hello = Bytes::from_static(b"hello");
    let tls = pki.client();
    let taken = connect_private(&endpoint, Some(&tls), PRIVATE_OPTION_BASE, hello, PATIENCE).await;
    let mut taken = taken.unwrap();
    assert_eq!(taken.reply, "hello");
    assert_eq!(taken.stream.tls_peer().unwrap().subject, "CN=server");
    let data = vec![7; 300_000];
    let (mut reader, mut writer) = tokio::io::split(&mut taken.stream);
    let echo = async {
        let mut back = vec![0; data.len()];
        reader.read_exact(&mut back).await.unwrap();
        back
    };
    let send = async {
        writer.write_all(&data).await.unwrap();
        writer.flush().await.unwrap();
    };
    let (back, ()) = tokio::time::timeout(PATIENCE, futures_util::future::join(echo, send))
        .await
        .expect("it hangs");
    assert_eq!(back, data);
}

#[tokio::test]
async fn private_options_are_not_taken_in_the_clear_where_there_is_tls() {
    let pki = Pki::new();
    let config = ServerConfig::default().tls(Some(pki.server()), false);
    let (_server, endpoint) = serve(Arc::new(Echo), config).await;
    let plain = connect_private(&endpoint, None, PRIVATE_OPTION_BASE, Bytes::new(), PATIENCE).await;
    assert!(plain.unwrap_err().to_string().contains("demands TLS"));
    let tls = pki.client();
    let secured =
        connect_private(&endpoint, Some(&tls), PRIVATE_OPTION_BASE, Bytes::new(), PATIENCE);
    secured.await.unwrap();
}
