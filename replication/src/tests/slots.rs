use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, Operation, Rule};
use brep_nbd::Stream;
use brep_nbd::client::{ConnectOptions, Connection, connect_private};
use bytes::Bytes;
use serde_json::json;
use uuid::Uuid;

use super::common::{MIB, Scratch, Side, file, fill};
use super::{Pair, write};
use crate::image::faults;
use crate::link::{
    CopyMode, DiskInfo, Hello, LINK_VERSION, LinkReader, LinkWriter, Message, OPTION_BIND,
    OPTION_LINK, Side as Identity, StopReason, split,
};
use crate::{Epoch, Generation, SetId};

const LIMIT: Duration = Duration::from_secs(10);

/// A primary of which only the protocol is there.
fn identity() -> Identity {
    Identity {
        name: "p".into(),
        run: Uuid::new_v4(),
        set: Some(SetId::random()),
        cur: Some(Generation::random()),
        fork: None,
        com: None,
        epoch: Epoch(0),
        history: Vec::new(),
        primary: true,
        made_room: false,
        session: None,
        durability: crate::config::Durability::Power,
        disks: vec![DiskInfo { name: "vda".into(), size: MIB, growable: false, joining: None }],
        removed: vec![],
        maps: None,
    }
}

fn bound(scratch: &Scratch, token: Uuid, slot: u32) -> ConnectOptions {
    let data: Vec<u8> = [token.as_bytes().as_slice(), &slot.to_be_bytes()].concat();
    ConnectOptions {
        private_options: vec![(OPTION_BIND, data.into())],
        ..ConnectOptions::new(scratch.endpoint("s.sock"), "vda")
    }
}

/// Comes as a primary, up to the answer to its hello.
async fn hello(scratch: &Scratch) -> (LinkReader<Stream>, LinkWriter<Stream>, SetId, Generation) {
    let version = Bytes::copy_from_slice(&LINK_VERSION.to_be_bytes());
    let endpoint = scratch.endpoint("s.sock");
    let link = connect_private(&endpoint, None, OPTION_LINK, version, LIMIT).await.unwrap();
    let (mut reader, mut writer) = split(link.stream, &link.rest);
    let me = identity();
    let (set, cur) = (me.set.unwrap(), me.cur.unwrap());
    let hello = Hello { version: LINK_VERSION, timeout_ms: 60_000, side: me };
    writer.send(&Message::Hello(Box::new(hello)), LIMIT).await.unwrap();
    assert!(matches!(reader.receive_within(LIMIT).await.unwrap(), Message::HelloAnswer(_)));
    (reader, writer, set, cur)
}

/// The same, up to the token.
async fn session(scratch: &Scratch) -> (LinkReader<Stream>, LinkWriter<Stream>, Uuid) {
    let (mut reader, mut writer, set, cur) = hello(scratch).await;
    let start = Message::Start {
        set,
        cur,
        epoch: Epoch(1),
        copy: CopyMode::Full,
        sync: true,
        discard_checkpoint: false,
    };
    writer.send(&start, LIMIT).await.unwrap();
    let Message::Started { token } = reader.receive_within(LIMIT).await.unwrap() else {
        panic!("no token")
    };
    (reader, writer, token)
}

/// Reads up to the message that fits.
async fn until(reader: &mut LinkReader<Stream>, fits: impl Fn(&Message) -> bool) {
    while !fits(&reader.receive_within(LIMIT).await.expect("the link has ended")) {}
}

/// The primary holds its guest for it, and does not know otherwise that it is none any more.
#[tokio::test]
async fn i11_the_word_that_a_secondary_is_promoted_comes_over_a_link_that_is_slow() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", MIB, 2);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.peer_timeout = Duration::from_secs(20);
    let secondary = Side::run(config);
    secondary.wait("up", |s| s["role"] == "secondary").await;
    let (mut reader, mut writer, _) = session(&scratch).await;
    writer.send(&Message::Cut { epoch: Epoch(1), without: Vec::new() }, LIMIT).await.unwrap();
    until(&mut reader, |m| matches!(m, Message::Committed { .. })).await;
    // More than the link takes at a time.
    for _ in 0..16 {
        let hashes = Message::HashRequest { disk: 0, offset: 0, length: MIB, chunk: 512 };
        writer.send(&hashes, LIMIT).await.unwrap();
    }
    writer.send(&Message::Holding, LIMIT).await.unwrap();
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait("promoted", |s| s["role"] == "promoted").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    until(&mut reader, |m| matches!(m, Message::Stop { reason: StopReason::Promoted })).await;
    secondary.stop().await;
}

/// A primary that is not that of the session only says something of itself.
#[tokio::test]
async fn a_primary_that_declines_a_secondary_changes_nothing_of_the_session_of_another() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    let before = secondary.status().await;
    let (mut reader, mut writer, ..) = hello(&scratch).await;
    writer.send(&Message::refusal("of other disks".to_owned(), None), LIMIT).await.unwrap();
    // It has been heard when the link has ended.
    while reader.receive_within(LIMIT).await.is_ok() {}
    let after = secondary.status().await;
    for what in ["link", "peer", "reason"] {
        assert_eq!(after[what], before[what], "{after:#}");
    }
    assert_eq!(after["disks"][0]["state"], "in-sync");
    primary.checkpoint().await;
    primary.stop().await;
    secondary.stop().await;
}

/// I17: while a primary and a secondary come to terms nothing else begins, not even a failover.
#[tokio::test]
async fn i17_a_primary_that_only_asks_is_not_listened_to_for_ever() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", MIB, 2);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.peer_timeout = Duration::from_millis(200);
    let secondary = Side::run(config);
    secondary.wait("up", |s| s["role"] == "secondary").await;
    let (mut reader, mut writer, ..) = hello(&scratch).await;
    let asking = async {
        let ask = Message::RangesRequest { disk: 0, offset: 0 };
        while writer.send(&ask, LIMIT).await.is_ok() && reader.receive_within(LIMIT).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, asking).await.expect("it is listened to still");
    secondary.stop().await;
}

/// I15: binding a slot closes its old holder and waits for what that one has started; else a late
/// write of a dead connection would come after the writes of its successor.
#[tokio::test]
async fn i15_a_slot_changes_hands_only_when_its_old_holder_has_nothing_in_flight() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    secondary.wait("up", |s| s["role"] == "secondary").await;

    let (_reader, _writer, token) = session(&scratch).await;
    let old = Connection::connect(&bound(&scratch, token, 0)).await.unwrap();
    let hang = faults::of(&scratch.path("s.raw")).upper.hang(Rule::new(Operation::Write));
    let late = write(&old, 8192, 0x66);
    hang.reached(1).await;
    // Another slot is another connection's affair.
    let other = Connection::connect(&bound(&scratch, token, 1)).await.unwrap();
    let options = bound(&scratch, token, 0);
    let mut binding = Box::pin(Connection::connect(&options));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut binding).await;
    assert!(early.is_err(), "the slot was given away while a write of its holder goes on");
    hang.release();
    let new: Arc<Connection> = binding.await.unwrap();
    fill(&*new, 8192, 4096, 0x77).await;
    // Whether the late write was still answered is open; that it comes first is not.
    let _ = late.await.unwrap();
    assert!(old.start_read(0, 512).await.is_err(), "the old holder is closed");
    assert_eq!(other.read(8192, 4096).await.unwrap(), vec![0x77; 4096]);
    assert_eq!(&file(&scratch.path("s.raw"))[8192..12288], [0x77; 4096]);
    secondary.stop().await;
}
