use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    RangeGuard, RangeLock, Result, WriteFlags, ZeroFlags, start,
};
use bytes::Bytes;
use tokio::sync::Notify;

use crate::ahead::Ahead;
use crate::change::Change;
use crate::checks::{check_target, check_unit, control_error, read_aligned};
use crate::copy::copy_units;
use crate::counters::Counters;
use crate::epoch::{Epoch, Unit};
use crate::memory::CopyMemory;
use crate::options::{CbwOptions, CbwStats, Copied, OnCopyError};

/// A device that copies what is about to be overwritten.
///
/// Reads go to the source. A write, a write of zeroes or a discard first copies the units that it
/// touches, and that have not been copied since the last checkpoint, to the target, and then
/// goes on to the source. So the target, with the source below it, shows the source as it was at
/// the checkpoint; [`SnapshotAccess`](crate::SnapshotAccess) is that view.
///
/// A request holds its range, widened to units while there is something to copy, exclusively
/// until it has ended, even if its [`Io`] is dropped. So two requests never copy a unit both, no
/// request reaches the source before the copy is complete, and requests that overlap are carried
/// out in the order of their arrival.
pub struct CopyBeforeWrite {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) source: Arc<dyn BlockDevice>,
    pub(crate) barrier: Option<FlushLevel>,
    pub(crate) counters: Counters,
    pub(crate) locks: RangeLock,
    pub(crate) memory: CopyMemory,
    pub(crate) on_copy_error: OnCopyError,
    copy_timeout: Option<Duration>,
    discard_as_zeroes: bool,
    enabled: AtomicBool,
    ahead: Mutex<Ahead>,
    state: Mutex<State>,
    idle: Notify,
    /// Requests that may be copying.
    copies: AtomicUsize,
    /// Copies ahead that have not ended.
    copies_ahead: AtomicUsize,
    copies_ended: Notify,
}

struct State {
    epoch: Arc<Epoch>,
    in_flight: usize,
}

impl CopyBeforeWrite {
    /// Puts a filter over `source`, with pre-images going to `target`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if both are one device, if their sizes differ ("Source and
    /// target image have different sizes"; the target's may be the source's rounded up to 512
    /// bytes), or if the unit is not acceptable;
    /// [`ErrorKind::ReadOnly`] if the target takes no writes.
    pub fn new(
        source: Arc<dyn BlockDevice>,
        target: Arc<dyn BlockDevice>,
        options: CbwOptions,
    ) -> Result<Arc<Self>> {
        check_unit(&options.name, options.unit_bytes, &*source)?;
        check_target(&options.name, &source, &target, options.unit_bytes)?;
        let unit = Unit::new(options.unit_bytes);
        let epoch = Arc::new(Epoch::new(target, unit, options.assume));
        let shared = Shared {
            name: options.name,
            source,
            barrier: options.barrier,
            counters: Counters::default(),
            locks: RangeLock::new(),
            memory: CopyMemory::default(),
            copy_timeout: options.copy_timeout,
            on_copy_error: options.on_copy_error,
            discard_as_zeroes: options.discard_as_zeroes,
            enabled: AtomicBool::new(true),
            ahead: Mutex::new(Ahead::new(options.ahead_bytes)),
            state: Mutex::new(State { epoch, in_flight: 0 }),
            idle: Notify::new(),
            copies: AtomicUsize::new(0),
            copies_ahead: AtomicUsize::new(0),
            copies_ended: Notify::new(),
        };
        Ok(Arc::new(CopyBeforeWrite { shared: Arc::new(shared) }))
    }

    /// The locks under which requests change the source. Whoever reads the state of the last
    /// checkpoint through a view of his own takes [`LockMode::Shared`] over look-up and read
    /// together.
    #[must_use]
    pub fn locks(&self) -> &RangeLock {
        &self.shared.locks
    }

    /// The device under the filter.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn BlockDevice> {
        &self.shared.source
    }

    /// Where pre-images go now.
    #[must_use]
    pub fn target(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.shared.epoch().target)
    }

    /// Bytes that are copied together in this epoch.
    #[must_use]
    pub fn unit_bytes(&self) -> u64 {
        self.shared.epoch().unit.bytes()
    }

    /// Waits until no request is in flight. Requests that arrive meanwhile are waited for too:
    /// hold them back.
    pub async fn drain(&self) {
        self.shared.drain().await;
    }

    /// Waits until no copy ahead is going on. They are nobody's requests: they may outlive all of
    /// those that they were begun for.
    pub async fn drain_ahead(&self) {
        self.shared.drain_ahead().await;
    }

    /// How many requests, and background copies, are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.state().in_flight
    }

    /// Begins a new epoch: nothing counts as copied, and pre-images go to `target`, which must be
    /// empty. Returns the old target. Costs the same whatever the epoch has copied.
    ///
    /// The old target still serves readers of a view that began before; see
    /// [`SnapshotAccess::drain`](crate::SnapshotAccess::drain) before emptying it.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if a request is in flight, and as [`new`](Self::new) if the target is
    /// not acceptable. Nothing has changed then.
    pub fn switch_target(&self, target: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
        self.switch_target_with_unit(target, self.unit_bytes())
    }

    /// The same, with another unit from now on: `target` may allocate more at a time than the one
    /// before, or less. What [`CbwOptions::unit_bytes`] demands holds.
    ///
    /// # Errors
    /// As [`switch_target`](Self::switch_target), and if the unit is not acceptable.
    pub fn switch_target_with_unit(
        &self,
        target: Arc<dyn BlockDevice>,
        unit_bytes: u64,
    ) -> Result<Arc<dyn BlockDevice>> {
        let shared = &self.shared;
        check_unit(&shared.name, unit_bytes, &*shared.source)?;
        check_target(&shared.name, &shared.source, &target, unit_bytes)?;
        self.begin_epoch(Some((target, Unit::new(unit_bytes))))
    }

    /// Begins a new epoch with the same target: every unit is to be copied again. The target is
    /// not touched: emptying it is the caller's part.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if a request is in flight.
    pub fn checkpoint(&self) -> Result<()> {
        self.begin_epoch(None).map(drop)
    }

    fn begin_epoch(
        &self,
        target: Option<(Arc<dyn BlockDevice>, Unit)>,
    ) -> Result<Arc<dyn BlockDevice>> {
        let mut state = self.shared.state();
        if state.in_flight > 0 {
            let why = format!("{} requests are in flight", state.in_flight);
            return Err(control_error(&self.shared.name, ErrorKind::Locked, why));
        }
        let (target, unit) =
            target.unwrap_or_else(|| (Arc::clone(&state.epoch.target), state.epoch.unit));
        let new = Arc::new(Epoch::new(target, unit, Copied::Nothing));
        let old = std::mem::replace(&mut state.epoch, new);
        drop(state);
        Ok(Arc::clone(&old.target))
    }

    /// Switches copying off or on, for requests that arrive from now on. The first request that
    /// changes the source without a copy gives up the last checkpoint: readers of the view get an
    /// error until the next switch or checkpoint.
    pub fn set_enabled(&self, enabled: bool) {
        self.shared.enabled.store(enabled, Ordering::SeqCst);
    }

    /// Whether requests copy.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::SeqCst)
    }

    /// Whether the state of the last checkpoint is lost: something was overwritten without a
    /// copy.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared.epoch().is_broken()
    }

    /// What the filter has done so far.
    #[must_use]
    pub fn stats(&self) -> CbwStats {
        self.shared.counters.stats()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn change(&self, offset: u64, len: u64, change: Change) -> Io<'_, ()> {
        if len == 0 {
            return Io::ok(());
        }
        let operation = change.operation();
        if let Err(error) = <dyn BlockDevice>::check_range(self, operation, offset, len) {
            return Io::err(error);
        }
        start(Arc::clone(&self.shared).change(offset..offset + len, change))
    }
}

impl BlockDevice for CopyBeforeWrite {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn size(&self) -> u64 {
        self.shared.source.size()
    }

    fn limits(&self) -> Limits {
        // The set of units has the size of the source: no growing.
        Limits { growable: false, ..self.shared.source.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.shared.source.read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        self.change(offset, len, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(offset, len, Change::Zeroes(flags))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.change(offset, len, Change::Discard)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.shared.source.block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.shared.source.flush(level)
    }
}

impl Shared {
    async fn change(self: Arc<Self>, bytes: Range<u64>, change: Change) -> Result<()> {
        let ticket = self.enter();
        let guard = self.copy_before(&ticket.epoch, &bytes, change.operation()).await?;
        let change = match change {
            Change::Discard if self.discard_as_zeroes => {
                Change::Zeroes(ZeroFlags { may_unmap: true, ..ZeroFlags::default() })
            }
            change => change,
        };
        let result = change.apply(&*self.source, &bytes).await;
        drop(guard);
        result
    }

    /// Returns with the range locked and its pre-image safe.
    async fn copy_before(
        self: &Arc<Self>,
        epoch: &Arc<Epoch>,
        bytes: &Range<u64>,
        operation: Operation,
    ) -> Result<RangeGuard> {
        let units = epoch.unit.covering(bytes);
        // Counted before the look at the switch: whoever switches copying off sees us, or we him.
        let copy = Copying::new(self);
        if !self.enabled.load(Ordering::SeqCst) {
            epoch.set_broken();
        } else {
            self.copy_ahead(epoch, bytes);
        }
        // What is copied stays copied while this request is in flight, so the look-up may come
        // before the lock.
        if epoch.is_broken() || epoch.holds(&units) {
            drop(copy);
            return Ok(self.locks.lock(bytes.clone(), LockMode::Exclusive).await);
        }
        let copied = match self.copy_timeout {
            None => {
                let guard = self.lock_units(epoch, &units).await;
                let copied = self.copy_missing(epoch, &units).await;
                copied.map(|()| guard)
            }
            Some(limit) => self.copy_within(limit, epoch, &units).await,
        };
        copied.map_err(|error| {
            error.within(operation, &self.name, bytes.start, bytes.end - bytes.start)
        })
    }

    /// Begins to copy what the changes of a stream will touch next. Nobody waits for it but who
    /// comes to its range.
    fn copy_ahead(self: &Arc<Self>, epoch: &Arc<Epoch>, bytes: &Range<u64>) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(wanted) = ahead.follow(bytes, self.source.size()) else { return };
        drop(ahead);
        let units = epoch.unit.covering(&wanted);
        if epoch.is_broken() || epoch.holds(&units) {
            return;
        }
        // The request that has brought us here holds the epoch too: it is still the current one.
        let ticket = self.enter();
        let shared = Arc::clone(self);
        drop(start(async move {
            let _copy = Copying::new(&shared);
            let _ahead = CopyingAhead::new(&shared);
            // Given back before the end of the copy is told.
            let ticket = ticket;
            let epoch = &ticket.epoch;
            let _guard = shared.lock_units(epoch, &units).await;
            if !shared.enabled.load(Ordering::SeqCst) || epoch.is_broken() || epoch.holds(&units) {
                return Ok(());
            }
            // Counted as a failure; the change that comes to the place tries again, and is told.
            copy_units(&shared, epoch, &units).await.map_err(|failure| failure.error)
        }));
    }

    /// Locks some units for a copy.
    pub(crate) fn lock_units(
        &self,
        epoch: &Epoch,
        units: &Range<u64>,
    ) -> impl Future<Output = RangeGuard> + Send + use<> {
        let bytes = epoch.unit.bytes_of(units, self.source.size());
        self.locks.lock(bytes, LockMode::Exclusive)
    }

    /// Copies, for a guest's request, what is not copied yet; the caller holds the units. A
    /// failure that breaks the snapshot is none to the caller.
    pub(crate) async fn copy_missing(&self, epoch: &Epoch, units: &Range<u64>) -> Result<()> {
        if epoch.holds(units) || epoch.is_broken() {
            return Ok(());
        }
        match copy_units(self, epoch, units).await {
            Ok(()) => Ok(()),
            Err(failure) if self.on_copy_error == OnCopyError::BreakSnapshot => {
                self.break_snapshot(epoch, &failure.error);
                Ok(())
            }
            Err(failure) => Err(failure.error),
        }
    }

    pub(crate) fn break_snapshot(&self, epoch: &Epoch, error: &Error) {
        tracing::warn!(node = %self.name, %error, "snapshot lost");
        epoch.set_broken();
    }

    /// Leaves out of the current epoch what no area has a byte of. Returns the bytes of the units that
    /// are left.
    pub(crate) fn keep_only(&self, areas: &[Range<u64>]) -> u64 {
        let (epoch, size) = (self.epoch(), self.source.size());
        let (mut at, mut kept) = (0, 0);
        for area in areas.iter().filter(|area| !area.is_empty()) {
            let units = epoch.unit.covering(area);
            epoch.exclude(at..units.start.max(at));
            kept += units.end - units.start.max(at).min(units.end);
            at = at.max(units.end);
        }
        epoch.exclude(at..size.div_ceil(epoch.unit.bytes()).max(at));
        kept * epoch.unit.bytes()
    }

    /// The bytes that are to be kept in the current epoch; without those that are in the target
    /// if `target_is_safe`.
    pub(crate) fn not_copied(&self, target_is_safe: bool) -> Vec<Range<u64>> {
        let (epoch, size) = (self.epoch(), self.source.size());
        let units = epoch.missing(size.div_ceil(epoch.unit.bytes()), target_is_safe);
        units.iter().map(|units| epoch.unit.bytes_of(units, size)).collect()
    }

    /// Lets go of the target, for good: nothing is copied any more, and the snapshot is lost.
    pub(crate) fn release_target(&self) {
        let unit = self.epoch().unit;
        let over = Epoch::new(Arc::clone(&self.source), unit, Copied::Nothing);
        over.set_broken();
        self.state().epoch = Arc::new(over);
    }

    /// Reads the source at any alignment.
    pub(crate) async fn read_source(&self, offset: u64, len: u64) -> Result<Bytes> {
        read_aligned(&*self.source, offset, len).await
    }

    pub(crate) fn epoch(&self) -> Arc<Epoch> {
        Arc::clone(&self.state().epoch)
    }

    /// Counts an operation as in flight, and pins its epoch.
    pub(crate) fn enter(self: &Arc<Self>) -> Ticket {
        let mut state = self.state();
        state.in_flight += 1;
        Ticket { epoch: Arc::clone(&state.epoch), shared: Arc::clone(self) }
    }

    pub(crate) async fn drain(&self) {
        loop {
            // Created before the look, so that no wake-up is missed.
            let idle = self.idle.notified();
            if self.state().in_flight == 0 {
                return;
            }
            idle.await;
        }
    }

    async fn drain_ahead(&self) {
        loop {
            let ended = self.copies_ended.notified();
            if self.copies_ahead.load(Ordering::SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }

    /// After copying was switched off: waits until the copies in flight have ended. Unlike
    /// [`drain`](Self::drain) this ends also under load.
    pub(crate) async fn drain_copies(&self) {
        loop {
            let ended = self.copies_ended.notified();
            if self.copies.load(Ordering::SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent whenever the lock is released, by a panic too.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that may be copying.
pub(crate) struct Copying<'a>(&'a Shared);

impl<'a> Copying<'a> {
    pub(crate) fn new(shared: &'a Shared) -> Self {
        shared.copies.fetch_add(1, Ordering::SeqCst);
        Copying(shared)
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        if self.0.copies.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.copies_ended.notify_waiters();
        }
    }
}

/// A copy ahead.
struct CopyingAhead<'a>(&'a Shared);

impl<'a> CopyingAhead<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.copies_ahead.fetch_add(1, Ordering::SeqCst);
        CopyingAhead(shared)
    }
}

impl Drop for CopyingAhead<'_> {
    fn drop(&mut self) {
        if self.0.copies_ahead.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.copies_ended.notify_waiters();
        }
    }
}

/// An operation in flight.
pub(crate) struct Ticket {
    pub(crate) epoch: Arc<Epoch>,
    shared: Arc<Shared>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.shared.idle.notify_waiters();
        }
    }
}

impl fmt::Debug for CopyBeforeWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyBeforeWrite")
            .field("name", &self.shared.name)
            .field("source", &self.shared.source.name())
            .field("target", &self.shared.epoch().target.name())
            .field("unit_bytes", &self.unit_bytes())
            .finish_non_exhaustive()
    }
}
