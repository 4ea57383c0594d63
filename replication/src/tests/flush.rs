//! What a guest's FLUSH asks of the secondary.
use std::time::Duration;

use brep_block::{FlushLevel, Operation, Rule};

use super::common::{Scratch, Side, connect};
use super::{Pair, write};
use crate::config::{Durability, SideConfig};
use crate::image::faults::{self, Faults};

const LIMIT: Duration = Duration::from_secs(5);

/// I8: a guest whose writes are flushed waits for nobody, and one whose write is not for those who
/// have to have it, whichever connection it came by.
#[tokio::test]
async fn i08_a_flush_reaches_the_secondary_if_something_has_ended_there_since_the_last() {
    let change = |_: &Scratch, here: &mut SideConfig, there: &mut SideConfig| {
        (here.durability, there.durability) = (Durability::Power, Durability::Power);
        here.peer_timeout = Duration::from_secs(20);
    };
    let Pair { scratch, primary: here, secondary: there, disk: Faults { upper: disk, .. }, .. } =
        Pair::with(change).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let other = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let flush = || guest.start_flush(FlushLevel::Durable);
    write(&guest, 0, 0x11).await.unwrap().unwrap();
    flush().await.unwrap();

    let hang = disk.hang(Rule::new(Operation::Flush));
    tokio::time::timeout(LIMIT, flush()).await.expect("nothing is to be flushed").unwrap();
    write(&other, 8192, 0x22).await.unwrap().unwrap();
    let first = tokio::spawn(flush());
    hang.reached(1).await;
    // This one ends while the flush is on its way, and so is none of its affair.
    write(&other, 16384, 0x33).await.unwrap().unwrap();
    hang.release();
    first.await.unwrap().unwrap();
    let hang = disk.hang(Rule::new(Operation::Flush));
    let second = tokio::spawn(flush());
    tokio::time::timeout(LIMIT, hang.reached(1)).await.expect("it is not asked");
    hang.release();
    second.await.unwrap().unwrap();

    // What was flushed in an earlier session may be another secondary's.
    drop(disk);
    there.stop().await;
    here.wait_state("disconnected").await;
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.durability = Durability::Power;
    let there = Side::run(config);
    here.wait_state("in-sync").await;
    let disk = faults::of(&scratch.path("s.raw")).upper;
    let hang = disk.hang(Rule::new(Operation::Flush));
    let third = tokio::spawn(flush());
    tokio::time::timeout(LIMIT, hang.reached(1)).await.expect("it is not asked");
    hang.release();
    drop(disk);
    third.await.unwrap().unwrap();
    guest.close();
    other.close();
    here.stop().await;
    there.stop().await;
}
