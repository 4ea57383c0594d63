use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::status::ErrorStatus;

/// Failures kept for `query-status` and `get_error`.
const ERRORS_MAX: usize = 32;

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    since_1970().map_or(0, |d| d.as_secs())
}

/// The wall clock; none if it stands before 1970. In a simulation it stands still.
pub(crate) fn since_1970() -> Option<Duration> {
    #[cfg(feature = "simulation")]
    if crate::simulation::is_installed() {
        return Some(Duration::ZERO);
    }
    SystemTime::now().duration_since(UNIX_EPOCH).ok()
}

/// The failures that no guest was told of. Repetitions are counted, not listed.
#[derive(Debug, Default)]
pub(crate) struct ErrorLog {
    list: Mutex<VecDeque<ErrorStatus>>,
    /// What get_error tells: the last failure since everything was in order.
    latched: Mutex<Option<String>>,
}

impl ErrorLog {
    /// Adds a failure of a device operation; returns the entry as it now stands.
    pub(crate) fn add(&self, disk: &str, error: &brep_block::Error) -> ErrorStatus {
        let now_s = now_s();
        let new = ErrorStatus {
            disk: disk.to_owned(),
            operation: error.operation().to_string(),
            offset: error.offset(),
            length: error.length(),
            errno: error.errno(),
            message: error.to_string(),
            count: 1,
            first_s: now_s,
            last_s: now_s,
        };
        self.latch(&new.message);
        let mut log = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let same = log.iter().position(|e| {
            e.disk == new.disk && e.operation == new.operation && e.errno == new.errno
        });
        let entry = match same.and_then(|i| log.remove(i)) {
            // The newest place of a failure that repeats is the one to look at.
            Some(old) => ErrorStatus { count: old.count + 1, first_s: old.first_s, ..new },
            None => new,
        };
        if log.len() == ERRORS_MAX {
            log.pop_front();
        }
        log.push_back(entry.clone());
        entry
    }

    pub(crate) fn list(&self) -> Vec<ErrorStatus> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Something has failed that get_error has to tell.
    pub(crate) fn latch(&self, message: &str) {
        *self.latched.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(format!("I/O error occurred: {message}"));
    }

    /// Everything is in order: started, committed, or merged.
    pub(crate) fn clear_latch(&self) {
        self.latched.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The text of get_error, if something has failed.
    pub(crate) fn latched(&self) -> Option<String> {
        self.latched.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use brep_block::{Error, ErrorKind, Operation};

    use super::*;

    #[test]
    fn repetitions_are_counted_and_the_log_is_bounded() {
        let log = ErrorLog::default();
        for disk in 0..100 {
            let error = Error::new(Operation::Write, ErrorKind::NoSpace, "n", "full").at(disk, 1);
            log.add(&format!("vd{disk}"), &error);
            log.add(&format!("vd{disk}"), &error);
        }
        let list = log.list();
        assert_eq!(list.len(), ERRORS_MAX);
        let last = list.last().unwrap();
        assert_eq!((last.disk.as_str(), last.count, last.errno), ("vd99", 2, 28));
    }
}
