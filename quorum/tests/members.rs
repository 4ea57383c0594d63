//! Children that come and go (spec: quorum, adding and removing).

mod common;

use brep_block::{BlockDevice, Operation, Rule, WriteFlags};
use brep_quorum::{Child, ChildChange, QuorumError};
use bytes::Bytes;
use common::{Rig, fifo, memory, rig};

fn names(rig: &Rig) -> Vec<String> {
    rig.quorum.children().into_iter().map(|(name, _)| name).collect()
}

async fn add(rig: &Rig, i: usize) -> String {
    rig.quorum.add_child(Child::new(memory(i).0 as _)).await.unwrap()
}

#[tokio::test]
async fn a_child_is_added_last_and_gets_the_writes_from_then_on() {
    let rig = fifo(2, 1);
    let (memory, fault) = memory(2);
    assert_eq!(rig.quorum.add_child(Child::new(fault as _)).await.unwrap(), "children.2");
    rig.write(0, 5).await.unwrap();
    assert_eq!(memory.read(0, 1).await.unwrap()[0], 5);
    assert_eq!(rig.quorum.children()[2], ("children.2".to_owned(), "node2".to_owned()));
}

#[tokio::test]
async fn blkverify_takes_no_more_children() {
    let rig = rig(2, 2, |options| options.settings.blkverify = true);
    let error = rig.quorum.add_child(Child::new(memory(2).0 as _)).await.unwrap_err();
    assert_eq!(error.to_string(), "Cannot add a child to a quorum in blkverify mode");
}

#[tokio::test]
async fn a_device_that_is_a_child_already_is_refused() {
    let rig = fifo(2, 1);
    let error = rig.quorum.add_child(Child::new(rig.fault[1].clone() as _)).await.unwrap_err();
    assert_eq!(error.to_string(), "The node node1 already has a parent");
}

#[tokio::test]
async fn a_name_is_reused_only_if_the_child_that_was_added_last_is_removed() {
    let rig = fifo(2, 1);
    assert_eq!(add(&rig, 2).await, "children.2");
    assert_eq!(add(&rig, 3).await, "children.3");
    rig.quorum.remove_child("children.2").await.unwrap();
    assert_eq!(names(&rig), ["children.0", "children.1", "children.3"]);
    assert_eq!(add(&rig, 4).await, "children.4");
    rig.quorum.remove_child("children.4").await.unwrap();
    assert_eq!(add(&rig, 5).await, "children.4");
}

#[tokio::test]
async fn as_many_children_as_the_threshold_must_stay() {
    let rig = rig(3, 2, |_| ());
    let removed = rig.quorum.remove_child("children.0").await.unwrap();
    assert_eq!(removed.name(), "node0");
    let error = rig.quorum.remove_child("children.1").await.unwrap_err();
    let text = "The number of children cannot be lower than the vote threshold 2";
    assert_eq!(error.to_string(), text);
}

#[tokio::test]
async fn the_last_child_stays() {
    let rig = fifo(1, 1);
    rig.quorum.remove_child("children.0").await.unwrap_err();
}

#[tokio::test]
async fn an_unknown_child_cannot_be_removed() {
    let rig = fifo(2, 1);
    let error = rig.quorum.remove_child("children.7").await.unwrap_err();
    assert_eq!(error.to_string(), "Node 'quorum' does not have child 'children.7'");
}

#[tokio::test]
async fn a_change_waits_for_what_is_in_flight_and_holds_back_what_comes() {
    let rig = fifo(2, 1);
    let hang = rig.fault[1].hang(Rule::new(Operation::Write));
    let first = rig.quorum.write(0, Bytes::from(vec![1; 512]), WriteFlags::default());
    let (third, fault) = memory(2);
    let quorum = rig.quorum.clone();
    let adding = tokio::spawn(async move { quorum.add_child(Child::new(fault as _)).await });
    hang.reached(1).await;
    tokio::task::yield_now().await;
    assert!(!adding.is_finished());
    let second = rig.quorum.write(512, Bytes::from(vec![2; 512]), WriteFlags::default());
    assert_eq!(rig.get(0, 512).await, 0, "held back");
    hang.release();
    first.await.unwrap();
    adding.await.unwrap().unwrap();
    second.await.unwrap();
    assert_eq!((third.read(0, 1).await.unwrap()[0], third.read(512, 1).await.unwrap()[0]), (0, 2));
}

#[tokio::test]
async fn a_change_that_is_given_up_lets_requests_go_on() {
    let rig = fifo(2, 1);
    let hang = rig.fault[1].hang(Rule::new(Operation::Write));
    let first = rig.quorum.write(0, Bytes::from(vec![1; 512]), WriteFlags::default());
    {
        let removing = rig.quorum.remove_child("children.1");
        tokio::pin!(removing);
        let waited = tokio::select! {
            biased;
            _ = &mut removing => false,
            () = tokio::task::yield_now() => true,
        };
        assert!(waited);
    }
    rig.write(1024, 3).await.unwrap();
    hang.release();
    first.await.unwrap();
    assert_eq!(names(&rig), ["children.0", "children.1"]);
}

/// The two parameters of `x-blockdev-change`, of which exactly one is wanted.
#[test]
fn a_change_adds_a_node_or_removes_a_child() {
    let new = |child: Option<&str>, node: Option<&str>| {
        ChildChange::new(child.map(str::to_owned), node.map(str::to_owned))
    };
    let text = |result: Result<ChildChange, QuorumError>| result.unwrap_err().to_string();
    assert_eq!(text(new(Some("c"), Some("n"))), "The parameters child and node are in conflict");
    assert_eq!(text(new(None, None)), "Either child or node must be specified");
    let add = new(None, Some("n")).unwrap();
    assert_eq!(add, ChildChange::Add { node: "n".into() });
    assert_eq!(add.refused_by("raw0").to_string(), "The node raw0 does not support adding a child");
    let remove = new(Some("children.1"), None).unwrap();
    assert_eq!(remove, ChildChange::Remove { child: "children.1".into() });
    let text = remove.refused_by("raw0").to_string();
    assert_eq!(text, "The node raw0 does not support removing a child");
}
