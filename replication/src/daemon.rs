//! What both sides need to run as a process: directories, control thread, listening rules.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brep_block::storage;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::config::{DiskConfig, SideConfig};
use crate::control::{CommandError, ControlServer, EventBus, Handler};
use crate::reception::SharedListener;
use crate::{Error, ErrorKind, Result, side};

/// Most disks of a group: the record tells of all of them.
const DISKS_MAX: usize = 128;

/// Makes the state directory, and checks what can be checked of the disks' names.
pub(crate) fn prepare(config: &SideConfig) -> Result<()> {
    let state_dir = &config.state_dir;
    check_disks(&config.disks)?;
    let fail =
        |e: std::io::Error| Error::failed(format!("state directory {}: {e}", state_dir.display()));
    storage::create_dir(state_dir).map_err(fail)
}

/// Checks the names of the disks of a group.
///
/// # Errors
/// There is none, there are too many, or a name is none, or not its own.
pub(crate) fn check_disks(disks: &[DiskConfig]) -> Result<()> {
    if disks.is_empty() {
        return Err(Error::usage("no disk given: --disk NAME=FILE"));
    }
    if disks.len() > DISKS_MAX {
        return Err(Error::usage(format!("a group has at most {DISKS_MAX} disks")));
    }
    for (index, disk) in disks.iter().enumerate() {
        check_name("disk", &disk.name)?;
        if disks[..index].iter().any(|d| d.name == disk.name) {
            return Err(Error::usage(format!("disk {} is given twice", disk.name)));
        }
    }
    Ok(())
}

/// Whether no image lies where the side keeps a file of its own, which it makes and removes as it
/// needs it.
///
/// # Errors
/// Usage, with the image's name.
pub(crate) fn check_images(state_dir: &Path, disks: &[DiskConfig]) -> Result<()> {
    let folder = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    };
    let own = folder(state_dir);
    for disk in disks {
        let name = disk.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let there = disk.path.parent().is_some_and(|parent| folder(parent) == own);
        if there && is_own_file(name, disks) {
            return Err(Error::usage(format!(
                "disk {}: {} has the name of a file that is kept there for other ends, and would be \
                 removed as one: give the image another name, or put it elsewhere",
                disk.name,
                disk.path.display()
            )));
        }
    }
    Ok(())
}

/// Whether a file of the state directory is called so.
fn is_own_file(name: &str, disks: &[DiskConfig]) -> bool {
    let of_disk = |disk: &DiskConfig| {
        let rest = name.strip_prefix(disk.name.as_str()).and_then(|rest| rest.strip_prefix('.'));
        rest.is_some_and(|rest| match rest.split_once('.') {
            None => matches!(rest, "maps" | "log"),
            Some((number, _)) => number.parse::<u32>().is_ok(),
        })
    };
    matches!(name, "state" | "reserve") || disks.iter().any(of_disk)
}

/// What disks and their views may be called: a part of a file's and of an export's name.
///
/// # Errors
/// Usage, with what it is the name of.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match name.is_empty() || name.len() > 64 || !name.chars().all(fits) {
        false => Ok(()),
        true => Err(Error::usage(format!(
            "{what} name {name:?}: use 1 to 64 letters, digits, '-', '_' and '.'"
        ))),
    }
}

pub(crate) fn control_path(given: &Option<PathBuf>, state_dir: &Path) -> PathBuf {
    given.clone().unwrap_or_else(|| state_dir.join("control.sock"))
}

/// Runs a group in a thread of its own; tells when it has ended, and how.
pub(crate) fn run_in_thread(
    config: SideConfig,
    shutdown: CancellationToken,
) -> Result<oneshot::Receiver<Result<()>>> {
    let cannot = |e: std::io::Error| Error::failed(format!("cannot start a thread: {e}"));
    let group = config.shared.as_ref().map_or("", SharedListener::group).to_owned();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let (ended, end) = oneshot::channel();
    let run = move || {
        // Whatever is logged on this thread, and on those that it starts, is this group's.
        let _span = tracing::info_span!("group", name = group).entered();
        let result = runtime.block_on(side::run(config, shutdown));
        if let Err(error) = &result {
            tracing::error!(%error, "the group has failed; the others go on");
        }
        let _ = ended.send(result);
    };
    std::thread::Builder::new().name("data".to_owned()).spawn(run).map_err(cannot)?;
    Ok(end)
}

/// The thread of the control socket: it answers while the data path is stuck.
pub(crate) struct ControlThread {
    shutdown: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl ControlThread {
    /// Binds the socket and serves it.
    pub(crate) fn spawn(
        path: PathBuf,
        handler: Arc<dyn Handler>,
        events: EventBus,
    ) -> Result<Self> {
        #[cfg(feature = "simulation")]
        {
            use crate::simulation::{self, Control};
            if simulation::serve(&path, Control::new(Arc::clone(&handler), &events)) {
                return Ok(ControlThread { shutdown: CancellationToken::new(), thread: None });
            }
        }
        // Its error names the path. Before the runtime: one that is dropped here, inside another,
        // would panic.
        let server = ControlServer::bind(&path).map_err(|e| Error::failed(e.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::failed(format!("cannot start the control thread: {e}")))?;
        let shutdown = CancellationToken::new();
        let (token, span) = (shutdown.clone(), tracing::Span::current());
        let thread = std::thread::Builder::new()
            .name("brep-control".to_owned())
            .spawn(move || {
                let _span = span.entered();
                if let Err(error) = runtime.block_on(server.serve(handler, events, token)) {
                    tracing::error!(%error, "the control socket has failed");
                }
                // Whatever a command still waits for on this thread is given up.
                runtime.shutdown_background();
            })
            .map_err(|e| Error::failed(format!("cannot start a thread: {e}")))?;
        Ok(ControlThread { shutdown, thread: Some(thread) })
    }

    /// Answers what is being executed and ends.
    pub(crate) fn stop(self) {
        self.shutdown.cancel();
        if self.thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the control thread has panicked");
        }
    }
}

/// Carries out a command on the thread of the disks.
pub(crate) async fn on_data_thread(
    data: &tokio::runtime::Handle,
    command: impl Future<Output = std::result::Result<Value, CommandError>> + Send + 'static,
) -> std::result::Result<Value, CommandError> {
    match data.spawn(command).await {
        Ok(outcome) => outcome,
        Err(_) => Err(CommandError::failed("brep is going away")),
    }
}

impl From<Error> for CommandError {
    fn from(error: Error) -> Self {
        match error.kind() {
            ErrorKind::Failed => CommandError::failed(error.to_string()),
            ErrorKind::Usage => CommandError::usage(error.to_string()),
            ErrorKind::Refused => CommandError::refused(error.to_string()),
        }
    }
}
