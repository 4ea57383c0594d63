use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};

use super::group::Group;
use super::session::CheckpointRequest;
use crate::control::{CommandError, CommandSpec, Handler};
use crate::daemon::{self, on_data_thread};
use crate::{Error, Result};

/// Commands of the control socket.
pub(super) struct PrimaryHandler {
    pub(super) group: Arc<Group>,
    pub(super) data: tokio::runtime::Handle,
    pub(super) requests: mpsc::Sender<CheckpointRequest>,
}

impl Handler for PrimaryHandler {
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

impl PrimaryHandler {
    async fn command(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value> {
        match command {
            "query-status" => Ok(json!(self.group.status())),
            "checkpoint" => {
                let wait_cut = arguments.get("wait").and_then(Value::as_str) == Some("cut");
                let limit = daemon::checkpoint_limit(arguments);
                let requests = self.requests.clone();
                on_data_thread(&self.data, checkpoint(requests, wait_cut, limit)).await
            }
            "failover" => Err(Error::refused(
                "this is the primary: it is the disk already; run brep failover on the secondary",
            )),
            "resync" => {
                if arguments.get("full").and_then(Value::as_bool) != Some(true) {
                    return Err(Error::usage("only a full resync is possible: brep resync --full"));
                }
                let group = Arc::clone(&self.group);
                on_data_thread(&self.data, async move { resync(&group) }).await
            }
            "replication-start" => {
                self.group.start_replication()?;
                Ok(json!({}))
            }
            "replication-stop" | "quit" => {
                self.group.stopping.cancel();
                Ok(json!({}))
            }
            other => Err(Error::usage(format!("unknown command {other}"))),
        }
    }
}

async fn checkpoint(
    requests: mpsc::Sender<CheckpointRequest>,
    wait_cut: bool,
    limit: Duration,
) -> Result<Value> {
    let (answer, wait) = oneshot::channel();
    requests
        .try_send(CheckpointRequest { wait_cut, answer })
        .map_err(|_| Error::refused("too many checkpoints are waiting already"))?;
    match tokio::time::timeout(limit, wait).await {
        Ok(Ok(result)) => result.map(|epoch| json!({ "epoch": epoch })),
        Ok(Err(_)) => Err(Error::failed("the secondary was lost before the checkpoint was taken")),
        Err(_) => Err(Error::failed(format!("no checkpoint within {limit:?}"))),
    }
}

/// Copies everything again: now, if the secondary is connected, else when it is.
fn resync(group: &Arc<Group>) -> Result<Value> {
    if group.config.peer.is_none() {
        return Err(Error::refused("no --peer was given: there is nothing to copy to"));
    }
    if let Some(refusal) = &group.core().refusal
        && refusal.superseded
    {
        return Err(Error::refused(refusal.reason.clone()));
    }
    if group.is_attached() {
        return Err(Error::refused(
            "the secondary is connected and gets every write; a copy would change nothing",
        ));
    }
    group.core().wish.resync = true;
    group.wake.notify_one();
    Ok(json!({}))
}
