use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, FlushLevel, Operation, Rule};
use serde_json::json;

use super::common::{Side, connect, file, fill};
use super::{Pair, faults, write};

/// The link is lost while a write of it hangs in the secondary's disk. A failover that did not
/// wait for that write would merge, and then be overwritten by it.
#[tokio::test]
async fn a_failover_waits_for_the_writes_of_a_session_that_is_lost_already() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;
    let checkpoint = file(&scratch.path("s.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Write));
    let late = write(&guest, 8192, 0x66);
    hang.reached(1).await;
    // The primary gives up, the secondary notices, and only then the operator acts.
    late.await.unwrap().unwrap();
    secondary.wait("lost", |s| s["link"] == "disconnected").await;
    let mut failover = Box::pin(secondary.command("failover", json!({})));
    let early = tokio::time::timeout(Duration::from_millis(500), &mut failover).await;
    assert!(early.is_err(), "promoted although a write is going on");
    hang.release();
    failover.await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&scratch.path("s.raw")), checkpoint);
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// `latest` was complete when the command came, but what was in flight then has failed since.
#[tokio::test]
async fn latest_is_refused_if_a_write_fails_while_the_session_is_drained() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    primary.checkpoint().await;
    assert_eq!(secondary.status().await["latest-ok"], true);
    let hang = disk.upper.hang(Rule::new(Operation::Write));
    disk.lower.fail(Rule::new(Operation::Write));
    let late = write(&guest, 8192, 0x66);
    hang.reached(1).await;
    let mut failover = Box::pin(secondary.command("failover", json!({ "to": "latest" })));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut failover).await;
    assert!(early.is_err(), "promoted although a write is going on");
    hang.release();
    assert_eq!(failover.await.unwrap_err().exit_code(), 3);
    late.await.unwrap().unwrap();
    secondary.command("failover", json!({ "to": "checkpoint" })).await.unwrap();
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// To find out what a file holds can take as long as to read it; the layers alone are asked.
#[tokio::test]
async fn a_merge_does_not_ask_the_disks_image_what_it_has() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    primary.checkpoint().await;
    let checkpoint = file(&scratch.path("p.raw"));
    fill(&*guest, 65536, 65536, 0x11).await;
    guest.close();
    primary.stop().await;
    disk.upper.fail(Rule::new(Operation::BlockStatus).forever());
    disk.lower.fail(Rule::new(Operation::BlockStatus).forever());
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert!(file(&scratch.path("s.raw")) == checkpoint, "another disk than at the checkpoint");
    secondary.stop().await;
}

/// The record says that this side is a primary, and then its activity log cannot be written. A primary
/// that was told that nothing has happened would go on, and at this side's next start there would be two.
#[tokio::test]
async fn i11_a_promotion_that_fails_after_its_record_is_told_as_one() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    if secondary.status().await["durability"] != "power" {
        return; // There is no log that could fail.
    }
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;
    std::fs::create_dir(scratch.path("s.state/vda.log")).unwrap();
    let failed = secondary.command("failover", json!({})).await.unwrap_err();
    assert!(failed.to_string().contains("start it again"), "{failed}");
    let again = secondary.command("failover", json!({})).await.unwrap_err();
    assert!(again.to_string().contains("start it again"), "{again}");
    primary.wait("superseded", |s| s["link"] == "refused").await;
    write(&guest, 0, 0x22).await.unwrap().unwrap_err();
    let told = primary.command("failover", json!({})).await.unwrap_err();
    assert!(told.to_string().contains("it is the disk now"), "{told}");
    guest.close();
    primary.stop().await;
    secondary.stop().await;
    std::fs::remove_dir(scratch.path("s.state/vda.log")).unwrap();
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    secondary.wait("promoted", |s| s["role"] == "promoted").await;
    secondary.stop().await;
}

/// Where the maps do not say what the secondary lacks there is no other way back.
#[tokio::test]
async fn a_failover_that_is_undone_may_be_followed_by_a_copy_of_everything() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    primary.checkpoint().await;
    let disk = faults::of(&scratch.path("p.raw"));
    disk.upper.fail(Rule::new(Operation::Flush));
    guest.flush(FlushLevel::Durable).await.unwrap_err();
    secondary.command("failover", json!({ "hold": true })).await.unwrap();
    primary.wait("superseded", |s| s["link"] == "refused").await;
    guest.close();
    secondary.command("failover-rollback", json!({})).await.unwrap();
    let unknown = |s: &serde_json::Value| s["reason"].to_string().contains("is not known");
    primary.wait("what it lacks is not known", unknown).await;
    primary.command("resync", json!({ "full": true })).await.unwrap();
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    guest.close();
    primary.checkpoint().await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")), "the disks differ");
}

/// I8: nobody lets a guest go on that was stopped on a side which serves nobody any more.
#[tokio::test]
async fn i08_what_stop_holds_fails_when_the_secondary_takes_over() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    primary.checkpoint().await;
    primary.command("stop", json!({})).await.unwrap();
    let held_write = write(&guest, 0, 0x22);
    let device = Arc::clone(&guest);
    let held_read = tokio::spawn(async move { device.read(0, 512).await.map(drop) });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!held_write.is_finished() && !held_read.is_finished(), "the guest is stopped");
    secondary.command("failover", json!({})).await.unwrap();
    for held in [held_write, held_read] {
        let ended = tokio::time::timeout(Duration::from_secs(20), held).await;
        ended.expect("held for ever").unwrap().unwrap_err();
    }
    // Continued, it serves nobody either.
    primary.command("cont", json!({})).await.unwrap();
    guest.read(0, 512).await.unwrap_err();
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// A file system that others have filled has room for it then.
#[tokio::test]
async fn room_is_kept_for_a_failover_which_gives_it_back() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    let reserve = scratch.path("s.state/reserve");
    let kept = std::fs::metadata(&reserve).unwrap();
    let maps = std::fs::metadata(scratch.path("p.state/vda.maps")).unwrap().len();
    assert!(kept.len() > maps + (64 << 10), "the maps, and clusters of a top layer");
    assert!(std::os::unix::fs::MetadataExt::blocks(&kept) * 512 >= kept.len(), "with its blocks");
    // One that is refused gives nothing back.
    primary.checkpoint().await;
    primary.command("replication-stop", json!({})).await.unwrap();
    secondary.wait("disconnected", |s| s["link"] == "disconnected").await;
    assert!(reserve.exists());
    secondary.command("failover", json!({})).await.unwrap();
    assert!(!reserve.exists());
    primary.ended_by_stop().await.unwrap();
    secondary.stop().await;
}
