//! A side that has made room in a switchover is a secondary whose checkpoint has no buffers yet.
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::config::{Role, SideConfig};
use crate::image::faults;

/// Its first session is lost before its first checkpoint: what that session has overwritten comes
/// back.
#[tokio::test]
async fn i03_the_checkpoint_of_a_switchover_outlives_the_first_session_after_it() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 4 * MIB, 1);
    scratch.raw("s.raw", 4 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let old_primary = || {
        let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
        config.listen = Some(scratch.endpoint("p.sock"));
        Side::run(config)
    };
    let primary = old_primary();
    primary.wait_state("in-sync").await;
    let uri = format!("nbd+unix:///?socket={}", scratch.path("p.sock").display());
    secondary.command("peer-set", json!({ "uri": uri })).await.unwrap();
    primary.command("switchover", json!({})).await.unwrap();
    secondary.wait("promoted", |s| s["role"] == "promoted").await;
    primary.wait("secondary", |s| s["role"] == "secondary").await;
    primary.stop().await;
    let checkpoint = file(&scratch.path("p.raw"));

    // The new primary has more, and the copy of it is cut short.
    secondary.wait("alone", |s| s["link"] == "disconnected").await;
    let guest = connect(scratch.endpoint("s.sock"), "vda").await;
    fill(&*guest, MIB, 2 * MIB as usize, 0x77).await;
    guest.close();
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.listen = Some(scratch.endpoint("p.sock"));
    config.start = false;
    let primary = Side::run(config);
    primary.wait("up", |_| true).await;
    let disk = faults::of(&scratch.path("p.raw")).upper;
    let hang = disk.hang(Rule::new(Operation::Write).nth(2));
    primary.command("replication-start", json!({})).await.unwrap();
    hang.reached(1).await;
    secondary.stop().await;
    hang.release();
    assert!(file(&scratch.path("p.raw")) != checkpoint, "nothing was overwritten");
    primary.wait("lost", |s| s["link"] == "disconnected").await;
    primary.command("failover", json!({})).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), primary.wait_state("promoted")).await.unwrap();
    primary.stop().await;
    assert!(file(&scratch.path("p.raw")) == checkpoint, "another disk than at the checkpoint");
}

/// I11: the side that made room knows better than whoever takes the other one for lost.
#[tokio::test]
async fn i11_a_side_that_has_made_room_is_not_promoted_when_the_other_one_has_taken_over() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.listen = Some(scratch.endpoint("p.sock"));
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    // The new primary does not find it: no session tells it what has become of the switchover.
    let uri = format!("nbd+unix:///?socket={}", scratch.path("nowhere.sock").display());
    secondary.command("peer-set", json!({ "uri": uri })).await.unwrap();
    primary.command("switchover", json!({})).await.unwrap();
    secondary.wait("promoted", |s| s["role"] == "promoted").await;
    primary.wait("secondary", |s| s["role"] == "secondary").await;
    let asks = |s: &Value| s["reason"].to_string().contains("made room");
    primary.wait("it has heard", |s| !asks(s)).await;
    let error = primary.command("failover", json!({})).await.unwrap_err().to_string();
    assert!(error.contains("taken over"), "{error}");
    // If it is gone nobody says so any more.
    secondary.stop().await;
    primary.command("failover", json!({})).await.unwrap();
    primary.stop().await;
}

/// Not a byte was written: its disks are still the newest that there are.
#[tokio::test]
async fn an_old_primary_whose_session_as_a_secondary_never_began_can_be_the_primary_again() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let disks = || vec![scratch.disk("vda", "p.raw")];
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(disks()));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    // It makes no buffer.
    let returned = SideConfig {
        listen: Some(scratch.endpoint("p.sock")),
        start: false,
        ..SideConfig::new(Role::Secondary, "p", scratch.path("p.state"), disks())
    };
    let old = Side::run(returned);
    old.wait("up", |_| true).await;
    for number in 0..4 {
        let in_the_way = scratch.path(&format!("p.state/vda.{number}.qcow2/x"));
        std::fs::create_dir_all(in_the_way).unwrap();
    }
    old.command("replication-start", json!({})).await.unwrap();
    let uri = format!("nbd+unix:///?socket={}", scratch.path("p.sock").display());
    secondary.command("peer-set", json!({ "uri": uri })).await.unwrap();
    old.wait("cannot begin", |s| s["reason"].to_string().contains("cannot begin")).await;
    old.stop().await;
    secondary.stop().await;
    for number in 0..4 {
        std::fs::remove_dir_all(scratch.path(&format!("p.state/vda.{number}.qcow2"))).unwrap();
    }
    let primary = Side::run(SideConfig { force_lonely: true, ..scratch.primary(disks()) });
    primary.wait("primary", |s| s["role"] == "primary").await;
    primary.stop().await;
}
