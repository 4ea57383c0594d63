//! The loss of the secondary: it is gone, or takes over.

use brep_block::{Error as BlockError, ErrorKind, Operation};
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::{Group, Loss};
use crate::node::Stage;
use crate::primary::hello::Refusal;
use crate::status::LinkState;
use crate::{Epoch, Error, Generation, Result, SetId};

/// What the secondary has said of taking over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takeover {
    /// Nothing, or that it does not.
    None,
    /// It is about to: nothing is acknowledged before it says what became of that, or until this
    /// time has come.
    Pending(Instant),
    /// It is the disk now. This side serves nobody any more.
    Done,
}

impl Group {
    /// The secondary is about to take over.
    pub(crate) fn takeover_begins(&self) {
        tracing::warn!("the secondary is about to be promoted: the guest's writes wait");
        let until = Instant::now() + self.config.peer_timeout;
        // Said again it is no more time.
        self.takeover.send_if_modified(|takeover| {
            let begins = *takeover == Takeover::None;
            if begins {
                *takeover = Takeover::Pending(until);
            }
            begins
        });
    }

    /// Ends when the secondary has had its time to say whether it takes over, and has not.
    pub(crate) async fn takeover_overdue(&self) -> String {
        let mut takeover = self.takeover.subscribe();
        loop {
            // The sender lives as long as this.
            let pending = takeover.wait_for(|t| matches!(t, Takeover::Pending(_))).await;
            let Ok(Takeover::Pending(until)) = pending.map(|takeover| *takeover) else {
                return std::future::pending().await;
            };
            let decided = takeover.wait_for(|t| !matches!(t, Takeover::Pending(_)));
            if timeout_at(until, decided).await.is_err() {
                return "the secondary does not say whether it takes over".to_owned();
            }
        }
    }

    /// The secondary has taken over, or has said that it does not, or nothing in time.
    pub(crate) fn takeover_ends(&self, promoted: bool) {
        if promoted {
            self.takeover.send_replace(Takeover::Done);
            let reason = "the secondary has been promoted: this side serves nobody any more";
            tracing::warn!("{reason}");
            self.events.emit("BREP_SUPERSEDED", json!({ "reason": reason }));
            return;
        }
        if !matches!(*self.takeover.borrow(), Takeover::Pending(_)) {
            return;
        }
        // Before anything more is acknowledged.
        if !self.is_attached() {
            self.without_peer("the secondary is lost", false);
        }
        self.takeover.send_replace(Takeover::None);
    }

    /// Waits while the secondary may be taking over, and `link` may still tell; `link` has ended
    /// already if there is none.
    pub(crate) async fn takeover_decided(&self, link: Option<impl Future<Output = String>>) {
        let Takeover::Pending(until) = *self.takeover.borrow() else { return };
        let mut takeover = self.takeover.subscribe();
        let decided = takeover.wait_for(|t| !matches!(t, Takeover::Pending(_)));
        let link = async {
            if let Some(link) = link {
                link.await;
            }
            std::future::pending::<()>().await;
        };
        let told = timeout_at(until, async {
            tokio::select! {
                biased;
                () = link => {}
                _ = decided => {}
            }
        });
        if told.await.is_err() {
            tracing::warn!(
                "the secondary does not say whether it was promoted; going on without it"
            );
            self.takeover_ends(false);
        }
    }

    /// Waits until a change may be acknowledged.
    ///
    /// # Errors
    /// The secondary has taken over.
    pub(crate) async fn may_acknowledge(
        &self,
        disk: usize,
        operation: Operation,
    ) -> brep_block::Result<()> {
        if *self.takeover.borrow() == Takeover::None {
            return Ok(());
        }
        let mut takeover = self.takeover.subscribe();
        // The sender lives as long as this.
        let _ = takeover.wait_for(|t| !matches!(t, Takeover::Pending(_))).await;
        self.check_superseded(disk, operation)
    }

    /// Whether this side is still the disk, as far as it knows.
    pub(crate) fn check_superseded(
        &self,
        disk: usize,
        operation: Operation,
    ) -> brep_block::Result<()> {
        match self.is_superseded() {
            false => Ok(()),
            true => Err(self.superseded(disk, operation)),
        }
    }

    fn superseded(&self, disk: usize, operation: Operation) -> BlockError {
        let text = "the other side has been promoted: it is the disk now";
        BlockError::new(operation, ErrorKind::Shutdown, self.disk_name(disk), text)
    }

    /// Whether this side is still the disk, for a command that says that it is. While the other side
    /// may be taking over, its word is waited for.
    ///
    /// # Errors
    /// The other side has been promoted, with what to do about that.
    pub(crate) async fn check_is_disk(&self) -> Result<()> {
        let mut takeover = self.takeover.subscribe();
        // The sender lives as long as this.
        let _ = takeover.wait_for(|t| !matches!(t, Takeover::Pending(_))).await;
        if !self.is_superseded() {
            return Ok(());
        }
        let Refusal { reason, advice, .. } = Refusal::superseded();
        let advice = advice.map_or_else(String::new, |advice| format!("; {advice}"));
        Err(Error::refused(format!("{reason}{advice}")))
    }

    /// Waits for `held`, and at most until the secondary has taken over: what a guest asked for is
    /// never held on a side that serves nobody.
    ///
    /// # Errors
    /// Those of `held`; the secondary has taken over.
    pub(crate) async fn unless_superseded<T>(
        &self,
        disk: usize,
        operation: Operation,
        held: impl Future<Output = brep_block::Result<T>>,
    ) -> brep_block::Result<T> {
        let mut takeover = self.takeover.subscribe();
        let value = tokio::select! {
            biased;
            // The sender lives as long as this.
            _ = takeover.wait_for(|t| *t == Takeover::Done) => None,
            value = held => Some(value?),
        };
        self.check_superseded(disk, operation)?;
        // Taken back in this very moment: whoever asks again is served.
        value.ok_or_else(|| self.superseded(disk, operation))
    }

    /// The secondary has taken over.
    pub(crate) fn is_superseded(&self) -> bool {
        *self.takeover.borrow() == Takeover::Done
    }

    /// The peer is lost: from here on this side writes alone, on a new line that is recorded
    /// before anything more is acknowledged.
    pub(crate) fn lose_peer(&self, loss: impl Into<Loss>) {
        let loss = loss.into();
        let Loss { reason, by_command, left_behind } = {
            let mut core = self.core();
            if !core.epochs.is_attached() {
                return;
            }
            core.connections.values().for_each(|c| c.kill());
            core.dropped.take().unwrap_or(loss)
        };
        // At the end of the process the guest is gone already; and while the secondary may be taking
        // over, nothing is acknowledged.
        if !self.quiesced.is_cancelled() && *self.takeover.borrow() == Takeover::None {
            let wanted = by_command || left_behind || self.stage() != Stage::Running;
            self.without_peer(&reason, wanted);
        }
        // What was on its way marks itself as different when its owner learns of the loss.
        self.void_pending();
        let held = {
            let mut core = self.core();
            core.connections.clear();
            core.copying = false;
            core.end_joining();
            core.link = LinkState::Disconnected;
            core.reason = Some(reason.clone());
            if let Some(compare) = core.again.take() {
                // It was asked for, and has not begun.
                (core.wish.resync, core.wish.compare) = (true, compare);
            }
            core.epochs.detach()
        };
        // Dropped outside the lock: each held write wakes its owner, who marks its range.
        drop(held);
        self.ended.notify_waiters();
        tracing::warn!(reason, "the secondary is lost");
        self.events.emit("BREP_PEER_LOST", json!({ "reason": reason }));
        if self.stage() == Stage::Running {
            self.errors.latch(&reason);
            self.colo.broken(&self.events);
        }
    }

    /// Cuts the peer off, from any thread and without waiting; the data thread then loses it.
    pub(crate) fn drop_peer(&self, loss: impl Into<Loss>) {
        let mut core = self.core();
        if core.epochs.is_attached() {
            core.dropped = Some(loss.into());
            core.connections.values().for_each(|c| c.kill());
        }
    }

    /// A session is going to begin with `epoch`: on which set and line.
    ///
    /// A run's first session begins a line, as a stay without the peer does: if this side's files
    /// were put back from an older copy, what it commits now is not to be mistaken for what it
    /// committed then. All of it is recorded first: a secondary that was given an epoch that its
    /// primary does not know of was given it by a newer one.
    pub(crate) fn begin_terms(&self, epoch: Epoch) -> Result<(SetId, Generation)> {
        let new_line = !std::mem::replace(&mut self.core().has_own_line, true);
        self.record.update(|record| {
            if new_line {
                record.begin_line(Generation::random(), record.epoch);
            }
            record.epoch = record.epoch.max(epoch);
        })?;
        let record = self.record.get();
        record.set.zip(record.cur).ok_or_else(|| Error::failed("the state record has no identity"))
    }

    /// Records that this side writes alone, on a new line if it was not alone before.
    pub(super) fn go_alone(&self) {
        let before = self.record.get();
        if !before.is_primary() {
            // It has made room for the other side, which is the only one that writes.
            return;
        }
        let last = self.core().epochs.current().max(before.epoch);
        let new_line = before.primary.had_peer && !before.primary.alone;
        self.core().has_own_line |= new_line;
        let saved = self.record.update(|record| {
            record.primary.alone = record.primary.had_peer;
            record.epoch = record.epoch.max(last);
            if new_line {
                record.begin_line(Generation::random(), last);
            }
        });
        // A power loss must not make this side forget that both may have written.
        let saved = saved.and_then(|()| if new_line { self.record.sync_now() } else { Ok(()) });
        if let Err(error) = saved {
            tracing::error!(%error, "cannot record that this side goes on alone");
            self.core().fatal = Some(format!("no write can be acknowledged: {error}"));
        }
    }
}
