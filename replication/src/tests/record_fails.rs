//! State records that cannot be saved.
use std::time::Duration;

use brep_block::{Operation, Rule};
use futures_util::FutureExt;
use serde_json::json;

use super::common::{MIB, Scratch, Side, connect};
use super::write;
use crate::config::{Durability, SideConfig};
use crate::control::EventBus;
use crate::image::faults;
use crate::state::faults::{Faulty, Kind};
use crate::state::{Record, RecordStore, Role, SharedRecord};
use crate::{Epoch, Generation};

fn scratch() -> Scratch {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    scratch
}

fn secondary(scratch: &Scratch) -> Side {
    Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]))
}

/// One that could become a secondary.
fn primary(scratch: &Scratch) -> SideConfig {
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.listen = Some(scratch.endpoint("p.sock"));
    config
}

async fn introduce(scratch: &Scratch, secondary: &Side) {
    let uri = format!("nbd+unix:///?socket={}", scratch.path("p.sock").display());
    secondary.command("peer-set", json!({ "uri": uri })).await.unwrap();
}

/// Whatever comes next, the advice is to start this side again: nothing else helps.
#[tokio::test]
async fn after_a_save_that_failed_status_says_so_and_what_to_do() {
    let scratch = scratch();
    let there = secondary(&scratch);
    let here = Side::run(primary(&scratch));
    here.wait_state("in-sync").await;
    there.stop().await;
    here.wait_state("disconnected").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let faulty = Faulty::failing(&scratch.path("p.state"), Kind::Write);
    let other = json!({ "uri": "nbd://127.0.0.1:1" });
    let error = here.command("peer-set", other.clone()).await.unwrap_err().to_string();
    assert!(error.contains("cannot write the state record"), "{error}");
    drop(faulty);
    let error = here.command("peer-set", other).await.unwrap_err().to_string();
    assert!(error.contains("restart this side"), "{error}");
    // It is alone, which is recorded: its guest goes on, and a secondary does not help.
    let there = secondary(&scratch);
    tokio::time::sleep(Duration::from_secs(1)).await;
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    let status = here.status().await;
    assert!(status["reason"].as_str().unwrap().contains("state record"), "{status:#}");
    assert!(status["advice"].as_str().unwrap().contains("restart this side"), "{status:#}");
    let error = here.command("query-xen-replication-status", json!({})).await.unwrap();
    assert!(error["desc"].as_str().unwrap().contains("state record"), "{error:#}");
    guest.close();
    drop(here.ended_by_stop().await);
    let here = Side::run(primary(&scratch));
    here.wait_state("in-sync").await;
    here.stop().await;
    there.stop().await;
}

/// I11: a start that knew only that this side was alone would serve its guest beside a secondary that has
/// been promoted. Whatever the durability, that it has a peer again is on stable storage before anything is sent.
#[tokio::test]
async fn i11_no_session_begins_that_a_power_loss_would_make_forgotten() {
    let scratch = scratch();
    let there = secondary(&scratch);
    let here = Side::run(SideConfig { durability: Durability::Process, ..primary(&scratch) });
    here.wait_state("in-sync").await;
    there.stop().await;
    here.wait_state("disconnected").await;
    let faulty = Faulty::failing(&scratch.path("p.state"), Kind::Sync);
    let there = secondary(&scratch);
    let told = |s: &serde_json::Value| s["advice"].to_string().contains("restart this side");
    let status = here.wait("it cannot be recorded", told).await;
    assert_ne!(status["disks"][0]["state"], "in-sync", "{status:#}");
    drop(faulty);
    drop(here.ended_by_stop().await);
    there.stop().await;
}

/// A restart finds a secondary, which knows of no writes of its own: they would be lost.
#[tokio::test]
async fn i16_a_switchover_whose_record_cannot_be_flushed_acknowledges_nothing_any_more() {
    for kind in [Kind::Write, Kind::Sync] {
        let scratch = scratch();
        let there = secondary(&scratch);
        let config = SideConfig { durability: Durability::Process, ..primary(&scratch) };
        let here = Side::run(config);
        here.wait_state("in-sync").await;
        introduce(&scratch, &there).await;
        let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
        write(&guest, 0, 0x11).await.unwrap().unwrap();
        // The checkpoint of the switchover is saved; that it is stuck tells when to break it.
        let disk = faults::of(&scratch.path("s.raw"));
        let hang = disk.upper.hang(Rule::new(Operation::Flush));
        let (switched, faulty) =
            tokio::join!(here.command("switchover", json!({ "timeout-ms": 10_000 })), async {
                hang.reached(1).await;
                let faulty = Faulty::failing(&scratch.path("p.state"), kind);
                hang.release();
                faulty
            });
        switched.unwrap_err();
        drop(faulty);
        write(&guest, 8192, 0x22).await.unwrap().expect_err("acknowledged, and lost at a restart");
        guest.close();
        drop(here.ended_by_stop().await);
        there.stop().await;
    }
}

/// The kernel tells of a failed flush once: to whoever has given up waiting.
#[tokio::test]
async fn a_flush_of_the_record_that_nobody_waits_for_is_known_to_have_failed() {
    let directory = tempfile::tempdir().unwrap();
    let blank = || Record::blank("p", Role::Primary);
    let store = RecordStore::open(directory.path(), blank).unwrap();
    let record = SharedRecord::new(store, &EventBus::new());
    let faulty = Faulty::failing(directory.path(), Kind::Sync);
    assert!(record.sync().now_or_never().is_none(), "it is made beside this thread");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while record.failure().is_none() {
        assert!(tokio::time::Instant::now() < deadline, "nobody knows");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(faulty);
    let line = |record: &mut Record| record.begin_line(Generation::random(), Epoch(1));
    record.update(line).unwrap_err();
    record.check().unwrap_err();
}

/// A restart may find the secondary that there was, which knows of no write since.
#[tokio::test]
async fn i16_a_rollback_whose_record_cannot_be_flushed_acknowledges_nothing_any_more() {
    let scratch = scratch();
    let there = secondary(&scratch);
    let here = Side::run(primary(&scratch));
    here.wait_state("in-sync").await;
    here.stop().await;
    there.command("failover", json!({ "hold": true })).await.unwrap();
    let guest = connect(scratch.endpoint("s.sock"), "vda").await;
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    let faulty = Faulty::failing(&scratch.path("s.state"), Kind::Sync);
    let rollback = json!({ "discard-local": true });
    let error = there.command("failover-rollback", rollback).await.unwrap_err().to_string();
    assert!(error.contains("not known whether the failover is undone"), "{error}");
    drop(faulty);
    write(&guest, 4096, 0x22).await.unwrap().unwrap_err();
    guest.close();
    let _ = there.ended_by_stop().await;
}

/// It would be acknowledged as one that both sides are in contact for, and `failover --to latest`
/// would be done without it.
#[tokio::test]
async fn a_failed_write_that_the_secondary_cannot_note_is_none_that_the_primary_hears_of() {
    let scratch = scratch();
    let there = secondary(&scratch);
    let here = Side::run(primary(&scratch));
    here.wait_state("in-sync").await;
    let line = here.status().await["cur"].clone();
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let faulty = Faulty::failing(&scratch.path("s.state"), Kind::Write);
    let disk = faults::of(&scratch.path("s.raw"));
    disk.upper.fail(Rule::new(Operation::Write).forever());
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    let status = here.status().await;
    assert_ne!(status["cur"], line, "it was acknowledged as a write of both: {status:#}");
    let errors = status["errors"].to_string();
    assert!(!errors.contains("\"errno\":5"), "the primary was told: {errors}");
    guest.close();
    drop((faulty, disk));
    here.stop().await;
    drop(there.ended_by_stop().await);
}
