//! The quorum as controller (spec: series v3, section 6).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Memory, Operation,
    Replication, ReplicationMode, WriteFlags, ZeroFlags,
};
use brep_quorum::{Child, Quorum, QuorumOptions, ReadPattern};
use bytes::Bytes;

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
async fn start_wants_the_mode_primary() {
    let child = Replicator::new("remote");
    let quorum = quorum(ReadPattern::Fifo, std::slice::from_ref(&child));
    for mode in [Secondary, Unprotected] {
        let error = start(&quorum, mode).await.unwrap_err();
        assert!(error.detail().contains("replication mode for quorum should be 'primary'"));
    }
    assert!(child.calls().is_empty());
}

#[tokio::test]
async fn start_wants_the_read_pattern_fifo() {
    let quorum = quorum(ReadPattern::Quorum, &[Replicator::new("remote")]);
    let error = start(&quorum, Primary).await.unwrap_err();
    assert!(error.detail().contains("needs read pattern 'fifo'"), "{error}");
}

#[tokio::test]
async fn start_needs_a_child_that_replicates() {
    let quorum = quorum(ReadPattern::Fifo, &[]);
    let error = start(&quorum, Primary).await.unwrap_err();
    assert_eq!(error.detail(), "No child supports block replication");
}

#[tokio::test]
async fn start_stops_all_if_more_than_one_replicates() {
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
async fn calls_before_start_are_refused() {
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
async fn calls_are_forwarded_to_the_one_child_that_started() {
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
async fn a_stop_that_fails_ends_replication_all_the_same() {
    let quorum = quorum(ReadPattern::Fifo, &[Replicator::new("remote")]);
    start(&quorum, Primary).await.unwrap();
    let calls = quorum.replication().unwrap();
    assert_eq!(calls.stop(true).await.unwrap_err().detail(), "refused");
    assert_eq!(calls.stop(true).await.unwrap_err().detail(), "Block replication is not running");
}

#[tokio::test]
async fn a_repeated_start_fails_and_the_child_goes_on() {
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
