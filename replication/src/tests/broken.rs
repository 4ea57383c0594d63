//! Files of a secondary that fail in a way that lasts.
use brep_block::{BlockDevice, Operation, Rule};
use serde_json::{Value, json};

use super::Pair;
use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::image::faults::{self, Faults};

/// Below the buffers of the secondary.
fn buffers(scratch: &Scratch) -> Vec<Faults> {
    let names = std::fs::read_dir(scratch.path("s.state")).unwrap();
    let paths = names.map(|entry| entry.unwrap().path());
    let images = paths.filter(|path| path.extension().is_some_and(|e| e == "qcow2"));
    images.filter_map(|path| faults::find(&path)).collect()
}

/// An image refuses everything after a failed write of its metadata. That must not keep checkpoints
/// away for ever.
#[tokio::test]
async fn a_buffer_whose_metadata_could_not_be_written_once_is_opened_again() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x10).await;
    primary.checkpoint().await;
    let before = primary.status().await["cur"].clone();
    // Data, refcounts, tables: one of them after the other, until it is one that is fatal.
    let mut nth = 0;
    while primary.status().await["cur"] == before {
        nth += 1;
        assert!(nth < 8, "no failure was fatal");
        let below = buffers(&scratch);
        below.iter().for_each(|faults| faults.lower.fail(Rule::new(Operation::Write).nth(nth)));
        fill(&*guest, nth * 65536, 8192, 0x20).await;
        below.iter().for_each(|faults| faults.lower.clear());
        primary.wait("what has failed is sent again", |s| s["disks"][0]["bytes-behind"] == 0).await;
    }
    primary.wait_state("in-sync").await;
    fill(&*guest, 0, 4096, 0x11).await;
    primary.checkpoint().await;
    assert!(secondary.status().await["advice"].is_null());
    guest.close();
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// What was not flushed may be lost: no checkpoint can be promised before somebody has looked, and
/// both sides say so.
#[tokio::test]
async fn a_disk_that_cannot_be_flushed_any_more_is_told_by_both_sides() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x10).await;
    disk.lower.fail(Rule::new(Operation::Flush).forever());
    primary.command("checkpoint", json!({})).await.unwrap_err();
    let told =
        |s: &Value| s["advice"].as_str().is_some_and(|a| a.contains("start brep secondary again"));
    let status = primary.wait("told on the primary", told).await;
    assert_eq!(status["link"], "refused", "{status:#}");
    let status = secondary.wait("told on the secondary", told).await;
    assert_eq!(status["promotable"], true, "{status:#}");
    fill(&*guest, 0, 4096, 0x11).await;
    guest.close();
    primary.stop().await;
    drop(secondary);
}

/// A guest of the secondary is shown checkpoints, and nothing that is on the way to one.
#[tokio::test]
async fn i06_a_secondary_that_is_started_again_in_a_first_copy_shows_its_guest_nothing_of_it() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let mut there = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    there.guest_listen = Some(scratch.endpoint("s-guest.sock"));
    let secondary = Side::run(there.clone());
    secondary.wait("up", |s| s["role"] == "secondary").await;
    let disk = faults::of(&scratch.path("s.raw"));
    disk.upper.fail(Rule::new(Operation::Write).forever());
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    secondary.wait("a copy", |s| s["link"] == "connected").await;
    primary.stop().await;
    drop(disk);
    secondary.stop().await;

    let secondary = Side::run(there);
    secondary.wait("up", |s| s["role"] == "secondary").await;
    let guest = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    let error = guest.read(0, 4096).await.unwrap_err();
    guest.close();
    // With what it has then its guest goes on.
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    assert_eq!(guest.read(0, 1).await.unwrap()[0], 1, "{error}");
    guest.close();
    primary.stop().await;
    secondary.stop().await;
    // A checkpoint is there at once after a start.
    let mut there = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    there.guest_listen = Some(scratch.endpoint("s-guest.sock"));
    let secondary = Side::run(there);
    let guest = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    assert_eq!(guest.read(0, 1).await.unwrap()[0], 1);
    guest.close();
    secondary.stop().await;
}
