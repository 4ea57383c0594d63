use std::sync::Arc;

use tokio::runtime::Handle;

/// The runtimes that connections are spread over.
#[derive(Debug)]
pub(super) struct Seats(Vec<(Handle, Seat)>);

/// A connection's place in a runtime, until it is dropped.
#[derive(Debug, Clone, Default)]
pub(super) struct Seat {
    /// As many as there are connections, and one.
    connections: Arc<()>,
}

impl Seats {
    pub(super) fn new(runtimes: &[Handle]) -> Self {
        Seats(runtimes.iter().map(|runtime| (runtime.clone(), Seat::default())).collect())
    }

    /// The runtime with the fewest connections, the first one of several; none if there is but
    /// the caller's.
    pub(super) fn take(&self) -> Option<(&Handle, Seat)> {
        let taken = |(_, seat): &&(Handle, Seat)| Arc::strong_count(&seat.connections);
        self.0.iter().min_by_key(taken).map(|(runtime, seat)| (runtime, seat.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_go_where_the_fewest_are() {
        let build = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let runtimes = [build(), build()];
        let handles: Vec<Handle> =
            runtimes.iter().map(|runtime| runtime.handle().clone()).collect();
        let seats = Seats::new(&handles);
        let mut taken = Vec::new();
        let mut take = || {
            let (runtime, seat) = seats.take().unwrap();
            taken.push(seat);
            runtime.id()
        };
        let [first, second] = [handles[0].id(), handles[1].id()];
        assert_eq!([take(), take(), take()], [first, second, first]);
        taken.remove(0);
        taken.remove(1);
        assert_eq!(seats.take().unwrap().0.id(), first);
    }
}
