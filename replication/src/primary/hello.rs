mod disks;
#[cfg(test)]
mod histories;
mod refusal;
#[cfg(test)]
mod tests;

pub(crate) use disks::{Join, joins};
pub(crate) use refusal::Refusal;

#[cfg(feature = "simulation")]
use brep_block::plant::{self, Plant};

use crate::config::Seeded;
use crate::link::{CopyMode, HelloAnswer, LINK_VERSION, RefusalKind, Side};
use crate::state::Lines;
use crate::{Commit, Epoch};

/// What the primary makes of a secondary's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Begin a session with this copy.
    Start(Plan),
    /// No session.
    Refuse(Refusal),
}

/// How the two sides become equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) copy: CopyMode,
    /// What the secondary has written itself is copied too: it tells the ranges.
    pub(crate) with_theirs: bool,
}

impl Plan {
    /// Whatever the secondary has is overwritten.
    pub(crate) fn is_whole(self) -> bool {
        matches!(self.copy, CopyMode::Full | CopyMode::Compare)
    }
}

/// What the operator has asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    /// Whether the secondary's disks were copied by other means.
    pub(crate) seeded: Seeded,
    /// `resync --full` or `--compare`.
    pub(crate) resync: bool,
    /// `resync --compare`: what is equal already is not sent.
    pub(crate) compare: bool,
    /// The secondary is to give its last checkpoint up.
    pub(crate) discard_checkpoint: bool,
}

impl Wish {
    /// The copy of everything that is wished for.
    fn whole(self) -> CopyMode {
        if self.compare { CopyMode::Compare } else { CopyMode::Full }
    }

    /// The copy to disks that nothing is known of.
    fn first(self) -> CopyMode {
        match self.seeded {
            _ if self.resync => self.whole(),
            Seeded::No => CopyMode::Full,
            Seeded::Compare => CopyMode::Compare,
            Seeded::Trust => CopyMode::Missing,
        }
    }
}

/// Decides at hello. The first row that fits wins; docs/internals/sessions.md has them as a table.
pub(crate) fn decide(me: &Side, answer: &HelloAnswer, wish: Wish) -> Decision {
    let peer = &answer.side;
    if let Some(refusal) = strangers(me, answer) {
        return Decision::Refuse(refusal);
    }
    if peer.primary {
        return Decision::Refuse(both_primary(me, peer));
    }
    if let Some(refusal) = disks::disks_differ(me, peer) {
        let is_secondary = peer.set.is_some();
        return Decision::Refuse(Refusal { is_secondary, ..refusal });
    }
    if peer.set.is_none() {
        return copy(wish.first());
    }
    if !answer.discard_local
        && let Some(refusal) = newer_there(me, answer).or_else(|| needs_consent(me, answer))
    {
        return Decision::Refuse(refusal);
    }
    if wish.resync {
        return copy(wish.whole());
    }
    match how_much(me, answer) {
        Ok(plan) => Decision::Start(plan),
        Err(refusal) => Decision::Refuse(refusal),
    }
}

fn copy(copy: CopyMode) -> Decision {
    Decision::Start(Plan { copy, with_theirs: false })
}

/// Decides about a stock NBD server, which says nothing of what it holds.
pub(crate) fn decide_plain(had_peer: bool, wish: Wish) -> Decision {
    if wish.resync || !had_peer {
        return copy(wish.first());
    }
    Decision::Refuse(Refusal::of_secondary(
        "a plain NBD server does not say what it holds: it was connected before, and may lack \
         writes",
        "brep resync --full; but if the server's side has taken over, stop this one: the copy would \
         overwrite what was written there",
    ))
}

/// Two that cannot be a pair.
fn strangers(me: &Side, answer: &HelloAnswer) -> Option<Refusal> {
    let peer = &answer.side;
    if answer.version != LINK_VERSION {
        return Some(Refusal::new(
            format!("the secondary speaks link version {}, not {LINK_VERSION}", answer.version),
            "run the same version of brep on both sides",
        ));
    }
    if peer.epoch >= Epoch::MAX {
        return Some(Refusal::new(
            format!("the secondary {} tells of epoch {}, which cannot be", peer.name, peer.epoch),
            "that side, or its state directory, is damaged: connect the right pair; or stop that \
             side, move its state directory away, and start it again",
        ));
    }
    if let Some(set) = peer.set
        && me.set != Some(set)
    {
        return Some(Refusal::new(
            format!("the secondary {} belongs to other disks (set {set})", peer.name),
            "connect the right pair; to give that secondary's data up, stop it, move its state \
             directory away, and start it again",
        ));
    }
    (!me.primary && !peer.primary).then(|| {
        Refusal::new(
            format!(
                "both sides are secondaries: nobody is the disk, neither here nor on {}",
                peer.name
            ),
            "brep failover on the side that shall be the primary",
        )
    })
}

/// Two primaries: the one whose line the other has left is the old one.
fn both_primary(me: &Side, peer: &Side) -> Refusal {
    let on_line_of = |a: &Side, b: &Side| a.cur.is_some_and(|cur| lines(b).contains(cur));
    match (on_line_of(me, peer), on_line_of(peer, me)) {
        (true, false) => Refusal::stale(
            format!("the secondary {} has been promoted: it is the disk now", peer.name),
            "stop this side, and start it as the other's secondary: brep secondary, with the same \
             disks and state directory",
        ),
        (false, true) => Refusal {
            kind: RefusalKind::StaleSecondary,
            ..Refusal::of_secondary(
                format!(
                    "{} was the primary before this side was promoted, and still is one",
                    peer.name
                ),
                "stop that side, and start it as this one's secondary: brep secondary, with the \
                 same disks and state directory",
            )
        },
        _ => Refusal::split_brain(format!("{} is a primary too", peer.name), me, peer),
    }
}

/// Why the primary's data are not newer than the secondary's, if they are not.
fn newer_there(me: &Side, answer: &HelloAnswer) -> Option<Refusal> {
    let peer = &answer.side;
    let (mine, theirs) = (lines(me), lines(peer));
    if let Some(cur) = peer.cur {
        match mine.last_epoch(cur) {
            None if me.cur.is_some_and(|cur| theirs.contains(cur)) => {
                return Some(newer(format!(
                    "the secondary {} follows a line of writes that has left this side's: it has \
                     served another primary, or this side was restored from an older copy",
                    peer.name
                )));
            }
            None => {
                let what = format!(
                    "the secondary {} follows a line of writes (cur {cur}) that this primary does \
                     not know",
                    peer.name
                );
                return Some(Refusal::split_brain(what, me, peer));
            }
            Some(last) if received_more(me, answer) => {
                return Some(restored(format!(
                    "the secondary {} was given epoch {}, beyond epoch {last} of this primary",
                    peer.name, peer.epoch
                )));
            }
            Some(_) => {}
        }
    }
    let com = peer.com?;
    let last = mine.last_epoch(com.cur)?;
    (com.epoch > last).then(|| {
        restored(format!(
            "the secondary {} has committed epoch {}, beyond epoch {last} of this primary",
            peer.name, com.epoch
        ))
    })
}

/// Whether the secondary was given more of its line than this primary has ever written of it. An
/// old primary wrote by itself, and its maps tell what; one without a checkpoint has nothing that
/// could be newer.
fn received_more(me: &Side, answer: &HelloAnswer) -> bool {
    let last = answer.side.cur.and_then(|cur| lines(me).last_epoch(cur));
    let received = !answer.outdated && !answer.inconsistent;
    received && last.is_some_and(|last| answer.side.epoch > last)
}

fn restored(what: String) -> Refusal {
    newer(format!("{what}: this side was restored from an older copy"))
}

fn newer(reason: String) -> Refusal {
    Refusal::stale(
        reason,
        "bring the newer disks back; or let the secondary take over, which has more: stop this \
         side, and brep failover there; or give up what this side lacks: brep resync \
         --discard-local on the secondary",
    )
}

/// An old primary that has written what this side lacks: lost only if its operator says so.
fn needs_consent(me: &Side, answer: &HelloAnswer) -> Option<Refusal> {
    let peer = &answer.side;
    let wrote_nothing = peer.maps.as_ref().is_some_and(|maps| maps.bytes.iter().all(|b| *b == 0));
    (answer.outdated && !wrote_nothing).then(|| Refusal {
        kind: RefusalKind::StaleSecondary,
        ..Refusal::of_secondary(
            format!(
                "the secondary {} was a primary, and wrote what this side lacks{}",
                peer.name,
                refusal::amounts(me, peer)
            ),
            "to give that up: brep resync --discard-local on the secondary (--dry-run only says \
             what would be lost)",
        )
    })
}

/// What has to be copied. An error: everything, which is a command.
fn how_much(me: &Side, answer: &HelloAnswer) -> Result<Plan, Refusal> {
    let peer = &answer.side;
    let known = me.maps.is_some();
    // What this side forwarded last is what the other one received last.
    let continues = me.session.is_some() && me.session == peer.session && !answer.power_lost;
    #[cfg(feature = "simulation")]
    let continues = continues || plant::is(Plant::StaleGenerationAccepted);
    let missing = Plan { copy: CopyMode::Missing, with_theirs: false };
    if answer.outdated {
        return match continues && known {
            true => Ok(missing),
            false => rejoin(me, answer),
        };
    }
    let Some(theirs) = peer.com.filter(|_| !answer.inconsistent) else {
        // There is nothing to roll back to that could be lost.
        let full = Plan { copy: CopyMode::Full, with_theirs: false };
        return Ok(if continues && known { missing } else { full });
    };
    let Some(maps) = &me.maps else {
        return Err(everything(format!(
            "the secondary {} was away, and what it lacks is not known: this side's maps were \
             lost, its host lost power, or a flush of a disk failed; the secondary's last \
             checkpoint is {}",
            peer.name, theirs.epoch
        )));
    };
    let changed = Plan { copy: CopyMode::Changed, with_theirs: false };
    if maps.since.is_none() {
        // A copy of everything has begun, and is not committed: whatever the secondary holds, the
        // maps have all of it.
        return Ok(if continues { missing } else { changed });
    }
    let mine = lines(me);
    let position = mine.position(theirs);
    let last_commit = me.com.and_then(|com| mine.position(com));
    let follows = peer.cur.is_some_and(|cur| mine.contains(cur)) && !received_more(me, answer);
    if !follows || position.is_none() || position < last_commit {
        return Err(everything(format!(
            "the secondary {} has checkpoint {}, but had committed a later one: it was restored \
             from an older copy, or another secondary has been in its place",
            peer.name, theirs.epoch
        )));
    }
    if maps.since.is_some_and(|since| mine.position(since).is_none_or(|at| Some(at) > position)) {
        return Err(everything(format!(
            "this side's maps begin after checkpoint {} of the secondary {}",
            theirs.epoch, peer.name
        )));
    }
    Ok(if continues { missing } else { changed })
}

/// An old primary returns: outside what either side wrote since they parted both disks are equal,
/// if both know what they wrote. Also after a loss of its power: what it had not flushed by then it
/// wrote itself since its maps begin, or this side's maps have it; and maps that may miss something
/// are not told.
fn rejoin(me: &Side, answer: &HelloAnswer) -> Result<Plan, Refusal> {
    if me.maps.as_ref().is_some_and(|maps| maps.since.is_none()) {
        // A copy of everything has begun: this side's maps have all of it.
        return Ok(Plan { copy: CopyMode::Changed, with_theirs: false });
    }
    let peer = &answer.side;
    let (mine, theirs) = (lines(me), lines(peer));
    // A copy that was begun made the other side's disk a part of this side's line: it must not be
    // further on that line than this side.
    let given = answer.inconsistent
        && peer.cur.is_none_or(|cur| mine.last_epoch(cur).is_none_or(|last| peer.epoch > last));
    let parted = mine.common(&theirs).filter(|_| !given);
    let reaches = |side: &Side, lines: &Lines<'_>| {
        let (Some(maps), Some(parted)) = (&side.maps, parted) else { return false };
        let before = |since: Commit| {
            lines.position(since).is_some_and(|at| Some(at) <= lines.position(parted))
        };
        maps.since.is_none_or(before)
    };
    if reaches(me, &mine) && reaches(peer, &theirs) {
        return Ok(Plan { copy: CopyMode::Changed, with_theirs: true });
    }
    Err(everything(format!(
        "the secondary {} was a primary, and what both sides wrote since they parted is not known: \
         maps were lost, or begin later",
        peer.name
    )))
}

fn everything(reason: String) -> Refusal {
    Refusal::of_secondary(reason, "brep resync --full")
}

/// The way that a side has come.
fn lines(side: &Side) -> Lines<'_> {
    Lines { history: &side.history, cur: side.cur, epoch: side.epoch }
}
