//! A failover that fails or is cancelled: D19 and D20.

use std::sync::Arc;

use brep_block::{BlockDevice, Operation, Replication, Rule};
use brep_replication::node::Stage;

use crate::support::*;

/// Byte X at which the merge fails.
const X: u64 = 640 * KIB;

/// Of a disk of 1 MiB: the guest wrote 0x33 to the first 128 KiB and to the 128 KiB before X, the
/// primary wrote 0x22 to the second 128 KiB and to 128 KiB from X on.
async fn before_failover(setup: Setup) -> S {
    let s = setup.started().await;
    fill(&*s.node, 0, 128 * KIB, 0x33).await;
    fill(&*s.node, X - 128 * KIB, 128 * KIB, 0x33).await;
    fill(&*s.local(), 128 * KIB, 128 * KIB, 0x22).await;
    fill(&*s.local(), X, 128 * KIB, 0x22).await;
    s
}

async fn guest_sees_its_disk(disk: &dyn BlockDevice) {
    expect(disk, 0, 128 * KIB, 0x33).await;
    expect(disk, 128 * KIB, X - 256 * KIB, 0x11).await;
    expect(disk, X - 128 * KIB, 128 * KIB, 0x33).await;
    expect(disk, X, MIB - X, 0x11).await;
}

async fn failed(setup: Setup) -> S {
    let s = before_failover(setup).await;
    s.base.fault.fail(Rule::new(Operation::Write).range(X..X + 1).errno(28));
    s.node.stop(true).await.unwrap();
    stage_is(&s.node, Stage::Failed).await;
    s
}

/// Row: §11.26, §14.41, §14.53.
#[test]
fn d19_merge_that_fails_is_reported_and_the_disk_stays_complete() {
    run(async {
        for setup in [Setup::new(MIB), Setup::subclusters(MIB)] {
            let s = failed(setup).await;
            let error = reports_io_error(s.node.error().await);
            assert!(error.to_string().contains("s_local: write"), "{error}");
            guest_sees_its_disk(&*s.node).await;
            refused(s.start().await, RUNNING_OR_DONE);
            refused(s.node.checkpoint().await, JOB_CANCELLED);
            refused(s.node.stop(true).await, NOT_RUNNING);
            refused(s.node.stop(false).await, NOT_RUNNING);
            reports_io_error(s.node.error().await);
            guest_sees_its_disk(&*s.node).await;
        }
    });
}

/// Row: §14.11, §14.53.
#[test]
fn d19_after_a_failed_merge_writes_go_where_the_range_is() {
    run(async {
        for setup in [Setup::new(MIB), Setup::subclusters(MIB)] {
            let s = failed(setup).await;
            // In the active disk, in the hidden disk, in none of them; and one across all.
            for offset in [X - 64 * KIB, X + 64 * KIB] {
                s.base.count.reset();
                write(&*s.node, offset + 100, 600, 0x44).await.unwrap();
                assert_eq!(s.base.changes(), 0, "at {offset}");
                expect(&*s.node, offset + 100, 600, 0x44).await;
                expect(&*s.node, offset + 700, 100, if offset < X { 0x33 } else { 0x11 }).await;
            }
            let unallocated = 384 * KIB;
            s.active.count.reset();
            write(&*s.node, unallocated + 100, 600, 0x55).await.unwrap();
            s.node.write_zeroes(unallocated + 2000, 100, Default::default()).await.unwrap();
            s.node.discard(unallocated + 3000, 100).await.unwrap();
            assert_eq!(s.active.changes(), 0);
            for disk in [&*s.node as &dyn BlockDevice, &*s.base.inner] {
                expect(disk, unallocated, 100, 0x11).await;
                expect(disk, unallocated + 100, 600, 0x55).await;
                expect(disk, unallocated + 2000, 100, 0).await;
                expect(disk, unallocated + 3000, 100, 0).await;
            }
            fill(&*s.node, 0, MIB, 0x66).await;
            expect(&*s.node, 0, MIB, 0x66).await;
            expect(&*s.base.inner, 256 * KIB, 256 * KIB, 0x66).await;
            s.base.count.reset();
            flush(&*s.node).await.unwrap();
            assert_eq!(s.base.count.of(Operation::Flush).operations, 1, "both have been written");
        }
    });
}

/// Of a disk whose merge has failed: the hidden disk has 2 KiB in the middle of a cluster of the
/// active disk, which has nothing of it.
const CLUSTER: u64 = 512 * KIB;
const KEPT: u64 = CLUSTER + 32 * KIB;

async fn failed_in_a_cluster() -> S {
    let s = Setup::mixed(MIB).started().await;
    write(&*s.local(), KEPT, 2 * KIB, 0x22).await.unwrap();
    s.base.fault.fail(Rule::new(Operation::Write));
    s.node.stop(true).await.unwrap();
    stage_is(&s.node, Stage::Failed).await;
    s
}

fn spawn_write(s: &S, offset: u64, byte: u8) -> tokio::task::JoinHandle<brep_block::Result<()>> {
    let node = Arc::clone(&s.node);
    tokio::spawn(async move { write(&*node, offset, 512, byte).await })
}

/// A write to the active disk copies the rest of its cluster from below: that must not cover what
/// a neighbour is writing to the secondary disk.
#[test]
fn d19_write_in_a_cluster_does_not_lose_its_neighbours_write() {
    run(async {
        let s = failed_in_a_cluster().await;
        let hang = s.base.fault.hang(Rule::new(Operation::Write));
        let neighbour = spawn_write(&s, KEPT + 16 * KIB, 0x55);
        hang.reached(1).await;
        let kept = spawn_write(&s, KEPT + 100, 0x44);
        settle().await;
        hang.release();
        neighbour.await.unwrap().unwrap();
        kept.await.unwrap().unwrap();
        expect(&*s.node, KEPT, 100, 0x11).await;
        expect(&*s.node, KEPT + 100, 512, 0x44).await;
        expect(&*s.node, KEPT + 16 * KIB, 512, 0x55).await;
    });
}

#[test]
fn d19_requests_in_a_cluster_do_not_wait_for_each_other_for_ever() {
    run(async {
        let s = failed_in_a_cluster().await;
        // The first write is copying what lies before it when the others come.
        let hang = s.base.fault.hang(Rule::new(Operation::Read).range(CLUSTER..CLUSTER + 512));
        let writes = [(KEPT + 100, 0x44), (KEPT + 16 * KIB, 0x55), (KEPT - 16 * KIB, 0x66)];
        let tasks = writes.map(|(offset, byte)| spawn_write(&s, offset, byte));
        let node = Arc::clone(&s.node);
        let read = tokio::spawn(async move { node.read(CLUSTER, 64 << 10).await });
        hang.reached(1).await;
        settle().await;
        hang.release();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        read.await.unwrap().unwrap();
        for (offset, byte) in writes {
            expect(&*s.node, offset - 100, 100, 0x11).await;
            expect(&*s.node, offset, 512, byte).await;
            expect(&*s.node, offset + 512, 100, 0x11).await;
        }
    });
}

/// Row: §14.46.
#[test]
fn d20_close_ends_a_merge_before_it_returns() {
    run(async {
        let s = before_failover(Setup::subclusters(MIB)).await;
        let hang = s.base.fault.hang(Rule::new(Operation::Write).range(X - 64 * KIB..X));
        s.node.stop(true).await.unwrap();
        hang.reached(1).await;
        assert_eq!(s.node.stage(), Stage::Failover);
        let node = Arc::clone(&s.node);
        let close = tokio::spawn(async move { node.close().await });
        settle().await;
        assert!(!close.is_finished(), "a write of the merge is still in flight");
        hang.release();
        close.await.unwrap().unwrap();
        let changes = s.base.changes();
        settle().await;
        assert_eq!(s.base.changes(), changes);
        // What the merge had not come to is as it was; its sources are whole.
        expect(&*s.base.inner, X, 128 * KIB, 0x22).await;
        is_eio(write(&*s.node, 0, 512, 0x44).await);
        let hidden = open_image(&s.hidden).await;
        expect(&*hidden, X, 128 * KIB, 0x11).await;
        let active = open_image(&s.active).await;
        expect(&*active, X - 128 * KIB, 128 * KIB, 0x33).await;
    });
}

/// Row: §14.46.
#[test]
fn d20_close_does_not_wait_for_ever_for_a_merge_that_hangs() {
    run_paused(async {
        let s = before_failover(Setup::subclusters(MIB)).await;
        let hang = s.base.fault.hang(Rule::new(Operation::Write).range(X - 64 * KIB..X));
        s.node.stop(true).await.unwrap();
        hang.reached(1).await;
        let error = s.node.close().await.unwrap_err();
        assert_eq!(error.kind(), brep_block::ErrorKind::TimedOut);
        guest_sees_its_disk(&*s.node).await;
        hang.release();
        s.node.close().await.unwrap();
    });
}

/// Row: §14.42.
#[test]
fn failover_serves_and_merges_at_the_same_time() {
    run(async {
        let s = before_failover(Setup::subclusters(MIB)).await;
        let hang = s.base.fault.hang(Rule::new(Operation::Write).range(X..X + KIB));
        s.node.stop(true).await.unwrap();
        hang.reached(1).await;
        s.node.error().await.unwrap();
        refused(s.start().await, CANNOT_RESTART);
        s.node.checkpoint().await.unwrap();
        s.node.stop(false).await.unwrap();
        // What has been merged, what has not, and what no layer has.
        for offset in [64 * KIB, 384 * KIB, 900 * KIB] {
            write(&*s.node, offset + 100, 600, 0x44).await.unwrap();
            expect(&*s.node, offset + 100, 600, 0x44).await;
        }
        hang.release();
        s.merged().await;
        for disk in [&*s.node as &dyn BlockDevice, &*s.base.inner] {
            expect(disk, 0, 64 * KIB + 100, 0x33).await;
            expect(disk, 64 * KIB + 700, 1000, 0x33).await;
            expect(disk, X, 128 * KIB, 0x11).await;
            for offset in [64 * KIB, 384 * KIB, 900 * KIB] {
                expect(disk, offset + 100, 600, 0x44).await;
            }
        }
    });
}
