//! Injection, downgrade, and whatever else comes before, instead of and after `STARTTLS`.

use std::sync::Arc;
use std::time::Duration;

use brep_block::Memory;
use brep_nbd::Endpoint;
use brep_nbd::client::{ClientError, ConnectOptions, Connection};
use brep_nbd::proto::wire::{
    INIT_MAGIC, OPTION_MAGIC, OptionCode, OptionHeader, OptionReplyHeader, PRIVATE_OPTION_BASE,
    ReplyType,
};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::{PATIENCE, Pki, serve};

async fn serve_disk(config: ServerConfig) -> (Arc<Server>, Endpoint) {
    let exports = StaticExports::new();
    exports.add(Export::new("disk", Memory::new("disk", 4096)));
    serve(Arc::new(exports), config).await
}

fn option(code: OptionCode, data: &[u8]) -> Vec<u8> {
    let header = OptionHeader { option: code, len: data.len() as u32 };
    [&header.encode()[..], data].concat()
}

fn export(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0; 2]].concat()
}

/// A client that obeys nothing by itself.
struct Raw<S>(S);

impl Raw<TcpStream> {
    async fn connect(endpoint: &Endpoint) -> Self {
        let Endpoint::Tcp { host, port } = endpoint else { panic!("{endpoint}") };
        let mut raw = Raw(TcpStream::connect((host.as_str(), *port)).await.unwrap());
        let greeting: [u8; 18] = raw.receive().await;
        assert_eq!(greeting[..8], INIT_MAGIC.to_be_bytes());
        raw.send(&3u32.to_be_bytes()).await;
        raw
    }

    async fn secure(self, pki: &Pki) -> std::io::Result<Raw<TlsStream<TcpStream>>> {
        let file = |name| pki.path().join(name);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(file("ca-cert.pem")).unwrap()).unwrap();
        let chain = vec![CertificateDer::from_pem_file(file("client-cert.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(file("client-key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let connecting = TlsConnector::from(Arc::new(config)).connect(name, self.0);
        tokio::time::timeout(PATIENCE, connecting).await.expect("it hangs").map(Raw)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
        self.0.flush().await.unwrap();
    }

    async fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let read = tokio::time::timeout(PATIENCE, self.0.read_exact(&mut bytes));
        read.await.expect("it hangs").unwrap();
        bytes
    }

    /// The last reply to an option.
    async fn option(&mut self, code: OptionCode, data: &[u8]) -> ReplyType {
        self.send(&option(code, data)).await;
        loop {
            let header = OptionReplyHeader::decode(&self.receive().await).unwrap();
            assert_eq!(header.option, code);
            let mut data = vec![0; header.len as usize];
            self.0.read_exact(&mut data).await.unwrap();
            if header.kind == ReplyType::ACK || header.kind.is_error() {
                return header.kind;
            }
        }
    }

    /// Everything up to the end of the connection.
    async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // However it ends; a reset is an end, too.
        let _ = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut rest))
            .await
            .expect("the connection goes on");
        rest
    }
}

#[tokio::test]
async fn without_tls_every_option_is_refused_where_it_is_required() {
    let pki = Pki::new();
    let (_server, endpoint) = serve_disk(pki.required()).await;
    let mut raw = Raw::connect(&endpoint).await;
    for (code, data) in [
        (OptionCode::LIST, Vec::new()),
        (OptionCode::INFO, export("disk")),
        (OptionCode::GO, export("disk")),
        (OptionCode::GO, export("nobody")),
        (OptionCode::STRUCTURED_REPLY, Vec::new()),
        (OptionCode::SET_META_CONTEXT, b"?".to_vec()),
        (OptionCode::EXTENDED_HEADERS, Vec::new()),
        (OptionCode(77), vec![0; 100_000]),
        (OptionCode(PRIVATE_OPTION_BASE), b"hello".to_vec()),
    ] {
        assert_eq!(raw.option(code, &data).await, ReplyType::ERR_TLS_REQD, "{code}");
    }
    assert_eq!(raw.option(OptionCode::STARTTLS, b"x").await, ReplyType::ERR_INVALID);
    assert_eq!(raw.option(OptionCode::ABORT, &[]).await, ReplyType::ACK);
    assert_eq!(raw.rest().await, []);

    let mut raw = Raw::connect(&endpoint).await;
    raw.send(&option(OptionCode::EXPORT_NAME, b"disk")).await;
    assert_eq!(raw.rest().await, []);
}

/// CVE-2021-3716: what is injected before TLS must not count inside it.
#[tokio::test]
async fn cve_2021_3716_what_comes_in_the_clear_after_starttls_ends_the_connection() {
    let pki = Pki::new();
    for required in [true, false] {
        let config = ServerConfig::default().tls(Some(pki.server()), required);
        let (_server, endpoint) = serve_disk(config).await;
        let starttls = option(OptionCode::STARTTLS, &[]);
        for injected in [option(OptionCode::LIST, &[]), option(OptionCode::GO, &export("disk"))] {
            for count in [1, injected.len()] {
                let mut raw = Raw::connect(&endpoint).await;
                raw.send(&[&starttls[..], &injected[..count]].concat()).await;
                let rest = raw.rest().await;
                // The answer to STARTTLS may come, and nothing that answers what was injected.
                assert!(rest.len() <= OptionReplyHeader::SIZE + 7, "{rest:02x?}");
            }
            // As somebody in between does it, who lets the client's own TLS pass behind it.
            let mut raw = Raw::connect(&endpoint).await;
            raw.send(&[&starttls[..], &injected].concat()).await;
            raw.receive::<{ OptionReplyHeader::SIZE }>().await;
            assert!(raw.secure(&pki).await.is_err(), "TLS has begun behind what was injected");
        }
        let mut raw = Raw::connect(&endpoint).await;
        assert_eq!(raw.option(OptionCode::STARTTLS, &[]).await, ReplyType::ACK);
        raw.send(&option(OptionCode::GO, &export("disk"))).await;
        // TLS says that it was no TLS; nothing of NBD comes.
        assert!(raw.rest().await.len() <= 7);
    }
}

#[tokio::test]
async fn nothing_that_was_agreed_on_in_the_clear_counts_inside_tls() {
    let pki = Pki::new();
    let config = ServerConfig::default().tls(Some(pki.server()), false);
    let (_server, endpoint) = serve_disk(config).await;
    let mut raw = Raw::connect(&endpoint).await;
    assert_eq!(raw.option(OptionCode::STRUCTURED_REPLY, &[]).await, ReplyType::ACK);
    assert_eq!(raw.option(OptionCode::STARTTLS, &[]).await, ReplyType::ACK);
    let mut raw = raw.secure(&pki).await.unwrap();
    let context = [&export("disk")[..8], &[0; 4]].concat();
    let selected = raw.option(OptionCode::SET_META_CONTEXT, &context).await;
    assert_eq!(selected, ReplyType::ERR_INVALID, "structured replies were kept");
    assert_eq!(raw.option(OptionCode::STRUCTURED_REPLY, &[]).await, ReplyType::ACK);
    assert_eq!(raw.option(OptionCode::STARTTLS, &[]).await, ReplyType::ERR_INVALID);
    assert_eq!(raw.option(OptionCode::GO, &export("disk")).await, ReplyType::ACK);
}

#[tokio::test]
async fn a_client_that_ends_without_a_farewell_of_tls_has_just_ended() {
    let pki = Pki::new();
    let (server, endpoint) = serve_disk(pki.required()).await;
    let mut raw = Raw::connect(&endpoint).await;
    assert_eq!(raw.option(OptionCode::STARTTLS, &[]).await, ReplyType::ACK);
    let mut raw = raw.secure(&pki).await.unwrap();
    assert_eq!(raw.option(OptionCode::GO, &export("disk")).await, ReplyType::ACK);
    let connection = server.connections().remove(0);
    raw.0.get_mut().0.shutdown().await.unwrap();
    tokio::time::timeout(PATIENCE, connection.closed()).await.expect("it hangs");
    assert!(!connection.has_disconnected(), "an end that was not announced is none");
}

#[tokio::test]
async fn a_server_without_tls_says_so() {
    let (_server, endpoint) = serve_disk(ServerConfig::default()).await;
    let mut raw = Raw::connect(&endpoint).await;
    assert_eq!(raw.option(OptionCode::STARTTLS, &[]).await, ReplyType::ERR_UNSUP);
    assert_eq!(raw.option(OptionCode::GO, &export("disk")).await, ReplyType::ACK);
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_of_the_tls_handshake_is_dropped() {
    let pki = Pki::new();
    let config = pki.required().handshake_timeout(Duration::from_millis(200));
    let (server, endpoint) = serve_disk(config).await;
    let mut raw = Raw::connect(&endpoint).await;
    assert_eq!(raw.option(OptionCode::STARTTLS, &[]).await, ReplyType::ACK);
    raw.send(&[0x16, 3, 1]).await;
    assert_eq!(raw.rest().await, []);
    assert!(server.connections().iter().all(|connection| connection.export_name().is_none()));
}

/// A server that answers `STARTTLS` in its own way, and tells what it has received.
async fn impostor(answer: Vec<u8>) -> (Endpoint, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let received = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let greeting = [&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &[0, 3]];
        stream.write_all(&greeting.concat()).await.unwrap();
        let mut request = [0; 4 + OptionHeader::SIZE];
        stream.read_exact(&mut request).await.unwrap();
        stream.write_all(&answer).await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        [&request[4..], &rest].concat()
    });
    (Endpoint::Tcp { host: "127.0.0.1".into(), port }, received)
}

fn reply(kind: ReplyType, data: &[u8]) -> Vec<u8> {
    let (option, len) = (OptionCode::STARTTLS, data.len() as u32);
    [&OptionReplyHeader { option, kind, len }.encode()[..], data].concat()
}

/// CVE-2019-14842: no downgrade.
#[tokio::test]
async fn cve_2019_14842_a_client_that_wants_tls_never_goes_on_without_it() {
    let pki = Pki::new();
    for kind in [
        ReplyType::ERR_UNSUP,
        ReplyType::ERR_POLICY,
        ReplyType::ERR_INVALID,
        ReplyType::ERR_SHUTDOWN,
        ReplyType::ERR_TLS_REQD,
    ] {
        let (endpoint, received) = impostor(reply(kind, b"no")).await;
        let error = Connection::connect(&pki.options(&endpoint, "disk")).await.unwrap_err();
        assert!(matches!(error, ClientError::Handshake { .. }), "{error}");
        // No name of an export, and nothing else that it would have said.
        let expected = [option(OptionCode::STARTTLS, &[]), option(OptionCode::ABORT, &[])].concat();
        assert_eq!(received.await.unwrap(), expected, "{kind}");
    }
}

#[tokio::test]
async fn a_client_does_not_take_answers_that_came_before_tls() {
    let pki = Pki::new();
    let forged = [reply(ReplyType::ACK, &[]), reply(ReplyType::ACK, &[])].concat();
    let (endpoint, _received) = impostor(forged).await;
    let error = Connection::connect(&pki.options(&endpoint, "disk")).await.unwrap_err();
    // Either it is seen at once, or TLS chokes on it.
    assert!(
        error.is_permanent() || matches!(error, ClientError::Tls { .. }),
        "not refused for that: {error}"
    );
}

#[tokio::test]
async fn a_client_without_tls_says_that_the_server_demands_it() {
    let pki = Pki::new();
    let (_server, endpoint) = serve_disk(pki.required()).await;
    let error = Connection::connect(&ConnectOptions::new(endpoint, "disk")).await.unwrap_err();
    assert!(error.to_string().contains("demands TLS"), "{error}");
}
