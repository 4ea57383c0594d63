use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use brep_block::{BlockDevice, Error, ErrorKind, Operation};

use crate::{EventSink, QuorumError};

/// How reads are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadPattern {
    /// Every child is read, and they vote.
    #[default]
    Quorum,
    /// Children are tried in order; the first success is the answer.
    Fifo,
}

impl FromStr for ReadPattern {
    type Err = QuorumError;

    fn from_str(text: &str) -> Result<Self, QuorumError> {
        match text {
            "quorum" => Ok(ReadPattern::Quorum),
            "fifo" => Ok(ReadPattern::Fifo),
            _ => Err(QuorumError::UnknownReadPattern),
        }
    }
}

/// A device to be made a child. The quorum names its children itself: `children.0`,
/// `children.1`, …
#[derive(Debug, Clone)]
pub struct Child {
    /// The device.
    pub device: Arc<dyn BlockDevice>,
    /// Its failures are expected: they are not reported, its flush counts as successful, and as
    /// long as it reports a size of 0 it has no say in the size. Its failures still are no
    /// successes for the threshold.
    pub ignore_errors: bool,
}

impl Child {
    /// A child whose failures are reported.
    #[must_use]
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Child { device, ignore_errors: false }
    }

    /// The same, with failures expected.
    #[must_use]
    pub fn ignore_errors(mut self) -> Self {
        self.ignore_errors = true;
        self
    }
}

/// What a [`Quorum`](crate::Quorum) demands of its children (spec: quorum, options).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How many children must succeed, or agree. 1 to the number of children.
    pub vote_threshold: usize,
    /// How reads are answered.
    pub read_pattern: ReadPattern,
    /// Compare both children on every read, and fail a read that finds a difference. Needs two
    /// children and a threshold of 2; without effect with [`ReadPattern::Fifo`].
    pub blkverify: bool,
    /// Write what won a vote to the children that lost it. Without effect with
    /// [`ReadPattern::Fifo`].
    pub rewrite_corrupted: bool,
}

impl Settings {
    /// Voting reads, nothing repaired.
    #[must_use]
    pub fn new(vote_threshold: usize) -> Self {
        Settings {
            vote_threshold,
            read_pattern: ReadPattern::Quorum,
            blkverify: false,
            rewrite_corrupted: false,
        }
    }

    /// Whether so many children can do it.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self, children: usize) -> Result<(), QuorumError> {
        if children == 0 {
            return Err(QuorumError::NoChildren);
        }
        if self.vote_threshold < 1 {
            return Err(QuorumError::ThresholdTooLow);
        }
        if self.vote_threshold > children {
            return Err(QuorumError::ThresholdTooHigh);
        }
        if self.compares() {
            if children != 2 || self.vote_threshold != 2 {
                return Err(QuorumError::BlkverifyChildren);
            }
            if self.rewrite_corrupted {
                return Err(QuorumError::BlkverifyRewrite);
            }
        }
        Ok(())
    }

    /// Whether `rewrite_corrupted` has an effect.
    pub(crate) fn repairs(&self) -> bool {
        self.rewrite_corrupted && self.read_pattern == ReadPattern::Quorum
    }

    /// Whether `blkverify` has an effect.
    pub(crate) fn compares(&self) -> bool {
        self.blkverify && self.read_pattern == ReadPattern::Quorum
    }
}

/// How a [`Quorum`](crate::Quorum) works.
#[derive(Clone)]
pub struct QuorumOptions {
    /// The name under which errors and events speak of the quorum.
    pub name: String,
    /// The children, in order.
    pub children: Vec<Child>,
    /// What it demands of them.
    pub settings: Settings,
    /// Carry a discard out as a write of zeroes that may unmap, so that the children stay equal:
    /// what a discarded range reads as is up to each device. On by default.
    pub discard_as_zeroes: bool,
    /// Let requests that overlap wait for each other, so that every child sees them in the same
    /// order. On by default; for whoever serialises above the quorum.
    pub serialise_overlaps: bool,
    /// Who is told of failures.
    pub events: Option<Arc<dyn EventSink>>,
}

impl QuorumOptions {
    /// Voting reads, nothing repaired, nobody told.
    #[must_use]
    pub fn new(name: impl Into<String>, vote_threshold: usize, children: Vec<Child>) -> Self {
        QuorumOptions {
            name: name.into(),
            children,
            settings: Settings::new(vote_threshold),
            discard_as_zeroes: true,
            serialise_overlaps: true,
            events: None,
        }
    }

    /// The same with another read pattern.
    #[must_use]
    pub fn read_pattern(mut self, read_pattern: ReadPattern) -> Self {
        self.settings.read_pattern = read_pattern;
        self
    }

    /// The same with other demands, for example those of an option string.
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// The same with somebody to be told of failures.
    #[must_use]
    pub fn events(mut self, sink: impl EventSink + 'static) -> Self {
        self.events = Some(Arc::new(sink));
        self
    }

    pub(crate) fn check(&self) -> Result<(), QuorumError> {
        self.settings.check(self.children.len())?;
        self.check_parents()?;
        common_size(&self.name, &self.children).map(drop).map_err(QuorumError::Size)
    }

    fn check_parents(&self) -> Result<(), QuorumError> {
        for (i, child) in self.children.iter().enumerate() {
            if self.children[..i].iter().any(|c| Arc::ptr_eq(&c.device, &child.device)) {
                return Err(QuorumError::HasParent(child.device.name().to_owned()));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for QuorumOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuorumOptions")
            .field("name", &self.name)
            .field("children", &self.children)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// The size on which all children agree that have a say.
fn common_size(name: &str, children: &[Child]) -> Result<u64, Error> {
    let mut common = None;
    for child in children {
        let size = child.device.size();
        if size == 0 && child.ignore_errors {
            continue;
        }
        if *common.get_or_insert(size) != size {
            let why = format!("the size of {} differs: {size} bytes", child.device.name());
            return Err(Error::new(Operation::Open, ErrorKind::Io, name, why));
        }
    }
    common
        .ok_or_else(|| Error::new(Operation::Open, ErrorKind::Io, name, "no child knows the size"))
}
