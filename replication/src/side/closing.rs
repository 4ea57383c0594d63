//! Disks that have left the group and are being closed. Their storage may hang: whoever took them out
//! has not waited for that.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, MutexGuard};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::config::DiskConfig;
use crate::{Error, Result};

/// How long is waited for them at a time.
pub(crate) const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// What is to be said of one that does not end.
pub(crate) fn still_closing(disk: &str) -> Error {
    Error::failed(format!(
        "disk {disk}, which was removed, is still being closed: its storage may hang"
    ))
}

/// Which there are.
#[derive(Debug, Default)]
pub(crate) struct Closing(Mutex<Vec<(DiskConfig, CancellationToken)>>);

impl Closing {
    /// A disk that no table has any more is being closed until the result is dropped.
    pub(crate) fn begin(&self, disk: &DiskConfig) -> DropGuard {
        let ended = CancellationToken::new();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, ended)| !ended.is_cancelled());
        all.push((disk.clone(), ended.clone()));
        ended.drop_guard()
    }

    /// Waits until none is being closed that has the name or the file of `disk`; without one, that
    /// there is none.
    ///
    /// # Errors
    /// One does not end.
    pub(crate) async fn ended(&self, disk: Option<&DiskConfig>) -> Result<()> {
        let until = tokio::time::Instant::now() + CLOSE_LIMIT;
        for (leaving, ended) in self.of(disk) {
            let ended = tokio::time::timeout_at(until, ended.cancelled()).await;
            ended.map_err(|_| still_closing(&leaving.name))?;
        }
        Ok(())
    }

    /// Takes the lock under which disks come and go when nothing is being closed that has the name or
    /// the file of `disk`.
    ///
    /// # Errors
    /// One does not end; the lock is free meanwhile.
    pub(crate) async fn lock_without<'a, T>(
        &self,
        disk: &DiskConfig,
        lock: &'a AsyncMutex<T>,
    ) -> Result<MutexGuard<'a, T>> {
        loop {
            self.ended(Some(disk)).await?;
            let locked = lock.lock().await;
            // One may have gone while this waited for the lock.
            if self.of(Some(disk)).is_empty() {
                return Ok(locked);
            }
        }
    }

    fn of(&self, disk: Option<&DiskConfig>) -> Vec<(DiskConfig, CancellationToken)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let concerns = |leaving: &DiskConfig| {
            disk.is_none_or(|disk| disk.name == leaving.name || disk.path == leaving.path)
        };
        let open = all.iter().filter(|(leaving, ended)| concerns(leaving) && !ended.is_cancelled());
        open.cloned().collect()
    }
}
