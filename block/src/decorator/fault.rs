use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::{
    BlockDevice, BlockStatus, Error, FlushLevel, Io, Limits, Operation, Replication, WriteFlags,
    ZeroFlags,
};

/// How often a [`Rule`] applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// To one operation.
    Once,
    /// To every operation from then on, until [`Fault::clear`].
    Forever,
}

/// Which operations something is to happen to.
///
/// ```
/// use brep_block::{Operation, Rule};
/// let no_space_from_the_third_on = Rule::new(Operation::Write).nth(3).forever().errno(28);
/// ```
#[derive(Debug, Clone)]
pub struct Rule {
    /// The kind of operation.
    pub operation: Operation,
    /// Apply to the n-th operation that fits, counted from 1 and from the moment at which the
    /// rule was given. `None` is the first.
    pub nth: Option<u64>,
    /// Only operations that touch this range of bytes fit. A flush touches everything.
    pub range: Option<Range<u64>>,
    /// How often.
    pub times: Times,
    /// The Linux error number of the failure.
    pub errno: i32,
}

impl Rule {
    /// The next operation of this kind, once, with `EIO`.
    #[must_use]
    pub fn new(operation: Operation) -> Self {
        Rule { operation, nth: None, range: None, times: Times::Once, errno: 5 }
    }

    /// The n-th that fits, counted from 1.
    #[must_use]
    pub fn nth(mut self, nth: u64) -> Self {
        self.nth = Some(nth);
        self
    }

    /// Only what touches this range of bytes.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// From then on, until cleared.
    #[must_use]
    pub fn forever(mut self) -> Self {
        self.times = Times::Forever;
        self
    }

    /// The Linux error number to fail with.
    #[must_use]
    pub fn errno(mut self, errno: i32) -> Self {
        self.errno = errno;
        self
    }

    fn fits(&self, operation: Operation, range: &Range<u64>) -> bool {
        self.operation == operation
            && self.range.as_ref().is_none_or(|r| r.start < range.end && range.start < r.end)
    }
}

/// Lets operations fail, stop half-way, wait or hang, as a plan says.
///
/// Of several rules that fit one operation the one that was given first applies. Without rules
/// everything passes through, at once.
#[derive(Debug)]
pub struct Fault {
    inner: Arc<dyn BlockDevice>,
    plan: Mutex<Vec<Active>>,
}

#[derive(Debug)]
struct Active {
    rule: Rule,
    effect: Effect,
    /// Operations that fitted.
    seen: u64,
}

#[derive(Debug, Clone)]
enum Effect {
    Fail,
    FailAfter,
    Short,
    Delay(Duration),
    Hang(watch::Receiver<Gate>, Arc<watch::Sender<u64>>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Closed,
    Open,
}

/// Lets go of the operations that hang; so does dropping it.
#[derive(Debug)]
#[must_use = "dropping the handle releases what hangs"]
pub struct Hang {
    gate: watch::Sender<Gate>,
    reached: watch::Receiver<u64>,
}

impl Hang {
    /// Lets everything go on that hangs, and everything that would.
    pub fn release(self) {
        drop(self);
    }

    /// Waits until `count` operations have reached the place where they hang.
    pub async fn reached(&self, count: u64) {
        let mut reached = self.reached.clone();
        if reached.wait_for(|&seen| seen >= count).await.is_err() {
            // The rule is gone, and with it whoever could reach it.
            std::future::pending().await
        }
    }
}

impl Drop for Hang {
    fn drop(&mut self) {
        self.gate.send_replace(Gate::Open);
    }
}

impl Fault {
    /// `inner`, under the same name, without faults.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Fault { inner, plan: Mutex::default() })
    }

    /// Operations that the rule applies to fail and do nothing.
    pub fn fail(&self, rule: Rule) {
        self.add(rule, Effect::Fail);
    }

    /// Operations that the rule applies to are carried out and then fail all the same.
    pub fn fail_after(&self, rule: Rule) {
        self.add(rule, Effect::FailAfter);
    }

    /// Reads and writes that the rule applies to do the first half of their range and then fail.
    /// Of other operations nothing is done.
    pub fn short(&self, rule: Rule) {
        self.add(rule, Effect::Short);
    }

    /// Operations that the rule applies to wait, by tokio's clock, before they start.
    pub fn delay(&self, rule: Rule, time: Duration) {
        self.add(rule, Effect::Delay(time));
    }

    /// Operations that the rule applies to wait for the handle's release before they start.
    pub fn hang(&self, rule: Rule) -> Hang {
        let (gate, closed) = watch::channel(Gate::Closed);
        let (seen, reached) = watch::channel(0);
        self.add(rule, Effect::Hang(closed, Arc::new(seen)));
        Hang { gate, reached }
    }

    /// Forgets every rule. What hangs goes on hanging until its handle releases it.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn add(&self, rule: Rule, effect: Effect) {
        self.lock().push(Active { rule, effect, seen: 0 });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Active>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to happen to this operation. Every rule that fits counts it.
    fn effect(&self, operation: Operation, range: Range<u64>) -> Option<(Effect, i32)> {
        let mut plan = self.lock();
        let mut found = None;
        plan.retain_mut(|active| {
            if !active.rule.fits(operation, &range) {
                return true;
            }
            active.seen += 1;
            let first = active.rule.nth.unwrap_or(1);
            if found.is_some() || active.seen < first {
                return true;
            }
            found = Some((active.effect.clone(), active.rule.errno));
            active.rule.times == Times::Forever
        });
        found
    }

    fn run<'a, T: Send + 'a>(
        &'a self,
        operation: Operation,
        range: Range<u64>,
        whole: impl FnOnce(&'a dyn BlockDevice) -> Io<'a, T> + Send + 'a,
        half: impl FnOnce(&'a dyn BlockDevice) -> Io<'a, ()> + Send + 'a,
    ) -> Io<'a, T> {
        let (offset, len) = (range.start, range.end - range.start);
        let Some((effect, errno)) = self.effect(operation, range) else {
            return whole(&*self.inner);
        };
        let fault = move |detail: &str| {
            let error = std::io::Error::from_raw_os_error(errno);
            let kind = Error::from_os(operation, "", &error).kind();
            let error = Error::new(operation, kind, self.name(), format!("{error} ({detail})"));
            error.with_errno(Some(errno)).at(offset, len)
        };
        match effect {
            Effect::Fail => Io::err(fault("injected")),
            Effect::FailAfter => Io::future(async move {
                whole(&*self.inner).await?;
                Err(fault("injected after the operation"))
            }),
            Effect::Short => Io::future(async move {
                half(&*self.inner).await?;
                Err(fault("injected after the first half"))
            }),
            Effect::Delay(time) => Io::future(async move {
                tokio::time::sleep(time).await;
                whole(&*self.inner).await
            }),
            Effect::Hang(gate, reached) => Io::future(async move {
                pass(gate, &reached).await;
                whole(&*self.inner).await
            }),
        }
    }
}

async fn pass(mut gate: watch::Receiver<Gate>, reached: &watch::Sender<u64>) {
    reached.send_modify(|count| *count += 1);
    // The handle opens the gate before it goes away.
    let _ = gate.wait_for(|gate| *gate == Gate::Open).await;
}

fn nothing<'a>(_: &'a dyn BlockDevice) -> Io<'a, ()> {
    Io::ok(())
}

fn range(offset: u64, len: u64) -> Range<u64> {
    offset..offset.saturating_add(len)
}

impl BlockDevice for Fault {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.run(
            Operation::Read,
            range(offset, len as u64),
            move |d| d.read(offset, len),
            move |d| discard_data(d, offset, len / 2),
        )
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len();
        let first = data.slice(..len / 2);
        self.run(
            Operation::Write,
            range(offset, len as u64),
            move |d| d.write(offset, data, flags),
            move |d| d.write(offset, first, flags),
        )
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.run(
            Operation::WriteZeroes,
            range(offset, len),
            move |d| d.write_zeroes(offset, len, flags),
            nothing,
        )
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.run(Operation::Discard, range(offset, len), move |d| d.discard(offset, len), nothing)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.run(
            Operation::BlockStatus,
            range(offset, len),
            move |d| d.block_status(offset, len),
            nothing,
        )
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.run(Operation::Flush, 0..u64::MAX, move |d| d.flush(level), nothing)
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.run(Operation::Truncate, size..u64::MAX, move |d| d.truncate(size), nothing)
    }

    fn replication(&self) -> Option<&dyn Replication> {
        self.inner.replication()
    }
}

fn discard_data(device: &dyn BlockDevice, offset: u64, len: usize) -> Io<'_, ()> {
    Io::future(async move { device.read(offset, len).await.map(drop) })
}
