//! Many histories, and what they had in all.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brep_block::plant::Plant;

use crate::files::Files;
use crate::history::History;
use crate::network::Net;
use crate::rng::Rng;
use crate::seen;
use crate::world::World;

/// No history lasts longer, by its own clock.
const HISTORY_LIMIT: Duration = Duration::from_secs(3600);

/// No history takes more of a processor: one that does runs in a circle in which no time passes.
const CPU_LIMIT: Duration = Duration::from_secs(60);

/// What is to be run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) first: u64,
    pub(crate) runs: u64,
    pub(crate) plant: Option<Plant>,
    pub(crate) jobs: u64,
    pub(crate) verbose: u8,
}

/// What became of a history.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) failure: Option<String>,
    pub(crate) hash: u64,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) last: Vec<String>,
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A panic in a task would be swallowed by whoever waits for the task.
fn watch_panics() {
    panic::set_hook(Box::new(|info| {
        let told = info.to_string();
        PANIC.with_borrow_mut(|panic| {
            panic.get_or_insert(told);
        });
    }));
}

/// Lives through one history.
pub(crate) fn run_one(seed: u64, plant: Option<Plant>, verbose: u8) -> Outcome {
    let world = World::new(seed, verbose);
    let shared = Arc::clone(&world);
    let lived = in_world(&world, seed, plant, async move {
        let history = History::new(&shared, seed);
        match tokio::time::timeout(HISTORY_LIMIT, history.run()).await {
            Ok(outcome) => outcome,
            Err(_) => Err("liveness: stuck".to_owned()),
        }
    });
    let counts = world.lock().counts.clone();
    Outcome { seed, failure: lived.err(), hash: world.hash(), counts, last: world.last_events() }
}

/// Lives in a world: its files, its network and its time take the place of the outside.
pub(crate) fn in_world<T>(
    world: &Arc<World>,
    seed: u64,
    plant: Option<Plant>,
    life: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    PANIC.set(None);
    brep_block::plant::install(plant);
    let files = Rc::new(Files(Arc::clone(world)));
    brep_block::storage::install(Some(files.clone()));
    brep_hbitmap::persist::install(Some(files));
    brep_nbd::simulation::install(Some(Rc::new(Net(Arc::clone(world)))));
    let mut identities = Rng::new(seed ^ 0x1d);
    brep_replication::simulation::install(Some(Box::new(move || {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&identities.next().to_le_bytes());
        bytes[8..].copy_from_slice(&identities.next().to_le_bytes());
        bytes
    })));
    let lived = panic::catch_unwind(AssertUnwindSafe(|| {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        // In which order several are woken that watch one value: by chance, else.
        #[cfg(tokio_unstable)]
        runtime.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
        let runtime = runtime
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without I/O needs nothing");
        runtime.block_on(life)
    }));
    brep_block::storage::install(None);
    brep_hbitmap::persist::install(None);
    brep_nbd::simulation::install(None);
    brep_replication::simulation::install(None);
    brep_block::plant::install(None);
    match (PANIC.take(), lived) {
        (Some(panic), _) => Err(panic),
        (None, Ok(outcome)) => outcome,
        (None, Err(_)) => Err("a panic without a message".to_owned()),
    }
}

/// Runs all; tells whether every one has passed.
pub(crate) fn run(plan: &Plan) -> bool {
    watch_panics();
    if let Some(plant) = plan.plant {
        return find(plan, plant);
    }
    let started = Instant::now();
    let next = AtomicU64::new(plan.first);
    let end = plan.first + plan.runs;
    let failed = AtomicBool::new(false);
    let counts = Mutex::new(BTreeMap::<String, u64>::new());
    let passed = AtomicU64::new(0);
    let running = Mutex::new(BTreeMap::<u64, Duration>::new());
    let ended = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while ended.load(Ordering::Relaxed) < plan.runs {
                std::thread::sleep(Duration::from_millis(100));
                let running = running.lock().expect("no panic under this lock");
                let (now, limit) = (cpu_time(), CPU_LIMIT * plan.jobs as u32);
                let stuck = running.iter().find(|(_, since)| now.saturating_sub(**since) > limit);
                if let Some((seed, _)) = stuck {
                    println!("FAILED: seed {seed}: goes round without an end");
                    println!("seed {seed}: cargo xtask simulate --seed {seed}");
                    std::process::exit(1);
                }
            }
        });
        for _ in 0..plan.jobs.min(plan.runs) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    running.lock().expect("no panic").insert(seed, cpu_time());
                    let outcome = run_one(seed, None, plan.verbose);
                    running.lock().expect("no panic").remove(&seed);
                    ended.fetch_add(1, Ordering::Relaxed);
                    let mut all = counts.lock().expect("no panic under this lock");
                    for (what, count) in &outcome.counts {
                        *all.entry(what.clone()).or_default() += count;
                    }
                    match &outcome.failure {
                        None => drop(passed.fetch_add(1, Ordering::Relaxed)),
                        Some(_) if !failed.swap(true, Ordering::Relaxed) => {
                            print_failure(&outcome, plan.verbose);
                        }
                        Some(why) => println!("FAILED: seed {}: {why}", outcome.seed),
                    }
                    if plan.verbose > 0 {
                        println!("trace {:016x}", outcome.hash);
                    }
                }
            });
        }
    });
    let passed = passed.into_inner();
    let seconds = started.elapsed().as_secs_f64();
    let complete = summary(&counts.into_inner().expect("no panic under this lock"), plan.runs);
    println!(
        "{passed} of {} histories passed, {seconds:.1} s, {:.1} ms each",
        plan.runs,
        seconds * 1000.0 / (passed.max(1) as f64) * plan.jobs as f64
    );
    passed == plan.runs && complete
}

/// What this process has had of processors so far.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    // See proc(5): utime and stime, in ticks of 10 ms.
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
    Duration::from_millis(ticks * 10)
}

/// Prints what was counted; tells whether so many histories have had everything.
pub(crate) fn summary(counts: &BTreeMap<String, u64>, runs: u64) -> bool {
    for (what, count) in counts {
        println!("{count:>10}  {what}");
    }
    let missing = seen::missing(counts);
    if runs < seen::HISTORIES_MIN || missing.is_empty() {
        return true;
    }
    println!("FAILED: never seen: {}", missing.join(", "));
    false
}

/// Looks for all bugs, several at a time; tells whether every one was found.
pub(crate) fn find_all(plan: &Plan) -> bool {
    watch_panics();
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let missed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs {
            scope.spawn(|| {
                while let Some((_, plant)) =
                    Plant::ALL.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                {
                    if !find(plan, *plant) {
                        missed.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    let missed = missed.into_inner();
    println!(
        "{} planted bugs: {}, {seconds:.1} s",
        Plant::ALL.len(),
        match missed {
            true => "FAILED",
            false => "all found",
        }
    );
    !missed
}

/// Looks for a planted bug: a history that breaks an invariant with it, and passes without it.
fn find(plan: &Plan, plant: Plant) -> bool {
    let mut others = 0;
    for seed in plan.first..plan.first + plan.runs {
        let outcome = run_one(seed, Some(plant), plan.verbose);
        let Some(why) = outcome.failure else { continue };
        let Some(invariant) = invariant(&why) else {
            others += 1;
            continue;
        };
        if let Some(why) = run_one(seed, None, 0).failure {
            println!("{plant:?}: history {seed}: and without it: FAILED: {why}");
            return false;
        }
        let histories = seed - plan.first + 1;
        println!(
            "{plant:?}: found by {invariant} in history {seed}, after {histories} ({others} of them \
             failed in another way): {why}"
        );
        return true;
    }
    println!("FAILED: {plant:?} was not found in {} histories", plan.runs);
    false
}

/// The invariants that a failure says to be broken.
fn invariant(why: &str) -> Option<&str> {
    let (names, _) = why.split_once(':')?;
    let is_invariant =
        |name: &str| name.strip_prefix('I').is_some_and(|number| number.parse::<u8>().is_ok());
    names.split(", ").all(is_invariant).then_some(names)
}

fn print_failure(outcome: &Outcome, verbose: u8) {
    if verbose == 0 {
        for line in &outcome.last {
            println!("{line}");
        }
    }
    println!("FAILED: {}", outcome.failure.as_deref().unwrap_or_default());
    println!("seed {}: cargo xtask simulate --seed {}", outcome.seed, outcome.seed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invariant_is_told_from_other_failures() {
        assert_eq!(invariant("I7: the disks differ: disk 0"), Some("I7"));
        assert_eq!(invariant("I2, I3: promoted to 4"), Some("I2, I3"));
        assert_eq!(invariant("liveness: stuck"), None);
        assert_eq!(invariant("panicked at x.rs: boom"), None);
        assert_eq!(invariant("Io"), None);
    }

    #[cfg(tokio_unstable)]
    #[test]
    fn the_same_seed_gives_the_same_history() {
        for seed in 1..=20 {
            // Each in a thread of its own: nothing of the first may help the second.
            let live = || std::thread::spawn(move || run_one(seed, None, 0)).join();
            let (first, second) = (live().expect("it ended"), live().expect("it ended"));
            assert_eq!(first.last, second.last, "seed {seed}");
            assert_eq!(first.hash, second.hash, "seed {seed}");
            assert_eq!(first.counts, second.counts, "seed {seed}");
        }
    }
}
