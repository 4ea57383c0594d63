use std::fmt;

use serde::{Deserialize, Serialize};

/// The number of an epoch: the writes between two checkpoints. Grows, across all lines of
/// writes, and never repeats.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// No session begins beyond this, which nobody ever gets to: a peer that names such a number
    /// would leave none to go on with, and nobody could replicate any more.
    pub const MAX: Epoch = Epoch(1 << 62);

    /// The one that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Epoch(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A line of writes (`cur`): everything that one primary wrote while it was the only one that
/// could. A new one begins with every promotion, and when a primary goes on without its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub uuid::Uuid);

impl Generation {
    /// One that nobody has used.
    #[must_use]
    pub fn random() -> Self {
        Generation(crate::random::uuid())
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight digits tell a handful of lines apart; records and messages carry all of them.
        f.write_str(&self.0.simple().to_string()[..8])
    }
}

/// The identity of a set of disks that belong together, equal on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SetId(pub uuid::Uuid);

impl SetId {
    /// One that nobody has used.
    #[must_use]
    pub fn random() -> Self {
        SetId(crate::random::uuid())
    }
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.simple().to_string()[..8])
    }
}

/// A committed checkpoint: the state of all disks after the writes of every epoch of the line up
/// to this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The line of writes.
    pub cur: Generation,
    /// The last epoch that is contained.
    pub epoch: Epoch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_epoch_has_no_successor() {
        assert_eq!(Epoch(u64::MAX).next(), Epoch(u64::MAX));
    }
}
