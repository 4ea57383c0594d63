use std::time::Duration;

use brep_block::{BlockDevice, Operation, Rule};
use brep_nbd::client::connect_private;
use bytes::Bytes;
use serde_json::{Value, json};
use uuid::Uuid;

use super::common::{MIB, Scratch, Side, connect, copy_dir, file, fill, read};
use crate::config::SideConfig;
use crate::image::faults;
use crate::link::{
    CopyMode, DiskInfo, Hello, LINK_VERSION, Message, OPTION_LINK, Side as Introduction, split,
};
use crate::{Epoch, Generation};

async fn resize(side: &Side, size: u64) -> Result<Value, String> {
    let arguments = json!({ "device": "vda", "size": size });
    side.command("block_resize", arguments).await.map_err(|e| e.to_string())
}

fn has_size(size: u64) -> impl Fn(&Value) -> bool {
    move |s| s["disks"][0]["size"] == size
}

async fn start(scratch: &Scratch) -> (Side, Side) {
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    (primary, secondary)
}

fn pair_of_files(scratch: &Scratch) {
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
}

#[tokio::test]
async fn a_disk_grows_on_both_sides_while_its_guest_is_connected() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x11).await;
    resize(&primary, 4 * MIB).await.unwrap();
    fill(&*guest, 8192, 4096, 0x22).await;
    let new_guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    assert_eq!(new_guest.size(), 4 * MIB);
    fill(&*new_guest, 3 * MIB, 4096, 0x33).await;
    let in_sync = |s: &Value| has_size(4 * MIB)(s) && s["disks"][0]["state"] == "in-sync";
    primary.wait("in sync again", in_sync).await;
    secondary.wait("grown", has_size(4 * MIB)).await;
    fill(&*new_guest, 3 * MIB + 8192, 4096, 0x44).await;
    primary.checkpoint().await;
    let here = file(&scratch.path("p.raw"));
    assert_eq!(here.len() as u64, 4 * MIB);
    assert!(here == file(&scratch.path("s.raw")), "both sides are equal");
    guest.close();
    new_guest.close();
    primary.stop().await;
    secondary.stop().await;

    // Both know the new size when they are started again.
    let (primary, secondary) = start(&scratch).await;
    assert_eq!(primary.status().await["disks"][0]["size"], 4 * MIB);
    primary.stop().await;
    secondary.stop().await;
}

/// I3, I10: the last checkpoint is promotable after the disk has grown and before anything else was
/// committed; what it has beyond its old end is zeroes.
#[tokio::test]
async fn the_checkpoint_from_before_stays_promotable() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    let before = file(&scratch.path("p.raw"));
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 4096, 8192, 0x55).await;
    // The copy of the tail does not end.
    let here = faults::of(&scratch.path("p.raw"));
    let hang = here.upper.hang(Rule::new(Operation::BlockStatus));
    resize(&primary, 4 * MIB).await.unwrap();
    secondary.wait("grown", has_size(4 * MIB)).await;
    hang.reached(1).await;
    let new_guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*new_guest, 3 * MIB, 4096, 0x66).await;
    secondary.command("failover", json!({})).await.unwrap();
    let promoted = connect(scratch.endpoint("s.sock"), "vda").await;
    assert_eq!(promoted.size(), 4 * MIB);
    assert!(read(&*promoted, 0, 2 << 20).await == before, "the checkpoint");
    assert!(read(&*promoted, 2 * MIB, 2 << 20).await.iter().all(|b| *b == 0), "nothing beyond it");
    promoted.close();
    secondary.wait_state("promoted").await;
    hang.release();
    guest.close();
    new_guest.close();
    primary.stop().await;
    secondary.stop().await;
    let after = file(&scratch.path("s.raw"));
    assert!(after[..2 << 20] == before && after[2 << 20..].iter().all(|b| *b == 0), "merged");
}

#[tokio::test]
async fn a_secondary_that_was_away_follows() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    secondary.stop().await;
    primary.wait_state("disconnected").await;
    resize(&primary, 3 * MIB).await.unwrap();
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// A kill between the growth of the files and the record.
#[tokio::test]
async fn files_that_are_larger_than_the_record_knows_have_grown() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x77).await;
    guest.close();
    primary.stop().await;
    secondary.stop().await;
    for name in ["p.raw", "s.raw"] {
        let file = std::fs::File::options().write(true).open(scratch.path(name)).unwrap();
        file.set_len(3 * MIB).unwrap();
    }
    let (primary, secondary) = start(&scratch).await;
    let sent = primary.status().await["counters"]["replicated-bytes"].as_u64().unwrap();
    assert!(sent <= MIB + 128 * 1024, "only what was added is copied: {sent}");
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

#[tokio::test]
async fn a_disk_neither_shrinks_nor_grows_by_halves() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    for size in [MIB, 2 * MIB + 100, 0] {
        let error = resize(&primary, size).await.unwrap_err();
        assert!(error.contains("only grows"), "{size}: {error}");
    }
    let unknown = json!({ "device": "vdb", "size": 4 * MIB });
    let error = primary.command("block_resize", unknown).await.unwrap_err();
    assert!(error.to_string().contains("no disk"), "{error}");
    let error = resize(&secondary, 4 * MIB).await.unwrap_err();
    assert!(error.contains("primary"), "{error}");
    resize(&primary, 2 * MIB).await.unwrap();
    assert_eq!(file(&scratch.path("p.raw")).len() as u64, 2 * MIB);
    primary.stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn a_disk_whose_maps_do_not_grow_stays_as_it_was() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    let in_the_way = scratch.path("p.state/vda.maps.next");
    std::fs::create_dir_all(in_the_way.join("x")).unwrap();
    let error = resize(&primary, 4 * MIB).await.unwrap_err();
    assert!(error.contains("maps of disk vda"), "{error}");
    assert_eq!(primary.status().await["disks"][0]["size"], 2 * MIB);
    assert_eq!(file(&scratch.path("p.raw")).len() as u64, 2 * MIB);
    std::fs::remove_dir_all(in_the_way).unwrap();
    resize(&primary, 4 * MIB).await.unwrap();
    let in_sync = |s: &Value| has_size(4 * MIB)(s) && s["disks"][0]["state"] == "in-sync";
    primary.wait("in sync again", in_sync).await;
    secondary.wait("grown", has_size(4 * MIB)).await;
    primary.checkpoint().await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// The new size may not be had: the disk is still what it was, and so are its buffers.
#[tokio::test]
async fn a_disk_that_cannot_grow_is_replicated_and_promoted_as_it_is() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    primary.stop().await;
    let here = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    let set_size = |size| {
        let image = std::fs::File::options().write(true).open(scratch.path("p.raw")).unwrap();
        image.set_len(size).unwrap();
    };
    copy_dir(&here.state_dir, &scratch.path("before.state"));
    let there = faults::of(&scratch.path("s.raw"));
    there.upper.fail(Rule::new(Operation::Truncate).forever());
    set_size(4 * MIB);
    let primary = Side::run(here.clone());
    secondary.wait("refuses", |s| s["reason"].to_string().contains("cannot begin")).await;
    assert_eq!(secondary.status().await["disks"][0]["size"], 2 * MIB);
    primary.stop().await;

    set_size(2 * MIB);
    let state_dir = scratch.path("before.state");
    let primary = Side::run(SideConfig { state_dir, ..here });
    primary.wait_state("in-sync").await;
    primary.checkpoint().await;
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    let promoted = connect(scratch.endpoint("s.sock"), "vda").await;
    assert_eq!(promoted.size(), 2 * MIB);
    assert!(read(&*promoted, 0, 2 << 20).await == file(&scratch.path("p.raw")), "the checkpoint");
    fill(&*promoted, 2 * MIB - 4096, 4096, 0x11).await;
    promoted.close();
    secondary.wait_state("promoted").await;
    drop(there);
    secondary.stop().await;
}

/// I14: whoever tells such a size ends nobody's session.
#[tokio::test]
async fn i14_a_size_that_no_disk_has_is_refused_before_anything_grows() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    let epoch = primary.checkpoint().await;
    let limit = Duration::from_secs(10);
    for size in [u64::MAX, 1 << 63] {
        let version = Bytes::copy_from_slice(&LINK_VERSION.to_be_bytes());
        let endpoint = scratch.endpoint("s.sock");
        let link = connect_private(&endpoint, None, OPTION_LINK, version, limit).await.unwrap();
        let (mut reader, mut writer) = split(link.stream, &link.rest);
        let mut hello = stranger();
        hello.side.disks[0].size = size;
        writer.send(&Message::Hello(Box::new(hello)), limit).await.unwrap();
        let Message::HelloAnswer(answer) = reader.receive_within(limit).await.unwrap() else {
            panic!("no answer");
        };
        let start = Message::Start {
            set: answer.side.set.unwrap(),
            cur: answer.side.cur.unwrap(),
            epoch: Epoch(answer.side.epoch.0 + 1),
            copy: CopyMode::Full,
            sync: true,
            discard_checkpoint: false,
        };
        writer.send(&start, limit).await.unwrap();
        let answer = reader.receive_within(limit).await;
        assert!(!matches!(answer, Ok(Message::Started { .. })), "{answer:?}");
    }
    // Each session begins above all epochs that there were: it is still the same one.
    assert_eq!(primary.checkpoint().await, epoch + 1);
    primary.stop().await;
    secondary.stop().await;
}

fn stranger() -> Hello {
    let side = Introduction {
        name: "stranger".into(),
        run: Uuid::new_v4(),
        set: None,
        cur: Some(Generation::random()),
        fork: None,
        com: None,
        epoch: Epoch(0),
        session: None,
        history: Vec::new(),
        primary: true,
        made_room: false,
        disks: vec![DiskInfo { name: "vda".into(), size: MIB, growable: true, joining: None }],
        removed: Vec::new(),
        durability: crate::config::Durability::Process,
        maps: None,
    };
    Hello { version: LINK_VERSION, timeout_ms: 5000, side }
}

/// After a loss of power maps that name a size would be another disk's than one of the old size.
#[tokio::test]
async fn a_size_that_is_not_on_stable_storage_is_named_by_nobody() {
    let scratch = Scratch::new();
    pair_of_files(&scratch);
    let (primary, secondary) = start(&scratch).await;
    let here = faults::of(&scratch.path("p.raw"));
    here.upper.fail(Rule::new(Operation::Flush));
    resize(&primary, 4 * MIB).await.unwrap_err();
    assert_eq!(primary.status().await["disks"][0]["size"], 2 * MIB);
    drop(here);
    primary.stop().await;
    secondary.stop().await;
}
