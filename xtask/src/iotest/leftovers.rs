//! What a test left behind: processes and sockets.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A child that was told to end may need a moment.
const GRACE: Duration = Duration::from_millis(500);
/// A process that was killed is gone soon, unless the kernel holds it.
const KILL_MAX: Duration = Duration::from_secs(5);

/// A process that carries the test's mark in its environment.
pub(crate) struct Process {
    pid: Pid,
    pub(crate) command: String,
}

/// Processes whose environment holds `mark` (`NAME=VALUE`), after a moment's grace.
///
/// The environment is inherited through every fork, also by a process that leaves its group.
pub(crate) fn processes(mark: &str) -> Vec<Process> {
    poll(GRACE, || marked(mark))
}

/// Kills every process that carries the mark, and waits until they are gone.
pub(crate) fn kill(mark: &str) {
    poll(KILL_MAX, || {
        let found = marked(mark);
        for process in &found {
            // It may have ended by itself since it was found, which is what is wanted.
            let _ = kill_process(process.pid, Signal::KILL);
        }
        found
    });
}

/// What `find` finds in the end: nothing, or what is there when the time is over.
fn poll(time_max: Duration, find: impl Fn() -> Vec<Process>) -> Vec<Process> {
    let started = Instant::now();
    loop {
        let found = find();
        if found.is_empty() || started.elapsed() > time_max {
            return found;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn marked(mark: &str) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let has_mark = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    pids.filter(has_mark)
        .filter_map(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            Some(Process { pid: Pid::from_raw(pid)?, command })
        })
        .collect()
}

/// Socket files below a folder.
pub(crate) fn sockets(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_socket() => found.push(entry.path()),
            Ok(kind) if kind.is_dir() => found.extend(sockets(&entry.path())),
            _ => {}
        }
    }
    found
}
