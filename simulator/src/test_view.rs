//! Test views of the secondary's checkpoint: each shows exactly that, and what was written to it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brep_block::{BlockDevice, WriteFlags};
use brep_nbd::Endpoint;
use brep_nbd::client::{ConnectOptions, Connection};
use brep_replication::simulation::control;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use crate::file::SECTOR;
use crate::history::History;
use crate::model::{fill, stamps};
use crate::second::Read;
use crate::seen::Seen;
use crate::side::disk_name;
use crate::world::{Life, World};

/// What is written to views has larger stamps than what guests write.
const FIRST_STAMP: u64 = 1 << 41;

/// The name of every view: there is one at a time.
const NAME: &str = "drill";

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 64 << 10;

/// A view that was opened, and perhaps has ended.
pub(crate) struct TestView {
    /// Promotions before it: what it shows is of the line since then.
    line: u64,
    user: JoinHandle<()>,
    /// What it showed, not checked yet.
    shown: Arc<Mutex<Option<Read>>>,
}

/// Somebody who looks at a view.
struct User {
    world: Arc<World>,
    life: Life,
    /// Where the disks of the view are.
    exports: Vec<String>,
    endpoint: Endpoint,
    epoch: u64,
    /// When it was there.
    opened: u64,
    shown: Arc<Mutex<Option<Read>>>,
}

impl History {
    /// Somebody tries a failover while the pair runs.
    pub(crate) async fn open_test(&mut self) {
        if self.test.as_ref().is_some_and(|test| !test.user.is_finished()) {
            return;
        }
        let side = 1 - self.primary;
        let told = self.tell(side, "failover-test", &[("name", json!(NAME))]).await;
        let (Some(Ok(report)), Some(process)) = (told, &self.processes[side]) else { return };
        self.world.saw(Seen::TestView);
        let Some(epoch) = report["checkpoint"].as_u64() else { return };
        let exports = match self.setup.disks {
            1 => vec![NAME.to_owned()],
            disks => (0..disks).map(|disk| format!("{NAME}/{}", disk_name(disk))).collect(),
        };
        let shown = Arc::default();
        let user = User {
            world: Arc::clone(&self.world),
            life: process.life,
            exports,
            endpoint: self.guest_endpoint(side),
            epoch,
            opened: self.world.tick(),
            shown: Arc::clone(&shown),
        };
        let user = tokio::spawn(user.live());
        self.test = Some(TestView { line: self.promotions, user, shown });
    }

    /// Looks at what a view has shown.
    pub(crate) fn check_test(&self) -> Result<(), String> {
        let Some(test) = &self.test else { return Ok(()) };
        match test.shown.lock().expect("one thread").take() {
            Some(shown) if test.line == self.promotions => self.check_reads(vec![shown]),
            _ => Ok(()),
        }
    }
}

impl User {
    async fn live(self) {
        // Whoever ends it, or whatever becomes of its process: it is over then.
        if let Ok(Err(Wrong(why))) = self.look().await {
            self.world.violated(format!("I2, I3: test view of {}: {why}", self.epoch));
        }
        self.command("failover-test-end", json!({ "name": NAME })).await;
    }

    /// Reads the view, writes to it, reads it again. An error: it has ended meanwhile.
    async fn look(&self) -> Result<Result<(), Wrong>, ()> {
        let mut disks = Vec::new();
        for export in &self.exports {
            let options = ConnectOptions {
                connect_timeout: Duration::from_millis(200),
                request_timeout: Duration::from_secs(3600),
                ..ConnectOptions::new(self.endpoint.clone(), export.clone())
            };
            disks.push(Connection::connect(&options).await.map_err(drop)?);
        }
        let mut known = Vec::new();
        for (disk, connection) in disks.iter().enumerate() {
            known.push(self.contents(disk, connection).await?);
        }
        self.show(&known);
        let rounds = self.world.with_rng(|rng| rng.range(1, 2));
        for round in 0..rounds {
            let ms = self.world.with_rng(|rng| rng.range(1, 150));
            for (disk, connection) in disks.iter().enumerate() {
                self.write(disk, connection, &mut known[disk], round).await?;
            }
            tokio::time::sleep(Duration::from_millis(ms)).await;
            for (disk, connection) in disks.iter().enumerate() {
                let contents = self.contents(disk, connection).await?;
                let changed = (0..contents.len()).find(|at| contents[*at] != known[disk][*at]);
                if let Some(sector) = changed {
                    let (now, before) = (contents[sector], known[disk][sector]);
                    let told = format!("disk {disk} sector {sector} has {now}, and had {before}");
                    return Ok(Err(Wrong(told)));
                }
            }
        }
        self.world.saw(Seen::TestViewChecked);
        let status = self.command("query-status", Value::Null).await;
        if status.is_some_and(|status| status["checkpoint"].as_u64() > Some(self.epoch)) {
            self.world.saw(Seen::TestViewMoved);
        }
        Ok(Ok(()))
    }

    fn show(&self, known: &[Vec<u64>]) {
        let sectors = known.iter().enumerate().flat_map(|(disk, sectors)| {
            sectors.iter().enumerate().map(move |(sector, stamp)| ((disk, sector), *stamp))
        });
        let sectors: BTreeMap<_, _> = sectors.collect();
        let read = Read { epoch: self.epoch, until: self.opened, sectors };
        *self.shown.lock().expect("one thread") = Some(read);
    }

    async fn contents(&self, disk: usize, connection: &Connection) -> Result<Vec<u64>, ()> {
        let mut data = Vec::new();
        let total = connection.size();
        while (data.len() as u64) < total {
            let at = data.len() as u64;
            let piece = connection.read(at, (total - at).min(PIECE_BYTES) as usize).await;
            data.extend_from_slice(&piece.map_err(drop)?);
        }
        Ok(stamps(disk, &data))
    }

    async fn write(
        &self,
        disk: usize,
        connection: &Connection,
        known: &mut [u64],
        round: u64,
    ) -> Result<(), ()> {
        for write in 0..4 {
            let stamp = FIRST_STAMP + round * 8 + write;
            let (first, count) = self.world.with_rng(|rng| {
                let count = rng.range(1, 16);
                (rng.below(256 - count), count)
            });
            let data = Bytes::from(fill(disk, first, count, stamp));
            let written = connection.write(first * SECTOR, data, WriteFlags::default()).await;
            written.map_err(drop)?;
            known[first as usize..(first + count) as usize].fill(stamp);
        }
        Ok(())
    }

    async fn command(&self, command: &str, arguments: Value) -> Option<Value> {
        let life = self.life;
        let control = control(&PathBuf::from(format!("/{life}/state/control.sock")))?;
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        control.handler.execute(command, arguments).await.ok()
    }
}

/// What must not be.
struct Wrong(String);
