//! A crash at every point of a history: of the process, where all earlier writes to the file
//! stay, and of the machine, where any of those since the last flush may be missing.
#![allow(missing_docs)]

mod common;

use std::ops::Range;
use std::sync::Arc;

use brep_block::{BlockDevice, FlushLevel, Memory, WriteFlags};
use brep_qcow2::{CheckMode, CreateOptions, MakeEmpty, OpenOptions, Qcow2, check};
use bytes::Bytes;
use common::recorder::{Event, Recorder, Replay};
use common::{Op, Rng, open_with, pattern, read_all};

const SIZE: u64 = 384 << 10;

/// What happened between two points of the event log.
struct Step {
    start: usize,
    end: usize,
    before: Vec<u8>,
    after: Vec<u8>,
    /// All of `after` is on stable storage from `end` on.
    flushed: bool,
    /// The bytes that it was about.
    touched: Range<u64>,
}

struct History {
    events: Vec<Event>,
    steps: Vec<Step>,
    backing: Arc<dyn BlockDevice>,
    ordered: bool,
}

#[derive(Clone)]
struct Plan {
    create: CreateOptions,
    ordered: bool,
    empty: Option<MakeEmpty>,
    seed: u64,
    ops: usize,
}

impl History {
    async fn run(plan: &Plan) -> History {
        let base = pattern(99, SIZE as usize - 100_000);
        let backing: Arc<dyn BlockDevice> = Memory::new("backing", base.len() as u64);
        let whole = Bytes::from(base.clone());
        backing.write(0, whole, WriteFlags::default()).await.unwrap();
        let mut empty = base;
        empty.resize(SIZE as usize, 0);

        let recorder = Recorder::new();
        let file: Arc<dyn BlockDevice> = recorder.clone();
        common::create(&file, &plan.create).await;
        file.flush(FlushLevel::Durable).await.unwrap();
        let options = options(&backing, plan.ordered);
        let disk = open_with(&file, options).await;
        let mut rng = Rng::new(plan.seed);
        let mut model = empty.clone();
        let mut steps = Vec::new();
        let mut start = recorder.position();
        for i in 0..plan.ops {
            let before = model.clone();
            let (mut flushed, mut touched) = (false, 0..0);
            match plan.empty {
                Some(how) if i % 9 == 8 => {
                    disk.make_empty(how).await.unwrap();
                    model.clone_from(&empty);
                    touched = 0..SIZE;
                }
                _ if i % 7 == 6 => while disk.release_space(1 << 16).await.unwrap() > 0 {},
                _ => {
                    let op = Op::random(&mut rng, SIZE);
                    flushed = matches!(op, Op::Flush);
                    touched = op.range();
                    op.apply(&*disk).await.unwrap();
                    op.model(&mut model, &*disk).await;
                }
            }
            let end = recorder.position();
            steps.push(Step { start, end, before, after: model.clone(), flushed, touched });
            start = end;
        }
        assert!(read_all(&*disk).await == model);
        disk.close().await.unwrap();
        let end = recorder.position();
        let (before, after) = (model.clone(), model);
        steps.push(Step { start, end, before, after, flushed: true, touched: 0..0 });
        History { events: recorder.events(), steps, backing, ordered: plan.ordered }
    }

    fn first(&self) -> usize {
        self.steps[0].start
    }

    /// Opens a file as it was left behind, and returns what the disk contains. No check finds
    /// damage, unless the file says itself that it may be damaged; then opening repairs it.
    async fn recover(&self, replay: &Replay, what: &str) -> Vec<u8> {
        let file = replay.file().await;
        let report = check(&file, CheckMode::Report).await.unwrap();
        let dirty = file.read(79, 1).await.unwrap()[0] & 1 == 1;
        assert!(dirty || report.corruptions == 0, "{what}: {report:?}");
        assert_eq!(report.check_errors, 0, "{what}: {report:?}");
        let disk = Qcow2::open(file.clone(), options(&self.backing, self.ordered)).await;
        let disk = disk.unwrap_or_else(|error| panic!("{what}: {error}"));
        let content = read_all(&*disk).await;
        // It can be written, and repaired to a clean image.
        let data = Bytes::from_static(&[7; 5000]);
        disk.write(1000, data, WriteFlags::default()).await.unwrap();
        disk.close().await.unwrap();
        let report = check(&file, CheckMode::RepairLeaks).await.unwrap();
        assert!(report.is_clean(), "{what}: {report:?}");
        content
    }
}

fn options(backing: &Arc<dyn BlockDevice>, ordered: bool) -> OpenOptions {
    OpenOptions { ordered, ..common::over(backing) }
}

/// The first byte that is neither old nor new.
fn neither(now: &[u8], before: &[u8], after: &[u8]) -> Option<usize> {
    for at in (0..now.len()).step_by(4096) {
        let part = at..now.len().min(at + 4096);
        if now[part.clone()] != before[part.clone()] && now[part.clone()] != after[part.clone()] {
            let wrong = part.into_iter().find(|&i| now[i] != before[i] && now[i] != after[i]);
            if wrong.is_some() {
                return wrong;
            }
        }
    }
    None
}

fn plans() -> Vec<Plan> {
    let standard = CreateOptions::new(SIZE);
    let small = CreateOptions { cluster_bits: 12, ..standard.clone() };
    let tiny = CreateOptions { cluster_bits: 9, refcount_order: 6, ..standard.clone() };
    let buffer = CreateOptions::buffer(SIZE);
    let mut plans = Vec::new();
    for (i, create) in [standard, small, tiny, buffer].into_iter().enumerate() {
        for empty in [None, Some(MakeEmpty::Keep), Some(MakeEmpty::Release)] {
            let plan = Plan { create: create.clone(), ordered: true, empty, seed: 0, ops: 40 };
            plans.push(Plan { seed: i as u64 + 1, ..plan });
        }
    }
    plans
}

#[tokio::test]
async fn a_kill_at_any_point_loses_no_acknowledged_write() {
    for plan in plans() {
        let plan = Plan { ordered: false, ..plan };
        let history = History::run(&plan).await;
        let mut replay = Replay::default();
        history.events[..history.first()].iter().for_each(|event| replay.apply(event));
        // Tiny clusters make long histories: not every point of those.
        let stride = 1 + history.events.len() / 20;
        for step in &history.steps {
            for point in step.start..step.end {
                if point % stride == 0 || point == step.start {
                    let what = format!("point {point} of {:?}", plan.create);
                    let content = history.recover(&replay, &what).await;
                    let wrong = neither(&content, &step.before, &step.after);
                    assert_eq!(wrong, None, "{what}: a byte is neither old nor new");
                }
                replay.apply(&history.events[point]);
            }
        }
    }
}

#[tokio::test]
async fn a_power_loss_at_any_point_loses_nothing_that_was_flushed() {
    for plan in plans() {
        let history = History::run(&plan).await;
        let mut rng = Rng::new(plan.seed);
        let events = &history.events;
        let stride = 1 + events.len() / 20;
        for point in (history.first()..events.len()).step_by(stride) {
            let done = &events[..point];
            let flushed = done.iter().rposition(|e| matches!(e, Event::Flush)).unwrap_or(0);
            let mut replay = Replay::default();
            done[..flushed].iter().for_each(|event| replay.apply(event));
            let kept = rng.below(4);
            for event in &done[flushed..] {
                if rng.below(4) < kept {
                    replay.apply(event);
                }
            }
            let what = format!("point {point} of {plan:?}", plan = plan.create);
            let content = history.recover(&replay, &what).await;
            // What was not touched after the last flush is as it was.
            let safe = history.steps.iter().rposition(|s| s.flushed && s.end <= point);
            let Some(safe) = safe else { continue };
            let state = &history.steps[safe].after;
            let later = history.steps[safe + 1..].iter().take_while(|s| s.start <= point);
            let later: Vec<&Step> = later.collect();
            for at in (0..content.len()).step_by(512) {
                let sector = at..content.len().min(at + 512);
                if content[sector.clone()] == state[sector.clone()] {
                    continue;
                }
                for i in sector {
                    let same = later.iter().all(|s| !s.touched.contains(&(i as u64)));
                    assert!(!same || content[i] == state[i], "{what}: byte {i} is lost");
                }
            }
        }
    }
}

/// After each event of one write, and for every choice of unflushed events that got lost, what
/// the write was not about is as before.
async fn survives_every_loss_during_a_write(
    create: &CreateOptions,
    backing: &Arc<dyn BlockDevice>,
    emptied: bool,
) {
    let recorder = Recorder::new();
    let file: Arc<dyn BlockDevice> = recorder.clone();
    common::create(&file, create).await;
    let disk = open_with(&file, options(backing, true)).await;
    // Something to recycle that must not shine through.
    let stale = Bytes::from(vec![0xee; 128 << 10]);
    disk.write(128 << 10, stale, WriteFlags::default()).await.unwrap();
    if emptied {
        disk.make_empty(MakeEmpty::Keep).await.unwrap();
        disk.close().await.unwrap();
    }
    let disk = open_with(&file, options(backing, true)).await;
    disk.flush(FlushLevel::Durable).await.unwrap();
    let before = read_all(&*disk).await;
    let start = recorder.position();
    disk.write(5000, Bytes::from(vec![1; 700]), WriteFlags::default()).await.unwrap();
    let events = recorder.events();
    for point in start..=events.len() {
        let done = &events[..point];
        let flushed = done.iter().rposition(|e| matches!(e, Event::Flush)).unwrap_or(0);
        let open: Vec<&Event> = done[flushed..].iter().collect();
        assert!(open.len() < 8, "too many to try all");
        for choice in 0..1u32 << open.len() {
            let mut replay = Replay::default();
            done[..flushed].iter().for_each(|event| replay.apply(event));
            let kept = open.iter().enumerate().filter(|(i, _)| choice >> i & 1 == 1);
            kept.for_each(|(_, event)| replay.apply(event));
            let file = replay.file().await;
            let disk = open_with(&file, options(backing, true)).await;
            let now = read_all(&*disk).await;
            let same = now[..5000] == before[..5000] && now[5700..] == before[5700..];
            assert!(same, "point {point} with {choice:b}: neighbours of a write are lost");
        }
    }
}

#[tokio::test]
async fn what_a_write_copies_is_safe_before_it_is_found() {
    let base = pattern(99, SIZE as usize);
    let backing: Arc<dyn BlockDevice> = Memory::new("backing", SIZE);
    backing.write(0, base.into(), WriteFlags::default()).await.unwrap();
    let nothing: Arc<dyn BlockDevice> = Memory::new("nothing", 0);
    for create in [
        CreateOptions::new(SIZE),
        CreateOptions::buffer(SIZE),
        CreateOptions { cluster_bits: 12, ..CreateOptions::new(SIZE) },
        CreateOptions { cluster_bits: 9, ..CreateOptions::new(SIZE) },
    ] {
        for emptied in [false, true] {
            survives_every_loss_during_a_write(&create, &backing, emptied).await;
            survives_every_loss_during_a_write(&create, &nothing, emptied).await;
        }
    }
}
