use std::path::PathBuf;
use std::sync::Arc;

use brep_nbd::server::Listener;
use brep_nbd::tls::{TlsClient, TlsError, TlsServer};
use brep_nbd::{Endpoint, NbdUri, TlsParameters};
use clap::{Args, ValueEnum};

use super::address::{check_plaintext, endpoint_without_export};
use crate::exit::Failure;

/// What commands that serve take about TLS.
#[derive(Debug, Args)]
pub(crate) struct TlsFlags {
    /// Use TLS, with the certificates in this directory
    ///
    /// ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem and client-key.pem, as `brep
    /// tls issue` makes them. Clients have to show a certificate of the same authority.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,

    /// Whether clients have to use TLS
    ///
    /// On a unix socket that only its owner can use they may and never have to.
    #[arg(long, value_name = "MODE", default_value = "required", requires = "tls_dir")]
    tls: TlsMode,

    /// Serve only clients whose certificate has this subject, such as CN=guest7
    ///
    /// May be given several times. Compared whole.
    #[arg(long, value_name = "SUBJECT", requires = "tls_dir")]
    tls_allow: Vec<String>,

    /// Listen beyond loopback although nothing is encrypted
    #[arg(long)]
    allow_plaintext: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsMode {
    /// They do
    Required,
    /// They may
    Optional,
    /// There is none
    Off,
}

/// What a server needs of TLS.
pub(crate) struct ServerTls {
    pub(crate) server: TlsServer,
    pub(crate) required: bool,
    pub(crate) allowed_clients: Option<Arc<[String]>>,
}

impl ServerTls {
    /// Whether nobody is served in the clear at this address.
    pub(crate) fn is_required_at(&self, listener: &Listener) -> bool {
        self.required && listener.is_shared()
    }
}

impl TlsFlags {
    pub(crate) fn allow_plaintext(&self) -> bool {
        self.allow_plaintext
    }

    /// The directory, unless TLS is off.
    fn dir(&self) -> Option<&PathBuf> {
        self.tls_dir.as_ref().filter(|_| self.tls != TlsMode::Off)
    }

    /// Whether clients can begin TLS.
    pub(crate) fn is_on(&self) -> bool {
        self.dir().is_some()
    }

    /// What is listened on, for options whose exports are named by something else.
    pub(crate) fn listener(&self, option: &str, uri: NbdUri) -> Result<Endpoint, Failure> {
        let refuse = |why: &str| Err(Failure::usage(format!("{option} {uri}: {why}")));
        let unix = matches!(uri.endpoint, Endpoint::Unix { .. });
        let required = self.dir().is_some() && self.tls == TlsMode::Required;
        match &uri.tls {
            Some(_) if self.dir().is_none() => return refuse("TLS needs --tls-dir DIR"),
            Some(_) if unix => {
                return refuse("on a unix socket TLS is optional: write nbd+unix");
            }
            Some(_) if !required => return refuse("this scheme demands TLS, and --tls does not"),
            Some(parameters) if *parameters != TlsParameters::default() => {
                return refuse("TLS parameters are for clients; a server has --tls-dir");
            }
            _ => {}
        }
        let endpoint = endpoint_without_export(option, uri)?;
        if unix || !required {
            check_plaintext(option, &endpoint, self.allow_plaintext)?;
        }
        Ok(endpoint)
    }

    /// Refuses a place that somebody else has chosen, if others could read along there.
    pub(crate) fn check_open(&self, listener: &Listener) -> Result<(), Failure> {
        let endpoint = listener.endpoint();
        match endpoint {
            _ if self.dir().is_some() && self.tls == TlsMode::Required => Ok(()),
            Endpoint::Unix { path } if listener.is_shared() && !self.allow_plaintext => {
                Err(Failure::usage(format!(
                    "{}: others than its owner can use this socket: give it the mode 0600 \
                     (SocketMode=0600), --tls-dir, or --allow-plaintext if that is meant",
                    path.display()
                )))
            }
            _ => check_plaintext("listening on", endpoint, self.allow_plaintext),
        }
    }

    /// Reads what a server needs.
    pub(crate) fn server(&self) -> Result<Option<ServerTls>, Failure> {
        let Some(dir) = self.dir() else {
            return match self.tls_allow.is_empty() {
                true => Ok(None),
                false => Err(Failure::usage(
                    "--tls-allow: without TLS nobody shows a certificate; leave out --tls off",
                )),
            };
        };
        Ok(Some(ServerTls {
            server: TlsServer::load(dir).map_err(Failure::failed)?,
            required: self.tls == TlsMode::Required,
            allowed_clients: (!self.tls_allow.is_empty()).then(|| self.tls_allow.clone().into()),
        }))
    }

    /// Reads what a client needs whose server is not known yet. Only where TLS is on.
    pub(crate) fn any_client(&self) -> Result<TlsClient, Failure> {
        let dir = self.dir().ok_or_else(|| Failure::usage("TLS needs --tls-dir DIR"))?;
        TlsClient::load(dir).map_err(Failure::failed)
    }

    /// Reads what a client of this URI needs.
    pub(crate) fn client(&self, option: &str, uri: &NbdUri) -> Result<Option<TlsClient>, Failure> {
        let client = TlsClient::for_uri(uri, self.dir().map(PathBuf::as_path));
        client.map_err(|error| tls_failure(option, uri, error))
    }
}

/// Why a client of a URI has no TLS.
pub(crate) fn tls_failure(option: &str, uri: &NbdUri, error: TlsError) -> Failure {
    match error {
        TlsError::NoCertificates | TlsError::Unsupported(_) | TlsError::ServerName(_) => {
            Failure::usage(format!("{option} {uri}: {error}"))
        }
        error => Failure::failed(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    fn flags(dir: bool, tls: TlsMode) -> TlsFlags {
        let tls_dir = dir.then(|| PathBuf::from("certificates"));
        TlsFlags { tls_dir, tls, tls_allow: Vec::new(), allow_plaintext: false }
    }

    #[test]
    fn a_listener_beyond_loopback_is_encrypted_or_refused() {
        let off = flags(false, TlsMode::Required);
        let required = flags(true, TlsMode::Required);
        let optional = flags(true, TlsMode::Optional);
        let disabled = flags(true, TlsMode::Off);
        for (text, taken) in [
            ("nbd://127.0.0.1", [true, true, true, true]),
            ("nbd+unix:///?socket=/s", [true, true, true, true]),
            ("nbd://192.0.2.1", [false, true, false, false]),
            ("nbds://192.0.2.1", [false, true, false, false]),
            ("nbds://127.0.0.1", [false, true, false, false]),
            ("nbds+unix:///?socket=/s", [false; 4]),
            ("nbds://127.0.0.1/?tls-hostname=x", [false; 4]),
            ("nbds://127.0.0.1/vda", [false; 4]),
        ] {
            for (flags, taken) in [&off, &required, &optional, &disabled].into_iter().zip(taken) {
                let listener = flags.listener("--listen", text.parse().unwrap());
                assert_eq!(listener.is_ok(), taken, "{text} {flags:?}");
                assert!(listener.err().is_none_or(|failure| failure.code == exit::USAGE));
            }
        }
    }

    #[test]
    fn a_peer_that_demands_tls_is_not_reached_without() {
        let uri: NbdUri = "nbds://127.0.0.1".parse().unwrap();
        for flags in [flags(false, TlsMode::Required), flags(true, TlsMode::Off)] {
            assert_eq!(flags.client("--peer", &uri).unwrap_err().code, exit::USAGE);
        }
        // Nor one that does not, where TLS is on: the directory is looked for.
        let uri: NbdUri = "nbd://127.0.0.1".parse().unwrap();
        assert!(flags(true, TlsMode::Optional).client("--peer", &uri).is_err());
        assert!(flags(false, TlsMode::Required).client("--peer", &uri).unwrap().is_none());
    }
}
