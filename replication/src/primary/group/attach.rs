//! The beginning of a session, and of what is copied in it.

use std::sync::Arc;

use brep_nbd::client::Connection;
use uuid::Uuid;

use super::joining::Joining;
use super::takeover::Takeover;
use super::{DiskPart, Group};
use crate::commands::ColoMode;
use crate::config::{Durability, Seeded};
use crate::link::CopyMode;
use crate::primary::hello::{Join, Wish};
use crate::status::LinkState;
use crate::table::Disks;
use crate::{Epoch, Error, Generation, Result};

/// On which terms a session begins.
pub(crate) struct Terms<'a> {
    /// The line of writes that the peer was told; a stock NBD server is told none.
    pub(crate) cur: Option<Generation>,
    pub(crate) epoch: Epoch,
    /// Its token; a stock NBD server has none.
    pub(crate) session: Option<Uuid>,
    pub(crate) copy: CopyMode,
    /// What the operator had asked for when this was agreed on.
    pub(crate) wish: Wish,
    /// The operator says that the peer's disks are equal to these.
    pub(crate) trusted: bool,
    /// The disks that take part.
    pub(crate) disks: Disks<DiskPart>,
    /// Those of them that the peer's checkpoint does not hold yet.
    pub(crate) joins: Vec<Join>,
    /// One a disk, in their order.
    pub(crate) connections: Vec<Arc<Connection>>,
    /// The other side, for people.
    pub(crate) peer: &'a str,
    /// What it keeps its promises against; a stock NBD server does not say.
    pub(crate) peer_durability: Option<Durability>,
}

impl Group {
    /// A session begins. What differs from the peer now is in the maps before the first write.
    pub(crate) fn attach(&self, terms: Terms<'_>) -> Result<()> {
        let Terms { cur, epoch, session, copy, wish, trusted, disks, joins, connections, .. } =
            terms;
        {
            let core = self.core();
            if !core.epochs.is_settled() {
                return Err(Error::failed("writes to the lost secondary have not ended yet"));
            }
            let fits = |(d, c): (&Arc<DiskPart>, &Arc<Connection>)| d.size() == c.export().size;
            let same = disks.is_same(&self.disks());
            if !same || !disks.iter().zip(&connections).all(fits) {
                return Err(Error::failed(
                    "the disks have changed since the session was agreed on",
                ));
            }
            if core.wish != wish {
                return Err(Error::failed("the session was agreed on before the last command"));
            }
            if cur.is_some() && cur != self.record().cur {
                // What was written alone since then is of a line that the peer does not know.
                return Err(Error::failed(
                    "this side writes alone since the session was agreed on",
                ));
            }
        }
        let joined =
            |disk: &Arc<DiskPart>| joins.iter().any(|join| join.is_new && join.disk == disk.name);
        self.copy_whole(disks.iter().filter(|disk| joined(disk)).map(|disk| disk.number));
        self.prepare_maps(copy, trusted)?;
        let joining =
            Joining::begin(&disks, |disk| joins.iter().any(|join| join.disk == disk.name));
        self.record.update(|record| {
            record.epoch = epoch;
            record.session = session;
            // Only now: what the maps have to hold for that is in them.
            record.primary.joins = joins.into_iter().map(|join| (join.disk, join.id)).collect();
            record.primary.had_peer = true;
            record.primary.alone = false;
        })?;
        // Whatever the durability, as that it is alone is: a start that knew only of that would serve the
        // guest beside a secondary that has been promoted.
        self.record.sync_now()?;
        let mut core = self.core();
        core.connections = disks.iter().map(|d| d.number).zip(connections).collect();
        core.joining = joining;
        core.copying = true;
        core.comparing = match copy {
            CopyMode::Full => false,
            CopyMode::Compare => true,
            CopyMode::Changed | CopyMode::Missing => core.comparing,
        };
        core.dropped = None;
        core.checkpoints_for_peer.clear();
        core.wish = Wish::default();
        core.again = None;
        core.link = LinkState::Connected;
        core.refusal = None;
        core.reason = None;
        core.peer = Some(terms.peer.to_owned());
        core.peer_durability = terms.peer_durability;
        core.epochs.attach(epoch);
        drop(core);
        // What an earlier session has written there is not known to be flushed.
        self.disks().iter().for_each(|disk| disk.peer_writes.note());
        // A secondary that had taken over, and has undone that.
        self.takeover.send_replace(Takeover::None);
        // What was measured of the guest was with another load.
        self.set_resync_limits(self.resync_limits());
        self.let_go("the secondary is back");
        self.colo.enter(ColoMode::Primary);
        Ok(())
    }

    /// Whether the copy compares hashes before it sends anything.
    pub(crate) fn compares(&self) -> bool {
        let first = self.config.seeded == Seeded::Compare && self.record().com.is_none();
        self.config.resync_compare || first || self.core().comparing
    }

    /// Everything differs, as far as a copy in this session is concerned, until it has been
    /// compared or sent again.
    ///
    /// Returns whether that was asked for.
    pub(crate) fn copy_again(&self) -> bool {
        {
            let mut core = self.core();
            let Some(compare) = core.again.take() else { return false };
            // With the same lock: whoever waits for the end of it has to see it go on.
            (core.copying, core.comparing) = (true, compare);
        }
        self.all_differs();
        self.set_resync_limits(self.resync_limits());
        true
    }
}
