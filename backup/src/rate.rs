use std::time::Duration;

/// The time within which a quota counts.
const SLICE: Duration = Duration::from_millis(100);

/// Decides when the next background copy may begin (spec: backup, rate limit). Has no clock:
/// times are given as durations since any fixed moment.
#[derive(Debug, Default)]
pub(crate) struct RateLimit {
    slice_start: Duration,
    /// What had been copied when the slice began.
    base_bytes: u64,
}

impl RateLimit {
    /// How long the next copy has to wait, when `total_bytes` have been copied so far, by the
    /// guest's requests too, and `speed` bytes per second are allowed (0: any number).
    pub(crate) fn delay(&mut self, now: Duration, total_bytes: u64, speed: u64) -> Duration {
        let elapsed = now.saturating_sub(self.slice_start);
        let dispatched = total_bytes.saturating_sub(self.base_bytes);
        let due = if speed == 0 { Duration::ZERO } else { due(dispatched, speed) };
        if due > elapsed {
            return due - elapsed;
        }
        if elapsed >= SLICE {
            self.slice_start = now;
            self.base_bytes = total_bytes;
        }
        Duration::ZERO
    }
}

impl RateLimit {
    /// Bytes that may be dispatched in a slice, at least 1.
    pub(crate) fn quota_bytes(speed: u64) -> u64 {
        (speed / (1000 / SLICE.as_millis() as u64)).max(1)
    }
}

/// When a slice is over in which so much was dispatched. Below the quota that does not matter.
fn due(dispatched: u64, speed: u64) -> Duration {
    let quota = speed as f64 * SLICE.as_secs_f64();
    let slices = dispatched as f64 / quota.max(1.0);
    // A day is as good as for ever; a change of the speed wakes the sleeper.
    if slices < 1.0 { Duration::ZERO } else { SLICE.mul_f64(slices.min(864_000.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn no_limit_never_waits() {
        let mut limit = RateLimit::default();
        assert_eq!(limit.delay(ms(0), u64::MAX, 0), ms(0));
    }

    #[test]
    fn a_used_up_quota_waits_in_proportion() {
        let mut limit = RateLimit::default();
        // A quota of 100 bytes per slice.
        assert_eq!(limit.delay(ms(0), 0, 1000), ms(0));
        assert_eq!(limit.delay(ms(10), 99, 1000), ms(0), "below the quota");
        assert_eq!(limit.delay(ms(10), 100, 1000), ms(90));
        assert_eq!(limit.delay(ms(10), 250, 1000), ms(240));
        assert_eq!(limit.delay(ms(250), 250, 1000), ms(0));
        assert_eq!(limit.delay(ms(250), 350, 1000), ms(100), "a new slice");
    }

    #[test]
    fn what_was_not_used_in_a_slice_is_not_saved() {
        let mut limit = RateLimit::default();
        assert_eq!(limit.delay(ms(5000), 0, 1000), ms(0));
        assert_eq!(limit.delay(ms(5000), 200, 1000), ms(200));
    }
}
