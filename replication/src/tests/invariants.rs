use std::time::{Duration, Instant};

use brep_block::{BlockDevice, Operation, Rule, WriteFlags};
use bytes::Bytes;
use serde_json::json;

use super::common::{connect, file, fill, read};
use super::{Pair, write};

/// I1: a write that the local disk refused fails to the guest, although the secondary has it. It
/// is read back and sent again before the next commit, so a checkpoint never contains it.
#[tokio::test]
async fn i01_a_write_that_the_local_disk_refused_fails_and_is_taken_back_on_the_secondary() {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    local.upper.fail(Rule::new(Operation::Write));
    write(&guest, 8192, 0x66).await.unwrap().unwrap_err();
    let status = primary.status().await;
    assert_eq!(status["disks"][0]["bytes-behind"], 65536, "one granule: {status}");
    assert_eq!(status["errors"][0]["offset"], 8192, "I13: {status}");
    primary.checkpoint().await;
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I2, I13: a write that the secondary refused does not fail to the guest; no checkpoint is
/// committed without it, it is reported, and `latest` is not offered before it was sent again.
#[tokio::test]
async fn i02_i13_a_write_that_the_secondary_refused_is_reported_and_holds_the_commit_up() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let before = secondary.status().await["checkpoint"].clone();
    disk.upper.fail(Rule::new(Operation::Write).forever());
    write(&guest, 8192, 0x66).await.unwrap().unwrap();
    let status = secondary.status().await;
    assert_eq!(status["latest-ok"], false, "{status}");
    assert_eq!(status["errors"][0]["operation"], "write", "{status}");
    assert_eq!(primary.status().await["errors"][0]["offset"], 8192);
    primary.command("checkpoint", json!({})).await.unwrap_err();
    assert_eq!(secondary.status().await["checkpoint"], before);
    disk.upper.clear();
    primary.checkpoint().await;
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    assert_eq!(secondary.status().await["latest-ok"], true);
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I4: nothing is overwritten whose pre-image could not be kept.
#[tokio::test]
async fn i04_what_cannot_be_kept_is_not_overwritten() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    primary.checkpoint().await;
    let checkpoint = file(&scratch.path("s.raw"));
    disk.upper.fail(Rule::new(Operation::Read).forever());
    write(&guest, 8192, 0x66).await.unwrap().unwrap();
    assert_eq!(file(&scratch.path("s.raw")), checkpoint);
    disk.upper.clear();
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I6: a read of the secondary's guest that races with a primary's write, copied and not yet
/// landed or landed, shows the checkpoint.
#[tokio::test]
async fn i06_the_secondarys_guest_never_sees_a_newer_write() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::with_guest().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let other = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;
    // The read has looked its place up, and is about to read the disk below.
    let hang = disk.upper.hang(Rule::new(Operation::Read));
    let racing = {
        let other = std::sync::Arc::clone(&other);
        tokio::spawn(async move { other.read(8192, 4096).await })
    };
    hang.reached(1).await;
    let newer = write(&guest, 8192, 0x66);
    tokio::time::sleep(Duration::from_millis(300)).await;
    hang.release();
    assert_eq!(racing.await.unwrap().unwrap(), vec![0x11; 4096]);
    newer.await.unwrap().unwrap();
    assert_eq!(read(&*other, 8192, 4096).await, vec![0x11; 4096]);
    other.close();
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I8: a peer that hangs delays no read, and a write for the peer timeout at most; then it is
/// lost, and what it lacks is counted.
#[tokio::test]
async fn i08_a_peer_that_hangs_delays_no_read_and_a_write_only_for_so_long() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let hang = disk.upper.hang(Rule::new(Operation::Write).forever());
    let begun = Instant::now();
    let stuck = write(&guest, 8192, 0x66);
    hang.reached(1).await;
    read(&*guest, 8192, 4096).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "a read waited for the peer");
    stuck.await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let status = primary.wait_state("disconnected").await;
    assert_eq!(status["disks"][0]["bytes-behind"], 65536, "I9: {status}");
    hang.release();
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I2: a checkpoint waits for the writes before it, and what comes after it is not in it.
#[tokio::test]
async fn i02_a_cut_waits_for_the_writes_before_it_and_holds_those_after_it_back() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    let hang = disk.upper.hang(Rule::new(Operation::Write));
    let before = write(&guest, 8192, 0x22);
    hang.reached(1).await;
    let mut checkpoint = Box::pin(primary.command("checkpoint", json!({})));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut checkpoint).await;
    assert!(early.is_err(), "a checkpoint without a write that came before it");
    let after = write(&guest, 16384, 0x33);
    tokio::time::sleep(Duration::from_millis(100)).await;
    hang.release();
    checkpoint.await.unwrap();
    before.await.unwrap().unwrap();
    after.await.unwrap().unwrap();
    guest.close();
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    let disk = file(&scratch.path("s.raw"));
    assert_eq!(disk[8192..12288], vec![0x22; 4096]);
    assert_eq!(disk[16384..20480], vec![0x11; 4096]);
    secondary.stop().await;
}

/// I10: while everything is copied again, the last checkpoint stays what a failover gives.
#[tokio::test]
async fn i10_the_last_checkpoint_stays_promotable_during_a_resync() {
    let Pair { scratch, primary, secondary, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    primary.checkpoint().await;
    let checkpoint = file(&scratch.path("p.raw"));
    // I5: these pre-images are in the buffer that the restarted secondary goes on with.
    fill(&*guest, 0, 65536, 0x44).await;
    secondary.stop().await;
    primary.wait_state("disconnected").await;
    guest.write(0, Bytes::from(vec![0x22; 1 << 20]), WriteFlags::default()).await.unwrap();
    let secondary = super::Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    secondary.wait("up", |s| s["promotable"] == true).await;
    let disk = crate::image::faults::of(&scratch.path("s.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Write).range(524_288..528_384).forever());
    // The resync begins by itself, unless it has begun already, before the fault.
    hang.reached(1).await;
    assert_eq!(secondary.status().await["promotable"], true);
    let error = secondary.command("failover", json!({ "to": "latest" })).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    let failover = secondary.command("failover", json!({}));
    let (failover, ()) = tokio::join!(failover, async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        hang.release();
    });
    failover.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&scratch.path("s.raw")), checkpoint);
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I3: a cut that was never committed changes nothing for a failover, also after a restart: the
/// secondary finds what the uncommitted epoch overwrote in the buffer that was the next.
#[tokio::test]
async fn i03_a_cut_without_a_commit_leaves_the_checkpoint_before_it() {
    let Pair { scratch, primary, secondary, disk, .. } = Pair::with_guest().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let other = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    fill(&*guest, 0, 65536, 0x11).await;
    let epoch = primary.checkpoint().await;
    let checkpoint = file(&scratch.path("p.raw"));
    fill(&*guest, 0, 8192, 0x22).await;
    // The commit has to wait for the secondary's guest.
    let hang = disk.upper.hang(Rule::new(Operation::Read).range(524_288..528_384));
    let stuck = tokio::spawn(async move {
        // The secondary stops while it waits: whatever it gets.
        let _ = other.read(524_288, 4096).await;
    });
    hang.reached(1).await;
    primary.command("checkpoint", json!({ "wait": "cut" })).await.unwrap();
    fill(&*guest, 4096, 8192, 0x33).await;
    drop(disk);
    let stopping = tokio::spawn(secondary.stop());
    tokio::time::sleep(Duration::from_millis(300)).await;
    hang.release();
    stopping.await.unwrap();
    stuck.await.unwrap();
    guest.close();
    primary.stop().await;

    let secondary = super::Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let status = secondary.wait("up", |s| s["promotable"] == true).await;
    assert_eq!(status["checkpoint"], epoch);
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&scratch.path("s.raw")), checkpoint);
    secondary.stop().await;
}

/// A range that cannot be read is reported and keeps a copy from ending; it ends nothing else.
#[tokio::test]
async fn a_range_that_cannot_be_read_keeps_a_resync_from_ending_and_the_session_alive() {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    secondary.stop().await;
    primary.wait_state("disconnected").await;
    primary.command("resync", json!({ "full": true })).await.unwrap();
    local.upper.fail(Rule::new(Operation::Read).range(524_288..528_384).forever());
    let secondary = super::Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let copied = |s: &serde_json::Value| s["errors"][0]["operation"] == "read";
    let status = primary.wait("reported", copied).await;
    assert_eq!(status["link"], "connected", "{status}");
    assert_eq!(status["disks"][0]["state"], "resyncing", "{status}");
    local.upper.clear();
    primary.wait_state("in-sync").await;
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    primary.stop().await;
    secondary.stop().await;
}

/// I1, I2: what the local disk may still refuse is in no checkpoint.
#[tokio::test]
async fn i02_a_cut_waits_for_the_local_disk_too() {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let hang = local.upper.hang(Rule::new(Operation::Write));
    local.lower.fail(Rule::new(Operation::Write));
    let before = write(&guest, 8192, 0x22);
    hang.reached(1).await;
    let mut checkpoint = Box::pin(primary.command("checkpoint", json!({})));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut checkpoint).await;
    assert!(early.is_err(), "a checkpoint of a write that the local disk does not have");
    hang.release();
    before.await.unwrap().unwrap_err();
    checkpoint.await.unwrap();
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I7: a write that the local disk has not ended holds an overlapping one up, so that both sides
/// carry them out in one order.
#[tokio::test]
async fn i07_overlapping_writes_happen_in_one_order_on_both_sides() {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let hang = local.upper.hang(Rule::new(Operation::Write));
    let first = write(&guest, 8192, 0x22);
    hang.reached(1).await;
    let second = write(&guest, 10_240, 0x33);
    tokio::time::sleep(Duration::from_millis(200)).await;
    hang.release();
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}
