//! The demo checks itself; here it is only run.
mod common;

use common::Dir;

#[test]
fn the_demo_runs_to_its_end_and_cleans_up() {
    let dir = Dir::new();
    let output = dir.command(&["demo"]).env("TMPDIR", dir.path()).output().unwrap();
    let run = common::Run::from(output);
    assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    for said in ["killed the primary", "promoted export is the checkpoint", "replica.raw alone"] {
        assert!(run.stdout.contains(said), "{}", run.stdout);
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
