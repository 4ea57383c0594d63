//! TLS: with the other side of the pair, and with guests.

use std::sync::Arc;

use brep_nbd::Endpoint;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, OptionErrorCode, PrivateReply,
    ServerConfig,
};
use brep_nbd::tls::{TlsClient, TlsPeer, TlsServer};
use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::{Error, Result};

/// How a side uses TLS. Its link to the other side then always does.
#[derive(Debug, Clone)]
pub struct TlsConfig {
    /// For those who connect to this side.
    pub server: TlsServer,
    /// For the other side, where this one connects to it.
    pub client: TlsClient,
    /// Nobody is served over TCP in the clear. On a unix socket, which only its owner can use,
    /// TLS is offered in either case.
    pub required: bool,
    /// The subjects of certificates, as [`TlsPeer::subject`] writes them, with which exports may
    /// be used. None: every certificate of the authority will do.
    pub allowed_clients: Option<Arc<[String]>>,
    /// The subject of the other side's certificate. None: every certificate of the authority
    /// will do; where this side connects, it has to be for the address.
    pub peer_subject: Option<String>,
}

impl TlsConfig {
    /// Whether nobody is served in the clear at this address.
    #[must_use]
    pub fn is_required_at(&self, endpoint: &Endpoint) -> bool {
        self.required && matches!(endpoint, Endpoint::Tcp { .. })
    }

    /// Whether this is the other side of the pair.
    pub(crate) fn check_peer(&self, peer: Option<&Arc<TlsPeer>>) -> Result<()> {
        match (peer, &self.peer_subject) {
            (None, _) => Err(Error::failed("the connection is not inside TLS")),
            (Some(peer), Some(subject)) if peer.subject != *subject => Err(Error::failed(format!(
                "the other side's certificate is for {:?}, and not for {subject:?}",
                peer.subject
            ))),
            (Some(_), _) => Ok(()),
        }
    }
}

/// Under what conditions this side listens.
#[derive(Debug, Clone, Default)]
pub(crate) struct Exposure {
    pub(crate) allow_plaintext: bool,
    pub(crate) tls: Option<TlsConfig>,
}

impl Exposure {
    /// Clear text beyond loopback has to be asked for.
    pub(crate) fn check(&self, endpoint: &Endpoint) -> Result<()> {
        let secured = self.tls.as_ref().is_some_and(|tls| tls.is_required_at(endpoint));
        if secured || self.allow_plaintext || endpoint.is_loopback() {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{endpoint}: listening beyond this host in clear text, without authentication, needs \
             --allow-plaintext; TLS needs --tls-dir"
        )))
    }

    pub(crate) fn server_config(&self, endpoint: &Endpoint) -> ServerConfig {
        let server = self.tls.as_ref().map(|tls| tls.server.clone());
        let required = self.tls.as_ref().is_some_and(|tls| tls.is_required_at(endpoint));
        ServerConfig::default().tls(server, required)
    }

    /// The exports, for those who are allowed to use them.
    pub(crate) fn guard(&self, exports: Arc<dyn Exports>) -> Arc<dyn Exports> {
        match &self.tls {
            Some(tls) => Arc::new(Guarded { exports, tls: tls.clone() }),
            None => exports,
        }
    }
}

/// Exports behind TLS: private options for the other side of the pair, disks for it and for the
/// clients that are listed.
struct Guarded {
    exports: Arc<dyn Exports>,
    tls: TlsConfig,
}

impl Exports for Guarded {
    fn list(&self) -> Vec<ExportDescription> {
        self.exports.list()
    }

    fn open(
        &self,
        name: &str,
        connection: &Arc<Connection>,
    ) -> std::result::Result<Export, OptionError> {
        let mut export = self.exports.open(name, connection)?;
        let subject = connection.tls_peer().map(|peer| &peer.subject);
        let named = subject.is_some() && subject == self.tls.peer_subject.as_ref();
        // A private option has attached something: who may send these was checked then.
        if !named && connection.data().is_none() {
            export.allowed_subjects = self.tls.allowed_clients.clone();
        }
        Ok(export)
    }

    fn begin(&self, export: &Export, connection: &Arc<Connection>) {
        self.exports.begin(export, connection);
    }

    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<Connection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        if let Err(error) = self.tls.check_peer(connection.tls_peer()) {
            tracing::warn!(peer = connection.peer(), "refused as the other side: {error}");
            let refusal = OptionError::new(OptionErrorCode::Policy, error.to_string());
            return Box::pin(std::future::ready(PrivateReply::Error(refusal)));
        }
        self.exports.private_option(connection, option, data)
    }
}
