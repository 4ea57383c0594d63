//! Writes, zeroes, discards and flushes (spec: quorum).

mod common;

use std::sync::Arc;

use brep_block::{
    BlockDevice, ErrorKind, FlushLevel, Memory, Operation, Rule, WriteFlags, ZeroFlags,
};
use brep_quorum::{Child, Quorum, QuorumOperation, QuorumOptions};
use bytes::Bytes;
use common::{failing, failure, fifo, is_bad, rig};

#[tokio::test]
async fn a_write_reaches_every_child() {
    for rig in [rig(3, 2, |_| ()), fifo(3, 1)] {
        rig.write(512, 9).await.unwrap();
        for child in 0..3 {
            assert_eq!(rig.get(child, 512).await, 9);
        }
    }
}

#[tokio::test]
async fn every_child_is_called_before_the_first_has_finished() {
    let rig = fifo(2, 2);
    let hang = rig.fault[0].hang(Rule::new(Operation::Write));
    let write = rig.quorum.write(0, Bytes::from(vec![4; 512]), WriteFlags::default());
    hang.reached(1).await;
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (0, 4));
    hang.release();
    write.await.unwrap();
    assert_eq!(rig.get(0, 0).await, 4);
}

#[tokio::test]
async fn enough_successes_make_a_success_and_the_failure_is_reported() {
    let rig = rig(3, 2, |_| ());
    rig.fault[1].fail(failing(Operation::Write, 28));
    rig.write(512, 9).await.unwrap();
    let events = rig.events();
    assert_eq!(events.len(), 1);
    assert!(is_bad(&events[0], QuorumOperation::Write, "node1", true), "{events:?}");
    rig.fault[1].clear();
    rig.write(512, 10).await.unwrap();
    assert_eq!(rig.get(1, 512).await, 10, "it stays in the set");
}

#[tokio::test]
async fn too_few_successes_fail_with_the_most_frequent_error() {
    let rig = rig(4, 2, |_| ());
    rig.fault[0].fail(failing(Operation::Write, 5));
    rig.fault[1].fail(failing(Operation::Write, 28));
    rig.fault[2].fail(failing(Operation::Write, 28));
    let error = rig.write(512, 9).await.unwrap_err();
    assert_eq!((error.errno(), error.kind(), error.node()), (28, ErrorKind::NoSpace, "quorum"));
    assert_eq!(rig.events().last(), Some(&failure(1, 1)));
}

#[tokio::test]
async fn fifo_fails_a_write_that_every_child_fails() {
    let rig = fifo(2, 1);
    rig.fault[0].fail(failing(Operation::Write, 5));
    rig.write(0, 1).await.unwrap();
    rig.fault[1].fail(failing(Operation::Write, 5));
    rig.write(0, 1).await.unwrap_err();
}

#[tokio::test]
async fn zeroes_reach_every_child() {
    let rig = rig(2, 2, |_| ());
    rig.write(0, 9).await.unwrap();
    rig.quorum.write_zeroes(0, 512, ZeroFlags::default()).await.unwrap();
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (0, 0));
}

#[tokio::test]
async fn a_discard_makes_every_child_zero() {
    let rig = rig(2, 2, |_| ());
    rig.write(0, 9).await.unwrap();
    rig.fault[0].fail(failing(Operation::Discard, 95));
    rig.quorum.discard(0, 512).await.unwrap();
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (0, 0));
}

#[tokio::test]
async fn a_discard_is_forwarded_as_it_is_if_wanted() {
    let rig = rig(2, 2, |options| options.discard_as_zeroes = false);
    rig.fault[0].fail(failing(Operation::Discard, 5));
    rig.quorum.discard(0, 512).await.unwrap_err();
    let events = rig.events();
    assert!(is_bad(&events[0], QuorumOperation::Write, "node0", true), "{events:?}");
}

#[tokio::test]
async fn children_that_cannot_be_fast_follow_those_that_could() {
    let rig = rig(2, 2, |_| ());
    rig.write(0, 9).await.unwrap();
    let fast = ZeroFlags { fast: true, ..ZeroFlags::default() };
    rig.fault[1].fail(Rule::new(Operation::WriteZeroes).errno(95));
    rig.quorum.write_zeroes(0, 512, fast).await.unwrap();
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (0, 0), "all or none");
    assert_eq!(rig.events(), []);

    rig.write(0, 9).await.unwrap();
    rig.fault.iter().for_each(|f| f.fail(Rule::new(Operation::WriteZeroes).errno(95)));
    let error = rig.quorum.write_zeroes(0, 512, fast).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (9, 9));
}

#[tokio::test]
async fn overlapping_writes_reach_every_child_in_the_same_order() {
    let rig = rig(2, 2, |_| ());
    let hang = rig.fault[1].hang(Rule::new(Operation::Write));
    let write = |byte| rig.quorum.write(0, Bytes::from(vec![byte; 512]), WriteFlags::default());
    let (first, second) = (write(1), write(2));
    hang.reached(1).await;
    assert_eq!(rig.get(0, 0).await, 1, "the second waits until the first is everywhere");
    hang.release();
    first.await.unwrap();
    second.await.unwrap();
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (2, 2));
}

#[tokio::test]
async fn a_dropped_write_still_reaches_every_child() {
    let rig = rig(2, 2, |_| ());
    let hang = rig.fault[0].hang(Rule::new(Operation::Write));
    drop(rig.quorum.write(0, Bytes::from(vec![6; 512]), WriteFlags::default()));
    hang.release();
    rig.quorum.drain().await;
    assert_eq!((rig.get(0, 0).await, rig.get(1, 0).await), (6, 6));
}

#[tokio::test]
async fn a_failed_flush_is_reported_with_an_empty_range() {
    let rig = rig(2, 1, |_| ());
    rig.fault[0].fail(failing(Operation::Flush, 5));
    rig.quorum.flush(FlushLevel::Durable).await.unwrap();
    let events = rig.events();
    assert!(is_bad(&events[0], QuorumOperation::Flush, "node0", true));
    let brep_quorum::QuorumEvent::ReportBad { sector_num, sectors_count, .. } = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!((*sector_num, *sectors_count), (0, 0));
}

#[tokio::test]
async fn too_few_flushed_children_fail_the_flush() {
    let rig = rig(3, 2, |_| ());
    rig.fault[0].fail(failing(Operation::Flush, 5));
    rig.fault[2].fail(failing(Operation::Flush, 28));
    let error = rig.quorum.flush(FlushLevel::Durable).await.unwrap_err();
    assert_eq!(error.errno(), 5);
}

#[tokio::test]
async fn a_mirror_obeys_the_rules_of_every_device() {
    let make = async |size| {
        let children = ["a", "b", "c"].map(|name| Child::new(Memory::new(name, size) as _));
        let quorum = Quorum::new(QuorumOptions::new("mirror", 2, children.into())).unwrap();
        quorum as Arc<dyn BlockDevice>
    };
    brep_block::conformance::run(make, Default::default()).await.unwrap();
}
