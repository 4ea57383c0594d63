use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::TlsError;
use super::directory::{Directory, provider};
use super::reload::Reload;
use super::stream::TlsStream;
use crate::{Endpoint, NbdUri, Stream, TlsKind};

/// The name that a server on a unix socket has to have, because its address has none.
const LOCAL_NAME: &str = "localhost";

/// What a client needs for TLS. A client that has it never goes on without TLS. Cloning is cheap.
#[derive(Clone)]
pub struct TlsClient {
    connector: Arc<Reload<TlsConnector>>,
    server_name: Option<ServerName<'static>>,
}

impl TlsClient {
    /// Reads the authorities that the server's certificate has to come from, and the client's own
    /// certificate and key if there are any.
    ///
    /// # Errors
    /// A file is missing or not usable, or certificate and key do not belong together.
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        Ok(TlsClient { connector: Reload::new(directory, connector)?, server_name: None })
    }

    /// What a URI demands: none if its scheme is not one of TLS, unless `directory` is given. The
    /// URI's own directory goes before `directory`.
    ///
    /// # Errors
    /// As for [`load`](Self::load); or the URI demands TLS and there are no certificates; or it
    /// demands what is not possible.
    pub fn for_uri(uri: &NbdUri, directory: Option<&Path>) -> Result<Option<Self>, TlsError> {
        let Some(parameters) = &uri.tls else { return directory.map(Self::load).transpose() };
        match parameters.kind {
            None | Some(TlsKind::X509) => {}
            Some(TlsKind::Anonymous) => return Err(TlsError::Unsupported("tls-type=anon")),
            Some(TlsKind::PreSharedKey) => return Err(TlsError::Unsupported("tls-type=psk")),
        }
        if parameters.verify_peer == Some(false) {
            return Err(TlsError::Unsupported("tls-verify-peer=0"));
        }
        let directory = parameters.certificates.as_deref().or(directory);
        let client = Self::load(directory.ok_or(TlsError::NoCertificates)?)?;
        match &parameters.hostname {
            Some(name) => client.server_name(name).map(Some),
            None => Ok(Some(client)),
        }
    }

    /// The name or address that the server's certificate has to be for, instead of the host's in
    /// its address (`localhost` for a unix socket).
    ///
    /// # Errors
    /// It is no name.
    pub fn server_name(mut self, name: &str) -> Result<Self, TlsError> {
        self.server_name = Some(parse_name(name)?);
        Ok(self)
    }

    /// The client's half of the TLS handshake.
    pub(crate) async fn connect(&self, endpoint: &Endpoint, stream: Stream) -> io::Result<Stream> {
        let name = match (&self.server_name, endpoint) {
            (Some(name), _) => Ok(name.clone()),
            (None, Endpoint::Tcp { host, .. }) => parse_name(host),
            (None, Endpoint::Unix { .. }) => parse_name(LOCAL_NAME),
        };
        let name = name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let stream = self.connector.get().await.connect(name, Box::new(stream)).await?;
        Ok(Stream::Tls(Box::new(TlsStream::new(stream.into())?)))
    }
}

fn connector(directory: &Directory<'_>) -> Result<TlsConnector, TlsError> {
    let provider = provider();
    let servers =
        WebPkiServerVerifier::builder_with_provider(directory.roots()?, Arc::clone(&provider))
            .with_crls(directory.revoked()?)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| directory.unusable(error))?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| directory.unusable(error))?
        .with_webpki_verifier(servers);
    let config = if directory.has_identity("client")? {
        let identity = directory.identity("client")?;
        config
            .with_client_auth_cert(identity.chain, identity.key)
            .map_err(|error| directory.unusable(error))?
    } else {
        config.with_no_client_auth()
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn parse_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::ServerName(name.to_owned()))
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}
