//! A command that has the export for as long as it runs.
use std::os::unix::process::ExitStatusExt;

use anyhow::Context;
use brep_nbd::{Endpoint, NbdUri};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::exit::{FAILED, Failure};

/// A directory of our own, which only this user can enter, for the socket.
#[derive(Debug)]
pub(super) struct Place {
    directory: TempDir,
}

impl Place {
    pub(super) fn new() -> Result<Self, Failure> {
        let directory = TempDir::with_prefix("brep-").context("cannot make a directory")?;
        Ok(Place { directory })
    }

    pub(super) fn endpoint(&self) -> Endpoint {
        Endpoint::Unix { path: self.directory.path().join("nbd.sock") }
    }
}

/// Runs the command in a shell, and returns its exit code; 128 and the signal's number if one
/// ended it. When we are told to stop, so is it.
pub(super) async fn run(
    command: &str,
    uri: &NbdUri,
    shutdown: &CancellationToken,
) -> Result<u8, Failure> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).env("uri", uri.to_string()).env("exportname", &uri.export);
    match &uri.endpoint {
        Endpoint::Unix { path } => shell.env("unixsocket", path),
        Endpoint::Tcp { port, .. } => shell.env("port", port.to_string()),
    };
    let mut child = shell.kill_on_drop(true).spawn().context("--run: cannot start /bin/sh")?;
    let status = tokio::select! {
        status = child.wait() => status,
        () = shutdown.cancelled() => {
            stop(&child);
            child.wait().await
        }
    };
    let status = status.context("--run")?;
    let signal = || status.signal().map(|signal| 128 + signal);
    Ok(status.code().or_else(signal).and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED))
}

fn stop(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid
        && let Err(error) = kill_process(pid, Signal::TERM)
    {
        tracing::warn!("--run: the command cannot be told to stop: {error}");
    }
}
