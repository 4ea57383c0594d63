use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long each request has waited for the peer; knows the longest at any time.
///
/// The clock of a request runs from its arrival until it leaves, except while it is
/// [paused](Ages::pause): then it waits for something else.
#[derive(Debug, Default)]
pub(crate) struct Ages {
    /// Requests that have arrived so far.
    arrived: u64,
    /// In order of arrival. Bounded by the requests in flight.
    clocks: BTreeMap<u64, Clock>,
}

#[derive(Debug, Clone, Copy)]
enum Clock {
    /// As if it had waited without a break since then.
    Since(Instant),
    /// Has waited so long, and does not now.
    Paused(Duration),
}

impl Clock {
    fn waited(self, now: Instant) -> Duration {
        match self {
            Clock::Since(since) => now.saturating_duration_since(since),
            Clock::Paused(waited) => waited,
        }
    }
}

/// A request's place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival(u64);

/// What is to be done about the request that has waited longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// It has waited for the peer as long as is allowed.
    Now,
    /// None can have before then.
    At(Instant),
}

impl Ages {
    /// The shortest time for which [`due`](Self::due) says that nobody needs to look again.
    const STEP_PART: u32 = 64;

    pub(crate) fn arrive(&mut self, now: Instant) -> Arrival {
        let arrival = Arrival(self.arrived);
        self.arrived += 1;
        self.clocks.insert(arrival.0, Clock::Since(now));
        arrival
    }

    pub(crate) fn leave(&mut self, arrival: Arrival) {
        self.clocks.remove(&arrival.0);
    }

    /// From now on the request waits for something else than the peer.
    pub(crate) fn pause(&mut self, arrival: Arrival, now: Instant) {
        if let Some(clock) = self.clocks.get_mut(&arrival.0) {
            *clock = Clock::Paused(clock.waited(now));
        }
    }

    /// The request waits for the peer again.
    pub(crate) fn resume(&mut self, arrival: Arrival, now: Instant) {
        if let Some(clock) = self.clocks.get_mut(&arrival.0) {
            *clock = Clock::Since(now.checked_sub(clock.waited(now)).unwrap_or(now));
        }
    }

    /// Requests that have arrived so far.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Whether the first `arrived` requests have left.
    pub(crate) fn have_left(&self, arrived: u64) -> bool {
        self.clocks.first_key_value().is_none_or(|(first, _)| *first >= arrived)
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.clocks.is_empty()
    }

    /// Whether a request has waited for the peer for `limit`, or when that is to be looked at
    /// again.
    pub(crate) fn due(&self, now: Instant, limit: Duration) -> Due {
        let mut longest = Duration::ZERO;
        for clock in self.clocks.values() {
            let waited = clock.waited(now);
            if waited >= limit && matches!(clock, Clock::Since(_)) {
                return Due::Now;
            }
            // One that is paused may go on at any moment.
            longest = longest.max(waited);
        }
        Due::At(now + limit.saturating_sub(longest).max(limit / Self::STEP_PART))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn the_longest_wait_counts_whatever_the_order_of_leaving() {
        let start = Instant::now();
        let mut ages = Ages::default();
        let places: Vec<_> = (0..4).map(|s| ages.arrive(at(start, s * 1000))).collect();
        let due = |ages: &Ages| ages.due(at(start, 4000), LIMIT);
        ages.leave(places[1]);
        assert_eq!(due(&ages), Due::At(at(start, 5000)));
        assert_eq!(ages.due(at(start, 5000), LIMIT), Due::Now);
        ages.leave(places[0]);
        assert!(ages.have_left(2) && !ages.have_left(3));
        assert_eq!(due(&ages), Due::At(at(start, 7000)));
        ages.leave(places[3]);
        ages.leave(places[2]);
        assert!(ages.is_empty());
        assert_eq!(due(&ages), Due::At(at(start, 9000)));
        let place = ages.arrive(at(start, 9000));
        ages.leave(place);
        ages.leave(place);
        assert!(ages.is_empty());
    }

    #[test]
    fn only_the_time_that_is_spent_on_the_peer_counts() {
        let start = Instant::now();
        let mut ages = Ages::default();
        let place = ages.arrive(start);
        ages.pause(place, at(start, 4000));
        assert_eq!(ages.due(at(start, 60_000), LIMIT), Due::At(at(start, 61_000)));
        ages.resume(place, at(start, 60_000));
        assert_eq!(ages.due(at(start, 60_999), LIMIT), Due::At(at(start, 60_999) + LIMIT / 64));
        assert_eq!(ages.due(at(start, 61_000), LIMIT), Due::Now);
        // Paused beyond the limit by a hair: it is not looked at without a pause.
        ages.pause(place, at(start, 61_000));
        let Due::At(next) = ages.due(at(start, 62_000), LIMIT) else { panic!("it does not wait") };
        assert!(next > at(start, 62_000));
    }
}
