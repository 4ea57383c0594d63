//! Other people's clients against this server.

mod server_support;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use brep_block::{BlockDevice, Memory, RawFile, RawFileOptions, WriteFlags};
use brep_nbd::server::{Export, ServerConfig, StaticExports};
use server_support::Fixture;

const SIZE: u64 = 8 << 20;

/// Runs a program next to the server.
async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments);
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().expect("the program runs")
}

/// Runs a program that has to succeed; returns what it printed.
async fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

fn is_missing(test: &str, program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
    if !found {
        eprintln!("SKIP: {test}: {program} not found");
    }
    !found
}

fn pattern() -> Vec<u8> {
    let mut data = (0..251).collect::<Vec<u8>>().repeat(SIZE as usize / 251 + 1);
    data.truncate(SIZE as usize);
    data[2 << 20..5 << 20].fill(0);
    data
}

/// Serves a file with a pattern and a hole as "disk", and memory with the same as "memory".
async fn serve(directory: &Path) -> (Fixture, Vec<u8>) {
    let data = pattern();
    let file = directory.join("disk.raw");
    std::fs::write(&file, &data).unwrap();
    let memory = Memory::new("memory", SIZE);
    memory.write(0, data.clone().into(), WriteFlags::default()).await.unwrap();
    memory.discard(2 << 20, 3 << 20).await.unwrap();
    let exports = StaticExports::new();
    let raw = RawFile::open(&file, RawFileOptions::default()).expect("opened");
    exports.add(Export::new("disk", raw).multi_conn(true));
    exports.add(Export::new("memory", memory).multi_conn(true).description("a copy"));
    (Fixture::serve(Arc::new(exports), ServerConfig::default()).await, data)
}

fn uri(fixture: &Fixture, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", fixture.path.display())
}

#[tokio::test]
async fn qemu_img_reads_compares_and_maps() {
    let directory = tempfile::tempdir().unwrap();
    let (fixture, data) = serve(directory.path()).await;
    let (disk, memory) = (uri(&fixture, "disk"), uri(&fixture, "memory"));
    let info = succeed("qemu-img", &["info", &disk]).await;
    assert!(info.contains(&format!("({SIZE} bytes)")), "{info}");
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", &disk, &memory]).await;

    let copy = directory.path().join("copy.raw");
    let copy_name = copy.to_str().unwrap();
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "raw", &memory, copy_name]).await;
    assert!(std::fs::read(&copy).unwrap() == data);

    let map = succeed("qemu-img", &["map", "--output=json", "-f", "raw", &memory]).await;
    let hole = map.lines().find(|line| line.contains("\"zero\": true")).expect("a hole");
    assert!(hole.contains("\"start\": 2097152, \"length\": 3145728"), "{map}");
}

#[tokio::test]
async fn qemu_img_finds_a_difference() {
    let directory = tempfile::tempdir().unwrap();
    let (fixture, _) = serve(directory.path()).await;
    let (disk, memory) = (uri(&fixture, "disk"), uri(&fixture, "memory"));
    succeed("qemu-io", &["-f", "raw", "-c", "write -P 9 7339520 1", &memory]).await;
    let output = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &disk, &memory]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("mismatch at offset 7339520"), "{text}");
}

#[tokio::test]
async fn qemu_img_converts_onto_an_export() {
    let directory = tempfile::tempdir().unwrap();
    let (fixture, data) = serve(directory.path()).await;
    let (disk, memory) = (uri(&fixture, "disk"), uri(&fixture, "memory"));
    succeed("qemu-io", &["-f", "raw", "-c", "write -P 1 0 8M", &memory]).await;
    succeed("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &disk, &memory]).await;
    let copy = directory.path().join("copy.raw");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "raw", &memory, copy.to_str().unwrap()])
        .await;
    assert!(std::fs::read(&copy).unwrap() == data);
}

#[tokio::test]
async fn qemu_io_writes_zeroes_discards_and_flushes() {
    let directory = tempfile::tempdir().unwrap();
    let (fixture, _) = serve(directory.path()).await;
    for export in ["disk", "memory"] {
        let output = succeed(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-t",
                "writeback",
                "-c",
                "write -P 7 1000 100000",
                "-c",
                "write -f -P 8 0 4096",
                "-c",
                "write -z 65536 65536",
                "-c",
                "write -z -u 200k 1M",
                "-c",
                "discard 6M 1M",
                "-c",
                "flush",
                "-c",
                "aio_write -P 3 7M 4096",
                "-c",
                "aio_write -P 4 7168k 64k",
                "-c",
                "aio_flush",
                "-c",
                "read -P 8 0 4096",
                "-c",
                "read -P 7 4096 61440",
                "-c",
                "read -P 0 65536 65536",
                "-c",
                "read -P 0 200k 1M",
                &uri(&fixture, export),
            ],
        )
        .await;
        assert!(!output.contains("fail"), "{export}: {output}");
    }
}

#[tokio::test]
async fn qemu_img_bench_runs_with_many_requests_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    let (fixture, _) = serve(directory.path()).await;
    for mode in [&["-w"][..], &[]] {
        let disk = uri(&fixture, "disk");
        let mut arguments = vec!["bench", "-f", "raw", "-c", "500", "-d", "16", "-s", "4096"];
        arguments.extend(mode);
        arguments.push(&disk);
        succeed("qemu-img", &arguments).await;
    }
}

#[tokio::test]
async fn nbdinfo_describes_an_export() {
    if is_missing("nbdinfo_describes_an_export", "nbdinfo") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, _) = serve(directory.path()).await;
    let info = succeed("nbdinfo", &["--json", &uri(&fixture, "memory")]).await;
    for expected in [
        "\"export-size\": 8388608",
        "\"description\": \"a copy\"",
        "\"base:allocation\"",
        "\"can_multi_conn\": true",
        "\"can_df\": true",
        "\"is_read_only\": false",
    ] {
        assert!(info.contains(expected), "{expected}: {info}");
    }
    let list = succeed("nbdinfo", &["--list", &uri(&fixture, "")]).await;
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"memory\""), "{list}");
    let map = succeed("nbdinfo", &["--map", &uri(&fixture, "memory")]).await;
    let rows: Vec<Vec<&str>> = map.lines().map(|row| row.split_whitespace().collect()).collect();
    assert_eq!(rows.len(), 3, "{map}");
    assert_eq!(rows[1][..3], ["2097152", "3145728", "3"]);
}

#[tokio::test]
async fn nbdcopy_copies_over_several_connections() {
    if is_missing("nbdcopy_copies_over_several_connections", "nbdcopy") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, data) = serve(directory.path()).await;
    let (disk, memory) = (uri(&fixture, "disk"), uri(&fixture, "memory"));
    succeed("qemu-io", &["-f", "raw", "-c", "write -P 1 0 8M", &memory]).await;
    succeed("nbdcopy", &["--flush", &disk, &memory]).await;
    let copy = directory.path().join("copy.raw");
    succeed("nbdcopy", &[&memory, copy.to_str().unwrap()]).await;
    assert!(std::fs::read(&copy).unwrap() == data);
}

#[tokio::test]
async fn fio_verifies_what_it_wrote() {
    if is_missing("fio_verifies_what_it_wrote", "fio") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (fixture, _) = serve(directory.path()).await;
    let target = format!("--uri={}", uri(&fixture, "disk"));
    let output = run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &target,
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--iodepth=32",
            "--size=8M",
            "--verify=crc32c",
            "--do_verify=1",
            // Else a file with what was verified is left where the test runs.
            "--verify_state_save=0",
        ],
    )
    .await;
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("engine nbd not loadable") {
        eprintln!("SKIP: fio_verifies_what_it_wrote: fio's nbd engine not found");
        return;
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{errors}");
}
