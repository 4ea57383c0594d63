use std::time::Duration;

use brep_block::{Operation, Rule};

use super::common::connect;
use super::{Pair, write};

/// The local disk hangs for longer than the peer may be silent. The peer has the write and is
/// there: it is not lost over that, and needs no copy afterwards.
#[tokio::test]
async fn a_local_disk_that_hangs_does_not_lose_the_peer() {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let hang = local.upper.hang(Rule::new(Operation::Write));
    let slow = write(&guest, 8192, 0x66);
    hang.reached(1).await;
    tokio::time::sleep(Duration::from_millis(3500)).await;
    assert_eq!(primary.status().await["link"], "connected");
    hang.release();
    slow.await.unwrap().unwrap();
    primary.checkpoint().await;
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}
