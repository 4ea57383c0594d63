//! The calls over all disks.

use std::sync::Arc;

use brep_block::{BlockDevice, Memory, ReplicationMode, Rule};
use brep_replication::node::{Stage, checkpoint_all, error_all, start_all, stop_all};

use crate::support::*;

const SECONDARY: ReplicationMode = ReplicationMode::Secondary;

fn disk(s: &S) -> Arc<dyn BlockDevice> {
    Arc::clone(&s.node) as _
}

fn disks(all: &[S]) -> Vec<Arc<dyn BlockDevice>> {
    all.iter().map(disk).collect()
}

async fn three() -> [S; 3] {
    let setup = || Setup::subclusters(MIB).build();
    [setup().await, setup().await, setup().await]
}

/// Row: §13.7.
#[test]
fn all_disks_start_checkpoint_fail_over() {
    run(async {
        let all = three().await;
        let disks = disks(&all);
        start_all(&disks, SECONDARY).await.unwrap();
        error_all(&disks).await.unwrap();
        for s in &all {
            write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        }
        checkpoint_all(&disks).await.unwrap();
        for s in &all {
            expect(&*s.node, 0, 4096, 0x22).await;
            write(&*s.local(), 0, 4096, 0x44).await.unwrap();
        }
        stop_all(&disks, true).await.unwrap();
        for s in &all {
            s.merged().await;
            expect(&*s.base.inner, 0, 4096, 0x22).await;
        }
        error_all(&disks).await.unwrap();
    });
}

/// Row: §13.11.
#[test]
fn all_disks_one_that_fails_to_start_stops_those_before_it() {
    run(async {
        let [one, three] = [Setup::new(MIB).build().await, Setup::new(MIB).build().await];
        let two = Setup { top_id: "nobody", ..Setup::new(MIB) }.build().await;
        let disks = [disk(&one), disk(&two), disk(&three)];
        refused(start_all(&disks, SECONDARY).await, "No top_bs or it is invalid");
        assert_eq!(
            [&one, &two, &three].map(|s| s.node.stage()),
            [Stage::Done, Stage::None, Stage::None]
        );
        // Without a failover: its disk is served as it is.
        expect(&*one.node, 0, MIB, 0x11).await;
        assert!(one.node.local().is_none());
        assert_eq!(three.base.changes() + three.hidden.changes() + three.active.changes(), 0);
    });
}

/// Row: §5.3.
#[test]
fn all_disks_one_that_cannot_replicate_is_named() {
    run(async {
        let one = Setup::new(MIB).build().await;
        let plain = Memory::new("plain", MIB) as Arc<dyn BlockDevice>;
        let disks = [disk(&one), plain];
        let text = "this feature or command is not currently supported";
        let error = start_all(&disks, SECONDARY).await.unwrap_err();
        assert_eq!((error.detail(), error.node()), (text, "plain"));
        assert_eq!(one.node.stage(), Stage::Done);
        for result in
            [checkpoint_all(&disks).await, stop_all(&disks, false).await, error_all(&disks).await]
        {
            refused(result, text);
        }
    });
}

/// Row: §13.12.
#[test]
fn all_disks_checkpoint_ends_at_the_first_failure() {
    run(async {
        let all = three().await;
        let disks = disks(&all);
        start_all(&disks, SECONDARY).await.unwrap();
        for s in &all {
            write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        }
        all[1].hidden.fault.fail(Rule::new(brep_block::Operation::Write).forever());
        let error = checkpoint_all(&disks).await.unwrap_err();
        assert!(error.detail().starts_with("Cannot make hidden disk empty"), "{error}");
        expect(&*all[0].node, 0, 4096, 0x22).await;
        expect(&*all[1].node, 0, 4096, 0x11).await;
        expect(&*all[2].node, 0, 4096, 0x11).await;
    });
}

/// Row: §13.11.
#[test]
fn all_disks_stop_goes_on_past_failures() {
    run(async {
        let all = three().await;
        let disks = disks(&all);
        for s in [&all[1], &all[2]] {
            s.start().await.unwrap();
        }
        all[1].node.cancel_job();
        refused(error_all(&disks).await, NOT_RUNNING);
        reports_io_error(error_all(&disks[1..]).await);
        refused(stop_all(&disks, false).await, NOT_RUNNING);
        let stages = [Stage::None, Stage::Done, Stage::Done];
        assert_eq!([0, 1, 2].map(|i| all[i].node.stage()), stages);
    });
}
