//! The address of the other side: a flag, or a command whose effect lasts.

use brep_nbd::{Endpoint, NbdUri, TlsParameters};
use tokio::sync::watch;

use super::Side;
use crate::config::SideConfig;
use crate::state::Record;
use crate::{Error, Result};

/// The address at the start: the flag, else what was set by command.
pub(super) fn at_start(config: &SideConfig, record: &Record) -> Result<Option<Endpoint>> {
    let remembered =
        record.peer.as_deref().map(|uri| parse(uri, config.tls.is_some())).transpose()?;
    if let (Some(given), Some(remembered)) = (&config.peer, &remembered)
        && given != remembered
    {
        tracing::warn!(%given, %remembered, "--peer is used, not what was set by command");
    }
    Ok(config.peer.clone().or(remembered))
}

/// Understands the URI of a peer. Where this side has TLS the peer has to, whatever the scheme.
///
/// # Errors
/// It is none, or has an export name: the exports are the disks' names. Or it demands TLS of a side
/// that has none.
pub(crate) fn parse(text: &str, has_tls: bool) -> Result<Endpoint> {
    let uri: NbdUri = text.parse().map_err(|e| Error::usage(format!("peer {text:?}: {e}")))?;
    if !uri.export.is_empty() {
        return Err(Error::usage(format!(
            "peer {text:?}: leave the export name {:?} out; the exports are the disks' names",
            uri.export
        )));
    }
    match &uri.tls {
        Some(_) if !has_tls => {
            let reason = "this side has no TLS: start it with --tls-dir";
            return Err(Error::usage(format!("peer {text:?}: {reason}")));
        }
        Some(parameters) if *parameters != TlsParameters::default() => {
            let reason = "what TLS needs is given when the side is started";
            return Err(Error::usage(format!("peer {text:?}: {reason}")));
        }
        _ => {}
    }
    Ok(match uri.endpoint {
        Endpoint::Unix { path } => {
            let path = std::path::absolute(&path)
                .map_err(|e| Error::usage(format!("peer {text:?}: {e}")))?;
            Endpoint::Unix { path }
        }
        endpoint => endpoint,
    })
}

/// The URI of an address, as [`parse`] understands it.
fn uri(endpoint: &Endpoint) -> String {
    NbdUri { endpoint: endpoint.clone(), export: String::new(), tls: None }.to_string()
}

impl Side {
    /// Where the other side listens, if that is known.
    pub(crate) fn peer(&self) -> Option<Endpoint> {
        self.peer.borrow().clone()
    }

    /// Tells when the address changes.
    pub(crate) fn watch_peer(&self) -> watch::Receiver<Option<Endpoint>> {
        self.peer.subscribe()
    }

    /// Whoever follows the address looks at it again.
    pub(crate) fn look_for_peer(&self) {
        self.peer.send_modify(|_| {});
    }

    /// Sets the address, or forgets it, beyond the end of the process.
    ///
    /// # Errors
    /// The record could not be saved; nothing was changed.
    pub(crate) fn set_peer(&self, peer: Option<Endpoint>) -> Result<()> {
        self.record.update(|record| record.peer = peer.as_ref().map(uri))?;
        self.peer.send_replace(peer);
        Ok(())
    }
}
