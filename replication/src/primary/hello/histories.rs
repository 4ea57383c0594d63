//! Two sides live through random histories, and what is decided at hello is held against what their
//! disks truly hold: a copy leaves no difference, and loses nothing without consent.
//!
//! Records and decisions are the real ones; disks, maps and links are models of a few lines.

mod generated;
mod maps;

use std::collections::BTreeSet;

use uuid::Uuid;

use self::maps::Maps;
use super::*;
use crate::link::DiskInfo;
use crate::primary::Since;
use crate::state::{Promotion, Record, Role, Target};
use crate::{Epoch, Generation, SetId};

/// Granules of the one disk.
const CELLS: usize = 5;

/// What a granule holds: the number of the write. 0 is what was there before.
type Disk = [u32; CELLS];
type Cells = BTreeSet<usize>;

/// What outlives a process, and can be put back from a copy.
#[derive(Debug, Clone)]
struct Files {
    record: Record,
    disk: Disk,
    /// What a loss of power leaves of it at least.
    stable: Disk,
    /// What the buffers show: the disk at the last checkpoint, and what it had held until then.
    checkpoint: Option<(Disk, BTreeSet<u32>)>,
    maps: Option<Maps>,
    /// Every write that the disk has held on its way.
    seen: BTreeSet<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Stopped,
    Primary { serving: bool },
    Secondary,
}

#[derive(Debug, Clone)]
struct Node {
    files: Files,
    run: Run,
    /// The epoch that a primary's process is in.
    current: Epoch,
    /// It has begun the present line.
    has_own_line: bool,
    /// The last run was ended by a loss of power.
    power_lost: bool,
    copies: Vec<Files>,
    /// The primary's refusal allows the operator to give up what is here.
    may_discard: bool,
}

/// The last step of a session's beginning that is done before the link is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Until {
    Ranges,
    Intent,
    Line,
    Started,
    Attached,
    /// So many granules are copied.
    Copied(usize),
    Cut,
    Committed,
    /// It goes on.
    Told,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(usize, usize),
    /// A write that the secondary never gets.
    LastWrite(usize),
    Hello {
        resync: bool,
        until: Until,
    },
    Checkpoint(Until),
    LoseLink,
    Stop(usize),
    Restart(usize),
    Start(usize, Role, bool),
    Failover(usize),
    Discard(usize),
    ForceLonely(usize),
    LoseMaps(usize),
    KeepCopy(usize),
    PutBack(usize, usize),
    /// Of what was not flushed these granules are lost. It is started as what it was, or as this.
    LosePower(usize, u8, Option<Role>),
}

#[derive(Debug)]
struct World {
    nodes: [Node; 2],
    /// The primary of the session that goes on.
    session: Option<usize>,
    writes: u32,
    started: usize,
}

impl Node {
    fn new(name: &str, role: Role, disk: Disk) -> Self {
        let mut record = Record::blank(name, role);
        let primary = role == Role::Primary;
        record.set = primary.then(SetId::random);
        record.cur = primary.then(Generation::random);
        let files = Files {
            record,
            disk,
            stable: disk,
            checkpoint: None,
            maps: primary.then(Maps::unknown),
            seen: BTreeSet::from(disk),
        };
        let run = if primary { Run::Primary { serving: true } } else { Run::Secondary };
        Node {
            files,
            run,
            current: Epoch(0),
            has_own_line: false,
            power_lost: false,
            copies: vec![],
            may_discard: false,
        }
    }

    fn side(&self) -> Side {
        let record = self.files.record.clone();
        let own = record.role == Role::Primary || record.secondary.outdated;
        Side {
            name: record.name,
            durability: crate::config::Durability::Power,
            run: Uuid::nil(),
            set: record.set,
            cur: record.cur,
            fork: record.fork,
            com: record.com,
            epoch: record.epoch,
            history: record.history,
            primary: record.role == Role::Primary,
            made_room: false,
            session: record.session,
            disks: vec![DiskInfo {
                name: "vda".into(),
                size: CELLS as u64,
                growable: false,
                joining: None,
            }],
            removed: Vec::new(),
            maps: self.files.maps.as_ref().filter(|_| own).and_then(Maps::info),
        }
    }

    fn answer(&self) -> HelloAnswer {
        let secondary = &self.files.record.secondary;
        HelloAnswer {
            version: LINK_VERSION,
            timeout_ms: 1,
            side: self.side(),
            guest: false,
            inconsistent: secondary.inconsistent,
            power_lost: secondary.power_lost,
            outdated: secondary.outdated,
            discard_local: secondary.discard_local,
        }
    }

    fn put(&mut self, cell: usize, write: u32) {
        self.files.disk[cell] = write;
        self.files.seen.insert(write);
    }

    fn maps(&mut self) -> &mut Maps {
        self.files.maps.as_mut().expect("a primary has maps")
    }

    fn go_alone(&mut self) {
        let record = &mut self.files.record;
        let last = self.current.max(record.epoch);
        let new_line = record.primary.had_peer && !record.primary.alone;
        record.primary.alone = record.primary.had_peer;
        record.epoch = last;
        self.has_own_line |= new_line;
        if new_line {
            record.begin_line(Generation::random(), last);
        }
    }

    fn start(&mut self, role: Role, discard: bool) {
        let record = &mut self.files.record;
        let promoted = record.secondary.promotion.is_some();
        match role {
            Role::Primary => {
                let untouched = record.secondary.outdated && !record.secondary.inconsistent;
                if record.role == Role::Secondary && !untouched {
                    return;
                }
                record.become_primary();
            }
            Role::Secondary if record.is_primary() && promoted && !discard => {}
            Role::Secondary => {
                if record.is_primary() {
                    record.return_as_secondary();
                }
                if discard && !record.secondary.outdated {
                    return;
                }
                record.secondary.discard_local |= discard;
                if !record.secondary.outdated {
                    self.files.maps = None;
                }
            }
        }
        let record = &mut self.files.record;
        if std::mem::take(&mut self.power_lost) && record.role == Role::Secondary {
            record.secondary.power_lost = true;
        }
        self.may_discard = false;
        self.current = record.epoch;
        self.has_own_line = false;
        self.run = match record.role {
            Role::Secondary => Run::Secondary,
            Role::Primary => {
                Run::Primary { serving: !record.primary.had_peer || record.primary.alone }
            }
        };
        if record.is_primary() || record.secondary.outdated {
            self.files.maps.get_or_insert_with(Maps::unknown);
        }
    }

    /// Of what was not on stable storage these granules are lost. The maps have all of it, because a
    /// log says which bits they may have lost; but not since when it is in which.
    fn lose_power(&mut self, lost: u8) {
        let files = &mut self.files;
        for cell in (0..CELLS).filter(|cell| lost & (1 << cell) != 0) {
            files.disk[cell] = files.stable[cell];
        }
        files.stable = files.disk;
        if let Some(maps) = &mut files.maps {
            maps.void_pending();
            maps.differs.0.append(&mut maps.open.0);
        }
        self.power_lost = true;
    }

    fn failover(&mut self) {
        let record = &mut self.files.record;
        if self.run != Run::Secondary || !record.has_checkpoint() {
            return;
        }
        record.begin_line_at_checkpoint(Generation::random());
        record.primary.had_peer = true;
        record.primary.alone = true;
        record.role = Role::Primary;
        record.session = None;
        record.secondary.latest_ok = false;
        record.secondary.promotion = Some(Promotion {
            target: Target::Checkpoint,
            merged: true,
            dropped_bytes: 0,
            held: None,
        });
        let com = record.com.expect("a checkpoint");
        self.files.maps = Some(Maps::new(Since::Commit(com)));
        (self.files.disk, self.files.seen) = self.files.checkpoint.take().expect("a checkpoint");
        self.files.stable = self.files.disk;
        self.current = self.files.record.epoch;
        self.run = Run::Primary { serving: true };
    }
}

impl World {
    fn new() -> Self {
        let nodes = [
            Node::new("a", Role::Primary, [0; CELLS]),
            // Whatever lay on the disk before.
            Node::new("b", Role::Secondary, [1; CELLS]),
        ];
        World { nodes, session: None, writes: 1, started: 0 }
    }

    fn lose_link(&mut self) {
        let Some(primary) = self.session.take() else { return };
        let node = &mut self.nodes[primary];
        if node.run != Run::Stopped {
            node.maps().void_pending();
            node.go_alone();
        }
    }

    fn stop(&mut self, node: usize) {
        self.nodes[node].run = Run::Stopped;
        self.lose_link();
    }

    /// Stops a side, does something to its files, and starts it in the role that they name.
    fn restart(&mut self, node: usize, change: impl FnOnce(&mut Node)) {
        self.stop(node);
        change(&mut self.nodes[node]);
        let role = self.nodes[node].files.record.role;
        self.nodes[node].start(role, false);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Write(node, cell) => self.write(node, cell, true),
            Op::LastWrite(cell) => {
                if let Some(primary) = self.session {
                    self.write(primary, cell, false);
                    self.lose_link();
                }
            }
            Op::Hello { resync, until } => {
                let order = [0, 1].into_iter().find(|n| {
                    matches!(self.nodes[*n].run, Run::Primary { .. }) && self.session.is_none()
                });
                if let Some(primary) = order {
                    self.hello(primary, resync, until);
                    // Both may be primaries, and connect in turn.
                    if self.session.is_none() {
                        self.hello(1 - primary, false, until);
                    }
                }
            }
            Op::Checkpoint(until) => {
                if let Some(primary) = self.session {
                    self.checkpoint(primary, until);
                }
            }
            Op::LoseLink => self.lose_link(),
            Op::Stop(node) => self.stop(node),
            Op::Start(node, role, discard) => {
                if self.nodes[node].run == Run::Stopped {
                    self.nodes[node].start(role, discard);
                }
            }
            Op::Failover(node) => {
                if self.nodes[node].run == Run::Secondary {
                    self.lose_link();
                    self.nodes[node].failover();
                }
            }
            Op::Discard(node) => {
                let node = &mut self.nodes[node];
                let outdated = node.files.record.secondary.outdated;
                if node.run == Run::Secondary && (outdated || node.may_discard) {
                    node.files.record.secondary.discard_local = true;
                }
            }
            Op::ForceLonely(node) => {
                if self.session.is_none()
                    && let node = &mut self.nodes[node]
                    && node.run == (Run::Primary { serving: false })
                {
                    node.go_alone();
                    node.run = Run::Primary { serving: true };
                }
            }
            Op::LoseMaps(node) => self.restart(node, |node| {
                if node.files.maps.is_some() {
                    node.files.maps = Some(Maps::unknown());
                }
            }),
            Op::KeepCopy(node) => self.restart(node, |node| {
                node.copies.insert(0, node.files.clone());
                node.copies.truncate(3);
            }),
            Op::PutBack(node, copy) => self.restart(node, |node| {
                if let Some(files) = node.copies.get(copy) {
                    node.files = files.clone();
                }
            }),
            Op::Restart(node) => self.restart(node, |_| ()),
            Op::LosePower(node, lost, role) => {
                self.stop(node);
                let node = &mut self.nodes[node];
                node.lose_power(lost);
                node.start(role.unwrap_or(node.files.record.role), false);
            }
        }
    }

    fn write(&mut self, node: usize, cell: usize, reaches_peer: bool) {
        if self.nodes[node].run != (Run::Primary { serving: true }) {
            return;
        }
        self.writes += 1;
        let write = self.writes;
        self.nodes[node].put(cell, write);
        let sent = self.session == Some(node) && reaches_peer;
        let maps = self.nodes[node].maps();
        if sent {
            maps.open.0.insert(cell);
            self.nodes[1 - node].put(cell, write);
        } else {
            maps.differs.0.insert(cell);
        }
    }

    fn hello(&mut self, primary: usize, resync: bool, until: Until) {
        let (me, peer) = (&self.nodes[primary], &self.nodes[1 - primary]);
        if !matches!(me.run, Run::Primary { .. }) || peer.run == Run::Stopped {
            return;
        }
        let wish = Wish { resync, ..Wish::default() };
        match decide(&me.side(), &peer.answer(), wish) {
            Decision::Start(plan) => self.begin(primary, plan, until),
            Decision::Refuse(refusal) => {
                let me = &mut self.nodes[primary];
                if refusal.is_secondary && me.run == (Run::Primary { serving: false }) {
                    me.go_alone();
                    me.run = Run::Primary { serving: true };
                }
                self.nodes[1 - primary].may_discard = refusal.kind != RefusalKind::Other;
            }
        }
    }

    /// Nothing may be lost that the primary never held, unless the secondary's operator said so.
    fn check_loss(&self, primary: usize) {
        let (me, peer) = (&self.nodes[primary].files, &self.nodes[1 - primary].files);
        let secondary = &peer.record.secondary;
        let mixture = secondary.inconsistent && !secondary.outdated;
        if peer.record.set.is_none() || mixture || secondary.discard_local {
            return;
        }
        let checkpoint = peer.checkpoint.as_ref().map(|c| &c.0);
        for disk in [Some(&peer.disk), checkpoint].into_iter().flatten() {
            for write in disk {
                assert!(me.seen.contains(write), "write {write} is lost without consent");
            }
        }
    }

    fn begin(&mut self, primary: usize, plan: Plan, until: Until) {
        self.check_loss(primary);
        self.started += 1;
        let [a, b] = &mut self.nodes;
        let (me, peer) = if primary == 0 { (a, b) } else { (b, a) };
        if plan.with_theirs {
            let theirs = peer.files.maps.as_ref().expect("it told of them").all();
            me.maps().differs.0.extend(theirs);
        }
        if until == Until::Ranges {
            return;
        }
        let hello = me.side();
        let (mine, theirs) = (&mut me.files.record, &mut peer.files.record);
        let epoch = mine.epoch.max(theirs.epoch).max(me.current).next();
        if !std::mem::replace(&mut me.has_own_line, true) {
            mine.begin_line(Generation::random(), mine.epoch);
        }
        mine.epoch = epoch;
        if until == Until::Intent {
            return;
        }
        let keep = theirs.has_checkpoint();
        theirs.set = mine.set;
        theirs.secondary.inconsistent |= theirs.secondary.outdated;
        let cur = mine.cur.expect("a line");
        theirs.follow_line(cur, hello.history_before(cur));
        theirs.epoch = theirs.epoch.max(epoch);
        if until == Until::Line {
            return;
        }
        let token = crate::random::uuid();
        theirs.session = Some(token);
        theirs.secondary.power_lost = false;
        theirs.secondary.inconsistent = !keep;
        if !keep {
            peer.files.checkpoint = None;
        }
        if until == Until::Started {
            return;
        }
        mine.primary.had_peer = true;
        mine.primary.alone = false;
        mine.session = Some(token);
        me.maps().begin_copy(plan.copy);
        me.current = epoch;
        me.run = Run::Primary { serving: true };
        self.session = Some(primary);
        let cells: Vec<_> = self.nodes[primary].maps().differs.0.iter().copied().collect();
        for (index, cell) in cells.into_iter().enumerate() {
            if until == Until::Attached || until == Until::Copied(index) {
                return self.lose_link();
            }
            let write = self.nodes[primary].files.disk[cell];
            self.nodes[1 - primary].put(cell, write);
            self.nodes[primary].maps().differs.0.remove(&cell);
            self.nodes[primary].maps().open.0.insert(cell);
        }
        let [a, b] = &self.nodes;
        assert_eq!(a.files.disk, b.files.disk, "{plan:?} leaves a difference");
        self.checkpoint(primary, until);
    }

    fn checkpoint(&mut self, primary: usize, until: Until) {
        let [a, b] = &mut self.nodes;
        let (me, peer) = if primary == 0 { (a, b) } else { (b, a) };
        let epoch = me.current;
        me.current = epoch.next();
        me.files.record.epoch = me.files.record.epoch.max(epoch.next());
        let com = Commit { cur: me.files.record.cur.expect("a line"), epoch };
        let maps = me.maps();
        let open = std::mem::replace(&mut maps.open, (Cells::new(), Since::Commit(com)));
        maps.pending = Some(open);
        if until <= Until::Cut {
            return self.lose_link();
        }
        // Both flush before either says that it has this epoch.
        (me.files.stable, peer.files.stable) = (me.files.disk, peer.files.disk);
        let record = &mut peer.files.record;
        record.com = Some(com);
        record.epoch = record.epoch.max(epoch.next());
        record.secondary.inconsistent = false;
        record.secondary.outdated = false;
        record.secondary.discard_local = false;
        peer.files.maps = None;
        peer.files.checkpoint = Some((peer.files.disk, peer.files.seen.clone()));
        if until <= Until::Committed {
            return self.lose_link();
        }
        let record = &mut me.files.record;
        record.com = Some(com);
        record.epoch = record.epoch.max(me.current.next());
        me.maps().pending = None;
    }

    /// Whatever has happened, the commands that the refusals name bring the sides together, with
    /// `winner` as the primary, if it can be one.
    fn heal(&mut self, winner: usize) {
        self.stop(0);
        self.stop(1);
        for (node, role) in [(winner, Role::Primary), (1 - winner, Role::Secondary)] {
            self.nodes[node].start(role, false);
            if self.nodes[node].run == Run::Stopped {
                self.nodes[node].start(Role::Secondary, false);
                self.nodes[node].failover();
            }
        }
        let loser = 1 - winner;
        if let Run::Primary { .. } = self.nodes[loser].run {
            self.stop(loser);
            self.nodes[loser].start(Role::Secondary, true);
        }
        if !matches!(self.nodes[winner].run, Run::Primary { .. }) {
            return;
        }
        for step in 0..3 {
            self.hello(winner, step == 2, Until::Told);
            if self.session.is_some() {
                return;
            }
            self.apply(Op::Discard(loser));
        }
        let (me, answer) = (self.nodes[winner].side(), self.nodes[loser].answer());
        let decision = decide(&me, &answer, Wish { resync: true, ..Wish::default() });
        panic!("nothing brings them together: {decision:?}");
    }
}
