//! What the tests of the client share: real servers, and servers that follow a script.
#![allow(dead_code, reason = "not every test binary uses all of it")]

pub(crate) mod handshake;
pub(crate) mod pair;
pub(crate) mod replies;
pub(crate) mod scripted;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use brep_nbd::Endpoint;
use brep_nbd::client::ConnectOptions;

/// A `qemu-nbd` that serves one raw file, until it is dropped.
pub(crate) struct QemuNbd {
    child: Child,
    socket: PathBuf,
}

impl QemuNbd {
    /// Waits until it listens.
    pub(crate) fn start(directory: &Path, image: &Path, arguments: &[&str]) -> Self {
        let socket = directory.join("qemu.sock");
        let _ = std::fs::remove_file(&socket);
        let child = Command::new("qemu-nbd")
            .args(["-t", "-e", "8", "-f", "raw", "-k"])
            .arg(&socket)
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd can be started");
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        QemuNbd { child, socket }
    }

    pub(crate) fn options(&self, export: &str) -> ConnectOptions {
        let endpoint = Endpoint::Unix { path: self.socket.clone() };
        ConnectOptions { name: "disk".into(), ..ConnectOptions::new(endpoint, export) }
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
