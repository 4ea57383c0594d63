//! The two processes of the demo.
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use brep_nbd::{Endpoint, NbdUri};
use brep_replication::control::ControlClient;
use brep_replication::status::Status;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long anything may take before the demo gives up.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);

/// The name of the disk and of its exports.
pub(super) const DISK: &str = "vda";

/// One side: a process of this program. Killed when dropped.
#[derive(Debug)]
pub(super) struct Side {
    name: &'static str,
    child: Child,
    control: PathBuf,
    log: PathBuf,
}

/// Starts `brep secondary` in the directory.
pub(super) fn secondary(directory: &Path) -> anyhow::Result<Side> {
    let listen = uri(directory, "secondary", "").to_string();
    Side::start("secondary", directory, &["--disk", "vda=replica.raw", "--listen", &listen])
}

/// Starts `brep primary` in the directory, with checkpoints on command.
pub(super) fn primary(directory: &Path) -> anyhow::Result<Side> {
    let peer = uri(directory, "secondary", "").to_string();
    let guest_listen = uri(directory, "primary", "").to_string();
    let mut args = vec!["--disk", "vda=disk.raw", "--checkpoint-interval", "off"];
    args.extend(["--peer", &peer, "--guest-listen", &guest_listen]);
    Side::start("primary", directory, &args)
}

/// Where a side serves an export.
pub(super) fn uri(directory: &Path, side: &str, export: &str) -> NbdUri {
    let path = directory.join(format!("{side}.sock"));
    NbdUri { endpoint: Endpoint::Unix { path }, export: export.to_owned(), tls: None }
}

impl Side {
    fn start(name: &'static str, directory: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let state = directory.join(format!("{name}.state"));
        let stderr = OpenOptions::new().create(true).append(true).open(&log)?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let child = Command::new(program)
            .arg(name)
            .args(["--name", &format!("demo-{name}")])
            .args(["--end-with-parent", "--state-dir"])
            .arg(&state)
            .args(args)
            .current_dir(directory)
            // A registry of its own, so that the demo does not disturb other instances.
            .env("XDG_RUNTIME_DIR", directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start the {name}"))?;
        Ok(Side { name, child, control: state.join("control.sock"), log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection to the control socket; waits until there is one.
    pub(super) fn control(&mut self) -> anyhow::Result<ControlClient> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match ControlClient::connect(&self.control, PATIENCE) {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => self.check_alive()?,
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Asks for the state again and again until it is the wanted one.
    pub(super) fn wait_for(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Status) -> bool,
    ) -> anyhow::Result<Status> {
        let mut control = self.control()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = status(&mut control)?;
            if wanted(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let reason = status.reason.unwrap_or_else(|| "no reason given".into());
                bail!("the {} is not {what} after {PATIENCE:?}: {reason}", self.name);
            }
            self.check_alive()?;
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends the process as a failing host would.
    pub(super) fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends the process cleanly.
    pub(super) fn terminate(mut self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the {} has ended badly: {status}", self.name);
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
        bail!("the {} does not end", self.name)
    }

    fn check_alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{}", self.epitaph(status)),
        }
    }

    fn epitaph(&self, status: ExitStatus) -> String {
        format!("the {} has ended ({status}); its log is {}", self.name, self.log.display())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn status(control: &mut ControlClient) -> anyhow::Result<Status> {
    let answer = control.execute("query-status", Value::Null)?;
    serde_json::from_value(answer).context("query-status has another form")
}
