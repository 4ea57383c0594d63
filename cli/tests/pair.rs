//! A pair of real processes, driven by the commands alone.
mod common;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Dir, Run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(20);
const PRIMARY: [&str; 2] = ["--control", "a/control.sock"];
const SECONDARY: [&str; 2] = ["--control", "b/control.sock"];

/// A side of the pair. Killed if a test fails.
struct Daemon(Child);

impl Daemon {
    fn start(mut command: Command) -> Self {
        Daemon(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn signal(mut self, signal: Signal) -> Option<i32> {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
        self.0.wait().unwrap().code()
    }

    fn wait(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn secondary(dir: &Dir) -> Daemon {
    let disk = ["secondary", "--name", "b", "--disk", "vda=b.raw", "--state-dir", "b"];
    let listen = ["--listen", "nbd+unix:///?socket=b.sock"];
    Daemon::start(dir.command(&[&disk[..], &listen].concat()))
}

fn primary(dir: &Dir) -> Daemon {
    let disk = ["primary", "--name", "a", "--disk", "vda=a.raw", "--state-dir", "a"];
    let guest = ["--guest-listen", "nbd+unix:///?socket=a.sock", "--checkpoint-interval", "off"];
    let peer = ["--peer", "nbd+unix:///?socket=b.sock"];
    Daemon::start(dir.command(&[&disk[..], &guest, &peer].concat()))
}

/// A pair that is in sync, with different contents at the start.
fn pair(dir: &Dir) -> (Daemon, Daemon) {
    std::fs::write(dir.file("a.raw"), vec![1; 4 << 20]).unwrap();
    std::fs::write(dir.file("b.raw"), vec![2; 4 << 20]).unwrap();
    let pair = (primary(dir), secondary(dir));
    wait_for(dir, &PRIMARY, "/disks/0/state", "in-sync");
    wait_for(dir, &SECONDARY, "/promotable", true);
    pair
}

fn wait_for(dir: &Dir, side: &[&str; 2], pointer: &str, wanted: impl Into<Value>) {
    let wanted = wanted.into();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let run = dir.brep(&[&["status", "--json"], &side[..]].concat());
        let status: Value = serde_json::from_str(&run.stdout).unwrap_or(Value::Null);
        if status.pointer(pointer) == Some(&wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{pointer} is not {wanted}: {status:#} {}", run.stderr);
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ask(dir: &Dir, side: &[&str; 2], command: &[&str]) -> Run {
    dir.brep(&[command, &side[..]].concat())
}

#[test]
fn a_pair_is_driven_by_its_commands() {
    let dir = Dir::new();
    let (primary, secondary) = pair(&dir);

    let ambiguous = dir.brep(&["status"]);
    assert_eq!(ambiguous.code, 2, "{}", ambiguous.stderr);
    assert!(ambiguous.stderr.contains("a/control.sock"), "{}", ambiguous.stderr);

    let status = ask(&dir, &PRIMARY, &["status"]);
    assert_eq!(status.code, 0, "{}", status.stderr);
    for said in ["a · primary · connected to b", "in sync", "4 MiB", "a.raw"] {
        assert!(status.stdout.contains(said), "{said}: {}", status.stdout);
    }
    for side in [&PRIMARY, &SECONDARY] {
        let checkpoint = ask(&dir, side, &["checkpoint"]);
        assert_eq!(checkpoint.code, 0, "{}", checkpoint.stderr);
        assert!(checkpoint.stdout.ends_with(" committed\n"), "{}", checkpoint.stdout);
    }
    let wrong_side = ask(&dir, &PRIMARY, &["failover"]);
    assert_eq!(wrong_side.code, 3, "{}", wrong_side.stderr);
    let wrong_side = ask(&dir, &SECONDARY, &["resync", "--full"]);
    assert_eq!(wrong_side.code, 3, "{}", wrong_side.stderr);

    let stopped = ask(&dir, &PRIMARY, &["stop"]);
    assert_eq!((stopped.code, stopped.stdout.as_str()), (0, "stopped\n"), "{}", stopped.stderr);
    assert_eq!(primary.wait(), Some(0));
    let only = dir.brep(&["status"]);
    assert!(only.stdout.contains("b · secondary"), "{}{}", only.stdout, only.stderr);
    assert_eq!(secondary.signal(Signal::TERM), Some(0));
    assert_eq!(dir.brep(&["status"]).code, 1);
    let equal = dir.brep(&["image", "compare", "a.raw", "b.raw"]);
    assert_eq!(equal.code, 0, "{}{}", equal.stdout, equal.stderr);
}

#[test]
fn a_secondary_that_was_away_is_caught_up_with_and_copied_in_full_on_command() {
    let dir = Dir::new();
    let (primary, secondary) = pair(&dir);
    assert_eq!(secondary.signal(Signal::KILL), None);
    wait_for(&dir, &PRIMARY, "/disks/0/state", "disconnected");
    let uri = "nbd+unix:///vda?socket=a.sock";
    let mut write = Command::new("qemu-io");
    write.args(["-f", "raw", "-c", "write -P 9 1M 1M", uri]).current_dir(dir.path());
    let Ok(wrote) = write.output() else {
        eprintln!("SKIP: a_secondary_that_was_away: qemu-io not found");
        return;
    };
    assert!(wrote.status.success(), "{wrote:?}");

    let status = ask(&dir, &PRIMARY, &["status"]);
    for said in ["why:", "do:  ", "disconnected", "1 MiB"] {
        assert!(status.stdout.contains(said), "{said}: {}", status.stdout);
    }
    let secondary = self::secondary(&dir);
    wait_for(&dir, &PRIMARY, "/disks/0/state", "in-sync");
    // Nothing tells what the secondary lacks any more: that is no guess of brep's.
    assert_eq!(primary.signal(Signal::TERM), Some(0));
    std::fs::remove_file(dir.file("a/vda.maps")).unwrap();
    let primary = self::primary(&dir);
    wait_for(&dir, &PRIMARY, "/link", "refused");
    let status = ask(&dir, &PRIMARY, &["status"]);
    assert!(status.stdout.contains("do:  brep resync --full"), "{}", status.stdout);
    let resync = ask(&dir, &PRIMARY, &["resync", "--full", "--wait"]);
    assert_eq!((resync.code, resync.stdout.as_str()), (0, "in sync\n"), "{}", resync.stderr);
    assert_eq!(primary.signal(Signal::TERM), Some(0));
    assert_eq!(secondary.signal(Signal::TERM), Some(0));
    let equal = dir.brep(&["image", "compare", "a.raw", "b.raw"]);
    assert_eq!(equal.code, 0, "{}{}", equal.stdout, equal.stderr);
}

#[test]
fn a_failover_can_be_repeated_and_only_with_its_target() {
    let dir = Dir::new();
    let (primary, secondary) = pair(&dir);
    assert_eq!(primary.signal(Signal::KILL), None);
    let failover = ask(&dir, &SECONDARY, &["failover", "--to", "checkpoint"]);
    assert_eq!(failover.code, 0, "{}", failover.stderr);
    assert!(failover.stdout.starts_with("promoted to checkpoint "), "{}", failover.stdout);
    let again = ask(&dir, &SECONDARY, &["failover"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(again.stdout.contains("had been before"), "{}", again.stdout);
    let other = ask(&dir, &SECONDARY, &["failover", "--to", "latest"]);
    assert_eq!(other.code, 3, "{}", other.stdout);
    wait_for(&dir, &SECONDARY, "/disks/0/state", "promoted");
    let status = ask(&dir, &SECONDARY, &["status"]);
    assert!(status.stdout.contains("b · promoted"), "{}", status.stdout);
    assert_eq!(secondary.signal(Signal::INT), Some(0));
}
