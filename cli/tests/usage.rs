//! What is refused before anything happens, with which code and which words.
mod common;

use common::Dir;

const DISK: &str = "vda=disk.raw";

#[test]
fn command_lines_that_make_no_sense_exit_2_and_say_what_is_allowed() {
    let dir = Dir::new();
    let primary = |more: &[&'static str]| {
        let mut args = vec!["primary", "--state-dir", "s"];
        args.extend(more);
        args
    };
    const GUEST: [&str; 2] = ["--guest-listen", "nbd://127.0.0.1:0"];
    let table: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "Usage"),
        (vec!["nonsense"], "unrecognized subcommand"),
        (primary(&["--disk", DISK]), "--guest-listen"),
        (primary(&[&GUEST[..], &["--disk", "disk.raw"]].concat()), "NAME=FILE"),
        (primary(&[&GUEST[..], &["--disk", "vda=disk"]].concat()), "format=raw or format=qcow2"),
        (primary(&[&GUEST[..], &["--disk", "vda=d.raw,foo=1"]].concat()), "cache=writeback|none"),
        (
            primary(&[&GUEST[..], &["--disk", DISK, "--disk", "vda=b.raw"]].concat()),
            "the name is taken",
        ),
        (primary(&[&GUEST[..], &["--disk", DISK, "--disk", "b=disk.raw"]].concat()), "given twice"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--peer", "host:1"]].concat()), "nbd://"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--peer", "nbd://h/a/b"]].concat()), "group"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--peer", "nbds://h"]].concat()), "TLS"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--window-bytes", "64MB"]].concat()), "64M"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--window-requests", "0"]].concat()), "65536"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--peer-timeout", "5"]].concat()), "500ms"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--checkpoint-interval", "no"]].concat()), "off"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--ack", "maybe"]].concat()), "sync"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--durability", "maybe"]].concat()), "process"),
        (primary(&[&GUEST[..], &["--disk", DISK, "--on-peer-lost", "stall"]].concat()), "degrade"),
        (primary(&["--disk", DISK, "--guest-listen", "nbd://0.0.0.0:0"]), "--allow-plaintext"),
        (
            vec!["secondary", "--disk", DISK, "--state-dir", "s", "--listen", "nbd://[::]:0"],
            "--allow-plaintext",
        ),
        (vec!["nbd", "serve", "d.raw", "--listen", "nbd://0.0.0.0:0"], "--allow-plaintext"),
        (vec!["resync"], "--full"),
        (vec!["failover", "--to", "yesterday"], "checkpoint"),
        (vec!["status", "--timeout", "0s"], "longer"),
        (vec!["image", "create", "d.raw", "10GB"], "10G"),
        (vec!["image", "create", "d", "10G"], "--format raw"),
        (vec!["image", "info", "d.vmdk"], "--format raw"),
    ];
    for (args, said) in table {
        let run = dir.brep(&args);
        assert_eq!(run.code, 2, "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(said), "{args:?}: {}", run.stderr);
        assert_eq!(run.stdout, "", "{args:?}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "a refused command has left {left:?}");
}

#[test]
fn check_and_compare_exit_64_because_2_is_a_result() {
    let dir = Dir::new();
    for args in [
        &["image", "check"][..],
        &["image", "check", "x"],
        &["image", "check", "x.qcow2", "--repair", "some"],
        &["image", "compare", "a.raw"],
        &["image", "compare", "a.raw", "b"],
        &["-v", "image", "compare", "a.raw", "b.raw", "-F", "vmdk"],
    ] {
        let run = dir.brep(args);
        assert_eq!(run.code, 64, "{args:?}: {}", run.stderr);
    }
}

#[test]
fn help_and_version_succeed_on_stdout() {
    let dir = Dir::new();
    for args in [&["--help"][..], &["--version"], &["primary", "--help"], &["image", "check", "-h"]]
    {
        let run = dir.brep(args);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{args:?}");
        assert!(run.stdout.contains("brep"), "{args:?}");
    }
}

#[test]
fn a_bad_log_filter_is_a_usage_error() {
    let dir = Dir::new();
    let output = dir.command(&["status"]).env("BREP_LOG", "brep=loud").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("BREP_LOG"));
}
