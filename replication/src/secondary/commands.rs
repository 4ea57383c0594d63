use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::group::Group;
use crate::control::{CommandError, CommandSpec, Handler};
use crate::daemon::{self, on_data_thread};
use crate::state::Target;
use crate::{Error, Result};

/// Commands of the control socket.
pub(super) struct SecondaryHandler {
    pub(super) group: Arc<Group>,
    pub(super) data: tokio::runtime::Handle,
}

impl Handler for SecondaryHandler {
    fn commands(&self) -> &'static [CommandSpec] {
        daemon::COMMANDS
    }

    fn execute(
        &self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'_, std::result::Result<Value, CommandError>> {
        let command = command.to_owned();
        Box::pin(async move { Ok(self.command(&command, &arguments).await?) })
    }
}

impl SecondaryHandler {
    async fn command(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value> {
        let group = Arc::clone(&self.group);
        let text = |name: &str| arguments.get(name).and_then(Value::as_str).map(str::to_owned);
        let flag = |name: &str| arguments.get(name).and_then(Value::as_bool).unwrap_or(false);
        match command {
            "query-status" => Ok(json!(group.status())),
            "checkpoint" => {
                let limit = daemon::checkpoint_limit(arguments);
                on_data_thread(&self.data, async move { checkpoint(&group, limit).await }).await
            }
            "failover" => {
                let target = match text("to").as_deref() {
                    Some("latest") => Target::Latest,
                    _ => Target::Checkpoint,
                };
                on_data_thread(&self.data, async move {
                    group.failover(target).await.map(|report| json!(report))
                })
                .await
            }
            "replication-start" => {
                on_data_thread(&self.data, async move {
                    group.start_replication().await?;
                    Ok(json!({}))
                })
                .await
            }
            "replication-stop" => {
                let discard = flag("discard-checkpoint");
                on_data_thread(&self.data, async move {
                    group.stop(discard).await?;
                    group.stopping.cancel();
                    Ok(json!({}))
                })
                .await
            }
            "resync" => Err(Error::refused(
                "this is the secondary; a resync copies from the primary: run `brep resync \
                 --full` there",
            )),
            "quit" => {
                group.stopping.cancel();
                Ok(json!({}))
            }
            other => Err(Error::usage(format!("unknown command {other}"))),
        }
    }
}

async fn checkpoint(group: &Arc<Group>, limit: Duration) -> Result<Value> {
    if group.plain.is_some() {
        return group.checkpoint_plain().await.map(|epoch| json!({ "epoch": epoch }));
    }
    let Some(session) = group.session() else {
        return Err(Error::refused(
            "no primary is connected; a checkpoint is taken by both sides together",
        ));
    };
    let epoch = session.request_checkpoint(limit).await?;
    Ok(json!({ "epoch": epoch }))
}
