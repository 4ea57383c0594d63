//! Bugs that a simulator plants, to see that it finds them. No release has this.

use std::cell::Cell;

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// A unit is overwritten without its pre-image.
    PreImageSkipped,
    /// A buffer's mapping is written before its data.
    MappingBeforeData,
    /// Buffers are retired before the record of a commit.
    BuffersDroppedEarly,
    /// A write is not marked in the dirty maps.
    BitForgotten,
    /// What was in flight when the peer was lost counts as equal.
    BitClearedEarly,
    /// What a secondary has is taken for that of the last session, whatever has become of it since.
    StaleGenerationAccepted,
    /// A new session does not wait for the writes of the one before.
    LateWriteApplied,
    /// A failed write of the secondary counts as done.
    ErrorLost,
}

impl Plant {
    /// All of them, by the names that people type.
    pub const ALL: [(&str, Plant); 8] = [
        ("pre-image-skipped", Plant::PreImageSkipped),
        ("mapping-before-data", Plant::MappingBeforeData),
        ("buffers-dropped-early", Plant::BuffersDroppedEarly),
        ("bit-forgotten", Plant::BitForgotten),
        ("bit-cleared-early", Plant::BitClearedEarly),
        ("stale-generation-accepted", Plant::StaleGenerationAccepted),
        ("late-write-applied", Plant::LateWriteApplied),
        ("error-lost", Plant::ErrorLost),
    ];
}

thread_local! {
    static PLANTED: Cell<Option<Plant>> = const { Cell::new(None) };
}

/// From now on this thread has this bug, or none.
pub fn install(plant: Option<Plant>) {
    PLANTED.set(plant);
}

/// Whether this thread has this bug.
#[must_use]
pub fn is(plant: Plant) -> bool {
    PLANTED.get() == Some(plant)
}
