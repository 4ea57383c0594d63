//! The registry of running instances: one small file for each, in the user's runtime directory.
//!
//! It only saves typing `--control`. An entry counts while the process that made it lives, which
//! is told by its id and its start time.
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use crate::exit::Failure;

/// Largest entry that is read, in bytes, and most entries that are looked at.
const ENTRY_BYTES_MAX: u64 = 64 << 10;
const ENTRIES_MAX: usize = 1024;

/// Entries that this process has made.
static ENTRIES: AtomicU32 = AtomicU32::new(0);

/// A running instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Instance {
    pub(crate) pid: u32,
    /// Clock ticks between boot and the start of the process.
    pub(crate) started: u64,
    /// `primary` or `secondary`, as it was started.
    pub(crate) role: String,
    pub(crate) name: String,
    pub(crate) control: PathBuf,
}

/// The directory that holds the entries.
#[derive(Debug, Clone)]
pub(crate) struct Registry(PathBuf);

impl Registry {
    /// The directory of this user; it need not exist.
    pub(crate) fn of_user() -> Self {
        let uid = rustix::process::getuid().as_raw();
        if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)
            && runtime.is_absolute()
        {
            return Registry(runtime.join("brep"));
        }
        let runtime = PathBuf::from(format!("/run/user/{uid}"));
        match runtime.is_dir() {
            true => Registry(runtime.join("brep")),
            false => Registry(PathBuf::from(format!("/tmp/brep-{uid}"))),
        }
    }

    /// Adds this process; the entry disappears when the result is dropped.
    pub(crate) fn add(&self, role: &str, name: &str, control: &Path) -> Result<Entry, Failure> {
        let pid = std::process::id();
        let instance = Instance {
            pid,
            started: start_time(pid).unwrap_or(0),
            role: role.to_owned(),
            name: name.to_owned(),
            control: control.to_owned(),
        };
        // A process may be several.
        let number = ENTRIES.fetch_add(1, Ordering::Relaxed);
        let file = self.0.join(format!("{pid}-{number}.json"));
        let written = self.make_directory().and_then(|()| write_entry(&file, &instance));
        written.map_err(|error| Failure::failed(format!("{}: {error}", file.display())))?;
        Ok(Entry(file))
    }

    /// The instances that run, in the order of their process ids. Entries of dead processes are
    /// removed.
    pub(crate) fn list(&self) -> Result<Vec<Instance>, Failure> {
        match self.check_directory() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Failure::failed(format!("{}: {error}", self.0.display()))),
            Ok(()) => {}
        }
        let mut instances = Vec::new();
        for file in fs::read_dir(&self.0)?.take(ENTRIES_MAX) {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read_entry(&path) {
                Some(instance) if instance.lives() => instances.push(instance),
                // Somebody else may remove it at the same time.
                _ => drop(fs::remove_file(&path)),
            }
        }
        instances.sort_by_key(|instance| instance.pid);
        Ok(instances)
    }

    /// The control socket of the one instance that runs.
    pub(crate) fn the_only_one(&self) -> Result<PathBuf, Failure> {
        let mut instances = self.list()?;
        match instances.len() {
            0 => Err(Failure::failed(
                "no instance is running here (or it belongs to another user): name its control \
                 socket with --control",
            )),
            1 => Ok(instances.remove(0).control),
            _ => {
                let mut message =
                    String::from("several instances are running; choose one with --control:");
                for Instance { pid, role, name, control, .. } in instances {
                    let control = control.display();
                    message
                        .push_str(&format!("\n  {role} {name} (pid {pid}): --control {control}"));
                }
                Err(Failure::usage(message))
            }
        }
    }

    fn make_directory(&self) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => self.check_directory(),
        }
    }

    /// Refuses a directory into which somebody else could put entries.
    fn check_directory(&self) -> io::Result<()> {
        let metadata = fs::symlink_metadata(&self.0)?;
        let private = metadata.is_dir()
            && metadata.uid() == rustix::process::getuid().as_raw()
            && metadata.permissions().mode() & 0o022 == 0;
        match private {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "must be a directory that only you can write to",
            )),
        }
    }
}

impl Instance {
    fn lives(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }
}

/// Keeps an entry in the registry.
#[derive(Debug)]
pub(crate) struct Entry(PathBuf);

impl Drop for Entry {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!("{}: {error}", self.0.display());
        }
    }
}

/// Writes an entry so that a reader sees all of it or nothing.
fn write_entry(file: &Path, instance: &Instance) -> io::Result<()> {
    let unfinished = file.with_extension("new");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&unfinished)?.write_all(&serde_json::to_vec(instance)?)?;
    fs::rename(&unfinished, file)
}

fn read_entry(path: &Path) -> Option<Instance> {
    let metadata = fs::symlink_metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > ENTRY_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// When a process was started, in clock ticks since boot; none if there is no such process.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything; 19 fields lie between it and the time.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    fn registry() -> (tempfile::TempDir, Registry) {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry(directory.path().join("brep"));
        (directory, registry)
    }

    fn put(registry: &Registry, instance: &Instance) {
        let file = registry.0.join(format!("{}-{}.json", instance.pid, instance.name));
        write_entry(&file, instance).unwrap();
    }

    fn this_process(name: &str) -> Instance {
        let pid = std::process::id();
        Instance {
            pid,
            started: start_time(pid).unwrap(),
            role: "primary".into(),
            name: name.into(),
            control: PathBuf::from("/x").join(name),
        }
    }

    #[test]
    fn an_instance_is_found_while_it_is_registered() {
        let (_directory, registry) = registry();
        assert_eq!(registry.the_only_one().unwrap_err().code, exit::FAILED);
        let entry = registry.add("primary", "a", Path::new("/x/a")).unwrap();
        assert_eq!(registry.the_only_one().unwrap(), Path::new("/x/a"));
        let mode = fs::metadata(&registry.0).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        drop(entry);
        assert_eq!(registry.list().unwrap(), []);
    }

    #[test]
    fn several_instances_are_a_usage_error_that_lists_them() {
        let (_directory, registry) = registry();
        registry.make_directory().unwrap();
        put(&registry, &this_process("a"));
        put(&registry, &this_process("b"));
        let failure = registry.the_only_one().unwrap_err();
        assert_eq!(failure.code, exit::USAGE);
        let text = failure.to_string();
        assert!(text.contains("--control /x/a") && text.contains("--control /x/b"), "{text}");
    }

    #[test]
    fn entries_of_dead_processes_and_of_reused_ids_are_removed() {
        let (_directory, registry) = registry();
        registry.make_directory().unwrap();
        let alive = this_process("alive");
        put(&registry, &alive);
        put(&registry, &Instance { pid: u32::MAX, ..this_process("dead") });
        put(&registry, &Instance { started: 1, ..this_process("reused") });
        fs::write(registry.0.join("bad.json"), "{").unwrap();
        assert_eq!(registry.list().unwrap(), [alive]);
        assert_eq!(fs::read_dir(&registry.0).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_not_trusted() {
        let (_directory, registry) = registry();
        registry.make_directory().unwrap();
        fs::set_permissions(&registry.0, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(registry.list().is_err());
        assert!(registry.add("primary", "a", Path::new("/x")).is_err());
    }
}
