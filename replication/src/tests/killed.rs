//! What a kill -9 of the primary finds in flight: files as they are at that moment, without a clean
//! stop.
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill};
use super::{Pair, write};
use crate::config::{Seeded, SideConfig};
use crate::image::faults;

/// What one bit of a map stands for.
const GRANULE: u64 = 64 << 10;

fn config(scratch: &Scratch) -> SideConfig {
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer_timeout = Duration::from_secs(1);
    config
}

async fn sent(primary: &Side) -> u64 {
    primary.status().await["counters"]["replicated-bytes"].as_u64().unwrap()
}

/// Starts the primary on what was left of the one that was killed, and returns what it sends until
/// both are equal.
async fn resynced_bytes(scratch: &Scratch, killed: SideConfig, secondary: Side) -> u64 {
    let primary = Side::run(killed);
    primary.wait_state("in-sync").await;
    let bytes = sent(&primary).await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")), "the disks differ");
    bytes
}

/// I10: in the middle of a resync, with one piece of four on its way.
#[tokio::test]
async fn i10_a_resync_goes_on_where_the_kill_of_the_primary_found_it() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 8 * MIB, 1);
    scratch.raw("s.raw", 8 * MIB, 2);
    let disk = || vec![scratch.disk("vda", "s.raw")];
    let first = Side::run(scratch.secondary(disk()));
    let primary = Side::run(config(&scratch));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    first.stop().await;
    primary.wait_state("disconnected").await;
    fill(&*guest, 2 * MIB, 4 * MIB as usize, 0x77).await;
    let secondary = Side::run({
        let mut config = scratch.secondary(disk());
        config.start = false;
        config
    });
    secondary.wait("up", |_| true).await;
    let rule = Rule::new(Operation::Write).range(3 * MIB..4 * MIB);
    let hang = faults::of(&scratch.path("s.raw")).upper.hang(rule);
    let before = sent(&primary).await;
    secondary.command("replication-start", json!({})).await.unwrap();
    hang.reached(1).await;
    while sent(&primary).await < before + 3 * MIB {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let killed = SideConfig { state_dir: scratch.killed(), ..config(&scratch) };
    guest.close();
    primary.stop().await;
    hang.release();
    assert_eq!(resynced_bytes(&scratch, killed, secondary).await, MIB, "the piece on its way");
}

/// I9: the secondary has a write, and the local disk has not.
#[tokio::test]
async fn i09_a_write_that_only_the_secondary_had_at_the_kill_is_taken_back() {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x11).await;
    let before = file(&scratch.path("p.raw"));
    let hang = local.upper.hang(Rule::new(Operation::Write));
    let replicated = sent(&primary).await;
    let late = write(&guest, 10 * GRANULE, 0x99);
    hang.reached(1).await;
    while sent(&primary).await == replicated {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let killed = SideConfig { state_dir: scratch.killed(), ..config(&scratch) };
    hang.release();
    late.await.unwrap().unwrap();
    guest.close();
    primary.stop().await;
    // It holds the file open, and locked.
    drop(local);
    std::fs::write(scratch.path("p.raw"), before).unwrap();
    assert_eq!(resynced_bytes(&scratch, killed, secondary).await, GRANULE, "its granule, no more");
}

/// I9: what is being compared counts as different for the one who is started after a kill.
#[tokio::test]
async fn i09_what_was_being_compared_at_the_kill_is_sent() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
    let mut seeded = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    seeded.start = false;
    let secondary = Side::run(seeded);
    secondary.wait("up", |_| true).await;
    let hang = faults::of(&scratch.path("s.raw")).upper.hang(Rule::new(Operation::Read));
    let primary = Side::run(SideConfig { seeded: Seeded::Compare, ..config(&scratch) });
    secondary.command("replication-start", json!({})).await.unwrap();
    hang.reached(1).await;
    let behind = |s: &Value| s["disks"][0]["bytes-behind"].as_u64() < Some(2 * MIB);
    primary.wait("a comparison", behind).await;
    let killed = SideConfig { state_dir: scratch.killed(), ..config(&scratch) };
    primary.stop().await;
    hang.release();
    assert_eq!(resynced_bytes(&scratch, killed, secondary).await, 2 * MIB);
}
