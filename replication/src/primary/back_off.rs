use std::time::Duration;

/// Pauses between attempts to reach the secondary.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(5);

/// The longest pause before a secondary that is too slow is tried again.
const SLOW_LONGEST: Duration = Duration::from_secs(60);

/// How a stay of the secondary has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    /// There was none.
    Failed,
    /// It is gone.
    Lost,
    /// It was left behind, because it is slow.
    LeftBehind,
}

/// How long to wait before the next attempt: longer each time, up to a bound, and a little by
/// chance, so that many primaries do not come at once.
#[derive(Debug)]
pub(super) struct BackOff {
    pause: Duration,
    /// The next pause for one that is slow.
    slow: Duration,
    slow_first: Duration,
}

impl BackOff {
    /// `slow`: the first pause for one that was left behind.
    pub(super) fn new(slow: Duration) -> Self {
        let slow = slow.max(Duration::from_secs(1));
        BackOff { pause: FIRST, slow, slow_first: slow }
    }

    /// The pause after an attempt. `chance` is from 0 to 1.
    pub(super) fn next(&mut self, tried: Tried, chance: f64) -> Duration {
        let pause = match tried {
            Tried::LeftBehind => {
                let pause = self.slow;
                self.slow = (self.slow * 2).min(SLOW_LONGEST.max(self.slow_first));
                self.pause = FIRST;
                pause
            }
            Tried::Lost => {
                self.slow = self.slow_first;
                self.pause = FIRST;
                self.pause
            }
            Tried::Failed => {
                let pause = self.pause;
                self.pause = (self.pause * 2).min(LONGEST);
                pause
            }
        };
        pause.mul_f64(0.75 + chance.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn pauses_grow_to_a_bound_and_begin_anew_after_a_session() {
        let mut back_off = BackOff::new(ms(2000));
        let failed: Vec<_> = (0..7).map(|_| back_off.next(Tried::Failed, 0.5)).collect();
        assert_eq!(failed, [250, 500, 1000, 2000, 4000, 5000, 5000].map(ms));
        assert_eq!(back_off.next(Tried::Lost, 0.5), ms(250));
        assert_eq!(back_off.next(Tried::Failed, 0.0), ms(250) * 3 / 4);
        assert_eq!(back_off.next(Tried::Failed, 1.0), ms(500) * 5 / 4);
    }

    #[test]
    fn one_that_stays_slow_is_tried_more_and_more_seldom() {
        let mut back_off = BackOff::new(ms(2000));
        let slow: Vec<_> = (0..7).map(|_| back_off.next(Tried::LeftBehind, 0.5)).collect();
        assert_eq!(slow, [2, 4, 8, 16, 32, 60, 60].map(|s| ms(s * 1000)));
        assert_eq!(back_off.next(Tried::Lost, 0.5), ms(250));
        assert_eq!(back_off.next(Tried::LeftBehind, 0.5), ms(2000));
    }
}
