//! Reads by io_uring: one ring per current-thread runtime, driven by a task of that runtime.
//!
//! It is a shortcut only. Where there is no ring (another kind of runtime, a kernel that refuses)
//! and where a read fails or ends early, the caller does the same again with plain calls. Writes
//! do not come here: file systems hand most of them to the kernel's own threads, so that they
//! cost as much as by ours (`examples/random_io.rs` measures it).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use io_uring::{IoUring, opcode, squeue, types};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id, RuntimeFlavor};
use tokio::sync::{Notify, oneshot};

use super::super::core::Core;
use crate::Buffer;

/// Reads that the kernel has at a time; the others wait their turn.
const IN_FLIGHT_MAX: usize = 256;

/// The kernel has refused a ring once; it will not change its mind.
static REFUSED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The ring of the runtime that this thread ran last.
    static RING: RefCell<Option<(Id, Weak<Ring>)>> = const { RefCell::new(None) };
}

/// One read with everything that it uses. The kernel owns the buffer until it completes.
pub(in crate::raw) struct Read {
    pub(in crate::raw) core: Arc<Core>,
    pub(in crate::raw) offset: u64,
    pub(in crate::raw) buffer: Buffer,
    /// The index from which on the buffer is filled.
    pub(in crate::raw) from: usize,
}

/// What became of a read.
pub(in crate::raw) enum Outcome {
    /// The kernel has read this many bytes.
    Done(usize, Buffer),
    /// Use plain calls.
    Refused(Buffer),
    /// The runtime is shutting down.
    Shutdown,
}

/// Reads by the ring of the current runtime.
pub(in crate::raw) async fn read(read: Read) -> Outcome {
    let Some(ring) = current() else { return Outcome::Refused(read.buffer) };
    let (answer, wait) = oneshot::channel();
    if let Err(read) = ring.enqueue(read, answer) {
        return Outcome::Refused(read.buffer);
    }
    drop(ring);
    match wait.await {
        Ok((result, read)) => match usize::try_from(result) {
            Ok(len) => Outcome::Done(len, read.buffer),
            Err(_) => Outcome::Refused(read.buffer),
        },
        Err(_) => Outcome::Shutdown,
    }
}

/// The ring of the runtime that polls us, made on first use.
fn current() -> Option<Arc<Ring>> {
    if REFUSED.load(Ordering::Relaxed) {
        return None;
    }
    let runtime = Handle::try_current().ok()?;
    if runtime.runtime_flavor() != RuntimeFlavor::CurrentThread {
        return None;
    }
    RING.with_borrow_mut(|slot| {
        if let Some((id, ring)) = slot
            && *id == runtime.id()
            && let Some(ring) = ring.upgrade()
            && !ring.lock().closed
        {
            return Some(ring);
        }
        let ring = Ring::start(&runtime)?;
        *slot = Some((runtime.id(), Arc::downgrade(&ring)));
        Some(ring)
    })
}

type Answer = oneshot::Sender<(i32, Read)>;

struct Ring {
    state: Mutex<State>,
    /// Something has been enqueued.
    wake: Notify,
}

struct State {
    uring: IoUring,
    /// By user data. What is `Some` belongs to the kernel.
    slots: Vec<Option<(Read, Answer)>>,
    free: Vec<usize>,
    /// Not yet in a slot; bounded by the callers' limits on requests in flight.
    queue: VecDeque<(Read, Answer)>,
    closed: bool,
}

impl Ring {
    fn start(runtime: &Handle) -> Option<Arc<Ring>> {
        let uring = match IoUring::new(IN_FLIGHT_MAX as u32) {
            Ok(uring) => uring,
            Err(error) => {
                REFUSED.store(true, Ordering::Relaxed);
                tracing::info!(%error, "no io_uring: what waits for a disk uses threads");
                return None;
            }
        };
        let descriptor = uring.as_fd().try_clone_to_owned().ok()?;
        // SAFETY: an `OwnedFd` is the same open descriptor until it is dropped.
        let descriptor =
            unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.ok()?;
        let state = State {
            uring,
            slots: (0..IN_FLIGHT_MAX).map(|_| None).collect(),
            free: (0..IN_FLIGHT_MAX).collect(),
            queue: VecDeque::new(),
            closed: false,
        };
        let ring = Arc::new(Ring { state: Mutex::new(state), wake: Notify::new() });
        let driver = Driver { descriptor, ring: Arc::clone(&ring) };
        runtime.spawn(driver.run());
        Some(ring)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver submits it together with whatever else is enqueued until it runs.
    fn enqueue(&self, read: Read, answer: Answer) -> Result<(), Read> {
        let mut state = self.lock();
        if state.closed {
            return Err(read);
        }
        state.queue.push_back((read, answer));
        if state.queue.len() == 1 {
            self.wake.notify_one();
        }
        Ok(())
    }
}

/// Submits and completes until its runtime drops it.
struct Driver {
    /// The ring's, once more: readable when something has completed.
    descriptor: AsyncFd<OwnedFd>,
    ring: Arc<Ring>,
}

impl Driver {
    async fn run(self) {
        loop {
            let pending = self.ring.lock().submit();
            if pending {
                // The kernel is short of something: it is asked again after everybody else.
                tokio::task::yield_now().await;
            }
            tokio::select! {
                readable = self.descriptor.readable() => match readable {
                    // Before completing: what completes meanwhile makes it readable again.
                    Ok(mut readable) => readable.clear_ready(),
                    // The runtime is shutting down; dropping the driver does the rest.
                    Err(_) => return,
                },
                () = self.ring.wake.notified() => {}
                () = std::future::ready(()), if pending => {}
            }
            self.ring.lock().complete();
        }
    }
}

impl Drop for Driver {
    /// No memory may be freed that the kernel still uses: waits for every read.
    fn drop(&mut self) {
        let mut state = self.ring.lock();
        state.closed = true;
        state.queue.clear();
        while state.free.len() < state.slots.len() {
            match state.uring.submit_and_wait(1) {
                Ok(_) => state.complete(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "memory of unfinished reads is given up");
                    for slot in &mut state.slots {
                        std::mem::forget(slot.take());
                    }
                    return;
                }
            }
        }
    }
}

impl State {
    /// Hands the queue to the kernel; whether it has to be asked again.
    fn submit(&mut self) -> bool {
        while !self.queue.is_empty() && !self.uring.submission().is_full() {
            let Some(slot) = self.free.pop() else { break };
            let Some((mut read, answer)) = self.queue.pop_front() else { break };
            let entry = read.entry().user_data(slot as u64);
            self.slots[slot] = Some((read, answer));
            // SAFETY: the file and the memory that the entry names are owned by the slot, which
            // is emptied only when the kernel has completed the entry; neither moves when the
            // slot does. A slot that must be given up before that is leaked.
            let pushed = unsafe { self.uring.submission().push(&entry) };
            assert!(pushed.is_ok(), "there was room for an entry");
        }
        let unsubmitted = !self.uring.submission().is_empty();
        unsubmitted && self.uring.submit().is_err()
    }

    /// Answers whoever waits for what the kernel has completed.
    fn complete(&mut self) {
        loop {
            let Some(entry) = self.uring.completion().next() else { return };
            let slot = entry.user_data() as usize;
            let Some((read, answer)) = self.slots.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            // Without a receiver the buffer ends here.
            let _ = answer.send((entry.result(), read));
        }
    }
}

impl Read {
    fn entry(&mut self) -> squeue::Entry {
        let file = types::Fd(self.core.file.as_raw_fd());
        let part = &mut self.buffer[self.from..];
        // What is longer than an entry can say comes back short.
        let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
        opcode::Read::new(file, part.as_mut_ptr(), len).offset(self.offset).build()
    }
}
