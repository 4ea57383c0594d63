//! A primary's host loses its power: of what was not on stable storage nothing is left.
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::config::{Durability, SideConfig};
use crate::primary::MapsOf;
use crate::state::RecordStore;

const SIZE: u64 = 24 * MIB;
/// What the activity log remembers as one.
const EXTENT: u64 = 4 * MIB;

fn config(scratch: &Scratch) -> SideConfig {
    let config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    SideConfig { durability: Durability::Power, ..config }
}

async fn sent(primary: &Side) -> u64 {
    primary.status().await["counters"]["replicated-bytes"].as_u64().unwrap()
}

/// A pair whose primary has lost its power after a write in the third extent: maps and disk are
/// those from before, and the log is that from when the write had been acknowledged. Returns the
/// secondary and what is left of the primary's state.
async fn after_power_loss(scratch: &Scratch) -> (Side, PathBuf) {
    scratch.raw("p.raw", SIZE, 1);
    scratch.raw("s.raw", SIZE, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let first = Side::run(config(scratch));
    first.wait_state("in-sync").await;
    // The first copy has made everything hot.
    first.stop().await;
    let primary = Side::run(config(scratch));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, MIB, 4096, 0x77).await;
    primary.checkpoint().await;
    let left = scratch.killed();
    let disk = file(&scratch.path("p.raw"));
    fill(&*guest, 9 * MIB, 4096, 0x99).await;
    std::fs::copy(scratch.path("p.state/vda.log"), left.join("vda.log")).unwrap();
    guest.close();
    primary.stop().await;
    std::fs::write(scratch.path("p.raw"), disk).unwrap();
    lose_power(&left);
    (secondary, left)
}

fn lose_power(state_dir: &Path) {
    let blank = || unreachable!("there is a record");
    let mut store = RecordStore::open(state_dir, blank).unwrap();
    store.update(|record| record.boot = Some("another one".to_owned())).unwrap();
    let set = store.record().set;
    MapsOf { state_dir, set, disk: "vda", size: SIZE, granularity_log2: None }.lose_power();
}

async fn end_equal(scratch: &Scratch, primary: Side, secondary: Side) {
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")), "the disks differ");
}

/// I9: what the secondary has, and this side's disk and maps have lost, is taken back.
#[tokio::test]
async fn i09_after_a_loss_of_power_only_what_was_hot_is_sent_again() {
    let scratch = Scratch::new();
    let (secondary, state_dir) = after_power_loss(&scratch).await;
    let primary = Side::run(SideConfig { state_dir, ..config(&scratch) });
    primary.wait_state("in-sync").await;
    assert_eq!(sent(&primary).await, 2 * EXTENT, "the first and the third");
    end_equal(&scratch, primary, secondary).await;
}

#[tokio::test]
async fn after_a_loss_of_power_without_a_log_nothing_is_sent_before_it_is_asked_for() {
    let scratch = Scratch::new();
    let (secondary, state_dir) = after_power_loss(&scratch).await;
    std::fs::remove_file(state_dir.join("vda.log")).unwrap();
    let primary = Side::run(SideConfig { state_dir, ..config(&scratch) });
    let status = primary.wait("refused", |s: &Value| s["link"] == "refused").await;
    assert!(status["advice"].as_str().unwrap().contains("resync --full"), "{status:#}");
    primary.command("resync", json!({ "full": true })).await.unwrap();
    primary.wait_state("in-sync").await;
    end_equal(&scratch, primary, secondary).await;
}

/// A kill is no loss of power: the maps have everything, and nothing is sent again.
#[tokio::test]
async fn a_kill_costs_no_extents() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", SIZE, 1);
    scratch.raw("s.raw", SIZE, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let first = Side::run(config(&scratch));
    first.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 9 * MIB, 4096, 0x99).await;
    let state_dir = scratch.killed();
    guest.close();
    first.stop().await;
    let primary = Side::run(SideConfig { state_dir, ..config(&scratch) });
    primary.wait_state("in-sync").await;
    assert_eq!(sent(&primary).await, 0);
    end_equal(&scratch, primary, secondary).await;
}

/// What neither side wrote since they parted is equal, though the power was lost: the log says what the
/// maps may have lost. Without it nobody knows, and it is said.
#[tokio::test]
async fn an_old_primary_that_lost_its_power_returns_with_what_either_side_wrote() {
    for has_log in [true, false] {
        let scratch = Scratch::new();
        let (promoted, state_dir) = after_power_loss(&scratch).await;
        promoted.command("failover", json!({})).await.unwrap();
        promoted.wait_state("promoted").await;
        let guest = connect(scratch.endpoint("s.sock"), "vda").await;
        fill(&*guest, 17 * MIB, 4096, 0x55).await;
        if !has_log {
            std::fs::remove_file(state_dir.join("vda.log")).unwrap();
        }
        let mut config = scratch.secondary(vec![scratch.disk("vda", "p.raw")]);
        (config.state_dir, config.durability) = (state_dir, Durability::Power);
        (config.listen, config.discard_local) = (Some(scratch.endpoint("p.sock")), true);
        let returned = Side::run(config);
        returned.wait("it is ready", |s| s["role"] == "secondary").await;
        let uri = format!("nbd+unix:///?socket={}", scratch.path("p.sock").display());
        promoted.command("peer-set", json!({ "uri": uri })).await.unwrap();
        if has_log {
            promoted.wait_state("in-sync").await;
            let (sent, granule) = (sent(&promoted).await, 64 << 10);
            assert_eq!(sent, 2 * EXTENT + granule, "first and third extent, and the guest's");
        } else {
            let refused = |s: &Value| s["link"] == "refused";
            let status = promoted.wait("refused", refused).await;
            let advice = status["advice"].as_str().unwrap();
            assert!(advice.contains("resync --full"), "{status:#}");
            promoted.command("resync", json!({ "full": true })).await.unwrap();
            promoted.wait_state("in-sync").await;
        }
        guest.close();
        end_equal(&scratch, promoted, returned).await;
    }
}
