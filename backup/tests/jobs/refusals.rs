//! What keeps a job from starting (spec: backup, start conditions).

use std::sync::Arc;

use brep_backup::{BitmapMode, JobEnd, JobError, JobOptions, LiveDisk, SyncMode};
use brep_block::{BlockDevice, ErrorKind, Limits, Operation};

use crate::common::Probe;
use crate::rig::{Rig, SIZE, UNIT};

fn full() -> JobOptions {
    JobOptions::new("job0", SyncMode::Full)
}

/// The refusal of a job with these options, which must leave nothing behind.
async fn refusal(rig: &Rig, options: JobOptions) -> String {
    let error = rig.try_start(options).await.unwrap_err().to_string();
    assert!(rig.events().is_empty(), "{error}");
    let job = rig.start(full()).await;
    assert!(matches!(job.wait().await, JobEnd::Completed), "{error}");
    rig.events();
    error
}

#[tokio::test]
async fn source_and_target_must_not_be_one_device() {
    let rig = Rig::new();
    let error = rig.jobs.start(&rig.disk, rig.source.clone(), full()).await.unwrap_err();
    assert!(error.to_string().contains("the same device"), "{error}");
    let error = rig.jobs.start(&rig.disk, rig.disk.clone(), full()).await.unwrap_err();
    assert!(error.to_string().contains("source and target"), "{error}");
}

#[tokio::test]
async fn a_device_without_a_medium_or_a_length_is_refused() {
    // What is not connected says that it has no bytes, and fails to flush.
    for unplugged in ["disk", "target"] {
        let size = |name| if name == unplugged { 0 } else { SIZE };
        let rig = Rig::with(Probe::new("disk", size("disk")), Probe::new("target", size("target")));
        for probe in [&rig.source, &rig.target] {
            let empty = probe.size() == 0;
            probe.fail_with(ErrorKind::NotConnected, move |op| {
                empty && op.operation == Operation::Flush
            });
        }
        let error = rig.try_start(full()).await.unwrap_err();
        let JobError::Device(error) = error else { panic!("{error}") };
        assert_eq!((error.kind(), error.node()), (ErrorKind::NotConnected, unplugged));
    }
}

#[tokio::test]
async fn lengths_must_be_equal() {
    let rig = Rig::new();
    for size in [SIZE - 1, SIZE + 512, 0] {
        let error = rig.jobs.start(&rig.disk, Probe::new("target", size), full()).await;
        let text = error.unwrap_err().to_string();
        assert!(text.contains("Source and target image have different sizes"), "{text}");
    }
}

#[tokio::test]
async fn a_read_only_target_is_refused() {
    let rig = Rig::new();
    let limits = Limits { read_only: true, ..Limits::default() };
    let target = Probe::with_limits("target", SIZE, limits);
    let error = rig.jobs.start(&rig.disk, target, full()).await.unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}

#[tokio::test]
async fn a_device_that_a_job_uses_is_blocked_as_source_and_as_target() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    let other = Probe::new("other", SIZE);
    let options = || JobOptions::new("job1", SyncMode::Full);
    let same_source = rig.jobs.start(&rig.disk, other.clone(), options()).await.unwrap_err();
    assert_eq!(same_source.to_string(), "disk is busy: job 'job0' uses it");
    let other = LiveDisk::new("other", other);
    let same_target = rig.jobs.start(&other, rig.target.clone(), options()).await.unwrap_err();
    assert_eq!(same_target.to_string(), "target is busy: job 'job0' uses it");
    let crossed = rig.jobs.start(&other, rig.source.clone(), options()).await.unwrap_err();
    assert_eq!(crossed.to_string(), "disk is busy: job 'job0' uses it");
    job.cancel(false).unwrap();
    job.wait().await;
    rig.jobs.start(&other, rig.target.clone(), options()).await.unwrap();
}

#[tokio::test]
async fn a_job_id_in_use_is_refused() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    let other = LiveDisk::new("other", Probe::new("other", SIZE));
    let target = Probe::new("target", SIZE);
    let error = rig.jobs.start(&other, target.clone(), full()).await.unwrap_err();
    assert!(matches!(error, JobError::IdInUse(_)), "{error}");
    job.cancel(false).unwrap();
    job.wait().await;
    rig.jobs.start(&other, target, full()).await.unwrap();
}

#[tokio::test]
async fn compress_workers_chunk_and_id_are_checked() {
    let rig = Rig::new();
    let mut options = full();
    options.compress = true;
    assert!(refusal(&rig, options).await.contains("compress"));
    for workers in [0, 65] {
        let options = JobOptions { workers, ..full() };
        assert!(refusal(&rig, options).await.contains("max-workers"));
    }
    for chunk_bytes_max in [1, UNIT - 1] {
        let options = JobOptions { chunk_bytes_max, ..full() };
        assert!(refusal(&rig, options).await.contains("max-chunk"));
    }
    assert!(refusal(&rig, JobOptions::new("", SyncMode::Full)).await.contains("ID"));
    rig.start(JobOptions { chunk_bytes_max: UNIT, workers: 64, ..full() }).await.wait().await;
}

#[tokio::test]
async fn bitmap_and_bitmap_mode_have_to_fit_the_sync_mode() {
    use BitmapMode::{Always, Never, OnSuccess};
    let rig = Rig::new();
    rig.disk.bitmaps().add("b", UNIT).unwrap();
    let cases = [
        (SyncMode::Incremental, None, None, "needs a bitmap"),
        (SyncMode::Bitmap, None, None, "needs a bitmap"),
        (SyncMode::Bitmap, None, Some(Always), "needs a bitmap"),
        (SyncMode::Full, None, Some(OnSuccess), "no bitmap"),
        (SyncMode::Full, Some("b"), None, "no bitmap mode"),
        (SyncMode::Bitmap, Some("b"), None, "no bitmap mode"),
        (SyncMode::Incremental, Some("b"), Some(Always), "on-success only"),
        (SyncMode::Incremental, Some("b"), Some(Never), "on-success only"),
        (SyncMode::None, Some("b"), Some(OnSuccess), "sync=none"),
        (SyncMode::Full, Some("b"), Some(Never), "sync=bitmap only"),
        (SyncMode::Top, Some("b"), Some(Never), "sync=bitmap only"),
        (SyncMode::Bitmap, Some("x"), Some(OnSuccess), "could not be found"),
    ];
    for (sync, bitmap, bitmap_mode, text) in cases {
        let bitmap = bitmap.map(str::to_owned);
        let options = JobOptions { bitmap, bitmap_mode, ..JobOptions::new("job0", sync) };
        let error = refusal(&rig, options).await;
        assert!(error.contains(text), "{sync} {bitmap_mode:?}: {error}");
        assert!(!rig.disk.bitmaps().query()[0].busy);
    }
    let incremental =
        JobOptions { bitmap: Some("b".into()), ..JobOptions::new("job0", SyncMode::Incremental) };
    rig.start(incremental).await.wait().await;
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_nothing() {
    let rig = Rig::new();
    let gate = rig.source.hold_if(|op| op.operation == Operation::Write);
    let write = rig.disk.write(0, bytes::Bytes::from_static(&[1]), Default::default());
    {
        let start = std::pin::pin!(rig.try_start(full()));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(start.poll(&mut context).is_pending(), "a change is in flight");
    }
    gate.add_permits(10);
    write.await.unwrap();
    assert!(Arc::strong_count(&rig.target) == 1, "nobody holds the target");
    rig.start(full()).await.wait().await;
}
