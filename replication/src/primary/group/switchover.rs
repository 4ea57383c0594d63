//! The planned way to change roles, on the side that was the primary.

use tokio::sync::oneshot;

use super::Group;
use crate::state::Record;
use crate::{Epoch, Error, Result};

/// This side has made room; what becomes of that is not known yet.
pub(super) struct SteppingDown {
    /// The record before.
    before: Record,
    epoch: Epoch,
    answer: Option<oneshot::Sender<Result<Epoch>>>,
}

impl Group {
    /// Holds the guest, and waits until nothing of it is on its way.
    ///
    /// # Errors
    /// Its requests do not end within the peer timeout; it goes on.
    pub(crate) async fn hold_guest(&self) -> Result<()> {
        self.guest.hold(self.config.peer_timeout).await?;
        self.idle().await;
        Ok(())
    }

    /// Lets the guest go on.
    pub(crate) fn release_guest(&self) {
        self.guest.release();
    }

    /// From here on this side is a secondary, whatever happens to it. Its disks are checkpoint
    /// `epoch`, and the guest is held.
    ///
    /// # Errors
    /// The record could not be saved.
    pub(crate) async fn step_down(&self, epoch: Epoch) -> Result<()> {
        let before = Record::clone(&self.record());
        self.change_role(Record::step_down)?;
        // At once: whoever gives this up from here on is a secondary.
        self.core().stepping_down =
            Some(SteppingDown { before: before.clone(), epoch, answer: None });
        // Else a power loss could bring a second primary back.
        if let Err(error) = self.record.sync().await {
            self.core().stepping_down = None;
            return Err(self.restore_role(before).err().unwrap_or(error));
        }
        Ok(())
    }

    /// Changes the record to that of the other role.
    ///
    /// # Errors
    /// It could not be saved. A restart may find a secondary, which knows of no writes of its own:
    /// nothing more may be acknowledged.
    fn change_role(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        self.update_record(change).inspect_err(|error| self.role_is_unknown(error))
    }

    /// As [`change_role`](Self::change_role), and on stable storage when this returns. The guest is held.
    ///
    /// # Errors
    /// The record is what it was; or that is not known, and nothing more may be acknowledged.
    pub(crate) async fn leave_role(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let before = Record::clone(&self.record());
        self.change_role(change)?;
        match self.record.sync().await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.restore_role(before).err().unwrap_or(error)),
        }
    }

    /// Changes the record back to what it was in this role, on stable storage, as the other role may be
    /// there: the guest may go on then.
    ///
    /// # Errors
    /// As [`change_role`](Self::change_role).
    fn restore_role(&self, before: Record) -> Result<()> {
        let restored = self.update_record(|record| *record = before);
        let secured = restored.and_then(|()| self.record.sync_now());
        secured.inspect_err(|error| self.role_is_unknown(error))
    }

    fn role_is_unknown(&self, error: &Error) {
        let reason = format!("this side may be no primary any more: {error}");
        self.core().fatal.get_or_insert(reason);
    }

    /// Who is to be told what becomes of it.
    pub(crate) fn await_switchover(&self, answer: oneshot::Sender<Result<Epoch>>) {
        if let Some(down) = &mut self.core().stepping_down {
            down.answer = Some(answer);
        }
    }

    /// The other side has said that it does not take over: this one is the primary as before.
    pub(crate) fn take_role_back(&self) {
        let Some(down) = self.core().stepping_down.take() else { return };
        let told = match self.restore_role(down.before) {
            Ok(()) => Error::refused("the secondary has not taken over; nothing was changed"),
            Err(error) => error,
        };
        self.guest.release();
        if let Some(answer) = down.answer {
            let _ = answer.send(Err(told));
        }
    }

    /// The session has ended. If this side had made room it is a secondary now: also if nobody
    /// knows whether the other one has taken over.
    pub(crate) fn end_switchover(&self) {
        let Some(down) = self.core().stepping_down.take() else {
            // One that was given up on the way has changed nothing.
            return self.guest.release();
        };
        if let Some(answer) = down.answer {
            let _ = answer.send(match self.is_superseded() {
                true => Ok(down.epoch),
                false => Err(Error::failed(
                    "the other side has not said whether it has taken over; this side is a \
                     secondary now, and asks it again until it has (see brep status). If it is \
                     gone for good: brep failover, here",
                )),
            });
        }
        tracing::info!("this side becomes a secondary");
        self.leaving().cancel();
    }
}

#[cfg(test)]
mod tests {
    use brep_block::CacheMode;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::{DiskConfig, DiskFormat, Durability, Role, SideConfig};
    use crate::side::Side;
    use crate::state::faults::{Faulty, Kind};

    /// A power loss must not bring the secondary back that this side was for a moment.
    #[tokio::test]
    async fn i01_a_role_that_is_taken_back_is_on_stable_storage_before_the_guest_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (state, path) = (dir.path().join("state"), dir.path().join("p.raw"));
        std::fs::write(&path, [0; 65536]).unwrap();
        let (format, cache) = (DiskFormat::Raw, CacheMode::Writeback);
        let disk = DiskConfig { name: "vda".to_owned(), path, format, cache, buffers: None };
        let config = SideConfig {
            durability: Durability::Power,
            ..SideConfig::new(Role::Primary, "p", state.clone(), vec![disk])
        };
        let side = Side::open(config, CancellationToken::new()).unwrap();
        let group = Group::open(&side).await.unwrap();
        group.step_down(Epoch(1)).await.unwrap();
        group.take_role_back();
        assert_eq!(group.core().fatal(), None);
        group.step_down(Epoch(2)).await.unwrap();
        let _faulty = Faulty::failing(&state, Kind::Sync);
        group.take_role_back();
        assert!(group.core().fatal().is_some(), "writes are acknowledged that may be lost");
    }
}
