//! A small PKI, and servers that use it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use brep_nbd::Endpoint;
use brep_nbd::client::ConnectOptions;
use brep_nbd::server::{Exports, Server, ServerConfig};
use brep_nbd::tls::{TlsClient, TlsServer};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use tempfile::TempDir;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// An authority, and a directory with its certificates for both roles.
pub(crate) struct Pki {
    pub(crate) ca: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

pub(crate) fn params(common_name: &str, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![usage];
    params
}

impl Pki {
    pub(crate) fn new() -> Self {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority.distinguished_name = DistinguishedName::new();
        authority.distinguished_name.push(DnType::CommonName, "authority");
        let ca = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let pki = Pki { ca, directory: tempfile::tempdir().unwrap() };
        pki.write("ca-cert.pem", &pki.ca.pem());
        let mut server = params("server", ExtendedKeyUsagePurpose::ServerAuth);
        server.subject_alt_names = vec![
            SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            SanType::DnsName("localhost".try_into().unwrap()),
        ];
        pki.issue("server", server);
        pki.issue("client", params("client", ExtendedKeyUsagePurpose::ClientAuth));
        pki
    }

    /// Puts a certificate and its key into the directory, in the place of what is there.
    pub(crate) fn issue(&self, role: &str, params: CertificateParams) -> Certificate {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        self.write(&format!("{role}-cert.pem"), &certificate.pem());
        self.write(&format!("{role}-key.pem"), &key.serialize_pem());
        certificate
    }

    pub(crate) fn write(&self, file: &str, contents: &str) {
        std::fs::write(self.path().join(file), contents).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        std::fs::remove_file(self.path().join(file)).unwrap();
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn server(&self) -> TlsServer {
        TlsServer::load(self.path()).unwrap()
    }

    pub(crate) fn client(&self) -> TlsClient {
        TlsClient::load(self.path()).unwrap()
    }

    /// A server that demands TLS.
    pub(crate) fn required(&self) -> ServerConfig {
        ServerConfig::default().tls(Some(self.server()), true)
    }

    pub(crate) fn options(&self, endpoint: &Endpoint, export: &str) -> ConnectOptions {
        let tls = Some(self.client());
        ConnectOptions { tls, ..ConnectOptions::new(endpoint.clone(), export) }
    }
}

/// A server at a port of its own.
pub(crate) async fn serve(
    exports: Arc<dyn Exports>,
    config: ServerConfig,
) -> (Arc<Server>, Endpoint) {
    let server = Server::new(exports, config);
    let any = Endpoint::Tcp { host: "127.0.0.1".into(), port: 0 };
    let listener = Server::bind(&any).await.unwrap();
    let endpoint = listener.endpoint().clone();
    let accepting = Arc::clone(&server);
    tokio::spawn(async move { accepting.serve(listener).await });
    (server, endpoint)
}
