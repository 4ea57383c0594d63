use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::image::faults;

/// Two ranges have to be sent again before a checkpoint. The second cannot be read while the
/// first is being read: the first must not be forgotten over that.
#[tokio::test]
async fn a_piece_that_cannot_be_read_does_not_take_its_neighbours_with_it() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let here = faults::of(&scratch.path("p.raw"));
    let there = faults::of(&scratch.path("s.raw"));
    for offset in [0, MIB] {
        there.lower.fail(Rule::new(Operation::Write));
        fill(&*guest, offset, 4096, 0x77).await;
    }
    assert_ne!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));

    let hang = here.upper.hang(Rule::new(Operation::Read).range(0..65536));
    here.lower.fail(Rule::new(Operation::Read).range(MIB..MIB + 65536));
    let release = async {
        hang.reached(1).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        hang.release();
    };
    let (refused, ()) = tokio::join!(primary.command("checkpoint", json!({})), release);
    assert!(refused.is_err(), "a checkpoint without what could not be read");
    primary.checkpoint().await;
    let equal = file(&scratch.path("p.raw")) == file(&scratch.path("s.raw"));
    assert!(equal, "the checkpoint is committed, and the disks differ");
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I9, I11: what one secondary was given is not what another one has, although neither has seen a
/// checkpoint since.
#[tokio::test]
async fn a_secondary_gets_what_was_sent_to_another_one_in_its_place() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 4 * MIB, 1);
    scratch.raw("s.raw", 4 * MIB, 2);
    let first = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    first.stop().await;
    primary.wait_state("disconnected").await;
    scratch.raw("other.raw", 4 * MIB, 3);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "other.raw")]);
    config.state_dir = scratch.path("other.state");
    config.start = false;
    let other = Side::run(config);
    other.wait("up", |_| true).await;
    let disk = faults::of(&scratch.path("other.raw"));
    // Its first copy never ends: one range is refused.
    disk.upper.fail(Rule::new(Operation::Write).range(0..4096).forever());
    disk.upper.fail(Rule::new(Operation::WriteZeroes).range(0..4096).forever());
    other.command("replication-start", json!({})).await.unwrap();
    let copied = |s: &serde_json::Value| s["disks"][0]["bytes-behind"] == MIB;
    primary.wait("all but the first part", copied).await;
    fill(&*guest, 2 * MIB, 4096, 0x77).await;
    other.stop().await;
    primary.wait_state("disconnected").await;
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    primary.wait_state("in-sync").await;
    guest.close();
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")), "the disks differ");
}

/// I13: a block of the secondary that cannot be read is found while its hash is taken, by nobody's
/// request.
#[tokio::test]
async fn a_read_that_fails_while_hashes_are_taken_is_in_the_secondarys_errors() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 1);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let there = faults::of(&scratch.path("s.raw"));
    there.lower.fail(Rule::new(Operation::Read).range(MIB..MIB + 4096));
    primary.command("resync", json!({ "compare": true })).await.unwrap();
    let told = |s: &serde_json::Value| {
        let error = &s["errors"][0];
        error["disk"] == "vda" && error["operation"] == "read" && error["errno"] == 5
    };
    secondary.wait("the failed read", told).await;
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
}

/// Whoever waits for the end of a copy does not find the pair in sync because it has not begun, and the
/// secondary shows it too. It says how much differed.
#[tokio::test]
async fn a_comparison_of_a_connected_pair_is_shown_from_the_command_on_by_both_sides() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 4 * MIB, 1);
    scratch.raw("s.raw", 4 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let mut replica = std::fs::File::options().write(true).open(scratch.path("s.raw")).unwrap();
    std::io::Seek::seek(&mut replica, std::io::SeekFrom::Start(MIB + 4096)).unwrap();
    std::io::Write::write_all(&mut replica, b"not by the primary").unwrap();

    let disk = faults::of(&scratch.path("p.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Read));
    primary.command("resync", json!({ "compare": true })).await.unwrap();
    assert_eq!(primary.status().await["disks"][0]["state"], "resyncing");
    assert!(primary.command("resync", json!({ "full": true })).await.is_err(), "one at a time");
    hang.reached(1).await;
    secondary.wait_state("resyncing").await;
    hang.release();
    primary.wait_state("in-sync").await;
    let counters = primary.status().await["counters"].clone();
    assert_eq!(counters["compared-bytes"], 4 * MIB);
    assert_eq!(counters["differing-bytes"], 65536);
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")), "the disks differ");
}

/// Behind the one place in a long run of zeroes that differs nothing is sent that is equal.
#[tokio::test]
async fn what_is_compared_goes_on_behind_a_place_in_a_hole_that_differs() {
    let scratch = Scratch::new();
    for name in ["p.raw", "s.raw"] {
        File::create(scratch.path(name)).unwrap().set_len(24 * MIB).unwrap();
    }
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let image = File::options().write(true).open(scratch.path("s.raw")).unwrap();
    for offset in [3 * MIB, 17 * MIB] {
        image.write_all_at(&[0x55; 192 << 10], offset).unwrap();
    }
    primary.command("resync", json!({ "compare": true })).await.unwrap();
    let compared = |s: &Value| {
        s["counters"]["compared-bytes"] == 24 * MIB && s["disks"][0]["state"] == "in-sync"
    };
    let status = primary.wait("compared", compared).await;
    let differing = status["counters"]["differing-bytes"].as_u64().unwrap();
    assert!((384 << 10..=2 * MIB).contains(&differing), "{differing}");
    primary.checkpoint().await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}
