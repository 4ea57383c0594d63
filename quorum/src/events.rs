use std::fmt;
use std::sync::Arc;

use crate::rate_limit::RateLimit;

/// What a child was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuorumOperation {
    /// Reading, or answering for its block status.
    Read,
    /// Writing, also of zeroes, and discarding.
    Write,
    /// Flushing.
    Flush,
}

/// As events name it: `read`, `write`, `flush`.
impl fmt::Display for QuorumOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            QuorumOperation::Read => "read",
            QuorumOperation::Write => "write",
            QuorumOperation::Flush => "flush",
        })
    }
}

/// Something that an operator should know (spec: quorum, events). Sectors have 512 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QuorumEvent {
    /// `QUORUM_REPORT_BAD`: a child failed, or was outvoted.
    ReportBad {
        /// What it was doing.
        operation: QuorumOperation,
        /// Why it failed; `None` if it was outvoted.
        error: Option<String>,
        /// The name of the child's device.
        node_name: String,
        /// First sector; 0 for a flush.
        sector_num: u64,
        /// Number of sectors; 0 for a flush.
        sectors_count: u64,
    },
    /// `QUORUM_FAILURE`: too few children succeeded or agreed.
    Failure {
        /// The name of the quorum.
        reference: String,
        /// First sector.
        sector_num: u64,
        /// Number of sectors.
        sectors_count: u64,
    },
}

/// Takes events. Called on the data path: must not block.
pub trait EventSink: Send + Sync {
    /// An event, at most one per second of each kind and node.
    fn emit(&self, event: QuorumEvent);
}

impl<F: Fn(QuorumEvent) + Send + Sync> EventSink for F {
    fn emit(&self, event: QuorumEvent) {
        self(event);
    }
}

/// Sends the first event of a kind and node at once, and then at most one per second: the last
/// one, when the second is over.
#[derive(Clone)]
pub(crate) struct Events(Option<RateLimit<Key, QuorumEvent>>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Bad(String),
    Failure,
}

impl Events {
    pub(crate) fn new(sink: Option<Arc<dyn EventSink>>) -> Self {
        Events(sink.map(|sink| RateLimit::new(move |event| sink.emit(event))))
    }

    pub(crate) fn bad(
        &self,
        operation: QuorumOperation,
        node: &str,
        error: Option<&brep_block::Error>,
        offset: u64,
        len: u64,
    ) {
        let Some(limiter) = &self.0 else { return };
        let (sector_num, sectors_count) = sectors(offset, len);
        let event = QuorumEvent::ReportBad {
            operation,
            error: error.map(ToString::to_string),
            node_name: node.to_owned(),
            sector_num,
            sectors_count,
        };
        limiter.send(Key::Bad(node.to_owned()), event);
    }

    pub(crate) fn failure(&self, quorum: &str, offset: u64, len: u64) {
        let Some(limiter) = &self.0 else { return };
        let (sector_num, sectors_count) = sectors(offset, len);
        let reference = quorum.to_owned();
        limiter.send(Key::Failure, QuorumEvent::Failure { reference, sector_num, sectors_count });
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

/// First sector, and the number of sectors up to the end of the range.
fn sectors(offset: u64, len: u64) -> (u64, u64) {
    let first = offset / 512;
    (first, offset.saturating_add(len).div_ceil(512) - first)
}
