use std::sync::Arc;

use brep_block::{
    BlockDevice, Error, ErrorKind, FlushLevel, Io, LockMode, Operation, Result, WriteFlags,
    ZeroFlags,
};
use bytes::Bytes;

use crate::events::QuorumOperation;
use crate::join::join;
use crate::members::{Member, Ticket};
use crate::quorum::Shared;
use crate::tally::most_frequent;

/// A request that changes content.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Write(Bytes, WriteFlags),
    Zeroes(ZeroFlags),
    Discard,
}

impl Change {
    pub(crate) fn operation(&self) -> Operation {
        match self {
            Change::Write(..) => Operation::Write,
            Change::Zeroes(_) => Operation::WriteZeroes,
            Change::Discard => Operation::Discard,
        }
    }

    fn call<'a>(&self, device: &'a dyn BlockDevice, offset: u64, len: u64) -> Io<'a, ()> {
        match self {
            Change::Write(data, flags) => device.write(offset, data.clone(), *flags),
            Change::Zeroes(flags) => device.write_zeroes(offset, len, *flags),
            Change::Discard => device.discard(offset, len),
        }
    }

    /// The same without the demand to be fast, if it has one.
    fn slow(&self) -> Option<Change> {
        match self {
            Change::Zeroes(flags) if flags.fast => {
                Some(Change::Zeroes(ZeroFlags { fast: false, ..*flags }))
            }
            _ => None,
        }
    }
}

impl Shared {
    pub(crate) async fn change(
        self: Arc<Self>,
        offset: u64,
        len: u64,
        change: Change,
    ) -> Result<()> {
        let ticket = Ticket::new(&self.members).await;
        let _guard = match &self.locks {
            Some(locks) => Some(locks.lock(offset..offset + len, LockMode::Exclusive).await),
            None => None,
        };
        let slow = change.slow();
        if slow.is_some() && !ticket.list.iter().all(|m| m.device.limits().fast_zero) {
            return Err(self.not_fast(offset, len));
        }
        // Every child is called, in order, before the first is awaited: calling starts.
        let calls = ticket.list.iter().map(|m| change.call(&*m.device, offset, len)).collect();
        let mut results = join(calls).await;
        if let Some(slow) = slow {
            self.catch_up(&ticket.list, &slow, &mut results, offset, len).await?;
        }
        self.decide(&ticket.list, results, change.operation(), offset, len)
    }

    /// Children that could not be fast follow those that could: either all change or none.
    async fn catch_up(
        &self,
        list: &[Arc<Member>],
        slow: &Change,
        results: &mut [Result<()>],
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let refused = |result: &Result<()>| {
            result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported)
        };
        if results.iter().all(refused) {
            return Err(self.not_fast(offset, len));
        }
        for (member, result) in list.iter().zip(results).filter(|(_, result)| refused(result)) {
            *result = slow.call(&*member.device, offset, len).await;
        }
        Ok(())
    }

    fn not_fast(&self, offset: u64, len: u64) -> Error {
        let why = "not every child can do it fast";
        Error::new(Operation::WriteZeroes, ErrorKind::Unsupported, &self.name, why).at(offset, len)
    }

    /// Reports who failed, and compares the successes with the threshold.
    fn decide(
        &self,
        list: &[Arc<Member>],
        results: Vec<Result<()>>,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let total = results.len();
        let mut errors = Vec::new();
        for (member, result) in list.iter().zip(results) {
            if let Err(error) = result {
                if !member.ignore_errors {
                    let node = member.device.name();
                    self.events.bad(QuorumOperation::Write, node, Some(&error), offset, len);
                }
                errors.push(error);
            }
        }
        if total - errors.len() >= self.settings.vote_threshold {
            return Ok(());
        }
        self.events.failure(&self.name, offset, len);
        Err(self.too_few(errors, operation, offset, len))
    }

    /// The error of an operation in which too few children succeeded.
    pub(crate) fn too_few(
        &self,
        errors: Vec<Error>,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> Error {
        match most_frequent(errors) {
            Some(error) => error.within(operation, &self.name, offset, len),
            None => {
                Error::new(operation, ErrorKind::Io, &self.name, "too few children").at(offset, len)
            }
        }
    }

    /// A child whose errors are ignored counts as flushed.
    pub(crate) async fn flush(self: Arc<Self>, level: FlushLevel) -> Result<()> {
        let ticket = Ticket::new(&self.members).await;
        let calls = ticket.list.iter().map(|member| member.device.flush(level)).collect();
        let results = join(calls).await;
        let total = results.len();
        let mut errors = Vec::new();
        for (member, result) in ticket.list.iter().zip(results) {
            if let Err(error) = result
                && !member.ignore_errors
            {
                let node = member.device.name();
                self.events.bad(QuorumOperation::Flush, node, Some(&error), 0, 0);
                errors.push(error);
            }
        }
        if total - errors.len() >= self.settings.vote_threshold {
            return Ok(());
        }
        Err(self.too_few(errors, Operation::Flush, 0, 0))
    }
}
