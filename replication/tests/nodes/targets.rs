//! Targets of backing references, which the calls over all disks skip; and the end of an active
//! disk. Rows of sections 8 and 11.

use std::sync::Arc;

use brep_block::{BlockDevice, ErrorKind, Memory, Replication, ReplicationMode};
use brep_replication::node::{
    ReferenceTarget, Stage, checkpoint_all, error_all, start_all, stop_all,
};

use crate::support::*;

const SECONDARY: ReplicationMode = ReplicationMode::Secondary;
const UNSUPPORTED: &str = "this feature or command is not currently supported";

/// Patch 13: whoever calls every disk calls the target too, which has nothing to do.
///
/// Row: §5.5.
#[test]
fn series_s08_start_checkpoint_and_stop_skip_a_target() {
    run(async {
        let s = Setup::subclusters(MIB).build().await;
        let target = ReferenceTarget::new(Arc::clone(&s.base.inner));
        let used = target.refer("s").unwrap();
        let disks = [Arc::clone(&target) as Arc<dyn BlockDevice>, Arc::clone(&s.node) as _];
        start_all(&disks, SECONDARY).await.unwrap();
        error_all(&disks).await.unwrap();
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        checkpoint_all(&disks).await.unwrap();
        expect(&*s.node, 0, 4096, 0x22).await;
        write(&*s.local(), 0, 4096, 0x44).await.unwrap();
        stop_all(&disks, true).await.unwrap();
        s.merged().await;
        expect(&*target, 0, 4096, 0x22).await;
        // Nobody refers to it any more: it is a disk that cannot replicate.
        drop(used);
        refused(start_all(&disks[..1], SECONDARY).await, UNSUPPORTED);
        for result in [
            checkpoint_all(&disks[..1]).await,
            stop_all(&disks[..1], false).await,
            error_all(&disks[..1]).await,
        ] {
            refused(result, UNSUPPORTED);
        }
    });
}

/// One that cannot start undoes what was started, and a target in between does not hinder.
///
/// Row: §5.5.
#[test]
fn series_s08_a_start_that_fails_behind_a_target_stops_those_before_it() {
    run(async {
        let one = Setup::new(MIB).build().await;
        let two = Setup { top_id: "nobody", ..Setup::new(MIB) }.build().await;
        let target = ReferenceTarget::new(Memory::new("t", MIB));
        let _used = target.refer("one").unwrap();
        let disks =
            [Arc::clone(&one.node) as Arc<dyn BlockDevice>, target, Arc::clone(&two.node) as _];
        refused(start_all(&disks, SECONDARY).await, "No top_bs or it is invalid");
        assert_eq!([one.node.stage(), two.node.stage()], [Stage::Done, Stage::None]);
    });
}

/// Patch 14, and the close of the disk that refers: one user at a time, who gives it back.
///
/// Row: §8.8, §8.10, §8.16, §8.18.
#[test]
fn series_s08_a_target_and_a_guest_devices_disk_exclude_each_other() {
    let target = ReferenceTarget::new(Memory::new("y", MIB));
    let text = |result: brep_block::Result<_>| {
        let error = result.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Locked, 16));
        error.detail().to_owned()
    };
    let guest = target.attach().unwrap();
    assert_eq!(text(target.refer("x")), "backing_hd y is used by the other device model");
    drop(guest);
    let reference = target.refer("x").unwrap();
    let busy = "Node 'y' is busy: it is used as the backing reference of x";
    assert_eq!(text(target.attach()), busy);
    assert_eq!(text(target.refer("z")), busy);
    // A refusal takes nothing away, and the close of x gives it back.
    assert_eq!(text(target.refer("z")), busy);
    drop(reference);
    drop(target.attach().unwrap());
}

/// Row: §8.15.
#[test]
fn series_s08_a_target_keeps_its_size_as_long_as_it_is_one() {
    run(async {
        let target = ReferenceTarget::new(Memory::new_growable("y", MIB));
        let used = target.refer("x").unwrap();
        let error = target.truncate(2 * MIB).await.unwrap_err();
        assert_eq!((error.errno(), target.size()), (16, MIB));
        drop(used);
        target.truncate(2 * MIB).await.unwrap();
        assert_eq!(target.size(), 2 * MIB);
    });
}

#[test]
fn a_target_obeys_the_rules_of_every_device() {
    run(async {
        let make =
            async |size: u64| ReferenceTarget::new(Memory::new("y", size)) as Arc<dyn BlockDevice>;
        let options = brep_block::conformance::Options::default().operations(100);
        brep_block::conformance::run(make, options).await.unwrap();
    });
}

/// The export is closed before anything is merged: what a client still sends is not carried out.
///
/// Row: §11.23.
#[test]
fn series_s11_stop_closes_the_export_first() {
    run(async {
        for failover in [false, true] {
            let s = Setup::new(MIB).started().await;
            let export = s.local();
            s.node.stop(failover).await.unwrap();
            assert!(s.node.local().is_none());
            is_eio(write(&*export, 0, 512, 0x22).await);
            s.merged().await;
            is_eio(write(&*export, 0, 512, 0x22).await);
            expect(&*s.base.inner, 0, MIB, 0x11).await;
        }
    });
}

/// The job is begun by start itself, and without it a stop with
/// failover still leads to the last checkpoint.
///
/// Row: §11.24.
#[test]
fn series_s11_stop_without_the_job_leads_to_the_last_checkpoint() {
    run(async {
        let s = Setup::new(MIB).started().await;
        write(&*s.local(), 0, 512, 0x22).await.unwrap();
        write(&*s.node, 8192, 512, 0x33).await.unwrap();
        s.node.cancel_job();
        refused(s.node.checkpoint().await, JOB_CANCELLED);
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, 8192, 0x11).await;
        expect(&*s.base.inner, 8192, 512, 0x33).await;
    });
}
