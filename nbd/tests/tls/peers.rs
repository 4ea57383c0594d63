//! Other people's programs, in both roles.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brep_block::{BlockDevice, Memory, WriteFlags};
use brep_nbd::Endpoint;
use brep_nbd::client::Connection;
use brep_nbd::server::{Export, StaticExports};

use crate::support::{Pki, serve};

const SIZE: u64 = 4 << 20;

fn is_missing(test: &str, program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
    if !found {
        eprintln!("SKIP: {test}: {program} not found");
    }
    !found
}

/// Runs a program next to the server; what it printed, if it succeeded.
async fn run(program: &'static str, arguments: Vec<String>) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(errors),
    }
}

fn credentials(pki: &Pki, endpoint: &str) -> String {
    format!("tls-creds-x509,id=tls0,endpoint={endpoint},dir={}", pki.path().display())
}

async fn serve_disk(pki: &Pki) -> (Arc<brep_nbd::server::Server>, u16) {
    let exports = StaticExports::new();
    let disk = Memory::new("disk", SIZE);
    disk.write(1 << 20, vec![0x5a; 4096].into(), WriteFlags::default()).await.unwrap();
    exports.add(Export::new("disk", disk).multi_conn(true));
    let (server, endpoint) = serve(Arc::new(exports), pki.required()).await;
    let Endpoint::Tcp { port, .. } = endpoint else { panic!("{endpoint}") };
    (server, port)
}

#[tokio::test]
async fn qemu_reads_and_writes_over_tls() {
    let pki = Pki::new();
    let (_server, port) = serve_disk(&pki).await;
    let image = format!("driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls0");
    let arguments = |commands: &[&str]| {
        let object = credentials(&pki, "client");
        let mut arguments = vec!["--object".to_owned(), object, "--image-opts".into()];
        for command in commands {
            arguments.extend(["-c".to_owned(), (*command).to_owned()]);
        }
        arguments.push(image.clone());
        arguments
    };
    let commands = ["read -P 0x5a 1M 4k", "write -P 7 2M 1M", "read -P 7 2M 1M", "flush"];
    run("qemu-io", arguments(&commands)).await.unwrap();
    let plain = format!("driver=nbd,host=127.0.0.1,port={port},export=disk");
    let refused = run("qemu-img", vec!["info".into(), "--image-opts".into(), plain]).await;
    assert!(refused.unwrap_err().contains("TLS"));
}

#[tokio::test]
async fn libnbd_copies_over_tls() {
    if is_missing("libnbd_copies_over_tls", "nbdcopy") {
        return;
    }
    let pki = Pki::new();
    let (_server, port) = serve_disk(&pki).await;
    let certificates = pki.path().display();
    let uri = format!("nbds://127.0.0.1:{port}/disk?tls-certificates={certificates}");
    let info = run("nbdinfo", vec![uri.clone()]).await.unwrap();
    assert!(info.contains("using TLS") || info.contains("with TLS"), "{info}");
    let file = pki.path().join("copy.raw");
    run("nbdcopy", vec![uri, file.display().to_string()]).await.unwrap();
    let copy = std::fs::read(file).unwrap();
    assert_eq!(copy.len() as u64, SIZE);
    assert!(copy[1 << 20..][..4096].iter().all(|byte| *byte == 0x5a));
}

/// A program that serves until it is dropped.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server, and waits for its socket.
fn start(program: &str, socket: &Path, arguments: &[&str]) -> Serving {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .expect("the program can be started");
    let deadline = Instant::now() + Duration::from_secs(10);
    let serving = Serving(child);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "{program} does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    serving
}

async fn use_disk(pki: &Pki, socket: &Path, export: &str) {
    let endpoint = Endpoint::Unix { path: socket.to_owned() };
    let disk = Connection::connect(&pki.options(&endpoint, export)).await.unwrap();
    assert_eq!(disk.tls_peer().unwrap().subject, "CN=server");
    let data = vec![9; 1 << 20];
    disk.write(4096, data.clone().into(), WriteFlags::default()).await.unwrap();
    assert_eq!(disk.read(4096, 1 << 20).await.unwrap(), data);
    disk.close();
    disk.failed().await;
}

#[tokio::test]
async fn qemu_serves_us_over_tls() {
    let pki = Pki::new();
    let (socket, image) = (pki.path().join("s"), pki.path().join("disk.raw"));
    std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
    let object = credentials(&pki, "server");
    let path = socket.display().to_string();
    let image = image.display().to_string();
    let arguments = ["-t", "-f", "raw", "-x", "disk", "-k", &path, "--object", &object];
    let arguments = [&arguments[..], &["--tls-creds", "tls0", &image]].concat();
    let _serving = start("qemu-nbd", &socket, &arguments);
    use_disk(&pki, &socket, "disk").await;
}

#[tokio::test]
async fn nbdkit_serves_us_over_tls() {
    if is_missing("nbdkit_serves_us_over_tls", "nbdkit") {
        return;
    }
    let pki = Pki::new();
    let socket = pki.path().join("s");
    let path = socket.display().to_string();
    let certificates = format!("--tls-certificates={}", pki.path().display());
    let arguments = ["-f", "-U", &path, "--tls=require", "--tls-verify-peer", &certificates];
    let _serving = start("nbdkit", &socket, &[&arguments[..], &["memory", "4M"]].concat());
    use_disk(&pki, &socket, "").await;
}
