//! The rules that every device obeys, over a connection to `qemu-nbd`.

mod client_support;

use std::cell::RefCell;

use brep_block::conformance::{self, Options};
use brep_nbd::client::{ConnectOptions, Connection};
use client_support::QemuNbd;

/// Starts a server for each device that is asked for.
#[derive(Default)]
struct Servers(RefCell<Vec<(QemuNbd, tempfile::TempDir)>>);

impl Servers {
    fn options(&self, size: u64) -> ConnectOptions {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.raw");
        std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("created");
        let server = QemuNbd::start(directory.path(), &path, &["--discard=unmap"]);
        let options = server.options("");
        self.0.borrow_mut().push((server, directory));
        options
    }
}

/// QEMU rounds sizes to whole sectors.
fn options() -> Options {
    Options::default().size_unit(512)
}

#[tokio::test]
async fn a_connection_is_a_block_device() {
    let servers = Servers::default();
    let make = async |size| Connection::connect(&servers.options(size)).await.expect("connected");
    conformance::run(make, options()).await.expect("conforms");
}
