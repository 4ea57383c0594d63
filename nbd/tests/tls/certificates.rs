//! Whose certificate lets whom in.

use std::sync::Arc;

use brep_block::Memory;
use brep_nbd::client::{ClientError, ConnectOptions, Connection};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_nbd::tls::{TlsClient, TlsError, TlsServer};
use brep_nbd::{Endpoint, NbdUri};
use rcgen::{
    CertificateRevocationListParams, ExtendedKeyUsagePurpose, KeyIdMethod, RevokedCertParams,
    SerialNumber, date_time_ymd,
};

use crate::support::{Pki, params, serve};

async fn serve_disk(config: ServerConfig) -> (Arc<Server>, Endpoint) {
    let exports = StaticExports::new();
    exports.add(Export::new("disk", Memory::new("disk", 4096)));
    serve(Arc::new(exports), config).await
}

/// What it costs to be refused: an error that names TLS, whenever it comes.
async fn refused(options: &ConnectOptions) -> String {
    match Connection::connect(options).await {
        Err(error @ ClientError::Tls { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let pki = Pki::new();
    let (server, endpoint) = serve_disk(pki.required()).await;
    pki.remove("client-cert.pem");
    pki.remove("client-key.pem");
    refused(&pki.options(&endpoint, "disk")).await;
    assert!(server.connections().iter().all(|c| c.tls_peer().is_none()));
}

#[tokio::test]
async fn certificates_of_another_authority_are_refused_by_either_side() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let (_server, endpoint) = serve_disk(ours.required()).await;
    refused(&theirs.options(&endpoint, "disk")).await;
    theirs.write("ca-cert.pem", &ours.ca.pem());
    refused(&theirs.options(&endpoint, "disk")).await;
}

#[tokio::test]
async fn cve_2024_7383_a_servers_certificate_has_to_be_for_its_name() {
    let pki = Pki::new();
    let (_server, endpoint) = serve_disk(pki.required()).await;
    let mut options = pki.options(&endpoint, "disk");
    options.tls = Some(pki.client().server_name("beta.example").unwrap());
    assert!(refused(&options).await.contains("beta.example"));
    options.tls = Some(pki.client().server_name("localhost").unwrap());
    Connection::connect(&options).await.unwrap();
}

#[tokio::test]
async fn a_servers_certificate_is_no_clients() {
    let pki = Pki::new();
    let (_server, endpoint) = serve_disk(pki.required()).await;
    pki.issue("client", params("client", ExtendedKeyUsagePurpose::ServerAuth));
    refused(&pki.options(&endpoint, "disk")).await;
}

#[tokio::test]
async fn a_certificate_that_is_over_or_not_yet_valid_is_refused() {
    let pki = Pki::new();
    let (_server, endpoint) = serve_disk(pki.required()).await;
    for (from, to) in [(1980, 1990), (2980, 2990)] {
        let mut client = params("client", ExtendedKeyUsagePurpose::ClientAuth);
        client.not_before = date_time_ymd(from, 1, 1);
        client.not_after = date_time_ymd(to, 1, 1);
        pki.issue("client", client);
        refused(&pki.options(&endpoint, "disk")).await;
    }
}

#[tokio::test]
async fn a_revoked_certificate_is_refused() {
    let pki = Pki::new();
    let revoke = |serial: u64| {
        let now = date_time_ymd(2020, 1, 1);
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: date_time_ymd(2900, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        pki.write("ca-crl.pem", &list.signed_by(&pki.ca).unwrap().pem().unwrap());
    };
    let mut client = params("client", ExtendedKeyUsagePurpose::ClientAuth);
    client.serial_number = Some(SerialNumber::from(77));
    pki.issue("client", client);
    revoke(78);
    let (_server, endpoint) = serve_disk(pki.required()).await;
    Connection::connect(&pki.options(&endpoint, "disk")).await.unwrap();
    revoke(77);
    let (_server, endpoint) = serve_disk(pki.required()).await;
    refused(&pki.options(&endpoint, "disk")).await;

    // Nor does a list that cannot be looked at let anybody in.
    let options = pki.options(&endpoint, "disk");
    pki.remove("ca-crl.pem");
    refused(&options).await;
    std::os::unix::fs::symlink("nowhere", pki.path().join("ca-crl.pem")).unwrap();
    refused(&options).await;
    assert!(matches!(TlsServer::load(pki.path()), Err(TlsError::File { .. })));
}

#[tokio::test]
async fn certificates_are_renewed_without_a_new_start() {
    let pki = Pki::new();
    let (server, endpoint) = serve_disk(pki.required()).await;
    let options = pki.options(&endpoint, "disk");
    let old = Connection::connect(&options).await.unwrap();
    pki.issue("client", params("renewed", ExtendedKeyUsagePurpose::ClientAuth));
    let mut renewed = params("new server", ExtendedKeyUsagePurpose::ServerAuth);
    renewed.subject_alt_names.push(rcgen::SanType::IpAddress([127, 0, 0, 1].into()));
    pki.issue("server", renewed);
    let new = Connection::connect(&options).await.unwrap();
    assert_eq!(new.tls_peer().unwrap().subject, "CN=new server");
    assert_eq!(server.connections()[1].tls_peer().unwrap().subject, "CN=renewed");
    assert!(old.failure().is_none(), "a connection that stands is not touched");

    // What cannot be used does not take away what there was.
    pki.write("server-cert.pem", "half of it");
    pki.remove("client-key.pem");
    let after = Connection::connect(&options).await.unwrap();
    assert_eq!(after.tls_peer().unwrap().subject, "CN=new server");
}

#[tokio::test]
async fn cve_2013_6410_an_export_is_only_for_subjects_that_are_exactly_on_its_list() {
    let pki = Pki::new();
    let exports = StaticExports::new();
    for (name, subject) in [
        ("ours", "CN=client"),
        ("prefix", "CN=clien"),
        ("longer", "CN=client2"),
        ("bare", "client"),
    ] {
        let export = Export::new(name, Memory::new(name, 4096));
        exports.add(export.allowed_subjects(Some(["CN=x".into(), subject.into()].into())));
    }
    exports
        .add(Export::new("nobody", Memory::new("nobody", 4096)).allowed_subjects(Some([].into())));
    let (_server, endpoint) = serve(Arc::new(exports), pki.required()).await;
    Connection::connect(&pki.options(&endpoint, "ours")).await.unwrap();
    for name in ["prefix", "longer", "bare", "nobody"] {
        let error = Connection::connect(&pki.options(&endpoint, name)).await.unwrap_err();
        assert!(error.to_string().contains("CN=client is not allowed"), "{name}: {error}");
    }
}

#[tokio::test]
async fn tls_may_be_for_some_exports_only() {
    let pki = Pki::new();
    let exports = StaticExports::new();
    exports.add(Export::new("open", Memory::new("open", 4096)));
    exports.add(Export::new("closed", Memory::new("closed", 4096)).tls_required(true));
    let list = Some(["CN=client".to_owned()].into());
    exports.add(Export::new("listed", Memory::new("listed", 4096)).allowed_subjects(list));
    let config = ServerConfig::default().tls(Some(pki.server()), false);
    let (_server, endpoint) = serve(Arc::new(exports), config).await;
    for name in ["open", "closed", "listed"] {
        Connection::connect(&pki.options(&endpoint, name)).await.unwrap();
        let plain = Connection::connect(&ConnectOptions::new(endpoint.clone(), name)).await;
        assert_eq!(plain.is_ok(), name == "open", "{name}: {plain:?}");
    }
}

#[test]
fn a_directory_that_is_not_complete_says_what_is_missing() {
    let pki = Pki::new();
    pki.remove("client-key.pem");
    let error = TlsClient::load(pki.path()).unwrap_err().to_string();
    assert!(error.contains("client-key.pem"), "{error}");
    pki.write("server-cert.pem", "not PEM");
    let error = TlsServer::load(pki.path()).unwrap_err().to_string();
    assert!(error.contains("server-cert.pem"), "{error}");
    let other = Pki::new();
    let key = std::fs::read_to_string(other.path().join("client-key.pem")).unwrap();
    other.write("server-key.pem", &key);
    assert!(matches!(TlsServer::load(other.path()), Err(TlsError::Unusable { .. })));
    pki.remove("ca-cert.pem");
    assert!(matches!(TlsClient::load(pki.path()), Err(TlsError::File { .. })));
}

#[test]
fn a_uri_that_demands_tls_is_never_understood_as_one_that_does_not() {
    let pki = Pki::new();
    let options = |query: &str| {
        let uri: NbdUri = format!("nbds://127.0.0.1/disk{query}").parse().unwrap();
        ConnectOptions::from_uri(&uri)
    };
    let directory = format!("tls-certificates={}", pki.path().display());
    assert!(options(&format!("?{directory}")).unwrap().tls.is_some());
    for refused in ["", "?tls-certificates=/nowhere"] {
        assert!(options(refused).is_err(), "{refused}");
    }
    for refused in ["tls-type=anon", "tls-type=psk", "tls-verify-peer=0", "tls-hostname=a%20b"] {
        assert!(options(&format!("?{directory}&{refused}")).is_err(), "{refused}");
    }
}
