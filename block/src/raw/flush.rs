//! Durable flushes: one `fdatasync` for all that ask while another is running.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use tokio::sync::oneshot;

use super::core::Core;
use super::engine;
use crate::{Error, ErrorKind, Operation, Result};

type Answer = std::result::Result<(), Error>;

#[derive(Debug, Default)]
pub(super) struct Flusher {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    /// They came after the running `fdatasync` had begun, so that it need not cover what they
    /// are to cover. Bounded by the callers' own limits on requests in flight.
    waiting: Vec<oneshot::Sender<Answer>>,
    /// The reason of the first failure. The kernel reports a failed write-back once and then
    /// treats its pages as clean: no later success would mean anything.
    failed: Option<String>,
}

impl Flusher {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if an earlier flush has failed.
    pub(super) fn check(&self, core: &Core, operation: Operation) -> Result<()> {
        match &self.lock().failed {
            None => Ok(()),
            Some(reason) => {
                let detail = format!(
                    "an earlier flush has failed ({reason}), so that written data may be lost: \
                     check the disk and open it again"
                );
                Err(Error::new(operation, ErrorKind::Sticky, &core.name, detail))
            }
        }
    }

    /// Makes every later flush fail.
    pub(super) fn fail(&self, name: &str, error: &io::Error) {
        tracing::error!(disk = name, %error, "writing to stable storage has failed");
        self.lock().failed.get_or_insert_with(|| error.to_string());
    }

    pub(super) async fn flush(core: &Arc<Core>, operation: Operation) -> Result<()> {
        core.flusher.check(core, operation)?;
        let (answer, wait) = oneshot::channel();
        let start = {
            let mut state = core.flusher.lock();
            state.waiting.push(answer);
            !std::mem::replace(&mut state.running, true)
        };
        if start {
            let worker = Worker { core: Arc::clone(core), operation, finished: false };
            tokio::task::spawn_blocking(move || worker.run());
        }
        wait.await.unwrap_or_else(|_| Err(engine::shutdown(core, operation)))
    }
}

/// Syncs until nobody waits. If the runtime drops it before it ran, its waiters learn it.
struct Worker {
    core: Arc<Core>,
    operation: Operation,
    finished: bool,
}

impl Worker {
    fn run(mut self) {
        loop {
            let waiting = {
                let mut state = self.core.flusher.lock();
                if state.waiting.is_empty() {
                    state.running = false;
                    self.finished = true;
                    return;
                }
                std::mem::take(&mut state.waiting)
            };
            let result = self.sync();
            for answer in waiting {
                // A waiter that has lost interest needs no answer; a failure is kept anyway.
                let _ = answer.send(result.clone());
            }
        }
    }

    fn sync(&self) -> Answer {
        let core = &self.core;
        core.flusher.check(core, self.operation)?;
        sync_file(core).map_err(|error| {
            core.flusher.fail(&core.name, &error);
            core.error(self.operation, 0, 0, &error)
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // After a regular end another worker may be running.
        if !self.finished {
            let mut state = self.core.flusher.lock();
            state.running = false;
            state.waiting.clear();
        }
    }
}

fn sync_file(core: &Core) -> io::Result<()> {
    loop {
        match rustix::fs::fdatasync(&core.file) {
            Err(Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}
