//! Error policies of the background copy, and what a failed copy for a guest breaks
//! (spec: backup, error policies, copy-before-write rule).

use std::time::Duration;

use brep_backup::{IoStatus, JobEnd, JobOptions, JobStatus, OnCopyError, OnError, SyncMode};
use brep_block::{BlockDevice, ErrorKind, Operation};

use crate::rig::{MIB, Rig, SIZE, UNIT, settle, until};

fn options(source: OnError, target: OnError) -> JobOptions {
    let mut options = JobOptions::new("job0", SyncMode::Full);
    (options.on_source_error, options.on_target_error) = (source, target);
    options
}

/// A job whose target refuses one unit with that error.
async fn refused_write(
    rig: &Rig,
    policy: OnError,
    kind: ErrorKind,
) -> std::sync::Arc<brep_backup::Job> {
    let inside = |op: &crate::common::Op| op.offset <= MIB && op.offset + op.len > MIB;
    rig.target.fail_with(kind, move |op| op.operation == Operation::Write && inside(op));
    rig.start(options(OnError::Report, policy)).await
}

fn errors(rig: &Rig) -> Vec<String> {
    rig.events().into_iter().filter(|event| event.starts_with("ERROR")).collect()
}

#[tokio::test]
async fn report_ends_the_job_with_the_error() {
    let rig = Rig::new();
    let job = refused_write(&rig, OnError::Report, ErrorKind::NoSpace).await;
    let JobEnd::Failed(error) = job.wait().await else { panic!("must fail") };
    assert_eq!(error.errno(), 28);
    assert_eq!(errors(&rig), ["ERROR write report"]);
    assert!(job.progress().offset < SIZE);
    rig.write(3 * MIB, 512, 0x22).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn ignore_copies_the_rest_and_tries_again_until_it_is_copied() {
    let rig = Rig::new();
    let job = refused_write(&rig, OnError::Ignore, ErrorKind::Io).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let info = job.info();
    assert_eq!((info.status, info.io_status), (JobStatus::Running, IoStatus::Ok));
    assert_eq!(info.progress.offset, SIZE.next_multiple_of(UNIT) - UNIT, "one unit is missing");
    let errors = errors(&rig);
    assert!((5..20).contains(&errors.len()), "{} attempts in a second", errors.len());
    assert!(errors.iter().all(|event| event == "ERROR write ignore"));
    rig.target.repair();
    assert!(matches!(job.wait().await, JobEnd::Completed));
    assert!(rig.target.content().iter().all(|&b| b == 0x11));
}

#[tokio::test]
async fn stop_pauses_the_job_with_its_io_status_and_a_resume_tries_again() {
    for (kind, io_status) in
        [(ErrorKind::NoSpace, IoStatus::NoSpace), (ErrorKind::Io, IoStatus::Failed)]
    {
        let rig = Rig::new();
        let job = refused_write(&rig, OnError::Stop, kind).await;
        until(&job, JobStatus::Paused).await;
        let info = job.info();
        assert_eq!((info.paused, info.io_status), (true, io_status));
        assert_eq!(errors(&rig), ["ERROR write stop"], "one failure, one event");
        // Not mended yet: it stops again.
        job.resume().unwrap();
        assert_eq!(job.info().io_status, IoStatus::Ok);
        settle().await;
        until(&job, JobStatus::Paused).await;
        assert_eq!(errors(&rig), ["ERROR write stop"]);
        rig.target.repair();
        rig.write(MIB, 512, 0x22).await.unwrap();
        job.resume().unwrap();
        assert!(matches!(job.wait().await, JobEnd::Completed));
        assert!(rig.target.content().iter().all(|&b| b == 0x11));
    }
}

#[tokio::test]
async fn enospc_and_auto_stop_for_a_lack_of_space_and_report_the_rest() {
    for policy in [OnError::Enospc, OnError::Auto] {
        let rig = Rig::new();
        let job = refused_write(&rig, policy, ErrorKind::NoSpace).await;
        until(&job, JobStatus::Paused).await;
        assert_eq!(job.info().io_status, IoStatus::NoSpace);
        rig.target.repair();
        job.resume().unwrap();
        assert!(matches!(job.wait().await, JobEnd::Completed));

        let rig = Rig::new();
        let job = refused_write(&rig, policy, ErrorKind::Io).await;
        assert!(matches!(job.wait().await, JobEnd::Failed(_)));
        assert_eq!(errors(&rig), ["ERROR write report"]);
    }
}

#[tokio::test]
async fn the_source_has_a_policy_of_its_own() {
    let rig = Rig::new();
    rig.source.fail_with(ErrorKind::Io, |op| op.operation == Operation::Read && op.offset == 0);
    let job = rig.start(options(OnError::Stop, OnError::Report)).await;
    until(&job, JobStatus::Paused).await;
    assert_eq!(errors(&rig), ["ERROR read stop"]);
    rig.source.repair();
    job.resume().unwrap();
    assert!(matches!(job.wait().await, JobEnd::Completed));

    let rig = Rig::new();
    rig.source.fail_with(ErrorKind::Io, |op| op.operation == Operation::Read && op.offset == 0);
    let job = rig.start(options(OnError::Report, OnError::Stop)).await;
    assert!(matches!(job.wait().await, JobEnd::Failed(_)));
    assert_eq!(errors(&rig), ["ERROR read report"]);
}

#[tokio::test]
async fn a_target_that_cannot_be_flushed_at_the_end_fails_the_job() {
    let rig = Rig::new();
    rig.target.fail_with(ErrorKind::Sticky, |op| op.operation == Operation::Flush);
    let job = rig.start(options(OnError::Ignore, OnError::Ignore)).await;
    assert!(matches!(job.wait().await, JobEnd::Failed(_)));
}

#[tokio::test]
async fn break_guest_write_fails_the_guest_and_not_the_job() {
    let rig = Rig::new();
    let job = rig.sync(SyncMode::None).await;
    rig.target.fail_if(|op| op.operation == Operation::Write);
    rig.write(0, 512, 0x22).await.unwrap_err();
    assert_eq!(rig.source.content_of(0, 512), [0x11; 512]);
    assert!(errors(&rig).is_empty(), "the policies are the background's");
    rig.target.repair();
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.target.content_of(0, 512), [0x11; 512]);
    job.cancel(false).unwrap();
    assert!(matches!(job.wait().await, JobEnd::Cancelled));
}

#[tokio::test]
async fn break_snapshot_lets_the_guest_write_and_fails_the_job() {
    let rig = Rig::new();
    let mut options = options(OnError::Stop, OnError::Stop);
    options.filter.on_copy_error = OnCopyError::BreakSnapshot;
    let job = rig.start(options).await;
    job.pause().unwrap();
    until(&job, JobStatus::Paused).await;
    let place = 3 * MIB + 512;
    let snapshot = job.snapshot("snapshot");
    rig.target.fail_if(|op| op.operation == Operation::Write);
    if job.progress().offset < SIZE {
        rig.write(place, 512, 0x22).await.unwrap();
        assert_eq!(rig.source.content_of(place, 512), [0x22; 512]);
        assert_eq!(snapshot.read(0, 512).await.unwrap_err().errno(), 13);
    }
    rig.target.repair();
    job.resume().unwrap();
    assert!(matches!(job.wait().await, JobEnd::Failed(_)));
}

#[tokio::test(start_paused = true)]
async fn cbw_timeout_fails_the_guest_and_the_copy_goes_on() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::None);
    options.filter.copy_timeout = Some(Duration::from_secs(3));
    let job = rig.start(options).await;
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    let begin = tokio::time::Instant::now();
    let error = rig.write(0, 512, 0x22).await.unwrap_err();
    assert_eq!(error.errno(), 5);
    assert!(error.detail().contains("longer than 3s"), "{error}");
    assert_eq!(begin.elapsed(), Duration::from_secs(3));
    rig.write(512, 512, 0x22).await.unwrap_err();
    assert_eq!(begin.elapsed(), Duration::from_secs(6), "nor does the next one wait for ever");
    assert_eq!(rig.source.content_of(0, 1024), [0x11; 1024]);
    gate.add_permits(10);
    settle().await;
    rig.write(0, 512, 0x22).await.unwrap();
    assert_eq!(rig.target.take(Operation::Write), [(0, UNIT)], "copied once");
    assert_eq!(job.snapshot("s").read(0, 1024).await.unwrap(), vec![0x11; 1024]);
}

#[tokio::test(start_paused = true)]
async fn cbw_timeout_with_break_snapshot_lets_the_guest_go_on() {
    let rig = Rig::new();
    let mut options = JobOptions::new("job0", SyncMode::None);
    options.filter.copy_timeout = Some(Duration::from_secs(3));
    options.filter.on_copy_error = OnCopyError::BreakSnapshot;
    let job = rig.start(options).await;
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write);
    rig.write(0, 512, 0x22).await.unwrap();
    let begin = tokio::time::Instant::now();
    rig.write(512, 512, 0x33).await.unwrap();
    assert_eq!(begin.elapsed(), Duration::ZERO, "a lost snapshot is not waited for");
    assert_eq!(job.snapshot("s").read(0, 1).await.unwrap_err().errno(), 13);
    // The late copy is still counted: nothing begins anew under it.
    assert!(job.checkpoint(async { Ok(()) }).await.is_err());
    gate.add_permits(10);
    settle().await;
    job.checkpoint(async { Ok(()) }).await.unwrap();
    assert_eq!(job.snapshot("s").read(0, 1).await.unwrap(), vec![0x22]);
}
