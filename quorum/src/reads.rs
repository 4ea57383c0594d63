use std::sync::Arc;

use brep_block::{
    BlockStatus, Error, ErrorKind, LockMode, Operation, Result, StatusFlags, WriteFlags,
};
use bytes::Bytes;

use crate::ReadPattern;
use crate::events::QuorumOperation;
use crate::join::join;
use crate::members::{Member, Ticket};
use crate::quorum::Shared;
use crate::tally::{Version, versions, winner};

impl Shared {
    pub(crate) async fn read(self: &Arc<Self>, offset: u64, len: usize) -> Result<Bytes> {
        let ticket = Ticket::new(&self.members).await;
        match self.settings.read_pattern {
            ReadPattern::Fifo => self.read_fifo(&ticket.list, offset, len).await,
            ReadPattern::Quorum => self.read_voting(&ticket.list, offset, len).await,
        }
    }

    async fn read_fifo(&self, list: &[Arc<Member>], offset: u64, len: usize) -> Result<Bytes> {
        let bytes = len as u64;
        let mut last = None;
        for member in list {
            match member.device.read(offset, len).await {
                Ok(data) => return Ok(data),
                Err(error) => {
                    self.report_read(member, &error, offset, bytes);
                    last = Some(error);
                }
            }
        }
        Err(self.too_few(last.into_iter().collect(), Operation::Read, offset, bytes))
    }

    async fn read_voting(
        self: &Arc<Self>,
        list: &[Arc<Member>],
        offset: u64,
        len: usize,
    ) -> Result<Bytes> {
        let bytes = len as u64;
        // A write in between would make equal children differ, and a rewrite undo the write.
        let _guard = match &self.locks {
            Some(locks) => Some(locks.lock(offset..offset + bytes, LockMode::Shared).await),
            None => None,
        };
        let calls = list.iter().map(|member| member.device.read(offset, len)).collect();
        let mut contents = Vec::with_capacity(list.len());
        let mut errors = Vec::new();
        for (index, result) in join(calls).await.into_iter().enumerate() {
            match result {
                Ok(data) => contents.push((index, data)),
                Err(error) => {
                    self.report_read(&list[index], &error, offset, bytes);
                    errors.push(error);
                }
            }
        }
        if contents.len() < self.settings.vote_threshold {
            self.events.failure(&self.name, offset, bytes);
            return Err(self.too_few(errors, Operation::Read, offset, bytes));
        }
        self.vote(list, contents, offset, bytes).await
    }

    /// Contents of at least as many children as the threshold says.
    async fn vote(
        &self,
        list: &[Arc<Member>],
        contents: Vec<(usize, Bytes)>,
        offset: u64,
        len: u64,
    ) -> Result<Bytes> {
        // At least one, because the threshold is at least 1.
        let (_, first) = &contents[0];
        if contents.iter().all(|(_, data)| data == first) {
            return Ok(first.clone());
        }
        if self.settings.blkverify {
            self.events.failure(&self.name, offset, len);
            return Err(self.mismatch(&contents, offset, len));
        }
        let versions = versions(contents);
        let best =
            winner(&versions).filter(|&i| versions[i].voters.len() >= self.settings.vote_threshold);
        let Some(best) = best else {
            self.events.failure(&self.name, offset, len);
            let why = "too few children agree on the content";
            return Err(Error::new(Operation::Read, ErrorKind::Io, &self.name, why).at(offset, len));
        };
        let elected = versions[best].content.clone();
        self.settle(list, &versions, best, &elected, offset).await;
        Ok(elected)
    }

    /// Reports the children that were outvoted and repairs them, if that is wanted.
    async fn settle(
        &self,
        list: &[Arc<Member>],
        versions: &[Version],
        best: usize,
        elected: &Bytes,
        offset: u64,
    ) {
        let outvoted = versions.iter().enumerate().filter(|(i, _)| *i != best);
        let outvoted = outvoted.flat_map(|(_, version)| &version.voters);
        let losers: Vec<_> = outvoted.filter_map(|&index| list.get(index)).collect();
        for member in &losers {
            let len = elected.len() as u64;
            self.events.bad(QuorumOperation::Read, member.device.name(), None, offset, len);
        }
        if self.settings.rewrite_corrupted {
            let mut calls = Vec::with_capacity(losers.len());
            for member in losers {
                calls.push(member.device.write(offset, elected.clone(), WriteFlags::default()));
            }
            let results = join(calls).await;
            for error in results.into_iter().filter_map(Result::err) {
                tracing::warn!(quorum = %self.name, %error, "an outvoted child was not repaired");
            }
        }
    }

    fn mismatch(&self, contents: &[(usize, Bytes)], offset: u64, len: u64) -> Error {
        let equal = match contents {
            [(_, a), (_, b), ..] => a.iter().zip(b).take_while(|(a, b)| a == b).count() as u64,
            _ => 0,
        };
        let why = format!("contents mismatch at offset {}", offset + equal);
        Error::new(Operation::Read, ErrorKind::Corrupt, &self.name, why).at(offset, len)
    }

    fn report_read(&self, member: &Member, error: &Error, offset: u64, len: u64) {
        if !member.ignore_errors {
            let node = member.device.name();
            self.events.bad(QuorumOperation::Read, node, Some(error), offset, len);
        }
    }

    /// Data if any child has data, zero if all are zero. Children whose errors are ignored are
    /// not asked as long as there are others: a peer that hangs must not delay the answer.
    pub(crate) async fn block_status(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
    ) -> Result<BlockStatus> {
        let ticket = Ticket::new(&self.members).await;
        let mut asked: Vec<_> = ticket.list.iter().filter(|m| !m.ignore_errors).collect();
        if asked.is_empty() {
            asked = ticket.list.iter().collect();
        }
        let calls = asked.iter().map(|m| m.device.block_status(offset, len)).collect();
        let mut failed = false;
        let mut answers = Vec::with_capacity(asked.len());
        for (member, result) in asked.iter().zip(join(calls).await) {
            match result {
                Ok(status) => answers.push(status),
                Err(error) => {
                    self.report_read(member, &error, offset, len);
                    failed = true;
                }
            }
        }
        let flags = StatusFlags { data: true, zero: false, allocated: true };
        if failed {
            return Ok(BlockStatus { len, flags });
        }
        Ok(merge(&answers, len).unwrap_or(BlockStatus { len, flags }))
    }
}

/// The common status; `None` if there are no answers.
fn merge(answers: &[BlockStatus], len: u64) -> Option<BlockStatus> {
    let lens = |zero| answers.iter().filter(move |s| s.flags.zero == zero).map(|s| s.len);
    if let Some(longest) = lens(false).max() {
        let flags = StatusFlags { data: true, zero: false, allocated: true };
        return Some(BlockStatus { len: longest.clamp(1, len), flags });
    }
    let data = answers.iter().any(|status| status.flags.data);
    let flags = StatusFlags { data, zero: true, allocated: true };
    lens(true).min().map(|shortest| BlockStatus { len: shortest.clamp(1, len), flags })
}
