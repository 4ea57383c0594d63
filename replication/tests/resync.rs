//! Back in sync after an outage: what was missed, no more, and never from the wrong side.
#![allow(missing_docs)]

mod common;

use brep_replication::config::SideConfig;
use common::{MIB, Scratch, Side, connect, copy_dir, file, fill};
use serde_json::json;

const SIZE: u64 = 8 * MIB;
/// What one bit of a map stands for.
const GRANULE: u64 = 64 << 10;

struct Pair {
    scratch: Scratch,
    primary: Side,
    secondary: Side,
}

fn secondary(scratch: &Scratch) -> Side {
    Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]))
}

fn primary(scratch: &Scratch) -> Side {
    Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]))
}

impl Pair {
    async fn new() -> Self {
        let scratch = Scratch::new();
        scratch.raw("p.raw", SIZE, 1);
        scratch.raw("s.raw", SIZE, 2);
        let (secondary, primary) = (secondary(&scratch), primary(&scratch));
        primary.wait_state("in-sync").await;
        Pair { scratch, primary, secondary }
    }

    /// Stops both; their disks hold the same.
    async fn end_equal(self) {
        self.primary.stop().await;
        self.secondary.stop().await;
        let scratch = &self.scratch;
        assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")), "the disks differ");
    }
}

/// Bytes that a primary has sent since its process started.
async fn sent(primary: &Side) -> u64 {
    primary.status().await["counters"]["replicated-bytes"].as_u64().unwrap()
}

#[tokio::test]
async fn a_secondary_that_returns_gets_what_it_missed_and_no_more() {
    let Pair { scratch, primary, secondary: gone } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    gone.stop().await;
    primary.wait_state("disconnected").await;
    fill(&*guest, MIB, 4096, 0x77).await;
    fill(&*guest, 5 * MIB + 100 * 512, 4096, 0x78).await;
    let status = primary.status().await;
    assert_eq!(status["disks"][0]["bytes-behind"], 2 * GRANULE, "{status}");
    let before = sent(&primary).await;
    let secondary = secondary(&scratch);
    primary.wait_state("in-sync").await;
    assert_eq!(sent(&primary).await - before, 2 * GRANULE);
    secondary.wait("promotable", |s| s["latest-ok"] == true).await;
    Pair { scratch, primary, secondary }.end_equal().await;
}

#[tokio::test]
async fn any_number_of_outages_is_caught_up_with() {
    let mut pair = Pair::new().await;
    for round in 0..6_u64 {
        let guest = connect(pair.scratch.endpoint("p-guest.sock"), "vda").await;
        fill(&*guest, round * MIB, 65536, 0x10 + round as u8).await;
        if round % 2 == 0 {
            pair.primary.checkpoint().await;
        }
        fill(&*guest, round * MIB + 4096, 8192, 0x20 + round as u8).await;
        pair.secondary.stop().await;
        pair.primary.wait_state("disconnected").await;
        fill(&*guest, round * MIB + 32768, 65536, 0x30 + round as u8).await;
        guest.close();
        if round == 3 {
            pair.primary.stop().await;
            pair.primary = primary(&pair.scratch);
        }
        pair.secondary = secondary(&pair.scratch);
        pair.primary.wait_state("in-sync").await;
    }
    assert!(sent(&pair.primary).await < SIZE, "never everything again");
    pair.end_equal().await;
}

#[tokio::test]
async fn a_primary_that_was_restarted_knows_what_the_secondary_lacks() {
    let Pair { scratch, primary: first, secondary: gone } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    gone.stop().await;
    first.wait_state("disconnected").await;
    fill(&*guest, MIB, 4096, 0x77).await;
    guest.close();
    first.stop().await;
    let primary = primary(&scratch);
    let status = primary.wait("up", |_| true).await;
    assert_eq!(status["disks"][0]["bytes-behind"], GRANULE, "{status}");
    let secondary = secondary(&scratch);
    primary.wait_state("in-sync").await;
    assert_eq!(sent(&primary).await, GRANULE);
    Pair { scratch, primary, secondary }.end_equal().await;
}

/// I10: what the secondary had acknowledged is not sent again, whether it was committed or not.
#[tokio::test]
async fn i10_a_killed_primary_does_not_send_again_what_was_acknowledged() {
    let Pair { scratch, primary: first, secondary } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    first.checkpoint().await;
    fill(&*guest, 3 * MIB, 4096, 0x22).await;
    let state_dir = scratch.killed();
    guest.close();
    first.stop().await;
    let config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    let primary = Side::run(SideConfig { state_dir, ..config });
    primary.wait_state("in-sync").await;
    assert_eq!(sent(&primary).await, 0);
    Pair { scratch, primary, secondary }.end_equal().await;
}

/// One that has lost what it had acknowledged gets all of it.
#[tokio::test]
async fn a_secondary_of_another_session_gets_all_that_a_killed_primary_remembers() {
    let Pair { scratch, primary: first, secondary: gone } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    first.checkpoint().await;
    gone.stop().await;
    first.wait_state("disconnected").await;
    // An older copy of the secondary, from before the session that is to come.
    copy_dir(&scratch.path("s.state"), &scratch.path("old.state"));
    let old = file(&scratch.path("s.raw"));
    let gone = secondary(&scratch);
    first.wait("connected", |s| s["link"] == "connected").await;
    fill(&*guest, 3 * MIB, 4096, 0x22).await;
    let state_dir = scratch.killed();
    guest.close();
    first.stop().await;
    gone.stop().await;
    std::fs::write(scratch.path("s.raw"), old).unwrap();
    std::fs::remove_dir_all(scratch.path("s.state")).unwrap();
    std::fs::rename(scratch.path("old.state"), scratch.path("s.state")).unwrap();
    let secondary = secondary(&scratch);
    let config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    let primary = Side::run(SideConfig { state_dir, ..config });
    let met = |s: &serde_json::Value| s["link"] == "refused" || s["disks"][0]["state"] == "in-sync";
    let status = primary.wait("an answer", met).await;
    if status["link"] == "refused" {
        primary.command("resync", json!({ "full": true })).await.unwrap();
        primary.wait_state("in-sync").await;
    }
    Pair { scratch, primary, secondary }.end_equal().await;
}

#[tokio::test]
async fn maps_that_are_lost_mean_a_full_copy_on_command() {
    let Pair { scratch, primary: first, secondary: gone } = Pair::new().await;
    gone.stop().await;
    first.wait_state("disconnected").await;
    first.stop().await;
    let maps = scratch.path("p.state").join("vda.maps");
    let mut bytes = file(&maps);
    bytes.fill(0x5a);
    std::fs::write(&maps, bytes).unwrap();
    let (primary, secondary) = (primary(&scratch), secondary(&scratch));
    let status = primary.wait("refused", |s| s["link"] == "refused").await;
    assert_eq!(status["advice"], "brep resync --full");
    assert!(status["reason"].as_str().unwrap().contains("maps were lost"), "{status}");
    let error = primary.command("checkpoint", json!({})).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert_eq!(secondary.status().await["promotable"], true);
    assert_eq!(sent(&primary).await, 0, "nothing is forwarded over the gap");
    primary.command("resync", json!({ "full": true })).await.unwrap();
    primary.wait_state("in-sync").await;
    assert_eq!(sent(&primary).await, SIZE);
    Pair { scratch, primary, secondary }.end_equal().await;
}

/// The secondary of one pair is away; another one takes its place for a while, and then it
/// returns.
#[tokio::test]
async fn a_secondary_that_was_replaced_meanwhile_is_not_taken_for_the_one_that_was_there() {
    let Pair { scratch, primary, secondary: first } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    first.stop().await;
    primary.wait_state("disconnected").await;
    scratch.raw("other.raw", SIZE, 3);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "other.raw")]);
    config.state_dir = scratch.path("other.state");
    let other = Side::run(config);
    primary.wait_state("in-sync").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;
    other.stop().await;
    primary.wait_state("disconnected").await;
    let secondary = secondary(&scratch);
    let status = primary.wait("refused", |s| s["link"] == "refused").await;
    assert!(status["reason"].as_str().unwrap().contains("another secondary"), "{status}");
    primary.command("resync", json!({ "full": true })).await.unwrap();
    primary.wait_state("in-sync").await;
    Pair { scratch, primary, secondary }.end_equal().await;
}

#[tokio::test]
async fn a_failover_in_the_middle_of_a_resync_gives_the_last_checkpoint() {
    let Pair { scratch, primary, secondary: gone } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;
    let checkpoint = file(&scratch.path("p.raw"));
    fill(&*guest, 4096, 65536, 0x22).await;
    gone.stop().await;
    primary.wait_state("disconnected").await;
    for at in 0..SIZE / MIB {
        fill(&*guest, at * MIB, MIB as usize, 0x33).await;
    }
    let secondary = secondary(&scratch);
    // At any moment of the resync, or just after its end.
    primary.wait("begun", |s| s["link"] == "connected").await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    let promoted = file(&scratch.path("s.raw"));
    assert!(promoted == checkpoint || promoted == vec![0x33; SIZE as usize], "a mixture");
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}
