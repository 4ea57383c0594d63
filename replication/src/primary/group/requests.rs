//! Checkpoints and switchovers that are asked for: here, or by the secondary's operator.

use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::Group;
use crate::primary::session::{CheckpointRequest, RequestKind};
use crate::{Epoch, Error, Result};

/// Requests that wait for their turn.
const REQUESTS_MAX: usize = 64;

impl Group {
    /// What is asked for from now on. To be called once.
    pub(crate) fn take_requests(&self) -> mpsc::Receiver<CheckpointRequest> {
        let (sender, waiting) = mpsc::channel(REQUESTS_MAX);
        // Of two the second has a closed channel, and answers nobody.
        let _ = self.requests.set(sender);
        waiting
    }

    /// Asks the session, and waits for what becomes of that, at most for `limit`.
    ///
    /// # Errors
    /// There is no session, it cannot be done now, or not within the limit.
    pub(crate) async fn ask(&self, kind: RequestKind, limit: Duration) -> Result<Epoch> {
        let (answer, wait) = oneshot::channel();
        let ends = || Error::failed("this side is changing its role, or ends");
        let requests = self.requests.get().ok_or_else(ends)?;
        requests.try_send(CheckpointRequest { kind, answer }).map_err(|error| match error {
            TrySendError::Full(_) => Error::refused("too many checkpoints are waiting already"),
            TrySendError::Closed(_) => ends(),
        })?;
        match tokio::time::timeout(limit, wait).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => {
                Err(Error::failed("the session ended before that was done (see brep status)"))
            }
            Err(_) => Err(kind.not_within(limit)),
        }
    }

    /// Makes the secondary the primary, and this side its secondary. Waits at most `limit` before
    /// anything has changed. Returns the checkpoint with which it has taken over.
    ///
    /// # Errors
    /// Refused, with the reason, while it cannot be done; nothing is changed then.
    pub(crate) async fn switchover(&self, limit: Duration) -> Result<Epoch> {
        if self.config.listen.is_none() {
            return Err(Error::refused(
                "this side has no address where the other one could reach it as a secondary: \
                 start it with --listen",
            ));
        }
        self.check_final()?;
        if self.has_second_guest() {
            return Err(Error::refused(
                "this side serves a guest of its own while it is a secondary: one that only connects \
                 again after the switchover would write to what the next checkpoint drops. Start it \
                 without --guest-listen; or let its manager stop the guest, and brep failover there",
            ));
        }
        if !self.record().is_merged() {
            return Err(Error::refused(
                "the merge of the last failover has not ended (see brep status): try again then",
            ));
        }
        self.ask(RequestKind::Switchover, limit).await
    }
}
