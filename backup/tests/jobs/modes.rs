//! What a job copies (spec: backup, sync modes, copy-before-write rule).

use std::sync::Arc;

use crate::common::Probe;
use crate::rig::{MIB, Rig, SIZE, UNIT, settle};
use brep_backup::{JobEnd, JobError, JobOptions, LiveDisk, SyncMode};
use brep_block::{BlockDevice, ErrorKind, Limits, Operation, WriteFlags, ZeroFlags};
use bytes::Bytes;

#[tokio::test]
async fn full_is_the_source_at_the_start_whatever_the_guest_writes() {
    let rig = Rig::slow();
    let job = rig.sync(SyncMode::Full).await;
    for i in 0..60u64 {
        rig.write((i * 0x9_1357) % (SIZE - 4096), 4096, 0x22).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.target.content().iter().all(|&b| b == 0x11));
    assert!(rig.source.content().contains(&0x22));
    assert_eq!(job.filter().stats().copied_units, SIZE.div_ceil(UNIT), "no unit twice");
}

#[tokio::test]
async fn full_copies_a_short_last_unit_and_disks_of_any_size() {
    for size in [0, 1, 511, UNIT, UNIT + 1, 3 * MIB + 77] {
        let rig = Rig::with(Probe::new("disk", size), Probe::new("target", size));
        let job = rig.sync(SyncMode::Full).await;
        assert!(matches!(job.wait().await, JobEnd::Completed), "{size}");
        assert!(rig.target.content() == rig.source.content(), "{size}");
    }
}

#[tokio::test]
async fn full_copies_zeroes_as_zeroes() {
    let rig = Rig::new();
    rig.source.write_zeroes(MIB, MIB, ZeroFlags::default()).await.unwrap();
    rig.target.fill(0x99);
    rig.sync(SyncMode::Full).await.wait().await;
    assert!(rig.target.content() == rig.source.content());
    assert_eq!(rig.target.take(Operation::WriteZeroes), [(MIB, MIB)]);
}

#[tokio::test]
async fn top_copies_what_is_allocated_in_the_top_image() {
    let rig = Rig::new();
    // Half a unit of the layer below at each end.
    rig.source.allocated_only(MIB + UNIT / 2..2 * MIB - UNIT / 2);
    let job = rig.sync(SyncMode::Top).await;
    assert!(matches!(job.wait().await, JobEnd::Completed));
    let content = rig.target.content();
    for (offset, byte) in content.iter().enumerate() {
        let copied = (MIB..2 * MIB).contains(&(offset as u64));
        assert_eq!(*byte, if copied { 0x11 } else { 0 }, "at {offset}");
    }
    assert_eq!(job.progress().len, MIB, "what is left out does not count");
}

#[tokio::test]
async fn top_keeps_what_a_guest_overwrites_before_and_after_the_first_pass() {
    let rig = Rig::new();
    rig.source.allocated_only(0..MIB);
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write && op.offset == 0);
    let job = rig.sync(SyncMode::Top).await;
    settle().await;
    // The first pass is over: the unit is the lower layer's, and not kept.
    rig.write(2 * MIB, 512, 0x22).await.unwrap();
    let late = rig.disk.write(MIB - 1, Bytes::from_static(&[0x22]), WriteFlags::default());
    gate.add_permits(100);
    late.await.unwrap();
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.target.content_of(0, MIB as usize).iter().all(|&b| b == 0x11));
    assert!(rig.target.content_of(MIB, MIB as usize).iter().all(|&b| b == 0));
}

#[tokio::test]
async fn top_of_a_source_without_layers_is_full() {
    let source = brep_block::Memory::new("disk", SIZE);
    source.write(7, Bytes::from(vec![5; 1000]), WriteFlags::default()).await.unwrap();
    let rig = Rig::new();
    let disk = LiveDisk::new("vda", source.clone());
    rig.target.fill(0x99);
    let options = JobOptions::new("job0", SyncMode::Top);
    let job = rig.jobs.start(&disk, rig.target.clone(), options).await.unwrap();
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.target.content() == source.read(0, SIZE as usize).await.unwrap());
}

#[tokio::test]
async fn top_can_be_paused_and_cancelled_in_its_first_pass() {
    let rig = Rig::new();
    rig.source.allocated_only(0..MIB);
    let job = rig.sync(SyncMode::Top).await;
    job.pause().unwrap();
    settle().await;
    assert_eq!(job.progress().len, SIZE, "nothing has been left out yet");
    job.cancel(true).unwrap();
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
    assert_eq!(rig.target.take(Operation::Write), []);
}

#[tokio::test]
async fn none_copies_only_what_is_overwritten_and_ends_by_cancel() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    settle().await;
    assert_eq!(rig.target.log(), []);
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.target.take(Operation::Write), [(0, UNIT)]);
    assert_eq!(job.progress().offset, UNIT);
    job.cancel(false).unwrap();
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
    assert_eq!(rig.target.content_of(0, 512), [0x11; 512], "what was copied stays");
    rig.write(UNIT, 512, 0x22).await.unwrap();
    assert_eq!(rig.target.take(Operation::Write), []);
}

#[tokio::test]
async fn none_shows_the_state_at_the_start_to_readers_of_the_snapshot() {
    let rig = Rig::new();
    rig.write(5, 5, 0x77).await.unwrap();
    let at_start = rig.source.content();
    let job = rig.sync(SyncMode::None).await;
    let snapshot = job.snapshot("snapshot");
    for i in 0..40u64 {
        rig.write((i * 0x9_1357) % (SIZE - 9000), 9000, 0x22).await.unwrap();
        assert!(snapshot.read(0, SIZE as usize).await.unwrap() == at_start);
    }
    job.cancel(false).unwrap();
    job.wait().await;
    assert_eq!(snapshot.read(0, 1).await.unwrap_err().errno(), 13, "over with the job");
}

#[tokio::test]
async fn after_the_end_the_disk_only_passes_through() {
    let rig = Rig::new();
    rig.sync(SyncMode::Full).await.wait().await;
    rig.target.take(Operation::Write);
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.target.log(), []);
    assert_eq!(rig.source.content_of(0, 512), [0x22; 512]);
}

#[tokio::test]
async fn a_unit_is_64_kib_or_what_the_target_allocates_if_that_is_more() {
    for (preferred_size, unit) in [(2048, UNIT), (65536, UNIT), (1 << 18, 1 << 18)] {
        let limits = Limits { preferred_size, ..Limits::default() };
        let target = Probe::with_limits("target", SIZE, limits);
        let rig = Rig::with(Probe::new("disk", SIZE), target);
        let job = rig.sync(SyncMode::None).await;
        assert_eq!(job.filter().unit_bytes(), unit);
        rig.write(MIB, 1, 0x22).await.unwrap();
        assert_eq!(rig.target.take(Operation::Write), [(MIB, unit)]);
    }
}

#[tokio::test]
async fn a_write_in_flight_at_the_start_is_waited_for_and_later_ones_wait() {
    let rig = Rig::new();
    let gate = rig.source.hold_if(|op| op.operation == Operation::Write);
    let early = rig.disk.write(0, Bytes::from_static(&[0x22]), WriteFlags::default());
    let start =
        rig.jobs.start(&rig.disk, rig.target.clone(), JobOptions::new("job0", SyncMode::Full));
    let start = std::pin::pin!(start);
    let mut start = Some(start);
    let mut poll = || {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        start.as_mut().unwrap().as_mut().poll(&mut context).is_ready()
    };
    assert!(!poll(), "a change is in flight");
    let late = rig.disk.write(1, Bytes::from_static(&[0x33]), WriteFlags::default());
    gate.add_permits(1);
    settle().await;
    early.await.unwrap();
    let job = start.take().unwrap().await.unwrap();
    gate.add_permits(1);
    late.await.unwrap();
    job.wait().await;
    assert_eq!(rig.target.content_of(0, 3), [0x22, 0x11, 0x11]);
    assert_eq!(rig.source.content_of(0, 3), [0x22, 0x33, 0x11]);
}

#[tokio::test]
async fn a_guests_write_waits_for_the_background_copy_of_its_unit() {
    let rig = Rig::new();
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    let job = rig.sync(SyncMode::Full).await;
    settle().await;
    let write = rig.disk.write(5, Bytes::from_static(&[0x22]), WriteFlags::default());
    settle().await;
    assert_eq!(rig.source.content_of(5, 1), [0x11], "its copy is under way");
    gate.add_permits(1000);
    write.await.unwrap();
    job.wait().await;
    assert_eq!(rig.target.content_of(5, 1), [0x11]);
    let copies = rig.target.take(Operation::Write);
    assert_eq!(copies.iter().filter(|(offset, _)| *offset == 0).count(), 1, "copied once");
}

#[tokio::test]
async fn the_disk_keeps_its_size_while_a_job_runs() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    let error = rig.disk.truncate(2 * SIZE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    let error = job.filter().truncate(2 * SIZE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn a_disk_in_use_obeys_the_rules_of_every_device_with_and_without_a_job() {
    for with_job in [false, true] {
        let make = async |size: u64| {
            let disk = LiveDisk::new("vda", brep_block::Memory::new("disk", size));
            disk.bitmaps().add("b", 512).unwrap();
            if with_job {
                let jobs = brep_backup::Jobs::new(|_| {});
                let target = brep_block::Memory::new("target", size);
                let options = JobOptions::new("job0", SyncMode::Full);
                jobs.start(&disk, target, options).await.unwrap();
                // The jobs end with their registry.
                std::mem::forget(jobs);
            }
            disk as Arc<dyn BlockDevice>
        };
        let options = brep_block::conformance::Options::default().operations(200);
        brep_block::conformance::run(make, options).await.unwrap();
    }
}

#[tokio::test]
async fn checkpoint_is_for_sync_none_only() {
    let rig = Rig::new();
    rig.disk.bitmaps().add("b", UNIT).unwrap();
    for sync in [SyncMode::Full, SyncMode::Top, SyncMode::Incremental, SyncMode::Bitmap] {
        let mut options = JobOptions::new("job0", sync);
        if matches!(sync, SyncMode::Incremental | SyncMode::Bitmap) {
            options = options.bitmap("b", brep_backup::BitmapMode::OnSuccess);
        }
        let job = rig.start(options).await;
        let error = job.checkpoint(async { Ok(()) }).await.unwrap_err().to_string();
        assert_eq!(error, "The backup job only supports block checkpoint in sync=none mode");
        job.wait().await;
    }
}

#[tokio::test]
async fn checkpoint_makes_every_unit_to_copy_again_and_does_not_touch_the_target() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    rig.write(0, 512, 0x22).await.unwrap();
    let before = (rig.target.content(), job.progress());
    rig.target.take(Operation::Write);
    job.checkpoint(async { Ok(()) }).await.unwrap();
    assert_eq!(rig.target.log(), []);
    assert!((rig.target.content(), job.progress()) == before, "progress is not touched either");
    rig.write(0, 512, 0x33).await.unwrap();
    assert_eq!(rig.target.take(Operation::Write), [(0, UNIT)]);
    assert_eq!(rig.target.content_of(0, 512), [0x22; 512]);

    job.cancel(false).unwrap();
    job.wait().await;
    let error = job.checkpoint(async { Ok(()) }).await.unwrap_err();
    assert!(matches!(error, JobError::WrongState { .. }), "{error}");
}

#[tokio::test]
async fn checkpoint_holds_guests_back_until_the_target_is_empty() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    rig.write(0, 512, 0x22).await.unwrap();
    let snapshot = job.snapshot("snapshot");
    let mut write = None;
    let empty = async {
        write = Some(rig.disk.write(9, Bytes::from_static(&[0x33]), WriteFlags::default()));
        settle().await;
        assert_eq!(rig.source.content_of(9, 1), [0x22], "held back");
        rig.target.write_zeroes(0, SIZE, ZeroFlags::default()).await
    };
    job.checkpoint(empty).await.unwrap();
    write.unwrap().await.unwrap();
    assert_eq!(snapshot.read(8, 3).await.unwrap(), vec![0x22; 3]);

    // A target that could not be emptied: the old state is gone, until it works.
    let fails = async { rig.source.read(SIZE, 1).await.map(drop) };
    job.checkpoint(fails).await.unwrap_err();
    assert_eq!(snapshot.read(0, 1).await.unwrap_err().errno(), 13);
    rig.write(MIB, 1, 0x44).await.unwrap();
    job.checkpoint(async { Ok(()) }).await.unwrap();
    assert_eq!(snapshot.read(MIB, 1).await.unwrap(), vec![0x44]);
}
