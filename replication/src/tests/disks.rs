//! Disks that come and go while something else begins or ends.
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill};
use super::{pass, write};
use crate::config::{Durability, SideConfig};
use crate::image::faults;
use crate::remove_disk_of_stopped;
use crate::side::CLOSE_LIMIT;
use crate::state::faults::{Faulty, Kind, watch};

fn here(scratch: &Scratch, disks: &[&str]) -> SideConfig {
    scratch.primary(disks.iter().map(|d| scratch.disk(d, &format!("p-{d}.raw"))).collect())
}

fn there(scratch: &Scratch, disks: &[&str]) -> SideConfig {
    scratch.secondary(disks.iter().map(|d| scratch.disk(d, &format!("s-{d}.raw"))).collect())
}

fn scratch(disks: &[&str]) -> Scratch {
    let scratch = Scratch::new();
    for (number, disk) in disks.iter().enumerate() {
        scratch.raw(&format!("p-{disk}.raw"), MIB, 1 + number as u8);
        scratch.raw(&format!("s-{disk}.raw"), MIB, 100 + number as u8);
    }
    scratch
}

fn added(scratch: &Scratch, disk: &str, file: &str) -> Value {
    json!({ "name": disk, "file": scratch.path(file), "format": "raw" })
}

/// A copy that has not begun when the checkpoint is given up is not forgotten.
#[tokio::test]
async fn a_disk_that_joins_is_copied_also_if_the_checkpoint_is_given_up_meanwhile() {
    let scratch = scratch(&["vda", "vdb"]);
    let secondary = Side::run(there(&scratch, &["vda", "vdb"]));
    let primary = Side::run(here(&scratch, &["vda", "vdb"]));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.command("disk-remove", json!({ "name": "vdb", "force": true })).await.unwrap();
    scratch.raw("new.raw", MIB, 77);
    secondary.command("disk-add", added(&scratch, "vdb", "new.raw")).await.unwrap();
    // Nothing but what joins would be left to be promoted.
    let only = secondary.command("disk-remove", json!({ "name": "vda", "force": true })).await;
    assert!(only.unwrap_err().to_string().contains("the last one"));
    let discard = json!({ "discard-checkpoint": true });
    secondary.command("replication-stop", discard).await.unwrap();
    secondary.ended().await.unwrap();

    let secondary = Side::run(there(&scratch, &["vda"]));
    let primary = Side::run(here(&scratch, &["vda", "vdb"]));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p-vda.raw")) == file(&scratch.path("s-vda.raw")));
    assert!(file(&scratch.path("p-vdb.raw")) == file(&scratch.path("new.raw")), "not copied");
}

/// The newest record in a state directory that is in use.
fn record(dir: &Path) -> Value {
    let bytes = file(&dir.join("state"));
    let slot = |base: usize| {
        let number = |at, len| bytes.get(base + at..base + at + len);
        let len = u32::from_be_bytes(number(12, 4)?.try_into().ok()?) as usize;
        let seq = u64::from_be_bytes(number(16, 8)?.try_into().ok()?);
        Some((seq, serde_json::from_slice(number(32, len)?).ok()?))
    };
    let newest = [0, 256 << 10].into_iter().filter_map(slot).max_by_key(|(seq, _)| *seq);
    newest.unwrap().1
}

/// The last session that a side has begun.
fn session(dir: &Path) -> Value {
    record(dir)["session"].clone()
}

/// Waits until another session has begun on the secondary.
async fn another_session(secondary: &Side, dir: &Path, before: Value) -> Value {
    secondary.wait("another session", |_| session(dir) != before).await;
    secondary.wait("another session", |s| s["link"] == "connected").await;
    session(dir)
}

/// A checkpoint that takes a disk out means the one that was there when its session began.
#[tokio::test]
async fn a_disk_that_was_removed_and_added_again_does_not_leave_with_the_old_one() {
    let scratch = scratch(&["vda", "vdb"]);
    let mut config = there(&scratch, &["vda"]);
    config.durability = Durability::Power;
    let secondary = Side::run(config.clone());
    let primary = Side::run(here(&scratch, &["vda"]));
    primary.wait_state("in-sync").await;

    // No session gets to its first commit.
    let disk = faults::of(&scratch.path("s-vda.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    secondary.command("disk-add", added(&scratch, "vdb", "s-vdb.raw")).await.unwrap();
    let dir = scratch.path("s.state");
    let mut before = session(&dir);
    primary.command("disk-add", added(&scratch, "vdb", "p-vdb.raw")).await.unwrap();
    before = another_session(&secondary, &dir, before).await;
    primary.wait("knows it", |s| s["disks"][1]["state"] == "joining").await;
    primary.command("disk-remove", json!({ "name": "vdb" })).await.unwrap();
    // It goes in the middle of a session that takes it out; one more with it may come before.
    loop {
        before = another_session(&secondary, &dir, before).await;
        match secondary.command("disk-remove", json!({ "name": "vdb" })).await {
            Ok(_) => break,
            Err(error) => assert!(error.to_string().contains("is replicated"), "{error}"),
        }
    }
    scratch.raw("new.raw", MIB, 77);
    secondary.command("disk-add", added(&scratch, "vdb", "new.raw")).await.unwrap();
    assert_eq!(session(&dir), before, "the checkpoint is that session's");
    hang.release();
    drop(disk);
    primary.checkpoint().await;
    let files = |s: &Value| {
        let disks = s["disks"].as_array().unwrap().iter();
        disks.map(|d| d["file"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let wanted = ["s-vda.raw", "new.raw"].map(|f| scratch.path(f).display().to_string());
    assert_eq!(files(&secondary.status().await), wanted);
    primary.checkpoint().await;
    primary.stop().await;
    secondary.stop().await;
    let record = record(&scratch.path("s.state"));
    assert_eq!(record["removed"].as_array().unwrap().len(), 0, "{record:#}");

    let secondary = Side::run(config);
    assert_eq!(files(&secondary.wait("up", |_| true).await), wanted);
    secondary.stop().await;
}

/// A start after a kill follows the record: it must not be told that a disk is there, and gone.
#[tokio::test]
async fn no_record_of_a_checkpoint_has_a_disk_that_is_being_removed() {
    let scratch = scratch(&["vda", "vdb"]);
    let mut config = there(&scratch, &["vda"]);
    config.durability = Durability::Power;
    let secondary = Arc::new(Side::run(config));
    let primary = Arc::new(Side::run(here(&scratch, &["vda"])));
    primary.wait_state("in-sync").await;
    let dir = scratch.path("s.state");
    let wrong = Arc::new(Mutex::new(Vec::new()));
    let names = |of: &Value| -> BTreeSet<String> {
        let names = of.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_owned());
        names.collect()
    };
    let look = {
        let (dir, wrong) = (dir.clone(), Arc::clone(&wrong));
        move || {
            let record = record(&dir);
            let (there, gone) = (names(&record["secondary"]["disks"]), names(&record["removed"]));
            if !there.is_disjoint(&gone) {
                wrong.lock().unwrap().push(record);
            }
        }
    };
    watch(&dir, Some(Arc::new(look)));
    let run = |side: &Arc<Side>, command: &'static str, arguments: Value| {
        let side = Arc::clone(side);
        tokio::spawn(async move { side.command(command, arguments).await.unwrap() })
    };
    let add = || secondary.command("disk-add", added(&scratch, "vdb", "s-vdb.raw"));
    let vdb = || json!({ "name": "vdb" });

    // It is removed while a checkpoint is about to be recorded.
    add().await.unwrap();
    let disk = faults::of(&scratch.path("s-vda.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush));
    let checkpoint = run(&primary, "checkpoint", json!({}));
    hang.reached(1).await;
    secondary.command("disk-remove", vdb()).await.unwrap();
    hang.release();
    checkpoint.await.unwrap();

    // A checkpoint is recorded while its removal is being put on stable storage.
    add().await.unwrap();
    let epoch = record(&dir)["com"]["epoch"].as_u64();
    let stuck = Faulty::stuck_beside(&dir, Kind::SyncBeside);
    let removal = run(&secondary, "disk-remove", vdb());
    stuck.reached().await;
    let checkpoint = run(&primary, "checkpoint", json!({}));
    secondary.wait("the checkpoint", |_| record(&dir)["com"]["epoch"].as_u64() > epoch).await;
    assert!(!removal.is_finished() && !checkpoint.is_finished());
    drop(stuck);
    removal.await.unwrap();
    checkpoint.await.unwrap();
    drop(disk);
    watch(&dir, None);
    assert_eq!(*wrong.lock().unwrap(), Vec::<Value>::new());
    Arc::into_inner(primary).unwrap().stop().await;
    Arc::into_inner(secondary).unwrap().stop().await;
}

/// A promoted side is not left with a disk that is none of what it was promoted to.
#[tokio::test]
async fn disks_that_were_to_come_or_go_during_a_failover_do_not_after_it() {
    let scratch = scratch(&["vda", "vdb", "vdc"]);
    let mut config = there(&scratch, &["vda", "vdb"]);
    config.durability = Durability::Power;
    let secondary = Arc::new(Side::run(config));
    let mut config = here(&scratch, &["vda", "vdb"]);
    config.durability = Durability::Power;
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.wait("the primary is gone", |s| s["link"] == "disconnected").await;

    let disk = faults::of(&scratch.path("s-vda.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush));
    let run = |command: &'static str, arguments: Value| {
        let secondary = Arc::clone(&secondary);
        tokio::spawn(async move { secondary.command(command, arguments).await })
    };
    let failover = run("failover", json!({ "to": "latest" }));
    hang.reached(1).await;
    let add = run("disk-add", added(&scratch, "vdc", "s-vdc.raw"));
    let remove = run("disk-remove", json!({ "name": "vdb", "force": true }));
    // They may have come to the door, or come later: it makes no difference.
    tokio::time::sleep(Duration::from_millis(100)).await;
    hang.release();
    failover.await.unwrap().unwrap();
    add.await.unwrap().unwrap_err();
    remove.await.unwrap().unwrap_err();
    let status = secondary.wait_state("promoted").await;
    assert_eq!(status["disks"].as_array().unwrap().len(), 2);
    let guest = connect(scratch.endpoint("s.sock"), "vdb").await;
    fill(&*guest, 0, 4096, 0x55).await;
    guest.close();
    drop(disk);
    Arc::into_inner(secondary).unwrap().stop().await;
}

/// The manager takes the forwarding child of one disk away, and the primary another disk.
#[tokio::test]
async fn a_child_that_was_removed_is_added_again_after_another_disk_has_gone() {
    let scratch = scratch(&["vda", "vdb"]);
    let secondary = Side::run(there(&scratch, &["vda", "vdb"]));
    let primary = Side::run(here(&scratch, &["vda", "vdb"]));
    primary.wait_state("in-sync").await;
    let change = async |what: Value| primary.command("x-blockdev-change", what).await;
    change(json!({ "parent": "vdb", "child": "children.1" })).await.unwrap();
    primary.command("disk-remove", json!({ "name": "vda" })).await.unwrap();
    change(json!({ "parent": "vdb", "node": "vdb-peer" })).await.unwrap();
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
}

/// A failover that is undone leaves the secondary that there was, which a disk was being added to.
#[tokio::test]
async fn a_disk_that_a_failover_left_out_is_added_again_when_that_is_undone() {
    let scratch = scratch(&["vda", "vdb"]);
    let secondary = Side::run(there(&scratch, &["vda"]));
    let primary = Side::run(here(&scratch, &["vda"]));
    primary.wait_state("in-sync").await;
    secondary.command("disk-add", added(&scratch, "vdb", "s-vdb.raw")).await.unwrap();
    primary.stop().await;
    let report = secondary.command("failover", json!({ "hold": true })).await.unwrap();
    assert_eq!(report["left-out"], json!(["vdb"]));
    secondary.command("failover-rollback", json!({})).await.unwrap();
    let both = |s: &Value| s["role"] == "secondary" && s["disks"].as_array().unwrap().len() == 2;
    secondary.wait("the secondary that it was", both).await;
    // Also for whoever starts it again.
    secondary.stop().await;
    let secondary = Side::run(there(&scratch, &["vda"]));
    let primary = Side::run(here(&scratch, &["vda", "vdb"]));
    primary.wait("in sync", |s| s["disks"][1]["state"] == "in-sync").await;
    primary.checkpoint().await;
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p-vdb.raw")) == file(&scratch.path("s-vdb.raw")), "not copied");
}

/// A commit that is being put on stable storage when its session ends is carried out all the same.
#[tokio::test]
async fn a_disk_that_leaves_is_gone_also_if_the_session_ends_meanwhile() {
    let scratch = scratch(&["vda", "vdb"]);
    let mut config = there(&scratch, &["vda", "vdb"]);
    config.durability = Durability::Power;
    let secondary = Side::run(config);
    let primary = Side::run(here(&scratch, &["vda", "vdb"]));
    primary.wait_state("in-sync").await;
    let disk = faults::of(&scratch.path("s-vda.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    let dir = scratch.path("s.state");
    let before = session(&dir);
    primary.command("disk-remove", json!({ "name": "vdb" })).await.unwrap();
    another_session(&secondary, &dir, before).await;
    let first = record(&dir)["epoch"].as_u64().unwrap();
    secondary.wait("cut", |s| s["epoch"].as_u64() > Some(first)).await;
    let stuck = Faulty::stuck_sync(&dir);
    hang.release();
    stuck.reached().await;

    // Another session is to begin.
    primary.stop().await;
    let primary = Side::run(here(&scratch, &["vda"]));
    secondary.wait("ends the session", |s| s["link"] == "disconnected").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stuck);
    primary.wait_state("in-sync").await;
    scratch.raw("new.raw", MIB, 77);
    let added = secondary.command("disk-add", added(&scratch, "vdb", "new.raw")).await.unwrap();
    assert_eq!(added["changed"], true);
    drop(disk);
    primary.stop().await;
    secondary.stop().await;
}

/// What the promoted side writes is counted in maps that the end of the last commit must not remove.
#[tokio::test]
async fn a_promotion_waits_for_the_commit_that_has_begun() {
    let scratch = scratch(&["vda"]);
    let mut config = there(&scratch, &["vda"]);
    config.durability = Durability::Power;
    let secondary = Arc::new(Side::run(config));
    let primary = Arc::new(Side::run(here(&scratch, &["vda"])));
    primary.wait_state("in-sync").await;
    let disk = faults::of(&scratch.path("s-vda.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush));
    let run = |side: &Arc<Side>, command: &'static str| {
        let side = Arc::clone(side);
        tokio::spawn(async move { side.command(command, json!({})).await })
    };
    let checkpoint = run(&primary, "checkpoint");
    hang.reached(1).await;
    let stuck = Faulty::stuck_sync(&scratch.path("s.state"));
    hang.release();
    stuck.reached().await;
    let failover = run(&secondary, "failover");
    secondary.wait("ends the session", |s| s["link"] == "disconnected").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stuck);
    failover.await.unwrap().unwrap();
    drop(checkpoint.await.unwrap());
    secondary.wait_state("promoted").await;
    assert!(scratch.path("s.state").join("vda.maps").exists(), "no maps");
    drop(disk);
    drop(Arc::into_inner(primary).unwrap().ended_by_stop().await);
    Arc::into_inner(secondary).unwrap().stop().await;
}

/// A start would need it; and whatever the group has is not to be given up for it.
#[tokio::test]
async fn a_side_that_has_lost_the_file_of_a_disk_can_go_on_without_it() {
    let scratch = scratch(&["vda", "vdb"]);
    let secondary = Side::run(there(&scratch, &["vda"]));
    let primary = Side::run(here(&scratch, &["vda"]));
    primary.wait_state("in-sync").await;
    secondary.command("disk-add", added(&scratch, "vdb", "s-vdb.raw")).await.unwrap();
    primary.command("disk-add", added(&scratch, "vdb", "p-vdb.raw")).await.unwrap();
    let both = |s: &Value| s["disks"][1]["state"] == "in-sync";
    primary.wait("both", both).await;
    let (p_state, s_state) = (scratch.path("p.state"), scratch.path("s.state"));
    let runs = remove_disk_of_stopped(&s_state, "vdb", true).unwrap_err().to_string();
    assert!(runs.contains("another brep runs"), "{runs}");
    primary.stop().await;
    secondary.stop().await;

    // The secondary's is lost: the checkpoint is not changed without consent.
    std::fs::remove_file(scratch.path("s-vdb.raw")).unwrap();
    Side::run(there(&scratch, &["vda"])).ended().await.unwrap_err();
    let held = remove_disk_of_stopped(&s_state, "vdb", false).unwrap_err().to_string();
    assert!(held.contains("the last checkpoint holds disk vdb"), "{held}");
    assert!(remove_disk_of_stopped(&s_state, "vdb", true).unwrap());
    assert!(!remove_disk_of_stopped(&s_state, "vdb", true).unwrap(), "it is gone already");
    let last = remove_disk_of_stopped(&s_state, "vda", true).unwrap_err().to_string();
    assert!(last.contains("the last one"), "{last}");
    let left = |dir: &Path| {
        let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().starts_with("vdb")).count()
    };
    assert_eq!(left(&s_state), 0, "its buffers");
    let secondary = Side::run(there(&scratch, &["vda"]));
    let primary = Side::run(here(&scratch, &["vda"]));
    let lacks = primary.wait("it is told", |s| s["link"] == "refused").await;
    assert!(lacks["reason"].as_str().unwrap().contains("vdb is not on the secondary"), "{lacks}");
    scratch.raw("s-vdb.raw", MIB, 77);
    secondary.command("disk-add", added(&scratch, "vdb", "s-vdb.raw")).await.unwrap();
    primary.wait("both again", both).await;
    primary.stop().await;

    // The primary's is lost: the secondary follows.
    std::fs::remove_file(scratch.path("p-vdb.raw")).unwrap();
    Side::run(here(&scratch, &["vda"])).ended().await.unwrap_err();
    let last_copy = remove_disk_of_stopped(&p_state, "vdb", false).unwrap_err().to_string();
    assert!(last_copy.contains("brep failover there"), "{last_copy}");
    assert!(remove_disk_of_stopped(&p_state, "vdb", true).unwrap());
    assert_eq!(left(&p_state), 0, "its maps");
    let primary = Side::run(here(&scratch, &["vda", "vdb"]));
    primary.wait_state("in-sync").await;
    let one = |s: &Value| s["disks"].as_array().unwrap().len() == 1;
    assert!(one(&primary.status().await));
    secondary.wait("it follows", one).await;
    primary.stop().await;
    secondary.stop().await;
}

/// The others are not to wait for storage that nobody wants any more, nor is who has removed it.
#[tokio::test]
async fn a_disk_of_a_primary_that_cannot_be_closed_holds_nobody_up() {
    let scratch = scratch(&["vda", "vdb"]);
    let mut config = here(&scratch, &["vda", "vdb"]);
    config.peer = None;
    let primary = Arc::new(Side::run(config));
    primary.wait("up", |s| s["role"] == "primary").await;
    let disk = faults::of(&scratch.path("p-vdb.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    let removal = {
        let primary = Arc::clone(&primary);
        tokio::spawn(async move { primary.command("disk-remove", json!({ "name": "vdb" })).await })
    };
    hang.reached(1).await;
    let resize = json!({ "device": "vda", "size": 2 * MIB });
    primary.command("block_resize", resize).await.unwrap();
    assert!(!removal.is_finished(), "it is still being closed");
    pass(CLOSE_LIMIT).await;
    let error = removal.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("vdb, which was removed, is still being closed"), "{error}");
    assert_eq!(primary.status().await["disks"].as_array().unwrap().len(), 1);
    hang.release();
    drop(disk);
    // As soon as it is closed.
    primary.command("disk-add", added(&scratch, "vdb", "p-vdb.raw")).await.unwrap();
    Arc::into_inner(primary).unwrap().stop().await;
}

/// Maps are made anew for a disk that is added.
#[tokio::test]
async fn a_file_of_the_state_directory_is_no_disk() {
    let scratch = scratch(&["vda"]);
    let mut config = here(&scratch, &["vda"]);
    config.peer = None;
    let primary = Side::run(config);
    primary.wait("up", |s| s["role"] == "primary").await;
    for file in ["vdb.maps", "vda.maps"] {
        let file = scratch.path("p.state").join(file);
        std::fs::OpenOptions::new().create(true).append(true).open(&file).unwrap();
        let what = json!({ "name": "vdb", "file": file, "format": "raw" });
        primary.command("disk-add", what).await.unwrap_err();
        assert!(file.exists());
    }
    primary.stop().await;
}

/// It needs no restart for that, under which its guest would suffer.
#[tokio::test]
async fn a_side_that_was_promoted_takes_disks_when_it_is_merged() {
    let scratch = scratch(&["vda", "vdb"]);
    let mut config = there(&scratch, &["vda"]);
    config.peer = Some(scratch.endpoint("t.sock").into());
    let promoted = Side::run(config.clone());
    let old = Side::run(here(&scratch, &["vda"]));
    old.wait_state("in-sync").await;
    let hang = {
        let disk = faults::of(&scratch.path("s-vda.raw"));
        let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
        fill(&*guest, 0, 4096, 0x11).await;
        guest.close();
        old.stop().await;
        disk.upper.hang(Rule::new(Operation::Write).forever())
    };
    promoted.command("failover", json!({})).await.unwrap();
    hang.reached(1).await;
    let add = async || promoted.command("disk-add", added(&scratch, "vdb", "s-vdb.raw")).await;
    let error = add().await.unwrap_err().to_string();
    assert!(error.contains("when it has been merged"), "{error}");
    hang.release();
    promoted.wait_state("promoted").await;
    // What is left of the merge takes a moment more.
    let until = tokio::time::Instant::now() + Duration::from_secs(30);
    while let Err(error) = add().await {
        assert!(tokio::time::Instant::now() < until, "{error}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let guest = connect(scratch.endpoint("s.sock"), "vdb").await;
    fill(&*guest, 0, 4096, 0x22).await;
    let used = promoted.command("disk-remove", json!({ "name": "vdb" })).await.unwrap_err();
    assert!(used.to_string().contains("in use"), "{used}");
    // It is a disk like the others: the guest that is stopped does not write to it.
    promoted.command("stop", json!({})).await.unwrap();
    let held = write(&guest, 4096, 0x33);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!held.is_finished());
    promoted.command("cont", json!({})).await.unwrap();
    held.await.unwrap().unwrap();
    guest.close();
    let remove = json!({ "name": "vdb", "force": true });
    promoted.command("disk-remove", remove).await.unwrap();
    assert_eq!(promoted.status().await["disks"].as_array().unwrap().len(), 1);
    add().await.unwrap();

    let mut third = there(&scratch, &["vda", "vdb"]);
    third.listen = Some(scratch.endpoint("t.sock"));
    third.state_dir = scratch.path("t.state");
    for disk in &mut third.disks {
        scratch.raw(&format!("t-{}.raw", disk.name), MIB, 55);
        disk.path = scratch.path(&format!("t-{}.raw", disk.name));
    }
    let third = Side::run(third);
    let both = |s: &Value| s["disks"][1]["state"] == "in-sync" && s["link"] == "connected";
    promoted.wait("a new secondary", both).await;
    let guest = connect(scratch.endpoint("s.sock"), "vdb").await;
    fill(&*guest, 8192, 4096, 0x44).await;
    guest.close();
    promoted.checkpoint().await;
    promoted.stop().await;
    third.stop().await;
    for disk in ["vda", "vdb"] {
        let [here, there] = ["s", "t"].map(|side| scratch.path(&format!("{side}-{disk}.raw")));
        assert!(file(&here) == file(&there), "{disk}");
    }
    assert_eq!(file(&scratch.path("s-vdb.raw"))[8192], 0x44);
    // As the primary that it is now.
    let again = Side::run(config);
    let two = |s: &Value| s["disks"].as_array().is_some_and(|disks| disks.len() == 2);
    again.wait("both disks", two).await;
    again.stop().await;
}
