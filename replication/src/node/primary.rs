use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Replication,
    ReplicationMode, WriteFlags, ZeroFlags,
};
use brep_nbd::client::Client;
use bytes::Bytes;

use super::{Stage, check_start, control, not_running};

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
    name: String,
    forward: Forward,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    latched: Option<Error>,
}

impl PrimaryNode {
    /// A node that has not been started.
    pub fn new(name: impl Into<String>, forward: Forward) -> Arc<Self> {
        Arc::new(PrimaryNode {
            name: name.into(),
            forward,
            state: Mutex::new(State { stage: Stage::None, latched: None }),
        })
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.state().stage
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self) -> &dyn BlockDevice {
        match &self.forward {
            Forward::Device(device) => &**device,
            Forward::Client(client) => &**client,
        }
    }

    /// Forwards a change, if the node runs.
    fn forward<'a>(
        &'a self,
        operation: Operation,
        offset: u64,
        len: u64,
        send: impl FnOnce(&'a dyn BlockDevice) -> Io<'a, ()>,
    ) -> Io<'a, ()> {
        if self.stage() != Stage::Running {
            let error = Error::new(
                operation,
                ErrorKind::Io,
                &self.name,
                "Block replication is not running",
            );
            return Io::err(error.at(offset, len));
        }
        let sent = send(self.device());
        Io::future(async move {
            if let Err(error) = sent.await {
                self.state().latched.get_or_insert(error);
            }
            Ok(())
        })
    }
}

impl BlockDevice for PrimaryNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.device().size()
    }

    fn limits(&self) -> Limits {
        self.device().limits()
    }

    /// Always fails: the node only forwards.
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let text = "the primary's replication node is not for reading";
        let error = Error::new(Operation::Read, ErrorKind::Io, &self.name, text);
        Io::err(error.at(offset, len as u64))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.forward(Operation::Write, offset, data.len() as u64, |to| {
            to.write(offset, data, flags)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.forward(Operation::WriteZeroes, offset, len, |to| {
            to.write_zeroes(offset, len, ZeroFlags { fast: false, ..flags })
        })
    }

    /// Carried out as zeroing, so that both sides read the same.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.forward(Operation::Discard, offset, len, |to| to.write_zeroes(offset, len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.device().block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        if self.stage() == Stage::Running {
            self.forward(Operation::Flush, 0, 0, |to| to.flush(level))
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
        if let Err(error) = check_start(&self.name, self.stage(), mode, ReplicationMode::Primary) {
            return Io::err(error);
        }
        Io::future(async move {
            if let Forward::Client(client) = &self.forward {
                client
                    .connect()
                    .await
                    .map_err(|e| control(&self.name, ErrorKind::NotConnected, e.to_string()))?;
            }
            let mut state = self.state();
            state.stage = Stage::Running;
            state.latched = None;
            Ok(())
        })
    }

    /// Nothing to do on this side.
    fn checkpoint(&self) -> Io<'_, ()> {
        match self.stage() {
            Stage::None => Io::err(not_running(&self.name)),
            _ => Io::ok(()),
        }
    }

    fn stop(&self, _failover: bool) -> Io<'_, ()> {
        match self.stage() {
            Stage::None => return Io::err(not_running(&self.name)),
            Stage::Running => {}
            _ => return Io::ok(()),
        }
        {
            let mut state = self.state();
            state.stage = Stage::Done;
            state.latched = None;
        }
        Io::future(async move {
            if let Forward::Client(client) = &self.forward {
                client.disconnect().await;
            }
            Ok(())
        })
    }

    fn error(&self) -> Io<'_, ()> {
        let state = self.state();
        match (state.stage, &state.latched) {
            (Stage::None, _) => Io::err(not_running(&self.name)),
            (_, Some(first)) => {
                Io::err(control(&self.name, ErrorKind::Io, format!("I/O error occurred: {first}")))
            }
            (_, None) => Io::ok(()),
        }
    }
}
