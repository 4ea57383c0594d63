use std::time::Duration;

use brep_block::{BlockDevice, Error, FlushLevel};

/// What to do when a pre-image cannot be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnCopyError {
    /// The guest's request fails with the error; the source stays as it is, and the units are
    /// still to be copied (`break-guest-write`).
    #[default]
    BreakGuestWrite,
    /// The guest's request goes on; the snapshot is lost, and its readers get an error from then
    /// on, until the next checkpoint (`break-snapshot`).
    BreakSnapshot,
}

/// What counts as copied already when the filter is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Copied {
    /// Nothing: the target is empty.
    #[default]
    Nothing,
    /// Every range that the target's block status shows as `allocated`: the target was in use
    /// before a restart. The target is asked when a unit is met for the first time, and an
    /// allocated range is never written again. Holds until the first switch or checkpoint.
    AllocatedInTarget,
}

/// How a [`CopyBeforeWrite`](crate::CopyBeforeWrite) filter works.
#[derive(Debug, Clone)]
pub struct CbwOptions {
    /// The name under which errors speak of the filter.
    pub name: String,
    /// Bytes that are copied together: a power of two, at least 512, a multiple of the block
    /// sizes of both devices, and of the granularity at which the target allocates (else the
    /// target would invent the rest of an allocation).
    pub unit_bytes: u64,
    /// What counts as copied at the start.
    pub assume: Copied,
    /// A discard is carried out as a write of zeroes that may unmap, so that replicas stay equal
    /// byte for byte.
    pub discard_as_zeroes: bool,
    /// What a failed copy breaks.
    pub on_copy_error: OnCopyError,
    /// How safe a pre-image has to be before the source is overwritten. [`FlushLevel::Process`]:
    /// a killed process finds every pre-image whose original it has overwritten.
    /// [`FlushLevel::Durable`]: so does a machine that has lost its power, if the target can
    /// [stage](brep_block::Staging) or has no mapping. `None`: only as long as the process lives.
    pub barrier: Option<FlushLevel>,
    /// How long a guest's request waits for its copy at most, the wait for requests before it
    /// included (`cbw-timeout`); then [`on_copy_error`](Self::on_copy_error) says what breaks.
    /// The copy itself goes on. `None`: as long as it takes. Needs a runtime with a clock.
    pub copy_timeout: Option<Duration>,
    /// How many bytes to copy ahead of changes that follow each other, in the background; 0: none.
    /// Worth it where a copy waits long, as with a barrier of [`FlushLevel::Durable`]. At most as
    /// much is copied for nothing as was changed.
    pub ahead_bytes: u64,
}

impl CbwOptions {
    /// Unit 64 KiB, an empty target, discards as discards, a failed copy fails the guest's
    /// request, and pre-images survive the end of the process.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        CbwOptions {
            name: name.into(),
            unit_bytes: 64 << 10,
            assume: Copied::Nothing,
            discard_as_zeroes: false,
            on_copy_error: OnCopyError::BreakGuestWrite,
            barrier: Some(FlushLevel::Process),
            copy_timeout: None,
            ahead_bytes: 0,
        }
    }

    /// The same with the unit that `target` likes best, which for a format with sub-clusters is
    /// a sub-cluster: nothing is copied that need not be.
    #[must_use]
    pub fn unit_of(self, target: &dyn BlockDevice) -> Self {
        let limits = target.limits();
        self.unit_bytes(u64::from(limits.preferred_size.max(limits.block_size)).max(512))
    }

    /// The same with another unit.
    #[must_use]
    pub fn unit_bytes(mut self, unit_bytes: u64) -> Self {
        self.unit_bytes = unit_bytes;
        self
    }
}

/// What a filter has done since it was made.
#[derive(Debug, Clone, Default)]
pub struct CbwStats {
    /// Units copied, the short last one included.
    pub copied_units: u64,
    /// Bytes of the source that were copied, as data or as zeroes.
    pub copied_bytes: u64,
    /// Bytes written to the target as data.
    pub written_bytes: u64,
    /// Bytes that were found to be zero and became writes of zeroes.
    pub zero_bytes: u64,
    /// Copies that failed.
    pub failures: u64,
    /// The latest of these failures.
    pub last_error: Option<Error>,
}
