//! TLS: with the other side of the pair, and with guests.

use std::sync::Arc;

use brep_nbd::Endpoint;
use brep_nbd::server::{Connection, Export, OptionError, OptionErrorCode, ServerConfig};
use brep_nbd::tls::{TlsClient, TlsPeer, TlsServer};

use crate::reception::SharedListener;
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
    /// The place at an address that several groups share.
    pub(crate) shared: Option<SharedListener>,
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

    /// Limits an export to the other side of the pair and to the clients that are listed.
    pub(crate) fn limit(&self, export: &mut Export, connection: &Connection) {
        let Some(tls) = &self.tls else { return };
        let subject = connection.tls_peer().map(|peer| &peer.subject);
        let named = subject.is_some() && subject == tls.peer_subject.as_ref();
        // A private option has attached something: who may send these was checked then.
        if !named && connection.data().is_none() {
            export.allowed_subjects = tls.allowed_clients.clone();
        }
    }

    /// Private options are for the other side of the pair.
    ///
    /// # Errors
    /// Sent to the client: it is not that.
    pub(crate) fn check_private(
        &self,
        connection: &Connection,
    ) -> std::result::Result<(), OptionError> {
        let Some(tls) = &self.tls else { return Ok(()) };
        tls.check_peer(connection.tls_peer()).map_err(|error| {
            tracing::warn!(peer = connection.peer(), "refused as the other side: {error}");
            OptionError::new(OptionErrorCode::Policy, error.to_string())
        })
    }
}
