//! A plain NBD client as the primary, such as QEMU's replication driver. It tells nothing about
//! itself; what is known is what it sends, and that both disks were equal when the operator
//! started replication.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error as BlockError, ErrorKind, FlushLevel, Io, Limits, Operation,
    WriteFlags, ZeroFlags,
};
use brep_nbd::server::Connection;
use bytes::Bytes;
use tokio::sync::OnceCell;

use super::exports::ReplicaDevice;
use super::group::{Group, Terms};
use super::session::{Session, SessionDisks};
use crate::link::StopReason;
use crate::state::Record;
use crate::status::LinkState;
use crate::{Epoch, Error, Generation, Result, SetId};

/// What cannot be promised to a plain primary; see the design's invariants by their names.
pub(super) const LAPSED: &[&str] = &[
    "checkpoints are the manager's: one is consistent if the guest was stopped for it, with \
     nothing on its way (stop, checkpoint on both sides, cont)",
    "the primary has no identity: that both disks were equal when replication was started, and \
     that no other primary writes elsewhere, is not checked",
    "a primary that is silent is not noticed until its connection ends",
    "what was received since the checkpoint is never known to be complete: no failover to latest",
];

/// What is known of the plain primary.
#[derive(Debug, Default)]
pub(super) struct Plain(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    claim: Claim,
    clients: Vec<Client>,
}

/// Whether the replica has every write of the primary.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) enum Claim {
    /// Nobody says so: what comes is a copy.
    #[default]
    None,
    /// It had when replication was started, and nothing was missed since.
    Holds,
    /// It had; then something happened that may have cost a write.
    Broken(String),
}

/// A connection that has chosen a replica.
#[derive(Debug)]
struct Client {
    disk: usize,
    connection: Arc<Connection>,
}

impl Plain {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn claim(&self) -> Claim {
        self.state().claim.clone()
    }

    pub(super) fn set_claim(&self, claim: Claim) {
        self.state().claim = claim;
    }

    /// From now on the replica may lack a write.
    pub(super) fn break_claim(&self, reason: String) {
        let mut state = self.state();
        if state.claim == Claim::Holds {
            tracing::warn!(reason, "the replica may lack writes");
            state.claim = Claim::Broken(reason);
        }
    }

    fn others(&self, disk: usize, connection: &Arc<Connection>) -> bool {
        let other = |c: &Client| c.disk == disk && !Arc::ptr_eq(&c.connection, connection);
        self.state().clients.iter().any(other)
    }
}

impl Group {
    /// Lets a plain primary write, under the protection of the last checkpoint if there is one.
    async fn open_plain(self: &Arc<Self>) -> Result<Arc<Session>> {
        if let Some(session) = self.session() {
            return Ok(session);
        }
        let mut record = Record::clone(&self.record());
        // A line of its own: no brep primary knows what is written on it.
        record.begin_line(Generation::random(), record.epoch);
        let terms = Terms {
            discard_checkpoint: false,
            set: record.set.unwrap_or_else(SetId::random),
            cur: record.cur.unwrap_or_else(Generation::random),
            epoch: record.epoch.next(),
            history: record.history,
        };
        // Nobody reads its messages.
        let (session, _) =
            Session::new(false, self.config.peer_timeout, SessionDisks::all(self.disks()));
        self.begin_session(&terms, &session).await?;
        Ok(session)
    }

    /// At the start of the process: the primary may connect, and replication begins at once
    /// unless there is an older checkpoint, which the disk may have left since.
    pub(super) async fn prepare_plain(self: &Arc<Self>) -> Result<()> {
        if self.plain.is_none() || self.is_promoted() {
            return Ok(());
        }
        let blank = self.record().com.is_none();
        if blank && self.config.start {
            return self.start_replication().await;
        }
        let _transition = self.transition.lock().await;
        self.open_plain().await.map(drop)
    }

    /// Begins replication: primaries are let in. With a plain primary it says that both sides'
    /// disks are equal now, which becomes the checkpoint.
    ///
    /// # Errors
    /// Refused if it runs already, or if this side has been promoted.
    pub(crate) async fn start_replication(self: &Arc<Self>) -> Result<()> {
        let _transition = self.transition.lock().await;
        if self.is_promoted() {
            return Err(Error::refused(
                "Cannot restart block replication: this side has been promoted",
            ));
        }
        let running = || Err(Error::refused("Block replication is running or done"));
        let Some(plain) = &self.plain else {
            match self.core().set_started() {
                true => return Ok(()),
                false => return running(),
            }
        };
        let before = plain.claim();
        if before == Claim::Holds {
            return running();
        }
        let session = self.open_plain().await?;
        // Before the cut: a connection that ends meanwhile is to be noticed.
        plain.set_claim(Claim::Holds);
        let begun = self.cut_and_commit(&session).await;
        if begun.is_err() {
            plain.set_claim(before);
        }
        begun.map(drop)
    }

    /// Takes a checkpoint of what the plain primary has sent. The caller has stopped its guest.
    ///
    /// # Errors
    /// Refused if a write of the primary may be missing; the last checkpoint stays.
    pub(crate) async fn checkpoint_plain(self: &Arc<Self>) -> Result<Epoch> {
        let _transition = self.transition.lock().await;
        let plain = self.plain.as_ref().ok_or_else(|| Error::failed("no plain primary"))?;
        match (plain.claim(), self.session()) {
            (Claim::Holds, Some(session)) => self.cut_and_commit(&session).await,
            (Claim::Broken(reason), _) => Err(missing_writes(&reason)),
            _ => Err(Error::refused("Block replication is not running")),
        }
    }

    async fn cut_and_commit(self: &Arc<Self>, session: &Arc<Session>) -> Result<Epoch> {
        let epoch = self.core().receiving;
        self.cut(session, &session.disks.taking_part, epoch).await?;
        if let Some(Claim::Broken(reason)) = self.plain.as_ref().map(Plain::claim) {
            // A write failed while the cut waited for it. What was cut is never committed; a new
            // session keeps it with the rest of the last checkpoint.
            self.end_session(StopReason::Replaced).await?;
            return Err(missing_writes(&reason));
        }
        self.commit(session, session.disks.taking_part.clone(), epoch).await?;
        Ok(epoch)
    }

    /// A client has chosen a replica.
    pub(super) fn plain_connected(self: &Arc<Self>, disk: usize, connection: &Arc<Connection>) {
        let Some(plain) = &self.plain else { return };
        plain.state().clients.push(Client { disk, connection: Arc::clone(connection) });
        self.show_plain_link();
        let (group, connection) = (Arc::clone(self), Arc::clone(connection));
        tokio::spawn(async move {
            connection.closed().await;
            group.plain_gone(&connection);
        });
    }

    fn plain_gone(&self, connection: &Arc<Connection>) {
        let Some(plain) = &self.plain else { return };
        plain.state().clients.retain(|c| !Arc::ptr_eq(&c.connection, connection));
        let wrote = self.session().is_some_and(|s| s.is_bound(connection));
        // Somebody who only looked, and said goodbye, was not the primary.
        if wrote || !connection.has_disconnected() {
            let peer = connection.peer();
            plain.break_claim(format!("the connection of the primary has ended ({peer})"));
        }
        self.show_plain_link();
    }

    fn show_plain_link(&self) {
        let Some(plain) = &self.plain else { return };
        let peer = plain.state().clients.last().map(|c| c.connection.peer().to_owned());
        let mut core = self.core();
        core.last_contact = Some(tokio::time::Instant::now());
        match peer {
            Some(peer) => {
                core.link = LinkState::Connected;
                core.peer = Some(format!("plain NBD client ({peer})"));
            }
            None => core.link = LinkState::Disconnected,
        }
    }

    /// The first change that comes over a connection: it becomes the one that may write, and
    /// whoever was that before has ended. Returns what it writes to.
    async fn admit_plain(
        self: &Arc<Self>,
        disk: usize,
        connection: &Arc<Connection>,
    ) -> Result<ReplicaDevice> {
        let gone = || Error::refused("replication has been stopped here");
        let session = self.session().ok_or_else(gone)?;
        if let Some(plain) = &self.plain
            && plain.others(disk, connection)
        {
            let peer = connection.peer();
            plain.break_claim(format!("a second client began to write ({peer})"));
        }
        let slot = u32::try_from(disk).map_err(|_| Error::failed("too many disks"))?;
        session.bind(slot, connection).await?;
        // Replication may have been stopped and started since the client came.
        ReplicaDevice::new(self, &self.disks()[disk])
    }

    /// Why a plain primary's replica is not healthy, and what gets out of it. `has_checkpoint`:
    /// there is something to fail over to.
    pub(super) fn explain_plain(&self, has_checkpoint: bool) -> Option<(String, String)> {
        let again = if has_checkpoint {
            "make both disks equal, then brep start; or, if the primary is gone for good: brep \
             failover"
        } else {
            "make both disks equal, then brep start"
        };
        match self.plain.as_ref()?.claim() {
            Claim::Holds => None,
            Claim::Broken(reason) => Some((missing_writes(&reason).to_string(), again.to_owned())),
            Claim::None => Some(("replication has not been started".to_owned(), again.to_owned())),
        }
    }
}

fn missing_writes(reason: &str) -> Error {
    Error::refused(format!(
        "no checkpoint: writes of the primary may be missing, because {reason}. When both disks \
         are equal again, start replication again"
    ))
}

/// A replica as a plain primary sees it: one client at a time may change it.
pub(super) struct PlainDevice {
    /// What it reads.
    replica: ReplicaDevice,
    group: Arc<Group>,
    disk: usize,
    connection: Arc<Connection>,
    /// What it writes to, once it does.
    admitted: OnceCell<ReplicaDevice>,
}

impl fmt::Debug for PlainDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainDevice").field("replica", &self.replica).finish_non_exhaustive()
    }
}

impl PlainDevice {
    pub(super) fn new(
        replica: ReplicaDevice,
        group: &Arc<Group>,
        disk: usize,
        connection: &Arc<Connection>,
    ) -> Self {
        PlainDevice {
            replica,
            group: Arc::clone(group),
            disk,
            connection: Arc::clone(connection),
            admitted: OnceCell::new(),
        }
    }

    fn change<'a>(
        &'a self,
        operation: Operation,
        start: impl FnOnce(&'a ReplicaDevice) -> Io<'a, ()> + Send + 'a,
    ) -> Io<'a, ()> {
        if let Some(replica) = self.admitted.get() {
            return start(replica);
        }
        Io::future(async move {
            let admit = || self.group.admit_plain(self.disk, &self.connection);
            let replica = self.admitted.get_or_try_init(admit).await.map_err(|error| {
                let name = self.replica.name();
                BlockError::new(operation, ErrorKind::Shutdown, name, error.to_string())
            })?;
            start(replica).await
        })
    }
}

impl BlockDevice for PlainDevice {
    fn name(&self) -> &str {
        self.replica.name()
    }
    fn size(&self) -> u64 {
        self.replica.size()
    }
    fn limits(&self) -> Limits {
        self.replica.limits()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.replica.read(offset, len)
    }
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.change(Operation::Write, move |r| r.write(offset, data, flags))
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(Operation::WriteZeroes, move |r| r.write_zeroes(offset, len, flags))
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.change(Operation::Discard, move |r| r.discard(offset, len))
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.replica.block_status(offset, len)
    }
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.replica.flush(level)
    }
}
