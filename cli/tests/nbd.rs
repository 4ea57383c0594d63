//! `brep nbd`: served, asked, compared, and ended by signals.
mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use common::Dir;

/// `brep nbd serve`, and the URI that it has printed. Killed if a test fails.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(dir: &Dir, args: &[&str]) -> Self {
        let args = [&["nbd", "serve"], args].concat();
        let mut child = dir.command(&args).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let uri = line.trim_end().rsplit(' ').next().unwrap().to_owned();
        assert!(line.starts_with("serving "), "{line}");
        Server { child, uri }
    }

    fn signal(mut self, signal: rustix::process::Signal) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_is_served_over_tcp_and_unix_sockets_until_a_signal() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), vec![3; 1 << 20]).unwrap();
    for (listen, signal) in [
        ("nbd://127.0.0.1:0", rustix::process::Signal::TERM),
        ("nbd+unix:///?socket=a.sock", rustix::process::Signal::INT),
    ] {
        let server = Server::start(&dir, &["a.raw", "--listen", listen, "--export", "vda"]);
        let info = dir.brep(&["nbd", "info", &server.uri, "--json"]);
        let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
        assert_eq!(info["exports"][0]["name"], "vda");
        assert_eq!(info["exports"][0]["size"], 1 << 20);

        let locked = dir.brep(&["image", "compare", "a.raw", &server.uri]);
        assert_eq!(locked.code, 2, "a file that is being written is not compared");
        let wrong = dir.brep(&["nbd", "info", &server.uri.replace("vda", "vdb")]);
        assert_eq!(wrong.code, 1, "{}", wrong.stdout);
        assert_eq!(server.signal(signal), Some(0), "{listen}");
    }
    assert!(!dir.file("a.sock").exists());
}

#[test]
fn a_read_only_export_can_be_compared_with_its_file() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), vec![3; 1 << 20]).unwrap();
    let server =
        Server::start(&dir, &["a.raw", "--read-only", "--listen", "nbd+unix:///?socket=a.sock"]);
    let compared = dir.brep(&["image", "compare", "a.raw", &server.uri]);
    assert_eq!(compared.code, 0, "{}{}", compared.stdout, compared.stderr);
    let info = dir.brep(&["nbd", "info", &server.uri]);
    assert!(info.stdout.contains("read-only"), "{}", info.stdout);
}

#[test]
fn what_is_in_the_way_is_named() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), [0; 512]).unwrap();
    std::fs::write(dir.file("file"), "precious").unwrap();
    let run = dir.brep(&["nbd", "serve", "a.raw", "--listen", "nbd+unix:///?socket=file"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("file"), "{}", run.stderr);
    assert_eq!(std::fs::read(dir.file("file")).unwrap(), b"precious");
    let run = dir.brep(&["nbd", "info", "nbd+unix:///?socket=gone.sock"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("gone.sock"), "{}", run.stderr);
}
