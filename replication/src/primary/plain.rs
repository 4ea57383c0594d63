//! A stock NBD server as the peer: data connections, and nothing else.

use std::sync::Arc;

use brep_block::FlushLevel;
use brep_nbd::client::Connection;
use futures_util::future::{select_all, try_join_all};
use tokio::time::{sleep, timeout};

use super::group::Group;
use super::session::Connections;
use crate::secondary::hash_hex;
use crate::{Error, Result};

/// What is read as a heartbeat.
const HEARTBEAT_BYTES: usize = 512;

/// What a stock NBD server cannot promise; see the design's invariants by their names.
pub(super) const LAPSED: &[&str] = &[
    "checkpoints are the manager's: here one only says that everything was forwarded and flushed; \
     the peer's is consistent if the guest was stopped (stop, checkpoint on both sides, cont)",
    "the peer has no identity: that it holds these disks, and that nobody else writes to them, is \
     not checked",
    "late writes of a lost connection are not kept out of the peer's disk",
    "what the peer keeps over its own restart or a full buffer is the peer's matter; no resync \
     begins or resumes by itself",
];

/// The peer while a session lasts.
pub(super) struct Plain {
    group: Arc<Group>,
    connections: Connections,
}

impl Plain {
    pub(super) fn new(group: &Arc<Group>, connections: Connections) -> Self {
        Plain { group: Arc::clone(group), connections }
    }

    /// Asks every connection for a sign of life, until one gives none; returns why.
    ///
    /// Without it nobody would notice a peer that hangs or is unreachable while the guest writes
    /// nothing.
    pub(super) async fn run(&self) -> String {
        let beats = self.connections.values().map(|c| Box::pin(self.heartbeat(c)));
        select_all(beats).await.0.to_string()
    }

    async fn heartbeat(&self, connection: &Connection) -> Error {
        let limit = self.group.config.peer_timeout;
        let len = HEARTBEAT_BYTES.min(usize::try_from(connection.export().size).unwrap_or(0));
        loop {
            sleep(limit / 3).await;
            match timeout(limit, connection.start_read(0, len)).await {
                // An answer, be it an error.
                Ok(Ok(_)) => self.group.heard(),
                Ok(Err(error)) => match connection.failure() {
                    Some(failure) => return Error::failed(failure.to_string()),
                    None => tracing::warn!(%error, "the peer cannot read its disk"),
                },
                Err(_) => return Error::failed(format!("the peer has been silent for {limit:?}")),
            }
        }
    }

    /// Everything that was forwarded is in the peer's files as far as a flush brings it there.
    pub(super) async fn flush(&self) -> Result<()> {
        let flushes = self.connections.values().map(|c| c.start_flush(FlushLevel::Durable));
        try_join_all(flushes).await?;
        Ok(())
    }

    /// The hashes of what the peer's disk reads as.
    pub(super) async fn hashes(
        &self,
        disk: usize,
        offset: u64,
        length: u64,
        chunk: u32,
    ) -> Result<Vec<String>> {
        let length = usize::try_from(length).map_err(|_| Error::failed("too long"))?;
        let data = self.connections[&disk].start_read(offset, length).await?;
        Ok(data.chunks(chunk as usize).map(hash_hex).collect())
    }
}
