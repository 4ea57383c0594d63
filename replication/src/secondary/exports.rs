use std::sync::{Arc, Weak};

use brep_backup::CopyBeforeWrite;
use brep_block::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Operation, WriteFlags, ZeroFlags,
};
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, OptionErrorCode, PrivateReply,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use uuid::Uuid;

use super::disk::ReplicaDisk;
use super::group::Group;
use super::plain::PlainDevice;
use super::session::Session;
use crate::commands::Opened;
use crate::gate::Gated;
use crate::link::{LINK_VERSION, OPTION_BIND, OPTION_LINK};
use crate::primary::not_served;

/// The exports of the address where the primary connects: replicas, for bound connections of the
/// session; after a failover the promoted disks, if guests have no address of their own.
#[derive(Debug)]
pub(crate) struct PeerExports(pub(crate) Arc<Group>);

/// The exports for this side's guest.
#[derive(Debug)]
pub(crate) struct GuestExports(pub(crate) Arc<Group>);

impl Exports for PeerExports {
    fn list(&self) -> Vec<ExportDescription> {
        let what = if self.0.serves_guests_here() { "promoted disk" } else { "replica" };
        let mut list = describe(&self.0, what);
        if self.0.config.guest_listen.is_none() {
            list.extend(self.0.list_test());
        }
        list
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Opened {
        if self.0.config.guest_listen.is_none()
            && let Some(export) = self.0.test_export(name)
        {
            return Ok(export);
        }
        let disk = self.0.find_disk(name)?;
        if self.0.serves_guests_here() {
            return guest_export(&self.0, &disk);
        }
        if self.0.plain.is_some() {
            return self.plain_export(&disk, connection);
        }
        let bound = connection
            .data()
            .and_then(|data| data.downcast::<Weak<Session>>().ok())
            .and_then(|session| session.upgrade());
        let current = self.0.session();
        match (bound, current) {
            (Some(bound), Some(current)) if Arc::ptr_eq(&bound, &current) => {}
            _ => {
                return Err(OptionError::new(
                    OptionErrorCode::Policy,
                    format!(
                        "{} is a replica: only its primary connects here, until `brep failover` \
                         makes it the disk",
                        disk.name
                    ),
                ));
            }
        }
        let replica = ReplicaDevice::new(&self.0, &disk).map_err(unknown)?;
        Ok(Export::new(disk.name.clone(), Arc::new(replica)))
    }

    fn begin(&self, export: &Export, connection: &Arc<Connection>) {
        let disk = self.0.disks().iter().position(|d| d.name == export.canonical_name);
        if let Some(disk) = disk
            && !self.0.serves_guests_here()
        {
            self.0.plain_connected(disk, connection);
        }
    }

    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<Connection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        Box::pin(async move {
            match option {
                OPTION_LINK => self.link(connection, &data),
                OPTION_BIND => match self.bind(connection, &data).await {
                    Ok(()) => PrivateReply::Ack(Bytes::new()),
                    Err(message) => {
                        PrivateReply::Error(OptionError::new(OptionErrorCode::Policy, message))
                    }
                },
                _ => PrivateReply::Unsupported,
            }
        })
    }
}

impl PeerExports {
    fn plain_export(&self, disk: &Arc<ReplicaDisk>, connection: &Arc<Connection>) -> Opened {
        let disks = self.0.disks();
        let index = disks.iter().position(|d| Arc::ptr_eq(d, disk)).unwrap_or_default();
        let replica = ReplicaDevice::new(&self.0, disk).map_err(unknown)?;
        let device = PlainDevice::new(replica, &self.0, index, connection);
        Ok(Export::new(disk.name.clone(), Arc::new(device)))
    }

    fn link(&self, connection: &Arc<Connection>, data: &[u8]) -> PrivateReply {
        if self.0.plain.is_some() {
            return PrivateReply::Error(OptionError::new(
                OptionErrorCode::Policy,
                "this secondary is run for a plain NBD primary; for a brep primary start it \
                 without --plain-primary",
            ));
        }
        if data.len() > 4 {
            return PrivateReply::Error(OptionError::new(
                OptionErrorCode::Policy,
                "this secondary serves one group: leave its name out of --peer",
            ));
        }
        if data != LINK_VERSION.to_be_bytes() {
            return PrivateReply::Error(OptionError::new(
                OptionErrorCode::Policy,
                format!("this side speaks link version {LINK_VERSION}; run the same brep on both"),
            ));
        }
        let group = Arc::clone(&self.0);
        let peer = connection.peer().to_owned();
        PrivateReply::Takeover {
            reply: Bytes::new(),
            then: Box::new(move |stream| Box::pin(group.serve_link(stream, peer))),
        }
    }

    async fn bind(
        &self,
        connection: &Arc<Connection>,
        data: &[u8],
    ) -> std::result::Result<(), String> {
        let (Some(token), Some(slot)) = (
            data.get(..16).and_then(|t| Uuid::from_slice(t).ok()),
            data.get(16..).and_then(|s| s.try_into().ok()).map(u32::from_be_bytes),
        ) else {
            return Err("a token of 16 bytes and a slot of 4 are expected".to_owned());
        };
        let session = self.0.session().filter(|s| s.token == token);
        let session = session.ok_or("no session has this token")?;
        session.bind(slot, connection).await.map_err(|e| e.to_string())?;
        connection.set_data(Arc::new(Arc::downgrade(&session)));
        Ok(())
    }
}

impl Exports for GuestExports {
    fn list(&self) -> Vec<ExportDescription> {
        let mut list = describe(&self.0, "disk of the secondary's guest");
        list.extend(self.0.list_test());
        list
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Opened {
        let mut export = match self.0.test_export(name) {
            Some(export) => export,
            None => guest_export(&self.0, &*self.0.find_disk(name)?)?,
        };
        self.0.config.exposure().limit(&mut export, connection);
        Ok(export)
    }
}

fn unknown(error: crate::Error) -> OptionError {
    OptionError::new(OptionErrorCode::Unknown, error.to_string())
}

fn describe(group: &Group, what: &str) -> Vec<ExportDescription> {
    let describe = |d: &Arc<ReplicaDisk>| ExportDescription {
        name: d.name.clone(),
        description: what.to_owned(),
    };
    group.disks().iter().map(describe).collect()
}

fn guest_export(group: &Group, disk: &ReplicaDisk) -> Opened {
    if group.primary().as_ref().is_some_and(|primary| !primary.serves_guests()) {
        return Err(not_served());
    }
    if !group.has_guest() && !group.is_promoted() {
        return Err(OptionError::new(
            OptionErrorCode::Policy,
            "this side is a secondary at present; guests are served by the other one",
        ));
    }
    let device = Gated(Arc::clone(disk.gate()));
    // All connections use one device, and its flush covers all of them.
    let mut export = Export::new(disk.name.clone(), Arc::new(device));
    export.multi_conn = true;
    Ok(export)
}

/// What the primary writes to: a write that fails here is known to the record before the primary
/// learns of it.
#[derive(Debug)]
pub(super) struct ReplicaDevice {
    filter: Arc<CopyBeforeWrite>,
    group: Arc<Group>,
    name: String,
}

impl ReplicaDevice {
    /// The disk as it is replicated now.
    pub(super) fn new(group: &Arc<Group>, disk: &ReplicaDisk) -> crate::Result<Self> {
        let filter = disk.filter()?;
        Ok(ReplicaDevice { filter, group: Arc::clone(group), name: disk.name.clone() })
    }

    /// Whether pre-images may be kept, if they are.
    fn check_room(&self, operation: Operation) -> brep_block::Result<()> {
        match self.filter.is_enabled() {
            true => self.group.check_budget(&self.name, operation),
            false => Ok(()),
        }
    }

    fn watch<'a>(&'a self, len: u64, io: Io<'a, ()>) -> Io<'a, ()> {
        match io {
            Io::Ready(Ok(())) => {
                self.group.count_replica_write(len);
                Io::ok(())
            }
            io => Io::future(async move {
                match io.await {
                    Ok(()) => self.group.count_replica_write(len),
                    Err(error) => {
                        return Err(self.group.replica_write_failed(&self.name, error));
                    }
                }
                Ok(())
            }),
        }
    }
}

impl BlockDevice for ReplicaDevice {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> u64 {
        self.filter.size()
    }
    fn limits(&self) -> Limits {
        self.filter.limits()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.filter.read(offset, len)
    }
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        match self.check_room(Operation::Write) {
            Ok(()) => self.watch(len, self.filter.write(offset, data, flags)),
            Err(error) => self.watch(len, Io::err(error.at(offset, len))),
        }
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        match self.check_room(Operation::WriteZeroes) {
            Ok(()) => self.watch(len, self.filter.write_zeroes(offset, len, flags)),
            Err(error) => self.watch(len, Io::err(error.at(offset, len))),
        }
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        match self.check_room(Operation::Discard) {
            Ok(()) => self.watch(len, self.filter.discard(offset, len)),
            Err(error) => self.watch(len, Io::err(error.at(offset, len))),
        }
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.filter.block_status(offset, len)
    }
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        match self.filter.flush(level) {
            Io::Ready(Ok(())) => Io::ok(()),
            flush => Io::future(async move {
                let flushed = flush.await;
                flushed.map_err(|error| self.group.replica_write_failed(&self.name, error))
            }),
        }
    }
}
