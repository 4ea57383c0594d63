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

/// What the side makes and removes as it needs it is never somebody's disk.
#[tokio::test]
async fn an_image_with_the_name_of_a_file_of_the_side_is_refused() {
    for name in ["vda.3.qcow2", "vda.3.qcow2.new", "vda.maps", "vda.log", "reserve", "state"] {
        let scratch = Scratch::new();
        let file = format!("s.state/{name}");
        let config = scratch.secondary(vec![scratch.disk("vda", &file)]);
        let error = Side::run(config).ended().await.unwrap_err().to_string();
        assert!(error.contains("another name") && error.contains(name), "{error}");
    }
    // As it is called elsewhere is nobody's affair, nor is another name there.
    for file in ["vda.3.qcow2", "s.state/other.3.raw"] {
        let scratch = Scratch::new();
        std::fs::create_dir_all(scratch.path("s.state")).unwrap();
        scratch.raw(file, MIB, 1);
        let side = Side::run(scratch.secondary(vec![scratch.disk("vda", file)]));
        side.wait("up", |s| s["role"] == "secondary").await;
        side.stop().await;
    }
}
