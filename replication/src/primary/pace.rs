//! How fast a resync goes: no I/O and no clock here, time is an argument.

use std::time::Duration;

use tokio::time::Instant;

use crate::config::ResyncLimits;

/// However slow the guest has become, a resync goes on at this speed: it has to end some time.
const RATE_MIN: f64 = (1 << 20) as f64;

/// The copy is looked at so often.
const WINDOW: Duration = Duration::from_millis(250);

/// The copy pauses so often for a look at the guest without it, at most so long.
const PROBE_PAUSE: Duration = Duration::from_secs(10);
const PROBE_MAX: Duration = Duration::from_millis(500);

/// What the copy had on its way when it paused does not count.
const SETTLE: Duration = Duration::from_millis(100);

/// Writes of the guest that a judgement needs, and that are remembered.
const SAMPLES_MIN: usize = 8;
const SAMPLES_MAX: usize = 512;

/// A guest's write is not called slow below this, whatever the factor.
const LATENCY_MIN: Duration = Duration::from_micros(50);

/// Decides when the next piece of a copy may go.
///
/// A fixed limit is a fixed limit. With a latency factor the copy pauses now and then to see how
/// long the guest's writes take without it, and between these probes goes slower when their median
/// is longer than that times the factor, and faster again when it is not.
#[derive(Debug)]
pub(super) struct Pace {
    limits: ResyncLimits,
    /// Bytes a second that the guest's latency allows.
    allowed: f64,
    phase: Phase,
    /// When the phase, or its last window, began.
    since: Option<Instant>,
    probed: Option<Instant>,
    /// The median without the copy.
    alone: Option<Duration>,
    samples: Vec<Duration>,
    /// Bytes that went in this window.
    gone: u64,
    /// When the next piece may go.
    free_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Probing,
    Copying,
}

/// Whether a piece may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Now,
    /// To be asked again then.
    At(Instant),
}

impl Pace {
    pub(super) fn new(limits: ResyncLimits) -> Self {
        Pace {
            limits,
            allowed: f64::INFINITY,
            phase: Phase::Probing,
            since: None,
            probed: None,
            alone: None,
            samples: Vec::new(),
            gone: 0,
            free_at: None,
        }
    }

    pub(super) fn limits(&self) -> ResyncLimits {
        self.limits
    }

    /// Other limits, from now on.
    pub(super) fn set_limits(&mut self, limits: ResyncLimits) {
        *self = Pace::new(limits);
    }

    /// Whether the guest's latencies are wanted.
    pub(super) fn is_adaptive(&self) -> bool {
        self.limits.latency_factor.is_some()
    }

    /// Bytes a second that may go now; none: as fast as it can.
    pub(super) fn rate(&self) -> Option<u64> {
        let rate = self.limits.rate.map_or(f64::INFINITY, |rate| rate as f64).min(self.allowed);
        // At most the fixed limit, or what was measured.
        rate.is_finite().then_some(rate.max(1.0) as u64)
    }

    /// A write of the guest has ended, at `now`, and took so long.
    pub(super) fn sample(&mut self, now: Instant, latency: Duration) {
        let settling = self.phase == Phase::Probing
            && self.since.is_some_and(|since| now.saturating_duration_since(since) < SETTLE);
        if self.samples.len() < SAMPLES_MAX && !settling {
            self.samples.push(latency);
        }
    }

    /// Asks for a turn of so many bytes; they count as gone if it is now.
    pub(super) fn turn(&mut self, now: Instant, bytes: u64) -> Turn {
        if let Some(factor) = self.limits.latency_factor
            && let Some(time) = self.adapt(now, factor)
        {
            return Turn::At(time);
        }
        if let Some(time) = self.free_at.filter(|time| *time > now) {
            return Turn::At(time);
        }
        self.gone += bytes;
        self.free_at = self.rate().map(|rate| {
            let from = self.free_at.unwrap_or(now).max(now.checked_sub(WINDOW / 8).unwrap_or(now));
            from + Duration::from_secs_f64(bytes as f64 / rate as f64)
        });
        Turn::Now
    }

    /// Judges phases and windows that have ended. Returns until when the copy pauses.
    fn adapt(&mut self, now: Instant, factor: f64) -> Option<Instant> {
        let since = *self.since.get_or_insert(now);
        let elapsed = now.saturating_duration_since(since);
        if self.phase == Phase::Probing {
            if elapsed < PROBE_MAX && self.samples.len() < 2 * SAMPLES_MIN {
                // Soon, so that a busy guest is not looked at for longer than needed.
                return Some((now + SETTLE / 2).min(since + PROBE_MAX));
            }
            self.alone = self.median().map(|median| median.max(LATENCY_MIN)).or(self.alone);
            self.probed = Some(now);
            self.begin(Phase::Copying, now);
            return None;
        }
        if elapsed < WINDOW {
            return None;
        }
        let went = self.gone as f64 / elapsed.as_secs_f64();
        match (self.median(), self.alone) {
            (Some(_), None) => {
                // The guest has begun to write: how long does it take without the copy?
                self.begin(Phase::Probing, now);
                return Some(now + SETTLE);
            }
            (Some(median), Some(alone)) if median > alone.mul_f64(factor) => {
                self.allowed = (self.allowed.min(went) * 0.7).max(RATE_MIN);
            }
            (Some(_), Some(_)) => self.allowed = self.allowed * 1.1 + RATE_MIN,
            // Nobody is disturbed.
            (None, _) => self.allowed *= 2.0,
        }
        if self.allowed > 16.0 * went.max(RATE_MIN) {
            self.allowed = f64::INFINITY;
        }
        let is_busy = self.samples.len() >= SAMPLES_MIN;
        let is_due = self.probed.is_none_or(|probed| now >= probed + PROBE_PAUSE);
        if is_busy && is_due {
            self.begin(Phase::Probing, now);
            return Some(now + SETTLE);
        }
        self.begin(Phase::Copying, now);
        None
    }

    fn begin(&mut self, phase: Phase, now: Instant) {
        self.phase = phase;
        self.since = Some(now);
        self.samples.clear();
        self.gone = 0;
    }

    /// The median of the guest's writes, if there were enough.
    fn median(&mut self) -> Option<Duration> {
        if self.samples.len() < SAMPLES_MIN {
            return None;
        }
        let middle = self.samples.len() / 2;
        Some(*self.samples.select_nth_unstable(middle).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 1 << 20;

    /// A copy against a guest whose writes take `latency(rate of the copy)`, one after the other.
    /// Returns the bytes that went in each second, and the guest's median of each.
    fn play(
        pace: &mut Pace,
        seconds: usize,
        latency: impl Fn(f64) -> Option<Duration>,
    ) -> Vec<(u64, Duration)> {
        let start = Instant::now();
        let (mut now, mut guest_at) = (start, start);
        let mut result = Vec::new();
        let mut recent = std::collections::VecDeque::new();
        for second in 0..seconds {
            let end = start + Duration::from_secs(second as u64 + 1);
            let (mut gone, mut latencies) = (0, Vec::new());
            while now < end {
                match pace.turn(now, PIECE) {
                    Turn::Now => {
                        gone += PIECE;
                        recent.push_back(now);
                        // What the disks can do: 1 GiB/s.
                        now += Duration::from_millis(1);
                    }
                    Turn::At(time) => {
                        assert!(time > now, "asked again at once");
                        now = time.min(now + Duration::from_millis(1));
                    }
                }
                while recent.front().is_some_and(|at| *at + Duration::from_millis(50) < now) {
                    recent.pop_front();
                }
                let rate = recent.len() as f64 * PIECE as f64 * 20.0;
                while guest_at < now {
                    let Some(latency) = latency(rate) else {
                        guest_at = now;
                        break;
                    };
                    guest_at += latency;
                    pace.sample(guest_at, latency);
                    latencies.push(latency);
                }
            }
            latencies.sort();
            result.push((gone, latencies.get(latencies.len() / 2).copied().unwrap_or_default()));
        }
        result
    }

    fn limits(rate: Option<u64>, latency_factor: Option<f64>) -> ResyncLimits {
        ResyncLimits { rate, latency_factor }
    }

    #[test]
    fn a_fixed_limit_is_kept_and_can_be_changed() {
        let mut pace = Pace::new(limits(Some(50 << 20), None));
        for (second, (gone, _)) in play(&mut pace, 4, |_| None).into_iter().enumerate() {
            assert!((48 << 20..=53 << 20).contains(&gone), "second {second}: {gone}");
        }
        pace.set_limits(limits(Some(5 << 20), None));
        assert!(play(&mut pace, 2, |_| None).iter().all(|(gone, _)| *gone <= 7 << 20));
        pace.set_limits(limits(None, None));
        assert!(play(&mut pace, 2, |_| None).iter().all(|(gone, _)| *gone >= 900 << 20));
    }

    #[test]
    fn without_a_guest_an_adaptive_copy_goes_as_fast_as_it_can() {
        let mut pace = Pace::new(limits(None, Some(1.5)));
        let seconds = play(&mut pace, 5, |_| None);
        assert!(seconds[1..].iter().all(|(gone, _)| *gone > 900 << 20), "{seconds:?}");
    }

    /// A guest's write takes 1 ms, and 1 ms more for each 100 MiB/s of the copy.
    #[test]
    fn the_guests_median_stays_within_the_factor_and_the_copy_uses_what_that_leaves() {
        let latency =
            |rate: f64| Some(Duration::from_secs_f64(0.001 * (1.0 + rate / 104_857_600.0)));
        for factor in [1.5, 3.0] {
            let mut pace = Pace::new(limits(None, Some(factor)));
            let seconds = play(&mut pace, 40, latency);
            let settled = &seconds[10..];
            let over =
                |(_, median): &&(u64, Duration)| median.as_secs_f64() > 0.001 * factor * 1.25;
            assert!(settled.iter().filter(over).count() <= 3, "{factor}: {settled:?}");
            let mean =
                settled.iter().map(|(gone, _)| *gone as f64).sum::<f64>() / settled.len() as f64;
            let ideal = (factor - 1.0) * 104_857_600.0;
            assert!(mean > ideal * 0.5, "{factor}: {mean} of {ideal}");
        }
    }

    /// I17: a guest that is slow in any case does not keep a resync from ending.
    #[test]
    fn i17_a_copy_never_stops_for_good() {
        let mut pace = Pace::new(limits(None, Some(1.01)));
        let slow = |rate: f64| Some(Duration::from_millis(if rate > 0.0 { 50 } else { 1 }));
        let seconds = play(&mut pace, 60, slow);
        let gone: u64 = seconds.iter().map(|(gone, _)| gone).sum();
        assert!(gone > 40 << 20, "{gone}");
    }
}
