//! A file system that hangs, and what goes on all the same.
use std::sync::Arc;
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect};
use super::write;
use crate::image::faults;
use crate::state::faults::{Faulty, Kind};

const LIMIT: Duration = Duration::from_secs(20);

/// A pair with two disks, in sync, whose second one hangs on the secondary when it is closed.
async fn pair(scratch: &Scratch) -> (Side, Side) {
    for (name, byte) in [("p-vda", 1), ("p-vdb", 2), ("s-vda", 3), ("s-vdb", 4)] {
        scratch.raw(&format!("{name}.raw"), MIB, byte);
    }
    let disks = |side: &str| {
        ["vda", "vdb"].map(|disk| scratch.disk(disk, &format!("{side}-{disk}.raw"))).to_vec()
    };
    let secondary = Side::run(scratch.secondary(disks("s")));
    let primary = Side::run(scratch.primary(disks("p")));
    primary.wait_state("in-sync").await;
    (primary, secondary)
}

/// I3, I17: the record that lets a disk go is all that a commit is about.
#[tokio::test]
async fn i03_a_disk_that_leaves_and_hangs_holds_up_neither_checkpoints_nor_a_failover() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let disk = faults::of(&scratch.path("s-vdb.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    primary.command("disk-remove", json!({ "name": "vdb" })).await.unwrap();
    secondary.wait("gone", |s| s["disks"].as_array().unwrap().len() == 1).await;
    hang.reached(1).await;
    let checkpoint = tokio::time::timeout(LIMIT, primary.checkpoint()).await;
    checkpoint.expect("the checkpoint waits for a disk that has gone");
    primary.stop().await;
    let failover = tokio::time::timeout(LIMIT, secondary.command("failover", json!({}))).await;
    failover.expect("the failover waits for a disk that has gone").unwrap();
    hang.release();
    drop(disk);
    secondary.stop().await;
}

/// The same on the side that it is taken out of by command, whose answer may take its time.
#[tokio::test]
async fn i03_a_disk_that_is_taken_out_and_hangs_does_not_hold_up_a_failover() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let secondary = Arc::new(secondary);
    primary.stop().await;
    let disk = faults::of(&scratch.path("s-vdb.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    let removing = tokio::spawn({
        let secondary = Arc::clone(&secondary);
        async move { secondary.command("disk-remove", json!({ "name": "vdb", "force": true })).await }
    });
    hang.reached(1).await;
    let failover = secondary.command("failover", json!({}));
    let failover = tokio::time::timeout(Duration::from_secs(8), failover).await;
    failover.expect("the failover waits for a disk that has gone").unwrap();
    hang.release();
    assert_eq!(removing.await.unwrap().unwrap()["changed"], true);
    drop(disk);
    Arc::into_inner(secondary).unwrap().stop().await;
}

/// What has its name or its file is not opened before it is closed.
#[tokio::test]
async fn a_disk_that_is_still_being_closed_is_not_added_again() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let disk = faults::of(&scratch.path("s-vdb.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    primary.command("disk-remove", json!({ "name": "vdb" })).await.unwrap();
    secondary.wait("gone", |s| s["disks"].as_array().unwrap().len() == 1).await;
    hang.reached(1).await;
    let file = scratch.path("s-vdb.raw");
    let again = json!({ "name": "vdb", "file": file, "format": "raw" });
    let error = secondary.command("disk-add", again.clone()).await.unwrap_err().to_string();
    assert!(error.contains("still being closed"), "{error}");
    scratch.raw("s-vdc.raw", MIB, 5);
    let other = json!({ "name": "vdc", "file": scratch.path("s-vdc.raw"), "format": "raw" });
    assert_eq!(secondary.command("disk-add", other).await.unwrap()["changed"], true);
    hang.release();
    drop(disk);
    assert_eq!(secondary.command("disk-add", again).await.unwrap()["changed"], true);
    primary.stop().await;
    secondary.stop().await;
}

/// Nor if it goes while the addition waits for it to have gone.
#[tokio::test]
async fn a_disk_that_goes_while_its_name_is_added_is_closed_first() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let secondary = Arc::new(secondary);
    primary.stop().await;
    let dir = scratch.path("s.state");
    let run = |command: &'static str, arguments: Value| {
        let secondary = Arc::clone(&secondary);
        tokio::spawn(async move { secondary.command(command, arguments).await })
    };
    let stuck = Faulty::stuck_beside(&dir, Kind::SyncBeside);
    let removing = run("disk-remove", json!({ "name": "vdb", "force": true }));
    stuck.reached().await;
    let disk = faults::of(&scratch.path("s-vdb.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Flush).forever());
    scratch.raw("other.raw", MIB, 5);
    let other = json!({ "name": "vdb", "file": scratch.path("other.raw"), "format": "raw" });
    let adding = run("disk-add", other);
    // It waits for the lock, or for the disk: it has been asked, and cannot be done.
    secondary.command("query-status", json!({})).await.unwrap();
    assert!(!adding.is_finished());
    drop(stuck);
    hang.reached(1).await;
    let error = adding.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("still being closed"), "{error}");
    hang.release();
    drop(disk);
    removing.await.unwrap().unwrap();
    Arc::into_inner(secondary).unwrap().stop().await;
}

/// A primary whose thread may hang, and its secondary, in sync.
async fn threads(scratch: &Scratch) -> (Side, Side) {
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run_in_thread(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    (primary, secondary)
}

#[tokio::test]
async fn queries_are_answered_while_the_maps_of_a_disk_that_grows_hang() {
    let scratch = Scratch::new();
    let (primary, secondary) = threads(&scratch).await;
    let primary = Arc::new(primary);
    let stuck = Faulty::stuck_beside(&scratch.path("p.state"), Kind::Maps);
    let growing = tokio::spawn({
        let primary = Arc::clone(&primary);
        async move { primary.command("block_resize", json!({ "device": "vda", "size": 2 * MIB })).await }
    });
    stuck.reached().await;
    let status = tokio::time::timeout(LIMIT, primary.status()).await;
    let status = status.expect("the status waits for the state directory");
    assert_eq!(
        (&status["disks"][0]["size"], &status["disks"][0]["bytes-behind"]),
        (&json!(MIB), &json!(0))
    );
    assert!(!growing.is_finished(), "it hangs all the time");
    drop(stuck);
    growing.await.unwrap().unwrap();
    primary.wait("grown", |s| s["disks"][0]["size"] == 2 * MIB).await;
    primary.wait_state("in-sync").await;
    Arc::into_inner(primary).unwrap().stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn queries_are_answered_while_the_maps_of_a_side_that_ends_hang() {
    let scratch = Scratch::new();
    let (primary, secondary) = threads(&scratch).await;
    let stuck = Faulty::stuck_beside(&scratch.path("p.state"), Kind::Maps);
    let control = primary.control.clone();
    let stopping = tokio::spawn(primary.stop());
    stuck.reached().await;
    let status = tokio::task::spawn_blocking(move || {
        let mut client = crate::control::ControlClient::connect(&control, LIMIT).unwrap();
        client.execute("query-status", json!({}))
    });
    let status = tokio::time::timeout(LIMIT, status).await;
    // Whether that is the state, or that this side ends.
    if let Ok(status) = status.expect("it waits for the state directory").unwrap() {
        assert_eq!(status["disks"].as_array().unwrap().len(), 1, "{status:#}");
    }
    assert!(!stopping.is_finished(), "it hangs all the time");
    drop(stuck);
    stopping.await.unwrap();
    secondary.stop().await;
}

#[tokio::test]
async fn the_status_of_a_held_failover_does_not_wait_for_the_file_system() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    primary.stop().await;
    let stuck = Faulty::stuck_beside(&scratch.path("s.state"), Kind::Space);
    secondary.command("failover", json!({ "hold": true })).await.unwrap();
    stuck.reached().await;
    let status = secondary.status().await;
    assert_eq!(status["held"]["space-bytes"], Value::Null, "{status:#}");
    let guest = connect(scratch.endpoint("s.sock"), "vda").await;
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    guest.close();
    drop(stuck);
    secondary.wait("room", |s| s["held"]["space-bytes"].as_u64() > Some(0)).await;
    secondary.stop().await;
}
