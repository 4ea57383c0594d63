//! A side whose peer is no brep: a plain NBD client as the primary, a stock NBD server as the
//! secondary.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, Fault, Memory, Operation, Rule, WriteFlags};
use brep_nbd::client::Connection;
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_replication::config::{PeerKind, Seeded, SideConfig};
use bytes::Bytes;
use common::{MIB, Scratch, Side, connect, file, fill, read};
use serde_json::{Value, json};

const SIZE: u64 = 2 * MIB;

fn plain_secondary(scratch: &Scratch) -> SideConfig {
    let config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    SideConfig { plain_primary: true, peer_timeout: Duration::from_secs(2), ..config }
}

fn plain_primary(scratch: &Scratch) -> SideConfig {
    let config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    SideConfig { peer_kind: PeerKind::Plain, peer_timeout: Duration::from_secs(2), ..config }
}

/// The replica as a plain primary opens it.
async fn open(scratch: &Scratch) -> Arc<Connection> {
    connect(scratch.endpoint("s.sock"), "vda").await
}

async fn refused(side: &Side, command: &str) -> String {
    let error = side.command(command, json!({})).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    error.to_string()
}

fn reason(status: &Value) -> &str {
    status["reason"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_plain_primarys_last_checkpoint_is_what_a_failover_gives() {
    let scratch = Scratch::new();
    let replica = scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    let status = secondary.wait("started", |s| s["replication"] == "running").await;
    assert_eq!(status["promotable"], true, "the disk at the start is the first checkpoint");
    assert!(!status["lapsed"].as_array().unwrap().is_empty(), "{status}");

    let primary = open(&scratch).await;
    fill(&*primary, 4096, 65536, 0x55).await;
    secondary.checkpoint().await;
    let checkpoint = file(&replica);
    fill(&*primary, 0, 8192, 0x66).await;
    primary.write_zeroes(MIB, 65536, Default::default()).await.unwrap();
    assert_ne!(file(&replica), checkpoint);

    primary.kill();
    secondary.command("failover", json!({})).await.unwrap();
    let status = secondary.wait_state("promoted").await;
    assert_eq!(status["lapsed"], json!([]), "there is no peer any more");
    assert_eq!(file(&replica), checkpoint);
    assert!(refused(&secondary, "replication-start").await.contains("Cannot restart"));
    secondary.stop().await;
}

#[tokio::test]
async fn a_plain_primary_that_comes_back_gets_no_checkpoint_over_the_gap() {
    let scratch = Scratch::new();
    let replica = scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    let first = open(&scratch).await;
    fill(&*first, 0, 4096, 0x55).await;
    let epoch = secondary.checkpoint().await;
    let checkpoint = file(&replica);
    first.kill();
    let status = secondary.wait("lost", |s| reason(s).contains("may be missing")).await;
    assert_eq!(status["link"], "disconnected");

    let second = open(&scratch).await;
    fill(&*second, 8192, 4096, 0x66).await;
    assert!(refused(&secondary, "checkpoint").await.contains("may be missing"));
    assert_eq!(secondary.status().await["checkpoint"], epoch, "the old one is kept");

    // The operator says that both disks are equal again.
    secondary.command("replication-start", json!({})).await.unwrap();
    fill(&*second, 0, 4096, 0x77).await;
    let epoch = secondary.checkpoint().await;
    let status = secondary.status().await;
    assert_eq!((status["checkpoint"].as_u64(), status["reason"].is_null()), (Some(epoch), true));
    assert_ne!(file(&replica), checkpoint);
    secondary.stop().await;
}

#[tokio::test]
async fn a_gap_that_no_write_shows_is_noticed() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    // It never wrote; what it may have tried to write is lost with the connection.
    open(&scratch).await.kill();
    secondary.wait("lost", |s| reason(s).contains("may be missing")).await;
    secondary.command("replication-start", json!({})).await.unwrap();
    // Whoever only looks, and says goodbye, is no primary.
    let reader = open(&scratch).await;
    read(&*reader, 0, 4096).await;
    reader.close();
    secondary.wait("gone", |s| s["link"] == "disconnected").await;
    secondary.checkpoint().await;
    secondary.stop().await;
}

#[tokio::test]
async fn a_second_plain_primary_ends_the_first_and_the_claim() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    let first = open(&scratch).await;
    fill(&*first, 0, 4096, 0x55).await;
    let second = open(&scratch).await;
    assert_eq!(read(&*second, 0, 4096).await, vec![0x55; 4096], "reading disturbs nobody");
    secondary.checkpoint().await;
    fill(&*second, 4096, 4096, 0x66).await;
    let late = first.write(0, Bytes::from(vec![1; 4096]), WriteFlags::default()).await;
    assert!(late.is_err(), "one writer at a time");
    assert_eq!(read(&*second, 0, 4096).await, vec![0x55; 4096], "no late write");
    assert!(refused(&secondary, "checkpoint").await.contains("may be missing"));
    secondary.stop().await;
}

#[tokio::test]
async fn before_the_start_command_what_comes_is_a_copy() {
    let scratch = Scratch::new();
    let replica = scratch.raw("s.raw", SIZE, 1);
    let config = SideConfig { start: false, ..plain_secondary(&scratch) };
    let secondary = Side::run(config);
    let status = secondary.wait("up", |s| s["replication"] == "none").await;
    assert_eq!(
        (&status["promotable"], reason(&status), &status["advice"]),
        (
            &json!(false),
            "replication has not been started",
            &json!("make both disks equal, then brep start")
        )
    );
    let mirror = open(&scratch).await;
    fill(&*mirror, 0, SIZE as usize, 0x11).await;
    assert!(refused(&secondary, "checkpoint").await.contains("not running"));
    let status = secondary.status().await;
    assert_eq!(status["counters"]["preimage-bytes"], 0, "there is nothing to keep");

    secondary.command("replication-start", json!({})).await.unwrap();
    assert!(refused(&secondary, "replication-start").await.contains("running"));
    mirror.kill();
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&replica), vec![0x11; SIZE as usize]);
    secondary.stop().await;
}

#[tokio::test]
async fn a_restarted_plain_secondary_keeps_its_checkpoint_through_a_new_copy() {
    let scratch = Scratch::new();
    let replica = scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    let primary = open(&scratch).await;
    fill(&*primary, 0, 65536, 0x55).await;
    let epoch = secondary.checkpoint().await;
    let checkpoint = file(&replica);
    fill(&*primary, 4096, 65536, 0x66).await;
    secondary.stop().await;

    let secondary = Side::run(plain_secondary(&scratch));
    let status = secondary.wait("up", |s| s["promotable"] == true).await;
    assert_eq!((&status["replication"], &status["checkpoint"]), (&json!("none"), &json!(epoch)));
    let mirror = open(&scratch).await;
    fill(&*mirror, 0, SIZE as usize, 0x22).await;
    mirror.kill();
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&replica), checkpoint);
    secondary.stop().await;
}

#[tokio::test]
async fn a_brep_primary_is_told_that_the_secondary_waits_for_a_plain_one() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", SIZE, 1);
    scratch.raw("s.raw", SIZE, 2);
    let secondary = Side::run(plain_secondary(&scratch));
    secondary.wait("up", |_| true).await;
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait("told", |s| reason(s).contains("--plain-primary")).await;
    primary.stop().await;
    secondary.stop().await;
}

/// A stock NBD server, with faults to be injected.
async fn stock_server(scratch: &Scratch) -> (Arc<Server>, Arc<Fault>) {
    let fault = Fault::new(Memory::new("stock", SIZE));
    let exports = StaticExports::new();
    assert!(exports.add(Export::new("vda", Arc::clone(&fault) as _)));
    let server = Server::new(Arc::new(exports), ServerConfig::default());
    let listener = Server::bind(&scratch.endpoint("s.sock")).await.unwrap();
    tokio::spawn({
        let server = Arc::clone(&server);
        async move { server.serve(listener).await }
    });
    (server, fault)
}

#[tokio::test]
async fn a_stock_server_gets_a_full_copy_and_every_write() {
    let scratch = Scratch::new();
    let mine = scratch.raw("p.raw", SIZE, 1);
    let (_server, stock) = stock_server(&scratch).await;
    let primary = Side::run(plain_primary(&scratch));
    let status = primary.wait_state("in-sync").await;
    assert!(!status["lapsed"].as_array().unwrap().is_empty(), "{status}");
    assert_eq!(read(&*stock, 0, SIZE as usize).await, file(&mine));

    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 12288, 8192, 0x55).await;
    guest.discard(MIB, 65536).await.unwrap();
    let before = primary.status().await["checkpoint"].as_u64();
    assert!(Some(primary.checkpoint().await) > before);
    assert_eq!(read(&*stock, 0, SIZE as usize).await, file(&mine));
    primary.stop().await;
}

#[tokio::test]
async fn a_seeded_stock_server_is_read_and_only_what_differs_is_written() {
    let scratch = Scratch::new();
    let mine = scratch.raw("p.raw", SIZE, 1);
    let (_server, stock) = stock_server(&scratch).await;
    stock.write(0, Bytes::from(file(&mine)), WriteFlags::default()).await.unwrap();
    fill(&*stock, MIB, 4096, 0xee).await;
    // The one write that has to come; any other would fail.
    stock.fail(Rule::new(Operation::Write).range(0..MIB));
    let primary = Side::run(SideConfig { seeded: Seeded::Compare, ..plain_primary(&scratch) });
    let status = primary.wait_state("in-sync").await;
    assert!(status["errors"].as_array().unwrap().is_empty(), "{status}");
    assert_eq!(read(&*stock, 0, SIZE as usize).await, file(&mine));
    primary.stop().await;
}

#[tokio::test]
async fn a_stock_server_that_was_away_is_copied_only_on_command() {
    let scratch = Scratch::new();
    let mine = scratch.raw("p.raw", SIZE, 1);
    let (server, _stock) = stock_server(&scratch).await;
    let primary = Side::run(plain_primary(&scratch));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    server.shutdown(Duration::from_secs(5)).await;
    primary.wait_state("disconnected").await;
    fill(&*guest, 0, 4096, 0x55).await;
    let (_server, stock) = stock_server(&scratch).await;
    let status = primary.wait("refused", |s| s["link"] == "refused").await;
    let advice = status["advice"].as_str().unwrap();
    assert!(advice.starts_with("brep resync --full; but if"), "{advice}");
    refused(&primary, "checkpoint").await;
    primary.command("resync", json!({ "full": true })).await.unwrap();
    primary.wait_state("in-sync").await;
    assert_eq!(read(&*stock, 0, SIZE as usize).await, file(&mine));
    primary.stop().await;
}

#[tokio::test]
async fn a_stock_server_that_hangs_is_lost_although_the_guest_is_idle() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", SIZE, 1);
    let (_server, stock) = stock_server(&scratch).await;
    let primary = Side::run(plain_primary(&scratch));
    primary.wait_state("in-sync").await;
    let hang = stock.hang(Rule::new(Operation::Read).forever());
    primary.wait_state("disconnected").await;
    hang.release();
    primary.stop().await;
}

#[tokio::test]
async fn a_primary_starts_on_command_and_serves_its_guest_before() {
    let scratch = Scratch::new();
    let mine = scratch.raw("p.raw", SIZE, 1);
    let theirs = scratch.raw("s.raw", SIZE, 2);
    let secondary = Side::run(SideConfig {
        start: false,
        ..scratch.secondary(vec![scratch.disk("vda", "s.raw")])
    });
    let primary = Side::run(SideConfig {
        start: false,
        ..scratch.primary(vec![scratch.disk("vda", "p.raw")])
    });
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x55).await;
    let status = primary.status().await;
    assert_eq!((&status["replication"], &status["advice"]), (&json!("none"), &json!("brep start")));
    assert!(refused(&primary, "checkpoint").await.contains("not been started"));

    primary.command("replication-start", json!({})).await.unwrap();
    let status = primary.wait("refused", |s| s["link"] == "refused").await;
    assert!(reason(&status).contains("not been started on the secondary"), "{status}");
    secondary.command("replication-start", json!({})).await.unwrap();
    primary.wait_state("in-sync").await;
    assert!(refused(&primary, "replication-start").await.contains("running"));
    assert!(refused(&secondary, "replication-start").await.contains("running"));
    guest.close();
    primary.stop().await;
    secondary.stop().await;
    assert_eq!(file(&mine), file(&theirs));

    // Both know each other now: each says that it waits, and for what.
    let secondary = Side::run(SideConfig {
        start: false,
        ..scratch.secondary(vec![scratch.disk("vda", "s.raw")])
    });
    let primary = Side::run(SideConfig {
        start: false,
        ..scratch.primary(vec![scratch.disk("vda", "p.raw")])
    });
    for side in [&primary, &secondary] {
        let status = side.wait("up", |s| s["replication"] == "none").await;
        assert!(status["advice"].as_str().unwrap().starts_with("brep start"), "{status}");
    }
    assert!(reason(&secondary.status().await).contains("not been started; holds checkpoint"));
    primary.stop().await;
    secondary.stop().await;
}

/// I11: no map of the old primary knows what somebody else wrote.
#[tokio::test]
async fn i11_a_brep_primary_does_not_take_a_disk_back_that_a_plain_one_has_written_to() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", SIZE, 1);
    scratch.raw("s.raw", SIZE, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;

    let secondary = Side::run(plain_secondary(&scratch));
    let other = open(&scratch).await;
    fill(&*other, 4096, 65536, 0x55).await;
    other.close();
    secondary.stop().await;

    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    let met = |s: &Value| s["link"] == "refused" || s["disks"][0]["state"] == "in-sync";
    let status = primary.wait("an answer", met).await;
    assert!(reason(&status).contains("served another primary"), "{status:#}");
    primary.stop().await;
    secondary.stop().await;
}

/// I4: a client that was idle across a stop and a start of replication writes under the
/// protection of the checkpoint that the start made.
#[tokio::test]
async fn i04_an_idle_plain_primary_writes_to_the_replication_that_runs_now() {
    let scratch = Scratch::new();
    let replica = scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    let primary = open(&scratch).await;
    let switch = |enable: bool| {
        let arguments = json!({ "enable": enable, "primary": false });
        secondary.command("xen-set-replication", arguments)
    };
    switch(false).await.unwrap();
    switch(true).await.unwrap();
    let checkpoint = file(&replica);
    fill(&*primary, 4096, 65536, 0x55).await;
    assert_ne!(file(&replica), checkpoint);
    primary.kill();
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert!(file(&replica) == checkpoint, "what the primary overwrote was not kept");
    secondary.stop().await;
}

#[tokio::test]
async fn a_plain_primary_may_come_after_the_nbd_server_was_started_again() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", SIZE, 1);
    let secondary = Side::run(plain_secondary(&scratch));
    secondary.wait("started", |s| s["replication"] == "running").await;
    secondary.command("nbd-server-stop", json!({})).await.unwrap();
    let addr = json!({ "type": "unix", "data": { "path": scratch.path("s.sock") } });
    secondary.command("nbd-server-start", json!({ "addr": addr })).await.unwrap();
    let export = json!({ "device": "vda", "writable": true });
    secondary.command("nbd-server-add", export).await.unwrap();
    let primary = open(&scratch).await;
    fill(&*primary, 0, 4096, 0x55).await;
    secondary.checkpoint().await;
    secondary.command("nbd-server-stop", json!({})).await.unwrap();
    assert!(refused(&secondary, "checkpoint").await.contains("may be missing"));
    secondary.stop().await;
}
