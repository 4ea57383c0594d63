//! What an observer of both sides knows: checkpoints, losses, states.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::Value;

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
    looks: u64,
    states: [String; 2],
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
        self.commits.len() as u64
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
    pub(crate) fn forget(&mut self, side: Side) {
        if side == A && self.contact == Contact::Connected {
            self.contact = Contact::Lost(self.last_look);
        }
    }

    /// Takes down what has happened since the last look.
    pub(crate) async fn look(&mut self, world: &World, processes: &mut [Option<Process>; 2]) {
        let now = world.tick();
        for side in [A, B] {
            let Some(process) = &processes[side] else { continue };
            let Some(control) = process.control() else { continue };
            while let Some(event) = control.next_event() {
                self.take_event(world, side, &event, now);
            }
            // A state is worth a look now and then.
            if self.looks.is_multiple_of(16)
                && let Some(status) = process.status().await
            {
                self.take_status(world, side, &status);
            }
        }
        self.looks += 1;
        self.last_look = now;
    }

    fn take_event(&mut self, world: &World, side: Side, event: &Value, now: u64) {
        let kind = event["event"].as_str().unwrap_or_default().to_owned();
        let epoch = event["data"]["epoch"].as_u64();
        world.count(&format!("event: {} {kind}", name(side)));
        let detail = ["message", "reason", "error"].iter().find_map(|m| event["data"][*m].as_str());
        world.note(|| format!("{} {kind} {epoch:?} {}", name(side), detail.unwrap_or_default()));
        match (side, kind.as_str(), epoch) {
            (A, "BREP_CHECKPOINT", Some(epoch)) => {
                self.commits.insert(epoch, (self.last_look, now));
                self.promotable = true;
            }
            (A, "BREP_CONNECTED", _) => self.contact = Contact::Connected,
            (A, "BREP_PEER_LOST", _) => self.contact = Contact::Lost(self.last_look),
            _ => {}
        }
    }

    fn take_status(&mut self, world: &World, side: Side, status: &Value) {
        let state = status["disks"][0]["state"].as_str().unwrap_or_default();
        let state = format!("{} {state} {}", name(side), status["link"].as_str().unwrap_or("?"));
        if self.states[side] != state {
            world.count(&format!("state: {state}"));
            self.states[side] = state;
        }
    }
}
