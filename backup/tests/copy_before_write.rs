//! The copy rule, case by case (spec: backup, replication cases D11 and D21 to D28).

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use brep_backup::{CbwOptions, Copied, CopyBeforeWrite, OnCopyError, SnapshotAccess};
use brep_block::{
    BlockDevice, ErrorKind, FlushLevel, Limits, Operation, Result, WriteFlags, ZeroFlags,
};
use bytes::Bytes;
use common::Probe;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

struct Rig {
    source: Arc<Probe>,
    target: Arc<Probe>,
    filter: Arc<CopyBeforeWrite>,
    view: Arc<SnapshotAccess>,
}

fn rig(size: u64, options: CbwOptions) -> Rig {
    let (source, target) = (Probe::new("disk", size), Probe::new("hidden", size));
    source.fill(0x11);
    let filter = CopyBeforeWrite::new(source.clone(), target.clone(), options).unwrap();
    let view = SnapshotAccess::new("view", &filter);
    Rig { source, target, filter, view }
}

fn rig_64k(size: u64) -> Rig {
    rig(size, CbwOptions::new("cbw"))
}

impl Rig {
    async fn write(&self, offset: u64, len: u64, byte: u8) -> Result<()> {
        let data = Bytes::from(vec![byte; len as usize]);
        self.filter.write(offset, data, WriteFlags::default()).await
    }

    async fn snapshot(&self) -> Vec<u8> {
        self.view.read(0, self.source.size() as usize).await.unwrap().to_vec()
    }

    /// Data and zeroes written to the target since the last call.
    fn copies(&self) -> Vec<(u64, u64)> {
        self.target.take(Operation::Write)
    }
}

#[tokio::test]
async fn d11_a_failed_copy_fails_the_write_and_leaves_the_source_alone() {
    let rig = rig_64k(MIB);
    rig.target.fail_if(|op| op.operation == Operation::Write);
    let error = rig.write(4096, 512, 0x22).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!((error.node(), error.offset(), error.length()), ("cbw", 4096, 512));
    assert!(error.detail().contains("from disk to hidden"), "{error}");
    assert!(rig.source.content().iter().all(|&b| b == 0x11));
    assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
    assert_eq!(rig.filter.stats().failures, 1);

    rig.target.repair();
    rig.copies();
    rig.write(4096, 512, 0x22).await.unwrap();
    assert_eq!(rig.copies(), [(0, 64 * KIB)], "the units were still to copy");
    assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
    assert_eq!(rig.source.content_of(4096, 512), [0x22; 512]);
}

#[tokio::test]
async fn d21_a_write_across_a_unit_boundary_copies_both_units_in_one_call() {
    let rig = rig_64k(MIB);
    rig.write(64 * KIB - 256, 512, 0x22).await.unwrap();
    assert_eq!(rig.copies(), [(0, 128 * KIB)]);
    assert_eq!(rig.source.take(Operation::Read), [(0, 128 * KIB)]);
    assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
    let stats = rig.filter.stats();
    assert_eq!((stats.copied_units, stats.copied_bytes), (2, 128 * KIB));
}

#[tokio::test]
async fn d22_the_same_write_again_copies_nothing() {
    let rig = rig_64k(MIB);
    rig.write(64 * KIB - 256, 512, 0x22).await.unwrap();
    rig.copies();
    let before = rig.target.content();
    rig.write(64 * KIB - 256, 512, 0x33).await.unwrap();
    assert_eq!(rig.target.log(), [], "not even a flush");
    assert_eq!(rig.target.content(), before);
}

#[tokio::test]
async fn d23_after_a_checkpoint_units_are_copied_again_with_the_content_of_the_checkpoint() {
    let rig = rig_64k(MIB);
    rig.write(64 * KIB - 256, 512, 0x22).await.unwrap();
    rig.filter.checkpoint().unwrap();
    let at_checkpoint = rig.source.content();
    rig.copies();
    rig.write(64 * KIB - 256, 512, 0x33).await.unwrap();
    assert_eq!(rig.copies(), [(0, 128 * KIB)]);
    assert_eq!(rig.target.content_of(0, 128 << 10), at_checkpoint[..128 << 10]);
    assert_eq!(rig.snapshot().await, at_checkpoint);
}

#[tokio::test]
async fn d25_a_unit_shows_its_old_content_after_a_write() {
    let rig = rig_64k(MIB);
    rig.write(0, 64 * KIB, 0x22).await.unwrap();
    let half = rig.view.read(0, 32 << 10).await.unwrap();
    assert!(half.iter().all(|&b| b == 0x11));
}

#[tokio::test]
async fn snapshot_access_decides_unit_by_unit() {
    let rig = rig_64k(MIB);
    // A range that begins copied and goes on not copied, and the other way round.
    rig.write(64 * KIB, 64 * KIB, 0x22).await.unwrap();
    rig.write(3 * 64 * KIB, 64 * KIB, 0x33).await.unwrap();
    for (first, last) in [(1, 2), (0, 1), (1, 3), (0, 4)] {
        let (offset, end) = (first * 64 * KIB + 100, last * 64 * KIB + 200);
        let data = rig.view.read(offset, (end - offset) as usize).await.unwrap();
        assert!(data.iter().all(|&b| b == 0x11), "units {first} to {last}");
        let status = rig.view.block_status(offset, end - offset).await.unwrap();
        assert_eq!(status.len, 64 * KIB - 100, "one unit, one device");
    }
}

#[tokio::test]
async fn d26_two_writes_to_one_unit_share_one_copy_and_wait_for_it() {
    let rig = rig_64k(MIB);
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    let data = |byte| Bytes::from(vec![byte; 512]);
    // Calling starts them; neither is polled by us yet.
    let first = rig.filter.write(0, data(0x22), WriteFlags::default());
    let second = rig.filter.write(512, data(0x33), WriteFlags::default());
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert_eq!(rig.source.take(Operation::Write), [], "nothing overwritten before the copy");
    assert_eq!(rig.filter.in_flight(), 2);
    gate.add_permits(100);
    first.await.unwrap();
    second.await.unwrap();
    assert_eq!(rig.copies(), [(0, 64 * KIB)]);
    assert_eq!(rig.source.take(Operation::Write), [(0, 512), (512, 512)]);
}

#[tokio::test]
async fn a_second_write_retries_the_copy_that_failed_for_the_first() {
    let rig = rig_64k(MIB);
    let gate = rig.source.hold_if(|op| op.operation == Operation::Read);
    let attempts = AtomicU64::new(0);
    rig.target.fail_if(move |op| {
        op.operation == Operation::Write && attempts.fetch_add(1, Ordering::Relaxed) == 0
    });
    let data = |byte| Bytes::from(vec![byte; 512]);
    let first = rig.filter.write(0, data(0x22), WriteFlags::default());
    let second = rig.filter.write(512, data(0x33), WriteFlags::default());
    gate.add_permits(100);
    first.await.unwrap_err();
    second.await.unwrap();
    assert_eq!(rig.copies(), [(0, 64 * KIB), (0, 64 * KIB)]);
    assert_eq!(rig.source.content_of(0, 512), [0x11; 512]);
    assert_eq!(rig.source.content_of(512, 512), [0x33; 512]);
}

#[tokio::test]
async fn d27_the_last_unit_may_be_short() {
    let rig = rig_64k(MIB + 512);
    rig.write(MIB, 512, 0x22).await.unwrap();
    assert_eq!(rig.copies(), [(MIB, 512)]);
    assert_eq!(rig.filter.stats().copied_units, 1);
    assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
}

#[tokio::test]
async fn a_last_unit_that_ends_within_a_sector_is_copied_too() {
    let rig = rig_64k(MIB + 7);
    rig.write(MIB + 3, 4, 0x22).await.unwrap();
    assert_eq!(rig.copies(), [(MIB, 7)]);
    assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
}

#[tokio::test]
async fn d28_discard_and_zeroes_copy_first() {
    for discard in [false, true] {
        let rig = rig_64k(MIB);
        if discard {
            rig.filter.discard(70_000, 100).await.unwrap();
        } else {
            rig.filter.write_zeroes(70_000, 100, ZeroFlags::default()).await.unwrap();
        }
        assert_eq!(rig.copies(), [(64 * KIB, 64 * KIB)], "discard: {discard}");
        assert_eq!(rig.source.content_of(70_000, 100), [0; 100]);
        assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
    }
}

#[tokio::test]
async fn a_discard_that_must_zero_becomes_a_write_of_zeroes() {
    let mut options = CbwOptions::new("replica");
    options.discard_as_zeroes = true;
    let rig = rig(MIB, options);
    rig.filter.discard(0, 4096).await.unwrap();
    assert_eq!(rig.source.take(Operation::WriteZeroes), [(0, 4096)]);
    assert_eq!(rig.source.take(Operation::Discard), []);
}

#[tokio::test]
async fn zero_units_become_zeroes_on_the_target() {
    let rig = rig(MIB, CbwOptions::new("cbw").unit_bytes(2048));
    let zeroes = Bytes::from(vec![0; 4096]);
    rig.source.write(4096, zeroes, WriteFlags::default()).await.unwrap();
    rig.write(2048, 8192, 0x22).await.unwrap();
    assert_eq!(
        rig.target.log().iter().map(|o| (o.operation, o.offset, o.len)).collect::<Vec<_>>(),
        [
            (Operation::Write, 2048, 2048),
            (Operation::WriteZeroes, 4096, 4096),
            (Operation::Write, 8192, 2048),
            (Operation::Flush, 0, 0),
        ]
    );
    let stats = rig.filter.stats();
    assert_eq!((stats.written_bytes, stats.zero_bytes, stats.copied_units), (4096, 4096, 4));
}

#[tokio::test]
async fn large_holes_are_not_read() {
    let (source, target) = (Probe::new("disk", 1 << 34), Probe::new("hidden", 1 << 34));
    let options = CbwOptions::new("cbw").unit_bytes(2048);
    let filter = CopyBeforeWrite::new(source.clone(), target.clone(), options).unwrap();
    source.write(5 << 30, Bytes::from_static(&[9; 3]), WriteFlags::default()).await.unwrap();
    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    filter.write_zeroes(0, 1 << 34, flags).await.unwrap();
    let read: u64 = source.take(Operation::Read).iter().map(|(_, len)| len).sum();
    assert!(read <= 2 * MIB, "{read} bytes read");
    assert_eq!(target.content_of(5 << 30, 4), [9, 9, 9, 0]);
    assert_eq!(filter.stats().copied_units, 1 << 23);
}

#[tokio::test]
async fn large_requests_are_copied_in_bounded_pieces() {
    let rig = rig_64k(4 * MIB + 100);
    rig.filter.write_zeroes(0, 4 * MIB + 100, ZeroFlags::default()).await.unwrap();
    let pieces = [(0, MIB), (MIB, MIB), (2 * MIB, MIB), (3 * MIB, MIB), (4 * MIB, 100)];
    assert_eq!(rig.copies(), pieces);
}

#[tokio::test]
async fn what_is_copied_already_is_left_out_of_a_larger_copy() {
    let rig = rig_64k(MIB);
    rig.write(3 * 64 * KIB, 1, 0x22).await.unwrap();
    rig.copies();
    rig.write(0, MIB, 0x33).await.unwrap();
    assert_eq!(rig.copies(), [(0, 3 * 64 * KIB), (4 * 64 * KIB, 12 * 64 * KIB)]);
    assert!(rig.snapshot().await.iter().all(|&b| b == 0x11));
}

#[tokio::test]
async fn a_failing_barrier_fails_the_write_and_nothing_is_overwritten() {
    let rig = rig_64k(MIB);
    rig.target.fail_if(|op| op.operation == Operation::Flush);
    rig.write(0, 512, 0x22).await.unwrap_err();
    assert!(rig.source.content().iter().all(|&b| b == 0x11));
    rig.target.repair();
    rig.copies();
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.copies(), [(0, 64 * KIB)]);
}

#[tokio::test]
async fn the_barrier_comes_between_copy_and_write() {
    for (barrier, flushes) in [(Some(FlushLevel::Durable), 1), (None, 0)] {
        let mut options = CbwOptions::new("cbw");
        options.barrier = barrier;
        let rig = rig(MIB, options);
        rig.write(0, 512, 0x22).await.unwrap();
        assert_eq!(rig.target.take(Operation::Flush).len(), flushes);
    }
}

#[tokio::test]
async fn a_source_that_cannot_be_read_fails_the_write() {
    let rig = rig_64k(MIB);
    rig.source.fail_if(|op| op.operation == Operation::Read);
    let error = rig.write(0, 512, 0x22).await.unwrap_err();
    assert!(error.detail().contains("disk: read"), "{error}");
    assert_eq!(rig.source.take(Operation::Write), []);
}

#[tokio::test]
async fn break_snapshot_lets_the_write_pass_and_denies_the_view() {
    let mut options = CbwOptions::new("cbw");
    options.on_copy_error = OnCopyError::BreakSnapshot;
    let rig = rig(MIB, options);
    rig.target.fail_if(|op| op.operation == Operation::Write);
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.source.content_of(0, 512), [0x22; 512]);
    let error = rig.view.read(MIB / 2, 512).await.unwrap_err();
    assert_eq!(error.errno(), 13);
    rig.target.repair();
    rig.write(MIB / 2, 512, 0x22).await.unwrap();
    assert_eq!(rig.copies().len(), 1, "the failed attempt only: a lost snapshot is not fed");
    rig.filter.checkpoint().unwrap();
    rig.view.read(0, 512).await.unwrap();
}

#[tokio::test]
async fn a_disabled_filter_passes_through_and_gives_up_the_checkpoint() {
    let rig = rig_64k(MIB);
    rig.filter.set_enabled(false);
    rig.view.read(0, 512).await.unwrap();
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.target.log(), []);
    rig.view.read(0, 512).await.unwrap_err();
    rig.view.block_status(0, 512).await.unwrap_err();
    rig.filter.set_enabled(true);
    assert!(rig.filter.is_broken(), "enabling does not bring it back");
    rig.filter.checkpoint().unwrap();
    assert!(!rig.filter.is_broken());
    rig.write(0, 512, 0x33).await.unwrap();
    assert_eq!(rig.copies(), [(0, 64 * KIB)]);
}

#[tokio::test]
async fn a_dropped_request_goes_on_and_keeps_its_lock() {
    let rig = rig_64k(MIB);
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    drop(rig.filter.write(0, Bytes::from_static(&[0x22; 512]), WriteFlags::default()));
    assert_eq!(rig.filter.in_flight(), 1);
    assert!(rig.filter.locks().try_lock(0..1, brep_block::LockMode::Shared).is_none());
    assert!(rig.filter.checkpoint().is_err(), "a request is in flight");
    gate.add_permits(10);
    rig.filter.drain().await;
    assert_eq!(rig.source.content_of(0, 512), [0x22; 512]);
    assert!(rig.filter.locks().try_lock(0..MIB, brep_block::LockMode::Exclusive).is_some());
    rig.filter.checkpoint().unwrap();
}

#[tokio::test]
async fn a_switch_starts_over_in_the_new_target_and_returns_the_old_one() {
    let rig = rig_64k(MIB);
    rig.write(0, 512, 0x22).await.unwrap();
    let next = Probe::new("next", MIB);
    let old = rig.filter.switch_target(next.clone()).unwrap();
    assert_eq!(old.name(), "hidden");
    let at_checkpoint = rig.source.content();
    rig.copies();
    rig.write(0, 512, 0x33).await.unwrap();
    assert_eq!(rig.copies(), []);
    assert_eq!(next.take(Operation::Write), [(0, 64 * KIB)]);
    assert_eq!(rig.snapshot().await, at_checkpoint);
}

#[tokio::test]
async fn a_reader_of_the_view_holds_back_the_copy_of_what_it_reads() {
    let rig = rig_64k(MIB);
    let gate = rig.source.hold_if(|op| op.operation == Operation::Read && op.len == 100);
    let view = Arc::clone(&rig.view);
    let reader = tokio::spawn(async move { view.read(0, 100).await });
    tokio::task::yield_now().await;
    let write = rig.filter.write(200, Bytes::from_static(&[0x22]), WriteFlags::default());
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert!(rig.source.log().iter().all(|op| op.operation != Operation::Write));
    gate.add_permits(1);
    assert_eq!(reader.await.unwrap().unwrap(), vec![0x11; 100]);
    write.await.unwrap();
    assert_eq!(rig.source.content_of(200, 1), [0x22]);
}

#[tokio::test]
async fn after_a_restart_what_the_target_has_is_never_copied_again() {
    let (source, target) = (Probe::new("disk", MIB), Probe::new("hidden", MIB));
    source.fill(0x22);
    // A half-copied unit: its first 4 KiB are in the target, with the content of the checkpoint.
    target.write(64 << 10, Bytes::from(vec![0x11; 4096]), WriteFlags::default()).await.unwrap();
    let mut options = CbwOptions::new("cbw");
    options.assume = Copied::AllocatedInTarget;
    let filter = CopyBeforeWrite::new(source.clone(), target.clone(), options).unwrap();
    let view = SnapshotAccess::new("view", &filter);
    let mut expected = source.content();
    expected[64 << 10..][..4096].fill(0x11);
    assert_eq!(view.read(0, MIB as usize).await.unwrap(), expected);

    target.take(Operation::Write);
    filter.write(100 << 10, Bytes::from_static(&[0x33]), WriteFlags::default()).await.unwrap();
    assert_eq!(target.take(Operation::Write), [(68 * KIB, 60 * KIB)]);
    assert_eq!(view.read(0, MIB as usize).await.unwrap(), expected);

    // From the next epoch on the target counts as empty.
    filter.checkpoint().unwrap();
    filter.write(100 << 10, Bytes::from_static(&[0x44]), WriteFlags::default()).await.unwrap();
    assert_eq!(target.take(Operation::Write), [(64 * KIB, 64 * KIB)]);
}

#[tokio::test]
async fn the_view_tells_its_reader_data_from_zeroes() {
    let (source, target) = (Probe::new("disk", MIB), Probe::new("hidden", MIB));
    let filter =
        CopyBeforeWrite::new(source.clone(), target.clone(), CbwOptions::new("cbw")).unwrap();
    let view = SnapshotAccess::new("view", &filter);
    filter.write(0, Bytes::from(vec![7; 4096]), WriteFlags::default()).await.unwrap();
    let status = view.block_status(0, MIB).await.unwrap();
    assert!(status.flags.zero && status.flags.allocated, "zero at the checkpoint: {status:?}");
    assert_eq!(status.len, 64 * KIB, "one look-up, one device");
    assert!(view.write(0, Bytes::from_static(&[1]), WriteFlags::default()).await.is_err());
}

#[tokio::test]
async fn unacceptable_devices_and_units_are_refused() {
    let disk = Probe::new("disk", MIB);
    let make = |target: Arc<Probe>, unit| {
        let result =
            CopyBeforeWrite::new(disk.clone(), target, CbwOptions::new("cbw").unit_bytes(unit));
        result.unwrap_err().to_string()
    };
    assert!(make(disk.clone(), 65536).contains("the same device"));
    let short = make(Probe::new("hidden", MIB - 512), 65536);
    assert!(short.contains("Source and target image have different sizes"), "{short}");
    for unit in [0, 256, 3000, 1 << 31] {
        assert!(make(Probe::new("hidden", MIB), unit).contains("no power of two"), "{unit}");
    }
    let read_only = Limits { read_only: true, ..Limits::default() };
    let read_only = Probe::with_limits("hidden", MIB, read_only);
    assert!(make(read_only, 65536).contains("read-only"));
    let coarse = Limits { block_size: 4096, ..Limits::default() };
    assert!(make(Probe::with_limits("hidden", MIB, coarse), 512).contains("block size"));
}

#[tokio::test]
async fn requests_beyond_the_end_copy_nothing() {
    let rig = rig_64k(MIB);
    for offset in [MIB, MIB - 1, u64::MAX] {
        let error = rig.write(offset, 2, 0x22).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
    rig.filter.discard(1, u64::MAX).await.unwrap_err();
    assert_eq!((rig.copies(), rig.filter.stats().failures), (vec![], 0));
}

#[tokio::test]
async fn a_target_may_be_rounded_up_to_a_sector() {
    let source = Probe::new("disk", MIB + 7);
    let make = |size| {
        let target = Probe::new("hidden", size);
        CopyBeforeWrite::new(source.clone(), target, CbwOptions::new("cbw"))
    };
    let filter = make(MIB + 512).unwrap();
    filter.write(MIB, Bytes::from_static(&[1; 7]), WriteFlags::default()).await.unwrap();
    assert_eq!(filter.size(), MIB + 7);
    assert!(make(MIB + 1024).is_err());
    assert!(make(MIB).is_err());
}

#[tokio::test]
async fn the_filter_obeys_the_rules_of_every_device() {
    for unit_bytes in [512, 2048, 65536] {
        let make = async |size: u64| {
            let source = brep_block::Memory::new("disk", size);
            let target = brep_block::Memory::new("hidden", size);
            let options = CbwOptions::new("cbw").unit_bytes(unit_bytes);
            CopyBeforeWrite::new(source, target, options).unwrap() as Arc<dyn BlockDevice>
        };
        let options = brep_block::conformance::Options::default().operations(200);
        brep_block::conformance::run(make, options).await.unwrap();
    }
}
