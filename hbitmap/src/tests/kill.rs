//! A real process, really killed.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::history::{Maps, Model, Random, apply, check_after_kill, options, scratch, tag};
use crate::MapSet;

const PATH: &str = "BREP_HBITMAP_KILL_PATH";
const SEED: &str = "BREP_HBITMAP_KILL_SEED";

#[test]
fn a_killed_process_leaves_everything_that_it_acknowledged() {
    let directory = scratch();
    let mut random = Random(0xdead);
    let mut acknowledged_most = 0;
    let long = std::env::var_os("BREP_LONG").is_some_and(|value| value == "1");
    for seed in 0..if long { 1000 } else { 16 } {
        let path = directory.path().join(format!("{seed}"));
        MapSet::create(&path, &options(), tag(0)).unwrap().close().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::kill::victim", "--ignored", "--nocapture"])
            .env(PATH, &path)
            .env(SEED, seed.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pipe = child.stderr.take().unwrap();
        // One byte per acknowledged step. Where in the next one the kill hits is up to chance.
        let mut acknowledged = vec![0; random.below(120) as usize];
        pipe.read_exact(&mut acknowledged).unwrap();
        for _ in 0..random.below(200_000) {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        pipe.read_to_end(&mut acknowledged).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        assert!(acknowledged.iter().all(|byte| *byte == b'.'), "the child complains");

        let mut steps = Random(seed);
        let mut model = Model::new();
        for _ in &acknowledged {
            model.apply(steps.step(model.has_pending));
        }
        // A child that was killed before its first step may not have opened the file.
        if !acknowledged.is_empty() {
            check_after_kill(&path, &model, Some(steps.step(model.has_pending)));
        }
        acknowledged_most = acknowledged_most.max(acknowledged.len());
    }
    assert!(acknowledged_most > 50, "the kills must come late enough to mean something");
}

#[test]
#[ignore = "the process that a_killed_process_leaves_everything_that_it_acknowledged kills"]
fn victim() {
    let Some(path) = std::env::var_os(PATH) else { return };
    let mut steps = Random(std::env::var(SEED).unwrap().parse().unwrap());
    let mut maps = Maps::open(Path::new(&path));
    loop {
        let step = steps.step(maps.0.has_pending());
        apply(&mut maps, step);
        std::io::stderr().write_all(b".").unwrap();
    }
}
