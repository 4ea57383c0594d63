use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};

use super::group::Group;
use super::session::CheckpointRequest;
use crate::commands::{self, Arguments, COMMANDS, CommandResult, Service};
use crate::config::ResyncLimits;
use crate::control::{CommandError, CommandSpec, Handler};
use crate::daemon::on_data_thread;
use crate::node::Stage;
use crate::status::LinkState;
use crate::{Error, Result};

/// The name by which a quorum knows the child that forwards.
const PEER_CHILD: &str = "children.1";

/// Commands of the control socket.
pub(super) struct PrimaryHandler {
    pub(super) group: Arc<Group>,
    pub(super) data: tokio::runtime::Handle,
    pub(super) requests: mpsc::Sender<CheckpointRequest>,
    pub(super) service: Arc<Service>,
    /// The disks whose forwarding child was removed.
    pub(super) detached: Arc<Mutex<Vec<usize>>>,
}

impl Handler for PrimaryHandler {
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
            match self.answer(&command, Arguments(&arguments)) {
                Some(outcome) => outcome,
                None => self.work(command, arguments).await,
            }
        })
    }
}

impl PrimaryHandler {
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
            "failover" => Err(Error::refused(
                "this is the primary: it is the disk already; run brep failover on the secondary",
            )
            .into()),
            "replication-stop" => {
                group.stopping.cancel();
                Ok(json!({}))
            }
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

    /// What is done on the thread of the disks.
    async fn work(&self, command: String, arguments: Map<String, Value>) -> CommandResult<Value> {
        let side = Side {
            group: Arc::clone(&self.group),
            requests: self.requests.clone(),
            service: Arc::clone(&self.service),
            detached: Arc::clone(&self.detached),
        };
        let work = async move { side.work(&command, Arguments(&arguments)).await };
        on_data_thread(&self.data, work).await
    }
}

/// What a command works on.
struct Side {
    group: Arc<Group>,
    requests: mpsc::Sender<CheckpointRequest>,
    service: Arc<Service>,
    detached: Arc<Mutex<Vec<usize>>>,
}

impl Side {
    async fn work(&self, command: &str, arguments: Arguments<'_>) -> CommandResult<Value> {
        let group = &self.group;
        let done = |()| json!({});
        match command {
            "checkpoint" => {
                let wait_cut = arguments.text("wait") == Some("cut");
                self.checkpoint(wait_cut, arguments.checkpoint_limit()).await
            }
            "xen-colo-do-checkpoint" => {
                self.checkpoint(false, arguments.checkpoint_limit()).await.map(|_| json!({}))
            }
            "resync" => Ok(resync(group, arguments)?),
            "replication-start" => Ok(group.start_replication().map(done)?),
            "xen-set-replication" => self.set_replication(arguments).await.map(done),
            "x-colo-lost-heartbeat" => self.lost_heartbeat().await.map(done),
            "x-blockdev-change" => self.change_child(arguments).await.map(done),
            "stop" => Ok(group.guest.stop(group.idle(), &group.events).await.map(done)?),
            "cont" => {
                group.guest.cont(&group.events).await;
                Ok(json!({}))
            }
            _ => {
                let disks: Vec<_> = group.disks().iter().map(|d| d.name.as_str()).collect();
                self.service.command(command, &disks, arguments).await.map(done)
            }
        }
    }

    async fn checkpoint(&self, wait_cut: bool, limit: Duration) -> CommandResult<Value> {
        let (answer, wait) = oneshot::channel();
        self.requests
            .try_send(CheckpointRequest { wait_cut, answer })
            .map_err(|_| Error::refused("too many checkpoints are waiting already"))?;
        match tokio::time::timeout(limit, wait).await {
            Ok(Ok(result)) => Ok(json!({ "epoch": result? })),
            Ok(Err(_)) => {
                Err(CommandError::failed("the secondary was lost before the checkpoint was taken"))
            }
            Err(_) => Err(CommandError::failed(format!("no checkpoint within {limit:?}"))),
        }
    }

    /// `xen-set-replication`: what it stops goes on alone; nothing is lost by that.
    async fn set_replication(&self, arguments: Arguments<'_>) -> CommandResult<()> {
        if arguments.flag("enable") {
            commands::check_start(arguments, true)?;
            return Ok(self.group.start_replication()?);
        }
        let stopped = match self.group.stage() {
            Stage::Done => Ok(()),
            _ => self.group.stop_replication().await,
        };
        match stopped {
            Err(error) if arguments.flag("failover") => {
                tracing::warn!(%error, "replication was not stopped");
                Ok(())
            }
            stopped => Ok(stopped?),
        }
    }

    /// `x-colo-lost-heartbeat`: the guest goes on alone.
    async fn lost_heartbeat(&self) -> CommandResult<()> {
        let group = &self.group;
        group.colo.check()?;
        group.colo.begin_failover();
        let stopped = match group.stage() {
            // The forwarding child was removed before, as the original's manager does.
            Stage::None | Stage::Done => Ok(()),
            _ => group.stop_replication().await,
        };
        group.colo.end_failover(stopped.is_ok(), &group.events);
        Ok(stopped?)
    }

    /// `x-blockdev-change`: replication runs while every disk has its forwarding child.
    async fn change_child(&self, arguments: Arguments<'_>) -> CommandResult<()> {
        let parent = arguments.text("parent").unwrap_or_default();
        let disk = self.group.disks().iter().position(|d| d.name == parent).ok_or_else(|| {
            CommandError::refused(format!("Cannot find device='{parent}' nor node-name='{parent}'"))
        })?;
        match (arguments.text("child"), arguments.text("node")) {
            (Some(_), Some(_)) => {
                Err(CommandError::usage("The parameters child and node are in conflict"))
            }
            (None, None) => Err(CommandError::usage("Either child or node must be specified")),
            (Some("children.0"), None) => Err(CommandError::refused(
                "The number of children cannot be lower than the vote threshold 1: children.0 is \
                 the disk itself",
            )),
            (Some(child), None) => self.remove_child(disk, parent, child).await,
            (None, Some(node)) => self.add_child(disk, parent, node),
        }
    }

    async fn remove_child(&self, disk: usize, parent: &str, child: &str) -> CommandResult<()> {
        let group = &self.group;
        let is_there =
            child == PEER_CHILD && group.config.peer.is_some() && !self.detached().contains(&disk);
        if !is_there {
            let text = format!("Node '{parent}' does not have child '{child}'");
            return Err(CommandError::refused(text));
        }
        self.detached().push(disk);
        // Its disks are replicated together or not at all.
        match group.stage() {
            Stage::Running => Ok(group.stop_replication().await?),
            _ => Ok(()),
        }
    }

    fn add_child(&self, disk: usize, parent: &str, node: &str) -> CommandResult<()> {
        let peer = peer_node(parent);
        if node != peer || self.group.config.peer.is_none() {
            return Err(CommandError::refused(format!("Node '{node}' not found")));
        }
        let mut detached = self.detached();
        let Some(index) = detached.iter().position(|d| *d == disk) else {
            let text = format!("The node {node} already has a parent");
            return Err(CommandError::refused(text));
        };
        detached.remove(index);
        if detached.is_empty() && self.group.stage() == Stage::Done {
            self.group.start_replication()?;
        }
        Ok(())
    }

    fn detached(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.detached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of the node that forwards a disk's writes.
pub(super) fn peer_node(disk: &str) -> String {
    format!("{disk}-peer")
}

/// Changes the limits of the copy, and copies everything again if that was asked for: now, if the
/// secondary is connected, else when it is.
fn resync(group: &Arc<Group>, arguments: Arguments<'_>) -> Result<Value> {
    if arguments.flag("discard-local") {
        return Err(Error::refused(
            "this is a primary. To give its writes up: stop it, and start it with brep secondary \
             --discard-local and the same disks and state directory",
        ));
    }
    let limits = changed_limits(group.resync_limits(), arguments)?;
    let (full, compare) = (arguments.flag("full"), arguments.flag("compare"));
    if limits.is_none() && !full && !compare {
        return Err(Error::usage(
            "what the secondary lacks is copied by itself; to copy everything: brep resync --full, \
             or --compare for what differs; to change how fast a copy goes: --rate, \
             --latency-factor",
        ));
    }
    if full || compare {
        request_copy(group, compare)?;
    }
    if let Some(limits) = limits {
        group.set_resync_limits(limits);
    }
    Ok(json!({}))
}

/// The limits with what a command changes of them; none if it changes nothing.
fn changed_limits(old: ResyncLimits, arguments: Arguments<'_>) -> Result<Option<ResyncLimits>> {
    let mut limits = old;
    if let Some(rate) = arguments.number("rate") {
        let rate = u64::try_from(rate)
            .map_err(|_| Error::usage("rate: bytes a second, or 0 for no limit"))?;
        limits.rate = Some(rate).filter(|rate| *rate > 0);
    }
    if let Some(factor) = arguments.real("latency-factor") {
        if factor != 0.0 && !(1.0..=1000.0).contains(&factor) {
            return Err(Error::usage("latency-factor: from 1 to 1000, or 0 for none"));
        }
        limits.latency_factor = Some(factor).filter(|factor| *factor > 0.0);
    }
    let is_given = arguments.has("rate") || arguments.has("latency-factor");
    Ok(is_given.then_some(limits))
}

fn request_copy(group: &Group, compare: bool) -> Result<()> {
    if group.config.peer.is_none() {
        return Err(Error::refused("no --peer was given: there is nothing to copy to"));
    }
    let mut core = group.core();
    if let Some(refusal) = &core.refusal
        && refusal.superseded
    {
        return Err(Error::refused(refusal.reason.clone()));
    }
    if core.copying {
        return Err(Error::refused("a copy runs already; brep status shows how far it is"));
    }
    match core.link {
        LinkState::Connected => core.again = Some(compare),
        _ => (core.wish.resync, core.wish.compare) = (true, compare),
    }
    drop(core);
    group.wake.notify_one();
    Ok(())
}
