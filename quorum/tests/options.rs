//! Options and sizes (spec: quorum, options; series v3, section 3).

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, Memory, ReadOnly};
use brep_quorum::{Child, Quorum, QuorumOptions, ReadPattern};
use common::rig;

fn children(sizes: &[u64]) -> Vec<Child> {
    let make = |(i, size): (usize, &u64)| Child::new(Memory::new(format!("node{i}"), *size) as _);
    sizes.iter().enumerate().map(make).collect()
}

fn refused(options: QuorumOptions) -> String {
    Quorum::new(options).unwrap_err().to_string()
}

#[test]
fn no_children_are_refused() {
    let text = refused(QuorumOptions::new("q", 1, vec![]));
    assert_eq!(text, "Number of provided children must be 1 or more");
}

#[test]
fn one_child_is_accepted() {
    assert_eq!(Quorum::new(QuorumOptions::new("q", 1, children(&[512]))).unwrap().size(), 512);
}

#[test]
fn a_threshold_of_zero_is_refused_for_both_patterns() {
    for pattern in [ReadPattern::Quorum, ReadPattern::Fifo] {
        let options = QuorumOptions::new("q", 0, children(&[512, 512])).read_pattern(pattern);
        assert_eq!(refused(options), "parameter 'vote-threshold' expects a value >= 1");
    }
}

#[test]
fn a_threshold_above_the_number_of_children_is_refused() {
    let text = refused(QuorumOptions::new("q", 3, children(&[512, 512])));
    assert_eq!(text, "threshold may not exceed children count");
}

#[test]
fn an_unknown_read_pattern_is_refused() {
    assert_eq!("fifo".parse::<ReadPattern>().unwrap(), ReadPattern::Fifo);
    assert_eq!("quorum".parse::<ReadPattern>().unwrap(), ReadPattern::Quorum);
    let text = "lifo".parse::<ReadPattern>().unwrap_err().to_string();
    assert_eq!(text, "Please set read-pattern as fifo or quorum");
}

#[test]
fn blkverify_wants_two_children_and_threshold_two() {
    let make = |count: usize, threshold, pattern, rewrite| {
        let mut options = QuorumOptions::new("q", threshold, children(&vec![512; count]));
        options.settings.blkverify = true;
        options.settings.rewrite_corrupted = rewrite;
        options.settings.read_pattern = pattern;
        Quorum::new(options)
    };
    assert!(make(2, 2, ReadPattern::Quorum, false).is_ok());
    assert!(make(3, 2, ReadPattern::Quorum, false).is_err());
    assert!(make(2, 1, ReadPattern::Quorum, false).is_err());
    assert!(make(2, 2, ReadPattern::Quorum, true).is_err(), "nothing is repaired");
    assert!(make(3, 1, ReadPattern::Fifo, true).is_ok(), "only evaluated for voting reads");
}

#[test]
fn a_device_cannot_be_two_children() {
    let disk = Memory::new("disk", 512);
    let twice = vec![Child::new(disk.clone() as _), Child::new(disk as _)];
    assert_eq!(refused(QuorumOptions::new("q", 1, twice)), "The node disk already has a parent");
}

#[test]
fn limits_are_those_that_every_child_keeps() {
    let rig = rig(2, 1, |_| ());
    let limits = rig.quorum.limits();
    assert!(limits.can_discard && limits.fast_zero && !limits.read_only);
    let disk: Arc<dyn BlockDevice> = Memory::new_growable("disk", 512);
    let children = vec![Child::new(ReadOnly::new(disk)), Child::new(Memory::new("b", 512) as _)];
    let limits = Quorum::new(QuorumOptions::new("q", 1, children)).unwrap().limits();
    assert!(limits.read_only && !limits.growable);
}
