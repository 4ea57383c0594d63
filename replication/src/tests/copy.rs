use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::json;

use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::image::faults;

/// Two ranges have to be sent again before a checkpoint. The second cannot be read while the
/// first is being read: the first must not be forgotten over that.
#[tokio::test]
async fn a_piece_that_cannot_be_read_does_not_take_its_neighbours_with_it() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
    let secondary = Side::secondary(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::primary(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let here = faults::of(&scratch.path("p.raw"));
    let there = faults::of(&scratch.path("s.raw"));
    for offset in [0, MIB] {
        there.lower.fail(Rule::new(Operation::Write));
        fill(&*guest, offset, 4096, 0x77).await;
    }
    assert_ne!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));

    let hang = here.upper.hang(Rule::new(Operation::Read).range(0..65536));
    here.lower.fail(Rule::new(Operation::Read).range(MIB..MIB + 65536));
    let release = async {
        hang.reached(1).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        hang.release();
    };
    let (refused, ()) = tokio::join!(primary.command("checkpoint", json!({})), release);
    assert!(refused.is_err(), "a checkpoint without what could not be read");
    primary.checkpoint().await;
    let equal = file(&scratch.path("p.raw")) == file(&scratch.path("s.raw"));
    assert!(equal, "the checkpoint is committed, and the disks differ");
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}
