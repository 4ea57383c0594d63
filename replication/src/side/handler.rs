//! Commands of the control socket: what both roles answer alike, and the way to the rest.

use std::sync::{Arc, Weak};

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::{Side, peer};
use crate::commands::{self, Arguments, COMMANDS, CommandResult, Service};
use crate::config::PeerAddress;
use crate::control::{CommandError, CommandSpec, Handler};
use crate::daemon::on_data_thread;
use crate::status::Status;

/// A side as a manager of the original knows it. Nothing here waits for a disk or a peer.
pub(crate) trait Managed {
    /// The answer to get_error: none, or its text.
    fn get_error(&self) -> Option<String>;

    /// The answer to `query-named-block-nodes`.
    fn nodes(&self, flat: bool) -> Value;

    /// The answer to `query-yank`: the connections to the peer, while there are any.
    fn yank_instances(&self) -> Value;
}

/// What carries out commands in one role.
pub(crate) trait RoleCommands: Send + Sync + 'static {
    /// The NBD server that commands start and stop.
    fn service(&self) -> &Service;

    /// The answer to `query-status`; never waits for a disk or a peer.
    fn status(&self) -> Status;

    /// The side as a manager knows it.
    fn managed(&self) -> &dyn Managed;

    /// Drops the peer, whatever is on its way.
    fn drop_peer(&self);

    /// What else can be answered at once, whatever the data path does.
    fn answer(&self, command: &str, arguments: Arguments<'_>) -> Option<CommandResult<Value>>;

    /// What is done on the thread of the disks.
    fn work(
        self: Arc<Self>,
        command: String,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'static, CommandResult<Value>>;
}

/// The commands of a side, whatever its role.
pub(super) struct SideHandler {
    /// The side ends although the control socket is still served.
    side: Weak<Side>,
    data: tokio::runtime::Handle,
}

impl SideHandler {
    /// To be called on the thread of the disks.
    pub(super) fn new(side: &Arc<Side>) -> Self {
        SideHandler { side: Arc::downgrade(side), data: tokio::runtime::Handle::current() }
    }
}

impl Handler for SideHandler {
    fn commands(&self) -> &'static [CommandSpec] {
        COMMANDS
    }

    fn execute(
        &self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'_, CommandResult<Value>> {
        let command = command.to_owned();
        Box::pin(async move {
            let ends = || CommandError::failed("this side is changing its role, or ends");
            let side = self.side.upgrade().ok_or_else(ends)?;
            let role = side.settled_role().await.ok_or_else(ends)?;
            if let Some(outcome) = answer(&side, &*role, &command, Arguments(&arguments)) {
                return outcome;
            }
            let outcome = role.answer(&command, Arguments(&arguments));
            match outcome {
                Some(outcome) => outcome,
                None => on_data_thread(&self.data, role.work(command, arguments)).await,
            }
        })
    }

    fn state(&self) -> Option<Value> {
        let side = self.side.upgrade()?;
        // A side that ends closes its disks one after the other: that is no news.
        let role = side.role().filter(|_| !side.stopping.is_cancelled())?;
        Some(json!(role.status().state()))
    }
}

/// What every role answers alike.
fn answer(
    side: &Side,
    role: &dyn RoleCommands,
    command: &str,
    arguments: Arguments<'_>,
) -> Option<CommandResult<Value>> {
    Some(match command {
        "query-status" => Ok(json!(role.status())),
        "query-xen-replication-status" => {
            let record =
                side.record.failure().map(|reason| format!("I/O error occurred: {reason}"));
            Ok(commands::replication_status(record.or_else(|| role.managed().get_error())))
        }
        "query-colo-status" => Ok(side.colo.to_value()),
        "query-block-exports" => Ok(role.service().to_value()),
        "query-named-block-nodes" => Ok(role.managed().nodes(arguments.flag("flat"))),
        "query-block-jobs" => Ok(commands::jobs_value(&role.status())),
        "query-yank" => Ok(role.managed().yank_instances()),
        "yank" => yank(role, arguments),
        "quit" => {
            commands::announce_quit(&side.events);
            side.stopping.cancel();
            Ok(json!({}))
        }
        "block-job-cancel"
        | "block-job-set-speed"
        | "block-job-pause"
        | "block-job-resume"
        | "block-job-complete"
        | "block-job-finalize"
        | "block-job-dismiss" => Err(commands::check_job(&role.status(), arguments)),
        _ => return None,
    })
}

fn yank(role: &dyn RoleCommands, arguments: Arguments<'_>) -> CommandResult<Value> {
    commands::check_yank(&role.managed().yank_instances(), arguments)?;
    if arguments.objects("instances").next().is_some() {
        role.drop_peer();
    }
    Ok(json!({}))
}

/// The address that `peer-set` was given.
pub(crate) fn peer_argument(arguments: Arguments<'_>, has_tls: bool) -> CommandResult<PeerAddress> {
    Ok(peer::parse(arguments.text("uri").unwrap_or_default(), has_tls)?)
}
