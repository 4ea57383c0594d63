use std::sync::atomic::{AtomicU64, Ordering};

/// The payload bytes that all connections of a server hold together.
///
/// A connection may hold at most as much as is free. So however many connections hold all they
/// can, some is left for one more; and a connection never waits for another: it is let in again
/// when something of its own has ended, and always while it holds nothing.
#[derive(Debug)]
pub(super) struct Budget {
    max: u64,
    used: AtomicU64,
}

impl Budget {
    pub(super) fn new(max: u64) -> Self {
        Budget { max, used: AtomicU64::new(0) }
    }

    pub(super) fn free(&self) -> u64 {
        self.max.saturating_sub(self.used.load(Ordering::Relaxed))
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A holder goes from `old` to `new` bytes.
    pub(super) fn settle(&self, old: u64, new: u64) {
        if new >= old {
            self.used.fetch_add(new - old, Ordering::Relaxed);
        } else {
            self.used.fetch_sub(old - new, Ordering::Relaxed);
        }
    }
}
