//! Checkpoints while an added disk is copied.
use brep_block::{Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file};
use super::write;
use crate::image::faults::{self, Faults};

/// A pair of one disk, to which another is added whose copy does not end: its file on the secondary
/// refuses something.
struct Joining {
    scratch: Scratch,
    primary: Side,
    secondary: Side,
    /// Below the new disk of the secondary.
    disk: Faults,
}

impl Joining {
    async fn new(refused: Rule) -> Self {
        let scratch = Scratch::new();
        for (disk, size, byte) in [("vda", MIB, 1), ("vdb", 4 * MIB, 2)] {
            scratch.raw(&format!("p-{disk}.raw"), size, byte);
            scratch.raw(&format!("s-{disk}.raw"), size, 100 + byte);
        }
        let mut there = scratch.secondary(vec![scratch.disk("vda", "s-vda.raw")]);
        there.peer = Some(scratch.endpoint("p.sock").into());
        let mut here = scratch.primary(vec![scratch.disk("vda", "p-vda.raw")]);
        here.listen = Some(scratch.endpoint("p.sock"));
        let (secondary, primary) = (Side::run(there), Side::run(here));
        primary.wait_state("in-sync").await;
        secondary.command("disk-add", added(&scratch, "s-vdb.raw")).await.unwrap();
        let disk = faults::of(&scratch.path("s-vdb.raw"));
        disk.lower.fail(refused);
        primary.command("disk-add", added(&scratch, "p-vdb.raw")).await.unwrap();
        let joins =
            |s: &Value| s["disks"][1]["state"] == "joining" && s["disks"][0]["state"] == "in-sync";
        primary.wait("vdb joins", joins).await;
        Joining { scratch, primary, secondary, disk }
    }

    /// Writes to a disk of the guest.
    async fn write(&self, disk: &str, offset: u64, byte: u8) {
        let guest = connect(self.scratch.endpoint("p-guest.sock"), disk).await;
        write(&guest, offset, byte).await.unwrap().unwrap();
        guest.close();
    }

    /// A failover, with the disks that it leaves out; everything else is merged then.
    async fn failover(&self) -> Value {
        let report = self.secondary.command("failover", json!({})).await.unwrap();
        self.secondary.wait_state("promoted").await;
        report["left-out"].clone()
    }

    async fn stop(self) -> Scratch {
        self.primary.stop().await;
        self.secondary.stop().await;
        self.scratch
    }
}

fn added(scratch: &Scratch, file: &str) -> Value {
    json!({ "name": "vdb", "file": scratch.path(file), "format": "raw" })
}

#[tokio::test]
async fn checkpoints_go_on_without_a_disk_that_is_being_copied() {
    let pair = Joining::new(Rule::new(Operation::Write).forever()).await;
    let before = pair.primary.status().await["checkpoint"].as_u64().unwrap();
    pair.write("vda", 0, 0x11).await;
    let first = pair.primary.checkpoint().await;
    // What fails of the new disk does not keep the others from one.
    pair.write("vdb", 0, 0x11).await;
    pair.write("vda", 4096, 0x22).await;
    let second = pair.primary.checkpoint().await;
    assert!(before < first && first < second);
    let wanted = file(&pair.scratch.path("p-vda.raw"));
    pair.write("vda", 8192, 0x33).await;
    let refused = pair.primary.command("switchover", json!({})).await.unwrap_err();
    assert!(refused.to_string().contains("vdb is being copied for the first time"), "{refused}");
    assert_eq!(pair.failover().await, json!(["vdb"]));
    let scratch = pair.stop().await;
    assert!(file(&scratch.path("s-vda.raw")) == wanted, "the last checkpoint");
}

/// Its first checkpoint is that of all disks together.
#[tokio::test]
async fn a_disk_that_was_copied_is_part_of_the_next_checkpoint() {
    let pair = Joining::new(Rule::new(Operation::Write).forever()).await;
    pair.write("vda", 0, 0x11).await;
    pair.write("vdb", 0, 0x11).await;
    pair.primary.checkpoint().await;
    assert_eq!(pair.secondary.status().await["disks"][1]["state"], "joining");
    pair.disk.lower.clear();
    let in_sync = |s: &Value| {
        let disks = s["disks"].as_array().unwrap();
        disks.iter().all(|disk| disk["state"] == "in-sync")
    };
    pair.primary.wait("both are in sync", in_sync).await;
    assert_eq!(pair.secondary.status().await["disks"][1]["state"], "in-sync");
    let [vda, vdb] = ["p-vda.raw", "p-vdb.raw"].map(|name| file(&pair.scratch.path(name)));
    // Nothing of what is not in a checkpoint stays, on either disk.
    pair.write("vda", 4096, 0x22).await;
    pair.write("vdb", 4096, 0x22).await;
    assert_eq!(pair.failover().await, json!([]));
    let scratch = pair.stop().await;
    assert!(file(&scratch.path("s-vda.raw")) == vda);
    assert!(file(&scratch.path("s-vdb.raw")) == vdb);
}

/// Checkpoints of the others do not make it forget what it has sent, nor what has failed.
#[tokio::test]
async fn the_copy_of_a_disk_goes_on_where_it_was() {
    let last = Rule::new(Operation::Write).range(4 * MIB - 4096..4 * MIB);
    let pair = Joining::new(last.forever()).await;
    let behind = |s: &Value| s["disks"][1]["bytes-behind"].as_u64().unwrap();
    pair.primary.wait("all but one piece", |s| behind(s) == MIB).await;
    pair.write("vdb", 0, 0x11).await;
    pair.primary.checkpoint().await;
    pair.write("vdb", 4096, 0x22).await;
    pair.primary.checkpoint().await;
    let Joining { scratch, primary, secondary, disk } = pair;
    primary.stop().await;
    disk.lower.clear();
    drop(disk);
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p-vda.raw")]));
    let in_sync = |s: &Value| s["disks"][1]["state"] == "in-sync";
    let status = primary.wait("in sync", in_sync).await;
    assert_eq!(status["counters"]["replicated-bytes"], MIB, "{status:#}");
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("s-vdb.raw")) == file(&scratch.path("p-vdb.raw")));
}
