use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::history::{
    Maps, Model, ROLES, Random, Step, apply, check_after_kill, options, scratch, tag,
};
use crate::persist::crash::{Killed, kill_after};
use crate::{MapSet, Role};

/// Runs the history until the process is "killed" at its `point`th store; returns how many steps
/// had been acknowledged.
fn run_until(path: &Path, history: &[Step], point: u64) -> usize {
    let mut acknowledged = 0;
    let run = catch_unwind(AssertUnwindSafe(|| {
        let mut maps = Maps::open(path);
        kill_after(point);
        for step in history {
            apply(&mut maps, *step);
            acknowledged += 1;
        }
    }));
    kill_after(u64::MAX);
    match run {
        Err(payload) if !payload.is::<Killed>() => std::panic::resume_unwind(payload),
        _ => acknowledged,
    }
}

fn a_kill_at_every_store(history: &[Step]) {
    let mut models = vec![Model::new()];
    for step in history {
        let mut next = models[models.len() - 1].clone();
        next.apply(*step);
        models.push(next);
    }
    let directory = scratch();
    let path = directory.path().join("maps");
    MapSet::create(&path, &options(), tag(0)).unwrap().close().unwrap();
    let fresh = fs::read(&path).unwrap();
    for point in 0.. {
        fs::write(&path, &fresh).unwrap();
        let acknowledged = run_until(&path, history, point);
        check_after_kill(&path, &models[acknowledged], history.get(acknowledged).copied());
        if acknowledged == history.len() {
            assert!(point > 100, "the history must have stored something");
            return;
        }
    }
}

#[test]
fn a_kill_at_any_store_loses_nothing_that_was_acknowledged() {
    a_kill_at_every_store(&[
        Step::Set(Role::Open, 5, 1),
        Step::Set(Role::Differs, 32_700, 150),
        Step::Rotate(1),
        Step::Set(Role::Open, 5, 200),
        Step::DropPending,
        Step::Rotate(2),
        // In the bank that was dropped: old contents must not come back.
        Step::Set(Role::Open, 7, 1),
        Step::Transfer(Role::Differs, Role::Open, 32_760, 20),
        Step::VoidPending,
        Step::Rotate(3),
        Step::AllToDiffers,
        Step::Reset(Role::Differs, 32_704, 100),
        Step::ResetAll(Role::Differs),
        Step::SetTag(Role::Differs, 4),
    ]);
}

#[test]
fn a_kill_at_any_store_makes_what_was_in_flight_differ_and_nothing_else() {
    a_kill_at_every_store(&[
        Step::Set(Role::Open, 100, 50),
        Step::Begin(120, 100),
        Step::Begin(32_700, 150),
        Step::Rotate(1),
        // The same groups in both epochs, and a word that is used twice.
        Step::Begin(200, 40),
        Step::End,
        Step::Begin(7, 1),
        Step::End,
        Step::End,
        Step::DropPending,
        Step::Transfer(Role::Differs, Role::Open, 0, 33_000),
        Step::End,
    ]);
}

#[test]
fn a_kill_at_any_store_after_a_flush_loses_nothing_that_was_acknowledged() {
    a_kill_at_every_store(&[
        Step::Set(Role::Open, 20_000, 300),
        Step::Set(Role::Differs, 32_990, 10),
        Step::Flush,
        Step::Set(Role::Open, 20_100, 500),
        Step::Reset(Role::Differs, 32_990, 10),
        Step::Rotate(1),
        Step::Flush,
        Step::VoidPending,
    ]);
}

#[test]
fn long_histories_end_as_the_model_says() {
    let directory = scratch();
    for seed in 0..6 {
        let path = directory.path().join(format!("{seed}"));
        MapSet::create(&path, &options(), tag(0)).unwrap().close().unwrap();
        let mut maps = Maps::open(&path);
        let mut random = Random(seed);
        let mut model = Model::new();
        for index in 0..120 {
            let step = random.step(model.has_pending);
            apply(&mut maps, step);
            model.apply(step);
            if index % 40 == 39 {
                drop(maps);
                check_after_kill(&path, &model, None);
                model = model.after_kill();
                maps = Maps::open(&path);
            }
        }
        maps.0.close().unwrap();
        let maps = MapSet::open(&path, &options()).unwrap();
        assert_eq!(maps.last_stop(), crate::LastStop::Clean);
        for role in ROLES {
            maps.map(role).levels().check();
        }
        assert_eq!(Model::of(&maps).without_idle_tag(), model.after_kill());
    }
}
