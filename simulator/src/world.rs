//! Everything that a history shares: the two machines, what is wrong with them, the trace.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use tokio::time::{Duration, Instant};

use crate::names::Names;
use crate::network::{Direction, Waiting};
use crate::rng::Rng;
use crate::seen::Seen;

/// How verbose a world is that prints every operation.
const EVERY_OPERATION: u8 = 2;

/// Events that are kept to be printed after a failure.
const LAST_EVENTS: usize = 400;

/// A machine of the pair.
pub(crate) type Side = usize;
pub(crate) const A: Side = 0;
pub(crate) const B: Side = 1;

/// One run of the process on a machine. What a process does that has been killed reaches nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life {
    pub(crate) side: Side,
    pub(crate) number: u32,
}

/// What is wrong with a machine's disks.
#[derive(Debug, Clone, Default)]
pub(crate) struct DiskFaults {
    /// Operations in a thousand that fail, and whether half of them is done first.
    pub(crate) failing: u64,
    /// Only files whose name contains this fail.
    pub(crate) only: Option<&'static str>,
    /// Nothing ends.
    pub(crate) hanging: bool,
    /// No file grows.
    pub(crate) full: bool,
    /// Operations in a thousand that take some time, and milliseconds of it at most.
    pub(crate) slow: u64,
    pub(crate) slow_ms_max: u64,
}

/// How a process ends that is not asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// `kill -9`.
    Kill,
    /// Its machine loses its power.
    PowerLoss,
}

#[derive(Debug, Default)]
pub(crate) struct Machine {
    pub(crate) life: u32,
    pub(crate) alive: bool,
    pub(crate) boot: u32,
    pub(crate) faults: DiskFaults,
    /// Operations in a thousand that fail on the bad child of its quorums.
    pub(crate) failing_child: u64,
    pub(crate) names: Names,
    /// Operations on files, maps and connections that its processes have begun.
    pub(crate) operations: u64,
    /// The process ends at this operation of its, counted down.
    pub(crate) ends_in: Option<(u64, End)>,
}

/// What is wrong with the link between the machines.
#[derive(Debug, Clone, Default)]
pub(crate) struct LinkFaults {
    /// By sending side: nothing arrives.
    pub(crate) stalled: [bool; 2],
    /// Nobody can connect.
    pub(crate) down: bool,
    pub(crate) delay_ms_max: u64,
}

pub(crate) struct Inner {
    pub(crate) rng: Rng,
    pub(crate) machines: [Machine; 2],
    pub(crate) link: LinkFaults,
    pub(crate) listeners: BTreeMap<(Side, u16), (Life, Arc<Waiting>)>,
    pub(crate) directions: Vec<Arc<Direction>>,
    pub(crate) counts: BTreeMap<String, u64>,
    /// A number that grows with everything that guests and operators see.
    ticks: u64,
    hash: u64,
    last: VecDeque<String>,
    start: Option<Instant>,
    /// The first thing that must not be.
    pub(crate) violation: Option<String>,
    /// 1: every event is printed; 2: and every operation.
    pub(crate) verbose: u8,
}

pub(crate) struct World {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl World {
    pub(crate) fn new(seed: u64, verbose: u8) -> Arc<Self> {
        let inner = Inner {
            rng: Rng::new(seed),
            machines: Default::default(),
            link: LinkFaults::default(),
            listeners: BTreeMap::new(),
            directions: Vec::new(),
            counts: BTreeMap::new(),
            ticks: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            last: VecDeque::new(),
            start: None,
            violation: None,
            verbose,
        };
        Arc::new(World { inner: Mutex::new(inner) })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("a simulation is one thread, and ends with a panic")
    }

    pub(crate) fn begin(&self) {
        self.lock().start = Some(Instant::now());
    }

    pub(crate) fn with_rng<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.lock().rng)
    }

    pub(crate) fn tick(&self) -> u64 {
        let mut inner = self.lock();
        inner.ticks += 1;
        inner.ticks
    }

    /// Something that many histories have to have had.
    pub(crate) fn saw(&self, what: Seen) {
        self.count(what.name());
    }

    pub(crate) fn count(&self, what: &str) {
        let mut inner = self.lock();
        match inner.counts.get_mut(what) {
            Some(count) => *count += 1,
            None => {
                inner.counts.insert(what.to_owned(), 1);
            }
        }
    }

    /// Something that belongs to the history: part of the trace.
    pub(crate) fn note(&self, event: impl FnOnce() -> String) {
        self.lock().note(event());
    }

    pub(crate) fn violated(&self, what: String) {
        let mut inner = self.lock();
        inner.note(format!("VIOLATION {what}"));
        inner.violation.get_or_insert(what);
    }

    pub(crate) fn is_violated(&self) -> bool {
        self.lock().violation.is_some()
    }

    pub(crate) fn hash(&self) -> u64 {
        self.lock().hash
    }

    pub(crate) fn last_events(&self) -> Vec<String> {
        self.lock().last.iter().cloned().collect()
    }

    pub(crate) fn is_alive(&self, life: Life) -> bool {
        self.lock().is_alive(life)
    }

    /// Something that has no line of its own in the trace, and belongs to it.
    pub(crate) fn mix(&self, value: u64) {
        self.lock().mix(value);
    }

    /// Contents that are written or sent belong to the trace.
    pub(crate) fn mix_bytes(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| inner.mix(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| inner.mix(u64::from(*byte)));
    }

    /// An operation of a process. False: the process is dead, and nothing happens.
    pub(crate) fn operate(&self, life: Life, kind: u64) -> bool {
        let woken = {
            let mut inner = self.lock();
            if !inner.is_alive(life) {
                return false;
            }
            let ms = inner.start.map_or(0, |start| start.elapsed().as_millis() as u64);
            inner.mix(kind ^ (life.side as u64) << 8 ^ ms << 16);
            if inner.verbose >= EVERY_OPERATION {
                println!("{ms:>7} ms  {life} operation {kind}, trace {:016x}", inner.hash);
            }
            let machine = &mut inner.machines[life.side];
            machine.operations += 1;
            match &mut machine.ends_in {
                Some((0, end)) => {
                    let end = *end;
                    inner.note(format!("{life} ends in an operation: {end:?}"));
                    inner.end(life.side, end)
                }
                Some((left, _)) => {
                    *left -= 1;
                    return true;
                }
                None => return true,
            }
        };
        woken.into_iter().for_each(Waker::wake);
        false
    }

    pub(crate) fn kill(&self, side: Side) {
        self.end(side, End::Kill);
    }

    pub(crate) fn end(&self, side: Side, end: End) {
        let woken = self.lock().end(side, end);
        woken.into_iter().for_each(Waker::wake);
    }

    /// How long an operation takes, if not no time at all.
    pub(crate) fn disk_delay(&self, side: Side) -> Option<Duration> {
        let mut inner = self.lock();
        let Inner { rng, machines, .. } = &mut *inner;
        let faults = &machines[side].faults;
        if faults.hanging {
            return Some(Duration::from_millis(1));
        }
        if faults.slow == 0 || !rng.chance(faults.slow) {
            return None;
        }
        Some(Duration::from_millis(rng.range(0, faults.slow_ms_max)))
    }
}

impl std::fmt::Display for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", name(self.side), self.number)
    }
}

pub(crate) fn name(side: Side) -> &'static str {
    ["a", "b"][side]
}

impl Inner {
    pub(crate) fn is_alive(&self, life: Life) -> bool {
        let machine = &self.machines[life.side];
        machine.alive && machine.life == life.number
    }

    fn mix(&mut self, value: u64) {
        self.hash = (self.hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    }

    pub(crate) fn note(&mut self, event: String) {
        let ms = self.start.map_or(0, |start| start.elapsed().as_millis());
        self.mix(ms as u64);
        for chunk in event.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
        let line = format!("{ms:>7} ms  {event}");
        if self.verbose > 0 {
            println!("{line}");
        }
        if self.last.len() == LAST_EVENTS {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    fn end(&mut self, side: Side, end: End) -> Vec<Waker> {
        let woken = self.kill(side);
        if end == End::PowerLoss {
            self.lose_power(side);
        }
        woken
    }

    fn lose_power(&mut self, side: Side) {
        let machine = &mut self.machines[side];
        machine.boot += 1;
        let losses = machine.names.lose_power(&mut self.rng);
        self.note(format!("power of {}: {losses:?}", name(side)));
        for (what, count) in losses.counts().into_iter().filter(|(_, count)| *count > 0) {
            *self.counts.entry(what.name().to_owned()).or_default() += count;
        }
    }

    /// Ends the process at once. What it had sent still arrives; whoever waits for it is woken.
    fn kill(&mut self, side: Side) -> Vec<Waker> {
        let machine = &mut self.machines[side];
        if !machine.alive {
            return Vec::new();
        }
        machine.alive = false;
        machine.ends_in = None;
        self.listeners.retain(|(owner, _), _| *owner != side);
        let mut woken = Vec::new();
        self.directions.retain(|direction| {
            if [direction.from, direction.to].iter().flatten().any(|life| life.side == side) {
                direction.close(side);
                woken.append(&mut direction.take_wakers());
            }
            !direction.is_closed()
        });
        woken
    }
}
