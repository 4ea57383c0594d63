//! Switchovers that do not come about.
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::json;

use super::common::{MIB, Scratch, Side, connect};
use super::write;
use crate::config::Durability;
use crate::image::faults;

/// Whoever was told that there was none must not find the roles changed a little later.
#[tokio::test]
async fn a_switchover_that_nobody_waits_for_any_more_is_not_made() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.durability = Durability::Power;
    let there = Side::run(config);
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.listen = Some(scratch.endpoint("p.sock"));
    let here = Side::run(config);
    here.wait_state("in-sync").await;
    let uri = format!("nbd+unix:///?socket={}", scratch.path("p.sock").display());
    there.command("peer-set", json!({ "uri": uri })).await.unwrap();
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    // Its checkpoint takes its time.
    let hang = faults::of(&scratch.path("s.raw")).upper.hang(Rule::new(Operation::Flush));
    let before = here.status().await["checkpoint"].as_u64();
    let error = here.command("switchover", json!({ "timeout-ms": 300 })).await.unwrap_err();
    assert!(error.to_string().contains("within"), "{error}");
    hang.reached(1).await;
    hang.release();
    here.wait("the checkpoint", |s| s["checkpoint"].as_u64() > before).await;
    let written = tokio::time::timeout(Duration::from_secs(10), write(&guest, 0, 0x22)).await;
    written.expect("the guest is held").unwrap().unwrap();
    assert_eq!(here.status().await["role"], "primary");
    assert_eq!(there.status().await["role"], "secondary");
    guest.close();
    here.stop().await;
    there.stop().await;
}
