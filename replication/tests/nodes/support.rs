//! Nodes over disks in memory, and what is looked at in them.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{
    BlockDevice, Count, Error, Fault, FlushLevel, Memory, Operation, Replication, ReplicationMode,
    Result, WriteFlags,
};
use brep_qcow2::{CreateOptions, OpenOptions, Qcow2};
use brep_replication::node::{Forward, PrimaryNode, SecondaryNode, SecondaryOptions, Stage};
use bytes::Bytes;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
/// The length of every disk in the T cases.
pub const SIZE: u64 = 64 * MIB;
/// Half of it.
pub const H: u64 = 32 * MIB;

pub const NOT_RUNNING: &str = "Block replication is not running";
pub const RUNNING_OR_DONE: &str = "Block replication is running or done";
pub const CANNOT_RESTART: &str = "Cannot restart block replication";
pub const JOB_CANCELLED: &str = "Backup job was cancelled unexpectedly";
pub const IO_ERROR: &str = "I/O error occurred";

/// Runs a test; none waits longer than this for anything.
pub fn run(test: impl Future<Output = ()>) {
    build(false, test);
}

/// The same with a clock that jumps: what waits for a deadline meets it at once.
pub fn run_paused(test: impl Future<Output = ()>) {
    build(true, test);
}

fn build(paused: bool, test: impl Future<Output = ()>) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().start_paused(paused).build().unwrap();
    let limit = Duration::from_secs(if paused { 3600 } else { 60 });
    let ended = runtime.block_on(async { tokio::time::timeout(limit, test).await });
    ended.expect("the test waits for something that does not come");
}

/// A device with everything that a test looks at or breaks: counted, then broken, then kept.
#[derive(Debug, Clone)]
pub struct Probe {
    pub count: Arc<Count>,
    pub fault: Arc<Fault>,
    pub inner: Arc<dyn BlockDevice>,
}

impl Probe {
    pub fn new(inner: Arc<dyn BlockDevice>) -> Self {
        let fault = Fault::new(Arc::clone(&inner));
        let count = Count::new(Arc::clone(&fault) as _);
        Probe { count, fault, inner }
    }

    pub fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.count) as _
    }

    /// Requests that change content or size, since the last reset.
    pub fn changes(&self) -> u64 {
        let kinds =
            [Operation::Write, Operation::WriteZeroes, Operation::Discard, Operation::Truncate];
        kinds.into_iter().map(|kind| self.count.of(kind).operations).sum()
    }
}

/// The primary of the cases: a node over an empty disk, which stands for the connection.
pub struct P {
    pub target: Probe,
    pub node: Arc<PrimaryNode>,
}

impl P {
    pub fn new() -> Self {
        let target = Probe::new(Memory::new("target", SIZE));
        let node = PrimaryNode::new("p", Forward::Device(target.device()));
        P { target, node }
    }

    pub async fn started() -> Self {
        let p = P::new();
        p.node.start(ReplicationMode::Primary).await.unwrap();
        p
    }
}

/// What a secondary is made of.
pub struct Setup {
    pub size: u64,
    pub active_size: u64,
    pub unit_bytes: u64,
    pub hidden_image: fn(u64) -> CreateOptions,
    pub active_image: fn(u64) -> CreateOptions,
    pub has_base: bool,
    pub has_hidden: bool,
    pub top_id: &'static str,
    pub above: Vec<String>,
}

impl Setup {
    /// Plain qcow2 images, copied in their clusters of 64 KiB.
    pub fn new(size: u64) -> Self {
        Setup {
            size,
            active_size: size,
            unit_bytes: 64 * KIB,
            hidden_image: CreateOptions::new,
            active_image: CreateOptions::new,
            has_base: true,
            has_hidden: true,
            top_id: "s",
            above: Vec::new(),
        }
    }

    /// What brep uses itself: sub-clusters of 2 KiB.
    pub fn subclusters(size: u64) -> Self {
        Setup { active_image: CreateOptions::buffer, ..Setup::mixed(size) }
    }

    /// Pre-images are kept in sub-clusters, and the guest's writes in whole clusters.
    pub fn mixed(size: u64) -> Self {
        Setup { unit_bytes: 2 * KIB, hidden_image: CreateOptions::buffer, ..Setup::new(size) }
    }

    /// The secondary of the cases, its disk filled with 0x11, not started. Everything is in
    /// memory.
    pub async fn build(self) -> S {
        let base = Memory::new("s_local", self.size) as Arc<dyn BlockDevice>;
        let hidden = Memory::new_growable("hidden", 0) as Arc<dyn BlockDevice>;
        let active = Memory::new_growable("active", 0) as Arc<dyn BlockDevice>;
        self.build_over(base, hidden, active).await
    }

    pub async fn build_over(
        self,
        base: Arc<dyn BlockDevice>,
        hidden: Arc<dyn BlockDevice>,
        active: Arc<dyn BlockDevice>,
    ) -> S {
        fill(&*base, 0, self.size, 0x11).await;
        Qcow2::create(&hidden, &(self.hidden_image)(self.size)).await.unwrap();
        Qcow2::create(&active, &(self.active_image)(self.active_size)).await.unwrap();
        let (base, hidden, active) = (Probe::new(base), Probe::new(hidden), Probe::new(active));
        self.open(base, hidden, active).await.unwrap()
    }

    pub async fn open(self, base: Probe, hidden: Probe, active: Probe) -> Result<S> {
        let options = SecondaryOptions {
            name: "s".into(),
            base: self.has_base.then(|| base.device()),
            hidden: self.has_hidden.then(|| hidden.device()),
            active: active.device(),
            unit_bytes: self.unit_bytes,
            top_id: self.top_id.into(),
            above: self.above,
        };
        let node = SecondaryNode::open(options).await?;
        for probe in [&base, &hidden, &active] {
            probe.count.reset();
        }
        Ok(S { base, hidden, active, node })
    }

    pub async fn started(self) -> S {
        let s = self.build().await;
        s.start().await.unwrap();
        s
    }
}

/// The secondary of the cases. `base` is s_local as the disk itself; `hidden` and `active` are
/// the files of the images.
pub struct S {
    pub base: Probe,
    pub hidden: Probe,
    pub active: Probe,
    pub node: Arc<SecondaryNode>,
}

impl S {
    pub async fn start(&self) -> Result<()> {
        self.node.start(ReplicationMode::Secondary).await
    }

    /// What the primary's NBD server writes to.
    pub fn local(&self) -> Arc<dyn BlockDevice> {
        self.node.local().expect("the node runs")
    }

    /// The content of the hidden disk alone: the node is closed for it. What it does not have
    /// reads as zeroes.
    pub async fn close_and_open_hidden(&self) -> Arc<Qcow2> {
        self.node.close().await.unwrap();
        open_image(&self.hidden).await
    }

    pub async fn merged(&self) {
        stage_is(&self.node, Stage::Done).await;
    }
}

pub async fn open_image(file: &Probe) -> Arc<Qcow2> {
    Qcow2::open(Arc::clone(&file.inner), OpenOptions::default()).await.unwrap()
}

/// Waits for a stage that comes by itself.
pub async fn stage_is(node: &SecondaryNode, stage: Stage) {
    while node.stage() != stage {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Writes one byte value over a range, in requests that every device takes.
pub async fn fill(device: &dyn BlockDevice, offset: u64, len: u64, byte: u8) {
    let mut at = offset;
    while at < offset + len {
        let part = (offset + len - at).min(16 * MIB);
        write(device, at, part, byte).await.unwrap();
        at += part;
    }
}

/// One request.
pub async fn write(device: &dyn BlockDevice, offset: u64, len: u64, byte: u8) -> Result<()> {
    device.write(offset, pattern(len, byte), WriteFlags::default()).await
}

fn pattern(len: u64, byte: u8) -> Bytes {
    Bytes::from(vec![byte; len as usize])
}

/// Every byte of a range has this value.
#[track_caller]
pub fn expect<'a>(
    device: &'a dyn BlockDevice,
    offset: u64,
    len: u64,
    byte: u8,
) -> impl Future<Output = ()> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let mut at = offset;
        while at < offset + len {
            let part = (offset + len - at).min(16 * MIB);
            let data = device.read(at, part as usize).await.unwrap();
            if data != pattern(part, byte) {
                let bad = data.iter().position(|b| *b != byte).unwrap_or(data.len());
                panic!(
                    "{caller}: {} has {:02x?} and not {byte:#04x} at {}",
                    device.name(),
                    data.get(bad),
                    at + bad as u64
                );
            }
            at += part;
        }
    }
}

/// A request has failed with EIO.
#[track_caller]
pub fn is_eio<T: std::fmt::Debug>(result: Result<T>) {
    assert_eq!(result.unwrap_err().errno(), 5);
}

/// A call has failed with exactly this text, from this node.
#[track_caller]
pub fn refused(result: Result<()>, text: &str) {
    assert_eq!(result.unwrap_err().detail(), text);
}

/// get_error reports an I/O error; the text begins as the original's and goes on with the reason.
#[track_caller]
pub fn reports_io_error(result: Result<()>) -> Error {
    let error = result.unwrap_err();
    assert!(error.detail().starts_with(IO_ERROR), "{error}");
    error
}

/// Lets everything run that can run without outside help.
pub async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

pub async fn flush(device: &dyn BlockDevice) -> Result<()> {
    device.flush(FlushLevel::Durable).await
}
