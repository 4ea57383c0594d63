//! The secondary: T6 to T10, D9 to D18.

use std::sync::Arc;

use brep_block::{BlockDevice, Operation, RawFile, RawFileOptions, Replication, Rule, WriteFlags};
use brep_qcow2::{BackingName, CreateOptions, OpenOptions, Qcow2};
use brep_replication::node::Stage;
use bytes::Bytes;

use crate::support::*;

/// S after the writes of T9: the primary wrote the second half, the guest the first.
async fn written(setup: Setup) -> S {
    let s = setup.started().await;
    fill(&*s.local(), H, H, 0x22).await;
    fill(&*s.node, 0, H, 0x33).await;
    s
}

#[test]
fn t06_secondary_read_before_start_fails() {
    run(async {
        let s = Setup::new(SIZE).build().await;
        is_eio(s.node.read(0, SIZE as usize).await);
        is_eio(s.node.block_status(0, SIZE).await);
        assert_eq!(s.base.count.of(Operation::Read).operations, 0);
    });
}

/// Row: §8.2, §13.4.
#[test]
fn t07_secondary_write_before_start_fails() {
    run(async {
        let s = Setup::new(SIZE).build().await;
        is_eio(write(&*s.node, 0, SIZE, 0x22).await);
        is_eio(s.node.write_zeroes(0, SIZE, Default::default()).await);
        is_eio(s.node.discard(0, SIZE).await);
        is_eio(flush(&*s.node).await);
        assert!(s.node.local().is_none());
        assert_eq!(s.base.changes() + s.hidden.changes() + s.active.changes(), 0);
    });
}

async fn t08(s: S) {
    s.start().await.unwrap();
    expect(&*s.node, 0, SIZE, 0x11).await;
    fill(&*s.local(), H, H, 0x22).await;
    expect(&*s.node, H, H, 0x11).await;
    fill(&*s.node, 0, H, 0x33).await;
    expect(&*s.node, 0, H, 0x33).await;
    expect(&*s.node, H, H, 0x11).await;
    expect(&*s.base.inner, 0, H, 0x11).await;
    expect(&*s.base.inner, H, H, 0x22).await;
    s.node.stop(true).await.unwrap();
    s.merged().await;
}

/// Row: §11.17, §14.30.
#[test]
fn t08_secondary_start_shows_the_checkpoint_and_the_guests_writes() {
    run(async { t08(Setup::new(SIZE).build().await).await });
}

#[test]
fn t08_secondary_start_shows_the_checkpoint_and_the_guests_writes_by_subclusters() {
    run(async { t08(Setup::subclusters(SIZE).build().await).await });
}

/// As the cases have it: every image is a qcow2 file.
///
/// Row: §13.1.
#[test]
fn t08_t09_secondary_in_files() {
    run(async {
        let scratch = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let options =
                RawFileOptions { create: Some(0), growable: true, ..RawFileOptions::default() };
            RawFile::open(scratch.path().join(name), options).unwrap() as Arc<dyn BlockDevice>
        };
        let local_file = file("s_local.qcow2");
        Qcow2::create(&local_file, &CreateOptions::new(SIZE)).await.unwrap();
        let local = Qcow2::open(local_file, OpenOptions::default()).await.unwrap();
        let (hidden, active) = (file("hidden.qcow2"), file("active.qcow2"));
        let s = Setup::new(SIZE).build_over(Arc::clone(&local) as _, hidden, active).await;
        t08(s).await;
        expect(&*local, 0, H, 0x33).await;
        expect(&*local, H, H, 0x11).await;
    });
}

/// The second half is 0x11 and not what the primary wrote: the disk ends as what the secondary's
/// guest saw.
///
/// Row: §11.25, §14.40.
#[test]
fn t09_secondary_stop_merges_what_the_guest_saw() {
    run(async {
        let s = written(Setup::new(SIZE)).await;
        s.node.stop(true).await.unwrap();
        expect(&*s.node, 0, H, 0x33).await;
        expect(&*s.node, H, H, 0x11).await;
        s.merged().await;
        for disk in [&*s.node as &dyn BlockDevice, &*s.base.inner] {
            expect(disk, 0, H, 0x33).await;
            expect(disk, H, H, 0x11).await;
        }
        s.node.error().await.unwrap();
        // The disk is used directly from now on.
        s.active.count.reset();
        fill(&*s.node, 0, MIB, 0x44).await;
        expect(&*s.base.inner, 0, MIB, 0x44).await;
        assert_eq!(s.active.changes(), 0);
        refused(s.start().await, CANNOT_RESTART);
        s.node.stop(true).await.unwrap();
        s.node.checkpoint().await.unwrap();
    });
}

/// Row: §14.43.
#[test]
fn t10_secondary_get_error_without_errors_succeeds() {
    run(async {
        let s = Setup::new(SIZE).started().await;
        s.node.error().await.unwrap();
        s.node.stop(true).await.unwrap();
        s.node.error().await.unwrap();
        s.merged().await;
        s.node.error().await.unwrap();
    });
}

/// Row: §14.51.
#[test]
fn d09_secondary_active_disk_failure_goes_to_the_guest_alone() {
    run(async {
        let s = Setup::new(MIB).started().await;
        s.active.fault.fail(Rule::new(Operation::Write).forever());
        write(&*s.node, 0, 64 * KIB, 0x33).await.unwrap_err();
        s.node.error().await.unwrap();
        write(&*s.local(), 64 * KIB, 64 * KIB, 0x22).await.unwrap();
        expect(&*s.base.inner, 0, 64 * KIB, 0x11).await;
    });
}

/// What is more than the case says: without the job nothing can be kept of what the primary
/// overwrites, so it is kept from overwriting.
///
/// Row: §11.20, §14.34.
#[test]
fn d10_secondary_checkpoint_without_the_job_fails() {
    run(async {
        let s = Setup::new(MIB).started().await;
        let local = s.local();
        write(&*local, 0, 64 * KIB, 0x22).await.unwrap();
        s.node.cancel_job();
        refused(s.node.checkpoint().await, JOB_CANCELLED);
        reports_io_error(s.node.error().await);
        is_eio(write(&*local, 64 * KIB, 64 * KIB, 0x22).await);
        assert!(s.node.local().is_none());
        expect(&*s.node, 0, MIB, 0x11).await;
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, MIB, 0x11).await;
        s.node.error().await.unwrap();
    });
}

/// Full or broken where the data goes.
///
/// Row: §14.54.
#[test]
fn d11_secondary_write_whose_pre_image_cannot_be_kept_fails() {
    run(async {
        let s = Setup::new(SIZE).started().await;
        write(&*s.local(), H, 512, 0x22).await.unwrap();
        let data = s.hidden.inner.size();
        let fails = Rule::new(Operation::Write).range(data..u64::MAX).forever().errno(28);
        s.hidden.fault.fail(fails);
        let error = write(&*s.local(), H + MIB, MIB, 0x22).await.unwrap_err();
        assert_eq!(error.errno(), 28);
        expect(&*s.base.inner, H + 512, H - 512, 0x11).await;
        expect(&*s.node, 0, SIZE, 0x11).await;
        // The primary has been told; this side's manager is not.
        s.node.error().await.unwrap();
        s.hidden.fault.clear();
        write(&*s.local(), H + MIB, MIB, 0x22).await.unwrap();
        expect(&*s.base.inner, H + MIB, MIB, 0x22).await;
        expect(&*s.node, 0, SIZE, 0x11).await;
    });
}

/// Broken where the image's tables are: the image then takes no write until it is opened again.
/// So the primary's writes go on failing, and the checkpoint stays whole.
#[test]
fn d11_secondary_writes_fail_as_long_as_the_hidden_disk_is_broken() {
    run(async {
        let s = Setup::new(SIZE).started().await;
        for nth in 0..3 {
            s.hidden.fault.fail(Rule::new(Operation::Write).forever());
            write(&*s.local(), H + nth * MIB, MIB, 0x22).await.unwrap_err();
            s.hidden.fault.clear();
        }
        expect(&*s.base.inner, 0, SIZE, 0x11).await;
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, SIZE, 0x11).await;
    });
}

/// The older rule, on both sides; the original has "Backup job was cancelled unexpectedly" here.
#[test]
fn d12_secondary_checkpoint_before_start_fails() {
    run(async {
        let s = Setup::new(MIB).build().await;
        refused(s.node.checkpoint().await, NOT_RUNNING);
        refused(s.node.error().await, NOT_RUNNING);
        refused(s.node.stop(false).await, NOT_RUNNING);
        refused(s.node.stop(true).await, NOT_RUNNING);
        assert_eq!(s.node.stage(), Stage::None);
    });
}

/// Row: §14.39, §15.2.
#[test]
fn d13_secondary_stop_without_failover_keeps_what_the_primary_wrote() {
    run(async {
        let s = written(Setup::new(SIZE)).await;
        s.node.stop(false).await.unwrap();
        assert_eq!(s.node.stage(), Stage::Done);
        for disk in [&*s.node as &dyn BlockDevice, &*s.base.inner] {
            expect(disk, 0, H, 0x11).await;
            expect(disk, H, H, 0x22).await;
        }
        s.node.error().await.unwrap();
        s.node.checkpoint().await.unwrap();
        s.node.stop(true).await.unwrap();
        s.node.close().await.unwrap();
        for image in [&s.active, &s.hidden] {
            assert!(open_image(image).await.is_empty().await.unwrap());
        }
    });
}

/// A start that is refused has touched nothing.
async fn start_is_refused(s: &S, text: &str) {
    let error = s.start().await.unwrap_err();
    assert_eq!(error.detail(), text);
    assert_eq!(s.node.stage(), Stage::None);
    assert!(s.node.local().is_none());
    is_eio(s.node.read(0, 512).await);
    is_eio(write(&*s.node, 0, 512, 0x33).await);
    assert_eq!(s.base.changes() + s.hidden.changes() + s.active.changes(), 0);
}

/// Row: §11.14.
#[test]
fn d14_secondary_disks_of_different_lengths_are_refused() {
    run(async {
        let text = "Active disk, hidden disk, secondary disk's length are not the same";
        let setup = Setup::new(MIB);
        let s = Setup { active_size: MIB + 64 * KIB, ..setup }.build().await;
        start_is_refused(&s, text).await;
        let s = Setup { active_size: MIB - 64 * KIB, ..Setup::new(MIB) }.build().await;
        start_is_refused(&s, text).await;
    });
}

/// Row: §11.10, §14.22, §14.23.
#[test]
fn d15_secondary_without_backing_is_refused() {
    run(async {
        let s = Setup { has_base: false, ..Setup::new(MIB) }.build().await;
        start_is_refused(&s, "Hidden disk doesn't have backing file").await;
        let s = Setup { has_hidden: false, ..Setup::new(MIB) }.build().await;
        start_is_refused(&s, "Active disk doesn't have backing file").await;
    });
}

/// Here no image is reopened for a start, so none has to become read-only again; it is not
/// written to either.
///
/// Row: §14.4, §14.28.
#[test]
fn d16_secondary_top_that_is_not_above_is_refused() {
    run(async {
        for top_id in ["", "s_local", "somebody else's root"] {
            let above = vec!["root".to_owned()];
            let s = Setup { top_id, above, ..Setup::new(MIB) }.build().await;
            start_is_refused(&s, "No top_bs or it is invalid").await;
        }
        let above = vec!["other".to_owned(), "root".to_owned()];
        Setup { top_id: "root", above, ..Setup::new(MIB) }.started().await;
    });
}

/// A change of size is all that exists here of what the original refuses. There is no eject (a
/// device lives as long as somebody has it), no second job (a filter is put on a device only by
/// its owner), and no internal snapshot (such images are refused at open).
///
/// Row: §14.29.
#[test]
fn d17_secondary_resize_is_refused_while_running() {
    run(async {
        let s = Setup::new(MIB).started().await;
        let error = s.node.truncate(2 * MIB).await.unwrap_err();
        assert_eq!(error.detail(), "Block device is in use by internal backup job");
        assert_eq!((error.errno(), s.node.size()), (16, MIB));
        // Nor behind the primary's back.
        s.local().truncate(2 * MIB).await.unwrap_err();
        assert_eq!(s.base.inner.size(), MIB);
    });
}

/// Row: §11.17, §13.5, §14.31.
#[test]
fn d18_secondary_start_empties_both_overlays() {
    run(async {
        let s = Setup::new(SIZE).build().await;
        for file in [&s.active, &s.hidden] {
            let image = open_image(file).await;
            fill(&*image, 0, MIB, 0x77).await;
            fill(&*image, SIZE - MIB, MIB, 0x77).await;
            image.close().await.unwrap();
        }
        let S { base, hidden, active, node } = s;
        drop(node);
        let s = Setup::new(SIZE).open(base, hidden, active).await.unwrap();
        s.start().await.unwrap();
        expect(&*s.node, 0, SIZE, 0x11).await;
        // And what a merge would copy is gone.
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, SIZE, 0x11).await;
    });
}

/// Row: §15.5.
#[test]
fn secondary_unit_smaller_than_what_the_hidden_disk_allocates_is_refused() {
    run(async {
        let s = Setup { unit_bytes: 2 * KIB, ..Setup::new(MIB) }.build().await;
        let text = "a copy unit of 2048 bytes is smaller than the 65536 bytes that the hidden disk \
                    allocates at a time";
        start_is_refused(&s, text).await;
    });
}

/// Row: §11.2.
#[test]
fn secondary_active_disk_that_names_a_backing_file_is_refused() {
    run(async {
        let s = Setup::new(MIB).build().await;
        let backing_name = Some(BackingName { name: "hidden".into(), format: "qcow2".into() });
        let options = CreateOptions { backing_name, ..CreateOptions::new(MIB) };
        for image in [&s.hidden, &s.active] {
            Qcow2::create(&image.inner, &options).await.unwrap();
            let S { base, hidden, active, .. } = &s;
            let probes = (base.clone(), hidden.clone(), active.clone());
            assert!(Setup::new(MIB).open(probes.0, probes.1, probes.2).await.is_err());
            Qcow2::create(&image.inner, &CreateOptions::new(MIB)).await.unwrap();
        }
    });
}

/// A start whose emptying fails can be repeated.
///
/// Row: §11.15, §14.26.
#[test]
fn secondary_start_that_cannot_empty_a_disk_fails_and_can_be_repeated() {
    run(async {
        let s = Setup::new(MIB).build().await;
        let image = open_image(&s.hidden).await;
        fill(&*image, 0, MIB, 0x77).await;
        image.close().await.unwrap();
        let S { base, hidden, active, .. } = s;
        let s = Setup::new(MIB).open(base, hidden, active).await.unwrap();
        s.hidden.fault.fail(Rule::new(Operation::Write).forever());
        let error = s.start().await.unwrap_err();
        assert!(error.detail().starts_with("Cannot make hidden disk empty: "), "{error}");
        assert_eq!(s.node.stage(), Stage::None);
        is_eio(s.node.read(0, 512).await);
        s.hidden.fault.clear();
        // A failed change of an image's tables asks for a reopen.
        let S { base, hidden, active, .. } = s;
        let s = Setup::new(MIB).open(base, hidden, active).await.unwrap();
        s.start().await.unwrap();
        expect(&*s.node, 0, MIB, 0x11).await;
    });
}

/// Row: §11.6.
#[test]
fn secondary_guest_discards_and_zeroes_do_not_show_what_lies_below() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        s.node.discard(0, 64 * KIB).await.unwrap();
        s.node.write_zeroes(64 * KIB, 1000, Default::default()).await.unwrap();
        expect(&*s.node, 0, 64 * KIB + 1000, 0).await;
        expect(&*s.node, 64 * KIB + 1000, 64 * KIB, 0x11).await;
        s.node.write(MIB - 3, Bytes::from_static(&[5; 3]), WriteFlags { fua: true }).await.unwrap();
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, 64 * KIB + 1000, 0).await;
        expect(&*s.base.inner, 64 * KIB + 1000, 64 * KIB, 0x11).await;
        expect(&*s.base.inner, MIB - 3, 3, 5).await;
    });
}
