//! Failovers that are held: served at once, and later made final or undone.

use serde_json::json;

use crate::acts::wants_restart;
use crate::added::Added;
use crate::history::{History, millis};
use crate::model::Model;
use crate::roles::{TakenOver, Wanted};
use crate::seen::Seen;
use crate::watch::Line;
use crate::world::{Side, name};

/// What there is no more once a side is a secondary again, or promoted for good.
const NOTHING_HELD: &str = "no failover is held here";

/// What the old primary's guest goes on with if a failover is undone.
struct Before {
    primary: Side,
    added: Added,
    model: Model,
    line: Line,
}

impl History {
    /// The secondary takes over, and somebody decides later whether that was right.
    pub(crate) async fn fail_over_held(
        &mut self,
        target: &'static str,
    ) -> Result<TakenOver, String> {
        self.world.saw(Seen::FailoverHeld);
        let (old, added, line) = (self.primary, self.added.clone(), self.watch.line());
        let wanted = Wanted { target, hold: true };
        if self.take_over(wanted, None).await? == TakenOver::Not {
            return Ok(TakenOver::Not);
        }
        let model = self.left.take().ok_or("a failover without a model of what was before")?;
        let before = Before { primary: old, added, model, line };
        let promoted = (self.promoted_to_latest, self.guest.model().first());
        self.live_held().await?;
        if self.world.with_rng(|rng| rng.chance(400)) {
            self.decide("failover-commit").await?;
            self.world.saw(Seen::FailoverCommitted);
            self.second.iter().for_each(|second| second.forget());
            return Ok(TakenOver::ForGood);
        }
        // Where it runs there is a secondary's view next, also if nobody is told that.
        self.guest.unplug();
        self.decide("failover-rollback").await?;
        self.world.saw(Seen::FailoverRolledBack);
        self.go_back(before).await;
        let is_dead = self.processes[old].as_ref().is_none_or(|p| p.has_ended(&self.world));
        if is_dead && self.world.with_rng(|rng| rng.chance(500)) {
            // Nobody has written to it meanwhile.
            if self.take_over(Wanted { target, hold: false }, None).await? == TakenOver::Not {
                return Err("I3: a failover was undone, and the checkpoint is lost".to_owned());
            }
            let again = (self.promoted_to_latest, self.guest.model().first());
            // What is left of a guest that ran here is looked at above, and a loss of power takes from it.
            if self.second.is_none() && again.0 == promoted.0 && again.1 != promoted.1 {
                return Err("I3: after a rollback it is promoted to something else".to_owned());
            }
            self.world.saw(Seen::PromotedAgain);
            return Ok(TakenOver::ForGood);
        }
        Ok(TakenOver::Undone)
    }

    /// The promoted disk is used for a while, and its process may end.
    async fn live_held(&mut self) -> Result<(), String> {
        let ends = self.world.with_rng(|rng| rng.below(3));
        for _ in 0..ends {
            self.world.saw(Seen::EndHeld);
            self.arm(self.primary, self.end_of_promoted(), &[10, 100, 400]);
            let pause = self.world.with_rng(|rng| rng.range(1, 150));
            self.pass(millis(pause)).await?;
            self.restart_if_ended(self.primary).await;
        }
        let pause = self.world.with_rng(|rng| rng.range(1, 100));
        self.pass(millis(pause)).await?;
        // It may end in the decision too.
        if self.world.with_rng(|rng| rng.chance(700)) {
            self.repair(self.primary);
        }
        Ok(())
    }

    /// The failover is made final, or undone.
    async fn decide(&mut self, command: &str) -> Result<(), String> {
        let side = self.primary;
        let arguments = match command {
            "failover-rollback" => vec![("discard-local", json!(true))],
            _ => Vec::new(),
        };
        for _ in 0..40 {
            match self.tell(side, command, &arguments).await {
                Some(Ok(_)) => return Ok(()),
                // It was done by a process that has ended before it could say so.
                Some(Err(why)) if why.contains(NOTHING_HELD) => return Ok(()),
                Some(Err(why)) if wants_restart(&why) => {
                    self.world.count("advice: restart");
                    self.world.kill(side);
                }
                _ => {}
            }
            self.pass(millis(250)).await?;
            self.repair(side);
            self.restart_if_ended(side).await;
        }
        Err(format!("liveness: {command} is not possible although nothing is wrong"))
    }

    /// The old primary is the primary again, and what it had is as it was.
    async fn go_back(&mut self, before: Before) {
        let Before { primary, added, model, line } = before;
        // What the other side has told as the primary.
        self.watch.look(&self.world, &self.processes, self.primary).await;
        self.second_guest_returns(self.primary);
        self.primary = primary;
        self.merging = false;
        self.world.note(|| format!("{} is the primary again", name(primary)));
        self.watch.go_back(line);
        self.guest.replace(self.guest_endpoint(primary), model);
        let given = std::mem::replace(&mut self.added, added).given;
        self.added.given = given;
        self.added.since = None;
        let Added { disk, is_there, .. } = self.added;
        if !is_there {
            self.guest.leave_disk(disk);
        }
    }
}
