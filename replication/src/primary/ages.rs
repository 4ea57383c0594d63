use std::collections::VecDeque;

use tokio::time::Instant;

/// When each request that waits for the peer arrived; knows the oldest at any time.
#[derive(Debug, Default)]
pub(crate) struct Ages {
    /// Number of the first entry.
    base: u64,
    /// In order of arrival; `None` has left. Bounded by the requests in flight.
    arrivals: VecDeque<Option<Instant>>,
}

/// A request's place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival(u64);

impl Ages {
    pub(crate) fn arrive(&mut self, now: Instant) -> Arrival {
        self.arrivals.push_back(Some(now));
        Arrival(self.base + self.arrivals.len() as u64 - 1)
    }

    pub(crate) fn leave(&mut self, arrival: Arrival) {
        let index = arrival.0.checked_sub(self.base).and_then(|i| usize::try_from(i).ok());
        if let Some(entry) = index.and_then(|i| self.arrivals.get_mut(i)) {
            *entry = None;
        }
        while let Some(None) = self.arrivals.front() {
            self.arrivals.pop_front();
            self.base += 1;
        }
    }

    /// Requests that have arrived so far.
    pub(crate) fn arrived(&self) -> u64 {
        self.base + self.arrivals.len() as u64
    }

    /// Whether the first `arrived` requests have left.
    pub(crate) fn have_left(&self, arrived: u64) -> bool {
        self.base >= arrived
    }

    pub(crate) fn oldest(&self) -> Option<Instant> {
        // The front is never `None`: `leave` sees to it.
        self.arrivals.front().copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_oldest_is_known_whatever_the_order_of_leaving() {
        let start = Instant::now();
        let mut ages = Ages::default();
        let at = |s| start + Duration::from_secs(s);
        let places: Vec<_> = (0..4).map(|s| ages.arrive(at(s))).collect();
        ages.leave(places[1]);
        assert_eq!(ages.oldest(), Some(at(0)));
        ages.leave(places[0]);
        assert!(ages.have_left(2) && !ages.have_left(3));
        assert_eq!(ages.oldest(), Some(at(2)));
        ages.leave(places[3]);
        ages.leave(places[2]);
        assert_eq!(ages.oldest(), None);
        let place = ages.arrive(at(9));
        assert_eq!(ages.oldest(), Some(at(9)));
        ages.leave(place);
        ages.leave(place);
        assert_eq!(ages.oldest(), None);
    }
}
