//! Switchovers that do not come about.
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::json;

use super::common::connect;
use super::{Pair, write};
use crate::config::Durability;

/// A pair that can change its roles.
async fn pair() -> Pair {
    Pair::with(|scratch, here, there| {
        there.durability = Durability::Power;
        here.listen = Some(scratch.endpoint("p.sock"));
        there.peer = Some(scratch.endpoint("p.sock").into());
    })
    .await
}

/// Whoever was told that there was none must not find the roles changed a little later.
async fn nobody_waits_for_it_any_more(asked_on_secondary: bool) {
    let Pair { scratch, primary: here, secondary: there, disk, .. } = pair().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    // Its checkpoint takes its time.
    let hang = disk.upper.hang(Rule::new(Operation::Flush));
    let before = here.status().await["checkpoint"].as_u64();
    let asked = if asked_on_secondary { &there } else { &here };
    let error = asked.command("switchover", json!({ "timeout-ms": 300 })).await.unwrap_err();
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

#[tokio::test]
async fn a_switchover_that_nobody_waits_for_any_more_is_not_made() {
    nobody_waits_for_it_any_more(false).await;
}

#[tokio::test]
async fn nor_is_one_that_was_asked_for_on_the_secondary() {
    nobody_waits_for_it_any_more(true).await;
}

/// Whoever reconnects there afterwards would write to what the next checkpoint drops.
#[tokio::test]
async fn a_side_that_serves_a_second_guest_as_a_secondary_does_not_become_one_under_its_guest() {
    let Pair { scratch: _scratch, primary, secondary, .. } = Pair::with_guest().await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    let error = secondary.command("switchover", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("a guest of its own"), "{error}");
    primary.stop().await;
    secondary.stop().await;
}
