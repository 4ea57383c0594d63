use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use brep_block::{BlockDevice, BlockStatus, FlushLevel, Io, Limits, WriteFlags, ZeroFlags};
use bytes::Bytes;
use futures_util::future::join_all;

use super::opened::Opened;
use super::{Client, ClientError, ConnectOptions, Connection, ReconnectPolicy};
use crate::proto::wire::TransmissionFlags;

/// How long a further connection may take: with the first one the server has shown that it answers,
/// and one that has no place left says nothing.
const FURTHER_TIMEOUT: Duration = Duration::from_secs(3);

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
    members: Vec<Member>,
    next: AtomicUsize,
}

#[derive(Debug)]
enum Member {
    Connection(Arc<Connection>),
    Client(Client),
}

impl Member {
    fn device(&self) -> &dyn BlockDevice {
        match self {
            Member::Connection(connection) => &**connection,
            Member::Client(client) => client,
        }
    }

    async fn disconnect(&self) {
        match self {
            Member::Connection(connection) => connection.disconnect().await,
            Member::Client(client) => client.disconnect().await,
        }
    }
}

impl MultiConnection {
    /// Connects, over up to `count` connections. When one is lost, its requests fail, and so
    /// does every flush. What the server does not let in beyond the first is done without: it may
    /// have fewer places left than it would take connections of one client.
    ///
    /// # Errors
    /// As for [`Connection::connect`]; [`ClientError::Incompatible`] if not all connections see
    /// the same export.
    pub async fn connect(options: &ConnectOptions, count: usize) -> Result<Arc<Self>, ClientError> {
        let first = Connection::connect(options).await?;
        let opened = Opened::of(&first);
        let options = several(options);
        let options = ConnectOptions {
            connect_timeout: options.connect_timeout.min(FURTHER_TIMEOUT),
            ..options
        };
        let more = (1..usable(&first, count)).map(async |_| {
            let connection = Connection::connect(&options).await?;
            opened.check(&connection, &options)?;
            Ok(connection)
        });
        let mut members = vec![Member::Connection(first)];
        for connected in join_all(more).await {
            match connected {
                Ok(connection) => members.push(Member::Connection(connection)),
                Err(error @ ClientError::Incompatible { .. }) => return Err(error),
                Err(error) => tracing::info!(%error, "one connection less"),
            }
        }
        Ok(Self::over(members))
    }

    /// Connects, over up to `count` connections, each of which comes back as the policy says
    /// when it was lost. What the server does not let in beyond the first is done without.
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
            return Ok(Self::over(vec![Member::Client(probe)]));
        }
        let opened = Opened::of(&connection);
        drop(connection);
        let options = several(options);
        let further = async || {
            let client = Client::new(options.clone(), policy.clone());
            let Ok(connected) = tokio::time::timeout(FURTHER_TIMEOUT, client.connect()).await
            else {
                tracing::info!("one connection less: the server lets no more in");
                return Ok(None);
            };
            connected?;
            let connection = client.connection().ok_or(ClientError::NotConnected)?;
            opened.check(&connection, &options)?;
            Ok(Some(Member::Client(client)))
        };
        let Some(first) = further().await? else {
            return Ok(Self::over(vec![Member::Client(probe)]));
        };
        // Not before: its leave could be that of the last client.
        probe.disconnect().await;
        let mut members = vec![first];
        for member in join_all((1..count).map(|_| further())).await {
            members.extend(member?);
        }
        Ok(Self::over(members))
    }

    fn over(members: Vec<Member>) -> Arc<Self> {
        Arc::new(MultiConnection { members, next: AtomicUsize::new(0) })
    }

    /// Takes leave of the server on every connection, once everything pending is answered.
    pub async fn disconnect(&self) {
        join_all(self.members.iter().map(Member::disconnect)).await;
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.members.len()
    }

    /// The connection that speaks for all: its failed flush is remembered.
    fn first(&self) -> &dyn BlockDevice {
        self.members[0].device()
    }

    fn member(&self) -> &dyn BlockDevice {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.members[turn % self.members.len()].device()
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

    fn extents(&self, offset: u64, len: u64) -> Io<'_, Vec<BlockStatus>> {
        self.member().extents(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        if self.members.len() == 1 {
            return self.first().flush(level);
        }
        Io::future(async move {
            // Sends nothing, and fails for a connection that is not there.
            for member in &self.members {
                member.device().flush(FlushLevel::Process).await?;
            }
            self.first().flush(level).await
        })
    }
}
