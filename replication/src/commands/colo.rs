use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use super::CommandResult;
use crate::control::{CommandError, EventBus};

/// What a side is to a COLO manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum ColoMode {
    #[default]
    None,
    Primary,
    Secondary,
}

impl ColoMode {
    fn as_str(self) -> &'static str {
        match self {
            ColoMode::None => "none",
            ColoMode::Primary => "primary",
            ColoMode::Secondary => "secondary",
        }
    }
}

/// How far the manager's failover has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Failover {
    #[default]
    None,
    Active,
    Completed,
    Failed,
}

/// The manager's view of a pair: a side is in COLO mode from its first session to the failover.
#[derive(Debug, Default)]
pub(crate) struct Colo(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    mode: ColoMode,
    last: ColoMode,
    failover: Failover,
    /// `COLO_EXIT` has been sent since the last session began.
    told: bool,
}

impl Colo {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins, or a side starts that has been in one.
    pub(crate) fn enter(&self, mode: ColoMode) {
        let mut state = self.state();
        *state = State { mode, last: state.last, ..State::default() };
    }

    /// The other side is lost without a command. The mode stays: the manager decides.
    pub(crate) fn broken(&self, events: &EventBus) {
        let mut state = self.state();
        if state.mode != ColoMode::None && !std::mem::replace(&mut state.told, true) {
            tell(events, state.mode, "error");
        }
    }

    /// Whether a failover may begin.
    pub(crate) fn check(&self) -> CommandResult<()> {
        match self.state().mode {
            ColoMode::None => Err(CommandError::refused("The feature 'colo' is not enabled")),
            _ => Ok(()),
        }
    }

    pub(crate) fn begin_failover(&self) {
        self.state().failover = Failover::Active;
    }

    /// A failover has ended; with success this side is in COLO mode no more.
    pub(crate) fn end_failover(&self, success: bool, events: &EventBus) {
        let mut state = self.state();
        if !success {
            state.failover = Failover::Failed;
            return;
        }
        state.failover = Failover::Completed;
        if state.mode != ColoMode::None {
            state.last = std::mem::take(&mut state.mode);
            if !std::mem::replace(&mut state.told, true) {
                tell(events, state.last, "request");
            }
        }
    }

    /// The answer to `query-colo-status`.
    pub(crate) fn to_value(&self) -> Value {
        let state = self.state();
        let reason = match state.failover {
            Failover::None => "none",
            Failover::Active => "processing",
            Failover::Completed => "request",
            Failover::Failed => "error",
        };
        json!({
            "mode": state.mode.as_str(),
            "last-mode": state.last.as_str(),
            "reason": reason,
        })
    }
}

fn tell(events: &EventBus, mode: ColoMode, reason: &str) {
    events.emit("COLO_EXIT", json!({ "mode": mode.as_str(), "reason": reason }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failover_is_possible_once_after_a_session_and_is_told_once() {
        let (colo, events) = (Colo::default(), EventBus::new());
        let mut told = events.listen();
        assert_eq!(colo.check().unwrap_err().desc, "The feature 'colo' is not enabled");
        colo.enter(ColoMode::Primary);
        colo.broken(&events);
        colo.broken(&events);
        assert_eq!(told.next().unwrap()["data"]["reason"], "error");
        colo.check().unwrap();
        colo.begin_failover();
        assert_eq!(colo.to_value()["reason"], "processing");
        colo.end_failover(true, &events);
        assert!(told.next().is_none(), "it was told already");
        let ended = json!({ "mode": "none", "last-mode": "primary", "reason": "request" });
        assert_eq!(colo.to_value(), ended);
        colo.check().unwrap_err();

        colo.enter(ColoMode::Secondary);
        colo.begin_failover();
        colo.end_failover(false, &events);
        assert_eq!(colo.to_value()["reason"], "error");
        colo.end_failover(true, &events);
        let event = told.next().unwrap();
        assert_eq!(event["data"], json!({ "mode": "secondary", "reason": "request" }));
    }
}
