//! The address of the other side: a flag, or a command whose effect lasts.

use brep_nbd::{Endpoint, NbdUri, TlsParameters};
use tokio::sync::watch;

use super::Side;
use crate::config::{PeerAddress, SideConfig};
use crate::daemon::check_name;
use crate::state::Record;
use crate::{Error, Result};

/// The address at the start: the flag, else what was set by command.
pub(super) fn at_start(config: &SideConfig, record: &Record) -> Result<Option<PeerAddress>> {
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
/// It is none, or what stands in the place of an export is no name of a group. Or it demands TLS of a side
/// that has none.
pub(crate) fn parse(text: &str, has_tls: bool) -> Result<PeerAddress> {
    let uri: NbdUri = text.parse().map_err(|e| Error::usage(format!("peer {text:?}: {e}")))?;
    let group = Some(uri.export).filter(|group| !group.is_empty());
    if let Some(group) = group.as_ref().filter(|group| check_name("group", group).is_err()) {
        return Err(Error::usage(format!(
            "peer {text:?}: {group:?} is no name of a group; the exports are the disks' names, and \
             not part of it"
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
    let endpoint = match uri.endpoint {
        Endpoint::Unix { path } => {
            let path = std::path::absolute(&path)
                .map_err(|e| Error::usage(format!("peer {text:?}: {e}")))?;
            Endpoint::Unix { path }
        }
        endpoint => endpoint,
    };
    Ok(PeerAddress { endpoint, group })
}

/// The URI of an address, as [`parse`] understands it.
fn uri(peer: &PeerAddress) -> String {
    let export = peer.group.clone().unwrap_or_default();
    NbdUri { endpoint: peer.endpoint.clone(), export, tls: None }.to_string()
}

impl Side {
    /// Where the other side listens, if that is known.
    pub(crate) fn peer(&self) -> Option<PeerAddress> {
        self.peer.borrow().clone()
    }

    /// Tells when the address changes.
    pub(crate) fn watch_peer(&self) -> watch::Receiver<Option<PeerAddress>> {
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
    pub(crate) fn set_peer(&self, peer: Option<PeerAddress>) -> Result<()> {
        self.record.update(|record| record.peer = peer.as_ref().map(uri))?;
        self.peer.send_replace(peer);
        Ok(())
    }
}
