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
            tokio::task::spawn_blocking(move || worker.run(sync_file));
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
    fn run(mut self, mut sync: impl FnMut(&Core) -> io::Result<()>) {
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
            let result = self.sync(&mut sync);
            for answer in waiting {
                // A waiter that has lost interest needs no answer; a failure is kept anyway.
                let _ = answer.send(result.clone());
            }
        }
    }

    fn sync(&self, sync: &mut impl FnMut(&Core) -> io::Result<()>) -> Answer {
        let core = &self.core;
        core.flusher.check(core, self.operation)?;
        sync(core).map_err(|error| {
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;
    use crate::Limits;

    fn core(file: File) -> Arc<Core> {
        Arc::new(Core::new("disk".into(), file, Limits::default(), 4096, None, None))
    }

    fn wait_for_flush(core: &Core) -> oneshot::Receiver<Answer> {
        let (answer, wait) = oneshot::channel();
        core.flusher.lock().waiting.push(answer);
        wait
    }

    #[test]
    fn a_flush_that_comes_during_a_sync_is_answered_by_the_next_one() {
        let core = core(tempfile::tempfile().unwrap());
        let mut first = wait_for_flush(&core);
        let mut shared = wait_for_flush(&core);
        let mut late = None;
        let mut syncs = 0;
        let worker =
            Worker { core: Arc::clone(&core), operation: Operation::Flush, finished: false };
        worker.run(|core| {
            syncs += 1;
            match &mut late {
                None => {
                    assert_eq!(first.try_recv().err(), Some(TryRecvError::Empty));
                    late = Some(wait_for_flush(core));
                }
                Some(late) => {
                    first.try_recv().unwrap().unwrap();
                    shared.try_recv().unwrap().unwrap();
                    assert_eq!(late.try_recv().err(), Some(TryRecvError::Empty));
                }
            }
            Ok(())
        });
        late.unwrap().try_recv().unwrap().unwrap();
        assert_eq!(syncs, 2, "two of the three share one");
        assert!(!core.flusher.lock().running);
    }

    #[tokio::test]
    async fn after_a_failed_sync_everything_durable_fails() {
        // The kernel cannot sync a pipe: a failure as good as any.
        let (pipe, _other) = std::io::pipe().unwrap();
        let core = core(File::from(std::os::fd::OwnedFd::from(pipe)));
        let error = core.flush(Operation::Flush).await.unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL.raw_os_error());
        for _ in 0..2 {
            let error = core.flush(Operation::Flush).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Sticky);
            assert!(error.detail().contains("an earlier flush has failed"), "{error}");
        }
        let error = core.write_durable(0, &[1]).unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Sticky, Operation::Write));
    }

    #[tokio::test]
    async fn every_waiter_learns_of_the_failure() {
        let core = core(tempfile::tempfile().unwrap());
        let mut waits = [wait_for_flush(&core), wait_for_flush(&core)];
        let worker =
            Worker { core: Arc::clone(&core), operation: Operation::Flush, finished: false };
        worker.run(|_| Err(Errno::IO.into()));
        for wait in &mut waits {
            assert_eq!(wait.try_recv().unwrap().unwrap_err().errno(), 5);
        }
        assert_eq!(core.flush(Operation::Flush).await.unwrap_err().kind(), ErrorKind::Sticky);
    }
}
