//! What a secondary's start checks and in which order, and how a secondary ends (series, §11 and
//! §14).

use std::sync::Arc;

use brep_block::{
    BlockDevice, ErrorKind, RawFile, RawFileOptions, ReadOnly, Replication, ReplicationMode,
};
use brep_qcow2::{CreateOptions, Qcow2};
use brep_replication::node::Stage;

use crate::support::*;

const LENGTHS: &str = "Active disk, hidden disk, secondary disk's length are not the same";
const UNIT: &str = "a copy unit of 2048 bytes is smaller than the 65536 bytes that the hidden disk \
                    allocates at a time";

/// What is wrong with a secondary, in the order in which it is looked at.
const WRONG: [(&str, &str); 7] = [
    ("mode", "The parameter mode's value is invalid, needs 1, but got 0"),
    ("no hidden disk", "Active disk doesn't have backing file"),
    ("no secondary disk", "Hidden disk doesn't have backing file"),
    ("lengths", LENGTHS),
    ("read-only", "the secondary disk is open for reading only"),
    ("top", "No top_bs or it is invalid"),
    ("unit", UNIT),
];

/// A secondary with everything wrong from number `first` on.
async fn wrong_from(first: usize) -> S {
    let is_wrong = |what| WRONG.iter().skip(first).any(|(wrong, _)| *wrong == what);
    let setup = Setup {
        hidden_image: if is_wrong("lengths") {
            |size| CreateOptions::new(size + 64 * KIB)
        } else {
            CreateOptions::new
        },
        unit_bytes: if is_wrong("unit") { 2 * KIB } else { 64 * KIB },
        top_id: if is_wrong("top") { "nobody" } else { "s" },
        ..Setup::new(MIB)
    };
    let S { base, hidden, active, .. } = setup.build().await;
    let setup = Setup {
        hidden_image: CreateOptions::new,
        has_hidden: !is_wrong("no hidden disk"),
        has_base: !is_wrong("no secondary disk"),
        unit_bytes: if is_wrong("unit") { 2 * KIB } else { 64 * KIB },
        top_id: if is_wrong("top") { "nobody" } else { "s" },
        ..Setup::new(MIB)
    };
    let base = if is_wrong("read-only") { Probe::new(ReadOnly::new(base.device())) } else { base };
    setup.open(base, hidden, active).await.unwrap()
}

/// Of several things that are wrong
/// the first is named, and nothing has been touched.
///
/// Row: §11.18, §14.22, §14.23, §14.25, §14.27, §14.28, §14.33.
#[test]
fn series_s14_start_checks_come_in_order() {
    run(async {
        for (first, (what, text)) in WRONG.iter().enumerate() {
            let s = wrong_from(first).await;
            let mode =
                if *what == "mode" { ReplicationMode::Primary } else { ReplicationMode::Secondary };
            let error = s.node.start(mode).await.unwrap_err();
            assert_eq!(error.detail(), *text, "{what}");
            assert_eq!(s.node.stage(), Stage::None, "{what}");
            assert!(s.node.local().is_none(), "{what}");
            assert_eq!(s.base.changes() + s.hidden.changes() + s.active.changes(), 0, "{what}");
        }
        wrong_from(WRONG.len()).await.start().await.unwrap();
    });
}

/// Whichever of the three it is.
///
/// Row: §11.14, §14.25.
#[test]
fn series_s14_start_with_any_disk_of_another_length_is_refused() {
    run(async {
        let longer = |size| CreateOptions::new(size + 64 * KIB);
        let shorter = |size| CreateOptions::new(size - 64 * KIB);
        for (which, setup) in [
            ("hidden, longer", Setup { hidden_image: longer, ..Setup::new(MIB) }),
            ("hidden, shorter", Setup { hidden_image: shorter, ..Setup::new(MIB) }),
            ("active, longer", Setup { active_image: longer, ..Setup::new(MIB) }),
            ("active, shorter", Setup { active_image: shorter, ..Setup::new(MIB) }),
            ("secondary", Setup { hidden_image: longer, active_image: longer, ..Setup::new(MIB) }),
        ] {
            let s = setup.build().await;
            assert_eq!(s.start().await.unwrap_err().detail(), LENGTHS, "{which}");
            assert_eq!(s.node.stage(), Stage::None, "{which}");
        }
    });
}

/// The overlays have to be emptied, so they are refused when they are opened.
///
/// Row: §11.15, §14.26, §14.27.
#[test]
fn series_s14_disks_that_take_no_writes_are_refused() {
    run(async {
        let open = |read_only: &'static str| async move {
            let S { base, hidden, active, .. } = Setup::new(MIB).build().await;
            let wrap = |name: &str, probe: Probe| {
                if name == read_only { Probe::new(ReadOnly::new(probe.device())) } else { probe }
            };
            let (base, hidden) = (wrap("base", base), wrap("hidden", hidden));
            Setup::new(MIB).open(base, hidden, wrap("active", active)).await
        };
        for overlay in ["hidden", "active"] {
            assert!(open(overlay).await.is_err(), "{overlay}");
        }
        let s = open("base").await.unwrap();
        let error = s.start().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
        assert_eq!(s.node.stage(), Stage::None);
        is_eio(s.node.read(0, 512).await);
        open("none").await.unwrap().start().await.unwrap();
    });
}

/// Row: §11.1.
#[test]
fn series_s11_active_disk_with_internal_snapshots_is_refused() {
    run(async {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("active.qcow2");
        let options =
            RawFileOptions { create: Some(0), growable: true, ..RawFileOptions::default() };
        let file = RawFile::open(&path, options).unwrap() as Arc<dyn BlockDevice>;
        Qcow2::create(&file, &CreateOptions::new(MIB)).await.unwrap();
        drop(file);
        let qemu_img = |arguments: &[&str]| {
            let status = std::process::Command::new("qemu-img").args(arguments).arg(&path).status();
            assert!(status.unwrap().success(), "{arguments:?}");
        };
        let open = || async {
            let options = RawFileOptions { growable: true, ..RawFileOptions::default() };
            let file = RawFile::open(&path, options).unwrap() as Arc<dyn BlockDevice>;
            let S { base, hidden, .. } = Setup::new(MIB).build().await;
            Setup::new(MIB).open(base, hidden, Probe::new(file)).await
        };
        qemu_img(&["snapshot", "-c", "one"]);
        let error = open().await.map(drop).unwrap_err();
        assert_eq!(
            error.detail(),
            "the active disk has internal snapshots, which replication does not support"
        );
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        qemu_img(&["snapshot", "-d", "one"]);
        open().await.unwrap().start().await.unwrap();
    });
}

/// And none is written by the node, whose relations exist at run time only.
///
/// Row: §8.17, §11.2.
#[test]
fn series_s08_headers_name_no_backing_file_after_use() {
    run(async {
        let s = Setup::new(MIB).started().await;
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        write(&*s.node, 8192, 4096, 0x33).await.unwrap();
        s.node.checkpoint().await.unwrap();
        write(&*s.local(), 0, 4096, 0x44).await.unwrap();
        s.node.close().await.unwrap();
        for image in [&s.hidden, &s.active] {
            let image = open_image(image).await;
            assert!(image.backing_name().is_none(), "{}", image.name());
        }
    });
}

/// The primary is kept from overwriting what cannot be kept any more; the node still
/// leads to its last checkpoint, so its disks keep being in use.
///
/// Row: §11.24, §14.44.
#[test]
fn series_s14_a_job_that_ends_by_itself_is_reported_and_the_checkpoint_stays() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let local = s.local();
        write(&*local, 0, 4096, 0x22).await.unwrap();
        s.node.cancel_job();
        reports_io_error(s.node.error().await);
        is_eio(write(&*local, 4096, 4096, 0x22).await);
        assert_eq!(s.node.stage(), Stage::Running);
        assert_eq!(s.node.truncate(2 * MIB).await.unwrap_err().kind(), ErrorKind::Locked);
        expect(&*s.node, 0, MIB, 0x11).await;
        s.node.stop(true).await.unwrap();
        s.merged().await;
        s.node.error().await.unwrap();
        expect(&*s.base.inner, 0, MIB, 0x11).await;
    });
}

/// A node that is closed while it runs has not been stopped.
///
/// Row: §8.16, §14.45.
#[test]
fn series_s14_close_while_running_keeps_the_buffers() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let local = s.local();
        write(&*local, 0, 4096, 0x22).await.unwrap();
        write(&*s.node, 8192, 4096, 0x33).await.unwrap();
        s.base.count.reset();
        s.node.close().await.unwrap();
        assert_eq!(s.base.changes(), 0);
        is_eio(s.node.read(0, 512).await);
        is_eio(write(&*s.node, 0, 512, 0x44).await);
        is_eio(write(&*local, 0, 512, 0x44).await);
        expect(&*open_image(&s.hidden).await, 0, 4096, 0x11).await;
        expect(&*open_image(&s.active).await, 8192, 4096, 0x33).await;
    });
}

/// A start is a checkpoint too, of what the disk holds now.
///
/// Row: §8.2, §13.5, §14.31, §14.32.
#[test]
fn series_s14_start_takes_a_checkpoint() {
    run(async {
        let s = Setup::new(MIB).build().await;
        fill(&*s.base.inner, 0, 64 * KIB, 0x55).await;
        s.start().await.unwrap();
        s.node.error().await.unwrap();
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        expect(&*s.node, 0, 64 * KIB, 0x55).await;
        expect(&*s.node, 64 * KIB, 64 * KIB, 0x11).await;
    });
}
