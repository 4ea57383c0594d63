//! Commands without `--control`, against servers that are not brep, and against none.
mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use common::Dir;

#[test]
fn without_an_instance_every_command_fails_and_says_so() {
    let dir = Dir::new();
    for args in [&["status"][..], &["checkpoint"], &["failover"], &["stop"], &["resync", "--full"]]
    {
        let run = dir.brep(args);
        assert_eq!(run.code, 1, "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains("no instance is running"), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn a_control_socket_that_nobody_serves_is_named() {
    let dir = Dir::new();
    let run = dir.brep(&["status", "--control", "gone.sock"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("gone.sock"), "{}", run.stderr);
}

#[test]
fn a_server_that_never_speaks_is_given_up_in_time() {
    let dir = Dir::new();
    let _listener = UnixListener::bind(dir.file("mute.sock")).unwrap();
    let run = dir.brep(&["status", "--control", "mute.sock", "--timeout", "50ms"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("no answer within 50ms"), "{}", run.stderr);
}

#[test]
fn several_instances_exit_2_with_a_list_and_dead_ones_do_not_count() {
    let dir = Dir::new();
    let registry = dir.file("brep");
    std::fs::create_dir(&registry).unwrap();
    std::fs::set_permissions(&registry, std::fs::Permissions::from_mode(0o700)).unwrap();
    let entry = |name: &str, pid: u32, started: u64| {
        let text = format!(
            r#"{{"pid":{pid},"started":{started},"role":"primary","name":"{name}","control":"/x/{name}"}}"#
        );
        std::fs::write(registry.join(format!("{name}.json")), text).unwrap();
    };
    let pid = std::process::id();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let started = fields[19].parse().unwrap();
    entry("a", pid, started);
    entry("b", pid, started);
    entry("dead", pid, started + 1);

    let run = dir.brep(&["status"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    for said in ["several instances", "--control /x/a", "--control /x/b"] {
        assert!(run.stderr.contains(said), "{}", run.stderr);
    }
    assert!(!run.stderr.contains("dead"), "{}", run.stderr);
    assert!(!registry.join("dead.json").exists());

    std::fs::remove_file(registry.join("b.json")).unwrap();
    let run = dir.brep(&["status"]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("/x/a"), "{}", run.stderr);
}
