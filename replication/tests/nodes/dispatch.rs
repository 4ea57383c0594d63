//! Which device a call reaches (series, §5).

use std::sync::Arc;

use brep_block::{BlockDevice, Count, Fault, Memory, ReadOnly, ReplicationMode, Serialise};
use brep_replication::node::Stage;

use crate::support::*;

/// A device that does not replicate itself hands the calls down, through
/// any number of its like.
///
/// Row: §5.1, §5.2, §5.4.
#[test]
fn series_s05_calls_reach_the_node_below_what_does_not_replicate() {
    run(async {
        let s = Setup::subclusters(MIB).build().await;
        let node = Arc::clone(&s.node) as Arc<dyn BlockDevice>;
        let above: Arc<dyn BlockDevice> = Count::new(Fault::new(Serialise::new(node) as _) as _);
        let calls = above.replication().expect("handed down");
        refused(calls.checkpoint().await, NOT_RUNNING);
        refused(calls.error().await, NOT_RUNNING);
        refused(calls.stop(false).await, NOT_RUNNING);
        calls.start(ReplicationMode::Secondary).await.unwrap();
        assert_eq!(s.node.stage(), Stage::Running);
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        calls.checkpoint().await.unwrap();
        expect(&*s.node, 0, 4096, 0x22).await;
        calls.error().await.unwrap();
        // With its flag: the disk becomes what the guest saw.
        write(&*s.local(), 0, 4096, 0x44).await.unwrap();
        calls.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, 4096, 0x22).await;
    });
}

/// Nobody below replicates. Nor does what only looks at a node.
///
/// Row: §5.3.
#[test]
fn series_s05_a_device_without_replication_has_no_calls() {
    run(async {
        let memory = Memory::new("plain", MIB);
        let above: Arc<dyn BlockDevice> = Count::new(Fault::new(Arc::clone(&memory) as _) as _);
        assert!(memory.replication().is_none());
        assert!(above.replication().is_none());
        let s = Setup::subclusters(MIB).build().await;
        assert!(ReadOnly::new(Arc::clone(&s.node) as _).replication().is_none());
    });
}
