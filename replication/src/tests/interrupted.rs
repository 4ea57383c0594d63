use std::time::Duration;

use brep_block::{BlockDevice, FlushLevel, Hang, Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::image::faults;

fn primary(scratch: &Scratch) -> Side {
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer_timeout = Duration::from_secs(1);
    Side::run(config)
}

fn secondary(scratch: &Scratch) -> Side {
    Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]))
}

/// A primary whose secondary was in sync, went away, and lacks the second of four MiB.
async fn behind() -> (Scratch, Side) {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 4 * MIB, 1);
    scratch.raw("s.raw", 4 * MIB, 2);
    let (secondary, primary) = (secondary(&scratch), primary(&scratch));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    secondary.stop().await;
    primary.wait_state("disconnected").await;
    fill(&*guest, MIB, MIB as usize, 0x77).await;
    guest.close();
    (scratch, primary)
}

/// The secondary is back, and its first write hangs.
async fn hanging_secondary(scratch: &Scratch) -> (Side, Hang) {
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.start = false;
    let secondary = Side::run(config);
    secondary.wait("up", |_| true).await;
    let hang = faults::of(&scratch.path("s.raw")).upper.hang(Rule::new(Operation::Write));
    secondary.command("replication-start", json!({})).await.unwrap();
    hang.reached(1).await;
    (secondary, hang)
}

async fn end_equal(scratch: &Scratch, primary: Side, secondary: Side) {
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
    let equal = file(&scratch.path("p.raw")) == file(&scratch.path("s.raw"));
    assert!(equal, "in sync, and the disks differ");
}

#[tokio::test]
async fn a_copy_that_was_not_answered_is_made_again_by_the_next_session() {
    let (scratch, primary) = behind().await;
    let (secondary, hang) = hanging_secondary(&scratch).await;
    primary.wait_state("disconnected").await;
    hang.release();
    end_equal(&scratch, primary, secondary).await;
}

/// I9: what is being read for a copy is not known to be on the peer.
#[tokio::test]
async fn i09_a_copy_that_was_being_read_when_the_peer_was_lost_is_made_by_the_next_session() {
    let (scratch, primary) = behind().await;
    let hang = faults::of(&scratch.path("p.raw")).upper.hang(Rule::new(Operation::Read));
    let first = secondary(&scratch);
    hang.reached(1).await;
    first.stop().await;
    primary.wait_state("disconnected").await;
    hang.release();
    let secondary = secondary(&scratch);
    end_equal(&scratch, primary, secondary).await;
}

/// I9, I10: a clean stop in the middle of a copy.
#[tokio::test]
async fn i10_a_primary_that_is_stopped_during_a_copy_knows_what_was_not_copied() {
    let (scratch, first) = behind().await;
    let (secondary, hang) = hanging_secondary(&scratch).await;
    first.stop().await;
    hang.release();
    let primary = primary(&scratch);
    end_equal(&scratch, primary, secondary).await;
}

/// The same, with the copy still being read.
#[tokio::test]
async fn i10_a_primary_that_is_stopped_while_it_reads_for_a_copy_knows_what_was_not_copied() {
    let (scratch, first) = behind().await;
    let hang = faults::of(&scratch.path("p.raw")).upper.hang(Rule::new(Operation::Read));
    let secondary = secondary(&scratch);
    hang.reached(1).await;
    let release = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        hang.release();
    };
    tokio::join!(first.stop(), release);
    let primary = primary(&scratch);
    end_equal(&scratch, primary, secondary).await;
}

/// I7: a disk whose flush has failed may have lost what the secondary has, and no map says what.
#[tokio::test]
async fn i07_a_flush_that_failed_makes_the_maps_unknown() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let (first, primary) = (secondary(&scratch), primary(&scratch));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let disk = faults::of(&scratch.path("p.raw")).lower;
    disk.fail(Rule::new(Operation::Flush));
    guest.flush(FlushLevel::Durable).await.unwrap_err();
    first.stop().await;
    primary.wait_state("disconnected").await;
    let secondary = secondary(&scratch);
    let met = |s: &Value| s["link"] == "refused" || s["disks"][0]["state"] == "in-sync";
    let status = primary.wait("an answer", met).await;
    assert!(status["reason"].as_str().unwrap_or_default().contains("flush"), "{status:#}");
    primary.command("resync", json!({ "full": true })).await.unwrap();
    guest.close();
    end_equal(&scratch, primary, secondary).await;
}
