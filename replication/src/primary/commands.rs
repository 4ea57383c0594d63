use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::group::{Group, Loss, no_peer};
use super::session::RequestKind;
use crate::commands::{self, Arguments, CommandResult, Service};
use crate::config::{DiskConfig, PeerKind, ResyncLimits};
use crate::control::CommandError;
use crate::node::Stage;
use crate::side::{Managed, RoleCommands, peer_argument};
use crate::status::{LinkState, Status};
use crate::{Error, Result, secondary};

/// The name by which a quorum knows the child that forwards.
const PEER_CHILD: &str = "children.1";

/// The commands of the control socket, on a primary.
pub(super) struct PrimaryCommands {
    group: Arc<Group>,
    service: Arc<Service>,
    /// The numbers of the disks whose forwarding child was removed.
    detached: Mutex<Vec<usize>>,
}

impl RoleCommands for PrimaryCommands {
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
        self.group.drop_peer(Loss::by_command("dropped by command (yank)"));
    }

    fn answer(&self, command: &str, _: Arguments<'_>) -> Option<CommandResult<Value>> {
        match command {
            "replication-stop" => {
                self.group.stopping.cancel();
                Some(Ok(json!({})))
            }
            _ => None,
        }
    }

    fn work(
        self: Arc<Self>,
        command: String,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'static, CommandResult<Value>> {
        Box::pin(async move { self.carry_out(&command, Arguments(&arguments)).await })
    }
}

impl PrimaryCommands {
    pub(super) fn new(group: &Arc<Group>, service: &Arc<Service>) -> Self {
        let (group, service) = (Arc::clone(group), Arc::clone(service));
        PrimaryCommands { group, service, detached: Mutex::default() }
    }

    async fn carry_out(&self, command: &str, arguments: Arguments<'_>) -> CommandResult<Value> {
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
            "failover" => {
                group.check_is_disk().await?;
                let last = group.promoted.as_ref().and_then(|s| s.last_contact_ms());
                let report = secondary::repeated(&group.record(), arguments.wanted(), last);
                Ok(json!(report.unwrap_or_else(|| {
                    Err(Error::refused(
                        "this is the primary: it is the disk already; run brep failover on the \
                         secondary",
                    ))
                })?))
            }
            "failover-test" | "failover-test-end" => Err(CommandError::refused(
                "this is the primary; a test view is opened on the secondary",
            )),
            "failover-commit" => Ok(match self.promoted()?.commit_failover().await? {
                Some(warning) => json!({ "warning": warning }),
                None => json!({}),
            }),
            "failover-rollback" => {
                let (discard, dry_run) =
                    (arguments.flag("discard-local"), arguments.flag("dry-run"));
                Ok(json!(self.promoted()?.roll_back(discard, dry_run).await?))
            }
            "resync" => Ok(resync(group, arguments)?),
            "switchover" => {
                let epoch = group.switchover(arguments.checkpoint_limit()).await?;
                Ok(json!({ "epoch": epoch, "role": "secondary" }))
            }
            "block_resize" => {
                let disk = arguments.text("device").or(arguments.text("node-name"));
                let size = arguments.number("size").and_then(|size| u64::try_from(size).ok());
                let size = size.ok_or_else(|| CommandError::usage("size: a number of bytes"))?;
                Ok(group.resize(disk.unwrap_or_default(), size).await.map(done)?)
            }
            "disk-add" => self.add_disk(arguments.disk()?).await,
            "disk-remove" => {
                let name = arguments.text("name").unwrap_or_default();
                self.remove_disk(name, arguments.flag("force")).await
            }
            "peer-set" => Ok(group
                .change_peer(peer_argument(arguments, group.config.tls.is_some())?)
                .map(done)?),
            "peer-clear" => Ok(group.forget_peer().await.map(done)?),
            "resume" => match arguments.flag("lonely") {
                true => Ok(group.resume_lonely().map(done)?),
                false => Err(CommandError::usage(
                    "writes go on by themselves when the secondary is back; to go on without it: \
                     brep resume --lonely",
                )),
            },
            "replication-start" => Ok(group.start_replication().map(done)?),
            "xen-set-replication" => self.set_replication(arguments).await.map(done),
            "x-colo-lost-heartbeat" => self.lost_heartbeat().await.map(done),
            "x-blockdev-change" => self.change_child(arguments).await.map(done),
            "stop" => Ok(group.guest.stop(group.idle(), &group.events).await.map(done)?),
            "cont" => {
                group.guest.cont(&group.events).await;
                Ok(json!({}))
            }
            _ => self.service.command(command, &group.disk_names(), arguments).await.map(done),
        }
    }

    /// `disk-add`.
    async fn add_disk(&self, config: DiskConfig) -> CommandResult<Value> {
        let name = config.name.clone();
        let changed = self.group.add_disk(config).await?;
        if changed {
            self.service.add_disk(&name).await;
        }
        Ok(json!({ "name": name, "changed": changed }))
    }

    /// `disk-remove`: its guest first.
    async fn remove_disk(&self, name: &str, force: bool) -> CommandResult<Value> {
        if self.group.removable_disk(name)?.is_none() {
            return Ok(json!({ "name": name, "changed": false }));
        }
        let export = self.service.remove_disk(name, force).await;
        let export = export.map_err(|error| CommandError {
            desc: match force {
                false => format!("{}; to cut its clients off: --force", error.desc),
                true => error.desc,
            },
            ..error
        })?;
        let removed = self.group.remove_disk(name).await;
        if removed.is_err()
            && self.group.disk_names().iter().any(|disk| disk == name)
            && let Some(export) = export
        {
            self.service.put_back(name, export).await;
        }
        Ok(json!({ "name": name, "changed": removed? }))
    }

    /// What is left of the secondary that was promoted.
    fn promoted(&self) -> Result<&Arc<secondary::Group>> {
        self.group.promoted.as_ref().ok_or_else(|| Error::refused(secondary::NOTHING_HELD))
    }

    async fn checkpoint(&self, wait_cut: bool, limit: Duration) -> CommandResult<Value> {
        let kind = if wait_cut { RequestKind::Cut } else { RequestKind::Checkpoint };
        Ok(json!({ "epoch": self.group.ask(kind, limit).await? }))
    }

    /// `xen-set-replication`: what it stops goes on alone; nothing is lost by that.
    async fn set_replication(&self, arguments: Arguments<'_>) -> CommandResult<()> {
        let promoted = self.group.record().secondary.promotion.is_some();
        if promoted && self.group.stage() == Stage::None && !arguments.has("failover") {
            // As one of the original is after its failover: the primary, and nothing to stop.
            return Ok(());
        }
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
        let disks = self.group.disks();
        let disk = disks.iter().find(|disk| disk.name == parent).ok_or_else(|| {
            CommandError::refused(format!("Cannot find device='{parent}' nor node-name='{parent}'"))
        })?;
        let disk = disk.number;
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
            child == PEER_CHILD && group.peer().is_some() && !self.detached().contains(&disk);
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
        if node != peer || self.group.peer().is_none() {
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
    let discard = arguments.flag("discard-checkpoint");
    if limits.is_none() && !full && !compare && !discard {
        return Err(Error::usage(
            "what the secondary lacks is copied by itself; to copy everything: brep resync --full, \
             or --compare for what differs; to change how fast a copy goes: --rate, \
             --latency-factor",
        ));
    }
    if discard {
        discard_checkpoint(group)?;
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

/// The secondary gives its checkpoint up in the next session, which begins at once.
fn discard_checkpoint(group: &Group) -> Result<()> {
    if group.peer().is_none() || group.config.peer_kind == PeerKind::Plain {
        return Err(Error::refused(
            "there is no brep secondary whose checkpoint could be given up",
        ));
    }
    {
        let mut core = group.core();
        if core.link == LinkState::Connected && !core.copying {
            return Err(Error::refused(
                "the pair is in sync: the checkpoint is given up by the next one, and needs no room",
            ));
        }
        core.wish.discard_checkpoint = true;
    }
    group.drop_peer("the session begins anew without the checkpoint, by command".to_owned());
    group.wake.notify_one();
    Ok(())
}

fn request_copy(group: &Group, compare: bool) -> Result<()> {
    if group.peer().is_none() {
        return Err(no_peer());
    }
    if group.stage() != Stage::Running {
        return Err(Error::refused("replication does not run here: brep start first"));
    }
    let mut core = group.core();
    if let Some(refusal) = &core.refusal
        && refusal.superseded
    {
        return Err(Error::refused(refusal.reason.clone()));
    }
    if core.is_copying() || core.again.is_some() {
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
