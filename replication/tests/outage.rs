//! What happens when a side goes away and comes back.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use brep_block::BlockDevice;
use brep_replication::config::Ack;
use common::{MIB, Scratch, Side, connect, file, fill, read};
use serde_json::json;

#[tokio::test]
async fn a_secondary_restarted_on_its_buffers_keeps_its_checkpoint() {
    let scratch = Scratch::new();
    let primary_file = scratch.raw("p.raw", 2 * MIB, 1);
    let secondary_file = scratch.raw("s.raw", 2 * MIB, 2);
    let disks = || vec![scratch.disk("vda", "s.raw")];
    let secondary = Side::run(scratch.secondary(disks()));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 8192, 0x55).await;
    let epoch = primary.checkpoint().await;
    let checkpoint = file(&primary_file);
    fill(&*guest, 4096, 65536, 0x66).await;
    secondary.stop().await;
    let latest = file(&secondary_file);
    assert_ne!(latest, checkpoint);

    // Started again and again, it changes nothing and names its checkpoint.
    for _ in 0..2 {
        let secondary = Side::run(scratch.secondary(disks()));
        let status = secondary.wait("up", |s| s["promotable"] == true).await;
        assert_eq!(status["checkpoint"], epoch);
        assert_eq!(file(&secondary_file), latest);
        secondary.stop().await;
    }

    guest.close();
    primary.stop().await;
    let secondary = Side::run(scratch.secondary(disks()));
    secondary.wait("up", |s| s["promotable"] == true).await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&secondary_file), checkpoint);
    secondary.stop().await;
}

#[tokio::test]
async fn in_async_mode_latest_is_refused_and_a_checkpoint_holds_every_write_before_it() {
    let scratch = Scratch::new();
    let primary_file = scratch.raw("p.raw", 2 * MIB, 1);
    let secondary_file = scratch.raw("s.raw", 2 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.ack = Ack::Async;
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    for i in 0..200 {
        fill(&*guest, i * 4096, 4096, i as u8).await;
    }
    primary.checkpoint().await;
    assert_eq!(file(&primary_file), file(&secondary_file));
    let error = secondary.command("failover", json!({ "to": "latest" })).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn failover_to_latest_keeps_every_acknowledged_write() {
    let scratch = Scratch::new();
    let primary_file = scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 40960, 0x21).await;
    guest.close();
    primary.stop().await;
    let latest = file(&primary_file);
    secondary.command("failover", json!({ "to": "latest" })).await.unwrap();
    // Again with the same target: done already. With the other: refused.
    let again = secondary.command("failover", json!({ "to": "latest" })).await.unwrap();
    assert_eq!(again["repeated"], true);
    let error = secondary.command("failover", json!({ "to": "checkpoint" })).await.unwrap_err();
    assert_eq!(error.exit_code(), 3);
    let promoted = connect(scratch.endpoint("s.sock"), "vda").await;
    assert_eq!(read(&*promoted, 0, 2 << 20).await, latest);
    promoted.close();
    secondary.stop().await;
}

#[tokio::test]
async fn the_old_primary_of_a_promoted_secondary_does_not_serve_its_guest() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let config = || scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    let primary = Side::run(config());
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    let primary = Side::run(config());
    let status = primary.wait("refused", |s| s["link"] == "refused").await;
    assert!(status["reason"].as_str().unwrap().contains("promoted"), "{status}");
    let attempt = tokio::time::timeout(
        Duration::from_millis(300),
        connect(scratch.endpoint("p-guest.sock"), "vda"),
    );
    assert!(attempt.await.is_err(), "the guest of the old primary was served");
    primary.stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn a_foreign_client_cannot_open_the_replica() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let options = brep_nbd::client::ConnectOptions::new(scratch.endpoint("s.sock"), "vda");
    let error = brep_nbd::client::Connection::connect(&options).await.unwrap_err();
    assert!(error.to_string().contains("replica"), "{error}");
    primary.stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn the_secondarys_guest_sees_the_checkpoint_and_its_own_writes() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    let secondary_file = scratch.raw("s.raw", 2 * MIB, 2);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.guest_listen = Some(scratch.endpoint("s-guest.sock"));
    let secondary = Side::run(config);
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let other = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;

    fill(&*guest, 0, 32768, 0x22).await;
    fill(&*other, 1000, 5000, 0x33).await;
    let mut expected = vec![0x11; 65536];
    expected[1000..6000].fill(0x33);
    assert_eq!(read(&*other, 0, 65536).await, expected);

    primary.checkpoint().await;
    let mut newer = vec![0x22; 32768];
    newer.resize(65536, 0x11);
    assert_eq!(read(&*other, 0, 65536).await, newer, "a commit drops the guest's own writes");

    fill(&*guest, 0, 4096, 0x44).await;
    fill(&*other, 32768, 512, 0x55).await;
    newer[32768..33280].fill(0x55);
    guest.close();
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    assert_eq!(read(&*other, 0, 65536).await, newer, "own writes stay after a failover");
    secondary.wait_state("promoted").await;
    assert_eq!(&file(&secondary_file)[..65536], newer);
    other.close();
    secondary.stop().await;
}

#[tokio::test]
async fn two_disks_of_any_size_are_cut_together() {
    let scratch = Scratch::new();
    let odd = MIB + 300;
    for side in ["p", "s"] {
        scratch.raw(&format!("{side}a.raw"), MIB, 1);
        scratch.raw(&format!("{side}b.raw"), odd, 2);
    }
    let disks = |side: &str| {
        vec![
            scratch.disk("vda", &format!("{side}a.raw")),
            scratch.disk("vdb", &format!("{side}b.raw")),
        ]
    };
    let secondary = Side::run(scratch.secondary(disks("s")));
    let primary = Side::run(scratch.primary(disks("p")));
    primary.wait("in sync", |s| s["disks"][1]["state"] == "in-sync").await;
    let a = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let b = connect(scratch.endpoint("p-guest.sock"), "vdb").await;
    fill(&*a, 0, 512, 0x61).await;
    fill(&*b, odd - 300, 300, 0x62).await;
    primary.checkpoint().await;
    let checkpoint = (file(&scratch.path("pa.raw")), file(&scratch.path("pb.raw")));
    fill(&*a, 0, 512, 0x71).await;
    fill(&*b, odd - 200, 200, 0x72).await;
    let sent = b.discard(0, 65536).await;
    sent.unwrap();
    assert_eq!(file(&scratch.path("pb.raw")), file(&scratch.path("sb.raw")), "TRIM on both");
    a.close();
    b.close();
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&scratch.path("sa.raw")), checkpoint.0);
    assert_eq!(file(&scratch.path("sb.raw")), checkpoint.1);
    secondary.stop().await;
}

#[tokio::test]
async fn a_seeded_secondary_is_compared_not_copied() {
    let scratch = Scratch::new();
    let primary_file = scratch.raw("p.raw", 2 * MIB, 1);
    let mut content = file(&primary_file);
    content[70_000] ^= 0xff;
    let secondary_file = scratch.path("s.raw");
    std::fs::write(&secondary_file, content).unwrap();
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.seeded = brep_replication::config::Seeded::Compare;
    let primary = Side::run(config);
    let status = primary.wait_state("in-sync").await;
    assert_eq!(file(&primary_file), file(&secondary_file));
    let copied = status["counters"]["replicated-bytes"].as_u64().unwrap();
    assert!(copied > 0 && copied <= MIB, "only what differs is sent: {copied}");
    primary.stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn sides_with_different_timeouts_do_not_lose_each_other_when_idle() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    // The secondary alone would send a heartbeat every 15 s.
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.peer_timeout = Duration::from_secs(60);
    let secondary = Side::run(config);
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer_timeout = Duration::from_millis(1000);
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let status = primary.status().await;
    assert_eq!(status["link"], "connected", "{status}");
    assert_eq!(status["epoch"], 2, "one session, one checkpoint: {status}");
    primary.stop().await;
    secondary.stop().await;
}
