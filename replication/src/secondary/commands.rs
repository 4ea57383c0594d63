use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::failover::Wanted;
use super::group::Group;
use super::hold::NOTHING_HELD;
use crate::commands::{self, Arguments, CommandResult, Service};
use crate::control::CommandError;
use crate::link::StopReason;
use crate::node::Stage;
use crate::side::{Managed, RoleCommands, peer_argument};
use crate::status::Status;
use crate::{Epoch, Error, Result};

/// The commands of the control socket, on a secondary.
pub(super) struct SecondaryCommands {
    group: Arc<Group>,
    /// Where the primary connects.
    service: Arc<Service>,
}

impl RoleCommands for SecondaryCommands {
    fn service(&self) -> &Service {
        &self.service
    }

    fn status(&self) -> Status {
        self.group.status()
    }

    fn managed(&self) -> &dyn Managed {
        &*self.group
    }

    fn drop_peer(&self) {
        if let Some(session) = self.group.session() {
            session.drop_now();
        }
    }

    fn answer(&self, command: &str, arguments: Arguments<'_>) -> Option<CommandResult<Value>> {
        Some(match command {
            "x-blockdev-change" => Err(self.group.refuse_change(arguments)),
            _ => return None,
        })
    }

    fn work(
        self: Arc<Self>,
        command: String,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'static, CommandResult<Value>> {
        Box::pin(async move { self.carry_out(&command, Arguments(&arguments)).await })
    }
}

impl SecondaryCommands {
    pub(super) fn new(group: &Arc<Group>, service: &Arc<Service>) -> Self {
        SecondaryCommands { group: Arc::clone(group), service: Arc::clone(service) }
    }

    async fn carry_out(&self, command: &str, arguments: Arguments<'_>) -> CommandResult<Value> {
        let group = &self.group;
        let done = |()| json!({});
        match command {
            "checkpoint" => Ok(self.checkpoint(arguments).await?),
            "xen-colo-do-checkpoint" => Ok(self.checkpoint(arguments).await.map(|_| json!({}))?),
            "failover" => Ok(json!(group.failover(arguments.wanted()).await?)),
            "failover-test" => Ok(json!(group.open_test(name_argument(arguments)).await?)),
            "failover-test-end" => Ok(json!(group.close_test(name_argument(arguments)).await?)),
            "failover-commit" | "failover-rollback" => Err(CommandError::refused(NOTHING_HELD)),
            "switchover" => {
                let epoch = self.switchover(arguments.checkpoint_limit()).await?;
                Ok(json!({ "epoch": epoch, "role": "promoted" }))
            }
            "block_resize" => Err(CommandError::refused(
                "a secondary's disks grow with its primary's: run brep resize there",
            )),
            "disk-add" => {
                let config = arguments.disk()?;
                let name = config.name.clone();
                let changed = group.add_disk(config).await?;
                Ok(json!({ "name": name, "changed": changed }))
            }
            "disk-remove" => {
                let name = arguments.text("name").unwrap_or_default();
                let changed = group.remove_disk(name, arguments.flag("force")).await?;
                Ok(json!({ "name": name, "changed": changed }))
            }
            "peer-set" => Ok(group
                .set_peer(Some(peer_argument(arguments, group.config.tls.is_some())?))
                .map(done)?),
            "peer-clear" => Ok(group.set_peer(None).map(done)?),
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
            "resume" => Err(Error::refused(
                "this is the secondary: it holds no writes; run brep resume on the primary",
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
                Ok(group.failover(Wanted::CHECKPOINT).await.map(|_| json!({}))?)
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

    /// Asks the primary for a switchover: it decides, and this side takes over.
    async fn switchover(&self, limit: Duration) -> Result<Epoch> {
        let group = &self.group;
        let Some(session) = group.session() else {
            return Err(Error::refused(
                "no primary is connected that could hand over to this side; if there is none any \
                 more: brep failover, here",
            ));
        };
        session.request_switchover(limit, group.config.peer_timeout).await
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

    /// `xen-set-replication`.
    async fn set_replication(&self, arguments: Arguments<'_>) -> CommandResult<()> {
        let group = &self.group;
        if arguments.flag("enable") {
            commands::check_start(arguments, false)?;
            return Ok(group.start_replication().await?);
        }
        if arguments.flag("failover") {
            if let Err(error) = group.failover(Wanted::CHECKPOINT).await {
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

fn name_argument(arguments: Arguments<'_>) -> &str {
    arguments.text("name").unwrap_or_default()
}
