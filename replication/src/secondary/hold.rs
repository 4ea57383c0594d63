//! A failover that can be undone: until it is committed nothing is merged, and there is no peer.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::failover::UNSERVED;
use super::group::Group;
use super::rejoin::Discard;
use crate::errors::now_s;
use crate::primary::Primary;
use crate::state::{AddedDisk, Record};
use crate::status::HeldStatus;
use crate::{Error, Result};

/// Why there is nothing to be committed or undone.
pub(crate) const NOTHING_HELD: &str = "no failover is held here: it would have been one with brep \
                                       failover --hold; nothing was changed";

/// What a loss of power has made of a promoted disk whose run did not promise to survive one.
const MAY_BE_MIXED: &str = "power was lost while it was held, with --durability process: the disk \
                            may be a mixture of several moments; check it, or bring the other \
                            side's disks back";

/// How often the room is looked at while a failover is held.
const SPACE_PAUSE: Duration = Duration::from_secs(1);

/// The time in which the guest's requests have to end before a failover is undone.
const GUEST_LIMIT: Duration = Duration::from_secs(30);

impl Group {
    /// Makes a failover that is held final: the merge begins, and so does the way to a peer. Returns
    /// what has to be known of the disk, if there is something.
    ///
    /// # Errors
    /// Nothing is held, or the record could not be saved.
    pub(crate) async fn commit_failover(self: &Arc<Self>) -> Result<Option<&'static str>> {
        let _transition = self.transition.lock().await;
        self.check_held()?;
        let may_be_mixed = self.record().secondary.inconsistent;
        self.update_record(Record::commit_failover)?;
        let saved = self.sync_record().await;
        saved.map_err(|e| e.context("it is not known whether the failover is final"))?;
        if may_be_mixed {
            tracing::warn!("the failover is final: {MAY_BE_MIXED}");
        }
        self.events.emit("BREP_FAILOVER_COMMITTED", json!({}));
        self.spawn_merge();
        self.look_for_peer();
        Ok(may_be_mixed.then_some(MAY_BE_MIXED))
    }

    /// Undoes a failover that is held: what was written since is given up, and this side becomes
    /// the secondary again that it was. Or only says what would be lost.
    ///
    /// # Errors
    /// Nothing is held; or something was written, and `discard_local` does not give it up. Then
    /// nothing was changed.
    pub(crate) async fn roll_back(
        self: &Arc<Self>,
        discard_local: bool,
        dry_run: bool,
    ) -> Result<Discard> {
        let _transition = self.transition.lock().await;
        self.check_held()?;
        // It is going to be one again.
        self.listen_address()?;
        if dry_run {
            return self.given_up(true).await;
        }
        // Nothing of the guest may be acknowledged that is not told.
        self.guest.hold(GUEST_LIMIT).await?;
        let rolled_back = self.roll_back_held(discard_local).await;
        match rolled_back {
            Ok(_) => self.leaving().cancel(),
            Err(_) => self.guest.release(),
        }
        rolled_back
    }

    /// The guest is held. From the record on this side is a secondary, whatever happens to it: what
    /// follows is the same as if it were killed and started again.
    async fn roll_back_held(&self, discard_local: bool) -> Result<Discard> {
        let discard = self.given_up(false).await?;
        let bytes = discard.bytes.unwrap_or(0);
        if bytes > 0 && !discard_local {
            return Err(Error::refused(format!(
                "{bytes} bytes were written since the failover, and would be lost: brep failover \
                 --rollback --discard-local gives them up (--dry-run says which they are); nothing \
                 was changed"
            )));
        }
        let left_out: Vec<_> = self
            .record()
            .held()
            .iter()
            .flat_map(|held| &held.left_out)
            .map(AddedDisk::config)
            .collect();
        let primary = self.primary().as_ref().map(Primary::group).cloned();
        // Promoted, and no guest is served that could be told what became of its writes.
        let primary = primary.ok_or_else(|| Error::failed(UNSERVED))?;
        primary.leave_role(Record::roll_back).await.map_err(|error| {
            match self.side.record.failure() {
                Some(_) => error.context("it is not known whether the failover is undone"),
                None => error,
            }
        })?;
        // As the next start would: they are copied from the beginning.
        left_out.iter().for_each(|disk| self.side.note_added(disk));
        self.events.emit("BREP_ROLLED_BACK", json!({ "bytes": bytes }));
        tracing::warn!(bytes, "the failover is undone: this side is a secondary again");
        Ok(discard)
    }

    async fn given_up(&self, dry_run: bool) -> Result<Discard> {
        let mut disks = Vec::new();
        for disk in self.disks() {
            disks.push(disk.written_since_promotion().await?);
        }
        Ok(Discard { bytes: disks.iter().map(|disk| disk.bytes).sum(), disks, dry_run })
    }

    /// Asks the file system of the state directory for its room, again and again while a failover is
    /// held: whoever wants to know the status does not wait for it.
    pub(super) fn watch_space(self: &Arc<Self>) {
        let group = Arc::clone(self);
        let watching = async move {
            while group.record().held().is_some() {
                let space = group.space_bytes().await;
                group.core().space_bytes = space;
                tokio::time::sleep(SPACE_PAUSE).await;
            }
        };
        tokio::spawn(self.leaving().run_until_cancelled_owned(watching));
    }

    /// How a failover is doing that can be undone; `written_bytes` is what the maps have.
    pub(crate) fn held_status(&self, written_bytes: u64) -> Option<HeldStatus> {
        let record = self.record();
        let held = record.held()?;
        Some(HeldStatus {
            since_s: held.since_s,
            age_ms: now_s().saturating_sub(held.since_s).saturating_mul(1000),
            written_bytes,
            space_bytes: self.core().space_bytes,
        })
    }

    fn check_held(&self) -> Result<()> {
        // Whether something is held is not known then.
        self.side.record.check()?;
        match self.record().held() {
            Some(_) => Ok(()),
            None => Err(Error::refused(NOTHING_HELD)),
        }
    }
}
