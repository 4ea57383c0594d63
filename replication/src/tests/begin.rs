use super::common::{MIB, Scratch, Side};
use crate::state::{Record, RecordStore, Role};

/// A buffer that a killed process had tagged, and that no record names yet, is known as this
/// side's by its set alone.
#[tokio::test]
async fn a_session_that_cannot_take_its_buffers_has_put_its_set_into_the_record_first() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    secondary.wait("up", |s| s["role"] == "secondary").await;
    // In the way of the first buffer.
    let buffer = scratch.path("s.state").join("vda.0.qcow2.new");
    std::fs::create_dir(&buffer).unwrap();
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    let says_why = |s: &serde_json::Value| {
        s["reason"].as_str().is_some_and(|reason| reason.contains("vda.0.qcow2.new"))
    };
    secondary.wait("a session that fails", says_why).await;
    primary.stop().await;
    secondary.stop().await;
    let blank = || Record::blank("none", Role::Primary);
    let record = RecordStore::open(&scratch.path("s.state"), blank).unwrap().record().clone();
    assert!(record.set.is_some());
    assert!(record.secondary.disks.iter().all(|disk| disk.buffers().count() == 0));

    // Out of the way, the pair comes together by itself.
    std::fs::remove_dir(&buffer).unwrap();
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
}
