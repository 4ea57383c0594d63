use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::device::check_request_write;
use crate::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    RangeLock, Result, WriteFlags, ZeroFlags, is_zero, start,
};

/// What stable storage writes as a whole.
const SECTOR_BYTES: u64 = 512;
/// Most bytes that are read, or kept or lost, at a time.
const PIECE_BYTES_MAX: u64 = 64 << 10;
/// Pieces of a long change of zeroes that are kept or lost one by one.
const ZERO_PIECES_MAX: u64 = 1024;

/// The power that several devices share, and lose together.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), brep_block::Error> {
/// use brep_block::{BlockDevice, FlushLevel, Memory, Power};
/// let stable = Memory::new("disk", 1 << 20);
/// let power = Power::new();
/// let disk = power.device(stable.clone());
/// disk.write(0, "safe".into(), Default::default()).await?;
/// disk.flush(FlushLevel::Durable).await?;
/// disk.write(512, "perhaps".into(), Default::default()).await?;
/// power.cut(42).await?;
/// // The device is gone; what was below it holds what a restart would find.
/// assert!(disk.read(0, 4).await.is_err());
/// assert_eq!(stable.read(0, 4).await?, "safe".as_bytes());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Power {
    off: AtomicBool,
    /// Changes and durable flushes that have begun.
    operations: AtomicU64,
    /// The operation under which the power goes, counted from 1; 0 for none.
    fail_at: AtomicU64,
    /// How often a durable flush gives way to other tasks before it has ended.
    flush_yields: AtomicU64,
    devices: Mutex<Vec<Arc<Core>>>,
}

/// What became of the changes that were not flushed when the power went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PowerCut {
    /// Pieces (sectors, or more of a long run of zeroes) that had reached stable storage.
    pub kept: u64,
    /// Pieces that had not.
    pub lost: u64,
    /// Changes of which some pieces were kept and others lost.
    pub torn: u64,
}

/// A device over a volatile cache: what was not flushed durably when the power goes is kept, lost
/// or torn.
///
/// The device below is what everybody reads, so that a kill of a process loses nothing. On a
/// [`cut`](Power::cut) it is changed to what stable storage would hold: every sector of 512 bytes
/// of each change since the last durable flush is there or not, independently of the others. A
/// sector that was changed several times may hold any of the versions. Sectors are atomic. A
/// growth of the device is kept with what was written there.
///
/// For tests: what is not flushed stays in memory, without a bound.
#[derive(Debug)]
pub struct PowerLoss {
    core: Arc<Core>,
}

#[derive(Debug)]
struct Core {
    inner: Arc<dyn BlockDevice>,
    power: Arc<Power>,
    /// Held by a change over reading what was there and writing; by a cut over everything.
    locks: RangeLock,
    cache: Mutex<Cache>,
}

#[derive(Debug)]
struct Cache {
    unflushed: Vec<Unflushed>,
    next_id: u64,
    stable_size: u64,
}

#[derive(Debug)]
struct Unflushed {
    id: u64,
    change: Change,
    /// It went past the cache (FUA).
    durable: bool,
    /// What was there before; `None` for zeroes.
    before: Vec<(Range<u64>, Option<Bytes>)>,
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Bytes),
    Zero { offset: u64, len: u64, may_unmap: bool },
    Truncate(u64),
}

impl Power {
    /// Power that is on, with no device yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Power {
            off: AtomicBool::new(false),
            operations: AtomicU64::new(0),
            fail_at: AtomicU64::new(0),
            flush_yields: AtomicU64::new(0),
            devices: Mutex::default(),
        })
    }

    /// `inner`, under the same name, behind a volatile cache that this power feeds. What `inner`
    /// holds now counts as stable. Nobody else may change it before the power is cut.
    #[must_use]
    pub fn device(self: &Arc<Self>, inner: Arc<dyn BlockDevice>) -> Arc<PowerLoss> {
        let stable_size = inner.size();
        let core = Arc::new(Core {
            inner,
            power: Arc::clone(self),
            locks: RangeLock::new(),
            cache: Mutex::new(Cache { unflushed: Vec::new(), next_id: 0, stable_size }),
        });
        lock(&self.devices).push(Arc::clone(&core));
        Arc::new(PowerLoss { core })
    }

    /// How many changes and durable flushes have begun, on all devices.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    /// The power goes under the `nth` change or durable flush from now on, counted from 1: it gets
    /// no answer but an error, and neither does anything after it. What it changes is one more
    /// thing that is kept, lost or torn.
    pub fn fail_after(&self, nth: u64) {
        self.fail_at.store(self.operations() + nth, Ordering::SeqCst);
    }

    /// Durable flushes give way to other tasks this often before they end: what is written
    /// meanwhile is not covered by them.
    pub fn set_flush_yields(&self, yields: u64) {
        self.flush_yields.store(yields, Ordering::SeqCst);
    }

    /// Whether the power is gone.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.off.load(Ordering::SeqCst)
    }

    /// Takes the power from all devices, for good, and leaves below each what stable storage
    /// holds: what was flushed, and of the rest what `seed` says. The devices below are then free
    /// to be opened again.
    ///
    /// # Errors
    /// A device below fails.
    pub async fn cut(&self, seed: u64) -> Result<PowerCut> {
        self.off.store(true, Ordering::SeqCst);
        let mut random = Random(seed);
        // Everything, nothing, and what lies between: each is a case of its own.
        let keep_of_4 = random.below(5);
        let devices = std::mem::take(&mut *lock(&self.devices));
        let mut cut = PowerCut::default();
        for device in devices {
            device.lose(&mut random, keep_of_4, &mut cut).await?;
        }
        Ok(cut)
    }

    /// Counts a change or a flush. True: the power goes under it.
    fn goes_now(&self) -> bool {
        let count = self.operations.fetch_add(1, Ordering::SeqCst) + 1;
        let goes = self.fail_at.load(Ordering::SeqCst) == count;
        if goes {
            self.off.store(true, Ordering::SeqCst);
        }
        goes
    }
}

impl PowerLoss {
    /// How many changes wait for a durable flush.
    #[must_use]
    pub fn unflushed(&self) -> usize {
        lock(&self.core.cache).unflushed.len()
    }

    fn change(&self, operation: Operation, change: Change, durable: bool) -> Io<'_, ()> {
        let core = Arc::clone(&self.core);
        match core.check_power(operation).and_then(|()| core.admit(operation, &change)) {
            Ok(true) => {}
            Ok(false) => return Io::ok(()),
            Err(error) => return Io::err(error),
        }
        let goes_now = core.power.goes_now();
        let range = change.range(core.inner.size());
        let turn = core.locks.lock(range.clone(), LockMode::Exclusive);
        start(async move {
            let _guard = turn.await;
            let before = core.read_before(range).await?;
            {
                let mut cache = lock(&core.cache);
                let id = cache.next_id;
                cache.next_id += 1;
                let durable = durable && !goes_now;
                cache.unflushed.push(Unflushed { id, change: change.clone(), durable, before });
            }
            change.apply(&*core.inner).await?;
            // Who is cut off hears no success.
            core.check_power(operation)
        })
    }
}

impl Core {
    fn check_power(&self, operation: Operation) -> Result<()> {
        let off = self.power.is_off();
        let error = || {
            Error::new(operation, ErrorKind::NotConnected, self.inner.name(), "the power is off")
        };
        if off { Err(error()) } else { Ok(()) }
    }

    /// Checks a change; false if there is nothing to do.
    fn admit(&self, operation: Operation, change: &Change) -> Result<bool> {
        let (offset, len) = match change {
            Change::Write(offset, data) => (*offset, data.len() as u64),
            Change::Zero { offset, len, .. } => (*offset, *len),
            Change::Truncate(_) => return Ok(true),
        };
        let (size, limits) = (self.inner.size(), self.inner.limits());
        check_request_write(self.inner.name(), size, &limits, operation, offset, len)?;
        Ok(len > 0)
    }

    /// What a range holds, as far as the device reaches.
    async fn read_before(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Option<Bytes>)>> {
        let end = range.end.min(self.inner.size());
        let mut before = Vec::new();
        let mut at = range.start;
        while at < end {
            let status = self.inner.block_status(at, end - at).await?;
            let extent_end = at + status.len.clamp(1, end - at);
            if status.flags.zero {
                before.push((at..extent_end, None));
                at = extent_end;
                continue;
            }
            let piece = at..extent_end.min(at + PIECE_BYTES_MAX);
            let data = self.inner.read(at, (piece.end - at) as usize).await?;
            at = piece.end;
            before.push((piece, (!is_zero(&data)).then_some(data)));
        }
        Ok(before)
    }

    async fn lose(&self, random: &mut Random, keep_of_4: u64, cut: &mut PowerCut) -> Result<()> {
        // Waits for what is under way: nobody hears how it ends.
        let _all = self.locks.lock(0..u64::MAX, LockMode::Exclusive).await;
        let (unflushed, stable_size) = {
            let mut cache = lock(&self.cache);
            (std::mem::take(&mut cache.unflushed), cache.stable_size)
        };
        for (range, data) in unflushed.iter().rev().flat_map(|u| &u.before) {
            match data {
                Some(data) => Change::Write(range.start, data.clone()),
                None => Change::zero(range),
            }
            .apply(&*self.inner)
            .await?;
        }
        if self.inner.size() != stable_size {
            self.inner.truncate(stable_size).await?;
        }
        for Unflushed { change, durable, .. } in &unflushed {
            let (mut kept, mut lost) = (0, 0);
            for piece in change.pieces() {
                if *durable || random.below(4) < keep_of_4 {
                    piece.apply(&*self.inner).await?;
                    kept += 1;
                } else {
                    lost += 1;
                }
            }
            cut.kept += kept;
            cut.lost += lost;
            cut.torn += u64::from(kept > 0 && lost > 0);
        }
        Ok(())
    }

    async fn flush_durably(&self) -> Result<()> {
        let covered = lock(&self.cache).next_id;
        self.inner.flush(FlushLevel::Process).await?;
        for _ in 0..self.power.flush_yields.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
        let mut cache = lock(&self.cache);
        self.check_power(Operation::Flush)?;
        let Cache { unflushed, stable_size, .. } = &mut *cache;
        unflushed.retain(|entry| {
            let flushed = entry.id < covered;
            if flushed {
                entry.change.grow(stable_size);
            }
            !flushed
        });
        Ok(())
    }
}

impl Change {
    fn zero(range: &Range<u64>) -> Self {
        Change::Zero { offset: range.start, len: range.end - range.start, may_unmap: true }
    }

    /// What it touches in a device of this size.
    fn range(&self, size: u64) -> Range<u64> {
        match self {
            Change::Write(offset, data) => *offset..offset.saturating_add(data.len() as u64),
            Change::Zero { offset, len, .. } => *offset..offset.saturating_add(*len),
            Change::Truncate(to) => (*to).min(size)..u64::MAX,
        }
    }

    fn grow(&self, size: &mut u64) {
        match self {
            Change::Write(offset, data) => *size = (*size).max(offset + data.len() as u64),
            Change::Zero { offset, len, .. } => *size = (*size).max(offset + len),
            Change::Truncate(to) => *size = *to,
        }
    }

    async fn apply(&self, device: &dyn BlockDevice) -> Result<()> {
        match self {
            Change::Write(offset, data) => {
                device.write(*offset, data.clone(), WriteFlags::default()).await
            }
            Change::Zero { offset, len, may_unmap } => {
                let flags = ZeroFlags { may_unmap: *may_unmap, ..ZeroFlags::default() };
                device.write_zeroes(*offset, *len, flags).await
            }
            Change::Truncate(size) => device.truncate(*size).await,
        }
    }

    /// What reaches stable storage as a whole.
    fn pieces(&self) -> impl Iterator<Item = Change> + '_ {
        let range = match self {
            Change::Write(offset, data) => *offset..offset + data.len() as u64,
            Change::Zero { offset, len, .. } => *offset..offset + len,
            // One piece.
            Change::Truncate(_) => 0..1,
        };
        let step = match self {
            Change::Zero { len, .. } => (len / ZERO_PIECES_MAX).max(SECTOR_BYTES),
            _ => SECTOR_BYTES,
        };
        let mut at = range.start;
        std::iter::from_fn(move || {
            let from = at;
            at = (from - from % step + step).min(range.end);
            (from < range.end).then(|| match self {
                Change::Write(offset, data) => Change::Write(
                    from,
                    data.slice((from - offset) as usize..(at - offset) as usize),
                ),
                Change::Zero { .. } => Change::zero(&(from..at)),
                Change::Truncate(size) => Change::Truncate(*size),
            })
        })
    }
}

impl BlockDevice for PowerLoss {
    fn name(&self) -> &str {
        self.core.inner.name()
    }

    fn size(&self) -> u64 {
        self.core.inner.size()
    }

    fn limits(&self) -> Limits {
        self.core.inner.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        match self.core.check_power(Operation::Read) {
            Ok(()) => self.core.inner.read(offset, len),
            Err(error) => Io::err(error),
        }
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.change(Operation::Write, Change::Write(offset, data), flags.fua)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if flags.fast && !self.limits().fast_zero {
            return self.core.inner.write_zeroes(offset, len, flags);
        }
        let change = Change::Zero { offset, len, may_unmap: flags.may_unmap };
        self.change(Operation::WriteZeroes, change, flags.fua)
    }

    /// Carried out as a write of zeroes.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        if let Err(error) = <dyn BlockDevice>::check_range(self, Operation::Discard, offset, len) {
            return Io::err(error);
        }
        let change = Change::Zero { offset, len, may_unmap: true };
        self.change(Operation::Discard, change, false)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        match self.core.check_power(Operation::BlockStatus) {
            Ok(()) => self.core.inner.block_status(offset, len),
            Err(error) => Io::err(error),
        }
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        if let Err(error) = self.core.check_power(Operation::Flush) {
            return Io::err(error);
        }
        if level == FlushLevel::Process {
            return self.core.inner.flush(level);
        }
        self.core.power.goes_now();
        let core = Arc::clone(&self.core);
        start(async move { core.flush_durably().await })
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.change(Operation::Truncate, Change::Truncate(size), false)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that can panic runs under such a lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SplitMix64: what a seed decides is the same everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}
