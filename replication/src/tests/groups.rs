use std::time::Duration;

use brep_block::{BlockDevice, Operation, Rule};
use brep_nbd::client::{ConnectOptions, Connection};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::common::{MIB, Scratch, Side, connect, file};
use super::write;
use crate::config::{PeerAddress, SideConfig};
use crate::image::faults;
use crate::{SharedListener, run_groups};

/// A secondary's group at the shared address.
fn secondary(scratch: &Scratch, place: SharedListener) -> SideConfig {
    let group = place.group().to_owned();
    scratch.raw(&format!("s-{group}.raw"), MIB, 2);
    let disk = scratch.disk("vda", &format!("s-{group}.raw"));
    SideConfig {
        state_dir: scratch.path(&format!("s-{group}.state")),
        shared: Some(place),
        ..scratch.secondary(vec![disk])
    }
}

async fn primary(scratch: &Scratch, group: &str) -> Side {
    scratch.raw(&format!("p-{group}.raw"), MIB, 1);
    let peer = PeerAddress { endpoint: scratch.endpoint("s.sock"), group: Some(group.to_owned()) };
    let primary = Side::run(SideConfig {
        state_dir: scratch.path(&format!("p-{group}.state")),
        guest_listen: Some(scratch.endpoint(&format!("{group}.sock"))),
        peer: Some(peer),
        peer_timeout: Duration::from_secs(10),
        ..scratch.primary(vec![scratch.disk("vda", &format!("p-{group}.raw"))])
    });
    primary.wait_state("in-sync").await;
    primary
}

async fn command(
    scratch: &Scratch,
    group: &str,
    name: &str,
    arguments: Value,
) -> Result<(), String> {
    let control = scratch.path(&format!("s-{group}.state")).join("control.sock");
    let name = name.to_owned();
    let answer = tokio::task::spawn_blocking(move || {
        let mut client = crate::control::ControlClient::connect(&control, Duration::from_secs(30))?;
        client.execute(&name, arguments)
    });
    answer.await.unwrap().map(drop).map_err(|error| error.to_string())
}

/// One group's disk hangs, and its guest with it: the other one's writes, checkpoints and failover
/// do not wait for that.
#[tokio::test]
async fn a_group_whose_disk_hangs_does_not_hold_up_another() {
    let scratch = Scratch::new();
    let names = ["web".to_owned(), "db".to_owned()];
    let places = SharedListener::places(&scratch.endpoint("s.sock"), &names);
    let groups = places.into_iter().map(|place| secondary(&scratch, place)).collect();
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(run_groups(groups, shutdown.clone()));
    let (web, db) = (primary(&scratch, "web").await, primary(&scratch, "db").await);
    let hanging = connect(scratch.endpoint("web.sock"), "vda").await;
    let guest = connect(scratch.endpoint("db.sock"), "vda").await;

    let disk = faults::of(&scratch.path("s-web.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Write).forever());
    let stuck = write(&hanging, 0, 7);
    hang.reached(1).await;
    for block in 0..20 {
        write(&guest, block * 4096, 8).await.unwrap().unwrap();
    }
    db.checkpoint().await;
    assert!(!stuck.is_finished(), "the other one hangs all the time");
    assert!(file(&scratch.path("s-db.raw")) == file(&scratch.path("p-db.raw")));
    guest.close();
    db.stop().await;
    command(&scratch, "db", "failover", json!({})).await.unwrap();
    let options = ConnectOptions::new(scratch.endpoint("s.sock"), "db/vda");
    let promoted = Connection::connect(&options).await.unwrap();
    assert_eq!(promoted.read(0, 4096).await.unwrap(), vec![8; 4096]);
    assert!(!stuck.is_finished(), "and still");

    // The name under which others find it here; the group itself calls it otherwise.
    assert_eq!(promoted.export().canonical_name.as_deref(), Some("db/vda"));
    let remove =
        |mode| command(&scratch, "db", "block-export-del", json!({ "id": "vda", "mode": mode }));
    assert!(remove("safe").await.unwrap_err().contains("still in use"));
    remove("hard").await.unwrap();
    promoted.read(0, 4096).await.unwrap_err();

    hang.release();
    stuck.await.unwrap().unwrap();
    web.checkpoint().await;
    hanging.close();
    web.stop().await;
    shutdown.cancel();
    running.await.unwrap().unwrap();
}
