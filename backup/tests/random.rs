//! Concurrent writers, checkpoints and failing copies against a model.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use brep_backup::{CbwOptions, CopyBeforeWrite, SnapshotAccess};
use brep_block::{BlockDevice, Operation, WriteFlags, ZeroFlags};
use bytes::Bytes;
use common::Probe;

const SIZE: u64 = (64 << 10) + 300;
const WRITERS: u64 = 6;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        (self.0 >> 33) % limit
    }
}

/// What one writer did, in order. Writers own disjoint stripes of 700 bytes, so that their writes
/// share units without overlapping.
struct Change {
    offset: u64,
    len: u64,
    byte: u8,
    done: bool,
}

async fn writer(filter: Arc<CopyBeforeWrite>, number: u64, seed: u64) -> Vec<Change> {
    let mut random = Random(seed ^ (number << 40));
    let mut changes = Vec::new();
    let mut goes_on = None;
    for step in 0..60u64 {
        let stripe = (random.below(SIZE / 700 / WRITERS) * WRITERS + number) * 700;
        let somewhere = (stripe + random.below(600), stripe + 700);
        let (offset, end) = goes_on.take().unwrap_or(somewhere);
        let len = 1 + random.below(end - offset);
        if random.below(2) == 0 && offset + len < end {
            goes_on = Some((offset + len, end));
        }
        let byte = 1 + (step % 250) as u8;
        let (result, byte) = match random.below(4) {
            0 => (filter.write_zeroes(offset, len, ZeroFlags::default()).await, 0),
            1 => (filter.discard(offset, len).await, 0),
            _ => {
                let data = Bytes::from(vec![byte; len as usize]);
                (filter.write(offset, data, WriteFlags::default()).await, byte)
            }
        };
        changes.push(Change { offset, len, byte, done: result.is_ok() });
    }
    changes
}

async fn reader(view: Arc<SnapshotAccess>, expected: Arc<Vec<u8>>, stop: Arc<AtomicBool>) -> u64 {
    let mut random = Random(77);
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        let offset = random.below(SIZE - 1);
        let len = 1 + random.below((SIZE - offset).min(9000));
        let data = view.read(offset, len as usize).await.unwrap();
        assert!(data == expected[offset as usize..][..len as usize], "at {offset} for {len}");
        reads += 1;
        tokio::task::yield_now().await;
    }
    reads
}

async fn run(seed: u64, unit_bytes: u64, ahead_bytes: u64, failing: bool) {
    let (source, target) = (Probe::slow("disk", SIZE, 9), Probe::slow("hidden", SIZE, 9));
    source.fill(0xEE);
    let mut options = CbwOptions::new("cbw").unit_bytes(unit_bytes);
    options.discard_as_zeroes = true;
    options.ahead_bytes = ahead_bytes;
    let filter = CopyBeforeWrite::new(source.clone(), target.clone(), options).unwrap();
    let view = SnapshotAccess::new("view", &filter);
    if failing {
        let count = AtomicU64::new(0);
        target.fail_if(move |op| {
            op.operation == Operation::Write && count.fetch_add(1, Ordering::Relaxed) % 5 == 4
        });
    }
    for epoch in 0..4 {
        let mut model = source.content();
        let stop = Arc::new(AtomicBool::new(false));
        let expected = Arc::new(model.clone());
        let reading = tokio::spawn(reader(view.clone(), expected.clone(), stop.clone()));
        let writing: Vec<_> =
            (0..WRITERS).map(|n| tokio::spawn(writer(filter.clone(), n, seed + epoch))).collect();
        let mut refused = 0;
        for task in writing {
            for change in task.await.unwrap() {
                if change.done {
                    model[change.offset as usize..][..change.len as usize].fill(change.byte);
                } else {
                    refused += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(reading.await.unwrap() > 0);
        filter.drain().await;
        assert!(source.content() == model, "the source shows exactly the accepted writes");
        assert!(failing || refused == 0);
        let all = view.read(0, SIZE as usize).await.unwrap();
        assert!(all == *expected, "the view shows the checkpoint");
        if epoch % 2 == 0 {
            filter.checkpoint().unwrap();
        } else {
            filter.switch_target(target.clone()).unwrap();
        }
    }
    let stats = filter.stats();
    assert!(stats.copied_units > 0);
    assert_eq!(failing, stats.failures > 0);
}

#[tokio::test]
async fn the_view_shows_the_checkpoint_and_the_source_the_writes() {
    for seed in 0..4 {
        run(seed * 1000, 512 << (seed * 2), 0, false).await;
        run(seed * 1000, 512 << (seed * 2), 8 << 10, false).await;
    }
}

#[tokio::test]
async fn with_a_target_that_fails_now_and_then_nothing_is_lost() {
    for seed in 0..4 {
        run(5 + seed * 1000, 512 << (seed * 2), 0, true).await;
        run(5 + seed * 1000, 512 << (seed * 2), 8 << 10, true).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_view_holds_with_several_threads() {
    run(42, 2048, 0, false).await;
    run(43, 2048, 8 << 10, true).await;
}
