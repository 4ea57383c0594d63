use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::json;

use super::common::{MIB, Scratch, Side, connect, fill};
use super::write;
use crate::image::faults;

/// I2: a plain primary that was not stopped for a checkpoint writes to the second of three disks
/// after that one has been drained. No disk is cut without the others, and the next checkpoint can
/// be taken.
#[tokio::test]
async fn i02_all_disks_are_cut_or_none_is() {
    let scratch = Scratch::new();
    let names = ["vda", "vdb", "vdc"];
    let disks = names.map(|name| {
        scratch.raw(&format!("{name}.raw"), MIB, 1);
        scratch.disk(name, &format!("{name}.raw"))
    });
    let mut config = scratch.secondary(disks.to_vec());
    config.plain_primary = true;
    let secondary = Side::run(config);
    secondary.wait("started", |s| s["replication"] == "running").await;
    let b = connect(scratch.endpoint("s.sock"), "vdb").await;
    let c = connect(scratch.endpoint("s.sock"), "vdc").await;
    let hang = |name: &str| {
        let disk = faults::of(&scratch.path(&format!("{name}.raw")));
        disk.upper.hang(Rule::new(Operation::Write))
    };
    let (hang_b, hang_c) = (hang("vdb"), hang("vdc"));
    let slow_c = write(&c, 0, 0x55);
    hang_c.reached(1).await;
    let mut slow_b = None;
    let meanwhile = async {
        // The checkpoint waits for the third disk now.
        tokio::time::sleep(Duration::from_millis(300)).await;
        slow_b = Some(write(&b, 0, 0x66));
        hang_b.reached(1).await;
        hang_c.release();
    };
    let (refused, ()) = tokio::join!(secondary.command("checkpoint", json!({})), meanwhile);
    refused.unwrap_err();
    hang_b.release();
    slow_b.unwrap().await.unwrap().unwrap();
    slow_c.await.unwrap().unwrap();
    secondary.checkpoint().await;
    fill(&*b, 0, 4096, 0x77).await;
    secondary.stop().await;
}
