//! Pre-images that are copied ahead of sequential writes.

mod common;

use std::sync::Arc;

use brep_backup::{CbwOptions, CopyBeforeWrite, SnapshotAccess};
use brep_block::{BlockDevice, ErrorKind, FlushLevel, Operation, WriteFlags};
use bytes::Bytes;
use common::Probe;

const K: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

struct Rig {
    source: Arc<Probe>,
    target: Arc<Probe>,
    filter: Arc<CopyBeforeWrite>,
    view: Arc<SnapshotAccess>,
}

fn rig(ahead_bytes: u64) -> Rig {
    let (source, target) = (Probe::new("disk", SIZE), Probe::slow("hidden", SIZE, 3));
    source.fill(0x11);
    let options = CbwOptions {
        barrier: Some(FlushLevel::Durable),
        ahead_bytes,
        ..CbwOptions::new("cbw").unit_bytes(4 * K)
    };
    let filter = CopyBeforeWrite::new(source.clone(), target.clone(), options).unwrap();
    let view = SnapshotAccess::new("view", &filter);
    Rig { source, target, filter, view }
}

impl Rig {
    async fn write(&self, offset: u64) -> brep_block::Result<()> {
        let data = Bytes::from(vec![0x22; 4 << 10]);
        self.filter.write(offset, data, WriteFlags::default()).await
    }

    async fn sequence(&self, start: u64, count: u64) {
        for i in 0..count {
            self.write(start + i * 4 * K).await.unwrap();
        }
    }

    async fn assert_view(&self) {
        self.filter.drain().await;
        let all = self.view.read(0, SIZE as usize).await.unwrap();
        assert!(all.iter().all(|byte| *byte == 0x11), "the view shows the checkpoint");
    }
}

#[tokio::test]
async fn of_many_sequential_writes_few_wait_for_a_flush() {
    let mut flushes = [0, 0];
    for (ahead_bytes, flushes) in [0, 256 * K].into_iter().zip(&mut flushes) {
        let rig = rig(ahead_bytes);
        rig.sequence(0, 256).await;
        rig.assert_view().await;
        *flushes = rig.target.take(Operation::Flush).len();
    }
    assert_eq!(flushes[0], 256, "one for each write");
    assert!(flushes[1] < 32, "{} flushes", flushes[1]);
}

#[tokio::test]
async fn no_more_is_copied_for_nothing_than_was_written() {
    let rig = rig(256 * K);
    rig.sequence(0, 20).await;
    rig.assert_view().await;
    let copied = rig.filter.stats().copied_bytes;
    assert!((80 * K..=160 * K).contains(&copied), "{copied} bytes for 80 KiB");
    for i in 0..20 {
        rig.write(MIB + i * 12 * K).await.unwrap();
    }
    rig.filter.drain().await;
    assert_eq!(rig.filter.stats().copied_bytes - copied, 80 * K, "and nothing without a sequence");
}

#[tokio::test]
async fn a_write_waits_for_the_copy_ahead_that_has_its_place() {
    let rig = rig(256 * K);
    rig.write(0).await.unwrap();
    // The second write asks for what comes after it, which does not end.
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write && op.offset >= 8 * K);
    rig.write(4 * K).await.unwrap();
    let data = Bytes::from(vec![0x22; 4 << 10]);
    let third = rig.filter.write(8 * K, data, WriteFlags::default());
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(rig.source.content_of(8 << 10, 1), [0x11], "it is not overwritten");
    gate.add_permits(100);
    third.await.unwrap();
    rig.assert_view().await;
}

#[tokio::test]
async fn a_copy_ahead_that_fails_is_counted_and_fails_nobody() {
    let rig = rig(256 * K);
    rig.target.fail_if(|op| op.operation == Operation::Write && op.offset >= 8 * K);
    rig.sequence(0, 2).await;
    rig.filter.drain().await;
    assert_eq!(rig.filter.stats().failures, 1);
    let error = rig.write(8 * K).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "who comes to the place is told");
    rig.target.repair();
    rig.sequence(8 * K, 30).await;
    rig.assert_view().await;
}

#[tokio::test]
async fn an_epoch_ends_only_after_what_is_copied_ahead_for_it() {
    let rig = rig(256 * K);
    rig.write(0).await.unwrap();
    let gate = rig.target.hold_if(|op| op.operation == Operation::Write && op.offset >= 8 * K);
    rig.write(4 * K).await.unwrap();
    assert_eq!(rig.filter.checkpoint().unwrap_err().kind(), ErrorKind::Locked);
    let ended = rig.filter.drain_ahead();
    let open = async {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(rig.filter.in_flight(), 1, "the copy ahead goes on");
        gate.add_permits(100);
    };
    tokio::join!(ended, open);
    assert_eq!(rig.filter.in_flight(), 0, "whoever waits for its end finds it ended");
    rig.filter.checkpoint().unwrap();
    rig.filter.drain_ahead().await;
}
