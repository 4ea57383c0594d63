//! `brep nbd copy` and `brep nbd serve --run`: from outside.
mod common;

use std::os::unix::fs::{FileExt, MetadataExt};

use common::Dir;

const SIZE: u64 = 8 << 20;

/// A sparse disk with some data in it.
fn disk(dir: &Dir, name: &str) {
    let file = std::fs::File::create(dir.file(name)).unwrap();
    file.set_len(SIZE).unwrap();
    for (at, len) in [(0, 70_000), (3 << 20, 4096), (SIZE - 700, 700)] {
        file.write_all_at(&vec![(at % 251 + 1) as u8; len], at).unwrap();
    }
}

fn good(dir: &Dir, args: &[&str]) -> String {
    let run = dir.brep(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    run.stdout
}

#[test]
fn a_disk_goes_through_every_format_and_an_export_and_comes_back_sparse() {
    let dir = Dir::new();
    disk(&dir, "a.raw");
    good(&dir, &["nbd", "copy", "a.raw", "b.qcow2"]);
    std::fs::write(dir.file("c.raw"), vec![7; SIZE as usize]).unwrap();
    let brep = env!("CARGO_BIN_EXE_brep");
    let into_export = format!("{brep} nbd copy b.qcow2 \"$uri\"");
    good(&dir, &["nbd", "serve", "c.raw", "--run", &into_export]);
    let out_of_export = format!("{brep} nbd copy \"$uri\" - | {brep} nbd copy - d.raw");
    good(&dir, &["nbd", "serve", "c.raw", "--run", &out_of_export]);
    for copy in ["b.qcow2", "c.raw", "d.raw"] {
        good(&dir, &["image", "compare", "--strict", "a.raw", copy]);
    }
    for copy in ["c.raw", "d.raw"] {
        let allocated = std::fs::metadata(dir.file(copy)).unwrap().blocks() * 512;
        assert!(allocated < SIZE / 2, "{copy} has {allocated} bytes");
    }
}

#[test]
fn a_copy_that_cannot_be_made_leaves_everything_as_it_was() {
    let dir = Dir::new();
    disk(&dir, "a.raw");
    let onto_itself = dir.brep(&["nbd", "copy", "a.raw", "a.raw"]);
    assert_ne!(onto_itself.code, 0);
    assert_eq!(std::fs::metadata(dir.file("a.raw")).unwrap().len(), SIZE);
    std::fs::write(dir.file("short.raw"), [7; 512]).unwrap();
    let short = dir.brep(&["nbd", "copy", "--no-create", "a.raw", "short.raw"]);
    assert_eq!(short.code, 1);
    assert!(short.stderr.contains("8388608") && short.stderr.contains("512"), "{}", short.stderr);
    assert_eq!(std::fs::read(dir.file("short.raw")).unwrap(), [7; 512]);
    std::fs::write(dir.file("kept.raw"), "precious").unwrap();
    assert_eq!(dir.brep(&["nbd", "copy", "missing.raw", "kept.raw"]).code, 1);
    assert_eq!(std::fs::read(dir.file("kept.raw")).unwrap(), b"precious");
    assert_eq!(dir.brep(&["nbd", "copy", "a.raw", "unknown"]).code, 2);
    assert_eq!(dir.brep(&["nbd", "copy", "-", "-"]).code, 2);
}

#[test]
fn a_captive_commands_exit_code_is_ours() {
    let dir = Dir::new();
    disk(&dir, "a.raw");
    for (command, code) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)] {
        let run = dir.brep(&["nbd", "serve", "a.raw", "--run", command]);
        assert_eq!(run.code, code, "{command}: {}", run.stderr);
    }
    assert_eq!(dir.brep(&["nbd", "serve", "a.raw"]).code, 2, "nowhere to listen");
}
