use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

const CA_CERT: &str = "ca-cert.pem";
pub(super) const CA_CRL: &str = "ca-crl.pem";

/// All files that count.
pub(super) const FILES: [&str; 6] =
    [CA_CERT, CA_CRL, "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"];

/// Why there is no TLS, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum TlsError {
    #[error("cannot read {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("certificates in {}: {reason}", directory.display())]
    Unusable { directory: PathBuf, reason: String },
    #[error("{0:?} is neither a host name nor an IP address that a certificate could be for")]
    ServerName(String),
    #[error("TLS needs certificates: add tls-certificates=DIR to the URI, their directory")]
    NoCertificates,
    #[error("{0} is not possible here: TLS is always with certificates, and they are checked")]
    Unsupported(&'static str),
}

/// A directory of certificates, as far as one role needs it.
pub(super) struct Directory<'a>(pub(super) &'a Path);

/// A certificate with its chain, and its key.
pub(super) struct Identity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Directory<'_> {
    pub(super) fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.all::<CertificateDer<'static>>(CA_CERT)? {
            let added = roots.add(certificate);
            added.map_err(|error| self.pem(CA_CERT, format!("no usable authority: {error}")))?;
        }
        Ok(Arc::new(roots))
    }

    /// Empty if there is no file of them.
    pub(super) fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        if self.has(CA_CRL)? { self.all(CA_CRL) } else { Ok(Vec::new()) }
    }

    /// `role` is `server` or `client`.
    pub(super) fn identity(&self, role: &str) -> Result<Identity, TlsError> {
        let (certificate, key) = (format!("{role}-cert.pem"), format!("{role}-key.pem"));
        let identity = Identity { chain: self.all(&certificate)?, key: self.key(&key)? };
        Ok(identity)
    }

    pub(super) fn has_identity(&self, role: &str) -> Result<bool, TlsError> {
        Ok(self.has(&format!("{role}-cert.pem"))? || self.has(&format!("{role}-key.pem"))?)
    }

    pub(super) fn unusable(&self, reason: impl ToString) -> TlsError {
        TlsError::Unusable { directory: self.0.to_owned(), reason: reason.to_string() }
    }

    /// Only what is surely not there is not: a list of what is revoked must not be left out because
    /// it cannot be looked at, or because a link leads nowhere.
    fn has(&self, file: &str) -> Result<bool, TlsError> {
        let path = self.0.join(file);
        match path.symlink_metadata() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(TlsError::File { path, source }),
        }
    }

    /// Everything of one kind in a file; at least one.
    fn all<T: PemObject>(&self, file: &str) -> Result<Vec<T>, TlsError> {
        let contents = self.read(file)?;
        let found: Result<Vec<T>, PemError> = T::pem_slice_iter(&contents).collect();
        match found {
            Ok(found) if found.is_empty() => Err(self.pem(file, "nothing of its kind in it")),
            Ok(found) => Ok(found),
            Err(error) => Err(self.pem(file, format!("not PEM: {error}"))),
        }
    }

    fn key(&self, file: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
        let contents = self.read(file)?;
        let path = self.0.join(file);
        let mode = std::fs::metadata(&path).map(|metadata| metadata.permissions().mode());
        if mode.is_ok_and(|mode| mode & 0o077 != 0) {
            tracing::warn!("{}: others may read this key: chmod 600", path.display());
        }
        PrivateKeyDer::from_pem_slice(&contents)
            .map_err(|error| self.pem(file, format!("no private key: {error}")))
    }

    fn read(&self, file: &str) -> Result<Vec<u8>, TlsError> {
        let path = self.0.join(file);
        std::fs::read(&path).map_err(|source| TlsError::File { path, source })
    }

    fn pem(&self, file: &str, reason: impl Into<String>) -> TlsError {
        TlsError::Pem { path: self.0.join(file), reason: reason.into() }
    }
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
