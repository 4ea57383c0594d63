use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::failover::Report;
use super::group::Group;
use crate::commands::{self, Arguments, COMMANDS, CommandResult, Service};
use crate::control::{CommandError, CommandSpec, Handler};
use crate::daemon::on_data_thread;
use crate::link::StopReason;
use crate::node::Stage;
use crate::state::Target;
use crate::{Error, Result};

/// Commands of the control socket.
pub(super) struct SecondaryHandler {
    pub(super) group: Arc<Group>,
    pub(super) data: tokio::runtime::Handle,
    /// Where the primary connects.
    pub(super) service: Arc<Service>,
}

impl Handler for SecondaryHandler {
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
            if let Some(outcome) = self.answer(&command, Arguments(&arguments)) {
                return outcome;
            }
            let side = Side { group: Arc::clone(&self.group), service: Arc::clone(&self.service) };
            let work = async move { side.work(&command, Arguments(&arguments)).await };
            on_data_thread(&self.data, work).await
        })
    }
}

impl SecondaryHandler {
    /// What can be answered at once, whatever the data path does.
    fn answer(&self, command: &str, arguments: Arguments<'_>) -> Option<CommandResult<Value>> {
        let group = &self.group;
        Some(match command {
            "query-status" => Ok(json!(group.status())),
            "query-xen-replication-status" => Ok(commands::replication_status(group.get_error())),
            "query-colo-status" => Ok(group.colo.to_value()),
            "query-block-exports" => Ok(self.service.to_value()),
            "query-named-block-nodes" => Ok(group.nodes(arguments.flag("flat"))),
            "query-block-jobs" => Ok(commands::jobs_value(&group.status())),
            "query-yank" => Ok(group.yank_instances()),
            "yank" => group.yank(arguments).map(|()| json!({})),
            "x-blockdev-change" => Err(group.refuse_change(arguments)),
            "quit" => {
                commands::announce_quit(&group.events);
                group.stopping.cancel();
                Ok(json!({}))
            }
            "block-job-cancel"
            | "block-job-set-speed"
            | "block-job-pause"
            | "block-job-resume"
            | "block-job-complete"
            | "block-job-finalize"
            | "block-job-dismiss" => Err(commands::check_job(&group.status(), arguments)),
            _ => return None,
        })
    }
}

/// What a command works on, on the thread of the disks.
struct Side {
    group: Arc<Group>,
    service: Arc<Service>,
}

impl Side {
    async fn work(&self, command: &str, arguments: Arguments<'_>) -> CommandResult<Value> {
        let group = &self.group;
        let done = |()| json!({});
        match command {
            "checkpoint" => Ok(self.checkpoint(arguments).await?),
            "xen-colo-do-checkpoint" => Ok(self.checkpoint(arguments).await.map(|_| json!({}))?),
            "failover" => {
                let target = match arguments.text("to") {
                    Some("latest") => Target::Latest,
                    _ => Target::Checkpoint,
                };
                Ok(json!(self.failover(target).await?))
            }
            "resync" if arguments.flag("discard-local") => {
                let transition = group.transition.lock().await;
                let discard = group.discard_local(arguments.flag("dry-run"))?;
                drop(transition);
                Ok(json!(discard))
            }
            "resync" => Err(Error::refused(
                "this is the secondary; a resync copies from the primary: run `brep resync \
                 --full` there",
            )
            .into()),
            "replication-start" => Ok(group.start_replication().await.map(done)?),
            "replication-stop" => {
                group.stop(arguments.flag("discard-checkpoint")).await?;
                group.stopping.cancel();
                Ok(json!({}))
            }
            "xen-set-replication" => self.set_replication(arguments).await.map(done),
            "x-colo-lost-heartbeat" => {
                group.colo.check()?;
                Ok(self.failover(Target::Checkpoint).await.map(|_| json!({}))?)
            }
            "stop" => {
                Ok(group.guest.stop(std::future::ready(()), &group.events).await.map(done)?)
            }
            "cont" => {
                group.guest.cont(&group.events).await;
                Ok(json!({}))
            }
            _ => {
                if command == "nbd-server-stop" && group.plain.is_none() {
                    // By command, not by an accident of the connection: the manager knows.
                    group.end_session(StopReason::Stopped).await?;
                }
                let disks = group.disk_names();
                self.service.command(command, &disks, arguments).await.map(done)
            }
        }
    }

    async fn checkpoint(&self, arguments: Arguments<'_>) -> Result<Value> {
        let group = &self.group;
        if group.plain.is_some() {
            return group.checkpoint_plain().await.map(|epoch| json!({ "epoch": epoch }));
        }
        let Some(session) = group.session() else {
            return Err(Error::refused(
                "no primary is connected; a checkpoint is taken by both sides together",
            ));
        };
        let epoch = session.request_checkpoint(arguments.checkpoint_limit()).await?;
        Ok(json!({ "epoch": epoch }))
    }

    /// Makes this side the disk. Where guests have no address of their own, they are served where
    /// the primary was: also if that door was closed before the failover.
    async fn failover(&self, target: Target) -> Result<Report> {
        let report = self.group.failover(target).await?;
        if self.group.serves_guests_here() {
            let disks = self.group.disk_names();
            if let Err(error) = self.service.serve(&self.group.config.listen, &disks).await {
                let reason = format!("promoted, but guests are not served: {error}");
                tracing::error!("{reason}");
                self.group.core().reason = Some(reason);
            }
        }
        Ok(report)
    }

    /// `xen-set-replication`.
    async fn set_replication(&self, arguments: Arguments<'_>) -> CommandResult<()> {
        let group = &self.group;
        if arguments.flag("enable") {
            if group.is_promoted() && arguments.flag("primary") && !arguments.has("failover") {
                // It is the primary already, as one of the original is after its failover.
                return Ok(());
            }
            commands::check_start(arguments, false)?;
            return Ok(group.start_replication().await?);
        }
        if arguments.flag("failover") {
            if let Err(error) = self.failover(Target::Checkpoint).await {
                tracing::error!(%error, "no failover");
            }
            return Ok(());
        }
        match group.stage() {
            Stage::None => Err(CommandError::refused("Block replication is not running")),
            Stage::Running => Ok(group.stop(true).await?),
            // The original ignores it then.
            _ => Ok(()),
        }
    }
}
