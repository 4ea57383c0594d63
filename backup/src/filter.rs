use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    RangeGuard, RangeLock, Result, WriteFlags, ZeroFlags, start,
};
use bytes::Bytes;
use tokio::sync::Notify;

use crate::copy::copy_units;
use crate::counters::Counters;
use crate::epoch::{Epoch, Unit};
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
    on_copy_error: OnCopyError,
    discard_as_zeroes: bool,
    enabled: AtomicBool,
    state: Mutex<State>,
    idle: Notify,
    /// Requests that may be copying.
    copies: AtomicUsize,
    copies_ended: Notify,
}

struct State {
    epoch: Arc<Epoch>,
    in_flight: usize,
}

/// What a request does to the source after the copy.
enum Change {
    Write(Bytes, WriteFlags),
    Zeroes(ZeroFlags),
    Discard,
}

impl Change {
    fn operation(&self) -> Operation {
        match self {
            Change::Write(..) => Operation::Write,
            Change::Zeroes(_) => Operation::WriteZeroes,
            Change::Discard => Operation::Discard,
        }
    }
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
            on_copy_error: options.on_copy_error,
            discard_as_zeroes: options.discard_as_zeroes,
            enabled: AtomicBool::new(true),
            state: Mutex::new(State { epoch, in_flight: 0 }),
            idle: Notify::new(),
            copies: AtomicUsize::new(0),
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
        let result = self.apply(bytes, change).await;
        drop(guard);
        result
    }

    /// Returns with the range locked and its pre-image safe.
    async fn copy_before(
        &self,
        epoch: &Epoch,
        bytes: &Range<u64>,
        operation: Operation,
    ) -> Result<RangeGuard> {
        let units = epoch.unit.covering(bytes);
        // Counted before the look at the switch: whoever switches copying off sees us, or we him.
        let copy = Copying::new(self);
        if !self.enabled.load(Ordering::SeqCst) {
            epoch.set_broken();
        }
        // What is copied stays copied while this request is in flight, so the look-up may come
        // before the lock.
        if epoch.is_broken() || epoch.holds(&units) {
            drop(copy);
            return Ok(self.locks.lock(bytes.clone(), LockMode::Exclusive).await);
        }
        let widened = epoch.unit.bytes_of(&units, self.source.size());
        let guard = self.locks.lock(widened, LockMode::Exclusive).await;
        if epoch.holds(&units) {
            return Ok(guard);
        }
        match copy_units(self, epoch, &units).await {
            Ok(()) => Ok(guard),
            Err(error) if self.on_copy_error == OnCopyError::BreakSnapshot => {
                tracing::warn!(node = %self.name, %error, "snapshot lost");
                epoch.set_broken();
                Ok(guard)
            }
            Err(error) => {
                Err(error.within(operation, &self.name, bytes.start, bytes.end - bytes.start))
            }
        }
    }

    async fn apply(&self, bytes: Range<u64>, change: Change) -> Result<()> {
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        match change {
            Change::Write(data, flags) => self.source.write(offset, data, flags).await,
            Change::Zeroes(flags) => self.source.write_zeroes(offset, len, flags).await,
            Change::Discard if self.discard_as_zeroes => {
                let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                self.source.write_zeroes(offset, len, flags).await
            }
            Change::Discard => self.source.discard(offset, len).await,
        }
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
struct Copying<'a>(&'a Shared);

impl<'a> Copying<'a> {
    fn new(shared: &'a Shared) -> Self {
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

/// Reads at any alignment, by reading the blocks around the range.
pub(crate) async fn read_aligned(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<Bytes> {
    let block = u64::from(device.limits().block_size).max(1);
    let start = offset - offset % block;
    let end = (offset + len).next_multiple_of(block).min(device.size());
    let too_long = |_| {
        Error::new(Operation::Read, ErrorKind::InvalidInput, device.name(), "too long")
            .at(offset, len)
    };
    let (wanted, head) = (
        usize::try_from(len).map_err(too_long)?,
        usize::try_from(offset - start).map_err(too_long)?,
    );
    let data = device.read(start, usize::try_from(end - start).map_err(too_long)?).await?;
    match head.checked_add(wanted) {
        Some(stop) if stop <= data.len() => Ok(data.slice(head..stop)),
        _ => {
            Err(Error::new(Operation::Read, ErrorKind::Io, device.name(), "short read")
                .at(offset, len))
        }
    }
}

fn check_unit(name: &str, unit: u64, source: &dyn BlockDevice) -> Result<()> {
    if !unit.is_power_of_two() || !(512..=1 << 30).contains(&unit) {
        let why = format!("a copy unit of {unit} bytes is no power of two from 512 to 1 GiB");
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    check_block_size(name, source, unit)
}

fn check_target(
    name: &str,
    source: &Arc<dyn BlockDevice>,
    target: &Arc<dyn BlockDevice>,
    unit: u64,
) -> Result<()> {
    if Arc::ptr_eq(source, target) {
        let why = "source and target are the same device".to_owned();
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    // Some formats know whole sectors only.
    let size = source.size();
    if target.size() != size && Some(target.size()) != size.checked_next_multiple_of(512) {
        let why = format!(
            "Source and target image have different sizes ({}: {} bytes, {}: {} bytes)",
            source.name(),
            size,
            target.name(),
            target.size()
        );
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    if target.limits().read_only {
        let why = format!("the target {} is read-only", target.name());
        return Err(control_error(name, ErrorKind::ReadOnly, why));
    }
    check_block_size(name, &**target, unit)
}

fn check_block_size(name: &str, device: &dyn BlockDevice, unit: u64) -> Result<()> {
    let block = u64::from(device.limits().block_size);
    if block > unit {
        let why = format!(
            "a copy unit of {unit} bytes is smaller than the block size of {} ({block} bytes)",
            device.name()
        );
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    Ok(())
}

fn control_error(name: &str, kind: ErrorKind, why: String) -> Error {
    Error::new(Operation::Control, kind, name, why)
}
