use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use tokio_rustls::TlsAcceptor;

use super::TlsError;
use super::directory::{Directory, provider};
use super::reload::Reload;
use super::stream::TlsStream;
use crate::Stream;

/// What a server needs for TLS. Cloning is cheap.
#[derive(Clone)]
pub struct TlsServer {
    acceptor: Arc<Reload<TlsAcceptor>>,
}

impl TlsServer {
    /// Reads the server's certificate and key, and the authorities that clients' certificates
    /// have to come from.
    ///
    /// # Errors
    /// A file is missing or not usable, or certificate and key do not belong together.
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        Ok(TlsServer { acceptor: Reload::new(directory, acceptor)? })
    }

    /// The server's half of the TLS handshake.
    pub(crate) async fn accept(&self, stream: Stream) -> io::Result<Stream> {
        let stream = self.acceptor.get().await.accept(Box::new(stream)).await?;
        Ok(Stream::Tls(Box::new(TlsStream::new(stream.into())?)))
    }
}

fn acceptor(directory: &Directory<'_>) -> Result<TlsAcceptor, TlsError> {
    let (provider, identity) = (provider(), directory.identity("server")?);
    let clients =
        WebPkiClientVerifier::builder_with_provider(directory.roots()?, Arc::clone(&provider))
            .with_crls(directory.revoked()?)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| directory.unusable(error))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| directory.unusable(error))?
        .with_client_cert_verifier(clients)
        .with_single_cert(identity.chain, identity.key)
        .map_err(|error| directory.unusable(error))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer").finish_non_exhaustive()
    }
}
