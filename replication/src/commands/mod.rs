//! The commands of the control socket that both sides have, and what they share: the table of all
//! commands and events, the NBD server that commands start and stop, and the manager's view of a
//! side (block nodes, jobs, exports, COLO).
mod arguments;
mod colo;
mod nodes;
#[cfg(test)]
mod schema;
mod service;
mod table;

pub(crate) use arguments::Arguments;
pub(crate) use colo::{Colo, ColoMode};
pub(crate) use nodes::{Job, JobKind, Node, check_job, check_yank, jobs_value, replication_status};
pub(crate) use service::{Opened, Service};
pub(crate) use table::COMMANDS;

use serde_json::json;

use crate::Error;
use crate::control::{CommandError, EventBus};

/// What a command leads to.
pub(crate) type CommandResult<T> = std::result::Result<T, CommandError>;

/// Checks `xen-set-replication` with `enable`: `primary` is what this side is.
pub(crate) fn check_start(arguments: Arguments<'_>, primary: bool) -> CommandResult<()> {
    if arguments.has("failover") {
        let text = "Parameter 'failover' is only for stopping replication";
        return Err(CommandError::usage(text));
    }
    let wanted = arguments.flag("primary");
    if wanted != primary {
        let mode = |primary: bool| u8::from(!primary);
        return Err(Error::usage(format!(
            "The parameter mode's value is invalid, needs {}, but got {}",
            mode(primary),
            mode(wanted)
        ))
        .into());
    }
    Ok(())
}

/// Tells that the process ends by command.
pub(crate) fn announce_quit(events: &EventBus) {
    events.emit("SHUTDOWN", json!({ "guest": false, "reason": "host-qmp-quit" }));
}
