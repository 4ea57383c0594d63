//! States, events, pause, speed, cancel, progress (spec: backup, rate limit to cancel; qmp, jobs).

use std::sync::Arc;
use std::time::Duration;

use brep_backup::{IoStatus, JobEnd, JobError, JobOptions, JobStatus, SyncMode};
use brep_block::{BlockDevice, Operation, WriteFlags};
use bytes::Bytes;
use tokio::time::Instant;

use crate::common::Probe;
use crate::rig::{MIB, Rig, SIZE, UNIT, settle, until};

#[tokio::test]
async fn a_job_that_succeeds_goes_through_its_states_and_is_forgotten() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::Full).await;
    job.wait().await;
    let states = ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];
    assert_eq!(rig.events(), states);
    assert!(rig.jobs.query().is_empty());
    let error = rig.jobs.job("job0").unwrap_err().to_string();
    assert_eq!(error, "Block job 'job0' not found");
}

#[tokio::test]
async fn a_job_that_fails_aborts_and_completes_with_an_error() {
    let rig = Rig::new();
    rig.target.fail_if(|op| op.operation == Operation::Write);
    rig.sync(SyncMode::Full).await.wait().await;
    let states = [
        "created",
        "running",
        "ERROR write report",
        "aborting",
        "COMPLETED with error",
        "concluded",
        "null",
    ];
    assert_eq!(rig.events(), states);
}

#[tokio::test]
async fn a_cancelled_job_aborts_and_says_cancelled() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    settle().await;
    job.cancel(false).unwrap();
    job.wait().await;
    let states = ["created", "running", "aborting", "CANCELLED", "concluded", "null"];
    assert_eq!(rig.events(), states);
}

#[tokio::test]
async fn without_auto_finalize_a_job_waits_pending_for_the_command() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.auto_finalize = false;
    let job = rig.start(options.clone()).await;
    let error = job.finalize().unwrap_err().to_string();
    assert!(error.contains("cannot take the command 'finalize'"), "{error}");
    until(&job, JobStatus::Pending).await;
    assert_eq!(rig.events(), ["created", "running", "waiting", "pending", "PENDING"]);
    // The point in time is still the start.
    rig.write(0, 512, 0x22).await.unwrap();
    assert!(!job.info().busy);
    job.finalize().unwrap();
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.target.content().iter().all(|&b| b == 0x11));

    let job = rig.start(options).await;
    until(&job, JobStatus::Pending).await;
    rig.events();
    job.cancel(false).unwrap();
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
    assert_eq!(rig.events(), ["aborting", "CANCELLED", "concluded", "null"]);
}

#[tokio::test]
async fn without_auto_dismiss_a_job_stays_concluded_and_its_id_in_use() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.auto_dismiss = false;
    let job = rig.start(options.clone()).await;
    assert!(matches!(job.dismiss(), Err(JobError::WrongState { .. })));
    job.wait().await;
    let info = &rig.jobs.query()[0];
    assert_eq!((info.status, info.progress.offset), (JobStatus::Concluded, SIZE));
    let error = rig.try_start(options.clone()).await.unwrap_err();
    assert!(matches!(error, JobError::IdInUse(_)), "{error}");
    for refused in [job.pause(), job.resume(), job.set_speed(1), job.cancel(true), job.finalize()] {
        assert!(matches!(refused, Err(JobError::WrongState { .. })), "{refused:?}");
    }
    rig.events();
    job.dismiss().unwrap();
    assert_eq!(rig.events(), ["null"]);
    assert!(rig.jobs.query().is_empty());
    rig.start(options).await.wait().await;
}

#[tokio::test]
async fn a_query_tells_everything_of_a_job() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::None);
    options.speed = 77;
    rig.start(options).await;
    settle().await;
    let info = rig.jobs.query().remove(0);
    assert_eq!((info.id.as_str(), info.speed, info.paused), ("job0", 77, false));
    assert_eq!((info.progress.offset, info.progress.len), (0, SIZE));
    assert_eq!((info.io_status, info.status), (IoStatus::Ok, JobStatus::Running));
    assert!(info.auto_finalize && info.auto_dismiss && info.error.is_none());
}

#[tokio::test]
async fn an_internal_job_is_not_listed_and_has_no_events() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.internal = true;
    rig.target.fail_if(|op| op.operation == Operation::Write);
    let job = rig.start(options).await;
    assert!(rig.jobs.query().is_empty());
    assert!(matches!(job.wait().await, JobEnd::Failed(_)));
    assert!(rig.events().is_empty());
}

#[tokio::test]
async fn a_backup_is_not_completed_by_command() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    assert!(matches!(job.complete(), Err(JobError::WrongState { .. })));
}

#[tokio::test(start_paused = true)]
async fn the_speed_is_kept_in_slices() {
    let rig = Rig::new();
    let begin = Instant::now();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.speed = MIB;
    rig.start(options).await.wait().await;
    let seconds = begin.elapsed().as_secs_f64();
    assert!((3.5..4.5).contains(&seconds), "4 MiB at 1 MiB/s took {seconds} s");
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_speed_wakes_a_sleeping_job() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.speed = 1;
    let job = rig.start(options).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(job.progress().offset, UNIT, "a slow job goes unit by unit");
    assert!(!job.info().busy);
    let begin = Instant::now();
    job.set_speed(0).unwrap();
    job.wait().await;
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn copies_for_the_guest_are_not_held_back_but_count_in_the_rate() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.speed = MIB;
    let job = rig.start(options).await;
    let begin = Instant::now();
    rig.write(2 * MIB, 2 << 20, 0x22).await.unwrap();
    assert_eq!(begin.elapsed(), Duration::ZERO);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(job.progress().offset <= 2 * MIB + 2 * UNIT, "the background waits meanwhile");
    job.wait().await;
    assert!(begin.elapsed() >= Duration::from_millis(3500), "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_paused_job_stands_still_and_goes_on_copying_for_the_guest() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::Full);
    options.speed = MIB;
    let job = rig.start(options).await;
    job.pause().unwrap();
    assert!(matches!(job.pause(), Err(JobError::AlreadyPaused(_))));
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(job.info().status, JobStatus::Paused);
    let before = job.progress().offset;
    rig.write(3 * MIB, 512, 0x22).await.unwrap();
    assert_eq!(job.progress().offset, before + UNIT);
    job.resume().unwrap();
    assert!(matches!(job.resume(), Err(JobError::NotPaused(_))));
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.target.content().iter().all(|&b| b == 0x11));
    let states = [
        "created",
        "running",
        "paused",
        "running",
        "waiting",
        "pending",
        "COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(rig.events(), states);
}

#[tokio::test]
async fn a_job_that_is_paused_at_its_last_copy_does_not_complete() {
    let rig = Rig::new();
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    let job = rig.sync(SyncMode::Full).await;
    settle().await;
    job.pause().unwrap();
    settle().await;
    assert_eq!(job.info().status, JobStatus::Running, "copies are in flight");
    gate.add_permits(1000);
    until(&job, JobStatus::Paused).await;
    assert_eq!(job.progress().offset, SIZE);
    job.resume().unwrap();
    assert!(matches!(job.wait().await, JobEnd::Completed));
}

#[tokio::test]
async fn a_job_paused_by_the_user_is_cancelled_by_force_only() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::Full).await;
    job.pause().unwrap();
    let error = job.cancel(false).unwrap_err().to_string();
    assert_eq!(error, "The block job for device 'job0' is currently paused");
    until(&job, JobStatus::Paused).await;
    job.cancel(true).unwrap();
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
    assert!(job.progress().offset < SIZE);
    let events = rig.events();
    assert_eq!(events[2..5], ["paused", "running", "aborting"], "{events:?}");
}

#[tokio::test]
async fn cancel_waits_for_the_copies_in_flight() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    let write = rig.disk.write(0, Bytes::from_static(&[1; 512]), WriteFlags::default());
    job.cancel(false).unwrap();
    settle().await;
    assert_eq!(job.info().status, JobStatus::Aborting);
    gate.add_permits(10);
    write.await.unwrap();
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
    assert_eq!(rig.target.content_of(0, 512), [0x11; 512]);
}

#[tokio::test]
async fn a_job_that_has_ended_has_made_safe_what_it_copied_and_lets_go_of_the_target() {
    for end in ["success", "cancel"] {
        let rig = Rig::new();
        let mut options = JobOptions::new("job0", SyncMode::Full);
        options.auto_dismiss = false;
        let job = rig.start(options).await;
        if end == "cancel" {
            job.pause().unwrap();
            rig.write(0, 1, 1).await.unwrap();
            job.cancel(true).unwrap();
        }
        job.wait().await;
        let log = rig.target.log();
        assert_eq!(log.last().unwrap().operation, Operation::Flush, "{end}");
        assert_eq!(Arc::strong_count(&rig.target), 1, "{end}: others may use it");
        assert_eq!(job.snapshot("s").read(0, 1).await.unwrap_err().errno(), 13);
    }
}

#[tokio::test]
async fn as_many_copies_as_workers_are_in_flight() {
    for workers in [1, 3, 64] {
        let size = 100 * UNIT;
        let rig = Rig::with(Probe::new("disk", size), Probe::new("target", size));
        let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
        let mut options = JobOptions::new("job0", SyncMode::Full);
        options.workers = workers;
        options.chunk_bytes_max = UNIT;
        let job = rig.start(options).await;
        for _ in 0..10 {
            settle().await;
        }
        assert_eq!(rig.target.log().len(), workers as usize);
        gate.add_permits(1000);
        assert!(matches!(job.wait().await, JobEnd::Completed));
        assert!(rig.target.take(Operation::Write).iter().all(|&(_, len)| len == UNIT));
    }
}

#[tokio::test]
async fn dropping_the_registry_cancels_its_jobs() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::None);
    options.auto_dismiss = false;
    let job = rig.start(options).await;
    drop(rig.jobs);
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
    assert_eq!(Arc::strong_count(job.filter()), 1, "nobody goes through it any more");
}
