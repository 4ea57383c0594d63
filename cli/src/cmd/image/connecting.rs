use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use brep_nbd::NbdUri;
use brep_nbd::client::{ConnectOptions, MultiConnection, ReconnectPolicy};
use brep_nbd::tls::TlsClient;

use crate::args::tls_failure;
use crate::exit::Failure;

/// How exports are connected to.
#[derive(Debug, Clone)]
pub(crate) struct Connecting {
    /// The certificates, where the URI demands TLS and names none.
    pub(crate) tls_dir: Option<PathBuf>,
    pub(crate) connect_timeout: Duration,
    pub(crate) request_timeout: Duration,
    /// What happens if there is no connection, at first or any more.
    pub(crate) policy: ReconnectPolicy,
    /// How many connections are used, where the server offers several.
    pub(crate) connections: usize,
    /// How many requests there will be in flight, and how many bytes they will hold.
    pub(crate) in_flight_max: usize,
    pub(crate) in_flight_bytes_max: u64,
}

impl Default for Connecting {
    /// One connection, and what its defaults are.
    fn default() -> Self {
        Connecting {
            tls_dir: None,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            policy: ReconnectPolicy::default(),
            connections: 1,
            in_flight_max: 1,
            in_flight_bytes_max: 1,
        }
    }
}

impl Connecting {
    pub(super) async fn connect(&self, uri: &NbdUri) -> Result<Arc<MultiConnection>, Failure> {
        let tls = TlsClient::for_uri(uri, self.tls_dir.as_deref());
        let defaults = ConnectOptions::new(uri.endpoint.clone(), uri.export.clone());
        let options = ConnectOptions {
            name: uri.to_string(),
            connect_timeout: self.connect_timeout,
            request_timeout: self.request_timeout,
            in_flight_max: defaults.in_flight_max.max(self.in_flight_max),
            in_flight_bytes_max: defaults.in_flight_bytes_max.max(self.in_flight_bytes_max),
            queued_bytes_max: defaults.queued_bytes_max.max(self.in_flight_bytes_max),
            tls: tls.map_err(|error| tls_failure("NBD", uri, error))?,
            ..defaults
        };
        let connected = if self.policy.delay.is_zero() {
            let connect = async || MultiConnection::connect(&options, self.connections).await;
            self.policy.attempt(connect).await
        } else {
            MultiConnection::open(&options, &self.policy, self.connections).await
        };
        Ok(connected.with_context(|| uri.to_string())?)
    }
}
