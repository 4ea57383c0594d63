//! What many histories have to have had: each of these, or they have not been what they are for.

use std::collections::BTreeMap;

/// Histories from which on nothing may be missing.
pub(crate) const HISTORIES_MIN: u64 = 1000;

macro_rules! seen {
    ($($variant:ident = $name:literal,)*) => {
        /// A kind of fault, a command of an operator, a change of state.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Seen {
            $($variant,)*
        }

        impl Seen {
            /// All of them.
            pub(crate) const ALL: &[Seen] = &[$(Seen::$variant,)*];

            /// As the summary calls it.
            pub(crate) fn name(self) -> &'static str {
                match self {
                    $(Seen::$variant => $name,)*
                }
            }
        }
    };
}

seen! {
    LinkCut = "fault: link cut",
    LinkDown = "fault: link down",
    OneWayLoss = "fault: one-way loss",
    SlowLink = "fault: slow link",
    Kill = "fault: kill",
    KillInOperation = "fault: kill in an operation",
    PowerLoss = "fault: power loss",
    PowerLossInOperation = "fault: power loss in an operation",
    FailingDisk = "fault: failing disk",
    HangingDisk = "fault: hanging disk",
    FullDisk = "fault: full disk",
    IoError = "fault: I/O error",
    NoSpace = "fault: no space",
    EndInMerge = "fault: kill or power loss in a merge",
    FileWhole = "power: file kept whole",
    FileAsFlushed = "power: file as it was flushed",
    FileTorn = "power: file torn",
    NameKept = "power: name kept",
    NameLost = "power: name lost",
    CheckpointOnPrimary = "command: checkpoint on the primary",
    CheckpointOnSecondary = "command: checkpoint on the secondary",
    CleanStopOfPrimary = "command: clean stop of the primary",
    CleanStopOfSecondary = "command: clean stop of the secondary",
    StopAndStart = "command: stop and start of replication",
    ResyncFull = "command: resync --full",
    ResyncCompare = "command: resync --compare",
    ResyncRate = "command: resync --rate",
    DiscardCheckpoint = "command: stop --discard-checkpoint",
    StopAndContGuest = "command: stop and cont",
    Yank = "command: yank",
    PeerClear = "command: peer clear",
    PeerSet = "command: peer set",
    Resize = "command: resize",
    ResumeLonely = "command: resume --lonely",
    Switchover = "command: switchover",
    FailoverToCheckpoint = "command: failover --to checkpoint",
    FailoverToLatest = "command: failover --to latest",
    SwitchedOver = "roles: switched over",
    PromotedToCheckpoint = "roles: promoted to the checkpoint",
    PromotedToLatest = "roles: promoted to latest",
    Returned = "roles: the old primary returns as a secondary",
    SecondPromotion = "roles: a second promotion",
    FailoverHeld = "command: failover --hold",
    FailoverCommitted = "command: failover --commit",
    FailoverRolledBack = "command: failover --rollback",
    PromotedAgain = "roles: promoted again to the same after a rollback",
    EndHeld = "fault: kill or power loss while a failover is held",
    TestView = "command: failover --test",
    TestViewChecked = "test view: read, written to, and read again",
    TestViewMoved = "test view: still what it was after the next checkpoint",
    FailingChild = "fault: failing child of a quorum",
    LyingChild = "fault: lying child of a quorum",
    ChildOutvoted = "quorum: a child was outvoted",
    ChildFailed = "quorum: a child failed",
    DiskAdded = "command: disk add",
    DiskRemoved = "command: disk remove",
    PromotedWithAdded = "roles: promoted with a disk that was added",
    CheckpointWithout = "checkpoint without a disk that joins",
    LeftOut = "roles: a disk that was being added is left out",
    MixedSides = "setup: sides with different options",
    SecondGuestRead = "secondary's guest: read",
    SecondGuestWrote = "secondary's guest: wrote",
    SecondGuestMoved = "secondary's guest: what it wrote was dropped by a checkpoint",
    SecondGuestLost = "secondary's guest: what it wrote was lost with the power",
    SecondGuestKept = "roles: promoted with what the secondary's guest wrote",
    SecondaryInSyncToSecondaryDisconnected = "state: secondary in-sync -> secondary disconnected",
    PrimaryInSyncToPrimaryDisconnected = "state: primary in-sync -> primary disconnected",
    PrimaryDisconnectedToPrimaryInSync = "state: primary disconnected -> primary in-sync",
    SecondaryDisconnectedToSecondaryInSync = "state: secondary disconnected -> secondary in-sync",
    SecondaryDisconnectedToSecondaryResyncing = "state: secondary disconnected -> secondary resyncing",
    SecondaryResyncingToSecondaryInSync = "state: secondary resyncing -> secondary in-sync",
    PrimaryDisconnectedToPrimaryResyncing = "state: primary disconnected -> primary resyncing",
    PrimaryResyncingToPrimaryInSync = "state: primary resyncing -> primary in-sync",
    SecondaryResyncingToSecondaryDisconnected = "state: secondary resyncing -> secondary disconnected",
    PrimaryResyncingToPrimaryDisconnected = "state: primary resyncing -> primary disconnected",
    SecondaryDisconnectedToPrimaryPromoted = "state: secondary disconnected -> primary promoted",
    PrimaryInSyncToPrimaryFailed = "state: primary in-sync -> primary failed",
    PrimaryDisconnectedToSecondaryDisconnected = "state: primary disconnected -> secondary disconnected",
    PrimaryPromotedToPrimaryInSync = "state: primary promoted -> primary in-sync",
    SecondaryInconsistentToSecondaryResyncing = "state: secondary inconsistent -> secondary resyncing",
    PrimaryFailedToPrimaryDisconnected = "state: primary failed -> primary disconnected",
    SecondaryDisconnectedToSecondaryOutdated = "state: secondary disconnected -> secondary outdated",
    PrimaryInSyncToSecondaryDisconnected = "state: primary in-sync -> secondary disconnected",
    SecondaryInSyncToPrimaryPromoted = "state: secondary in-sync -> primary promoted",
    SecondaryOutdatedToSecondaryResyncing = "state: secondary outdated -> secondary resyncing",
    SecondaryDisconnectedToSecondaryInconsistent = "state: secondary disconnected -> secondary inconsistent",
    SecondaryOutdatedToSecondaryInSync = "state: secondary outdated -> secondary in-sync",
    SecondaryResyncingToSecondaryInconsistent = "state: secondary resyncing -> secondary inconsistent",
    SecondaryInconsistentToSecondaryInSync = "state: secondary inconsistent -> secondary in-sync",
    PrimaryFailedToPrimaryInSync = "state: primary failed -> primary in-sync",
    PrimaryInSyncToPrimaryResyncing = "state: primary in-sync -> primary resyncing",
    PrimaryInSyncToSecondaryInSync = "state: primary in-sync -> secondary in-sync",
    PrimaryPromotedToPrimaryResyncing = "state: primary promoted -> primary resyncing",
    PrimaryPromotingToPrimaryPromoted = "state: primary promoting -> primary promoted",
    SecondaryDisconnectedToPrimaryPromoting = "state: secondary disconnected -> primary promoting",
    EndHealed = "end: healed and compared",
    EndPromoted = "end: promoted and merged",
}

/// What is missing among counts.
pub(crate) fn missing(counts: &BTreeMap<String, u64>) -> Vec<&'static str> {
    let names = Seen::ALL.iter().map(|seen| seen.name());
    names.filter(|name| !counts.contains_key(*name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_seen_is_told() {
        let mut counts: BTreeMap<String, u64> =
            Seen::ALL.iter().map(|seen| (seen.name().to_owned(), 1)).collect();
        assert!(missing(&counts).is_empty());
        counts.remove(Seen::PowerLoss.name());
        assert_eq!(missing(&counts), ["fault: power loss"]);
    }
}
