//! How often events are sent (spec: quorum, events).

mod common;

use std::time::Duration;

use brep_block::{BlockDevice, Operation, WriteFlags};
use brep_quorum::QuorumEvent;
use bytes::Bytes;
use common::{Rig, failing, fifo};

fn sectors(rig: &Rig) -> Vec<(String, u64)> {
    let of = |event: QuorumEvent| match event {
        QuorumEvent::ReportBad { node_name, sector_num, .. } => (node_name, sector_num),
        QuorumEvent::Failure { reference, sector_num, .. } => (reference, sector_num),
    };
    rig.events().into_iter().map(of).collect()
}

async fn sleep(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

#[tokio::test(start_paused = true)]
async fn the_first_is_sent_at_once_and_the_last_when_the_second_is_over() {
    let rig = fifo(2, 1);
    rig.fault[1].fail(failing(Operation::Write, 5));
    for sector in 0..4 {
        rig.write(sector * 512, 1).await.unwrap();
    }
    let event = |sector| ("node1".to_owned(), sector);
    assert_eq!(sectors(&rig), [event(0)]);
    sleep(990).await;
    assert_eq!(sectors(&rig), []);
    sleep(20).await;
    assert_eq!(sectors(&rig), [event(3)], "the last of those that came meanwhile");
    rig.write(5 * 512, 1).await.unwrap();
    assert_eq!(sectors(&rig), [], "a new second has begun");
    sleep(1000).await;
    assert_eq!(sectors(&rig), [event(5)]);
    sleep(3000).await;
    assert_eq!(sectors(&rig), []);
    rig.write(6 * 512, 1).await.unwrap();
    assert_eq!(sectors(&rig), [event(6)], "at once again after a quiet second");
}

#[tokio::test(start_paused = true)]
async fn every_node_has_its_own_second_and_failures_have_theirs() {
    let rig = fifo(2, 1);
    rig.fault.iter().for_each(|fault| fault.fail(failing(Operation::Write, 5)));
    rig.write(512, 1).await.unwrap_err();
    let names: Vec<_> = sectors(&rig).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["node0", "node1", "quorum"]);
    rig.write(1024, 1).await.unwrap_err();
    assert_eq!(sectors(&rig), []);
}

#[tokio::test]
async fn sectors_are_rounded_outwards() {
    let rig = fifo(2, 1);
    rig.fault[1].fail(failing(Operation::Write, 5));
    let data = Bytes::from_static(&[1, 2]);
    rig.quorum.write(1023, data, WriteFlags::default()).await.unwrap();
    let events = rig.events();
    let QuorumEvent::ReportBad { sector_num, sectors_count, error, .. } = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!((*sector_num, *sectors_count), (1, 2));
    assert!(error.as_ref().unwrap().contains("node1"), "{error:?}");
}
