//! The guest of the demo: an NBD client that remembers what it has written.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use brep_block::{BlockDevice, FlushLevel, WriteFlags};
use brep_nbd::NbdUri;
use brep_nbd::client::{ConnectOptions, Connection};
use bytes::Bytes;

use super::disk::{DISK_LEN, FILES_LEN, Random, Root, edit, files_area};
use super::pair::PATIENCE;

const BLOCK_LEN: usize = 4096;
/// A guest has a working set: the random load stays within so many bytes.
const HOT_LEN: usize = 8 << 20;
const CHUNK_LEN: usize = 1 << 20;
const IN_FLIGHT: usize = 32;
/// How often a server that is not there yet is tried.
const PAUSE: Duration = Duration::from_millis(1);

/// A guest with a disk, and what the disk has to hold.
#[derive(Debug)]
pub(super) struct Guest {
    connection: Arc<Connection>,
    contents: Vec<u8>,
}

/// How many writes, in which time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Load {
    pub(super) writes: u64,
    pub(super) bytes: u64,
    pub(super) took: Duration,
}

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, more: Self) {
        self.writes += more.writes;
        self.bytes += more.bytes;
        self.took += more.took;
    }
}

/// Connects as soon as there is a server.
pub(super) async fn connect(uri: &NbdUri) -> anyhow::Result<Arc<Connection>> {
    let options = ConnectOptions::from_uri(uri)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Connection::connect(&options).await {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Everything that an export holds.
pub(super) async fn read_all(device: &dyn BlockDevice) -> anyhow::Result<Vec<u8>> {
    ensure!(device.size() == DISK_LEN as u64, "the export has {} bytes", device.size());
    let mut contents = Vec::with_capacity(DISK_LEN);
    for offset in (0..DISK_LEN).step_by(CHUNK_LEN) {
        contents.extend_from_slice(&device.read(offset as u64, CHUNK_LEN).await?);
    }
    Ok(contents)
}

impl Guest {
    pub(super) async fn start(uri: &NbdUri) -> anyhow::Result<Self> {
        let connection = connect(uri).await?;
        let contents = read_all(&*connection).await?;
        Ok(Guest { connection, contents })
    }

    /// What the disk has to hold.
    pub(super) fn contents(&self) -> &[u8] {
        &self.contents
    }

    /// What the disk holds.
    pub(super) async fn read_back(&self) -> anyhow::Result<Vec<u8>> {
        read_all(&*self.connection).await
    }

    /// Changes files, and writes the blocks that differ afterwards.
    pub(super) async fn edit_files(
        &mut self,
        change: impl FnOnce(&Root<'_, '_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<Load> {
        let before = files_area(&mut self.contents)?.to_vec();
        edit(files_area(&mut self.contents)?, change)?;
        let blocks = before.chunks(BLOCK_LEN).zip(self.contents.chunks(BLOCK_LEN)).enumerate();
        let changed = blocks.filter(|(_, (old, new))| old != new).map(|(index, _)| index);
        let changed: Vec<usize> = changed.collect();
        self.write_blocks(&changed).await
    }

    /// Overwrites blocks of the load area at random places.
    pub(super) async fn write_at_random(
        &mut self,
        random: &mut Random,
        count: usize,
    ) -> anyhow::Result<Load> {
        let first = FILES_LEN / BLOCK_LEN;
        let blocks = HOT_LEN.min(DISK_LEN - FILES_LEN) / BLOCK_LEN;
        let chosen: Vec<usize> =
            (0..count).map(|_| first + random.next() as usize % blocks).collect();
        for block in &chosen {
            let start = block * BLOCK_LEN;
            let place = self.contents.get_mut(start..start + BLOCK_LEN).context("a block")?;
            place.copy_from_slice(&random.bytes(BLOCK_LEN));
        }
        self.write_blocks(&chosen).await
    }

    /// Writes blocks with many requests in flight, and flushes.
    async fn write_blocks(&self, blocks: &[usize]) -> anyhow::Result<Load> {
        let begin = Instant::now();
        let mut pending = VecDeque::with_capacity(IN_FLIGHT);
        for block in blocks {
            if pending.len() == IN_FLIGHT
                && let Some(oldest) = pending.pop_front()
            {
                oldest.await?;
            }
            let start = block * BLOCK_LEN;
            let data = self.contents.get(start..start + BLOCK_LEN).context("a block")?;
            let data = Bytes::copy_from_slice(data);
            pending.push_back(self.connection.start_write(
                start as u64,
                data,
                WriteFlags::default(),
            ));
        }
        for write in pending {
            write.await?;
        }
        self.connection.flush(FlushLevel::Durable).await?;
        let writes = blocks.len() as u64;
        Ok(Load { writes, bytes: writes * BLOCK_LEN as u64, took: begin.elapsed() })
    }
}
