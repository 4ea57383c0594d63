//! The rows of the original series: errors that are ignored (series v3, section 3), and the quorum
//! as the controller of its replicating child (section 6). Rows about option text are in
//! `option_text.rs`.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Memory, Operation,
    Replication, ReplicationMode, WriteFlags, ZeroFlags,
};
use brep_quorum::{Child, Quorum, QuorumError, QuorumOptions, ReadPattern};
use bytes::Bytes;
use common::{failing, failure, rig};

/// A child that replicates, and remembers what it was told.
#[derive(Debug)]
struct Replicator {
    memory: Arc<Memory>,
    running: AtomicBool,
    calls: Mutex<Vec<String>>,
}

impl Replicator {
    fn new(name: &str) -> Arc<Self> {
        let memory = Memory::new(name, 512);
        Arc::new(Replicator { memory, running: AtomicBool::new(false), calls: Mutex::default() })
    }

    fn call(&self, text: String, ok: bool) -> Io<'_, ()> {
        self.calls.lock().unwrap().push(text);
        if ok {
            return Io::ok(());
        }
        Io::err(Error::new(Operation::Control, ErrorKind::InvalidInput, self.name(), "refused"))
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Replication for Replicator {
    fn start(&self, mode: ReplicationMode) -> Io<'_, ()> {
        let was_running = self.running.swap(true, Ordering::Relaxed);
        self.call(format!("start {mode:?}"), !was_running)
    }

    fn checkpoint(&self) -> Io<'_, ()> {
        self.call("checkpoint".into(), true)
    }

    fn stop(&self, failover: bool) -> Io<'_, ()> {
        self.running.store(false, Ordering::Relaxed);
        self.call(format!("stop {failover}"), !failover)
    }

    fn error(&self) -> Io<'_, ()> {
        self.call("error".into(), true)
    }
}

impl BlockDevice for Replicator {
    fn name(&self) -> &str {
        self.memory.name()
    }
    fn size(&self) -> u64 {
        self.memory.size()
    }
    fn limits(&self) -> Limits {
        self.memory.limits()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.memory.read(offset, len)
    }
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.memory.write(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.memory.write_zeroes(offset, len, flags)
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.memory.discard(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.memory.block_status(offset, len)
    }
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.memory.flush(level)
    }
    fn replication(&self) -> Option<&dyn Replication> {
        Some(self)
    }
}

fn quorum(pattern: ReadPattern, replicators: &[Arc<Replicator>]) -> Arc<Quorum> {
    let mut children = vec![Child::new(Memory::new("local", 512) as _)];
    children.extend(replicators.iter().map(|r| Child::new(r.clone() as _).ignore_errors()));
    Quorum::new(QuorumOptions::new("quorum", 1, children).read_pattern(pattern)).unwrap()
}

async fn start(quorum: &Quorum, mode: ReplicationMode) -> brep_block::Result<()> {
    quorum.replication().unwrap().start(mode).await
}

use ReplicationMode::{Primary, Secondary, Unprotected};

#[tokio::test]
async fn s6_start_in_another_mode_than_primary_is_refused() {
    let child = Replicator::new("remote");
    let quorum = quorum(ReadPattern::Fifo, std::slice::from_ref(&child));
    for mode in [Secondary, Unprotected] {
        let error = start(&quorum, mode).await.unwrap_err();
        assert!(error.detail().contains("replication mode for quorum should be 'primary'"));
    }
    assert!(child.calls().is_empty());
}

#[tokio::test]
async fn s6_start_with_another_read_pattern_than_fifo_is_refused() {
    let quorum = quorum(ReadPattern::Quorum, &[Replicator::new("remote")]);
    let error = start(&quorum, Primary).await.unwrap_err();
    assert!(error.detail().contains("needs read pattern 'fifo'"), "{error}");
}

#[tokio::test]
async fn s6_start_without_a_replicating_child_is_refused() {
    let quorum = quorum(ReadPattern::Fifo, &[]);
    let error = start(&quorum, Primary).await.unwrap_err();
    assert_eq!(error.detail(), "No child supports block replication");
}

/// Their errors are discarded; the one that succeeds is remembered.
#[tokio::test]
async fn s6_start_is_tried_on_every_child_and_one_success_is_enough() {
    let children = ["a", "b", "c"].map(Replicator::new);
    let quorum = quorum(ReadPattern::Fifo, &children);
    for running in [0, 2] {
        children[running].running.store(true, Ordering::Relaxed);
    }
    start(&quorum, Primary).await.unwrap();
    quorum.replication().unwrap().checkpoint().await.unwrap();
    let calls = children.each_ref().map(|child| child.calls());
    assert_eq!(calls[0], ["start Primary"]);
    assert_eq!(calls[1], ["start Primary", "checkpoint"]);
    assert_eq!(calls[2], ["start Primary"]);
}

#[tokio::test]
async fn s6_start_with_two_replicating_children_stops_all_and_is_refused() {
    let children = [Replicator::new("a"), Replicator::new("b")];
    let quorum = quorum(ReadPattern::Fifo, &children);
    let error = start(&quorum, Primary).await.unwrap_err();
    assert_eq!(error.detail(), "Too many children support block replication");
    for child in &children {
        assert_eq!(child.calls(), ["start Primary", "stop false"]);
    }
    let error = quorum.replication().unwrap().checkpoint().await.unwrap_err();
    assert_eq!(error.detail(), "Block replication is not running");
}

#[tokio::test]
async fn s6_checkpoint_and_stop_before_start_are_refused() {
    let quorum = quorum(ReadPattern::Fifo, &[Replicator::new("remote")]);
    let calls = quorum.replication().unwrap();
    for error in [
        calls.checkpoint().await.unwrap_err(),
        calls.stop(false).await.unwrap_err(),
        calls.error().await.unwrap_err(),
    ] {
        assert_eq!(error.detail(), "Block replication is not running");
    }
}

#[tokio::test]
async fn s6_checkpoint_and_stop_are_forwarded_to_the_one_child_that_started() {
    let child = Replicator::new("remote");
    let quorum = quorum(ReadPattern::Fifo, std::slice::from_ref(&child));
    start(&quorum, Primary).await.unwrap();
    let calls = quorum.replication().unwrap();
    calls.checkpoint().await.unwrap();
    calls.error().await.unwrap();
    calls.stop(false).await.unwrap();
    assert_eq!(child.calls(), ["start Primary", "checkpoint", "error", "stop false"]);
}

#[tokio::test]
async fn s6_a_stop_that_fails_ends_replication_all_the_same() {
    let quorum = quorum(ReadPattern::Fifo, &[Replicator::new("remote")]);
    start(&quorum, Primary).await.unwrap();
    let calls = quorum.replication().unwrap();
    assert_eq!(calls.stop(true).await.unwrap_err().detail(), "refused");
    assert_eq!(calls.stop(true).await.unwrap_err().detail(), "Block replication is not running");
}

#[tokio::test]
async fn s6_a_repeated_start_fails_and_the_child_goes_on() {
    let child = Replicator::new("remote");
    let quorum = quorum(ReadPattern::Fifo, std::slice::from_ref(&child));
    start(&quorum, Primary).await.unwrap();
    let error = start(&quorum, Primary).await.unwrap_err();
    assert_eq!(error.detail(), "No child supports block replication");
    quorum.replication().unwrap().checkpoint().await.unwrap();
}

#[tokio::test]
async fn removing_the_child_that_replicates_ends_replication() {
    let quorum = quorum(ReadPattern::Fifo, &[Replicator::new("remote")]);
    start(&quorum, Primary).await.unwrap();
    quorum.remove_child("children.1").await.unwrap();
    let error = quorum.replication().unwrap().stop(false).await.unwrap_err();
    assert_eq!(error.detail(), "Block replication is not running");
}

/// A read that fails is not reported, and is no success for the threshold.
#[tokio::test]
async fn s3_a_failed_read_of_an_ignored_child_is_not_reported_and_is_no_success() {
    let ignoring = |threshold, pattern| {
        rig(2, threshold, |options: &mut QuorumOptions| {
            options.children[0].ignore_errors = true;
            options.settings.read_pattern = pattern;
        })
    };
    for pattern in [ReadPattern::Quorum, ReadPattern::Fifo] {
        let rig = ignoring(1, pattern);
        rig.fault[0].fail(failing(Operation::Read, 5));
        assert_eq!(rig.read(0).await.unwrap(), 0);
        assert_eq!(rig.events(), []);
    }
    let rig = ignoring(2, ReadPattern::Quorum);
    rig.fault[0].fail(failing(Operation::Read, 5));
    rig.read(0).await.unwrap_err();
    assert_eq!(rig.events(), [failure(0, 1)]);
}

#[tokio::test]
async fn s3_a_failed_write_of_an_ignored_child_is_not_reported_and_is_no_success() {
    let ignoring = |threshold| {
        rig(2, threshold, |options: &mut QuorumOptions| options.children[1].ignore_errors = true)
    };
    let rig = ignoring(1);
    rig.fault[1].fail(failing(Operation::Write, 5));
    rig.write(0, 1).await.unwrap();
    assert_eq!(rig.events(), []);
    let rig = ignoring(2);
    rig.fault[1].fail(failing(Operation::Write, 5));
    rig.write(0, 1).await.unwrap_err();
    assert_eq!(rig.events(), [failure(0, 1)]);
}

#[tokio::test]
async fn s3_a_failed_flush_of_an_ignored_child_counts_as_flushed() {
    let rig = rig(2, 2, |options| options.children[1].ignore_errors = true);
    rig.fault[1].fail(failing(Operation::Flush, 5));
    rig.quorum.flush(FlushLevel::Durable).await.unwrap();
    assert_eq!(rig.events(), []);
}

fn sized(ignored: &[usize], sizes: &[u64]) -> Result<u64, QuorumError> {
    let make = |(i, size): (usize, &u64)| Child {
        device: Memory::new(format!("node{i}"), *size),
        ignore_errors: ignored.contains(&i),
    };
    let children = sizes.iter().enumerate().map(make).collect();
    Ok(Quorum::new(QuorumOptions::new("q", 1, children))?.size())
}

#[test]
fn s3_a_length_of_0_of_an_ignored_child_is_skipped() {
    assert_eq!(sized(&[1], &[512, 0]).unwrap(), 512);
    assert_eq!(sized(&[0], &[0, 512]).unwrap(), 512);
    assert_eq!(sized(&[], &[512, 0]).unwrap_err().errno(), 5, "nobody else's");
}

#[test]
fn s3_lengths_that_are_known_must_agree() {
    for ignored in [&[][..], &[1], &[0, 1]] {
        let error = sized(ignored, &[512, 1024]).unwrap_err();
        assert_eq!(error.errno(), 5);
        assert!(error.to_string().contains("size of node1 differs"), "{error}");
    }
}

#[test]
fn s3_a_length_that_nobody_knows_is_an_error() {
    let error = sized(&[0, 1], &[0, 0]).unwrap_err();
    assert_eq!(error.errno(), 5);
    assert!(error.to_string().contains("no child knows the size"), "{error}");
}
