use std::collections::VecDeque;

use crate::Epoch;

/// The primary's epochs: which write belongs where, what is in flight, and what waits for a cut.
///
/// No I/O, clock or lock: calls are events, their results say what is to be done. `T` is a write
/// that has to wait for the end of a cut before it may be sent.
///
/// * A write belongs to the epoch that is current when it [`begin`](Self::begin)s.
/// * [`start_cut`](Self::start_cut) ends the current epoch. Until
///   [`release`](Self::release), writes of the next one are held back from the link.
/// * The cut may be sent when [`drained`](Self::drained) says that every write of the ended epoch
///   has ended on both sides; it may not be sent at all if one of them failed.
/// * At most one cut is outstanding, until [`committed`](Self::committed) or
///   [`void_cut`](Self::void_cut).
#[derive(Debug)]
pub(crate) struct Epochs<T> {
    current: Epoch,
    /// The first of this session.
    first: Epoch,
    attached: bool,
    cut: Option<Epoch>,
    holding: bool,
    held: VecDeque<T>,
    ended: InFlight,
    running: InFlight,
    /// Writes that were on their way to the peer when it was lost, and whose owners have not
    /// learned that yet.
    stale: usize,
    /// Local writes of epochs before `late_before`: a void cut has waited for them in vain, or they
    /// were going on when the session began.
    late: usize,
    late_before: Epoch,
}

/// Writes that have begun and not ended, by side.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct InFlight {
    local: usize,
    remote: usize,
    failed: bool,
}

/// What is to be done with a write on the way to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// Send it now.
    Send,
    /// [`hold`](Epochs::hold) it.
    Hold,
    /// There is no peer: it differs.
    Nowhere,
}

/// The outcome of waiting for the end of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Some writes have not ended.
    NotYet,
    /// All have ended, and succeeded on both sides.
    Clean,
    /// All have ended, and one has failed: no cut.
    Failed,
}

impl<T> Epochs<T> {
    pub(crate) fn new(current: Epoch) -> Self {
        Epochs {
            current,
            first: current,
            attached: false,
            cut: None,
            holding: false,
            held: VecDeque::new(),
            ended: InFlight::default(),
            running: InFlight::default(),
            stale: 0,
            late: 0,
            late_before: current,
        }
    }

    pub(crate) fn current(&self) -> Epoch {
        self.current
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.attached
    }

    /// Whether `epoch` belongs to the session that is attached.
    pub(crate) fn is_of_session(&self, epoch: Epoch) -> bool {
        self.attached && epoch >= self.first
    }

    /// A session begins with `epoch`.
    pub(crate) fn attach(&mut self, epoch: Epoch) {
        debug_assert!(!self.attached && epoch > self.current && self.stale == 0);
        self.current = epoch;
        self.first = epoch;
        self.attached = true;
        // The peer may have what was sent in an earlier session and has not ended here: until it has,
        // no checkpoint may forget it.
        self.running.failed = false;
        (self.late, self.late_before) = (self.running.local, epoch);
    }

    /// The peer is lost. Returns what was held: it differs now.
    pub(crate) fn detach(&mut self) -> VecDeque<T> {
        let ended = std::mem::take(&mut self.ended);
        self.stale += ended.remote + std::mem::take(&mut self.running.remote);
        self.running.local += ended.local;
        self.attached = false;
        self.holding = false;
        self.cut = None;
        std::mem::take(&mut self.held)
    }

    /// A write begins.
    pub(crate) fn begin(&mut self) -> (Epoch, Route) {
        self.running.local += 1;
        if !self.attached {
            return (self.current, Route::Nowhere);
        }
        self.running.remote += 1;
        let route = if self.holding { Route::Hold } else { Route::Send };
        (self.current, route)
    }

    /// Keeps a write that [`begin`](Self::begin) told to hold.
    pub(crate) fn hold(&mut self, write: T) {
        self.held.push_back(write);
    }

    /// Where a write of `epoch` is counted.
    fn in_flight(&mut self, epoch: Epoch) -> &mut InFlight {
        // What a void cut or an earlier session has left counts with the epoch that runs.
        let ended = epoch < self.current && self.cut.is_some();
        if ended { &mut self.ended } else { &mut self.running }
    }

    /// A write has ended locally.
    pub(crate) fn local_done(&mut self, epoch: Epoch, ok: bool) {
        let late = epoch < self.late_before;
        let in_flight = self.in_flight(epoch);
        in_flight.local = in_flight.local.saturating_sub(1);
        in_flight.failed |= !ok;
        self.late = self.late.saturating_sub(usize::from(late));
    }

    /// A write has ended on the peer, or is lost.
    pub(crate) fn remote_done(&mut self, epoch: Epoch, ok: bool) {
        if !self.is_of_session(epoch) {
            self.stale = self.stale.saturating_sub(1);
            return;
        }
        let in_flight = self.in_flight(epoch);
        in_flight.remote = in_flight.remote.saturating_sub(1);
        in_flight.failed |= !ok;
    }

    /// Whether everything that was on its way to a lost peer has been given up by its owner, and
    /// is known to differ.
    pub(crate) fn is_settled(&self) -> bool {
        self.stale == 0
    }

    /// Ends the current epoch, if no cut is outstanding.
    pub(crate) fn start_cut(&mut self) -> Option<Epoch> {
        if !self.attached || self.cut.is_some() {
            return None;
        }
        let epoch = self.current;
        self.current = epoch.next();
        self.ended = std::mem::take(&mut self.running);
        self.cut = Some(epoch);
        self.holding = true;
        Some(epoch)
    }

    /// Everything that failed in the current epoch has been sent again.
    pub(crate) fn repaired(&mut self) {
        self.running.failed = false;
    }

    /// Whether a write of the current epoch has failed since the last repair.
    pub(crate) fn has_failures(&self) -> bool {
        self.running.failed
    }

    /// Whether the epoch that was cut has ended on both sides.
    pub(crate) fn drained(&self) -> Drained {
        match self.ended {
            InFlight { local: 0, remote: 0, failed: false } => Drained::Clean,
            InFlight { local: 0, remote: 0, failed: true } => Drained::Failed,
            _ => Drained::NotYet,
        }
    }

    /// Whether the cut waits for the local disk, and for nothing else.
    pub(crate) fn waits_for_local(&self) -> bool {
        self.ended.remote == 0 && self.ended.local > 0
    }

    /// Whether local writes go on that a void cut has waited for. Another cut would only hold
    /// others back again.
    pub(crate) fn has_late_writes(&self) -> bool {
        self.late > 0
    }

    /// The peer has made the cut: returns the writes to be sent now, in their order.
    pub(crate) fn release(&mut self) -> VecDeque<T> {
        self.holding = false;
        std::mem::take(&mut self.held)
    }

    /// The cut is committed: another may be made.
    pub(crate) fn committed(&mut self) {
        self.cut = None;
        self.ended = InFlight::default();
    }

    /// The cut is not made, or not committed: its epoch runs on under the next number. Returns
    /// the writes to be sent now.
    pub(crate) fn void_cut(&mut self) -> VecDeque<T> {
        self.cut = None;
        // The next cut must wait for what is still in flight of it. That one of them failed is
        // forgotten: it differs, and is sent again before the next cut.
        let ended = std::mem::take(&mut self.ended);
        (self.late, self.late_before) = (ended.local, self.current);
        self.running.local += ended.local;
        self.running.remote += ended.remote;
        self.release()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached() -> Epochs<u32> {
        let mut epochs = Epochs::new(Epoch(0));
        epochs.attach(Epoch(1));
        epochs
    }

    #[test]
    fn a_cut_waits_for_both_sides_of_every_write_of_its_epoch() {
        let mut epochs = attached();
        let (first, route) = epochs.begin();
        assert_eq!((first, route), (Epoch(1), Route::Send));
        assert_eq!(epochs.start_cut(), Some(Epoch(1)));
        assert_eq!(epochs.drained(), Drained::NotYet);
        epochs.local_done(first, true);
        assert_eq!(epochs.drained(), Drained::NotYet);
        epochs.remote_done(first, true);
        assert_eq!(epochs.drained(), Drained::Clean);
    }

    #[test]
    fn writes_after_a_cut_are_held_and_released_in_order() {
        let mut epochs = attached();
        epochs.start_cut();
        for write in 0..3 {
            assert_eq!(epochs.begin(), (Epoch(2), Route::Hold));
            epochs.hold(write);
        }
        assert_eq!(epochs.drained(), Drained::Clean, "held writes are not of the ended epoch");
        assert_eq!(epochs.release(), [0, 1, 2]);
        assert_eq!(epochs.begin().1, Route::Send);
    }

    #[test]
    fn a_failed_write_on_either_side_forbids_the_cut() {
        for local in [true, false] {
            let mut epochs = attached();
            let (epoch, _) = epochs.begin();
            epochs.start_cut();
            epochs.local_done(epoch, local);
            epochs.remote_done(epoch, !local);
            assert_eq!(epochs.drained(), Drained::Failed);
        }
    }

    #[test]
    fn what_a_lost_session_leaves_on_the_local_disk_holds_the_next_ones_cut_up() {
        let mut epochs = attached();
        let (sent, _) = epochs.begin();
        epochs.remote_done(sent, true);
        epochs.start_cut();
        epochs.detach();
        let (alone, route) = epochs.begin();
        assert_eq!(route, Route::Nowhere);
        epochs.local_done(alone, true);
        epochs.attach(Epoch(4));
        assert!(epochs.has_late_writes(), "nobody is to be held back for it");
        epochs.start_cut();
        assert_eq!(epochs.drained(), Drained::NotYet);
        epochs.local_done(sent, true);
        assert_eq!(epochs.drained(), Drained::Clean);
        assert!(!epochs.has_late_writes());
    }

    #[test]
    fn what_a_void_cut_leaves_in_flight_holds_the_next_cut_up() {
        let mut epochs = attached();
        let (epoch, _) = epochs.begin();
        epochs.start_cut();
        epochs.begin();
        epochs.hold(3);
        assert_eq!(epochs.void_cut(), [3]);
        assert_eq!(epochs.start_cut(), Some(Epoch(2)));
        assert_eq!(epochs.drained(), Drained::NotYet);
        for epoch in [epoch, Epoch(2)] {
            epochs.local_done(epoch, true);
            epochs.remote_done(epoch, true);
        }
        assert_eq!(epochs.drained(), Drained::Clean);
    }

    #[test]
    fn local_writes_that_a_cut_waited_for_in_vain_are_late_until_they_end() {
        let mut epochs = attached();
        let (first, _) = epochs.begin();
        epochs.remote_done(first, true);
        epochs.start_cut();
        assert!(epochs.waits_for_local());
        epochs.void_cut();
        let (second, _) = epochs.begin();
        epochs.local_done(second, true);
        assert!(epochs.has_late_writes(), "it is the first that is late");
        epochs.local_done(first, true);
        assert!(!epochs.has_late_writes());
    }

    #[test]
    fn a_failure_that_was_repaired_does_not_forbid_the_cut() {
        let mut epochs = attached();
        let (epoch, _) = epochs.begin();
        epochs.local_done(epoch, true);
        epochs.remote_done(epoch, false);
        epochs.repaired();
        epochs.start_cut();
        assert_eq!(epochs.drained(), Drained::Clean);
    }

    #[test]
    fn at_most_one_cut_is_outstanding() {
        let mut epochs = attached();
        assert_eq!(epochs.start_cut(), Some(Epoch(1)));
        epochs.release();
        assert_eq!(epochs.start_cut(), None);
        epochs.committed();
        assert_eq!(epochs.start_cut(), Some(Epoch(2)));
    }

    #[test]
    fn without_a_peer_writes_go_nowhere_and_the_next_session_begins_with_none_of_them() {
        let mut epochs = attached();
        let (epoch, _) = epochs.begin();
        epochs.start_cut();
        epochs.begin();
        epochs.hold(7);
        assert_eq!(epochs.detach(), [7]);
        assert_eq!(epochs.begin().1, Route::Nowhere);
        assert!(!epochs.is_settled(), "two writes were on their way");
        epochs.remote_done(epoch, false);
        epochs.remote_done(Epoch(2), false);
        assert!(epochs.is_settled());
        for epoch in [epoch, Epoch(2), Epoch(2)] {
            epochs.local_done(epoch, true);
        }
        epochs.attach(Epoch(9));
        assert!(!epochs.has_late_writes());
        assert_eq!(epochs.start_cut(), Some(Epoch(9)));
        assert_eq!(epochs.drained(), Drained::Clean);
    }
}
