//! Changes that are longer than what is tracked at a time.
use std::fs::File;

use brep_block::{BlockDevice, ZeroFlags};

use super::common::{Scratch, Side, connect};

const GIB: u64 = 1 << 30;

#[tokio::test]
async fn a_long_zeroing_is_carried_out_in_pieces() {
    let scratch = Scratch::new();
    File::create(scratch.path("p.raw")).unwrap().set_len(4 * GIB).unwrap();
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer = None;
    let primary = Side::run(config);
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    guest.write_zeroes(512, 2 * GIB + 4096, flags).await.unwrap();
    let counters = &primary.status().await["counters"];
    let counted = [&counters["guest-writes"], &counters["guest-write-bytes"]];
    // The server's, up to each multiple of 128 MiB; none is longer than what a log can have.
    assert_eq!(counted.map(|n| n.as_u64().unwrap()), [17, 2 * GIB + 4096]);
    guest.close();
    primary.stop().await;
}
