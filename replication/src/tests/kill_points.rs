//! Both sides are killed at each moment at which one of them has just saved its record, and found
//! again: whatever the two records say together leads to a pair, and nothing acknowledged is lost.
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::common::{MIB, Scratch, Side, connect, copy_dir, file, fill};
use crate::config::{DiskConfig, Role, SideConfig};
use crate::remove_disk_of_stopped;
use crate::state::RecordStore;
use crate::state::faults::watch;

/// Where a write of 4096 bytes was, and of what.
type Write = (u64, u8);

const DISKS: [&str; 4] = ["p.raw", "s.raw", "p2.raw", "s2.raw"];

/// What a kill would leave of both sides, and what had been acknowledged.
struct Point {
    files: Scratch,
    acknowledged: Vec<Write>,
}

/// What kills would leave at each save of a record.
struct Points {
    taken: Arc<Mutex<Vec<Point>>>,
    acknowledged: Arc<Mutex<Vec<Write>>>,
}

impl Points {
    fn watch(scratch: &Scratch, acknowledged: &[Write]) -> Self {
        let acknowledged = Arc::new(Mutex::new(acknowledged.to_vec()));
        let points = Points { taken: Arc::default(), acknowledged };
        let (taken, acknowledged) = (Arc::clone(&points.taken), Arc::clone(&points.acknowledged));
        let root = scratch.path("");
        let look: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            let files = Scratch::new();
            for disk in DISKS.into_iter().filter(|disk| root.join(disk).exists()) {
                std::fs::copy(root.join(disk), files.path(disk)).unwrap();
            }
            for dir in ["p.state", "s.state"] {
                copy_dir(&root.join(dir), &files.path(dir));
            }
            let acknowledged = acknowledged.lock().unwrap().clone();
            taken.lock().unwrap().push(Point { files, acknowledged });
        });
        watch(&scratch.path("p.state"), Some(Arc::clone(&look)));
        watch(&scratch.path("s.state"), Some(look));
        points
    }

    async fn write(&self, scratch: &Scratch, socket: &str, write: Write) {
        write_to(scratch, socket, write).await;
        self.acknowledged.lock().unwrap().push(write);
    }

    fn taken(self, scratch: &Scratch) -> Vec<Point> {
        watch(&scratch.path("p.state"), None);
        watch(&scratch.path("s.state"), None);
        std::mem::take(&mut self.taken.lock().unwrap())
    }
}

async fn write_to(scratch: &Scratch, socket: &str, (offset, byte): Write) {
    let guest = connect(scratch.endpoint(socket), "vda").await;
    fill(&*guest, offset, 4096, byte).await;
    guest.close();
}

/// The disks of a side, as far as there are files.
fn disks(scratch: &Scratch, files: [&str; 2]) -> Vec<DiskConfig> {
    let there = ["vda", "vdb"].into_iter().zip(files);
    let there = there.filter(|(_, file)| scratch.path(file).exists());
    there.map(|(name, file)| scratch.disk(name, file)).collect()
}

/// The side that was the primary, as it is started for `role`.
fn here(scratch: &Scratch, role: Role) -> SideConfig {
    let config = scratch.primary(disks(scratch, ["p.raw", "p2.raw"]));
    SideConfig { role, listen: Some(scratch.endpoint("p.sock")), ..config }
}

fn there(scratch: &Scratch) -> SideConfig {
    let config = scratch.secondary(disks(scratch, ["s.raw", "s2.raw"]));
    SideConfig { peer: Some(scratch.endpoint("p.sock").into()), ..config }
}

fn serves(status: &Value) -> bool {
    status["role"] != "secondary"
}

fn in_sync(status: &Value) -> bool {
    let disk = &status["disks"][0];
    serves(status) && disk["state"] == "in-sync" && disk["merging"].is_null()
}

/// Brings the pair together as the docs say, and takes it apart.
async fn recover(what: String, point: &Point, role: Role) {
    let scratch = &point.files;
    let sides = [Side::run(here(scratch, role)), Side::run(there(scratch))];
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut nobody_since = None;
    loop {
        let ask = |side: usize| sides[side].command("query-status", json!({}));
        let (Ok(a), Ok(b)) = tokio::join!(ask(0), ask(1)) else {
            assert!(Instant::now() < deadline, "{what}: no answers");
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        if in_sync(&a) != in_sync(&b) && serves(&a) != serves(&b) {
            break;
        }
        assert!(Instant::now() < deadline, "{what}: {a:#} {b:#}");
        // Nobody is the disk: the operator says who is.
        if serves(&a) || serves(&b) {
            nobody_since = None;
        } else if *nobody_since.get_or_insert(Instant::now()) + Duration::from_millis(300)
            < Instant::now()
        {
            sides[1].command("failover", json!({})).await.expect(&what);
        }
        sleep(Duration::from_millis(20)).await;
    }
    let [a, b] = sides;
    a.stop().await;
    b.stop().await;
    let disks = ["p.raw", "s.raw"].map(|disk| file(&scratch.path(disk)));
    assert!(disks[0] == disks[1], "{what}: in sync, and the disks differ");
    for (offset, byte) in &point.acknowledged {
        let at = *offset as usize;
        assert_eq!(disks[0][at..at + 4096], [*byte; 4096], "{what}: a write at {at} is lost");
    }
}

async fn recover_all(points: Vec<Point>, least: usize, role: Role) {
    assert!(points.len() >= least, "{} saves", points.len());
    let all = points.iter().enumerate();
    join_all(all.map(|(n, point)| recover(format!("save {n}"), point, role))).await;
}

/// Part of the checkpoint that [`pair`] ends with.
const FIRST: Write = (8192, 0x5a);

/// A pair in sync.
async fn pair() -> (Scratch, Side, Side) {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    pair_of(scratch).await
}

async fn pair_of(scratch: Scratch) -> (Scratch, Side, Side) {
    let sides = (Side::run(here(&scratch, Role::Primary)), Side::run(there(&scratch)));
    sides.0.wait_state("in-sync").await;
    write_to(&scratch, "p-guest.sock", FIRST).await;
    sides.0.checkpoint().await;
    (scratch, sides.0, sides.1)
}

#[tokio::test]
async fn i16_kills_at_each_record_of_a_switchover() {
    let (scratch, here, there) = pair().await;
    let points = Points::watch(&scratch, &[FIRST]);
    here.command("switchover", json!({})).await.unwrap();
    there.wait("in sync", in_sync).await;
    let points = points.taken(&scratch);
    here.stop().await;
    there.stop().await;
    recover_all(points, 8, Role::Primary).await;
}

/// The side that has made room is told to be the disk, because the other one is gone. That one comes back
/// as its secondary: it has committed the last checkpoint, and nothing else.
#[tokio::test]
async fn i09_a_side_that_made_room_and_is_promoted_is_the_newer_one() {
    let (scratch, old, new) = pair().await;
    let points = Points::watch(&scratch, &[FIRST]);
    old.command("switchover", json!({})).await.unwrap();
    new.wait("in sync", in_sync).await;
    let points = points.taken(&scratch);
    old.stop().await;
    new.stop().await;
    let promoted = points.iter().map(|point| promoted_after_making_room(&point.files));
    let promoted =
        join_all(promoted).await.into_iter().filter(|was_promoted| *was_promoted).count();
    assert!(promoted >= 1, "no kill left a side that had made room, and none that had taken over");
}

/// Whether there was such a side.
async fn promoted_after_making_room(scratch: &Scratch) -> bool {
    let away = Side::run(here(scratch, Role::Primary));
    let status = away.wait("up", |_| true).await;
    if status["role"] != "secondary" || away.command("failover", json!({})).await.is_err() {
        away.stop().await;
        return false;
    }
    away.wait_state("promoted").await;
    let written = (65536, 0x66);
    write_to(scratch, "p-guest.sock", written).await;
    // One side is the disk; the other one says whether it is too.
    let back = Side::run(there(scratch));
    let is_disk = serves(&back.wait("up", |_| true).await);
    if !is_disk {
        let peer = format!("nbd+unix:///?socket={}", scratch.path("s.sock").display());
        away.command("peer-set", json!({ "uri": peer })).await.unwrap();
        away.wait("in sync", in_sync).await;
    }
    away.stop().await;
    back.stop().await;
    if !is_disk {
        let disks = ["p.raw", "s.raw"].map(|disk| file(&scratch.path(disk)));
        assert!(disks[0] == disks[1], "in sync, and the disks differ");
        assert_eq!(disks[1][65536..65536 + 4096], [0x66; 4096], "what was written since is lost");
    }
    !is_disk
}

/// A side that has made room asks the other one to take over. The other one has lost a disk of the
/// checkpoint since.
#[tokio::test]
async fn i09_a_side_that_lacks_a_disk_of_the_checkpoint_does_not_take_over() {
    let scratch = Scratch::new();
    for (disk, byte) in DISKS.into_iter().zip(1..) {
        scratch.raw(disk, MIB, byte);
    }
    let (scratch, old, new) = pair_of(scratch).await;
    let points = Points::watch(&scratch, &[FIRST]);
    old.command("switchover", json!({})).await.unwrap();
    new.wait("in sync", in_sync).await;
    let points = points.taken(&scratch);
    old.stop().await;
    new.stop().await;
    let asked = points.iter().map(|point| asked_in_vain(&point.files));
    let asked = join_all(asked).await.into_iter().filter(|asked| *asked).count();
    assert!(asked >= 1, "no kill left a side that had made room, and none that had taken over");
}

/// Whether a side had made room for one that had not taken over.
async fn asked_in_vain(scratch: &Scratch) -> bool {
    let is_primary = |dir| {
        let store = RecordStore::open_existing(&scratch.path(dir)).unwrap();
        store.record().is_primary()
    };
    if is_primary("p.state") || is_primary("s.state") {
        return false;
    }
    remove_disk_of_stopped(&scratch.path("s.state"), "vdb", true).unwrap();
    std::fs::remove_file(scratch.path("s2.raw")).unwrap();
    let peer = Some(scratch.endpoint("s.sock").into());
    let away = Side::run(SideConfig { peer, ..here(scratch, Role::Secondary) });
    let back = Side::run(there(scratch));
    away.wait("refused", |s| s["reason"].to_string().contains("the same disks")).await;
    let other = back.wait("up", |_| true).await;
    away.stop().await;
    back.stop().await;
    assert!(!serves(&other), "{other:#}");
    true
}

#[tokio::test]
async fn i16_kills_at_each_record_of_a_promotion_and_of_the_old_primarys_return() {
    let (scratch, old, there) = pair().await;
    old.stop().await;
    let points = Points::watch(&scratch, &[FIRST]);
    there.command("failover", json!({})).await.unwrap();
    there.wait_state("promoted").await;
    points.write(&scratch, "s.sock", (65536, 0x66)).await;
    let old = Side::run(here(&scratch, Role::Secondary));
    there.wait("in sync", in_sync).await;
    let points = points.taken(&scratch);
    old.stop().await;
    there.stop().await;
    recover_all(points, 8, Role::Secondary).await;
}

#[tokio::test]
async fn i16_kills_at_each_record_of_a_session_that_begins() {
    let (scratch, old, away) = pair().await;
    away.stop().await;
    old.wait_state("disconnected").await;
    let points = Points::watch(&scratch, &[FIRST]);
    points.write(&scratch, "p-guest.sock", (131_072, 0x77)).await;
    let back = Side::run(there(&scratch));
    old.wait("in sync", in_sync).await;
    let points = points.taken(&scratch);
    old.stop().await;
    back.stop().await;
    recover_all(points, 6, Role::Primary).await;
}
