//! A device for tests: memory that logs, fails, waits, and knows what was written to it.
#![allow(dead_code, unreachable_pub)]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Memory, Operation, Result,
    StatusFlags, WriteFlags, ZeroFlags,
};
use bytes::Bytes;
use tokio::sync::Semaphore;

pub type Rule = Box<dyn Fn(&Op) -> bool + Send + Sync>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    pub operation: Operation,
    pub offset: u64,
    pub len: u64,
}

pub struct Probe {
    memory: Arc<Memory>,
    log: Mutex<Vec<Op>>,
    fail: Mutex<Option<(ErrorKind, Rule)>>,
    gate: Mutex<Option<(Rule, Arc<Semaphore>)>>,
    /// What was written since the start.
    allocated: Mutex<Vec<Range<u64>>>,
    yields_max: u64,
    seed: AtomicU64,
    limits: Limits,
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.memory.name())
    }
}

impl Probe {
    pub fn new(name: &str, size: u64) -> Arc<Self> {
        Self::build(name, size, 0, Limits::default())
    }

    pub fn with_limits(name: &str, size: u64, limits: Limits) -> Arc<Self> {
        Self::build(name, size, 0, limits)
    }

    /// Every operation gives up the processor up to that often before it acts.
    pub fn slow(name: &str, size: u64, yields_max: u64) -> Arc<Self> {
        Self::build(name, size, yields_max, Limits::default())
    }

    fn build(name: &str, size: u64, yields_max: u64, limits: Limits) -> Arc<Self> {
        Arc::new(Probe {
            memory: Memory::new(name, size),
            log: Mutex::default(),
            fail: Mutex::default(),
            gate: Mutex::default(),
            allocated: Mutex::default(),
            yields_max,
            seed: AtomicU64::new(size ^ name.len() as u64),
            limits,
        })
    }

    /// Fills with a byte, without a trace.
    pub fn fill(&self, byte: u8) {
        let data = Bytes::from(vec![byte; self.memory.size() as usize]);
        let Io::Ready(result) = self.memory.write(0, data, WriteFlags::default()) else {
            panic!("memory is immediate")
        };
        result.unwrap();
    }

    pub fn content(&self) -> Vec<u8> {
        self.content_of(0, self.memory.size() as usize)
    }

    pub fn content_of(&self, offset: u64, len: usize) -> Vec<u8> {
        let Io::Ready(result) = self.memory.read(offset, len) else {
            panic!("memory is immediate")
        };
        result.unwrap().to_vec()
    }

    pub fn fail_if(&self, rule: impl Fn(&Op) -> bool + Send + Sync + 'static) {
        self.fail_with(ErrorKind::NoSpace, rule);
    }

    pub fn fail_with(&self, kind: ErrorKind, rule: impl Fn(&Op) -> bool + Send + Sync + 'static) {
        *self.fail.lock().unwrap() = Some((kind, Box::new(rule)));
    }

    pub fn repair(&self) {
        *self.fail.lock().unwrap() = None;
    }

    /// Operations that the rule names wait until the returned semaphore gets permits.
    pub fn hold_if(&self, rule: impl Fn(&Op) -> bool + Send + Sync + 'static) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        *self.gate.lock().unwrap() = Some((Box::new(rule), Arc::clone(&gate)));
        gate
    }

    pub fn log(&self) -> Vec<Op> {
        self.log.lock().unwrap().clone()
    }

    /// What was done, as (operation, offset, length), since the last call.
    pub fn take(&self, operation: Operation) -> Vec<(u64, u64)> {
        let log = std::mem::take(&mut *self.log.lock().unwrap());
        log.iter().filter(|op| op.operation == operation).map(|op| (op.offset, op.len)).collect()
    }

    /// From now on only this range is in the device's own layer.
    pub fn allocated_only(&self, range: Range<u64>) {
        *self.allocated.lock().unwrap() = vec![range];
    }

    fn act<'a, T: Send + 'static>(
        &'a self,
        op: Op,
        act: impl FnOnce() -> Result<T> + Send + 'a,
    ) -> Io<'a, T> {
        self.log.lock().unwrap().push(op);
        if let Some((kind, rule)) = self.fail.lock().unwrap().as_ref()
            && rule(&op)
        {
            let error = Error::new(op.operation, *kind, self.name(), "told to fail");
            return Io::err(error.at(op.offset, op.len));
        }
        let gate = self
            .gate
            .lock()
            .unwrap()
            .as_ref()
            .and_then(|(rule, gate)| rule(&op).then(|| Arc::clone(gate)));
        let yields = self.random(self.yields_max);
        let before = self.random(yields);
        if gate.is_none() && yields == 0 {
            return Io::Ready(act());
        }
        let act = std::sync::Mutex::new(Some(act));
        Io::future(async move {
            for _ in 0..before {
                tokio::task::yield_now().await;
            }
            if let Some(gate) = gate {
                gate.acquire().await.unwrap().forget();
            }
            let act = act.lock().unwrap().take().unwrap();
            let result = act();
            for _ in before..yields {
                tokio::task::yield_now().await;
            }
            result
        })
    }

    /// 0 to `max`.
    fn random(&self, max: u64) -> u64 {
        if max == 0 {
            return 0;
        }
        let step = |seed: u64| seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        let seed = self.seed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |s| Some(step(s)));
        (seed.unwrap() >> 33) % (max + 1)
    }

    fn allocate(&self, offset: u64, len: u64) {
        self.allocated.lock().unwrap().push(offset..offset + len);
    }
}

fn now<T>(io: Io<'_, T>) -> Result<T> {
    match io {
        Io::Ready(result) => result,
        _ => panic!("memory is immediate"),
    }
}

macro_rules! op {
    ($operation:ident, $offset:expr, $len:expr) => {
        Op { operation: Operation::$operation, offset: $offset, len: $len }
    };
}

impl BlockDevice for Probe {
    fn name(&self) -> &str {
        self.memory.name()
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.act(op!(Read, offset, len as u64), move || now(self.memory.read(offset, len)))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        self.act(op!(Write, offset, len), move || {
            self.allocate(offset, len);
            now(self.memory.write(offset, data, flags))
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.act(op!(WriteZeroes, offset, len), move || {
            self.allocate(offset, len);
            now(self.memory.write_zeroes(offset, len, flags))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.act(op!(Discard, offset, len), move || now(self.memory.discard(offset, len)))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        let status = now(self.memory.block_status(offset, len)).map(|status| {
            let ranges = self.allocated.lock().unwrap();
            let allocated = ranges.iter().any(|range| range.contains(&offset));
            let bounds = ranges.iter().flat_map(|range| [range.start, range.end]);
            let end = bounds.filter(|&bound| bound > offset).min().unwrap_or(u64::MAX);
            BlockStatus {
                len: status.len.min(end - offset),
                flags: StatusFlags { allocated, ..status.flags },
            }
        });
        Io::Ready(status)
    }

    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        self.act(op!(Flush, 0, 0), || Ok(()))
    }
}
