use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Replication,
    ReplicationMode, Result, WriteFlags, ZeroFlags, detach, start,
};
use brep_nbd::client::Client;
use bytes::Bytes;

use super::{NOT_RUNNING, Stage, check_start, control, not_running};

/// Where a primary node sends its writes.
#[derive(Debug, Clone)]
pub enum Forward {
    /// A device that is there.
    Device(Arc<dyn BlockDevice>),
    /// An NBD client that `start` connects and `stop` disconnects.
    Client(Arc<Client>),
}

/// The forwarding node: a child of a quorum that takes writes and never gives anything back.
///
/// While it runs a write that cannot be forwarded succeeds all the same: the guest must not
/// suffer. The first failure is kept, and [`Replication::error`] reports it.
#[derive(Debug)]
pub struct PrimaryNode {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    forward: Forward,
    state: Mutex<State>,
    /// One start or stop at a time.
    calls: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    latched: Option<Error>,
}

impl PrimaryNode {
    /// A node that has not been started.
    pub fn new(name: impl Into<String>, forward: Forward) -> Arc<Self> {
        let shared = Shared {
            name: name.into(),
            forward,
            state: Mutex::new(State { stage: Stage::None, latched: None }),
            calls: tokio::sync::Mutex::new(()),
        };
        Arc::new(PrimaryNode { shared: Arc::new(shared) })
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.shared.state().stage
    }

    /// Forwards a change, if the node runs. It goes on to its end, and its failure is kept, also
    /// if nobody waits for it.
    fn forward<F>(&self, operation: Operation, offset: u64, len: u64, send: F) -> Io<'_, ()>
    where
        F: FnOnce(&dyn BlockDevice) -> Io<'_, ()> + Send + 'static,
    {
        if self.stage() != Stage::Running {
            let error = Error::new(operation, ErrorKind::Io, self.name(), NOT_RUNNING);
            return Io::err(error.at(offset, len));
        }
        let shared = Arc::clone(&self.shared);
        start(async move {
            if let Err(error) = send(shared.device()).await {
                shared.latch(error);
            }
            Ok(())
        })
    }

    fn refuse<T>(&self, operation: Operation, offset: u64, len: u64) -> Io<'_, T> {
        let text = "the primary's replication node is not for reading";
        let error = Error::new(operation, ErrorKind::Io, self.name(), text);
        Io::err(error.at(offset, len))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self) -> &dyn BlockDevice {
        match &self.forward {
            Forward::Device(device) => &**device,
            Forward::Client(client) => &**client,
        }
    }

    /// Keeps the first failure. Once stopped there is nobody to report it to.
    fn latch(&self, error: Error) {
        let mut state = self.state();
        if state.stage == Stage::Running {
            tracing::warn!(node = self.name, %error, "not forwarded");
            state.latched.get_or_insert(error);
        }
    }

    async fn start(self: Arc<Self>, mode: ReplicationMode) -> Result<()> {
        let _call = self.calls.lock().await;
        let stage = self.state().stage;
        check_start(&self.name, stage, mode, ReplicationMode::Primary)?;
        if let Forward::Client(client) = &self.forward {
            let connected = client.connect().await;
            connected.map_err(|e| control(&self.name, ErrorKind::NotConnected, e.to_string()))?;
        }
        *self.state() = State { stage: Stage::Running, latched: None };
        Ok(())
    }

    async fn stop(self: Arc<Self>) -> Result<()> {
        let _call = self.calls.lock().await;
        let stage = self.state().stage;
        match stage {
            Stage::None => return Err(not_running(&self.name)),
            Stage::Running => {}
            _ => return Ok(()),
        }
        *self.state() = State { stage: Stage::Done, latched: None };
        if let Forward::Client(client) = &self.forward {
            client.disconnect().await;
        }
        Ok(())
    }
}

impl BlockDevice for PrimaryNode {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn size(&self) -> u64 {
        self.shared.device().size()
    }

    fn limits(&self) -> Limits {
        self.shared.device().limits()
    }

    /// Always fails: the node only forwards.
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.refuse(Operation::Read, offset, len as u64)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.forward(Operation::Write, offset, data.len() as u64, move |to| {
            to.write(offset, data, flags)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.forward(Operation::WriteZeroes, offset, len, move |to| {
            to.write_zeroes(offset, len, ZeroFlags { fast: false, ..flags })
        })
    }

    /// Carried out as zeroing, so that both sides read the same.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.forward(Operation::Discard, offset, len, move |to| to.write_zeroes(offset, len, flags))
    }

    /// Always fails, as reading does: what the other side has says nothing about this disk once
    /// a write could not be forwarded.
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.refuse(Operation::BlockStatus, offset, len)
    }

    /// Forwarded while the node runs; else there is nothing to be made durable.
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        if self.stage() == Stage::Running {
            self.forward(Operation::Flush, 0, 0, move |to| to.flush(level))
        } else {
            Io::ok(())
        }
    }

    fn replication(&self) -> Option<&dyn Replication> {
        Some(self)
    }
}

impl Replication for PrimaryNode {
    fn start(&self, mode: ReplicationMode) -> Io<'_, ()> {
        Io::future(detach(Arc::clone(&self.shared).start(mode)))
    }

    /// Nothing to do on this side.
    fn checkpoint(&self) -> Io<'_, ()> {
        match self.stage() {
            Stage::None => Io::err(not_running(self.name())),
            _ => Io::ok(()),
        }
    }

    fn stop(&self, _failover: bool) -> Io<'_, ()> {
        Io::future(detach(Arc::clone(&self.shared).stop()))
    }

    fn error(&self) -> Io<'_, ()> {
        let state = self.shared.state();
        match (state.stage, &state.latched) {
            (Stage::None, _) => Io::err(not_running(self.name())),
            (_, Some(first)) => {
                Io::err(control(self.name(), ErrorKind::Io, format!("I/O error occurred: {first}")))
            }
            (_, None) => Io::ok(()),
        }
    }
}
