use super::*;
use crate::link::{DiskInfo, MapsInfo};
use crate::{Epoch, Generation, SetId};

fn at(cur: Generation, epoch: u64) -> Commit {
    Commit { cur, epoch: Epoch(epoch) }
}

/// As hello tells of it.
pub(super) fn disk(name: &str, size: u64) -> DiskInfo {
    DiskInfo { name: name.into(), size, growable: name != "vda", joining: None }
}

pub(super) fn sides() -> (Side, Side) {
    let pair = Pair::new();
    (pair.me, pair.answer.side)
}

pub(super) fn answer() -> HelloAnswer {
    Pair::new().answer
}

/// A pair whose last checkpoint is epoch 5, and that has gone on to epoch 9.
struct Pair {
    me: Side,
    answer: HelloAnswer,
    line: Generation,
}

impl Pair {
    fn new() -> Self {
        let line = Generation::random();
        let me = Side {
            name: "p".into(),
            run: uuid::Uuid::new_v4(),
            set: Some(SetId::random()),
            cur: Some(line),
            fork: None,
            com: Some(at(line, 5)),
            epoch: Epoch(9),
            history: vec![],
            primary: true,
            made_room: false,
            session: None,
            disks: vec![disk("vda", 1 << 20)],
            removed: vec![],
            durability: crate::config::Durability::Power,
            maps: Some(MapsInfo { since: Some(at(line, 5)), bytes: vec![65536] }),
        };
        let side =
            Side { name: "s".into(), primary: false, epoch: Epoch(6), maps: None, ..me.clone() };
        let answer = HelloAnswer {
            version: LINK_VERSION,
            timeout_ms: 5000,
            side,
            guest: false,
            inconsistent: false,
            power_lost: false,
            outdated: false,
            discard_local: false,
        };
        Pair { me, answer, line }
    }

    /// The secondary was promoted to epoch 5 and is the primary now; the old one, which had come to
    /// epoch 9, is its secondary. Written since: a granule here, two there.
    fn returned() -> Self {
        let mut pair = Pair::new();
        pair.me.cur = Some(Generation::random());
        pair.me.history = vec![at(pair.line, 5)];
        pair.answer.side.epoch = Epoch(9);
        pair.answer.side.maps =
            Some(MapsInfo { since: Some(at(pair.line, 5)), bytes: vec![131_072] });
        pair.answer.outdated = true;
        pair
    }

    /// Begins a line of its own, as after a loss of the peer.
    fn go_alone(side: &mut Side, epoch: u64) {
        side.history.push(at(side.cur.unwrap(), epoch));
        side.cur = Some(Generation::random());
        side.epoch = side.epoch.max(Epoch(epoch));
    }

    fn same_session(&mut self) {
        self.me.session = Some(uuid::Uuid::new_v4());
        self.answer.side.session = self.me.session;
    }

    fn with(&self, wish: Wish) -> Decision {
        decide(&self.me, &self.answer, wish)
    }

    fn decide(&self) -> Decision {
        self.with(Wish::default())
    }

    fn refused(&self) -> Refusal {
        refusal(self.decide())
    }

    /// Refused, whatever was asked for on the primary.
    fn refused_always(&self) -> Refusal {
        let refused = refusal(self.with(RESYNC));
        assert_eq!(refused, self.refused());
        refused
    }

    /// Refused until the operator asks for a full copy.
    fn only_on_command(&self) -> Refusal {
        let refused = self.refused();
        assert_eq!(refused.advice.as_deref(), Some("brep resync --full"), "{refused:?}");
        assert!(refused.is_secondary && !refused.superseded);
        assert_eq!(self.with(RESYNC), copy(CopyMode::Full));
        refused
    }
}

const RESYNC: Wish =
    Wish { seeded: Seeded::No, resync: true, compare: false, discard_checkpoint: false };
const SEEDED: Wish = Wish { seeded: Seeded::Compare, resync: false, ..RESYNC };
const UNION: Decision = Decision::Start(Plan { copy: CopyMode::Changed, with_theirs: true });

fn refusal(decision: Decision) -> Refusal {
    match decision {
        Decision::Refuse(refusal) => refusal,
        Decision::Start(plan) => panic!("started with {plan:?}"),
    }
}

#[test]
fn another_version_is_refused_whatever_else_it_says() {
    let mut pair = Pair::new();
    pair.answer.version += 1;
    pair.answer.side.primary = true;
    let refused = pair.refused_always();
    assert!(refused.reason.contains("version") && !refused.is_secondary);
}

/// I14: a number that this side would have to count on from, and could not.
#[test]
fn i14_an_epoch_that_leaves_none_to_follow_is_refused_whatever_else_it_says() {
    let mut pair = Pair::new();
    for epoch in [Epoch::MAX, Epoch(u64::MAX)] {
        pair.answer.side.epoch = epoch;
        assert!(pair.refused_always().reason.contains("cannot be"));
        let blank = Side { set: None, ..pair.answer.side.clone() };
        let answer = HelloAnswer { side: blank, ..pair.answer.clone() };
        refusal(decide(&pair.me, &answer, Wish::default()));
    }
    // Nor do the bytes that it has written make anybody stumble.
    pair.answer.side.epoch = Epoch(7);
    pair.answer.side.primary = true;
    let maps = MapsInfo { since: None, bytes: vec![u64::MAX, u64::MAX] };
    pair.answer.side.maps = Some(maps);
    pair.refused_always();
}

#[test]
fn unrelated_disks_are_refused() {
    let mut pair = Pair::new();
    pair.answer.side.set = Some(SetId::random());
    let refused = pair.refused_always();
    assert!(refused.reason.contains("other disks"));
    assert!(!refused.is_secondary, "the secondary of these disks may be promoted");
}

#[test]
fn two_secondaries_are_told_to_promote_one() {
    let mut pair = Pair::new();
    pair.me.primary = false;
    let refused = pair.refused_always();
    assert!(refused.advice.unwrap().contains("brep failover"));
}

#[test]
fn an_old_primary_is_told_that_the_other_side_is_the_disk_now() {
    let mut pair = Pair::new();
    pair.answer.side.primary = true;
    pair.answer.side.cur = Some(Generation::random());
    pair.answer.side.history = vec![at(pair.line, 5)];
    // Whatever else differs.
    pair.answer.side.disks[0].size = 1 << 21;
    let refused = pair.refused_always();
    assert!(refused.superseded && refused.reason.contains("promoted"));
    assert_eq!(refused.kind, RefusalKind::StalePrimary);
    assert!(refused.advice.unwrap().contains("brep secondary"));
}

#[test]
fn a_primary_that_was_promoted_goes_on_although_the_old_one_is_still_a_primary() {
    let mut pair = Pair::returned();
    pair.answer.side.primary = true;
    let refused = pair.refused_always();
    assert_eq!(refused.kind, RefusalKind::StaleSecondary);
    assert!(refused.is_secondary && !refused.superseded);
}

#[test]
fn two_primaries_that_both_went_on_are_a_split_brain() {
    let mut pair = Pair::returned();
    pair.answer.side.primary = true;
    Pair::go_alone(&mut pair.answer.side, 9);
    let refused = pair.refused_always();
    assert_eq!(refused.kind, RefusalKind::SplitBrain);
    assert!(refused.superseded);
    assert!(refused.reason.contains("64 KiB") && refused.reason.contains("128 KiB"));
    assert!(refused.advice.unwrap().contains("--discard-local"));
    // Two that take themselves for the same one, a copy and its original, are one too.
    let mut pair = Pair::new();
    pair.answer.side.primary = true;
    assert_eq!(pair.refused_always().kind, RefusalKind::SplitBrain);
}

#[test]
fn sizes_and_names_must_be_equal() {
    let mut pair = Pair::new();
    let vda = pair.me.disks[0].clone();
    pair.answer.side.disks[0].size = 1024;
    assert!(pair.refused_always().reason.contains("1024"));
    pair.answer.side.disks[0] = DiskInfo { name: "vdb".into(), ..vda.clone() };
    assert!(pair.refused_always().reason.contains("vda is not on the secondary"));
    let vdc = DiskInfo { name: "vdc".into(), ..vda.clone() };
    pair.answer.side.disks = vec![vdc.clone(), vda.clone()];
    let refused = pair.refused_always();
    assert!(refused.reason.contains("vdc") && refused.is_secondary);
    // Their order does not matter.
    pair.me.disks = vec![vda, vdc];
    assert!(matches!(pair.decide(), Decision::Start(_)));
}

#[test]
fn a_blank_secondary_is_copied_in_full_or_compared_if_seeded() {
    let mut pair = Pair::new();
    pair.answer.side =
        Side { set: None, cur: None, com: None, epoch: Epoch(0), ..pair.answer.side };
    assert_eq!(pair.decide(), copy(CopyMode::Full));
    assert_eq!(pair.with(SEEDED), copy(CopyMode::Compare));
}

#[test]
fn a_plain_peer_is_copied_once_and_then_only_on_command() {
    assert_eq!(decide_plain(false, Wish::default()), copy(CopyMode::Full));
    assert_eq!(decide_plain(false, SEEDED), copy(CopyMode::Compare));
    let refused = refusal(decide_plain(true, SEEDED));
    assert!(refused.advice.is_some_and(|advice| advice.starts_with("brep resync --full")));
    assert!(refused.is_secondary && !refused.superseded);
    let compare = Wish { compare: true, ..RESYNC };
    assert_eq!(decide_plain(true, compare), copy(CopyMode::Compare));
    let trust = Wish { seeded: Seeded::Trust, ..Wish::default() };
    assert_eq!(decide_plain(false, trust), copy(CopyMode::Missing));
    assert_eq!(decide_plain(false, Wish { resync: true, ..trust }), copy(CopyMode::Full));
    assert_eq!(
        decide_plain(true, Wish { seeded: Seeded::Compare, ..RESYNC }),
        copy(CopyMode::Full)
    );
}

#[test]
fn a_primary_whose_line_the_secondary_has_left_is_stale() {
    let mut pair = Pair::new();
    Pair::go_alone(&mut pair.answer.side, 9);
    let refused = pair.refused_always();
    assert_eq!(refused.kind, RefusalKind::StalePrimary);
    assert!(refused.superseded && refused.reason.contains("older copy"));
}

#[test]
fn a_secondary_on_an_unknown_line_is_a_split_brain_and_one_on_a_line_that_was_left_is_not() {
    let mut pair = Pair::new();
    pair.answer.side.cur = Some(Generation::random());
    let refused = pair.refused_always();
    assert_eq!(refused.kind, RefusalKind::SplitBrain);
    assert!(refused.superseded);
    // It never was a primary, and has nothing of its own to be given up by a start.
    let advice = refused.advice.unwrap();
    assert!(advice.contains("brep failover there"), "{advice}");
    pair.me.history.push(at(pair.answer.side.cur.unwrap(), 6));
    assert_eq!(pair.with(RESYNC), copy(CopyMode::Full));
}

/// What is taken for the secondary of the last session is one that has seen more since.
#[test]
fn a_primary_restored_to_before_its_last_commits_is_refused() {
    let mut pair = Pair::new();
    pair.same_session();
    pair.answer.side.com = Some(at(pair.line, 12));
    let stale = |pair: &Pair| {
        let refused = pair.refused_always();
        assert_eq!(refused.kind, RefusalKind::StalePrimary);
        assert!(refused.reason.contains("restored") && refused.superseded);
    };
    stale(&pair);
    pair.me.com = None;
    stale(&pair);
    // It went on alone from there, and to higher epochs.
    Pair::go_alone(&mut pair.me, 9);
    pair.me.epoch = Epoch(20);
    stale(&pair);
}

#[test]
fn a_primary_restored_to_before_its_last_session_is_refused_although_no_commit_tells() {
    let mut pair = Pair::new();
    pair.answer.side.epoch = Epoch(10);
    assert_eq!(pair.refused_always().kind, RefusalKind::StalePrimary);
    Pair::go_alone(&mut pair.me, 9);
    pair.me.epoch = Epoch(20);
    assert_eq!(pair.refused_always().kind, RefusalKind::StalePrimary);
    // A mixture is nothing that could be newer.
    pair.answer.inconsistent = true;
    assert_eq!(pair.decide(), copy(CopyMode::Full));
}

/// Consent names the secondary as the one that loses; what it has is not known, so that all is
/// copied, and that is a command.
#[test]
fn a_stale_primary_wins_only_with_the_secondarys_consent_and_a_whole_copy() {
    let mut pair = Pair::new();
    pair.answer.side.epoch = Epoch(10);
    pair.answer.discard_local = true;
    pair.only_on_command();
    pair.answer.side.com = Some(at(pair.line, 12));
    pair.only_on_command();
    let mut pair = Pair::new();
    pair.answer.side.cur = Some(Generation::random());
    pair.answer.discard_local = true;
    pair.only_on_command();
}

#[test]
fn a_secondary_that_returns_gets_what_was_written_since_its_checkpoint() {
    let pair = Pair::new();
    assert_eq!(pair.decide(), copy(CopyMode::Changed));
    assert_eq!(pair.with(RESYNC), copy(CopyMode::Full));
}

#[test]
fn the_secondary_of_the_last_session_gets_only_what_it_never_had() {
    let mut pair = Pair::new();
    pair.same_session();
    assert_eq!(pair.decide(), copy(CopyMode::Missing));
    pair.answer.side.session = Some(uuid::Uuid::new_v4());
    assert_eq!(pair.decide(), copy(CopyMode::Changed));
}

#[test]
fn a_checkpoint_that_this_side_never_heard_of_is_no_reason_to_copy_more() {
    let mut pair = Pair::new();
    pair.answer.side.com = Some(at(pair.line, 8));
    pair.answer.side.epoch = Epoch(9);
    assert_eq!(pair.decide(), copy(CopyMode::Changed));
    // Not even the first one was heard of.
    pair.me.com = None;
    pair.me.maps = Some(MapsInfo { since: None, bytes: vec![1 << 20] });
    assert_eq!(pair.decide(), copy(CopyMode::Changed));
}

#[test]
fn lines_that_this_side_began_alone_do_not_break_the_connection() {
    let mut pair = Pair::new();
    for epoch in [9, 12, 20] {
        Pair::go_alone(&mut pair.me, epoch);
    }
    assert_eq!(pair.decide(), copy(CopyMode::Changed));
}

#[test]
fn a_secondary_that_lost_a_commit_is_copied_only_on_command() {
    let mut pair = Pair::new();
    pair.answer.side.com = Some(at(pair.line, 4));
    assert!(pair.only_on_command().reason.contains("restored"));
    // An older line than the last commit's, however high its epoch.
    let mut pair = Pair::new();
    Pair::go_alone(&mut pair.me, 9);
    pair.me.com = pair.me.cur.map(|cur| at(cur, 10));
    pair.me.epoch = Epoch(10);
    pair.answer.side.com = Some(at(pair.line, 9));
    pair.only_on_command();
    // A line that the history does not reach.
    pair.me.history.clear();
    pair.answer.side.cur = pair.me.cur;
    pair.only_on_command();
}

#[test]
fn without_maps_a_whole_copy_is_needed_and_that_is_a_command() {
    let mut pair = Pair::new();
    pair.me.maps = None;
    pair.only_on_command();
    let mut pair = Pair::returned();
    pair.answer.discard_local = true;
    assert_eq!(pair.decide(), UNION);
    pair.me.maps = None;
    pair.only_on_command();
}

#[test]
fn maps_that_begin_after_the_secondarys_checkpoint_are_not_enough() {
    let mut pair = Pair::new();
    pair.me.com = None;
    pair.me.maps = Some(MapsInfo { since: Some(at(pair.line, 6)), bytes: vec![0] });
    pair.only_on_command();
    pair.me.maps = Some(MapsInfo { since: Some(at(Generation::random(), 1)), bytes: vec![0] });
    pair.only_on_command();
}

/// What made it necessary is still true, and is not asked about again.
#[test]
fn a_whole_copy_that_was_interrupted_goes_on_or_begins_anew_whatever_the_secondary_has() {
    let mut lost_commit = Pair::new();
    lost_commit.answer.side.com = Some(at(lost_commit.me.cur.unwrap(), 1));
    lost_commit.only_on_command();
    let mut returned = Pair::returned();
    returned.answer.discard_local = true;
    returned.answer.side.maps = None;
    returned.only_on_command();
    for mut pair in [lost_commit, returned] {
        let maps = pair.me.maps.as_mut().unwrap();
        maps.since = None;
        pair.answer.power_lost = false;
        pair.answer.side.maps = None;
        assert_eq!(pair.decide(), copy(CopyMode::Changed));
        pair.same_session();
        assert_eq!(pair.decide(), copy(CopyMode::Missing));
        // What it acknowledged is lost, and the copy with it.
        pair.answer.power_lost = true;
        assert_eq!(pair.decide(), copy(CopyMode::Changed));
    }
}

#[test]
fn an_interrupted_first_copy_goes_on_or_begins_anew() {
    let mut pair = Pair::new();
    pair.answer.inconsistent = true;
    assert_eq!(pair.decide(), copy(CopyMode::Full));
    pair.same_session();
    assert_eq!(pair.decide(), copy(CopyMode::Missing));
    // What had been copied may be gone, or is not known.
    pair.answer.power_lost = true;
    assert_eq!(pair.decide(), copy(CopyMode::Full));
    pair.answer.power_lost = false;
    pair.me.maps = None;
    assert_eq!(pair.decide(), copy(CopyMode::Full));
}

#[test]
fn an_old_primary_that_wrote_something_needs_consent_and_then_both_sides_writes_are_copied() {
    let mut pair = Pair::returned();
    let refused = pair.refused_always();
    assert_eq!(refused.kind, RefusalKind::StaleSecondary);
    assert!(refused.is_secondary && !refused.superseded, "the promoted side goes on");
    assert!(refused.reason.contains("64 KiB") && refused.reason.contains("128 KiB"));
    assert!(refused.advice.unwrap().contains("brep resync --discard-local"));
    pair.answer.discard_local = true;
    assert_eq!(pair.decide(), UNION);
    assert_eq!(pair.with(RESYNC), copy(CopyMode::Full));
    // What it wrote is not known: it may be everything.
    pair.answer.discard_local = false;
    pair.answer.side.maps = None;
    pair.refused_always();
    pair.answer.discard_local = true;
    pair.only_on_command();
}

#[test]
fn an_old_primary_that_wrote_nothing_needs_no_consent() {
    let mut pair = Pair::returned();
    pair.answer.side.maps = Some(MapsInfo { since: Some(at(pair.line, 5)), bytes: vec![0] });
    assert_eq!(pair.decide(), UNION);
}

#[test]
fn the_loser_of_a_split_brain_returns_with_consent() {
    let mut pair = Pair::returned();
    Pair::go_alone(&mut pair.answer.side, 9);
    assert_eq!(pair.refused_always().kind, RefusalKind::SplitBrain);
    pair.answer.discard_local = true;
    assert_eq!(pair.decide(), UNION);
    // The promoted side can be the loser as well.
    let Pair { me, answer, .. } = pair;
    let (answer, me) = (
        HelloAnswer { side: Side { primary: false, ..me }, ..answer },
        Side { primary: true, ..answer.side },
    );
    assert_eq!(decide(&me, &answer, Wish::default()), UNION);
}

#[test]
fn a_promotion_is_taken_back_only_with_consent() {
    // The old primary, never lost, against the promoted one, as its secondary.
    let Pair { me, mut answer, .. } = Pair::returned();
    let primary = Side { primary: true, ..answer.side };
    answer.side = Side { primary: false, ..me };
    let refused = refusal(decide(&primary, &answer, RESYNC));
    assert_eq!(refused.kind, RefusalKind::StalePrimary);
    answer.discard_local = true;
    assert_eq!(decide(&primary, &answer, Wish::default()), UNION);
}

#[test]
fn maps_that_begin_after_the_sides_parted_are_not_enough() {
    let mut pair = Pair::returned();
    pair.answer.discard_local = true;
    let cur = pair.me.cur.unwrap();
    pair.me.maps = Some(MapsInfo { since: Some(at(cur, 30)), bytes: vec![0] });
    pair.me.epoch = Epoch(31);
    pair.only_on_command();
    // Neither may the loser's.
    let mut pair = Pair::returned();
    pair.answer.discard_local = true;
    pair.answer.side.maps = Some(MapsInfo { since: Some(at(pair.line, 6)), bytes: vec![0] });
    pair.only_on_command();
    Pair::go_alone(&mut pair.answer.side, 9);
    let alone = pair.answer.side.cur.unwrap();
    pair.answer.side.maps = Some(MapsInfo { since: Some(at(alone, 9)), bytes: vec![0] });
    pair.only_on_command();
}

#[test]
fn a_return_that_was_interrupted_goes_on() {
    let mut pair = Pair::returned();
    pair.answer.discard_local = true;
    pair.answer.inconsistent = true;
    pair.answer.side.cur = pair.me.cur;
    pair.answer.side.history = pair.me.history.clone();
    assert_eq!(pair.decide(), UNION, "another session, or a rolled back one");
    pair.same_session();
    assert_eq!(pair.decide(), copy(CopyMode::Missing));
    // Further on than this side, which was restored: what it was given is not known.
    pair.answer.side.session = None;
    pair.answer.side.epoch = Epoch(10);
    pair.only_on_command();
}

#[test]
fn after_a_power_loss_a_return_copies_what_either_side_wrote_if_both_know_it() {
    let mut pair = Pair::returned();
    pair.answer.discard_local = true;
    pair.same_session();
    assert_eq!(pair.decide(), copy(CopyMode::Missing));
    // What it had acknowledged is not there any more.
    pair.answer.power_lost = true;
    assert_eq!(pair.decide(), UNION);
    // It kept no log of what its maps may miss.
    pair.answer.side.maps = None;
    pair.only_on_command();
}
