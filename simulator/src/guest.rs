//! A guest: requests that overlap in time and place, each checked.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use brep_block::{BlockDevice, Error, FlushLevel, WriteFlags, ZeroFlags};
use brep_nbd::Endpoint;
use brep_nbd::client::{ConnectOptions, Connection};
use bytes::Bytes;

use crate::file::SECTOR;
use crate::model::{MIXTURE, Model, fill, stamp_of};
use crate::pace::Pace;
use crate::side::disk_name;
use crate::world::World;

/// What the workers of a guest share.
pub(crate) struct Guest {
    world: Arc<World>,
    pub(crate) model: Mutex<Model>,
    pub(crate) pace: Pace,
    shared: Mutex<Shared>,
}

/// A guest that has asked for so much is in less of a hurry.
const ENOUGH: u64 = 400;

#[derive(Debug, Default)]
struct Shared {
    endpoint: Option<Endpoint>,
    /// One a disk.
    connections: Vec<Option<Arc<Connection>>>,
    /// Those of before a disk grew: what was asked there is still to be answered.
    older: Vec<Arc<Connection>>,
    requests: u64,
    stamp: u64,
    /// By disk.
    sectors: Vec<u64>,
    /// Which disks these are: another number after a failover, when what was asked of the old
    /// ones concerns nobody.
    line: u64,
}

impl Shared {
    /// What was asked there may be held for ever.
    fn cut(&mut self) {
        let present = self.connections.iter_mut().filter_map(Option::take);
        present.chain(self.older.drain(..)).for_each(|old| old.kill());
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    WriteFua,
    Zeroes,
    Discard,
    Flush,
}

const KINDS: [Kind; 16] = [
    Kind::Read,
    Kind::Read,
    Kind::Read,
    Kind::Write,
    Kind::Write,
    Kind::Write,
    Kind::Write,
    Kind::Write,
    Kind::Write,
    Kind::Write,
    Kind::WriteFua,
    Kind::Zeroes,
    Kind::Zeroes,
    Kind::Discard,
    Kind::Flush,
    Kind::Flush,
];

impl Guest {
    pub(crate) fn new(world: &Arc<World>, disks: usize, model: Model, stamp: u64) -> Arc<Self> {
        let shared = Shared {
            connections: vec![None; disks],
            stamp,
            sectors: model.sizes(),
            ..Shared::default()
        };
        Arc::new(Guest {
            world: Arc::clone(world),
            model: Mutex::new(model),
            pace: Pace::new(world),
            shared: Mutex::new(shared),
        })
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().expect("one thread")
    }

    pub(crate) fn model(&self) -> std::sync::MutexGuard<'_, Model> {
        self.model.lock().expect("one thread")
    }

    pub(crate) fn disk_bytes(&self, disk: usize) -> u64 {
        self.shared().sectors[disk] * SECTOR
    }

    /// A disk has grown.
    pub(crate) fn grow(&self, disk: usize, bytes: u64) {
        {
            let mut shared = self.shared();
            shared.sectors[disk] = bytes / SECTOR;
            // Whoever connects learns the size.
            let older = shared.connections[disk].take();
            shared.older.extend(older);
        }
        self.model().grow(disk, bytes / SECTOR);
    }

    /// Its disks are others from now on, with these contents; what it knows of the old ones.
    pub(crate) fn replace(&self, endpoint: Endpoint, model: Model) -> Model {
        {
            let mut shared = self.shared();
            shared.line += 1;
            shared.sectors = model.sizes();
            let disks = shared.connections.len().max(shared.sectors.len());
            shared.connections.resize(disks, None);
        }
        let old = std::mem::replace(&mut *self.model(), model);
        self.plug(endpoint);
        old
    }

    /// A disk is there that the model knows.
    pub(crate) fn use_disk(&self, disk: usize) {
        let sizes = self.model().sizes();
        let mut shared = self.shared();
        let disks = shared.connections.len().max(disk + 1);
        shared.connections.resize(disks, None);
        shared.sectors.resize(disks, 0);
        shared.sectors[disk] = sizes[disk];
    }

    /// A disk goes, or has gone.
    pub(crate) fn leave_disk(&self, disk: usize) {
        let mut shared = self.shared();
        shared.sectors.iter_mut().skip(disk).take(1).for_each(|sectors| *sectors = 0);
        let connection = shared.connections.get_mut(disk).and_then(Option::take);
        connection.inspect(|connection| connection.kill());
    }

    /// So many stamps that nobody else uses.
    pub(crate) fn take_stamps(&self, count: u64) -> u64 {
        let mut shared = self.shared();
        let first = shared.stamp + 1;
        shared.stamp += count;
        first
    }

    fn line(&self) -> u64 {
        self.shared().line
    }

    /// Where its disks are from now on.
    pub(crate) fn plug(&self, endpoint: Endpoint) {
        let mut shared = self.shared();
        shared.endpoint = Some(endpoint);
        shared.cut();
    }

    /// It has no disks until it is plugged again.
    pub(crate) fn unplug(&self) {
        let mut shared = self.shared();
        shared.endpoint = None;
        shared.cut();
    }

    pub(crate) fn requests(&self) -> u64 {
        self.shared().requests
    }

    /// Runs a worker until the guest ends.
    pub(crate) async fn work(self: Arc<Self>, pause_ms_max: u64) {
        // Whatever takes long shall not take long because of a guest that asks for more and more.
        let slow = |requests| if requests < ENOUGH { 1 } else { 10 };
        while self.pace.wait(pause_ms_max * slow(self.requests())).await {
            let disks = self.shared().sectors.len() as u64;
            let disk = self.world.with_rng(|rng| rng.below(disks)) as usize;
            if self.shared().sectors[disk] == 0 {
                continue;
            }
            match self.connection(disk).await {
                Some(connection) => self.request(disk, &connection).await,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The disk, connected.
    pub(crate) async fn connection(&self, disk: usize) -> Option<Arc<Connection>> {
        let (known, endpoint) = {
            let shared = self.shared();
            (shared.connections[disk].clone(), shared.endpoint.clone())
        };
        if let Some(known) = known
            && known.failure().is_none()
        {
            return Some(known);
        }
        let options = ConnectOptions {
            connect_timeout: Duration::from_millis(200),
            request_timeout: Duration::from_secs(3600),
            ..ConnectOptions::new(endpoint.clone()?, disk_name(disk))
        };
        let connection = Connection::connect(&options).await.ok()?;
        let mut shared = self.shared();
        if shared.endpoint != endpoint {
            return None;
        }
        shared.connections[disk] = Some(Arc::clone(&connection));
        Some(connection)
    }

    async fn request(&self, disk: usize, connection: &Arc<Connection>) {
        let sectors = self.shared().sectors[disk];
        if sectors == 0 {
            return;
        }
        let (kind, first, count, fua) = self.world.with_rng(|rng| {
            let kind = rng.pick(&KINDS);
            let long = matches!(kind, Kind::Zeroes | Kind::Discard) && rng.chance(300);
            let count = match rng.below(4) {
                0 => 8,
                1 => 1,
                2 => rng.range(1, 32),
                _ if long => rng.range(64, 512),
                _ => 4 * rng.range(1, 16),
            };
            // Half of the requests meet in a small part of the disk.
            let span = if rng.chance(500) { 256 } else { sectors };
            let count = count.min(span);
            let mut first = rng.below(span - count + 1);
            if rng.chance(500) {
                first -= first % 8;
            }
            (kind, first, count, rng.chance(500))
        });
        self.shared().requests += 1;
        let _busy = self.pace.begin();
        match kind {
            Kind::Read => self.read(disk, connection, first, count).await,
            Kind::Flush => {
                let (start, line) = (self.world.tick(), self.line());
                let outcome = connection.flush(FlushLevel::Durable).await;
                if outcome.is_ok() && line == self.line() {
                    self.model().flushed(disk, start);
                }
            }
            _ => self.change(disk, connection, kind, (first, count), fua).await,
        }
    }

    async fn change(
        &self,
        disk: usize,
        connection: &Arc<Connection>,
        kind: Kind,
        (first, count): (u64, u64),
        may_unmap: bool,
    ) {
        let zeroes = matches!(kind, Kind::Zeroes | Kind::Discard);
        let stamp = if zeroes {
            0
        } else {
            let mut shared = self.shared();
            shared.stamp += 1;
            shared.stamp
        };
        let (start, line) = (self.world.tick(), self.line());
        let begun = self.model().begin(disk, first, count, stamp, start);
        let (offset, len) = (first * SECTOR, count * SECTOR);
        let outcome: Result<(), Error> = match kind {
            Kind::Zeroes => {
                let flags = ZeroFlags { may_unmap, ..ZeroFlags::default() };
                connection.write_zeroes(offset, len, flags).await
            }
            Kind::Discard => connection.discard(offset, len).await,
            _ => {
                let data = Bytes::from(fill(disk, first, count, stamp));
                let flags = WriteFlags { fua: kind == Kind::WriteFua };
                connection.write(offset, data, flags).await
            }
        };
        let end = self.world.tick();
        // A trim that was refused, or not carried out, may leave what was there.
        if line != self.line() {
            return;
        }
        self.model().end(begun, end, outcome.is_ok(), kind == Kind::WriteFua);
        let told = match &outcome {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("{:?}", error.kind()),
        };
        self.world.count(if outcome.is_ok() { "guest: change" } else { "guest: change failed" });
        self.world.note(|| {
            format!("guest {kind:?} d{disk} {first}+{count} = {stamp}: {start}-{end} {told}")
        });
    }

    async fn read(&self, disk: usize, connection: &Arc<Connection>, first: u64, count: u64) {
        let (start, line) = (self.world.tick(), self.line());
        let outcome = connection.read(first * SECTOR, (count * SECTOR) as usize).await;
        let end = self.world.tick();
        if line != self.line() {
            return;
        }
        let Ok(data) = outcome else {
            self.world.count("guest: read failed");
            return;
        };
        self.world.count("guest: read");
        for (sector, data) in (first..).zip(data.chunks(SECTOR as usize)) {
            let stamp = stamp_of(disk, sector, data).unwrap_or(MIXTURE);
            if let Err(why) = self.model().check_read(disk, sector, stamp, (start, end)) {
                self.world.violated(format!("I1: guest read from {start} to {end}: {why}"));
                return;
            }
        }
    }

    /// Makes a sector zeroes, for good.
    pub(crate) async fn zero_sector(&self, disk: usize, sector: u64) -> Result<(), String> {
        let connection = self.connection(disk).await.ok_or("nobody serves it")?;
        let zeroes = Bytes::from(fill(disk, sector, 1, 0));
        let written = connection.write(sector * SECTOR, zeroes, WriteFlags { fua: true }).await;
        written.map_err(|error| error.to_string())
    }

    /// Everything on a disk, in pieces.
    pub(crate) async fn read_all(&self, disk: usize) -> Result<Vec<u8>, String> {
        let connection = self.connection(disk).await.ok_or("nobody serves it")?;
        let mut data = Vec::new();
        let total = connection.size() as usize;
        while data.len() < total {
            let len = (total - data.len()).min(256 << 10);
            let piece = connection.read(data.len() as u64, len).await;
            data.extend_from_slice(&piece.map_err(|error| error.to_string())?);
        }
        Ok(data)
    }
}
