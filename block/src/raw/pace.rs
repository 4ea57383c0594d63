//! Whether writes into the page cache have to wait.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What only copies is done sooner by far, even where processors are scarce.
const SLOW: Duration = Duration::from_millis(50);
/// How long writes are expected to wait after one that has.
const CAUTION: Duration = Duration::from_secs(2);

/// A kernel that has too much to write back makes those wait that write more, and so does a file system
/// that has to read something first. It does not say so beforehand; but where one write has waited the
/// next ones will.
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    /// Until when, in milliseconds from `since`; 0: no write has waited.
    caution_until_ms: AtomicU64,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Pace { since: now, caution_until_ms: AtomicU64::new(0) }
    }

    /// Whether a write is likely to wait.
    pub(super) fn is_slow(&self, now: impl FnOnce() -> Instant) -> bool {
        let until = self.caution_until_ms.load(Ordering::Relaxed);
        until > 0 && self.ms(now()) < until
    }

    /// A write that began at `started` has ended.
    pub(super) fn note(&self, started: Instant, now: Instant) {
        if now.duration_since(started) >= SLOW {
            self.caution_until_ms.fetch_max(self.ms(now + CAUTION), Ordering::Relaxed);
        }
    }

    fn ms(&self, at: Instant) -> u64 {
        u64::try_from(at.duration_since(self.since).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{BlockDevice, Io, RawFile, RawFileOptions, WriteFlags};

    #[test]
    fn after_a_write_that_waited_the_next_ones_are_expected_to_wait_for_a_while() {
        let begin = Instant::now();
        let pace = Pace::new(begin);
        pace.note(begin, begin + Duration::from_millis(1));
        assert!(!pace.is_slow(|| panic!("as long as none has waited no clock is read")));
        let at = begin + Duration::from_secs(5);
        pace.note(at - SLOW, at);
        assert!(pace.is_slow(|| at));
        assert!(pace.is_slow(|| at + Duration::from_millis(1900)));
        assert!(!pace.is_slow(|| at + Duration::from_millis(2100)));
    }

    #[tokio::test]
    async fn a_write_that_is_likely_to_wait_leaves_the_thread_to_others() {
        let directory = tempfile::tempdir().unwrap();
        let options = RawFileOptions { create: Some(1 << 20), ..RawFileOptions::default() };
        let file = RawFile::open(directory.path().join("disk"), options).unwrap();
        let write = || file.write(4096, Bytes::from_static(b"data"), WriteFlags::default());
        assert!(matches!(write(), Io::Ready(Ok(()))));
        let now = Instant::now();
        file.core.pace.note(now, now + Duration::from_secs(3600));
        let later = write();
        assert!(matches!(later, Io::Pending(_)));
        later.await.unwrap();
        assert_eq!(file.read(4096, 4).await.unwrap(), b"data"[..]);
    }
}
