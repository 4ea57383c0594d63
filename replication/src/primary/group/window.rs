//! The window: writes on their way to a disk and to the peer.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[cfg(feature = "simulation")]
use brep_block::plant::{self, Plant};
use brep_block::{
    Error as BlockError, ErrorKind, Io, LockMode, Operation, RangeGuard, RangeLock, ZeroFlags,
};
use brep_hbitmap::{InFlight, Role};
use brep_nbd::client::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use super::super::ages::Arrival;
use super::super::epochs::Route;
use super::{Core, Group};
use crate::Epoch;
use crate::change::Change;
use crate::status::TlsStatus;

/// A write of the next epoch, until the cut has been made.
pub(crate) struct HeldWrite {
    disk: usize,
    offset: u64,
    change: Change,
    sent: oneshot::Sender<Io<'static, ()>>,
}

/// A write that has begun: what is on its way to the peer.
pub(crate) struct Begun {
    pub(crate) ticket: Ticket,
    pub(crate) remote: Remote,
}

/// What counts a write, on either side, until it has ended there.
#[derive(Clone, Copy)]
pub(crate) struct Ticket {
    epoch: Epoch,
    disk: usize,
    /// None: it is on its way to nobody.
    in_flight: Option<InFlight>,
}

pub(crate) enum Remote {
    Sent(Io<'static, ()>),
    Held(oneshot::Receiver<Io<'static, ()>>),
    Nowhere,
}

/// A request's place in the window; given back when it is dropped.
pub(crate) struct Admission {
    group: Arc<Group>,
    arrival: Arrival,
    _permits: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
}

impl Admission {
    /// Waits for a range. That is the local disk's matter: it does not count as waiting for the
    /// peer.
    pub(crate) async fn lock(&self, locks: &RangeLock, range: Range<u64>) -> RangeGuard {
        if let Some(guard) = locks.try_lock(range.clone(), LockMode::Exclusive) {
            return guard;
        }
        self.pause();
        let guard = locks.lock(range, LockMode::Exclusive).await;
        self.resume();
        guard
    }

    /// From now on the local disk is waited for.
    pub(crate) fn pause(&self) {
        self.group.core().ages.pause(self.arrival, Instant::now());
    }

    /// From now on the peer is waited for.
    pub(crate) fn resume(&self) {
        self.group.core().ages.resume(self.arrival, Instant::now());
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.group.core().ages.leave(self.arrival);
        self.group.ended.notify_waiters();
    }
}

/// Who waits has his place before all who come later: where permits are at hand nobody waits.
async fn permits(semaphore: &Arc<Semaphore>, count: u32) -> Option<OwnedSemaphorePermit> {
    match Arc::clone(semaphore).try_acquire_many_owned(count) {
        Ok(permits) => Some(permits),
        Err(_) => Arc::clone(semaphore).acquire_many_owned(count).await.ok(),
    }
}

/// Sends a change to the peer; its place on the wire is taken at once.
fn submit(change: Change, connection: &Connection, offset: u64) -> Io<'static, ()> {
    match change {
        Change::Write(data, flags) => connection.start_write(offset, data, flags),
        Change::Zeroes(len, flags) => {
            connection.start_write_zeroes(offset, len, ZeroFlags { fast: false, ..flags })
        }
    }
}

impl Group {
    /// Waits for room in the window. Requests that come while there is no peer need none.
    pub(crate) async fn admit(self: &Arc<Self>, len: u64) -> Admission {
        let (arrival, attached) = {
            let mut core = self.core();
            (core.ages.arrive(Instant::now()), core.epochs.is_attached())
        };
        let mut admission = Admission { group: Arc::clone(self), arrival, _permits: None };
        if attached {
            // A request larger than the window goes when the window is empty.
            let bytes = len.clamp(1, self.config.window_bytes.clamp(1, u64::from(u32::MAX >> 4)));
            let requests = permits(&self.window_requests, 1).await;
            let bytes = permits(&self.window_bytes, bytes as u32).await;
            admission._permits = requests.zip(bytes);
        }
        admission
    }

    /// A write begins: it gets its epoch, and is sent, held, or marked as different. The caller
    /// holds its range.
    pub(crate) async fn begin(
        &self,
        admission: &Admission,
        disk: usize,
        offset: u64,
        change: &Change,
    ) -> brep_block::Result<Begun> {
        let begin = |core: &mut Core| {
            // With the core locked: the last word before the write is submitted anywhere.
            self.check_superseded(disk, change.operation())?;
            if !core.has_disk(disk) {
                // A client that was about to begin when the export went.
                let text = "the disk is not part of the group any more";
                let (kind, name) = (ErrorKind::Shutdown, self.disk_name(disk));
                return Err(BlockError::new(change.operation(), kind, name, text));
            }
            Ok(core.begin(disk, offset, change))
        };
        let begun = self.when_hot(disk, (offset, change.len()), Some(admission), begin).await?;
        begun.map_err(|e: BlockError| e.at(offset, change.len()))
    }

    /// As [`begin`](Self::begin), for what was read of whole granules: they do not differ any more.
    ///
    /// Not before: a copy that is given up while it reads has changed nothing. Whatever marked them
    /// until now had ended on the local disk when they were read, and so is part of the copy.
    pub(crate) async fn begin_copy(
        &self,
        admission: &Admission,
        disk: usize,
        offset: u64,
        change: &Change,
    ) -> brep_block::Result<Begun> {
        let begin = |core: &mut Core| {
            let begun = core.begin(disk, offset, change);
            if !matches!(begun.remote, Remote::Nowhere) {
                core.clear_different(disk, offset, change.len());
            }
            begun
        };
        self.when_hot(disk, (offset, change.len()), Some(admission), begin).await
    }

    /// Whether changes may still be acknowledged.
    pub(crate) fn check_fatal(&self, disk: usize, operation: Operation) -> brep_block::Result<()> {
        self.check_fatal_in(&self.core(), disk, operation)
    }

    pub(super) fn check_fatal_in(
        &self,
        core: &Core,
        disk: usize,
        operation: Operation,
    ) -> brep_block::Result<()> {
        match &core.fatal {
            None => Ok(()),
            Some(reason) => {
                let node = self.disk_name(disk);
                Err(BlockError::new(operation, ErrorKind::Io, node, reason.clone()))
            }
        }
    }

    /// Whether a write has failed that was not sent again, as far as a disk may be concerned.
    pub(crate) fn has_failures(&self, disk: usize) -> bool {
        let core = self.core();
        core.epochs.has_failures() || core.joining.has_failed(disk)
    }

    /// A write has ended on the local disk.
    pub(crate) fn local_done(
        &self,
        ticket: Ticket,
        offset: u64,
        len: u64,
        result: &brep_block::Result<()>,
    ) {
        let disk = ticket.disk;
        {
            let mut core = self.core();
            let is_well = core.joining.ended_well(disk, result.is_ok());
            core.epochs.local_done(ticket.epoch, is_well);
            if result.is_err() {
                // The peer may have what this disk has not. It is read back before the next cut.
                core.mark(disk, Role::Differs, offset, len);
            }
            core.end_in_flight(disk, ticket.in_flight);
        }
        if let Err(error) = result {
            self.report(disk, error);
            self.report_lost_vote(disk, offset, len, error);
        }
        self.ended.notify_waiters();
    }

    /// Waits for a write's end on the peer, and takes note of it. Returns whether the peer has it.
    pub(crate) async fn finish_remote(
        &self,
        begun: Begun,
        offset: u64,
        len: u64,
        admission: Admission,
    ) -> bool {
        let Ticket { epoch, disk, in_flight } = begun.ticket;
        let result = match begun.remote {
            Remote::Sent(io) => io.await,
            Remote::Held(wait) => match wait.await {
                Ok(io) => io.await,
                Err(_) => Err(BlockError::new(
                    Operation::Write,
                    ErrorKind::NotConnected,
                    self.disk_name(disk),
                    "the secondary was lost",
                )),
            },
            Remote::Nowhere => return false,
        };
        #[cfg(feature = "simulation")]
        let result = match result {
            Err(error) if error.kind() == ErrorKind::Io && plant::is(Plant::ErrorLost) => Ok(()),
            Err(error) if plant::is(Plant::BitClearedEarly) => {
                let mut core = self.core();
                core.epochs.remote_done(epoch, false);
                core.end_in_flight(disk, in_flight);
                drop(core);
                self.remote_failed(disk, epoch, &error);
                drop(admission);
                self.ended.notify_waiters();
                return false;
            }
            result => result,
        };
        let replicated = result.is_ok();
        match result {
            Ok(()) => {
                let mut core = self.core();
                core.epochs.remote_done(epoch, true);
                core.end_in_flight(disk, in_flight);
                drop(core);
                if let Some(part) = self.disk(disk) {
                    part.peer_writes.note();
                }
                self.counters.replicated_writes.fetch_add(1, Ordering::Relaxed);
                self.counters.replicated_bytes.fetch_add(len, Ordering::Relaxed);
            }
            Err(error) => {
                {
                    let mut core = self.core();
                    core.mark(disk, Role::Differs, offset, len);
                    let is_well = core.joining.ended_well(disk, false);
                    core.epochs.remote_done(epoch, is_well);
                    core.end_in_flight(disk, in_flight);
                }
                self.remote_failed(disk, epoch, &error);
            }
        }
        drop(admission);
        self.ended.notify_waiters();
        replicated
    }

    pub(super) fn remote_failed(&self, disk: usize, epoch: Epoch, error: &BlockError) {
        let lost = matches!(
            error.kind(),
            ErrorKind::NotConnected | ErrorKind::TimedOut | ErrorKind::Shutdown
        );
        if lost {
            // Before this write is acknowledged, the record says that the peer lacks it.
            if self.core().epochs.is_of_session(epoch) {
                self.lose_peer(format!("a write failed: {}", error.detail()));
            }
            return;
        }
        self.report(disk, error);
        // Nothing more of this epoch has room there, and so there will be no checkpoint of it: the
        // secondary keeps its last one, and is caught up with when there is room. What no checkpoint
        // holds yet is tried again by its copy.
        let voids_epoch = error.kind() == ErrorKind::NoSpace && !self.core().is_joining(disk);
        if voids_epoch && self.core().epochs.is_of_session(epoch) {
            self.lose_peer(format!("the secondary has no room: {}", error.detail()));
        }
    }
}

impl Core {
    /// How the connections to the peer are encrypted, while there are any.
    pub(crate) fn peer_tls(&self) -> Option<TlsStatus> {
        let peer = self.connections.values().next()?.tls_peer()?;
        Some(TlsStatus::from(&**peer))
    }

    fn has_disk(&self, disk: usize) -> bool {
        self.maps.contains_key(&disk)
    }

    fn begin(&mut self, disk: usize, offset: u64, change: &Change) -> Begun {
        self.dirty = true;
        let change = if self.flushes_reach_peer { change.clone() } else { change.without_fua() };
        let (epoch, route) = self.epochs.begin();
        let mut in_flight = None;
        if route != Route::Nowhere {
            self.mark(disk, Role::Open, offset, change.len());
            // It ends on both sides.
            in_flight = self.begin_in_flight(disk, offset, change.len(), 2);
        }
        let remote = match route {
            Route::Send => {
                // Attached is only who has a connection for every disk.
                let connection = &self.connections[&disk];
                Remote::Sent(submit(change, connection, offset))
            }
            Route::Hold => {
                let (sent, wait) = oneshot::channel();
                self.epochs.hold(HeldWrite { disk, offset, change, sent });
                Remote::Held(wait)
            }
            Route::Nowhere => {
                #[cfg(feature = "simulation")]
                if plant::is(Plant::BitForgotten) && offset % 8192 == 4096 {
                    let ticket = Ticket { epoch, disk, in_flight };
                    return Begun { ticket, remote: Remote::Nowhere };
                }
                self.mark(disk, Role::Differs, offset, change.len());
                Remote::Nowhere
            }
        };
        Begun { ticket: Ticket { epoch, disk, in_flight }, remote }
    }

    pub(super) fn send_held(&mut self, held: VecDeque<HeldWrite>) {
        for write in held {
            let io = submit(write.change, &self.connections[&write.disk], write.offset);
            // An owner that is gone does not take its write back.
            let _ = write.sent.send(io);
        }
    }
}
