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
fn what_a_server_has_is_listed_described_and_mapped() {
    let dir = Dir::new();
    let file = std::fs::File::create(dir.file("a.raw")).unwrap();
    file.set_len(3 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 1 << 20], 1 << 20).unwrap();
    drop(file);
    let server = Server::start(
        &dir,
        &["a.raw", "--export", "vda", "--listen", "nbd+unix:///?socket=a.sock"],
    );
    let json = |args: &[&str]| {
        let run = dir.brep(args);
        assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
        serde_json::from_str::<serde_json::Value>(&run.stdout).unwrap()
    };

    assert_eq!(dir.brep(&["nbd", "list", "nbd+unix:///?socket=a.sock"]).stdout, "\"vda\"\n");
    let listed = json(&["nbd", "list", "nbd+unix:///?socket=a.sock", "--json"]);
    assert_eq!(listed["exports"][0]["name"], "vda");

    let info = json(&["nbd", "info", &server.uri, "--json"]);
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!((&info["tls"], &info["structured-replies"]), (&false.into(), &true.into()));
    let contexts = info["exports"][0]["contexts"].as_array().unwrap();
    assert!(contexts.contains(&"base:allocation".into()), "{info}");
    let text = dir.brep(&["nbd", "info", &server.uri]).stdout;
    assert!(text.contains("no TLS") && text.contains("base:allocation"), "{text}");
    assert_eq!(dir.brep(&["nbd", "info", &server.uri, "--size"]).stdout, "3145728\n");

    let map = json(&["nbd", "info", &server.uri, "--map", "--json"]);
    let runs: Vec<_> = map.as_array().unwrap().iter().map(|run| &run["description"]).collect();
    assert_eq!(runs, ["hole,zero", "data", "hole,zero"], "{map}");
    assert_eq!((&map[1]["offset"], &map[1]["length"]), (&1048576.into(), &1048576.into()));
    let totals = dir.brep(&["nbd", "info", &server.uri, "--map", "--totals"]).stdout;
    let words: Vec<Vec<&str>> = totals.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["1048576", "33.3", "%", "0", "data"]);
    assert_eq!(words[1], ["2097152", "66.7", "%", "3", "hole,zero"]);

    let unknown = dir.brep(&["nbd", "info", &server.uri, "--map=x:y"]);
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("x:y"), "{}", unknown.stderr);
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

#[test]
fn an_export_is_resized_where_it_may_be_and_shrinks_only_if_that_is_meant() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), vec![3; 1 << 20]).unwrap();
    assert_eq!(dir.brep(&["image", "create", "b.qcow2", "1M"]).code, 0);
    for (file, shrinks) in [("a.raw", true), ("b.qcow2", false)] {
        let server = Server::start(
            &dir,
            &[file, "--resizable", "--listen", "nbd+unix:///?socket=resizable.sock"],
        );
        let resize = |args: &[&str]| dir.brep(&[&["nbd", "resize", &server.uri], args].concat());
        let size = || dir.brep(&["nbd", "info", &server.uri, "--size"]).stdout;
        let grown = resize(&["+1M"]);
        assert_eq!((grown.code, size().as_str()), (0, "2097152\n"), "{}", grown.stderr);
        assert_eq!((resize(&["3M"]).code, size().as_str()), (0, "3145728\n"));
        let refused = resize(&["1M"]);
        assert_eq!((refused.code, size().as_str()), (2, "3145728\n"));
        assert!(refused.stderr.contains("--shrink"), "{}", refused.stderr);
        let shrunk = resize(&["1M", "--shrink"]);
        let expected = if shrinks { (0, "1048576\n") } else { (1, "3145728\n") };
        assert_eq!((shrunk.code, size().as_str()), expected, "{file}: {}", shrunk.stderr);
    }
    let server = Server::start(&dir, &["a.raw", "--listen", "nbd+unix:///?socket=fixed.sock"]);
    let refused = dir.brep(&["nbd", "resize", &server.uri, "2M"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("does not let"), "{}", refused.stderr);
}

#[test]
fn a_server_goes_on_when_nobody_reads_what_it_says() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), vec![3; 1 << 20]).unwrap();
    let uri = "nbd+unix:///?socket=a.sock";
    let mut command = dir.command(&["nbd", "serve", "a.raw", "--listen", uri]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command.stdout(writer).spawn().unwrap();
    let server = Server { child, uri: uri.to_owned() };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while dir.brep(&["nbd", "info", uri, "--size"]).stdout != "1048576\n" {
        assert!(std::time::Instant::now() < deadline, "it does not serve");
    }
    assert_eq!(server.signal(rustix::process::Signal::TERM), Some(0));
}

#[test]
fn a_list_of_certificates_is_not_ignored() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), [0; 512]).unwrap();
    let listen = ["--listen", "nbd+unix:///?socket=a.sock"];
    let tls = ["--tls-dir", "pki", "--tls", "off", "--tls-allow", "CN=x"];
    let run = dir.brep(&[&["nbd", "serve", "a.raw"], &listen[..], &tls].concat());
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("--tls-allow"), "{}", run.stderr);
    let long = "x".repeat(5000);
    let run = dir.brep(&[&["nbd", "serve", "a.raw", "--export", &long], &listen[..]].concat());
    assert_eq!(run.code, 2, "{}", run.stderr);
}

#[test]
fn zeroes_that_do_not_fit_have_not_been_copied() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), vec![0; 1 << 20]).unwrap();
    let server = Server::start(&dir, &["a.raw", "--listen", "nbd+unix:///?socket=a.sock"]);
    for (len, code) in [(1 << 20, 0), (2 << 20, 1)] {
        std::fs::write(dir.file("zeroes"), vec![0; len]).unwrap();
        let mut command = dir.command(&["nbd", "copy", "-", &server.uri, "--destination-is-zero"]);
        let output = command.stdin(std::fs::File::open(dir.file("zeroes")).unwrap()).output();
        assert_eq!(output.unwrap().status.code(), Some(code), "{len} bytes");
    }
}
