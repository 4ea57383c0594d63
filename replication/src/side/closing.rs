//! Disks that have left the group and are being closed. Their storage may hang: whoever took them out
//! has not waited for that.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{Error, Result};

/// How long is waited for them at a time.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// Which there are, by their names.
#[derive(Debug, Default)]
pub(crate) struct Closing(Mutex<Vec<(String, CancellationToken)>>);

impl Closing {
    /// A disk is being closed until the result is dropped.
    pub(crate) fn begin(&self, disk: &str) -> DropGuard {
        let ended = CancellationToken::new();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, ended)| !ended.is_cancelled());
        all.push((disk.to_owned(), ended.clone()));
        ended.drop_guard()
    }

    /// Waits until none is being closed: its files and its name can be used again.
    ///
    /// # Errors
    /// One does not end.
    pub(crate) async fn ended(&self) -> Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let until = tokio::time::Instant::now() + CLOSE_LIMIT;
        for (disk, ended) in all {
            tokio::time::timeout_at(until, ended.cancelled()).await.map_err(|_| {
                Error::failed(format!(
                    "disk {disk}, which was removed, is still being closed: its storage may hang"
                ))
            })?;
        }
        Ok(())
    }
}
