//! Copies of whole devices: what arrives, what is left out, and that no error is ever lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use brep_block::{
    BlockDevice, BlockStatus, CopyOptions, Count, ErrorKind, Fault, FlushLevel, Io, Limits, Memory,
    Operation, Rule, StatusFlags, WriteFlags, ZeroFlags, copy_device,
};
use bytes::Bytes;
use tokio::time::timeout;

const PIECE_LEN: u32 = 4096;
const PATIENCE: Duration = Duration::from_secs(10);

fn options() -> CopyOptions {
    CopyOptions { requests_max: 8, request_len: PIECE_LEN, ..CopyOptions::default() }
}

/// Bytes of which none is zero, and that tell the place that they belong to.
fn pattern(len: usize) -> Bytes {
    (0..len).map(|at| (at / 512 % 255 + 1) as u8).collect()
}

async fn filled(name: &str, size: u64, filled: u64) -> Arc<dyn BlockDevice> {
    let device = Memory::new(name, size);
    device.write(0, pattern(filled as usize), WriteFlags::default()).await.unwrap();
    device
}

async fn contents(device: &Arc<dyn BlockDevice>) -> Bytes {
    device.read(0, device.size() as usize).await.unwrap()
}

async fn copy(
    source: &Arc<dyn BlockDevice>,
    target: &Arc<dyn BlockDevice>,
    options: &CopyOptions,
) -> brep_block::Result<u64> {
    let done = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&done);
    let progress = move |len| {
        told.fetch_add(len, Ordering::Relaxed);
    };
    timeout(PATIENCE, copy_device(source, target, options, progress)).await.expect("it hangs")?;
    Ok(done.load(Ordering::Relaxed))
}

/// A device that takes whole blocks only, and may know nothing of holes.
#[derive(Debug)]
struct Blocks {
    inner: Arc<dyn BlockDevice>,
    block_size: u32,
    knows_holes: bool,
}

impl Blocks {
    fn check(&self, offset: u64, len: u64) {
        let block = u64::from(self.block_size);
        assert!(offset.is_multiple_of(block), "{offset} is no whole block");
        let end = offset + len;
        assert!(end.is_multiple_of(block) || end == self.inner.size(), "{end} is no whole block");
    }
}

impl BlockDevice for Blocks {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        Limits { block_size: self.block_size, ..self.inner.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.check(offset, len as u64);
        self.inner.read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.check(offset, data.len() as u64);
        self.inner.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.check(offset, len);
        self.inner.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.inner.discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.check(offset, len);
        if !self.knows_holes {
            let flags = StatusFlags { data: true, zero: false, allocated: true };
            return Io::ok(BlockStatus { len, flags });
        }
        self.inner.block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.inner.flush(level)
    }
}

#[tokio::test]
async fn everything_arrives_and_every_byte_is_told_once() {
    for size in [0, 1, 511, 4096, 100_000, 1 << 20] {
        let source = filled("source", size, size * 3 / 4).await;
        let target = filled("target", size, size).await;
        assert_eq!(copy(&source, &target, &options()).await.unwrap(), size);
        assert_eq!(contents(&source).await, contents(&target).await, "{size} bytes");
    }
}

#[tokio::test]
async fn what_lies_beyond_the_source_stays_and_a_shorter_target_is_refused() {
    let source = filled("source", 100_000, 100_000).await;
    let longer = filled("target", 200_000, 200_000).await;
    copy(&source, &longer, &options()).await.unwrap();
    assert_eq!(contents(&longer).await[100_000..], pattern(200_000)[100_000..]);
    let shorter: Arc<dyn BlockDevice> = Memory::new("target", 99_999);
    let refused = copy(&source, &shorter, &options()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
}

#[tokio::test]
async fn zeroes_are_found_and_take_no_space() {
    let inner = filled("source", 4 << 20, 4 << 20).await;
    inner.write(1 << 20, vec![0; 2 << 20].into(), WriteFlags::default()).await.unwrap();
    let source: Arc<dyn BlockDevice> =
        Arc::new(Blocks { inner, block_size: 1, knows_holes: false });
    for (sparse_len, allocated) in [(4096, 2 << 20), (0, 4 << 20)] {
        let target = Memory::new("target", 4 << 20);
        let device: Arc<dyn BlockDevice> = Arc::clone(&target) as _;
        copy(&source, &device, &CopyOptions { sparse_len, ..options() }).await.unwrap();
        assert_eq!(contents(&source).await, contents(&device).await);
        assert_eq!(target.allocated_bytes(), allocated, "sparse_len {sparse_len}");
    }
}

#[tokio::test]
async fn a_target_that_is_zero_is_not_zeroed_unless_it_shall_occupy_space() {
    let source = filled("source", 4 << 20, 1 << 20).await;
    let zeroed = async |target_is_zero, allocate| {
        let target = Count::new(Memory::new("target", 4 << 20));
        let device: Arc<dyn BlockDevice> = Arc::clone(&target) as _;
        let options = CopyOptions { target_is_zero, allocate, ..options() };
        copy(&source, &device, &options).await.unwrap();
        let asked = target.of(Operation::BlockStatus).operations;
        (target.of(Operation::WriteZeroes).bytes, asked > 0)
    };
    assert_eq!(zeroed(true, false).await, (0, false));
    // It is asked, and says that it is zero.
    assert_eq!(zeroed(false, false).await, (0, true));
    assert_eq!(zeroed(true, true).await, (3 << 20, false));
}

#[tokio::test]
async fn blocks_of_either_side_are_kept() {
    for (from, to) in [(1, 65536), (4096, 512), (512, 4096)] {
        let memory = Memory::new("source", 1 << 20);
        for (at, len) in [(0, 700), (70_000, 1), (300_000, 100_000), (1_048_575, 1)] {
            let data = pattern(len);
            memory.write(at, data, WriteFlags::default()).await.unwrap();
        }
        let source: Arc<dyn BlockDevice> =
            Arc::new(Blocks { inner: memory, block_size: from, knows_holes: true });
        let inner = filled("target", 1 << 20, 1 << 20).await;
        let target: Arc<dyn BlockDevice> =
            Arc::new(Blocks { inner, block_size: to, knows_holes: true });
        copy(&source, &target, &options()).await.unwrap();
        assert_eq!(contents(&source).await, contents(&target).await, "{from} to {to}");
    }
    let source = filled("source", 1000, 1000).await;
    let inner: Arc<dyn BlockDevice> = Memory::new("target", 2048);
    let target: Arc<dyn BlockDevice> =
        Arc::new(Blocks { inner, block_size: 512, knows_holes: true });
    let refused = copy(&source, &target, &options()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput, "half a block cannot be written");
}

#[tokio::test]
async fn an_error_at_the_nth_of_many_requests_is_never_lost() {
    const PIECES: u64 = 24;
    let size = PIECES * u64::from(PIECE_LEN);
    for operation in [Operation::Read, Operation::Write, Operation::BlockStatus] {
        let last = if operation == Operation::BlockStatus { 1 } else { PIECES };
        for n in 1..=last {
            let source = Fault::new(filled("source", size, size).await);
            let target = Fault::new(Memory::new("target", size));
            // Those before it are still under way when it fails, or have just ended.
            let slow = if n % 2 == 0 { Operation::Read } else { Operation::Write };
            source.delay(Rule::new(slow).forever(), Duration::from_millis(1));
            target.delay(Rule::new(slow).forever(), Duration::from_millis(1));
            let failing = if operation == Operation::Write { &target } else { &source };
            failing.clear();
            failing.fail(Rule::new(operation).nth(n).errno(5));
            let (source, target): (Arc<dyn BlockDevice>, Arc<dyn BlockDevice>) = (source, target);
            let error = copy(&source, &target, &options()).await.unwrap_err();
            assert_eq!((error.operation(), error.errno()), (operation, 5), "{operation} {n}");
            if operation != Operation::BlockStatus {
                assert_eq!(error.length(), u64::from(PIECE_LEN), "{error}");
                assert!(error.offset().is_multiple_of(u64::from(PIECE_LEN)), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn an_error_while_zeroing_is_never_lost() {
    let source: Arc<dyn BlockDevice> = Memory::new("source", 1 << 20);
    for operation in [Operation::BlockStatus, Operation::WriteZeroes] {
        let target = Fault::new(filled("target", 1 << 20, 1 << 20).await);
        target.fail(Rule::new(operation));
        let target: Arc<dyn BlockDevice> = target;
        let error = copy(&source, &target, &options()).await.unwrap_err();
        assert_eq!(error.operation(), operation);
    }
}

#[tokio::test]
async fn after_an_error_nothing_is_begun_and_what_had_been_begun_is_waited_for() {
    let size = 64 * u64::from(PIECE_LEN);
    let source = Count::new(filled("source", size, size).await);
    let faults = Fault::new(Memory::new("target", size));
    let hang = faults.hang(Rule::new(Operation::Write).range(0..u64::from(PIECE_LEN)));
    faults.fail(Rule::new(Operation::Write).range(u64::from(PIECE_LEN)..size));
    let (device, target): (Arc<dyn BlockDevice>, Arc<dyn BlockDevice>) =
        (Arc::clone(&source) as _, Arc::clone(&faults) as _);
    let copying = tokio::spawn(async move { copy(&device, &target, &options()).await });
    timeout(PATIENCE, hang.reached(1)).await.expect("the first write begins");
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(!copying.is_finished(), "a write is under way");
    assert!(source.of(Operation::Read).operations <= 10, "no more than were under way");
    hang.release();
    let error = timeout(PATIENCE, copying).await.expect("it hangs").unwrap().unwrap_err();
    assert_eq!(error.offset(), u64::from(PIECE_LEN), "{error}");
}

#[tokio::test]
async fn as_many_requests_are_in_flight_as_were_allowed_and_no_more() {
    let size = 64 * u64::from(PIECE_LEN);
    let source = filled("source", size, size).await;
    let faults = Fault::new(Memory::new("target", size));
    let hang = faults.hang(Rule::new(Operation::Write).forever());
    let counted = Count::new(Arc::clone(&faults) as _);
    let target: Arc<dyn BlockDevice> = Arc::clone(&counted) as _;
    let copying = tokio::spawn(async move { copy(&source, &target, &options()).await });
    timeout(PATIENCE, hang.reached(8)).await.expect("eight at a time");
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(counted.of(Operation::Write).operations, 8);
    faults.clear();
    hang.release();
    timeout(PATIENCE, copying).await.expect("it hangs").unwrap().unwrap();
}

#[tokio::test]
async fn what_is_being_zeroed_at_a_time_is_bounded() {
    let size = 256 << 20;
    let source: Arc<dyn BlockDevice> = Memory::new("source", size);
    let faults = Fault::new(Memory::new("target", size));
    let counted = Count::new(Arc::clone(&faults) as _);
    let target = Arc::clone(&counted) as Arc<dyn BlockDevice>;
    let hang = faults.hang(Rule::new(Operation::WriteZeroes).forever());
    let copying = tokio::spawn(async move {
        // Zeroes that have to be written.
        let options = CopyOptions { allocate: true, ..CopyOptions::default() };
        copy(&source, &target, &options).await
    });
    timeout(PATIENCE, hang.reached(4)).await.expect("begun");
    // Whoever could begin has had a turn.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let zeroing = counted.of(Operation::WriteZeroes).bytes;
    assert!(zeroing <= 128 << 20, "{zeroing} bytes at a time");
    faults.clear();
    hang.release();
    assert_eq!(timeout(PATIENCE, copying).await.expect("it hangs").unwrap().unwrap(), size);
}
