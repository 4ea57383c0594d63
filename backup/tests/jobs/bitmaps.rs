//! Bitmaps: their states, and what a job does to them (spec: backup, bitmaps).

use brep_backup::{BitmapError, BitmapMode, BitmapState, JobEnd, JobError, JobOptions, SyncMode};
use brep_block::{BlockDevice, ErrorKind, Operation, ZeroFlags};
use brep_hbitmap::HBitmap;

use crate::rig::{MIB, Rig, SIZE, UNIT, settle};

/// A disk whose bitmap `b` has the unit at 1 MiB.
async fn dirty_at_1_mib(granularity: u64) -> Rig {
    let rig = Rig::new();
    rig.disk.bitmaps().add("b", granularity).unwrap();
    rig.write(MIB, 512, 0x22).await.unwrap();
    rig
}

/// Ranges that `b` has, once no job has it.
fn dirty(rig: &Rig) -> Vec<std::ops::Range<u64>> {
    rig.disk.bitmaps().export("b").unwrap().dirty_areas(0..u64::MAX).collect()
}

fn unit(offset: u64) -> std::ops::Range<u64> {
    offset..offset + UNIT
}

#[tokio::test]
async fn every_kind_of_change_is_recorded_from_the_moment_of_adding() {
    let rig = Rig::new();
    rig.write(0, 1, 1).await.unwrap();
    rig.disk.bitmaps().add("b", 4096).unwrap();
    rig.write(8191, 2, 1).await.unwrap();
    rig.disk.write_zeroes(MIB, 1, ZeroFlags::default()).await.unwrap();
    rig.disk.discard(SIZE - 1, 1).await.unwrap();
    rig.disk.read(2 * MIB, 512).await.unwrap();
    assert_eq!(dirty(&rig), [4096..12288, MIB..MIB + 4096, 4 * MIB..SIZE]);
}

#[tokio::test]
async fn a_failed_write_is_recorded_too() {
    let rig = Rig::new();
    rig.disk.bitmaps().add("b", UNIT).unwrap();
    rig.source.fail_if(|op| op.operation == Operation::Write);
    rig.write(0, 1, 1).await.unwrap_err();
    assert_eq!(dirty(&rig), [unit(0)]);
}

#[tokio::test]
async fn a_bitmap_has_a_name_a_granularity_and_states() {
    let rig = Rig::new();
    let bitmaps = rig.disk.bitmaps();
    assert_eq!(bitmaps.add("", UNIT), Err(BitmapError::Name));
    for granularity in [0, 256, 3000, 4 << 30] {
        assert_eq!(bitmaps.add("b", granularity), Err(BitmapError::Granularity(granularity)));
    }
    bitmaps.add("b", UNIT).unwrap();
    assert_eq!(bitmaps.add("b", UNIT), Err(BitmapError::Exists("b".into())));
    let missing = bitmaps.clear("x").unwrap_err().to_string();
    assert!(missing.contains("could not be found"), "{missing}");
    bitmaps.set_recording("b", false).unwrap();
    rig.write(0, 1, 1).await.unwrap();
    assert!(dirty(&rig).is_empty(), "disabled");
    bitmaps.set_recording("b", true).unwrap();
    rig.write(0, 1, 1).await.unwrap();
    assert_eq!(rig.dirty_bytes(), UNIT);
    bitmaps.clear("b").unwrap();
    assert_eq!(rig.dirty_bytes(), 0);
    bitmaps.remove("b").unwrap();
    assert!(bitmaps.query().is_empty());
    let other = HBitmap::new(SIZE - 1, 16).unwrap();
    assert!(matches!(
        bitmaps.import("b", other, BitmapState::Recording),
        Err(BitmapError::Size { .. })
    ));
}

#[tokio::test]
async fn a_bitmap_grows_with_its_disk() {
    let source = brep_block::Memory::new("disk", MIB);
    let disk = brep_backup::LiveDisk::new("vda", source);
    disk.bitmaps().add("b", UNIT).unwrap();
    disk.truncate(2 * MIB).await.unwrap();
    disk.write_zeroes(2 * MIB - 1, 1, ZeroFlags::default()).await.unwrap();
    assert_eq!(disk.bitmaps().query()[0].count, UNIT);
}

#[tokio::test]
async fn incremental_copies_the_clusters_set_in_the_bitmap() {
    // A finer bit sets its unit, a coarser one all of them.
    for (granularity, copied) in [(512, MIB..MIB + UNIT), (4 * UNIT, MIB..MIB + 4 * UNIT)] {
        let rig = dirty_at_1_mib(granularity).await;
        let at_start = rig.source.content();
        let job = rig.with_bitmap(SyncMode::Incremental, BitmapMode::OnSuccess).await;
        assert_eq!(job.progress().len, copied.end - copied.start);
        // Copied before it is overwritten, and not copied because nobody asked for it.
        rig.write(MIB, 512, 0x33).await.unwrap();
        rig.write(3 * MIB, 512, 0x33).await.unwrap();
        assert!(matches!(job.wait().await, JobEnd::Completed));
        let mut expected = vec![0; SIZE as usize];
        let range = copied.start as usize..copied.end as usize;
        expected[range.clone()].copy_from_slice(&at_start[range]);
        assert!(rig.target.content() == expected);
        assert_eq!(dirty(&rig).len(), 2, "what was written during the job");
    }
}

#[tokio::test]
async fn snapshot_access_outside_the_bitmap_is_denied() {
    let rig = dirty_at_1_mib(UNIT).await;
    let job = rig.with_bitmap(SyncMode::Bitmap, BitmapMode::OnSuccess).await;
    job.pause().unwrap();
    let snapshot = job.snapshot("snapshot");
    assert_eq!(snapshot.read(MIB, 512).await.unwrap(), vec![0x22; 512]);
    for (offset, len) in [(0, 1), (MIB - 1, 2), (MIB, UNIT as usize + 1)] {
        assert_eq!(snapshot.read(offset, len).await.unwrap_err().errno(), 13, "{offset} {len}");
    }
    assert_eq!(snapshot.block_status(0, 512).await.unwrap_err().errno(), 13);
}

/// Runs a job that ends in a way, with a guest's write during it, and says what is dirty then.
async fn after(sync: SyncMode, mode: BitmapMode, end: &str) -> Vec<std::ops::Range<u64>> {
    let rig = dirty_at_1_mib(UNIT).await;
    rig.write(2 * MIB, 512, 0x22).await.unwrap();
    // The unit at 1 MiB is copied, the one at 2 MiB only by a success.
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write && op.offset == 2 * MIB);
    if end == "fail" {
        rig.target.fail_with(ErrorKind::Io, |op| {
            op.operation == Operation::Write && op.offset == 2 * MIB
        });
    }
    let mut options = JobOptions::new("job0", sync).bitmap("b", mode);
    options.workers = 1;
    let job = rig.start(options).await;
    rig.write(3 * MIB, 512, 0x33).await.unwrap();
    settle().await;
    if end == "cancel" {
        job.pause().unwrap();
        job.cancel(true).unwrap();
    }
    gate.add_permits(100);
    let ended = job.wait().await;
    match end {
        "success" => assert!(matches!(ended, JobEnd::Completed)),
        "fail" => assert!(matches!(ended, JobEnd::Failed(_))),
        _ => assert!(matches!(ended, JobEnd::Cancelled)),
    }
    assert!(!rig.disk.bitmaps().query()[0].busy);
    dirty(&rig)
}

#[tokio::test]
async fn on_success_has_the_writes_of_the_job_only_else_both() {
    let new = [unit(3 * MIB)];
    let both = [unit(MIB), unit(2 * MIB), unit(3 * MIB)];
    assert_eq!(after(SyncMode::Bitmap, BitmapMode::OnSuccess, "success").await, new);
    assert_eq!(after(SyncMode::Incremental, BitmapMode::OnSuccess, "success").await, new);
    assert_eq!(after(SyncMode::Bitmap, BitmapMode::OnSuccess, "fail").await, both);
    assert_eq!(after(SyncMode::Bitmap, BitmapMode::OnSuccess, "cancel").await, both);
}

#[tokio::test]
async fn never_has_both_whatever_happens() {
    let both = [unit(MIB), unit(2 * MIB), unit(3 * MIB)];
    for end in ["success", "fail", "cancel"] {
        assert_eq!(after(SyncMode::Bitmap, BitmapMode::Never, end).await, both, "{end}");
    }
}

#[tokio::test]
async fn always_has_the_writes_of_the_job_and_what_was_not_copied() {
    let new = [unit(3 * MIB)];
    assert_eq!(after(SyncMode::Bitmap, BitmapMode::Always, "success").await, new);
    let rest = [unit(2 * MIB), unit(3 * MIB)];
    assert_eq!(after(SyncMode::Bitmap, BitmapMode::Always, "fail").await, rest);
}

#[tokio::test]
async fn always_forgets_nothing_of_a_target_that_cannot_be_flushed() {
    let rig = dirty_at_1_mib(UNIT).await;
    rig.target.fail_with(ErrorKind::Io, |op| op.operation == Operation::Flush);
    let job = rig.with_bitmap(SyncMode::Bitmap, BitmapMode::Always).await;
    assert!(matches!(job.wait().await, JobEnd::Failed(_)));
    assert_eq!(dirty(&rig), [unit(MIB)]);
}

#[tokio::test]
async fn full_and_top_may_begin_a_bitmap_anew() {
    for sync in [SyncMode::Full, SyncMode::Top] {
        for mode in [BitmapMode::OnSuccess, BitmapMode::Always] {
            let rig = dirty_at_1_mib(UNIT).await;
            rig.source.allocated_only(0..SIZE);
            let job = rig.with_bitmap(sync, mode).await;
            rig.write(3 * MIB, 512, 0x33).await.unwrap();
            assert!(matches!(job.wait().await, JobEnd::Completed));
            assert_eq!(dirty(&rig), [unit(3 * MIB)], "{sync} {mode:?}");
            assert_eq!(rig.target.content_of(MIB, 512), [0x22; 512]);
        }
    }
}

#[tokio::test]
async fn full_with_always_that_fails_leaves_all_that_was_not_copied() {
    let rig = dirty_at_1_mib(UNIT).await;
    rig.target.fail_with(ErrorKind::Io, |op| op.operation == Operation::Write && op.offset >= MIB);
    let mut options = JobOptions::new("job0", SyncMode::Full).bitmap("b", BitmapMode::Always);
    options.workers = 1;
    let job = rig.start(options).await;
    assert!(matches!(job.wait().await, JobEnd::Failed(_)));
    let rest = MIB..SIZE;
    assert_eq!(dirty(&rig), [rest]);
}

#[tokio::test]
async fn a_full_copy_and_two_incrementals_restore_every_state() {
    let rig = Rig::new();
    rig.disk.bitmaps().add("b", 4096).unwrap();
    let mut sync = SyncMode::Full;
    for step in 0..3u64 {
        let at_start = rig.source.content();
        let job = rig.with_bitmap(sync, BitmapMode::OnSuccess).await;
        for i in 0..10u64 {
            let offset = (i * 0x9_1357 + step * 0x5_0001) % (SIZE - 4096);
            rig.write(offset, 4096, 0x30 + step as u8).await.unwrap();
        }
        assert!(matches!(job.wait().await, JobEnd::Completed));
        assert!(rig.target.content() == at_start, "step {step}");
        sync = SyncMode::Incremental;
    }
}

#[tokio::test]
async fn a_bitmap_that_a_job_has_is_busy() {
    let rig = dirty_at_1_mib(UNIT).await;
    let job = rig.with_bitmap(SyncMode::Bitmap, BitmapMode::OnSuccess).await;
    job.pause().unwrap();
    rig.write(2 * MIB, 1, 1).await.unwrap();
    let info = &rig.disk.bitmaps().query()[0];
    assert!(info.busy && info.recording);
    assert_eq!(info.count, 2 * UNIT, "frozen and new");
    let bitmaps = rig.disk.bitmaps();
    let busy = Err(BitmapError::Busy("b".into()));
    assert_eq!(bitmaps.clear("b"), busy);
    assert_eq!(bitmaps.remove("b"), busy);
    assert_eq!(bitmaps.set_recording("b", false), busy);
    job.cancel(true).unwrap();
    job.wait().await;
    bitmaps.clear("b").unwrap();
}

#[tokio::test]
async fn an_inconsistent_bitmap_can_only_be_removed() {
    let rig = Rig::new();
    let bitmaps = rig.disk.bitmaps();
    bitmaps.import("b", HBitmap::new(SIZE, 16).unwrap(), BitmapState::Inconsistent).unwrap();
    assert!(matches!(bitmaps.clear("b"), Err(BitmapError::Inconsistent(_))));
    for mode in [BitmapMode::OnSuccess, BitmapMode::Never, BitmapMode::Always] {
        let options = JobOptions::new("job0", SyncMode::Bitmap).bitmap("b", mode);
        let error = rig.try_start(options).await.unwrap_err();
        assert!(matches!(error, JobError::Bitmap(BitmapError::Inconsistent(_))), "{error}");
    }
    bitmaps.remove("b").unwrap();
}

#[tokio::test]
async fn a_read_only_bitmap_is_for_never_only_and_stays_as_it_is() {
    let rig = Rig::new();
    let mut map = HBitmap::new(SIZE, 16).unwrap();
    map.set(MIB, 1);
    rig.disk.bitmaps().import("b", map.clone(), BitmapState::ReadOnly).unwrap();
    for mode in [BitmapMode::OnSuccess, BitmapMode::Always] {
        let options = JobOptions::new("job0", SyncMode::Bitmap).bitmap("b", mode);
        let error = rig.try_start(options).await.unwrap_err();
        assert!(matches!(error, JobError::Bitmap(BitmapError::ReadOnly(_))), "{error}");
    }
    let job = rig.with_bitmap(SyncMode::Bitmap, BitmapMode::Never).await;
    rig.write(2 * MIB, 1, 1).await.unwrap();
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.disk.bitmaps().export("b").unwrap() == map);
    assert_eq!(rig.target.content_of(MIB, 1), [0x11]);
}
