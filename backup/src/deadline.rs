//! Copies for which a guest's request does not wait for ever (spec: backup, cbw-timeout).
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{Error, ErrorKind, Operation, RangeGuard, Result};
use tokio::time::timeout;

use crate::epoch::Epoch;
use crate::filter::{Copying, Shared};
use crate::options::OnCopyError;

impl Shared {
    /// As a copy without a limit, but the caller gets an answer within `limit`.
    ///
    /// The copy goes on in a task of its own. If the guest's request is to fail, that task keeps
    /// the units until it has ended, so that nothing is overwritten that it still reads, and
    /// whoever comes to them meanwhile waits no longer than `limit` either. If it is the snapshot
    /// that breaks, the request gets the units at once: what the copy still reads is of no worth.
    pub(crate) async fn copy_within(
        self: &Arc<Self>,
        limit: Duration,
        epoch: &Arc<Epoch>,
        units: &Range<u64>,
    ) -> Result<RangeGuard> {
        match self.on_copy_error {
            OnCopyError::BreakGuestWrite => {
                let (shared, lock) = (Arc::clone(self), self.lock_units(epoch, units));
                let (epoch, units, ticket) = (Arc::clone(epoch), units.clone(), self.enter());
                let copy = async move {
                    let _ticket = ticket;
                    let _copying = Copying::new(&shared);
                    let guard = lock.await;
                    shared.copy_missing(&epoch, &units).await.map(|()| guard)
                };
                timeout(limit, tokio::spawn(copy))
                    .await
                    .map_or_else(|_| Err(self.late(limit)), joined)
            }
            OnCopyError::BreakSnapshot => {
                let guard = self.lock_units(epoch, units).await;
                let (shared, task_epoch) = (Arc::clone(self), Arc::clone(epoch));
                let (units, ticket) = (units.clone(), self.enter());
                let copy = async move {
                    let _ticket = ticket;
                    let _copying = Copying::new(&shared);
                    shared.copy_missing(&task_epoch, &units).await
                };
                match timeout(limit, tokio::spawn(copy)).await {
                    Ok(copied) => joined(copied)?,
                    Err(_) => self.break_snapshot(epoch, &self.late(limit)),
                }
                Ok(guard)
            }
        }
    }

    fn late(&self, limit: Duration) -> Error {
        let why = format!("the copy of the pre-image took longer than {limit:?}");
        let error = Error::new(Operation::Write, ErrorKind::TimedOut, &self.name, why);
        self.counters.failed(&error);
        error
    }
}

fn joined<T>(result: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    match result {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::new(
                Operation::Write,
                ErrorKind::Shutdown,
                "copy-before-write",
                "the runtime is shutting down",
            )),
        },
    }
}
