use crate::link::{CopyMode, HelloAnswer, LINK_VERSION, Side};
use crate::{Commit, Epoch, Generation};

/// What the primary makes of a secondary's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Begin a session with this copy.
    Start(CopyMode),
    /// No session.
    Refuse(Refusal),
}

/// Why there is no session, and what resolves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    pub(crate) advice: Option<String>,
    /// The peer has taken over: this side must not serve its guest.
    pub(crate) superseded: bool,
    /// The peer has said that it is the secondary of these disks: nobody else serves a guest, so
    /// this side may, alone.
    pub(crate) is_secondary: bool,
}

/// What the operator has asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    /// The secondary's disks were copied by other means.
    pub(crate) seeded: bool,
    /// `resync --full`.
    pub(crate) resync: bool,
}

/// Decides at hello. The first row that fits wins. `maps_known`: this side's maps hold whatever a
/// secondary lacks that has the last checkpoint.
pub(crate) fn decide(me: &Side, answer: &HelloAnswer, wish: Wish, maps_known: bool) -> Decision {
    let peer = &answer.side;
    if answer.version != LINK_VERSION {
        return refuse(
            format!("the secondary speaks link version {}, not {LINK_VERSION}", answer.version),
            "run the same version of brep on both sides",
        );
    }
    if let Some(set) = peer.set
        && me.set != Some(set)
    {
        return refuse(
            format!("the secondary {} belongs to other disks (set {set})", peer.name),
            "connect the right pair; to give that secondary's data up, stop it, move its state \
             directory away, and start it again",
        );
    }
    if peer.primary {
        return both_primary(me, peer);
    }
    if let Some(reason) = disks_differ(me, peer) {
        let advice = "give both sides the same disks, with the same names and sizes";
        return if peer.set.is_some() {
            refuse_secondary(reason, advice)
        } else {
            refuse(reason, advice)
        };
    }
    let copy = if wish.seeded { CopyMode::Compare } else { CopyMode::Full };
    if peer.set.is_none() {
        return Decision::Start(copy);
    }
    if let Some(cur) = peer.cur
        && me.cur != Some(cur)
        && !me.history.iter().any(|fork| fork.cur == cur)
    {
        return refuse_superseded(
            format!(
                "the secondary {} follows a line of writes (cur {cur}) that this primary does not \
                 know: this side is stale, or the secondary served another primary",
                peer.name
            ),
            "find out which side has the newer data; the other one starts over with an empty \
             state directory",
        );
    }
    if let Some(theirs) = peer.com
        && let Some(last) = last_epoch(me, theirs.cur)
        && theirs.epoch > last
    {
        return refuse_superseded(
            format!(
                "the secondary {} has committed epoch {}, beyond epoch {last} of this primary: \
                 this side was restored from an older copy",
                peer.name, theirs.epoch
            ),
            "bring the newer disks back, or start the secondary over with an empty state directory",
        );
    }
    if wish.resync {
        return Decision::Start(CopyMode::Full);
    }
    // What this side forwarded last is what the other one received last.
    let continues = me.session.is_some() && me.session == peer.session;
    let Some(theirs) = peer.com.filter(|_| !answer.inconsistent) else {
        // There is nothing to roll back to that could be lost.
        let resumed = continues && maps_known && !answer.power_lost;
        return Decision::Start(if resumed { CopyMode::Missing } else { CopyMode::Full });
    };
    let (there, mine) = (position(me, theirs), me.com.and_then(|mine| position(me, mine)));
    if there.is_none() || there < mine {
        return refuse_secondary(
            format!(
                "the secondary {} has checkpoint {}, but had committed a later one: it was \
                 restored from an older copy, or another secondary has been in its place",
                peer.name, theirs.epoch
            ),
            "brep resync --full",
        );
    }
    if !maps_known {
        return refuse_secondary(
            format!(
                "the secondary {} was away, and what it lacks is not known: this side's maps were \
                 lost, its host lost power, or a flush of a disk failed; the secondary's last checkpoint is {}",
                peer.name, theirs.epoch
            ),
            "brep resync --full",
        );
    }
    Decision::Start(if continues { CopyMode::Missing } else { CopyMode::Changed })
}

/// The last epoch of a line, as far as this side has come on it. None: not its line.
fn last_epoch(me: &Side, cur: Generation) -> Option<Epoch> {
    let left = me.history.iter().find(|fork| fork.cur == cur).map(|fork| fork.epoch);
    left.or_else(|| (me.cur == Some(cur)).then_some(me.epoch))
}

/// Where on this side's line of writes a commit lies: the line's number, and the epoch. None: on
/// no line that is remembered.
pub(super) fn position(me: &Side, commit: Commit) -> Option<(usize, Epoch)> {
    let earlier = me.history.iter().position(|fork| fork.cur == commit.cur);
    let line = earlier.or_else(|| (me.cur == Some(commit.cur)).then_some(me.history.len()))?;
    Some((line, commit.epoch))
}

/// Decides about a stock NBD server, which says nothing of what it holds.
pub(crate) fn decide_plain(had_peer: bool, wish: Wish) -> Decision {
    if wish.resync || !had_peer {
        let compare = wish.seeded && !wish.resync;
        return Decision::Start(if compare { CopyMode::Compare } else { CopyMode::Full });
    }
    refuse_secondary(
        "a plain NBD server does not say what it holds: it was connected before, and may lack \
         writes"
            .to_owned(),
        "brep resync --full; but if the server's side has taken over, stop this one: the copy would \
         overwrite what was written there",
    )
}

fn disks_differ(me: &Side, peer: &Side) -> Option<String> {
    let names =
        |side: &Side| side.disks.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(", ");
    for disk in &me.disks {
        let Some(theirs) = peer.disks.iter().find(|d| d.name == disk.name) else {
            return Some(format!(
                "the disks differ: {} here, {} on the secondary {}",
                names(me),
                names(peer),
                peer.name
            ));
        };
        if theirs.size != disk.size {
            return Some(format!(
                "disk {}: {} bytes here, {} on the secondary {}",
                disk.name, disk.size, theirs.size, peer.name
            ));
        }
    }
    (me.disks.len() != peer.disks.len()).then(|| {
        format!(
            "the disks differ: {} here, {} on the secondary {}",
            names(me),
            names(peer),
            peer.name
        )
    })
}

fn both_primary(me: &Side, peer: &Side) -> Decision {
    let forked_from_mine = me.cur.is_some_and(|cur| peer.history.iter().any(|f| f.cur == cur));
    if forked_from_mine {
        return refuse_superseded(
            format!("the secondary {} has been promoted: it is the disk now", peer.name),
            "stop this side; move its state directory away and start it as the secondary of the \
             other",
        );
    }
    refuse_superseded(
        format!(
            "split brain: the secondary {} has been promoted, and this side went on writing alone",
            peer.name
        ),
        "decide which side's writes are kept; the other one starts over as a secondary with an \
         empty state directory",
    )
}

fn refuse(reason: String, advice: &str) -> Decision {
    Decision::Refuse(Refusal::new(reason, advice))
}

fn refuse_superseded(reason: String, advice: &str) -> Decision {
    Decision::Refuse(Refusal { superseded: true, ..Refusal::new(reason, advice) })
}

fn refuse_secondary(reason: String, advice: &str) -> Decision {
    Decision::Refuse(Refusal { is_secondary: true, ..Refusal::new(reason, advice) })
}

impl Refusal {
    pub(crate) fn new(reason: impl Into<String>, advice: &str) -> Self {
        let advice = Some(advice.to_owned());
        Refusal { reason: reason.into(), advice, superseded: false, is_secondary: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SetId;
    use crate::link::DiskInfo;

    fn pair() -> (Side, HelloAnswer) {
        let side = Side {
            name: "p".into(),
            run: uuid::Uuid::new_v4(),
            set: Some(SetId::random()),
            cur: Some(Generation::random()),
            fork: None,
            com: None,
            epoch: Epoch(9),
            history: vec![],
            primary: true,
            session: None,
            disks: vec![DiskInfo { name: "vda".into(), size: 512 }],
        };
        let answer = HelloAnswer {
            version: LINK_VERSION,
            timeout_ms: 5000,
            side: Side { name: "s".into(), primary: false, ..side.clone() },
            guest: false,
            inconsistent: false,
            power_lost: false,
        };
        (side, answer)
    }

    fn refusal(decision: Decision) -> Refusal {
        match decision {
            Decision::Refuse(refusal) => refusal,
            Decision::Start(copy) => panic!("started with {copy:?}"),
        }
    }

    #[test]
    fn a_blank_secondary_is_copied_in_full_or_compared_if_seeded() {
        let (me, mut answer) = pair();
        answer.side.set = None;
        answer.side.cur = None;
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Full));
        let wish = Wish { seeded: true, ..Wish::default() };
        assert_eq!(decide(&me, &answer, wish, true), Decision::Start(CopyMode::Compare));
    }

    #[test]
    fn a_plain_peer_is_copied_once_and_then_only_on_command() {
        let seeded = Wish { seeded: true, resync: false };
        assert_eq!(decide_plain(false, Wish::default()), Decision::Start(CopyMode::Full));
        assert_eq!(decide_plain(false, seeded), Decision::Start(CopyMode::Compare));
        let refused = refusal(decide_plain(true, seeded));
        assert!(refused.advice.is_some_and(|advice| advice.starts_with("brep resync --full")));
        assert!(refused.is_secondary && !refused.superseded);
        let resync = Wish { seeded: true, resync: true };
        assert_eq!(decide_plain(true, resync), Decision::Start(CopyMode::Full));
    }

    #[test]
    fn unrelated_disks_are_refused() {
        let (me, mut answer) = pair();
        answer.side.set = Some(SetId::random());
        let wish = Wish { resync: true, ..Wish::default() };
        let refused = refusal(decide(&me, &answer, wish, true));
        assert!(refused.reason.contains("other disks"));
        assert!(!refused.is_secondary, "the secondary of these disks may be promoted");
    }

    #[test]
    fn whatever_else_differs_a_promoted_secondary_supersedes() {
        let (me, mut answer) = pair();
        answer.side.primary = true;
        answer.side.history = vec![Commit { cur: me.cur.unwrap(), epoch: Epoch(4) }];
        answer.side.disks[0].size = 1 << 20;
        assert!(refusal(decide(&me, &answer, Wish::default(), true)).superseded);
        answer.version = LINK_VERSION + 1;
        assert!(!refusal(decide(&me, &answer, Wish::default(), true)).is_secondary);
    }

    #[test]
    fn sizes_and_names_must_be_equal() {
        let (me, mut answer) = pair();
        answer.side.disks[0].size = 1024;
        assert!(refusal(decide(&me, &answer, Wish::default(), true)).reason.contains("1024"));
        answer.side.disks[0] = DiskInfo { name: "vdb".into(), size: 512 };
        assert!(refusal(decide(&me, &answer, Wish::default(), true)).reason.contains("vdb"));
        answer.side.disks = vec![me.disks[0].clone(), DiskInfo { name: "vdc".into(), size: 512 }];
        assert!(refusal(decide(&me, &answer, Wish::default(), true)).reason.contains("vdc"));
    }

    /// A pair whose last checkpoint is epoch 5, and that has gone on to epoch 9.
    fn committed() -> (Side, HelloAnswer) {
        let (mut me, mut answer) = pair();
        me.com = me.cur.map(|cur| Commit { cur, epoch: Epoch(5) });
        answer.side.com = me.com;
        (me, answer)
    }

    #[test]
    fn a_secondary_that_returns_gets_what_was_written_since_its_checkpoint() {
        let (me, answer) = committed();
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Changed));
        let wish = Wish { resync: true, ..Wish::default() };
        assert_eq!(decide(&me, &answer, wish, true), Decision::Start(CopyMode::Full));
    }

    #[test]
    fn the_secondary_of_the_last_session_gets_only_what_it_never_had() {
        let (mut me, mut answer) = committed();
        me.session = Some(uuid::Uuid::new_v4());
        answer.side.session = me.session;
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Missing));
        answer.side.session = Some(uuid::Uuid::new_v4());
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Changed));
    }

    #[test]
    fn a_checkpoint_that_this_side_never_heard_of_is_no_reason_to_copy_more() {
        let (me, mut answer) = committed();
        answer.side.com = me.com.map(|com| Commit { epoch: Epoch(9), ..com });
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Changed));
        // Not even the first one was heard of.
        let me = Side { com: None, ..me };
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Changed));
    }

    /// What is taken for the secondary of the last session is one that has seen more since.
    #[test]
    fn a_primary_restored_to_before_its_last_commits_is_refused() {
        let (mut me, mut answer) = committed();
        me.session = Some(uuid::Uuid::new_v4());
        answer.side.session = me.session;
        answer.side.com = me.com.map(|com| Commit { epoch: Epoch(12), ..com });
        let refused = |me: &Side| refusal(decide(me, &answer, Wish::default(), true));
        assert!(refused(&me).superseded);
        assert!(refused(&Side { com: None, ..me.clone() }).superseded, "before its first commit");
        // Before its first commit of the line that it began last.
        let earlier = Generation::random();
        me.history = vec![Commit { cur: earlier, epoch: Epoch(5) }];
        me.com = Some(Commit { cur: earlier, epoch: Epoch(5) });
        assert!(refused(&me).superseded);
        // It went on alone from there, and to higher epochs.
        me.history.push(Commit { cur: me.cur.unwrap(), epoch: Epoch(9) });
        me.cur = Some(Generation::random());
        me.epoch = Epoch(20);
        assert!(refused(&me).superseded);
    }

    #[test]
    fn lines_that_this_side_began_alone_do_not_break_the_connection() {
        let (mut me, answer) = committed();
        for epoch in [9, 12, 20] {
            me.history.push(Commit { cur: me.cur.unwrap(), epoch: Epoch(epoch) });
            me.cur = Some(Generation::random());
        }
        me.epoch = Epoch(20);
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Changed));
    }

    #[test]
    fn a_secondary_that_lost_a_commit_is_copied_only_on_command() {
        let (me, mut answer) = committed();
        answer.side.com = me.com.map(|com| Commit { epoch: Epoch(4), ..com });
        let refused = refusal(decide(&me, &answer, Wish::default(), true));
        assert!(refused.reason.contains("restored") && refused.is_secondary);
        // An older line than the last commit's, however high its epoch.
        let (mut me, mut answer) = committed();
        me.history.push(Commit { cur: me.cur.unwrap(), epoch: Epoch(9) });
        me.cur = Some(Generation::random());
        me.com = me.cur.map(|cur| Commit { cur, epoch: Epoch(10) });
        me.epoch = Epoch(10);
        answer.side.com = Some(Commit { epoch: Epoch(9), ..answer.side.com.unwrap() });
        assert!(refusal(decide(&me, &answer, Wish::default(), true)).reason.contains("restored"));
        // A line that the history does not reach.
        me.history.clear();
        answer.side.cur = me.cur;
        assert!(refusal(decide(&me, &answer, Wish::default(), true)).reason.contains("restored"));
    }

    #[test]
    fn without_maps_a_whole_copy_is_needed_and_that_is_a_command() {
        let (me, answer) = committed();
        let refused = refusal(decide(&me, &answer, Wish::default(), false));
        assert_eq!(refused.advice.as_deref(), Some("brep resync --full"));
        assert!(!refused.superseded && refused.is_secondary);
    }

    #[test]
    fn an_interrupted_first_copy_goes_on_or_begins_anew() {
        let (mut me, mut answer) = pair();
        answer.inconsistent = true;
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Full));
        me.session = Some(uuid::Uuid::new_v4());
        answer.side.session = me.session;
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Missing));
        // What had been copied may be gone, or is not known.
        assert_eq!(decide(&me, &answer, Wish::default(), false), Decision::Start(CopyMode::Full));
        answer.power_lost = true;
        assert_eq!(decide(&me, &answer, Wish::default(), true), Decision::Start(CopyMode::Full));
    }

    #[test]
    fn a_promoted_secondary_supersedes_its_primary() {
        let (me, mut answer) = pair();
        answer.side.primary = true;
        let fork = Commit { cur: me.cur.unwrap(), epoch: Epoch(4) };
        answer.side.cur = Some(Generation::random());
        answer.side.history = vec![fork];
        let wish = Wish { resync: true, ..Wish::default() };
        let refused = refusal(decide(&me, &answer, wish, true));
        assert!(refused.superseded && refused.reason.contains("promoted"));
        // This side has gone on alone: its line is a new one that the other never saw.
        let me = Side { cur: Some(Generation::random()), history: vec![fork], ..me };
        let refused = refusal(decide(&me, &answer, wish, true));
        assert!(refused.superseded && refused.reason.contains("split brain"));
    }

    #[test]
    fn a_secondary_on_an_unknown_line_is_refused() {
        let (me, mut answer) = pair();
        answer.side.cur = Some(Generation::random());
        let wish = Wish { resync: true, ..Wish::default() };
        assert!(refusal(decide(&me, &answer, wish, true)).superseded);
        // A line that this side left is known.
        let fork = Commit { cur: answer.side.cur.unwrap(), epoch: Epoch(3) };
        let me = Side { history: vec![fork], ..me };
        assert_eq!(decide(&me, &answer, wish, true), Decision::Start(CopyMode::Full));
    }

    #[test]
    fn a_primary_restored_from_an_older_copy_is_refused() {
        let (mut me, mut answer) = pair();
        let com = Commit { cur: me.cur.unwrap(), epoch: Epoch(5) };
        me.com = Some(com);
        answer.side.com = Some(Commit { epoch: Epoch(20), ..com });
        let wish = Wish { resync: true, ..Wish::default() };
        assert!(refusal(decide(&me, &answer, wish, true)).reason.contains("restored"));
    }
}
