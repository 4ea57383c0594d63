//! Every request and every call in every stage of a secondary (series, §11 and §14).

use brep_block::{
    BlockDevice, Hang, Operation, Replication, ReplicationMode, Result, Rule, ZeroFlags,
};
use brep_replication::node::Stage;

use crate::support::*;

/// A place on the disk.
struct Area {
    offset: u64,
    /// What this side's guest sees there, until the checkpoint is given up.
    seen: u8,
    /// What the primary has left there.
    received: u8,
    /// The layer over the secondary disk that has it: the active or the hidden one.
    is_layered: bool,
    /// A merge comes here before it meets [`TROUBLE`].
    is_merged: bool,
}

const AREA_BYTES: u64 = 64 * KIB;

#[rustfmt::skip]
const AREAS: [Area; 6] = [
    Area { offset: 0, seen: 0x33, received: 0x11, is_layered: true, is_merged: true },
    Area { offset: 256 * KIB, seen: 0x11, received: 0x22, is_layered: true, is_merged: true },
    Area { offset: 512 * KIB, seen: 0x11, received: 0x11, is_layered: false, is_merged: true },
    Area { offset: 768 * KIB, seen: 0x33, received: 0x11, is_layered: true, is_merged: false },
    Area { offset: 832 * KIB, seen: 0x11, received: 0x22, is_layered: true, is_merged: false },
    Area { offset: 896 * KIB, seen: 0x11, received: 0x11, is_layered: false, is_merged: false },
];

/// Where a merge hangs or fails; in no area.
const TROUBLE: u64 = 640 * KIB;

#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    None,
    Running,
    /// Running; the copy job has ended by itself.
    JobEnded,
    /// The merge hangs.
    Failover,
    Failed,
    /// Done, after a failover.
    Merged,
    /// Done, after a stop without failover.
    Stopped,
}

const STAGES: [At; 7] =
    [At::None, At::Running, At::JobEnded, At::Failover, At::Failed, At::Merged, At::Stopped];

impl At {
    fn stage(self) -> Stage {
        match self {
            At::None => Stage::None,
            At::Running | At::JobEnded => Stage::Running,
            At::Failover => Stage::Failover,
            At::Failed => Stage::Failed,
            At::Merged | At::Stopped => Stage::Done,
        }
    }

    /// A secondary in this stage, and what keeps it there.
    async fn reach(self, setup: Setup) -> (S, Option<Hang>) {
        let s = setup.build().await;
        if self == At::None {
            return (s, None);
        }
        s.start().await.unwrap();
        for area in &AREAS {
            if area.seen != 0x11 {
                fill(&*s.node, area.offset, AREA_BYTES, area.seen).await;
            }
            if area.received != 0x11 {
                fill(&*s.local(), area.offset, AREA_BYTES, area.received).await;
            }
        }
        fill(&*s.node, TROUBLE, AREA_BYTES, 0x33).await;
        let trouble = Rule::new(Operation::Write).range(TROUBLE..TROUBLE + 1);
        let mut hang = None;
        match self {
            At::None | At::Running | At::Merged | At::Stopped => {}
            At::JobEnded => s.node.cancel_job(),
            At::Failover => hang = Some(s.base.fault.hang(trouble)),
            At::Failed => s.base.fault.fail(trouble),
        }
        if !matches!(self, At::Running | At::JobEnded) {
            s.node.stop(self != At::Stopped).await.unwrap();
        }
        match &hang {
            Some(hang) => hang.reached(1).await,
            None => stage_is(&s.node, self.stage()).await,
        }
        reset(&s);
        (s, hang)
    }

    /// What reading gives.
    fn content(self, area: &Area) -> u8 {
        if self == At::Stopped { area.received } else { area.seen }
    }
}

fn reset(s: &S) {
    for probe in [&s.base, &s.hidden, &s.active] {
        probe.count.reset();
    }
}

/// How often the secondary, the hidden and the active disk have been changed.
fn changed(s: &S) -> [bool; 3] {
    [&s.base, &s.hidden, &s.active].map(|probe| probe.changes() > 0)
}

fn setups() -> [Setup; 2] {
    [Setup::new(MIB), Setup::subclusters(MIB)]
}

/// Every kind of request, in every stage.
///
/// Row: §11.5, §11.6, §11.7, §14.10, §14.11.
#[test]
fn series_s14_every_request_in_every_stage() {
    run(async {
        for at in STAGES {
            let (s, _hang) = at.reach(Setup::subclusters(MIB)).await;
            let node = &*s.node;
            let results = [
                ("read", node.read(100, 512).await.map(drop)),
                ("write", write(node, 100, 512, 0x44).await),
                ("write zeroes", node.write_zeroes(100, 512, ZeroFlags::default()).await),
                ("discard", node.discard(100, 512).await),
                ("block status", node.block_status(100, 512).await.map(drop)),
                ("flush", flush(node).await),
            ];
            for (request, result) in results {
                let errno = result.err().map(|error| error.errno());
                let expected = (at == At::None).then_some(5);
                assert_eq!(errno, expected, "secondary {request}, {at:?}");
            }
        }
    });
}

/// Row: §14.10.
#[test]
fn series_s14_secondary_read_in_every_stage() {
    run(async {
        for at in STAGES {
            for setup in setups() {
                let (s, _hang) = at.reach(setup).await;
                for area in &AREAS {
                    let read = s.node.read(area.offset, AREA_BYTES as usize).await;
                    let cell = format!("secondary read, {at:?}, at {}", area.offset);
                    if at == At::None {
                        assert_eq!(read.unwrap_err().errno(), 5, "{cell}");
                        continue;
                    }
                    let content = at.content(area);
                    assert!(read.unwrap().iter().all(|byte| *byte == content), "{cell}");
                }
                let direct = [&s.hidden, &s.active].map(|p| p.count.of(Operation::Read).operations);
                if at.stage() == Stage::Done {
                    assert_eq!(direct, [0, 0], "{at:?}: the secondary disk alone is read");
                }
            }
        }
    });
}

/// Row: §11.5, §11.6, §11.7, §14.6, §14.11.
#[test]
fn series_s14_secondary_write_in_every_stage() {
    run(async {
        for at in STAGES {
            for kind in [Operation::Write, Operation::WriteZeroes, Operation::Discard] {
                for setup in setups() {
                    secondary_change(at, kind, setup).await;
                }
            }
        }
    });
}

async fn secondary_change(at: At, kind: Operation, setup: Setup) {
    let (s, hang) = at.reach(setup).await;
    let byte = if kind == Operation::Write { 0x44 } else { 0 };
    for area in &AREAS {
        let cell = format!("secondary {kind:?}, {at:?}, at {}", area.offset);
        reset(&s);
        let offset = area.offset + 100;
        let result = match kind {
            Operation::Write => write(&*s.node, offset, 600, byte).await,
            Operation::WriteZeroes => s.node.write_zeroes(offset, 600, ZeroFlags::default()).await,
            _ => s.node.discard(offset, 600).await,
        };
        if at == At::None {
            assert_eq!(result.unwrap_err().errno(), 5, "{cell}");
            assert_eq!(changed(&s), [false; 3], "{cell}");
            continue;
        }
        result.unwrap();
        let (base, active) = match at {
            At::None | At::Running | At::JobEnded => (false, true),
            // What is merged already has to be kept equal there.
            At::Failover => (area.is_merged, true),
            At::Failed => (!area.is_layered, area.is_layered),
            At::Merged | At::Stopped => (true, false),
        };
        assert_eq!(changed(&s), [base, false, active], "{cell}: secondary, hidden, active disk");
        expect(&*s.node, area.offset, 100, at.content(area)).await;
        expect(&*s.node, offset, 600, byte).await;
        expect(&*s.node, offset + 600, 1000, at.content(area)).await;
    }
    if hang.is_some() {
        drop(hang);
        s.merged().await;
        for area in &AREAS {
            expect(&*s.base.inner, area.offset, 100, area.seen).await;
            expect(&*s.base.inner, area.offset + 100, 600, byte).await;
        }
    }
}

/// What a call gives: success, or this text.
type Expected = std::result::Result<(), &'static str>;

#[track_caller]
fn gives(result: Result<()>, expected: Expected, cell: &str) {
    let result = result.map_err(|error| error.detail().to_owned());
    match (result.as_ref().copied().map_err(String::as_str), expected) {
        // It goes on with what has failed.
        (Err(text), Err(IO_ERROR)) if text.starts_with(IO_ERROR) => {}
        (result, expected) => assert_eq!(result, expected, "{cell}"),
    }
}

/// A call that changed neither stage nor disks.
async fn has_done_nothing(s: &S, at: At, cell: &str) {
    assert_eq!(s.node.stage(), at.stage(), "{cell}");
    assert_eq!(changed(s), [false; 3], "{cell}");
    for area in AREAS.iter().filter(|_| at != At::None) {
        expect(&*s.node, area.offset, AREA_BYTES, at.content(area)).await;
    }
}

/// Row: §11.9, §11.11, §11.12, §11.13, §14.16, §14.20, §14.21.
#[test]
fn series_s14_secondary_start_in_every_stage() {
    run(async {
        let mode_names_both = "The parameter mode's value is invalid, needs 1, but got 0";
        for (at, expected, of_the_wrong_mode) in [
            (At::None, Ok(()), mode_names_both),
            (At::Running, Err(RUNNING_OR_DONE), RUNNING_OR_DONE),
            (At::JobEnded, Err(RUNNING_OR_DONE), RUNNING_OR_DONE),
            (At::Failover, Err(CANNOT_RESTART), CANNOT_RESTART),
            (At::Failed, Err(RUNNING_OR_DONE), RUNNING_OR_DONE),
            (At::Merged, Err(CANNOT_RESTART), CANNOT_RESTART),
            (At::Stopped, Err(CANNOT_RESTART), CANNOT_RESTART),
        ] {
            let cell = format!("secondary start, {at:?}");
            let (s, _hang) = at.reach(Setup::subclusters(MIB)).await;
            let wrong = s.node.start(ReplicationMode::Primary).await;
            gives(wrong, Err(of_the_wrong_mode), &cell);
            has_done_nothing(&s, at, &cell).await;
            gives(s.start().await, expected, &cell);
            if at == At::None {
                assert_eq!(s.node.stage(), Stage::Running, "{cell}");
            } else {
                has_done_nothing(&s, at, &cell).await;
            }
        }
    });
}

/// Row: §11.19, §11.20, §14.17, §15.4.
#[test]
fn series_s14_secondary_checkpoint_in_every_stage() {
    run(async {
        for (at, expected) in [
            (At::None, Err(NOT_RUNNING)),
            (At::Running, Ok(())),
            (At::JobEnded, Err(JOB_CANCELLED)),
            (At::Failover, Ok(())),
            (At::Failed, Err(JOB_CANCELLED)),
            (At::Merged, Ok(())),
            (At::Stopped, Ok(())),
        ] {
            let cell = format!("secondary checkpoint, {at:?}");
            let (s, _hang) = at.reach(Setup::subclusters(MIB)).await;
            gives(s.node.checkpoint().await, expected, &cell);
            if at == At::Running {
                assert_eq!(s.node.stage(), Stage::Running, "{cell}");
                for area in &AREAS {
                    expect(&*s.node, area.offset, AREA_BYTES, area.received).await;
                }
            } else {
                has_done_nothing(&s, at, &cell).await;
            }
        }
    });
}

/// Row: §13.8, §14.18, §14.43.
#[test]
fn series_s14_secondary_get_error_in_every_stage() {
    run(async {
        for (at, expected) in [
            (At::None, Err(NOT_RUNNING)),
            (At::Running, Ok(())),
            (At::JobEnded, Err(IO_ERROR)),
            (At::Failover, Ok(())),
            (At::Failed, Err(IO_ERROR)),
            (At::Merged, Ok(())),
            (At::Stopped, Ok(())),
        ] {
            let cell = format!("secondary get_error, {at:?}");
            let (s, _hang) = at.reach(Setup::subclusters(MIB)).await;
            gives(s.node.error().await, expected, &cell);
            gives(s.node.error().await, expected, &cell);
            has_done_nothing(&s, at, &cell).await;
        }
    });
}

/// Row: §11.22, §11.24, §11.27, §13.6, §14.19, §14.39, §14.40, §14.42, §15.1, §15.2.
#[test]
fn series_s14_secondary_stop_in_every_stage() {
    run(async {
        for (at, expected) in [
            (At::None, Err(NOT_RUNNING)),
            (At::Running, Ok(())),
            (At::JobEnded, Ok(())),
            (At::Failover, Ok(())),
            (At::Failed, Err(NOT_RUNNING)),
            (At::Merged, Ok(())),
            (At::Stopped, Ok(())),
        ] {
            for failover in [false, true] {
                let cell = format!("secondary stop, failover {failover}, {at:?}");
                let (s, _hang) = at.reach(Setup::subclusters(MIB)).await;
                gives(s.node.stop(failover).await, expected, &cell);
                if at.stage() != Stage::Running {
                    has_done_nothing(&s, at, &cell).await;
                    continue;
                }
                let begun = if failover { Stage::Failover } else { Stage::Done };
                assert_eq!(s.node.stage(), begun, "{cell}");
                s.merged().await;
                gives(s.node.error().await, Ok(()), &cell);
                let ended = if failover { At::Merged } else { At::Stopped };
                for area in &AREAS {
                    for disk in [&*s.node as &dyn BlockDevice, &*s.base.inner] {
                        expect(disk, area.offset, AREA_BYTES, ended.content(area)).await;
                    }
                }
            }
        }
    });
}

/// Every kind of request to a primary; its other two stages do
/// not exist.
///
/// Row: §4.2, §14.5, §14.8, §14.9.
#[test]
fn series_s14_primary_every_request_in_every_stage() {
    run(async {
        for stage in [Stage::None, Stage::Running, Stage::Done] {
            let p = primary_at(stage).await;
            let node = &*p.node;
            let results = [
                ("read", false, node.read(0, 512).await.map(drop)),
                ("block status", false, node.block_status(0, 512).await.map(drop)),
                ("write", stage == Stage::Running, write(node, 0, 512, 0x22).await),
                (
                    "write zeroes",
                    stage == Stage::Running,
                    node.write_zeroes(512, 512, ZeroFlags::default()).await,
                ),
                ("discard", stage == Stage::Running, node.discard(1024, 512).await),
                // There is nothing to be made durable that this node has taken.
                ("flush", true, flush(node).await),
            ];
            for (request, succeeds, result) in results {
                let cell = format!("primary {request}, {stage:?}");
                assert_eq!(result.err().map(|e| e.errno()), (!succeeds).then_some(5), "{cell}");
            }
            assert_eq!(p.target.changes() > 0, stage == Stage::Running, "primary, {stage:?}");
        }
    });
}

async fn primary_at(stage: Stage) -> P {
    let p = P::new();
    if stage != Stage::None {
        p.node.start(ReplicationMode::Primary).await.unwrap();
    }
    if stage == Stage::Done {
        p.node.stop(true).await.unwrap();
    }
    p
}

/// Row: §13.8, §14.12, §14.13, §14.14, §14.15, §14.20, §14.38, §15.4.
#[test]
fn series_s14_primary_every_call_in_every_stage() {
    run(async {
        #[rustfmt::skip]
        let cells: [(&str, Stage, Expected, Stage); 12] = [
            ("start", Stage::None, Ok(()), Stage::Running),
            ("start", Stage::Running, Err(RUNNING_OR_DONE), Stage::Running),
            ("start", Stage::Done, Err(CANNOT_RESTART), Stage::Done),
            ("start as secondary", Stage::Running, Err(RUNNING_OR_DONE), Stage::Running),
            ("checkpoint", Stage::None, Err(NOT_RUNNING), Stage::None),
            ("checkpoint", Stage::Running, Ok(()), Stage::Running),
            ("checkpoint", Stage::Done, Ok(()), Stage::Done),
            ("get_error", Stage::None, Err(NOT_RUNNING), Stage::None),
            ("get_error", Stage::Running, Ok(()), Stage::Running),
            ("get_error", Stage::Done, Ok(()), Stage::Done),
            ("stop", Stage::None, Err(NOT_RUNNING), Stage::None),
            ("stop", Stage::Done, Ok(()), Stage::Done),
        ];
        for (call, stage, expected, then) in cells {
            let cell = format!("primary {call}, {stage:?}");
            let p = primary_at(stage).await;
            let result = match call {
                "start" => p.node.start(ReplicationMode::Primary).await,
                "start as secondary" => p.node.start(ReplicationMode::Secondary).await,
                "checkpoint" => p.node.checkpoint().await,
                "get_error" => p.node.error().await,
                _ => p.node.stop(true).await,
            };
            gives(result, expected, &cell);
            assert_eq!((p.node.stage(), p.target.changes()), (then, 0), "{cell}");
        }
        for failover in [false, true] {
            let p = primary_at(Stage::Running).await;
            p.target.fault.fail(Rule::new(Operation::Write));
            write(&*p.node, 0, 512, 0x22).await.unwrap();
            gives(p.node.error().await, Err(IO_ERROR), "primary get_error, latched");
            gives(p.node.stop(failover).await, Ok(()), "primary stop, running");
            assert_eq!(p.node.stage(), Stage::Done, "primary stop, failover {failover}");
            gives(p.node.error().await, Ok(()), "primary get_error, cleared by the stop");
        }
    });
}
