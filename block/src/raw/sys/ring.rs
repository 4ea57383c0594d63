//! Transfers by io_uring: one ring per current-thread runtime, driven by a task of that runtime.
//!
//! It is a shortcut only. Where there is no ring (another kind of runtime, a kernel that refuses)
//! and where a transfer fails or ends early, the caller does the same again with plain calls.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use io_uring::{IoUring, opcode, squeue, types};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id, RuntimeFlavor};
use tokio::sync::{Notify, oneshot};

use super::super::core::Core;
use crate::RangeGuard;
use crate::buffer::AlignedBuffer;

/// Transfers that the kernel has at a time; the others wait their turn.
const IN_FLIGHT_MAX: usize = 256;

/// The kernel has refused a ring once; it will not change its mind.
static REFUSED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The ring of the runtime that this thread ran last.
    static RING: RefCell<Option<(Id, Weak<Ring>)>> = const { RefCell::new(None) };
}

/// One transfer with everything that it uses. The kernel owns the memory until it completes.
pub(in crate::raw) struct Transfer {
    pub(in crate::raw) core: Arc<Core>,
    pub(in crate::raw) offset: u64,
    pub(in crate::raw) memory: Memory,
    /// Keeps its range locked, whether or not the caller still waits.
    pub(in crate::raw) guard: Option<RangeGuard>,
}

/// Where the bytes go or come from.
pub(in crate::raw) enum Memory {
    /// Filled by a read, from this index on.
    Read(AlignedBuffer, usize),
    /// Written whole.
    Write(Bytes),
}

/// What became of a transfer.
pub(in crate::raw) enum Outcome {
    /// The kernel has transferred this many bytes.
    Done(usize, Transfer),
    /// Nothing that counts has happened: use plain calls.
    Refused(Transfer),
    /// The runtime is shutting down.
    Shutdown,
}

/// Carries out a transfer on the ring of the current runtime.
pub(in crate::raw) async fn transfer(transfer: Transfer) -> Outcome {
    let Some(ring) = current() else { return Outcome::Refused(transfer) };
    let (answer, wait) = oneshot::channel();
    if let Err(transfer) = ring.enqueue(transfer, answer) {
        return Outcome::Refused(transfer);
    }
    drop(ring);
    match wait.await {
        Ok((result, transfer)) => match usize::try_from(result) {
            Ok(len) => Outcome::Done(len, transfer),
            Err(_) => Outcome::Refused(transfer),
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

type Answer = oneshot::Sender<(i32, Transfer)>;

struct Ring {
    state: Mutex<State>,
    /// Something has been enqueued.
    wake: Notify,
}

struct State {
    uring: IoUring,
    /// By user data. What is `Some` belongs to the kernel.
    slots: Vec<Option<(Transfer, Answer)>>,
    free: Vec<usize>,
    /// Not yet in a slot; bounded by the callers' limits on requests in flight.
    queue: VecDeque<(Transfer, Answer)>,
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
    fn enqueue(&self, transfer: Transfer, answer: Answer) -> Result<(), Transfer> {
        let mut state = self.lock();
        if state.closed {
            return Err(transfer);
        }
        state.queue.push_back((transfer, answer));
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
    /// No memory may be freed that the kernel still uses: waits for every transfer.
    fn drop(&mut self) {
        let mut state = self.ring.lock();
        state.closed = true;
        state.queue.clear();
        while state.free.len() < state.slots.len() {
            match state.uring.submit_and_wait(1) {
                Ok(_) => state.complete(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "memory of unfinished transfers is given up");
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
            let Some((mut transfer, answer)) = self.queue.pop_front() else { break };
            let entry = transfer.entry().user_data(slot as u64);
            self.slots[slot] = Some((transfer, answer));
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
            // The queue is not borrowed while an answer drops what its receiver did not want.
            let Some(entry) = self.uring.completion().next() else { return };
            let slot = entry.user_data() as usize;
            let Some((transfer, answer)) = self.slots.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            // Without a receiver the transfer ends here, and its lock with it.
            let _ = answer.send((entry.result(), transfer));
        }
    }
}

impl Transfer {
    fn entry(&mut self) -> squeue::Entry {
        let file = types::Fd(self.core.file.as_raw_fd());
        match &mut self.memory {
            Memory::Read(buffer, from) => {
                let part = &mut buffer[*from..];
                let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
                opcode::Read::new(file, part.as_mut_ptr(), len).offset(self.offset).build()
            }
            Memory::Write(data) => {
                let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
                opcode::Write::new(file, data.as_ptr(), len).offset(self.offset).build()
            }
        }
    }
}
