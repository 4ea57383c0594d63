//! The primary: T1 to T5, D1 to D8.

use std::sync::Arc;

use brep_block::{
    BlockDevice, Fault, FlushLevel, Io, Memory, Operation, Replication, ReplicationMode, Rule,
    WriteFlags, ZeroFlags,
};
use brep_replication::node::{Forward, PrimaryNode, Stage};
use bytes::Bytes;

use crate::support::*;

/// Row: §14.8.
#[test]
fn t01_primary_read_before_start_fails() {
    run(async {
        let p = P::new();
        is_eio(p.node.read(0, SIZE as usize).await);
        assert_eq!(p.target.count.of(Operation::Read).operations, 0);
    });
}

#[test]
fn t02_primary_write_before_start_fails() {
    run(async {
        let p = P::new();
        is_eio(write(&*p.node, 0, SIZE, 0x22).await);
        is_eio(p.node.write_zeroes(0, SIZE, ZeroFlags::default()).await);
        is_eio(p.node.discard(0, SIZE).await);
        assert_eq!(p.target.changes(), 0);
    });
}

/// Row: §14.38.
#[test]
fn t03_primary_stop_with_failover_succeeds() {
    run(async {
        let p = P::started().await;
        p.node.stop(true).await.unwrap();
        assert_eq!(p.node.stage(), Stage::Done);
    });
}

/// Row: §14.13.
#[test]
fn t04_primary_checkpoint_has_no_effect() {
    run(async {
        let p = P::started().await;
        fill(&*p.node, 0, MIB, 0x22).await;
        p.target.count.reset();
        p.node.checkpoint().await.unwrap();
        assert_eq!((p.target.changes(), p.node.stage()), (0, Stage::Running));
        fill(&*p.node, MIB, MIB, 0x33).await;
        expect(&*p.target.inner, 0, MIB, 0x22).await;
        expect(&*p.target.inner, MIB, MIB, 0x33).await;
    });
}

#[test]
fn t05_primary_get_error_without_errors_succeeds() {
    run(async {
        let p = P::started().await;
        fill(&*p.node, 0, MIB, 0x22).await;
        p.node.error().await.unwrap();
    });
}

/// Row: §14.9, §14.48.
#[test]
fn d01_primary_write_that_cannot_be_forwarded_succeeds_and_is_reported() {
    run(async {
        let p = P::started().await;
        p.target.fault.fail(Rule::new(Operation::Write).errno(28));
        p.target.fault.fail(Rule::new(Operation::Write));
        write(&*p.node, 4096, 512, 0x22).await.unwrap();
        write(&*p.node, 8192, 512, 0x22).await.unwrap();
        let error = reports_io_error(p.node.error().await).to_string();
        assert!(error.contains("512 bytes at 4096"), "not the first failure: {error}");
        reports_io_error(p.node.error().await);
        refused(p.node.start(ReplicationMode::Primary).await, RUNNING_OR_DONE);
        // What can be forwarded still is, and does not hide the failure.
        write(&*p.node, 4096, 512, 0x33).await.unwrap();
        expect(&*p.target.inner, 4096, 512, 0x33).await;
        reports_io_error(p.node.error().await);
    });
}

/// Row: §14.9, §14.14.
#[test]
fn d02_primary_write_after_stop_fails() {
    run(async {
        let p = P::started().await;
        p.target.fault.fail(Rule::new(Operation::Write));
        write(&*p.node, 0, 512, 0x22).await.unwrap();
        p.node.stop(false).await.unwrap();
        is_eio(write(&*p.node, 0, SIZE, 0x22).await);
        p.node.error().await.unwrap();
        expect(&*p.target.inner, 0, SIZE, 0).await;
    });
}

/// Row: §11.9.
#[test]
fn d03_primary_start_as_secondary_names_both_modes() {
    run(async {
        let p = P::new();
        let text = "The parameter mode's value is invalid, needs 0, but got 1";
        refused(p.node.start(ReplicationMode::Secondary).await, text);
        assert_eq!(p.node.stage(), Stage::None);
        let s = Setup::new(MIB).build().await;
        let text = "The parameter mode's value is invalid, needs 1, but got 0";
        refused(s.node.start(ReplicationMode::Primary).await, text);
        assert_eq!(s.node.stage(), Stage::None);
        // The mode is looked at in stage none only.
        p.node.start(ReplicationMode::Primary).await.unwrap();
        refused(p.node.start(ReplicationMode::Secondary).await, RUNNING_OR_DONE);
    });
}

#[test]
fn d04_primary_second_start_is_refused() {
    run(async {
        let p = P::started().await;
        refused(p.node.start(ReplicationMode::Primary).await, RUNNING_OR_DONE);
        fill(&*p.node, 0, 512, 0x22).await;
    });
}

/// The original ignores the start too; here a node that is done says that it is of no more use.
#[test]
fn d05_primary_after_stop_start_is_refused_and_other_calls_are_ignored() {
    run(async {
        let p = P::started().await;
        p.node.stop(false).await.unwrap();
        refused(p.node.start(ReplicationMode::Primary).await, CANNOT_RESTART);
        p.node.checkpoint().await.unwrap();
        p.node.stop(true).await.unwrap();
        assert_eq!(p.node.stage(), Stage::Done);
    });
}

#[test]
fn d06_primary_get_error_before_start_fails() {
    run(async { refused(P::new().node.error().await, NOT_RUNNING) });
}

#[test]
fn d07_primary_stop_before_start_fails() {
    run(async {
        let p = P::new();
        refused(p.node.stop(false).await, NOT_RUNNING);
        refused(p.node.stop(true).await, NOT_RUNNING);
        p.node.start(ReplicationMode::Primary).await.unwrap();
    });
}

/// The original's sides differ here; this one follows the older rule on both.
///
/// Row: §14.13.
#[test]
fn d08_primary_checkpoint_before_start_fails() {
    run(async { refused(P::new().node.checkpoint().await, NOT_RUNNING) });
}

#[test]
fn primary_reads_fail_in_every_stage() {
    run(async {
        let p = P::started().await;
        is_eio(p.node.read(0, 512).await);
        is_eio(p.node.block_status(0, 512).await);
        p.node.stop(false).await.unwrap();
        is_eio(p.node.read(0, 512).await);
        is_eio(p.node.block_status(0, 512).await);
    });
}

/// Row: §14.5, §14.6, §14.7.
#[test]
fn primary_forwards_discards_as_zeroes_and_flushes() {
    run(async {
        let p = P::started().await;
        fill(&*p.node, 0, MIB, 0x22).await;
        p.node.discard(0, 64 * KIB).await.unwrap();
        expect(&*p.target.inner, 0, 64 * KIB, 0).await;
        assert_eq!(p.target.count.of(Operation::Discard).operations, 0);
        p.node.flush(FlushLevel::Durable).await.unwrap();
        assert_eq!(p.target.count.of(Operation::Flush).operations, 1);
        p.target.fault.fail(Rule::new(Operation::Flush));
        p.node.flush(FlushLevel::Durable).await.unwrap();
        reports_io_error(p.node.error().await);
    });
}

#[test]
fn primary_failure_of_a_write_that_nobody_waits_for_is_reported() {
    run(async {
        let (p, failing) = failing_late().await;
        let hang = p.target.fault.hang(Rule::new(Operation::Write));
        let given_up = start_write(&p);
        hang.reached(1).await;
        drop(given_up);
        p.node.error().await.unwrap();
        failing.fail(Rule::new(Operation::Write));
        hang.release();
        while p.node.error().await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
}

/// Row: §14.38.
#[test]
fn primary_failure_that_comes_after_stop_is_not_reported() {
    run(async {
        let (p, failing) = failing_late().await;
        let hang = p.target.fault.hang(Rule::new(Operation::Write));
        let late = start_write(&p);
        hang.reached(1).await;
        p.node.stop(false).await.unwrap();
        failing.fail(Rule::new(Operation::Write));
        hang.release();
        late.await.unwrap();
        p.node.error().await.unwrap();
    });
}

/// A primary whose writes can be held up first and fail then.
async fn failing_late() -> (P, Arc<Fault>) {
    let failing = Fault::new(Memory::new("target", SIZE));
    let target = Probe::new(Arc::clone(&failing) as _);
    let node = PrimaryNode::new("p", Forward::Device(target.device()));
    node.start(ReplicationMode::Primary).await.unwrap();
    (P { target, node }, failing)
}

fn start_write(p: &P) -> Io<'_, ()> {
    p.node.write(0, Bytes::from_static(&[0x22; 512]), WriteFlags::default())
}
