use std::sync::{Arc, MutexGuard, PoisonError};

use brep_block::{Error, ErrorKind, Io, Operation, Replication, ReplicationMode, Result};

use crate::ReadPattern;
use crate::members::Member;
use crate::quorum::{Quorum, Shared};

/// The quorum as the controller of the one child that replicates (spec: series v3, section 6).
impl Replication for Quorum {
    fn start(&self, mode: ReplicationMode) -> Io<'_, ()> {
        Io::future(self.shared.start(mode))
    }

    fn checkpoint(&self) -> Io<'_, ()> {
        Io::future(async {
            let member = self.shared.running()?;
            self.shared.calls_of(&member)?.checkpoint().await
        })
    }

    /// Replication counts as ended even if the child reports an error.
    fn stop(&self, failover: bool) -> Io<'_, ()> {
        Io::future(async move {
            let member = self.shared.running()?;
            let result = match self.shared.calls_of(&member) {
                Ok(calls) => calls.stop(failover).await,
                Err(error) => Err(error),
            };
            *self.shared.replicating() = None;
            result
        })
    }

    fn error(&self) -> Io<'_, ()> {
        Io::future(async {
            let member = self.shared.running()?;
            self.shared.calls_of(&member)?.error().await
        })
    }
}

impl Shared {
    async fn start(&self, mode: ReplicationMode) -> Result<()> {
        if mode != ReplicationMode::Primary {
            let why = "The replication mode for quorum should be 'primary'";
            return Err(self.refused(ErrorKind::InvalidInput, why));
        }
        if self.settings.read_pattern != ReadPattern::Fifo {
            let why = "Block replication needs read pattern 'fifo'";
            return Err(self.refused(ErrorKind::InvalidInput, why));
        }
        let list = self.members.list();
        let mut started = Vec::new();
        for member in list.iter() {
            let Some(calls) = member.device.replication() else { continue };
            match calls.start(mode).await {
                Ok(()) => started.push(member),
                Err(error) => tracing::debug!(quorum = %self.name, %error, "child not started"),
            }
        }
        match started[..] {
            [] => Err(self.refused(ErrorKind::Unsupported, "No child supports block replication")),
            [member] => {
                *self.replicating() = Some(Arc::clone(member));
                Ok(())
            }
            _ => {
                self.stop_all(&list).await;
                let why = "Too many children support block replication";
                Err(self.refused(ErrorKind::Unsupported, why))
            }
        }
    }

    async fn stop_all(&self, list: &[Arc<Member>]) {
        for calls in list.iter().filter_map(|member| member.device.replication()) {
            if let Err(error) = calls.stop(false).await {
                tracing::debug!(quorum = %self.name, %error, "child not stopped");
            }
        }
    }

    fn running(&self) -> Result<Arc<Member>> {
        let member = self.replicating().clone();
        member.ok_or_else(|| {
            self.refused(ErrorKind::InvalidInput, "Block replication is not running")
        })
    }

    fn calls_of<'a>(&self, member: &'a Member) -> Result<&'a dyn Replication> {
        member.device.replication().ok_or_else(|| {
            self.refused(ErrorKind::Unsupported, "The child no longer supports block replication")
        })
    }

    fn refused(&self, kind: ErrorKind, why: &str) -> Error {
        Error::new(Operation::Control, kind, &self.name, why)
    }

    pub(crate) fn replicating(&self) -> MutexGuard<'_, Option<Arc<Member>>> {
        self.replicating.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
