use brep_nbd::{Endpoint, NbdUri};

use brep_replication::config::PeerAddress;

use super::disk::check_name;
use crate::exit::Failure;

/// The place that a URI names, for options whose exports are named by the disks.
pub(crate) fn endpoint_without_export(option: &str, uri: NbdUri) -> Result<Endpoint, Failure> {
    if !uri.export.is_empty() {
        return Err(Failure::usage(format!(
            "{option} {uri}: no export name here, the exports are the names of the disks"
        )));
    }
    Ok(uri.endpoint)
}

/// The other side that a URI names: its export is the group there, if it has several.
pub(crate) fn peer_address(option: &str, uri: NbdUri) -> Result<PeerAddress, Failure> {
    let group = Some(uri.export).filter(|group| !group.is_empty());
    if let Some(group) = &group {
        check_name(group).map_err(|_| {
            Failure::usage(format!(
                "{option}: {group:?} is no name of a group; the exports are the names of the disks, \
                 and not part of it"
            ))
        })?;
    }
    Ok(PeerAddress { endpoint: uri.endpoint, group })
}

/// Refuses to listen where others can read along, unless that was said to be wanted.
pub(super) fn check_plaintext(
    option: &str,
    endpoint: &Endpoint,
    allowed: bool,
) -> Result<(), Failure> {
    if endpoint.is_loopback() || allowed {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{option} {endpoint}: listening beyond loopback without TLS lets anyone in the network \
         read and write the disks: --tls-dir gives it TLS, --allow-plaintext does it all the same"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    fn uri(text: &str) -> NbdUri {
        text.parse().unwrap()
    }

    #[test]
    fn listening_beyond_loopback_needs_consent() {
        for (text, open) in [
            ("nbd://127.0.0.1:1", false),
            ("nbd://[::1]", false),
            ("nbd://localhost", false),
            ("nbd+unix:///?socket=/a", false),
            ("nbd://0.0.0.0", true),
            ("nbd://[::]", true),
            ("nbd://192.0.2.1", true),
            ("nbd://example.org", true),
        ] {
            let endpoint = endpoint_without_export("--listen", uri(text)).unwrap();
            assert_eq!(check_plaintext("--listen", &endpoint, false).is_err(), open, "{text}");
            assert!(check_plaintext("--listen", &endpoint, true).is_ok(), "{text}");
        }
    }

    #[test]
    fn export_names_are_refused_as_usage() {
        for text in ["nbd://h/vda", "nbds://h/vda", "nbd+unix:///x?socket=/a"] {
            let failure = endpoint_without_export("--listen", uri(text)).unwrap_err();
            assert_eq!(failure.code, exit::USAGE, "{text}");
        }
    }
}
