//! Backup jobs (spec: backup).

mod common;

use std::sync::Arc;
use std::time::Duration;

use brep_backup::{Job, JobEnd, JobError, JobOptions, SyncMode};
use brep_block::{BlockDevice, Operation, WriteFlags};
use bytes::Bytes;
use common::Probe;
use tokio::time::Instant;

const KIB: u64 = 1 << 10;
const SIZE: u64 = (4 << 20) + 300;

fn devices() -> (Arc<Probe>, Arc<Probe>) {
    let (source, target) = (Probe::new("disk", SIZE), Probe::new("target", SIZE));
    source.fill(0x11);
    (source, target)
}

fn start(source: &Arc<Probe>, target: &Arc<Probe>, sync: SyncMode, speed: u64) -> Job {
    let mut options = JobOptions::new("job0", sync);
    options.speed = speed;
    Job::start(source.clone(), target.clone(), options).unwrap()
}

async fn write(job: &Job, offset: u64, len: usize, byte: u8) -> brep_block::Result<()> {
    job.filter().write(offset, Bytes::from(vec![byte; len]), WriteFlags::default()).await
}

#[tokio::test]
async fn a_full_backup_is_the_source_at_the_start() {
    let (source, target) = (Probe::slow("disk", SIZE, 3), Probe::slow("target", SIZE, 3));
    source.fill(0x11);
    let job = start(&source, &target, SyncMode::Full, 0);
    for i in 0..60u64 {
        let offset = (i * 0x9_1357) % (SIZE - 4096);
        write(&job, offset, 4096, 0x22).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(target.content().iter().all(|&b| b == 0x11));
    assert!(source.content().contains(&0x22));
    let progress = job.progress();
    assert_eq!((progress.offset, progress.len), (SIZE, SIZE));
    assert_eq!(job.filter().stats().copied_units, SIZE.div_ceil(64 * KIB), "no unit twice");
}

#[tokio::test]
async fn after_the_end_the_filter_only_passes_through() {
    let (source, target) = devices();
    let job = start(&source, &target, SyncMode::Full, 0);
    job.wait().await;
    target.take(Operation::Write);
    write(&job, 0, 512, 0x22).await.unwrap();
    assert_eq!(target.log(), []);
    assert!(matches!(job.cancel().await, JobEnd::Completed), "its end stays");
}

#[tokio::test]
async fn mode_none_copies_only_what_is_overwritten_and_ends_by_cancel() {
    let (source, target) = devices();
    let job = start(&source, &target, SyncMode::None, 0);
    write(&job, 0, 512, 0x22).await.unwrap();
    assert_eq!(target.take(Operation::Write), [(0, 64 * KIB)]);
    assert_eq!(job.progress().offset, 64 * KIB);
    assert!(matches!(job.cancel().await, JobEnd::Cancelled));
    assert_eq!(target.content_of(0, 512), [0x11; 512], "what was copied stays");
    write(&job, 64 * KIB, 512, 0x22).await.unwrap();
    assert_eq!(target.take(Operation::Write), []);
    assert!(matches!(job.checkpoint(), Err(JobError::Ended(_))));
}

#[tokio::test]
async fn a_checkpoint_begins_anew_and_is_for_mode_none_only() {
    let (source, target) = devices();
    let job = start(&source, &target, SyncMode::None, 0);
    write(&job, 0, 512, 0x22).await.unwrap();
    job.checkpoint().unwrap();
    target.take(Operation::Write);
    write(&job, 0, 512, 0x33).await.unwrap();
    assert_eq!(target.take(Operation::Write), [(0, 64 * KIB)]);
    assert_eq!(target.content_of(0, 512), [0x22; 512]);

    let full = start(&source, &Probe::new("other", SIZE), SyncMode::Full, 0);
    let error = full.checkpoint().unwrap_err().to_string();
    assert_eq!(error, "The backup job only supports block checkpoint in sync=none mode");
}

#[tokio::test]
async fn a_background_copy_that_fails_ends_the_job_with_the_error() {
    let (source, target) = devices();
    target.fail_if(|op| op.operation == Operation::Write && op.offset >= 2 << 20);
    let job = start(&source, &target, SyncMode::Full, 0);
    let JobEnd::Failed(error) = job.wait().await else { panic!("must fail") };
    assert_eq!(error.errno(), 28);
    assert!(job.progress().offset < SIZE);
    write(&job, 3 << 20, 512, 0x22).await.unwrap();
}

#[tokio::test]
async fn a_failed_copy_for_the_guest_fails_the_guest_and_not_the_job() {
    let (source, target) = devices();
    let job = start(&source, &target, SyncMode::None, 0);
    target.fail_if(|op| op.operation == Operation::Write);
    write(&job, 0, 512, 0x22).await.unwrap_err();
    target.repair();
    write(&job, 0, 512, 0x22).await.unwrap();
    assert!(matches!(job.cancel().await, JobEnd::Cancelled));
}

#[tokio::test(start_paused = true)]
async fn the_speed_is_kept_and_can_be_changed_while_the_job_sleeps() {
    let (source, target) = devices();
    let begin = Instant::now();
    let job = start(&source, &target, SyncMode::Full, 1 << 20);
    job.wait().await;
    let seconds = begin.elapsed().as_secs_f64();
    assert!((3.5..4.5).contains(&seconds), "4 MiB at 1 MiB/s took {seconds} s");

    let job = start(&source, &Probe::new("slow", SIZE), SyncMode::Full, 1);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(job.progress().offset <= 1 << 20, "a piece takes days");
    let begin = Instant::now();
    job.set_speed(0);
    job.wait().await;
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_paused_job_stands_still_but_goes_on_copying_for_the_guest() {
    let (source, target) = devices();
    let job = start(&source, &target, SyncMode::Full, 1 << 20);
    job.pause();
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(job.progress().offset, 0);
    write(&job, 0, 512, 0x22).await.unwrap();
    assert_eq!(job.progress().offset, 64 * KIB);
    job.resume();
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(target.content().iter().all(|&b| b == 0x11));
}

#[tokio::test]
async fn a_cancelled_job_leaves_a_part() {
    let (source, target) = devices();
    let job = start(&source, &target, SyncMode::Full, 1);
    job.pause();
    assert!(matches!(job.cancel().await, JobEnd::Cancelled));
    assert!(job.progress().offset < SIZE);
}

#[tokio::test]
async fn cancel_waits_for_the_copies_in_flight() {
    let (source, target) = devices();
    let job = Arc::new(start(&source, &target, SyncMode::None, 0));
    let gate = target.hold_if(|op| op.operation == Operation::Write);
    let filter = Arc::clone(job.filter());
    let write = filter.write(0, Bytes::from_static(&[1; 512]), WriteFlags::default());
    let canceller = Arc::clone(&job);
    let cancel = tokio::spawn(async move { canceller.cancel().await });
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert!(!cancel.is_finished());
    gate.add_permits(10);
    write.await.unwrap();
    assert!(matches!(cancel.await.unwrap(), JobEnd::Cancelled));
}

#[tokio::test]
async fn a_job_does_not_start_with_devices_that_do_not_fit() {
    let (source, _) = devices();
    let start = |target: Arc<Probe>| {
        let options = JobOptions::new("job0", SyncMode::Full);
        Job::start(source.clone(), target, options).unwrap_err().to_string()
    };
    assert!(start(source.clone()).contains("the same device"));
    let text = start(Probe::new("target", SIZE - 512));
    assert!(text.contains("Source and target image have different sizes"), "{text}");
}
