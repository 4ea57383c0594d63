//! What an observer of both sides knows: checkpoints, losses, states.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::seen::Seen;
use crate::side::Process;
use crate::world::{A, B, Side, World, name};

/// Epochs that were committed, and ticks at which checkpoints were asked for.
type Asked = Arc<Mutex<Vec<(u64, u64)>>>;

/// What was seen so far.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// By epoch: the primary reported the commit after the first tick and before the second.
    commits: BTreeMap<u64, (u64, u64)>,
    asked: Asked,
    /// The tick of the last look.
    last_look: u64,
    /// The primary has a session; none: since it was started it has not had one.
    pub(crate) contact: Contact,
    /// The secondary had a checkpoint, and nothing has taken it away.
    promotable: bool,
    /// The disks that the primary's newest checkpoint does not hold yet.
    left_out: Vec<String>,
    looks: u64,
    states: [String; 2],
    /// Of lines before this one.
    checkpoints_before: u64,
}

/// What is known of a line, kept while a failover from it may be undone.
#[derive(Debug)]
pub(crate) struct Line {
    commits: BTreeMap<u64, (u64, u64)>,
    asked: Asked,
    contact: Contact,
    promotable: bool,
    checkpoints_before: u64,
}

/// What the primary has said of its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Contact {
    #[default]
    Never,
    Connected,
    /// Lost, after this tick.
    Lost(u64),
}

impl Watch {
    pub(crate) fn checkpoints(&self) -> u64 {
        self.checkpoints_before + self.commits.len() as u64
    }

    /// The other side is the primary from now on. Its line has the same checkpoints unless it began
    /// with one of them.
    pub(crate) fn roles_changed(&mut self, new_line: bool) {
        self.contact = Contact::Never;
        self.promotable = false;
        self.left_out.clear();
        if new_line {
            self.checkpoints_before += self.commits.len() as u64;
            self.commits.clear();
            self.asked = Asked::default();
        }
    }

    /// The present line, whose primary has lost its secondary.
    pub(crate) fn line(&self) -> Line {
        let contact = match self.contact {
            Contact::Connected => Contact::Lost(self.last_look),
            contact => contact,
        };
        Line {
            commits: self.commits.clone(),
            asked: Arc::clone(&self.asked),
            contact,
            promotable: self.promotable,
            checkpoints_before: self.checkpoints_before,
        }
    }

    /// A failover is undone: the line is what it was before.
    pub(crate) fn go_back(&mut self, line: Line) {
        let Line { commits, asked, contact, promotable, checkpoints_before } = line;
        self.commits = commits;
        self.asked = asked;
        self.contact = contact;
        self.promotable = promotable;
        self.checkpoints_before = checkpoints_before;
    }

    pub(crate) fn asked(&self) -> Asked {
        Arc::clone(&self.asked)
    }

    /// By command.
    pub(crate) fn checkpoint_discarded(&mut self) {
        self.promotable = false;
    }

    /// Whether the secondary must be promotable to its last checkpoint.
    pub(crate) fn is_promotable(&self) -> bool {
        self.promotable
    }

    /// Whether the newest checkpoint does without a disk that joins.
    pub(crate) fn leaves_out(&self, disk: &str) -> bool {
        self.left_out.iter().any(|name| name == disk)
    }

    /// The newest checkpoint that the primary knows to be committed.
    pub(crate) fn newest(&self) -> Option<u64> {
        self.commits.keys().next_back().copied()
    }

    /// The ticks between which the cut of an epoch was made.
    pub(crate) fn moments(&self, epoch: u64, now: u64) -> (u64, u64) {
        let before = self.commits.range(..epoch).next_back().map_or(0, |(_, (after, _))| *after);
        let asked = self.asked.lock().expect("one thread");
        let asked = asked.iter().filter(|(e, _)| *e == epoch).map(|(_, at)| *at).max();
        let until = self.commits.get(&epoch).map_or(now, |(_, until)| *until);
        (before.max(asked.unwrap_or(0)), until)
    }

    /// A process begins or has ended.
    pub(crate) fn forget(&mut self, side: Side, primary: Side) {
        if side == primary && self.contact == Contact::Connected {
            self.contact = Contact::Lost(self.last_look);
        }
    }

    /// Takes down what has happened since the last look.
    pub(crate) async fn look(
        &mut self,
        world: &World,
        processes: &[Option<Process>; 2],
        primary: Side,
    ) {
        let now = world.tick();
        for side in [A, B] {
            let Some(process) = &processes[side] else { continue };
            let Some(control) = process.control() else { continue };
            while let Some(event) = control.next_event() {
                self.take_event(world, (side, primary), &event, now);
            }
            // A state is worth a look now and then.
            if self.looks.is_multiple_of(16)
                && let Some(status) = process.status().await
            {
                self.take_status(world, side, side == primary, &status);
            }
        }
        self.looks += 1;
        self.last_look = now;
    }

    fn take_event(
        &mut self,
        world: &World,
        (side, primary): (Side, Side),
        event: &Value,
        now: u64,
    ) {
        let kind = event["event"].as_str().unwrap_or_default().to_owned();
        let epoch = event["data"]["epoch"].as_u64();
        world.count(&format!("event: {kind}"));
        let detail = ["message", "reason", "error"].iter().find_map(|m| event["data"][*m].as_str());
        world.note(|| format!("{} {kind} {epoch:?} {}", name(side), detail.unwrap_or_default()));
        match (side == primary, kind.as_str(), epoch) {
            (true, "BREP_CHECKPOINT", Some(epoch)) => {
                self.commits.insert(epoch, (self.last_look, now));
                self.promotable = true;
                let left_out = event["data"]["left-out"].as_array().into_iter().flatten();
                self.left_out = left_out.filter_map(|n| Some(n.as_str()?.to_owned())).collect();
                if !self.left_out.is_empty() {
                    world.saw(Seen::CheckpointWithout);
                }
            }
            (true, "BREP_CONNECTED", _) => self.contact = Contact::Connected,
            (true, "BREP_PEER_LOST", _) => self.contact = Contact::Lost(self.last_look),
            _ => {}
        }
    }

    fn take_status(&mut self, world: &World, side: Side, is_primary: bool, status: &Value) {
        let state = status["disks"][0]["state"].as_str().unwrap_or_default();
        let role = if is_primary { "primary" } else { "secondary" };
        let state = format!("{role} {state}");
        let before = std::mem::replace(&mut self.states[side], state.clone());
        if before != state && !before.is_empty() {
            world.count(&format!("state: {before} -> {state}"));
        }
    }
}
