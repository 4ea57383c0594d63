use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use brep_block::{BlockDevice, BlockStatus, FlushLevel, Io, Limits, WriteFlags, ZeroFlags};
use bytes::Bytes;
use futures_util::future::try_join_all;

use super::opened::Opened;
use super::{Client, ClientError, ConnectOptions, Connection, ReconnectPolicy};
use crate::proto::wire::TransmissionFlags;

/// One export over several connections, which share what is asked of it.
///
/// * Only where the server says that a flush on one connection covers what has completed on all
///   (`CAN_MULTI_CONN`); of any other server there is one connection.
/// * Requests go to the connections in turn, and each splits them to the server's limits. Nothing
///   is said about the order of two that are under way at the same time.
/// * Each connection is lost, and comes back, by itself: what it was asked fails or waits as it
///   would on one alone. An export that does not offer several connections any more when one of
///   them comes back is refused.
/// * A flush fails unless every connection is there, or comes back in time. That covers the one
///   case that the server's word does not: one that ended without its last writes, while others
///   did not notice.
#[derive(Debug)]
pub struct MultiConnection {
    /// At least one.
    members: Vec<Arc<dyn BlockDevice>>,
    next: AtomicUsize,
}

impl MultiConnection {
    /// Connects, over up to `count` connections. When one is lost, its requests fail, and so
    /// does every flush.
    ///
    /// # Errors
    /// As for [`Connection::connect`]; [`ClientError::Incompatible`] if not all connections see
    /// the same export.
    pub async fn connect(options: &ConnectOptions, count: usize) -> Result<Arc<Self>, ClientError> {
        let first = Connection::connect(options).await?;
        let opened = Opened::of(&first);
        let options = several(options);
        let more = (1..usable(&first, count)).map(async |_| {
            let connection = Connection::connect(&options).await?;
            opened.check(&connection, &options)?;
            Ok::<_, ClientError>(connection as Arc<dyn BlockDevice>)
        });
        let more = try_join_all(more).await?;
        Ok(Self::over(first, more))
    }

    /// Connects, over up to `count` connections, each of which comes back as the policy says
    /// when it was lost.
    ///
    /// # Errors
    /// As for [`Client::connect`]; [`ClientError::Incompatible`] if not all connections see the
    /// same export.
    pub async fn open(
        options: &ConnectOptions,
        policy: &ReconnectPolicy,
        count: usize,
    ) -> Result<Arc<Self>, ClientError> {
        // One alone may come back without the promise that several need.
        let probe = Client::new(options.clone(), policy.clone());
        probe.connect().await?;
        let connection = probe.connection().ok_or(ClientError::NotConnected)?;
        let count = usable(&connection, count);
        if count == 1 {
            return Ok(Self::over(Arc::new(probe), Vec::new()));
        }
        let opened = Opened::of(&connection);
        drop(connection);
        probe.disconnect().await;
        let options = several(options);
        let members = (0..count).map(async |_| {
            let client = Client::new(options.clone(), policy.clone());
            client.connect().await?;
            let connection = client.connection().ok_or(ClientError::NotConnected)?;
            opened.check(&connection, &options)?;
            Ok::<_, ClientError>(Arc::new(client) as Arc<dyn BlockDevice>)
        });
        let members = try_join_all(members).await?;
        Ok(Arc::new(MultiConnection { members, next: AtomicUsize::new(0) }))
    }

    fn over(first: Arc<dyn BlockDevice>, more: Vec<Arc<dyn BlockDevice>>) -> Arc<Self> {
        let members = std::iter::once(first).chain(more).collect();
        Arc::new(MultiConnection { members, next: AtomicUsize::new(0) })
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.members.len()
    }

    /// The connection that speaks for all: its failed flush is remembered.
    fn first(&self) -> &dyn BlockDevice {
        &*self.members[0]
    }

    fn member(&self) -> &dyn BlockDevice {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &*self.members[turn % self.members.len()]
    }
}

/// How many of the connections that are wanted the server allows.
fn usable(first: &Connection, wanted: usize) -> usize {
    match first.export().flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
        true => wanted.max(1),
        false => 1,
    }
}

fn several(options: &ConnectOptions) -> ConnectOptions {
    ConnectOptions { needs_multi_conn: true, ..options.clone() }
}

impl BlockDevice for MultiConnection {
    fn name(&self) -> &str {
        self.first().name()
    }

    fn size(&self) -> u64 {
        self.first().size()
    }

    fn limits(&self) -> Limits {
        self.first().limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.member().read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.member().write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.member().write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.member().discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.member().block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        if self.members.len() == 1 {
            return self.first().flush(level);
        }
        Io::future(async move {
            // Sends nothing, and fails for a connection that is not there.
            for member in &self.members {
                member.flush(FlushLevel::Process).await?;
            }
            self.first().flush(level).await
        })
    }
}
