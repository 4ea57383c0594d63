use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Shared or exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Any number of holders at a time.
    Shared,
    /// One holder, and nobody else.
    Exclusive,
}

/// Locks on byte ranges, granted in the order in which they were asked for.
///
/// A request waits for every earlier request that overlaps it, unless both are
/// [`LockMode::Shared`]. So nobody starves, and writes to one place happen in the order of their
/// arrival. The guard owns its part of the lock: it may be moved into the operation that needs
/// it.
#[derive(Debug, Clone, Default)]
pub struct RangeLock {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next_id: u64,
    /// In order of arrival; bounded by the callers' own limits on requests in flight.
    requests: VecDeque<Request>,
}

#[derive(Debug)]
struct Request {
    id: u64,
    range: Range<u64>,
    mode: LockMode,
    /// Earlier requests that still stand in the way.
    blockers: usize,
    granted: Option<oneshot::Sender<()>>,
}

impl Request {
    fn conflicts(&self, range: &Range<u64>, mode: LockMode) -> bool {
        // The intersection is not empty; so an empty range conflicts with nothing.
        self.range.start.max(range.start) < self.range.end.min(range.end)
            && (self.mode == LockMode::Exclusive || mode == LockMode::Exclusive)
    }
}

/// A held lock; dropping it releases the range.
#[derive(Debug)]
#[must_use = "dropping the guard releases the range"]
pub struct RangeGuard {
    table: Arc<Mutex<Table>>,
    id: u64,
}

impl RangeLock {
    /// No range is locked.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the place in the queue now and waits for the lock when awaited. Dropping the future
    /// gives the place up.
    pub fn lock(
        &self,
        range: Range<u64>,
        mode: LockMode,
    ) -> impl Future<Output = RangeGuard> + Send + use<> {
        let (guard, wait) = self.enqueue(range, mode);
        async move {
            if let Some(wait) = wait {
                // The sender lives in the table until the request is granted or its guard, which
                // we hold, is dropped; so this cannot fail.
                let _ = wait.await;
            }
            guard
        }
    }

    /// Takes the lock if nobody stands in the way.
    pub fn try_lock(&self, range: Range<u64>, mode: LockMode) -> Option<RangeGuard> {
        let (guard, wait) = self.enqueue(range, mode);
        wait.is_none().then_some(guard)
    }

    fn enqueue(
        &self,
        range: Range<u64>,
        mode: LockMode,
    ) -> (RangeGuard, Option<oneshot::Receiver<()>>) {
        let mut table = lock(&self.table);
        let id = table.next_id;
        table.next_id += 1;
        let blockers = table.requests.iter().filter(|r| r.conflicts(&range, mode)).count();
        let (granted, wait) = if blockers == 0 {
            (None, None)
        } else {
            let (sender, receiver) = oneshot::channel();
            (Some(sender), Some(receiver))
        };
        table.requests.push_back(Request { id, range, mode, blockers, granted });
        (RangeGuard { table: Arc::clone(&self.table), id }, wait)
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        let Ok(index) = table.requests.binary_search_by_key(&self.id, |r| r.id) else { return };
        let Some(gone) = table.requests.remove(index) else { return };
        for request in table.requests.iter_mut().skip(index) {
            if gone.conflicts(&request.range, request.mode) {
                request.blockers -= 1;
                if request.blockers == 0
                    && let Some(granted) = request.granted.take()
                {
                    let _ = granted.send(());
                }
            }
        }
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // No code that can panic runs under this lock.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
