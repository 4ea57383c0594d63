//! One process of a pair: what stays while it is a secondary, is promoted, and is a primary.
mod closing;
mod disks;
mod handler;
mod peer;
mod stopped;

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use brep_block::storage;
use brep_nbd::Endpoint;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::closing::Closing;
pub(crate) use self::closing::{CLOSE_LIMIT, still_closing};
use self::handler::SideHandler;
pub(crate) use self::handler::{Managed, RoleCommands, peer_argument};
pub use self::stopped::remove_disk_of_stopped;
use crate::commands::Colo;
use crate::config::{DiskConfig, Durability, PeerAddress, SideConfig};
use crate::control::EventBus;
use crate::daemon::{self, ControlThread};
use crate::errors::ErrorLog;
use crate::link::{self, DiskInfo, MapsInfo};
use crate::state::{RESTART, Record, RecordStore, Role, SharedRecord};
use crate::{Error, Generation, Result, SetId, primary, secondary};

/// How long a command waits while the role changes.
const ROLE_LIMIT: Duration = Duration::from_secs(5);

/// The time in which the last requests of a role have to end.
const FREE_LIMIT: Duration = Duration::from_secs(10);

/// Runs a side until `shutdown` is cancelled or it is told to stop. To be called on a
/// current-thread runtime of its own thread: that thread is the data path. The control socket is
/// served on another thread.
///
/// # Errors
/// Whatever keeps it from starting, with the file or address and what to do; and what keeps it
/// from stopping cleanly.
pub async fn run(config: SideConfig, shutdown: CancellationToken) -> Result<()> {
    let side = Side::open(config, shutdown)?;
    let result = loop {
        let leaving = side.leaving();
        let result = match side.record.get().needs_buffers() {
            true => secondary::run(&side).await,
            false => primary::run(&side).await,
        };
        // A role that ended, and not the side, is followed by the other one.
        if result.is_err() || side.stopping.is_cancelled() || !leaving.is_cancelled() {
            break result;
        }
        side.commands(None);
        if let Err(error) = side.disks_are_free().await {
            break Err(error);
        }
        side.enter_role();
    };
    if let Err(error) = side.closing.ended(None).await {
        tracing::warn!(%error, "nobody waits for it any more");
    }
    // What the commands work on would keep the side, and with it the locks of its files.
    side.commands(None);
    if let Some(control) = side.control().take() {
        control.stop();
    }
    result
}

/// What a side has in any role.
pub(crate) struct Side {
    pub(crate) config: SideConfig,
    pub(crate) run: Uuid,
    pub(crate) events: EventBus,
    pub(crate) errors: ErrorLog,
    /// The process is to end.
    pub(crate) stopping: CancellationToken,
    pub(crate) record: SharedRecord,
    pub(crate) colo: Colo,
    /// The disks that are there now.
    disks: Mutex<Vec<DiskConfig>>,
    /// Where the other side listens.
    peer: watch::Sender<Option<PeerAddress>>,
    /// Carries out commands in the present role.
    role: watch::Sender<Option<Arc<dyn RoleCommands>>>,
    control: Mutex<Option<ControlThread>>,
    /// The present role ends.
    leaving: Mutex<CancellationToken>,
    group: Mutex<Option<Weak<dyn Any + Send + Sync>>>,
    pub(crate) closing: Closing,
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side").field("name", &self.config.name).finish_non_exhaustive()
    }
}

impl Side {
    /// Opens the state record, or makes a first one.
    pub(crate) fn open(config: SideConfig, stopping: CancellationToken) -> Result<Arc<Self>> {
        daemon::prepare(&config)?;
        let exposure = config.exposure();
        let mut addresses = config.listen.iter().chain(&config.guest_listen);
        addresses.try_for_each(|address| exposure.check(address))?;
        let mut store = RecordStore::open(&config.state_dir, || blank(&config))?;
        if config.durability == Durability::Power {
            store.set_durable();
            // What a killed process has saved may be in the page cache only, and what it does not
            // name is given up.
            store.sync()?;
        }
        let events = EventBus::new();
        let record = SharedRecord::new(store, &events);
        take_role(&config, &record).map_err(|e| e.context(config.state_dir.display()))?;
        let peer = peer::at_start(&config, &record.get())?;
        let disks = record.get().disks_at_start(&config.disks);
        daemon::check_disks(&disks)?;
        daemon::check_images(&config.state_dir, &disks)?;
        let leaving = stopping.child_token();
        Ok(Arc::new(Side {
            config,
            run: crate::random::uuid(),
            events,
            errors: ErrorLog::default(),
            stopping,
            record,
            colo: Colo::default(),
            disks: Mutex::new(disks),
            peer: watch::Sender::new(peer),
            role: watch::Sender::default(),
            control: Mutex::default(),
            leaving: Mutex::new(leaving),
            group: Mutex::default(),
            closing: Closing::default(),
        }))
    }

    /// The present role ends: with the process, or to become the other one.
    pub(crate) fn leaving(&self) -> CancellationToken {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whoever has the disks open in the present role.
    pub(crate) fn note_group<T: Send + Sync + 'static>(&self, group: &Arc<T>) {
        let group: Arc<dyn Any + Send + Sync> = Arc::clone(group) as _;
        let mut known = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(Arc::downgrade(&group));
    }

    /// Waits until nobody has the disks open any more: the last request may just end.
    async fn disks_are_free(&self) -> Result<()> {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner).take();
        let free = async {
            while group.as_ref().is_some_and(|group| group.strong_count() > 0) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(FREE_LIMIT, free)
            .await
            .map_err(|_| Error::failed("requests to the disks do not end; start this side again"))
    }

    fn enter_role(&self) {
        let token = self.stopping.child_token();
        *self.leaving.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    fn control(&self) -> std::sync::MutexGuard<'_, Option<ControlThread>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on commands are carried out by `role`.
    pub(crate) fn commands(&self, role: Option<Arc<dyn RoleCommands>>) {
        self.role.send_replace(role);
    }

    fn role(&self) -> Option<Arc<dyn RoleCommands>> {
        self.role.borrow().clone()
    }

    /// As [`role`](Self::role); while the role changes, that of the new one. None: the side ends, or
    /// the change takes too long.
    async fn settled_role(&self) -> Option<Arc<dyn RoleCommands>> {
        let mut role = self.role.subscribe();
        let known = tokio::select! {
            biased;
            known = tokio::time::timeout(ROLE_LIMIT, role.wait_for(Option::is_some)) => known,
            () = self.stopping.cancelled() => return None,
        };
        known.ok()?.ok()?.clone()
    }

    /// Serves the control socket: this side is ready.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub(crate) fn serve_control(self: &Arc<Self>) -> Result<()> {
        if self.control().is_some() {
            return Ok(());
        }
        let path = daemon::control_path(&self.config.control, &self.config.state_dir);
        let handler = SideHandler::new(self);
        let control = ControlThread::spawn(path, Arc::new(handler), self.events.clone())?;
        *self.control() = Some(control);
        Ok(())
    }

    /// What tells one boot from every other of the machines that the files of this side lie on, if
    /// it is known of all of them.
    pub(crate) fn boot_id(&self) -> Option<String> {
        let first = storage::boot_id(&self.config.state_dir)?;
        let disks = self.disk_configs();
        disks.iter().try_fold(first, |id, disk| storage::boot_id(&disk.path).map(|_| id))
    }

    /// Puts the record, and the names of the files beside it, on stable storage.
    ///
    /// # Errors
    /// The state directory cannot be flushed.
    pub(crate) async fn secure_start(&self) -> Result<()> {
        self.record.sync().await?;
        let dir = &self.config.state_dir;
        storage::sync_dir(dir)
            .await
            .map_err(|e| Error::failed(format!("{}: cannot flush: {e}", dir.display())))
    }

    /// What a record that can be saved no more means, and what helps.
    pub(crate) fn explain_record(&self) -> Option<(String, String)> {
        let reason = self.record.failure()?;
        let reason = format!("{reason}; no session, no change of roles and no other command");
        Some((reason, RESTART.to_owned()))
    }

    /// What hello tells of this side.
    pub(crate) fn introduce(&self, disks: Vec<DiskInfo>, maps: Option<MapsInfo>) -> link::Side {
        let record = self.record.get();
        link::Side {
            name: self.config.name.clone(),
            run: self.run,
            set: record.set,
            cur: record.cur,
            fork: record.fork,
            com: record.com,
            epoch: record.epoch,
            session: record.session,
            history: record.history.clone(),
            primary: record.is_primary(),
            made_room: record.secondary.made_room,
            disks,
            removed: record.removed.clone(),
            durability: self.config.durability,
            maps,
        }
    }

    /// Where guests are served by a primary.
    pub(crate) fn guest_address(&self) -> Result<&Endpoint> {
        let given = self.config.guest_listen.as_ref().or(self.config.listen.as_ref());
        given.ok_or_else(|| Error::usage("where guests connect is missing: --guest-listen URI"))
    }

    /// Where the other side connects; a secondary has to have it.
    pub(crate) fn listen_address(&self) -> Result<&Endpoint> {
        let given = self.config.listen.as_ref();
        given.ok_or_else(|| Error::usage("where the primary connects is missing: --listen URI"))
    }

    /// A guest of its own is served while this side is a secondary.
    pub(crate) fn has_second_guest(&self) -> bool {
        self.config.role == Role::Secondary && self.config.guest_listen.is_some()
    }
}

fn blank(config: &SideConfig) -> Record {
    let blank = Record::blank(&config.name, config.role);
    match config.role {
        Role::Primary => {
            Record { set: Some(SetId::random()), cur: Some(Generation::random()), ..blank }
        }
        Role::Secondary => blank,
    }
}

/// Takes the role that the command line asks for, as far as the record has another: a primary may
/// return as a secondary, and one that did and was not changed may be the primary again.
fn take_role(config: &SideConfig, record: &SharedRecord) -> Result<()> {
    let now = record.get();
    match config.role {
        Role::Primary
            if now.role == Role::Secondary
                && !now.secondary.outdated
                && config.listen.is_some() =>
        {
            tracing::warn!("this side is a secondary since a switchover, and goes on as one");
            Ok(())
        }
        Role::Primary => {
            primary::check_role(&now)?;
            record.update(|record| {
                if !now.needs_buffers() || now.role == Role::Secondary {
                    record.become_primary();
                }
            })
        }
        Role::Secondary => {
            let returns = secondary::check_return(&now, config)?;
            record.update(|record| {
                if returns {
                    record.return_as_secondary();
                }
                record.secondary.discard_local |= config.discard_local;
            })
        }
    }
}
