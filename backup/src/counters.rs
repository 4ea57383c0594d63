use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use brep_block::Error;

use crate::options::CbwStats;

/// Figures of a filter; they order nothing, so relaxed accesses do.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    copied_units: AtomicU64,
    written_bytes: AtomicU64,
    zero_bytes: AtomicU64,
    failures: AtomicU64,
    last_error: Mutex<Option<Error>>,
}

impl Counters {
    pub(crate) fn copied(&self, units: u64) {
        self.copied_units.fetch_add(units, Relaxed);
    }

    pub(crate) fn wrote_data(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn wrote_zeroes(&self, bytes: u64) {
        self.zero_bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn failed(&self, error: &Error) {
        self.failures.fetch_add(1, Relaxed);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
    }

    pub(crate) fn stats(&self) -> CbwStats {
        let written_bytes = self.written_bytes.load(Relaxed);
        let zero_bytes = self.zero_bytes.load(Relaxed);
        CbwStats {
            copied_units: self.copied_units.load(Relaxed),
            copied_bytes: written_bytes + zero_bytes,
            written_bytes,
            zero_bytes,
            failures: self.failures.load(Relaxed),
            last_error: self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
