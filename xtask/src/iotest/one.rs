//! The run of one test, and the verdict on it.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::process;
use crate::python_packages;

use super::Options;
use super::diff;
use super::discover::Test;
use super::leftovers;

/// A test that ends with this code says that it cannot run here.
const SKIPPED: i32 = 77;
/// The mark that finds every process of a test.
const MARK: &str = "BREP_IOTEST_ID";
/// At most this much of a log is shown.
const SHOWN_BYTES_MAX: usize = 8192;

/// How a test ended.
#[derive(Debug)]
pub(crate) enum Verdict {
    Passed,
    /// Its output was written to its `.out` file.
    Blessed,
    Skipped(String),
    Failed(String),
}

/// What all tests of one run share.
pub(crate) struct Harness {
    /// Scratch folders, short enough for the paths of unix sockets.
    folder: PathBuf,
    lib_dir: PathBuf,
    binary: PathBuf,
    /// The crates' example programs.
    examples: PathBuf,
    /// The Linux guest, which may be missing.
    guest: PathBuf,
    /// Python packages of the tests, which may be missing.
    packages: PathBuf,
    python: PathBuf,
    bless: bool,
    /// Keep the scratch folders of tests that pass.
    keep: bool,
}

impl Harness {
    pub(crate) fn new(
        tests: &Path,
        binary: &Path,
        guest: &Path,
        options: &Options,
    ) -> Result<Self> {
        let parent = std::env::temp_dir();
        let folder = (0..1000)
            .map(|n| parent.join(format!("iotest-{}-{n}", std::process::id())))
            .find(|folder| fs::create_dir(folder).is_ok())
            .with_context(|| format!("cannot make a folder in {}", parent.display()))?;
        Ok(Self {
            folder,
            lib_dir: tests.join("lib"),
            binary: binary.to_owned(),
            examples: binary.with_file_name("examples"),
            guest: guest.to_owned(),
            packages: guest.with_file_name(python_packages::FOLDER),
            python: python()?,
            bless: options.bless,
            keep: options.keep,
        })
    }

    /// Drops the scratch folders of the run, or says where they are.
    pub(crate) fn close(self, failed: bool) {
        if self.keep || failed {
            println!("scratch folders: {}", self.folder.display());
        } else if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("cannot remove {}: {error}", self.folder.display());
        }
    }

    /// Runs a test; the seconds that it took come with the verdict.
    pub(crate) fn run(&self, test: &Test) -> (Verdict, f64) {
        let started = Instant::now();
        let verdict =
            self.attempt(test).unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")));
        (verdict, started.elapsed().as_secs_f64())
    }

    fn attempt(&self, test: &Test) -> Result<Verdict> {
        let scratch = Scratch::new(&self.folder.join(&test.name))?;
        let mark = format!("{}/{}", self.folder.display(), test.name);
        let mut child = self.spawn(test, &scratch, &mark)?;
        let ended = wait(&mut child, test.deadline)?;
        let faults = clean_up(&scratch, &format!("{MARK}={mark}"));
        let verdict = self.judge(test, &scratch, ended, faults)?;
        if !matches!(verdict, Verdict::Failed(_)) && !self.keep {
            fs::remove_dir_all(&scratch.folder)?;
        }
        Ok(verdict)
    }

    fn spawn(&self, test: &Test, scratch: &Scratch, mark: &str) -> Result<Child> {
        Command::new(&self.python)
            .arg("-B")
            .arg(&test.script)
            .env("BREP", &self.binary)
            .env("BREP_EXAMPLES", &self.examples)
            .env("BREP_GUEST", &self.guest)
            .env("BREP_XTASK", process::own_binary())
            .env("PYTHONPATH", std::env::join_paths([&self.lib_dir, &self.packages])?)
            .env("PYTHONUNBUFFERED", "1")
            .env("LC_ALL", "C.UTF-8")
            .env("TMPDIR", &scratch.work)
            .env("XDG_RUNTIME_DIR", &scratch.runtime)
            .env(MARK, mark)
            .env_remove("BREP_LOG")
            .current_dir(&scratch.work)
            .stdin(Stdio::null())
            .stdout(File::create(&scratch.stdout)?)
            .stderr(File::create(&scratch.stderr)?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", self.python.display()))
    }

    fn judge(
        &self,
        test: &Test,
        scratch: &Scratch,
        ended: Option<ExitStatus>,
        mut faults: Vec<String>,
    ) -> Result<Verdict> {
        let printed = scratch.printed(&self.binary)?;
        let status = ended.and_then(|status| status.code());
        if status == Some(SKIPPED) && faults.is_empty() {
            let reason = printed.lines().rev().find_map(|line| line.strip_prefix("SKIP: "));
            return Ok(match reason {
                Some(reason) => Verdict::Skipped(reason.to_owned()),
                None => Verdict::Failed("it was skipped without a reason".into()),
            });
        }
        match ended {
            None => faults.push(format!("it ran longer than {} s", test.deadline.as_secs())),
            Some(status) if status.success() => {}
            Some(status) => faults.push(match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, signal) => format!("killed by signal {}", signal.unwrap_or_default()),
            }),
        }
        if faults.is_empty() && self.bless {
            fs::write(test.expected(), &printed)?;
            return Ok(Verdict::Blessed);
        }
        match fs::read_to_string(test.expected()) {
            Ok(expected) => faults.extend(diff::unified(&expected, &printed)),
            Err(error) => faults.push(format!("{}: {error}", test.expected().display())),
        }
        if faults.is_empty() {
            return Ok(Verdict::Passed);
        }
        faults.push(tail(&scratch.stderr));
        Ok(Verdict::Failed(faults.join("\n")))
    }
}

/// The folder of one run of one test.
struct Scratch {
    folder: PathBuf,
    /// The test's current folder.
    work: PathBuf,
    /// Stands for the user's runtime folder, so that no two tests' instances meet.
    runtime: PathBuf,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Scratch {
    fn new(folder: &Path) -> Result<Self> {
        let scratch = Self {
            folder: folder.to_owned(),
            work: folder.join("w"),
            runtime: folder.join("r"),
            stdout: folder.join("stdout"),
            stderr: folder.join("stderr"),
        };
        fs::create_dir(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        fs::create_dir(&scratch.work)?;
        fs::create_dir(&scratch.runtime)?;
        Ok(scratch)
    }

    /// What the test printed, without the places that differ from run to run.
    fn printed(&self, binary: &Path) -> Result<String> {
        let raw = fs::read(&self.stdout)?;
        let text = String::from_utf8_lossy(&raw)
            .replace(&self.work.display().to_string(), "TEST_DIR")
            .replace(&self.runtime.display().to_string(), "RUNTIME_DIR")
            .replace(&binary.display().to_string(), "brep");
        Ok(text.lines().map(|line| format!("{}\n", line.trim_end())).collect())
    }
}

/// `None` if the test did not end in time.
fn wait(child: &mut Child, deadline: Duration) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > deadline {
            kill_group(child);
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends what the test left, and names it.
fn clean_up(scratch: &Scratch, mark: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for process in leftovers::processes(mark) {
        faults.push(format!("it left a process: {}", process.command));
    }
    leftovers::kill(mark);
    for folder in [&scratch.work, &scratch.runtime] {
        for socket in leftovers::sockets(folder) {
            faults.push(format!("it left a socket: {}", socket.display()));
        }
    }
    faults
}

fn kill_group(child: &Child) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // The group is usually empty by now.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// The interpreter itself: a wrapper in the search path costs time in every test.
fn python() -> Result<PathBuf> {
    let output = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()
        .context("cannot run python3: cargo xtask deps --install")?;
    ensure!(output.status.success(), "python3 does not work");
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

fn tail(file: &Path) -> String {
    let text = fs::read(file).unwrap_or_default();
    let from = text.len().saturating_sub(SHOWN_BYTES_MAX);
    String::from_utf8_lossy(text.get(from..).unwrap_or_default()).into_owned()
}
