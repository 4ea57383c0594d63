//! Reads of both patterns, and block status (spec: quorum).

mod common;

use brep_block::{BlockDevice, ErrorKind, Operation, ReadOnly, Rule, WriteFlags, ZeroFlags};
use brep_quorum::{QuorumOperation, QuorumOptions, ReadPattern};
use bytes::Bytes;
use common::{failing, failure, fifo, is_bad, rig};

#[tokio::test]
async fn equal_contents_are_returned_without_a_word() {
    let rig = rig(3, 2, |_| ());
    rig.write(0, 7).await.unwrap();
    assert_eq!(rig.read(0).await.unwrap(), 7);
    assert_eq!(rig.events(), []);
}

#[tokio::test]
async fn a_failed_read_is_reported_and_the_others_suffice() {
    let rig = rig(3, 2, |_| ());
    rig.write(512, 7).await.unwrap();
    rig.fault[0].fail(failing(Operation::Read, 5));
    assert_eq!(rig.read(512).await.unwrap(), 7);
    let events = rig.events();
    assert_eq!(events.len(), 1);
    assert!(is_bad(&events[0], QuorumOperation::Read, "node0", true), "{events:?}");
}

#[tokio::test]
async fn too_few_successful_reads_fail_with_the_most_frequent_error() {
    let rig = rig(3, 1, |_| ());
    rig.fault[0].fail(failing(Operation::Read, 28));
    rig.fault[1].fail(failing(Operation::Read, 5));
    rig.fault[2].fail(failing(Operation::Read, 5));
    let error = rig.read(1024).await.unwrap_err();
    assert_eq!((error.errno(), error.node()), (5, "quorum"));
    let events = rig.events();
    assert_eq!(events.len(), 4);
    assert_eq!(events[3], failure(2, 1));
}

#[tokio::test]
async fn exactly_threshold_equal_successes_are_enough() {
    let rig = rig(2, 1, |_| ());
    rig.fault[1].fail(failing(Operation::Read, 5));
    rig.put(0, 0, 3).await;
    assert_eq!(rig.read(0).await.unwrap(), 3);
}

#[tokio::test]
async fn the_majority_wins_and_the_loser_is_reported_without_error_text() {
    let rig = rig(3, 2, |_| ());
    rig.write(0, 7).await.unwrap();
    rig.put(0, 0, 8).await;
    assert_eq!(rig.read(0).await.unwrap(), 7);
    let events = rig.events();
    assert_eq!(events.len(), 1);
    assert!(is_bad(&events[0], QuorumOperation::Read, "node0", false), "{events:?}");
    assert_eq!(rig.get(0, 0).await, 8, "nothing is repaired unless it is asked for");
}

#[tokio::test]
async fn a_largest_group_below_the_threshold_fails_with_eio() {
    let rig = rig(3, 2, |_| ());
    for child in 0..3 {
        rig.put(child, 0, child as u8).await;
    }
    let error = rig.read(0).await.unwrap_err();
    assert_eq!(error.errno(), 5);
    assert_eq!(rig.events(), [failure(0, 1)]);
}

#[tokio::test]
async fn on_a_tie_the_version_seen_latest_wins() {
    let rig = rig(2, 1, |_| ());
    rig.put(0, 0, 1).await;
    rig.put(1, 0, 2).await;
    assert_eq!(rig.read(0).await.unwrap(), 2);
}

#[tokio::test]
async fn outvoted_children_are_rewritten_if_wanted_but_not_failed_ones() {
    let rig = rig(4, 2, |options| options.settings.rewrite_corrupted = true);
    rig.write(0, 7).await.unwrap();
    rig.put(1, 0, 8).await;
    rig.put(3, 0, 9).await;
    rig.fault[3].fail(Rule::new(Operation::Read));
    assert_eq!(rig.read(0).await.unwrap(), 7);
    assert_eq!(rig.get(1, 0).await, 7);
    assert_eq!(rig.get(3, 0).await, 9, "its content is not known to be wrong");
}

#[tokio::test]
async fn a_rewrite_that_fails_does_not_fail_the_read() {
    let rig = rig(3, 2, |options| options.settings.rewrite_corrupted = true);
    rig.put(2, 0, 8).await;
    rig.fault[2].fail(failing(Operation::Write, 28));
    assert_eq!(rig.read(0).await.unwrap(), 0);
}

#[tokio::test]
async fn a_rewrite_never_undoes_a_write_that_came_meanwhile() {
    let rig = rig(3, 2, |options| options.settings.rewrite_corrupted = true);
    rig.put(2, 0, 8).await;
    let hang = rig.fault[2].hang(Rule::new(Operation::Write));
    let quorum = rig.quorum.clone();
    let read = tokio::spawn(async move { quorum.read(0, 512).await });
    hang.reached(1).await;
    let write = rig.quorum.write(0, Bytes::from(vec![9; 512]), WriteFlags::default());
    hang.release();
    read.await.unwrap().unwrap();
    write.await.unwrap();
    for child in 0..3 {
        assert_eq!(rig.get(child, 0).await, 9, "child {child}");
    }
}

#[tokio::test]
async fn a_repair_whose_read_was_given_up_holds_later_writes_back() {
    let rig = rig(3, 2, |options| options.settings.rewrite_corrupted = true);
    rig.put(2, 0, 8).await;
    let hang = rig.fault[2].hang(Rule::new(Operation::Write));
    drop(rig.quorum.read(0, 512));
    hang.reached(1).await;
    let write = rig.quorum.write(0, Bytes::from(vec![9; 512]), WriteFlags::default());
    assert_eq!(rig.get(0, 0).await, 0, "held back");
    hang.release();
    write.await.unwrap();
    for child in 0..3 {
        assert_eq!(rig.get(child, 0).await, 9, "child {child}");
    }
}

#[tokio::test]
async fn children_are_repaired_also_under_a_reader_that_may_not_write() {
    let rig = rig(3, 2, |options| options.settings.rewrite_corrupted = true);
    rig.put(1, 0, 8).await;
    let reader = ReadOnly::new(rig.quorum.clone() as _);
    assert_eq!(reader.read(0, 512).await.unwrap()[0], 0);
    assert_eq!(rig.get(1, 0).await, 0);
}

#[tokio::test]
async fn blkverify_fails_a_read_at_the_first_difference() {
    let rig = rig(2, 2, |options| options.settings.blkverify = true);
    rig.write(0, 7).await.unwrap();
    assert_eq!(rig.read(0).await.unwrap(), 7);
    rig.memory[1].write(100, Bytes::from_static(&[1]), WriteFlags::default()).await.unwrap();
    let error = rig.quorum.read(0, 512).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.detail().contains("contents mismatch at offset 100"), "{error}");
    assert_eq!(rig.events(), [failure(0, 1)]);
}

#[tokio::test]
async fn fifo_reads_the_first_child_only() {
    let rig = fifo(2, 1);
    rig.put(0, 0, 1).await;
    rig.put(1, 0, 2).await;
    let hang = rig.fault[1].hang(failing(Operation::Read, 5));
    assert_eq!(rig.read(0).await.unwrap(), 1, "a child that hangs delays nothing");
    hang.release();
    assert_eq!(rig.events(), []);
}

#[tokio::test]
async fn fifo_goes_on_to_the_next_child_and_reports_the_failure() {
    let rig = fifo(2, 1);
    rig.put(1, 0, 2).await;
    rig.fault[0].fail(failing(Operation::Read, 5));
    assert_eq!(rig.read(0).await.unwrap(), 2);
    let events = rig.events();
    assert_eq!(events.len(), 1);
    assert!(is_bad(&events[0], QuorumOperation::Read, "node0", true));
}

#[tokio::test]
async fn fifo_returns_the_last_error_and_no_failure_event() {
    let rig = fifo(2, 1);
    rig.fault[0].fail(failing(Operation::Read, 5));
    rig.fault[1].fail(failing(Operation::Read, 28));
    assert_eq!(rig.read(0).await.unwrap_err().errno(), 28);
    let events = rig.events();
    assert_eq!(events.len(), 2);
    assert!(is_bad(&events[1], QuorumOperation::Read, "node1", true));
}

#[tokio::test]
async fn failures_of_a_child_with_ignored_errors_are_not_reported() {
    for pattern in [ReadPattern::Fifo, ReadPattern::Quorum] {
        let rig = rig(2, 1, |options: &mut QuorumOptions| {
            options.settings.read_pattern = pattern;
            options.children[0].ignore_errors = true;
        });
        rig.fault[0].fail(failing(Operation::Read, 5));
        assert_eq!(rig.read(0).await.unwrap(), 0);
        assert_eq!(rig.events(), [], "{pattern:?}");
    }
}

#[tokio::test]
async fn reads_beyond_the_end_fail_without_asking_the_children() {
    let rig = rig(2, 1, |_| ());
    let error = rig.quorum.read(common::SIZE, 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(rig.events(), []);
}

#[tokio::test]
async fn status_is_zero_with_the_smallest_length_if_all_are_zero() {
    let rig = rig(2, 1, |_| ());
    let status = rig.quorum.block_status(0, 4096).await.unwrap();
    assert!(status.flags.zero && status.flags.allocated && !status.flags.data);
    assert_eq!(status.len, 4096);
}

#[tokio::test]
async fn status_is_data_if_any_child_has_data() {
    let rig = rig(2, 1, |_| ());
    rig.put(1, 0, 5).await;
    let status = rig.quorum.block_status(0, 4096).await.unwrap();
    assert!(status.flags.data && !status.flags.zero && status.flags.allocated);
}

#[tokio::test]
async fn status_is_data_for_the_whole_range_if_a_child_fails() {
    let rig = rig(2, 1, |_| ());
    rig.fault[1].fail(failing(Operation::BlockStatus, 5));
    let status = rig.quorum.block_status(0, 4096).await.unwrap();
    assert!(status.flags.data && !status.flags.zero);
    assert_eq!(status.len, 4096);
    let events = rig.events();
    assert!(is_bad(&events[0], QuorumOperation::Read, "node1", true));
}

#[tokio::test]
async fn status_does_not_wait_for_a_child_with_ignored_errors() {
    let rig = rig(2, 1, |options| options.children[1].ignore_errors = true);
    let hang = rig.fault[1].hang(failing(Operation::BlockStatus, 5));
    rig.quorum.write_zeroes(0, 512, ZeroFlags::default()).await.unwrap();
    assert!(rig.quorum.block_status(0, 4096).await.unwrap().flags.zero);
    hang.release();
}
