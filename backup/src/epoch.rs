use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{BlockDevice, Result};

use crate::options::Copied;
use crate::unit_set::UnitSet;

/// Beyond this many leaves a set is dropped by another thread (about 1 ms of freeing).
const INLINE_DROP_LEAVES_MAX: usize = 8192;

/// The size of a unit, as a shift.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    shift: u32,
}

impl Unit {
    /// `bytes` must be a power of two.
    pub(crate) fn new(bytes: u64) -> Self {
        Unit { shift: bytes.trailing_zeros() }
    }

    pub(crate) fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The units that a range of bytes, not empty, touches.
    pub(crate) fn covering(self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start >> self.shift..((bytes.end - 1) >> self.shift) + 1
    }

    /// The bytes of some units, limited to the device: the last unit may be short.
    pub(crate) fn bytes_of(self, units: &Range<u64>, size: u64) -> Range<u64> {
        units.start << self.shift..units.end.saturating_mul(self.bytes()).min(size)
    }
}

/// The time between two checkpoints: where its pre-images go and which are there.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) target: Arc<dyn BlockDevice>,
    pub(crate) unit: Unit,
    /// What need not be copied any more: it is in the target, or excluded.
    copied: Mutex<UnitSet>,
    /// What is never copied because nobody asked for it: it is not in the target.
    excluded: Mutex<UnitSet>,
    assume: Copied,
    broken: AtomicBool,
}

/// Where the content of the last checkpoint is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Target,
    /// Nowhere: it was not to be kept.
    Excluded,
}

impl Epoch {
    pub(crate) fn new(target: Arc<dyn BlockDevice>, unit: Unit, assume: Copied) -> Self {
        Epoch {
            target,
            unit,
            copied: Mutex::default(),
            excluded: Mutex::default(),
            assume,
            broken: AtomicBool::new(false),
        }
    }

    /// Whether every unit is known to be copied. "Yes" stays true until the epoch ends.
    pub(crate) fn holds(&self, units: &Range<u64>) -> bool {
        self.set().contains_all(units.clone())
    }

    pub(crate) fn status(&self, units: Range<u64>) -> (bool, u64) {
        self.set().status(units)
    }

    pub(crate) fn mark(&self, units: &Range<u64>) {
        self.set().insert(units.clone());
    }

    /// Takes out of some units what has not been copied yet: from now on it is not kept. Returns
    /// how many units that are.
    pub(crate) fn exclude(&self, units: Range<u64>) -> u64 {
        let (mut copied, mut excluded) = (self.set(), lock(&self.excluded));
        let (mut at, mut count) = (units.start, 0);
        while at < units.end {
            let (member, len) = copied.status(at..units.end);
            if !member {
                copied.insert(at..at + len);
                excluded.insert(at..at + len);
                count += len;
            }
            at += len;
        }
        count
    }

    /// What is to be kept of the first `count` units; without what is copied, if that counts.
    pub(crate) fn missing(&self, count: u64, copied_counts: bool) -> Vec<Range<u64>> {
        let set = lock(if copied_counts { &self.copied } else { &self.excluded });
        let (mut at, mut missing) = (0, Vec::new());
        while at < count {
            let (member, len) = set.status(at..count);
            if !member {
                missing.push(at..at + len);
            }
            at += len;
        }
        missing
    }

    /// The source was changed without a copy: the last checkpoint is lost.
    pub(crate) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Where the first bytes of the range are to be read from, and how many bytes that holds
    /// for. To be called under a lock on the range.
    pub(crate) async fn locate(&self, bytes: &Range<u64>, size: u64) -> Result<(Side, u64)> {
        let unit = self.unit;
        let units = unit.covering(bytes);
        let (copied, count) = self.status(units.clone());
        let run = unit.bytes_of(&(units.start..units.start + count), size);
        let len = run.end.min(bytes.end) - bytes.start;
        if copied {
            return Ok(self.locate_copied(bytes, bytes.start + len, size));
        }
        match self.assume {
            Copied::Nothing => Ok((Side::Source, len)),
            Copied::AllocatedInTarget => {
                let status = self.target.block_status(bytes.start, len).await?;
                let side = if status.flags.allocated { Side::Target } else { Side::Source };
                // A device that breaks its promise must not make us loop or run over the end.
                Ok((side, status.len.clamp(1, len)))
            }
        }
    }

    fn locate_copied(&self, bytes: &Range<u64>, end: u64, size: u64) -> (Side, u64) {
        let unit = self.unit;
        let units = unit.covering(&(bytes.start..end));
        let (excluded, count) = lock(&self.excluded).status(units.clone());
        let run = unit.bytes_of(&(units.start..units.start + count), size);
        let side = if excluded { Side::Excluded } else { Side::Target };
        (side, run.end.min(end) - bytes.start)
    }

    pub(crate) fn assumes_nothing(&self) -> bool {
        self.assume == Copied::Nothing
    }

    fn set(&self) -> MutexGuard<'_, UnitSet> {
        lock(&self.copied)
    }
}

fn lock(set: &Mutex<UnitSet>) -> MutexGuard<'_, UnitSet> {
    // A set is consistent whenever its lock is released, by a panic too.
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Epoch {
    fn drop(&mut self) {
        let set = std::mem::take(self.copied.get_mut().unwrap_or_else(PoisonError::into_inner));
        if set.leaf_count() > INLINE_DROP_LEAVES_MAX
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            // A checkpoint must not cost what the epoch wrote.
            drop(runtime.spawn_blocking(move || drop(set)));
        }
    }
}
