use crate::link::{RefusalKind, Side};
use crate::status::{Differences, size_text};

/// Why there is no session, and what resolves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    pub(crate) advice: Option<String>,
    pub(crate) kind: RefusalKind,
    /// What each side has that the other lacks, as far as it was asked for.
    pub(crate) differences: Option<Differences>,
    /// The peer may be the disk now: this side must not begin to serve its guest.
    pub(crate) superseded: bool,
    /// Nobody else serves a guest, so this side may, alone: the peer has said that it is the
    /// secondary of these disks, or this side has left its line.
    pub(crate) is_secondary: bool,
}

impl Refusal {
    /// One that says nothing about who is the disk.
    pub(crate) fn new(reason: impl Into<String>, advice: &str) -> Self {
        Refusal {
            reason: reason.into(),
            advice: Some(advice.to_owned()),
            kind: RefusalKind::Other,
            differences: None,
            superseded: false,
            is_secondary: false,
        }
    }

    /// The peer is a secondary, and the primary may go on.
    pub(super) fn of_secondary(reason: impl Into<String>, advice: &str) -> Self {
        Refusal { is_secondary: true, ..Refusal::new(reason, advice) }
    }

    /// The peer has newer data.
    pub(super) fn stale(reason: String, advice: &str) -> Self {
        let kind = RefusalKind::StalePrimary;
        Refusal { superseded: true, kind, ..Refusal::new(reason, advice) }
    }

    /// Another side has said that it has been promoted.
    pub(crate) fn superseded() -> Self {
        Self::stale(
            "the other side has been promoted: it is the disk now".to_owned(),
            "stop this side, and start it as the other's secondary: brep secondary, with the same \
             disks and state directory",
        )
    }

    /// Both have what the other lacks.
    pub(super) fn split_brain(what: String, me: &Side, peer: &Side) -> Self {
        let name = &peer.name;
        let keep_theirs = "stop this side, and start it with brep secondary --discard-local and the \
                           same disks and state directory (with --dry-run it only says what would \
                           be lost)";
        let was_primary = peer.primary || peer.maps.is_some();
        let advice = match was_primary {
            true => format!(
                "to keep the writes of {name}: {keep_theirs}; to keep this side's: the same on {name}"
            ),
            false => format!(
                "to keep the checkpoint of {name}: brep failover there, then {keep_theirs}; to keep \
                 this side's writes: brep resync --discard-local on {name}, then brep resync --full \
                 here"
            ),
        };
        Refusal {
            superseded: true,
            kind: RefusalKind::SplitBrain,
            ..Refusal::new(format!("split brain: {what}{}", amounts(me, peer)), &advice)
        }
    }

    /// Whether both sides have something that the other lacks.
    pub(crate) fn has_differences(&self) -> bool {
        self.kind != RefusalKind::Other
    }
}

/// How much each side has that the other lacks.
pub(super) fn amounts(me: &Side, peer: &Side) -> String {
    let bytes = |side: &Side| match &side.maps {
        Some(maps) => {
            // The peer's may be any numbers.
            let bytes = maps.bytes.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
            format!("at most {}", size_text(bytes))
        }
        None => "an unknown amount".to_owned(),
    };
    // By their names: both sides show it.
    let (mine, theirs) = (&me.name, &peer.name);
    format!(
        "; written on {mine} and lacking on {theirs}: {}; written on {theirs} and lacking on \
         {mine}: {}",
        bytes(me),
        bytes(peer)
    )
}
