//! Threads, runtimes and signals of commands that run until they are told to end.
use std::future::Future;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::exit::{FAILED, Failure};

/// A runtime that stays in the thread that drives it.
pub(crate) fn current_thread() -> Result<Runtime, Failure> {
    Ok(Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?)
}

/// Runs `serve` in a thread of its own until it ends, and cancels its token when SIGTERM or
/// SIGINT arrives: then it ends cleanly. A second signal ends the process at once.
pub(crate) fn until_signal<F, Fut, E>(thread: &str, serve: F) -> Result<(), Failure>
where
    F: FnOnce(CancellationToken) -> Fut + Send + 'static,
    Fut: Future<Output = Result<(), E>>,
    E: Send + 'static,
    Failure: From<E>,
{
    let runtime = current_thread()?;
    // Before anything is served: from here on no signal may end the process uncleanly.
    let mut signals = {
        let _guard = runtime.enter();
        Signals::new()?
    };
    let shutdown = CancellationToken::new();
    let (ended, mut end) = tokio::sync::oneshot::channel();
    let token = shutdown.clone();
    let data = std::thread::Builder::new()
        .name(thread.to_owned())
        .spawn(move || {
            let result = current_thread().and_then(|data| Ok(data.block_on(serve(token))?));
            // The receiver lives until this thread has been joined.
            let _ = ended.send(());
            result
        })
        .context("cannot start a thread")?;
    runtime.block_on(async {
        tokio::select! {
            _ = &mut end => return,
            name = signals.next() => {
                tracing::info!("{name}: stopping; a second one ends the process at once");
                shutdown.cancel();
            }
        }
        tokio::select! {
            _ = &mut end => {}
            name = signals.next() => {
                tracing::warn!("{name} once more: ending without a clean stop");
                std::process::exit(i32::from(FAILED));
            }
        }
    });
    match data.join() {
        Ok(result) => result,
        Err(_) => Err(Failure::failed("the data thread has panicked; see the log")),
    }
}

/// Threads that each drive a runtime of their own, until this is dropped.
pub(crate) struct Workers {
    threads: Vec<(Handle, JoinHandle<()>)>,
    stop: CancellationToken,
}

impl Workers {
    pub(crate) fn start(count: usize, name: &str) -> Result<Self, Failure> {
        let mut workers = Workers { threads: Vec::new(), stop: CancellationToken::new() };
        for number in 1..=count {
            let (runtime, stop) = (current_thread()?, workers.stop.clone());
            let handle = runtime.handle().clone();
            let thread = std::thread::Builder::new()
                .name(format!("{name}-{number}"))
                .spawn(move || runtime.block_on(stop.cancelled()))
                .context("cannot start a thread")?;
            workers.threads.push((handle, thread));
        }
        Ok(workers)
    }

    pub(crate) fn runtimes(&self) -> impl Iterator<Item = Handle> {
        self.threads.iter().map(|(runtime, _)| runtime.clone())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
        for (_, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread has panicked");
            }
        }
    }
}

/// Runs `clean_up` when SIGTERM or SIGINT arrives, and ends the process.
pub(crate) fn end_on_signal(clean_up: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let runtime = current_thread()?;
    let mut signals = {
        let _guard = runtime.enter();
        Signals::new()?
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread
        .spawn(move || {
            runtime.block_on(signals.next());
            clean_up();
            std::process::exit(i32::from(FAILED));
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Ends the process if it is still there after this time: a device that hangs keeps threads which
/// nothing else can end, and which the end of a runtime waits for.
pub(crate) fn end_after(
    time: Duration,
    clean_up: impl FnOnce() + Send + 'static,
) -> Result<(), Failure> {
    let thread = std::thread::Builder::new().name("deadline".into());
    let wait = move || {
        std::thread::sleep(time);
        tracing::error!("not everything is closed after {time:?}: ending without that");
        clean_up();
        std::process::exit(i32::from(FAILED));
    };
    thread.spawn(wait).context("cannot start a thread")?;
    Ok(())
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).context("cannot wait for signals");
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
