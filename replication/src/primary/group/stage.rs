//! Whether replication runs, and to whom.

use crate::config::PeerAddress;

use super::Group;
use crate::node::Stage;
use crate::status::LinkState;
use crate::{Error, Result};

/// There is nobody to replicate to.
pub(crate) fn no_peer() -> Error {
    Error::refused("there is no peer: say where the secondary listens with brep peer set URI")
}

impl Group {
    /// Refuses what a failover that may be undone does not allow.
    ///
    /// # Errors
    /// The failover is held.
    pub(crate) fn check_final(&self) -> Result<()> {
        match self.record().held() {
            None => Ok(()),
            Some(_) => Err(Error::refused(
                "the failover of this side is held: first make it final with brep failover \
                 --commit, or undo it with --rollback; nothing was changed",
            )),
        }
    }

    pub(crate) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// As [`stage`](Self::stage); before a promoted side has had anything to replicate to, how far
    /// its failover has come.
    pub(crate) fn overall_stage(&self) -> Stage {
        match (self.stage(), &self.record().secondary.promotion) {
            (Stage::None, Some(promotion)) if promotion.merged => Stage::Done,
            (Stage::None, Some(_)) => Stage::Failover,
            (stage, _) => stage,
        }
    }

    /// Resolves when replication is to run, or is not to run any more.
    pub(crate) async fn until_stage(&self, running: bool) {
        let mut stage = self.stage.subscribe();
        // The sender lives as long as this.
        let _ = stage.wait_for(|s| (*s == Stage::Running) == running).await;
    }

    /// Begins to replicate: the peer is connected to, now and whenever it is lost.
    ///
    /// # Errors
    /// It runs already, or there is no peer.
    pub(crate) fn start_replication(&self) -> Result<()> {
        if self.peer().is_none() {
            return Err(match self.record().secondary.promotion {
                Some(_) => Error::refused(
                    "Cannot restart block replication: this side has been promoted, and has no \
                     peer; say where the secondary listens with brep peer set URI",
                ),
                None => no_peer(),
            });
        }
        if self.stage.send_replace(Stage::Running) == Stage::Running {
            return Err(Error::refused("Block replication is running or done"));
        }
        self.errors.clear_latch();
        Ok(())
    }

    /// Ends replication; the guest goes on alone. Returns when the peer gets nothing more.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) async fn stop_replication(&self) -> Result<()> {
        if self.stage() != Stage::Running {
            return Err(Error::refused("Block replication is not running"));
        }
        self.stage.send_replace(Stage::Done);
        if self.held_writes().is_some() {
            self.resume_lonely()?;
        }
        self.detached().await;
        Ok(())
    }

    /// Waits until the peer gets nothing more.
    pub(super) async fn detached(&self) {
        loop {
            let ended = self.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            if !self.is_attached() {
                return;
            }
            ended.await;
        }
    }

    /// Replicates to another address from now on, and after a restart.
    ///
    /// # Errors
    /// Refused while the present peer is connected.
    pub(crate) fn change_peer(&self, peer: PeerAddress) -> Result<()> {
        if self.is_attached() {
            let now = self.peer().map_or_else(String::new, |p| p.to_string());
            return Err(Error::refused(format!(
                "the secondary at {now} is connected; take leave of it with brep peer clear first"
            )));
        }
        self.set_peer(Some(peer.clone()))?;
        {
            let mut core = self.core();
            core.link = LinkState::Disconnected;
            core.peer = Some(peer.to_string());
            core.refusal = None;
            core.reason = None;
        }
        if self.config.start {
            self.stage.send_replace(Stage::Running);
        }
        self.wake.notify_one();
        Ok(())
    }

    /// Replicates to nobody from now on, and after a restart; the guest goes on alone.
    ///
    /// # Errors
    /// The record could not be saved.
    pub(crate) async fn forget_peer(&self) -> Result<()> {
        self.set_peer(None)?;
        self.stage.send_replace(Stage::None);
        if self.held_writes().is_some() {
            self.resume_lonely()?;
        }
        self.detached().await;
        let mut core = self.core();
        core.link = LinkState::None;
        (core.peer, core.refusal, core.reason) = (None, None, None);
        Ok(())
    }
}
