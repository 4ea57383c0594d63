//! Requests that are in flight when a call comes, and calls that come together or fail half-way.

use std::sync::Arc;

use brep_block::{BlockDevice, ErrorKind, Operation, Replication, Result, Rule};
use brep_replication::node::Stage;
use tokio::task::JoinHandle;

use crate::support::*;

fn spawn_write(disk: Arc<dyn BlockDevice>, offset: u64, byte: u8) -> JoinHandle<Result<()>> {
    tokio::spawn(async move { write(&*disk, offset, 4096, byte).await })
}

fn spawn_stop(s: &S, failover: bool) -> JoinHandle<Result<()>> {
    let node = Arc::clone(&s.node);
    tokio::spawn(async move { node.stop(failover).await })
}

#[test]
fn guest_write_in_flight_at_a_failover_is_not_lost() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let hang = s.active.fault.hang(Rule::new(Operation::Write));
        let guest = spawn_write(Arc::clone(&s.node) as _, 0, 0x33);
        hang.reached(1).await;
        let stop = spawn_stop(&s, true);
        settle().await;
        assert!(!stop.is_finished());
        hang.release();
        guest.await.unwrap().unwrap();
        stop.await.unwrap().unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, 4096, 0x33).await;
        expect(&*s.base.inner, 4096, 4096, 0x11).await;
    });
}

#[test]
fn guest_write_during_a_stop_is_either_dropped_or_kept_whole() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let hang = s.active.fault.hang(Rule::new(Operation::Write));
        let before = spawn_write(Arc::clone(&s.node) as _, 0, 0x33);
        hang.reached(1).await;
        let stop = spawn_stop(&s, false);
        settle().await;
        let after = spawn_write(Arc::clone(&s.node) as _, 8192, 0x44);
        settle().await;
        assert!(!after.is_finished(), "held until the stop has been decided");
        hang.release();
        before.await.unwrap().unwrap();
        stop.await.unwrap().unwrap();
        after.await.unwrap().unwrap();
        expect(&*s.base.inner, 0, 8192, 0x11).await;
        expect(&*s.base.inner, 8192, 4096, 0x44).await;
        expect(&*s.node, 8192, 4096, 0x44).await;
    });
}

/// Row: §11.23, §13.4.
#[test]
fn late_writes_of_the_primary_reach_nothing() {
    run(async {
        for failover in [true, false] {
            let s = Setup::subclusters(MIB).started().await;
            let local = s.local();
            s.node.stop(failover).await.unwrap();
            is_eio(write(&*local, 0, 4096, 0x22).await);
            s.merged().await;
            is_eio(write(&*local, 0, 4096, 0x22).await);
            assert!(s.node.local().is_none());
            expect(&*s.base.inner, 0, MIB, 0x11).await;
        }
    });
}

#[test]
fn primary_write_in_flight_at_a_failover_is_waited_for_and_undone() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let hang = s.base.fault.hang(Rule::new(Operation::Write));
        let primary = spawn_write(s.local(), 0, 0x22);
        hang.reached(1).await;
        let stop = spawn_stop(&s, true);
        settle().await;
        assert!(!stop.is_finished());
        hang.release();
        primary.await.unwrap().unwrap();
        stop.await.unwrap().unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, MIB, 0x11).await;
    });
}

/// Row: §10.5.
#[test]
fn primary_write_in_flight_at_a_checkpoint_belongs_to_it() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let hang = s.hidden.fault.hang(Rule::new(Operation::Write));
        let primary = spawn_write(s.local(), 0, 0x22);
        hang.reached(1).await;
        let node = Arc::clone(&s.node);
        let checkpoint = tokio::spawn(async move { node.checkpoint().await });
        settle().await;
        assert!(!checkpoint.is_finished());
        // Later ones do not.
        let later = spawn_write(s.local(), 8192, 0x44);
        settle().await;
        hang.release();
        checkpoint.await.unwrap().unwrap();
        primary.await.unwrap().unwrap();
        later.await.unwrap().unwrap();
        expect(&*s.node, 0, 4096, 0x22).await;
        expect(&*s.node, 4096, MIB - 4096, 0x11).await;
        expect(&*s.base.inner, 8192, 4096, 0x44).await;
    });
}

#[test]
fn guest_read_in_flight_does_not_see_a_later_write_of_the_primary() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        // It has been decided that the secondary disk has the range.
        let hang = s.base.fault.hang(Rule::new(Operation::Read));
        let node = Arc::clone(&s.node);
        let read = tokio::spawn(async move { node.read(0, 4096).await });
        hang.reached(1).await;
        let primary = spawn_write(s.local(), 0, 0x22);
        settle().await;
        hang.release();
        let data = read.await.unwrap().unwrap();
        assert!(data.iter().all(|b| *b == 0x11));
        primary.await.unwrap().unwrap();
        expect(&*s.base.inner, 0, 4096, 0x22).await;
        expect(&*s.node, 0, 4096, 0x11).await;
    });
}

/// Also on behalf of the primary, whose window is bounded.
#[test]
fn checkpoint_that_would_wait_too_long_changes_nothing() {
    run_paused(async {
        let s = Setup::subclusters(MIB).started().await;
        fill(&*s.node, 512 * KIB, 4096, 0x33).await;
        write(&*s.local(), 8192, 4096, 0x22).await.unwrap();
        let hang = s.base.fault.hang(Rule::new(Operation::Write));
        let primary = spawn_write(s.local(), 0, 0x22);
        hang.reached(1).await;
        for failover in [None, Some(true), Some(false)] {
            let result = match failover {
                None => s.node.checkpoint().await,
                Some(failover) => s.node.stop(failover).await,
            };
            assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut);
            assert_eq!(s.node.stage(), Stage::Running);
        }
        expect(&*s.node, 4096, 8192, 0x11).await;
        expect(&*s.node, 512 * KIB, 4096, 0x33).await;
        hang.release();
        primary.await.unwrap().unwrap();
        s.node.checkpoint().await.unwrap();
        expect(&*s.node, 0, 4096, 0x22).await;
        expect(&*s.node, 512 * KIB, 4096, 0x11).await;
    });
}

/// Row: §11.21, §14.37, §14.52.
#[test]
fn checkpoint_that_cannot_empty_the_active_disk_leaves_the_old_one() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        fill(&*s.node, 8192, 4096, 0x33).await;
        flush(&*s.node).await.unwrap();
        s.active.fault.fail(Rule::new(Operation::Write).forever());
        let error = s.node.checkpoint().await.unwrap_err();
        assert!(error.detail().starts_with("Cannot make active disk empty: "), "{error}");
        s.node.error().await.unwrap();
        expect(&*s.node, 0, 8192, 0x11).await;
        expect(&*s.node, 8192, 4096, 0x33).await;
        assert_eq!(s.node.stage(), Stage::Running);
    });
}

/// What the guest wrote is gone then, and the old checkpoint is whole: never the new one in some
/// places and the old one in others.
///
/// Row: §11.21, §14.36, §14.37, §14.52.
#[test]
fn checkpoint_that_cannot_empty_the_hidden_disk_leaves_the_old_one() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        fill(&*s.node, 8192, 4096, 0x33).await;
        s.hidden.fault.fail(Rule::new(Operation::Write).forever());
        let error = s.node.checkpoint().await.unwrap_err();
        assert!(error.detail().starts_with("Cannot make hidden disk empty: "), "{error}");
        s.node.error().await.unwrap();
        expect(&*s.node, 0, MIB, 0x11).await;
        s.hidden.fault.clear();
        // What has a pre-image may be overwritten again, nothing else.
        write(&*s.local(), 0, 4096, 0x44).await.unwrap();
        write(&*s.local(), 64 * KIB, 4096, 0x44).await.unwrap_err();
        expect(&*s.node, 0, MIB, 0x11).await;
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, MIB, 0x11).await;
    });
}

/// The hidden disk has been emptied, and giving back its clusters failed: what the filter took
/// for copied is to be copied again.
///
/// Row: §11.21.
#[test]
fn checkpoint_that_fails_after_emptying_keeps_new_pre_images() {
    run(async {
        let mut nth = 1;
        loop {
            let s = Setup::subclusters(MIB).started().await;
            write(&*s.local(), 0, 4096, 0x22).await.unwrap();
            flush(&*s.local()).await.unwrap();
            s.hidden.fault.fail(Rule::new(Operation::Write).nth(nth));
            s.hidden.fault.fail(Rule::new(Operation::Read).nth(nth));
            let result = s.node.checkpoint().await;
            s.hidden.fault.clear();
            let seen = if s.node.read(0, 1).await.unwrap()[0] == 0x22 { 0x22 } else { 0x11 };
            assert!(result.is_err() || seen == 0x22);
            // Whichever checkpoint it is, the primary cannot change it.
            let _ = write(&*s.local(), 0, 4096, 0x44).await;
            expect(&*s.node, 0, 4096, seen).await;
            if result.is_ok() {
                break;
            }
            nth += 1;
        }
        assert!(nth > 1);
    });
}

#[test]
fn concurrent_starts_start_once() {
    run(async {
        let s = Setup::new(MIB).build().await;
        let image = open_image(&s.active).await;
        fill(&*image, 0, MIB, 0x77).await;
        image.close().await.unwrap();
        let S { base, hidden, active, .. } = s;
        let s = Setup::new(MIB).open(base, hidden, active).await.unwrap();
        let hang = s.active.fault.hang(Rule::new(Operation::Write));
        let starts = async { tokio::join!(s.start(), s.start()) };
        let release = async {
            hang.reached(1).await;
            settle().await;
            assert_eq!(s.node.stage(), Stage::None);
            hang.release();
        };
        let ((one, two), ()) = tokio::join!(starts, release);
        one.unwrap();
        refused(two, RUNNING_OR_DONE);
        expect(&*s.node, 0, MIB, 0x11).await;
    });
}

/// A caller that gives up does not leave a call half done.
#[test]
fn call_that_its_caller_gave_up_runs_to_its_end() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        fill(&*s.node, 8192, 4096, 0x33).await;
        let hang = s.active.fault.hang(Rule::new(Operation::Write));
        let node = Arc::clone(&s.node);
        let checkpoint = tokio::spawn(async move { node.checkpoint().await });
        hang.reached(1).await;
        checkpoint.abort();
        assert!(checkpoint.await.unwrap_err().is_cancelled());
        hang.release();
        expect(&*s.node, 0, 4096, 0x22).await;
        expect(&*s.node, 8192, 4096, 0x11).await;
    });
}

#[test]
fn writes_around_checkpoints_never_show_a_mixture() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        for byte in 0x20..0x34 {
            let primary = spawn_write(s.local(), 4096, byte);
            let node = Arc::clone(&s.node);
            let checkpoint = tokio::spawn(async move { node.checkpoint().await });
            primary.await.unwrap().unwrap();
            checkpoint.await.unwrap().unwrap();
            s.node.checkpoint().await.unwrap();
            expect(&*s.node, 4096, 4096, byte).await;
        }
    });
}
