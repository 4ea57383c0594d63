//! Checking and repairing (specification §12).
//!
//! References are counted from the mapping, then compared with the refcounts of the file. Every
//! L2 table is read once, however often it is referred to, so that the time is bounded by the
//! length of the file.

mod counts;
mod refcounts;
mod scan;

use std::collections::BTreeMap;
use std::sync::Arc;

use brep_block::{BlockDevice, Error, ErrorKind, FlushLevel, Operation};
use bytes::Bytes;

use crate::OpenError;
use crate::file::File;
use crate::geometry::Geometry;
use crate::header::{Header, Purpose, field, incompatible};
use counts::Counts;

/// Findings that are reported in words.
const MESSAGES_MAX: usize = 100;

/// What a check may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckMode {
    /// Nothing.
    Report,
    /// Refcounts that are too high.
    RepairLeaks,
    /// Everything that can be repaired without guessing: refcounts (the whole structure is built
    /// anew if need be), flags that follow from them, and zero clusters with a bad preallocation.
    RepairAll,
}

/// What a check has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Errors that endanger data, and that were not repaired.
    pub corruptions: u64,
    /// Clusters that are counted too often, which wastes space, and that were not repaired.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Errors that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Guest clusters that have a host cluster.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_offset: u64,
    /// The first findings in words.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Neither corruptions, nor leaks, nor anything that could not be checked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

/// Checks the image in `file`, which nobody else has open, and repairs what `mode` says.
///
/// Counts are only lowered if every reference could be followed. After a repair that leaves
/// neither corruptions nor check errors the dirty and corrupt bits are cleared.
///
/// # Errors
/// The header is unusable, or the file fails.
pub async fn check(file: &Arc<dyn BlockDevice>, mode: CheckMode) -> Result<CheckReport, OpenError> {
    let name = file.name().to_owned();
    let file = File::new(Arc::clone(file));
    if mode != CheckMode::Report && file.read_only() {
        let what = "the file is read-only, the image was to be repaired";
        return Err(Error::new(Operation::Open, ErrorKind::ReadOnly, name, what).into());
    }
    let header = crate::open::read_header(&file, &name, Purpose::Check).await?;
    let mut checker = Checker::new(file, header, mode);
    checker.scan().await?;
    checker.compare().await?;
    checker.check_copied().await?;
    checker.finish().await?;
    Ok(checker.report)
}

struct Checker {
    file: File,
    file_clusters: u64,
    g: Geometry,
    header: Header,
    mode: CheckMode,
    report: CheckReport,
    counts: Counts,
    l1: Vec<u64>,
    /// By host offset of the table.
    l2: BTreeMap<u64, L2Use>,
    refcount_table: Vec<u64>,
    /// Some references could not be followed, so that counts may be too low.
    blind: bool,
    /// The refcount structure itself is damaged.
    rebuild: bool,
    /// Corruptions that this damage amounts to.
    structural: u64,
    /// Clusters of refcount blocks, once per table entry.
    blocks: Vec<u64>,
}

/// Who refers to an L2 table.
#[derive(Debug, Clone, Copy, Default)]
struct L2Use {
    references: u32,
    /// Among them the active L1 table.
    active: bool,
}

impl Checker {
    fn new(file: File, header: Header, mode: CheckMode) -> Self {
        let g = header.geometry;
        let report = CheckReport { total_clusters: g.clusters(header.size), ..Default::default() };
        Checker {
            file_clusters: g.clusters(file.size()),
            file,
            g,
            header,
            mode,
            report,
            counts: Counts::default(),
            l1: Vec::new(),
            l2: BTreeMap::new(),
            refcount_table: Vec::new(),
            blind: false,
            rebuild: false,
            structural: 0,
            blocks: Vec::new(),
        }
    }

    fn say(&mut self, what: String) {
        if self.report.messages.len() < MESSAGES_MAX {
            self.report.messages.push(what);
        }
    }

    fn corruption(&mut self, what: String) {
        self.report.corruptions += 1;
        self.say(what);
    }

    /// Damage of the refcount structure, which building it anew repairs.
    fn structural(&mut self, what: String) {
        self.rebuild = true;
        self.structural += 1;
        self.corruption(what);
    }

    /// Moves a corruption that was found to those that were repaired.
    fn fixed(&mut self) {
        self.report.corruptions -= 1;
        self.report.corruptions_fixed += 1;
    }

    /// After a successful repair nothing is wrong any more.
    async fn finish(&mut self) -> Result<(), OpenError> {
        self.report.image_end_offset = self.counts.end() << self.g.cluster_bits;
        if self.mode == CheckMode::Report {
            return Ok(());
        }
        let bits = incompatible::DIRTY | incompatible::CORRUPT;
        let healthy = self.report.corruptions == 0 && self.report.check_errors == 0;
        self.file.flush(FlushLevel::Durable).await?;
        if healthy && self.header.incompatible & bits != 0 {
            let cleared = (self.header.incompatible & !bits).to_be_bytes();
            self.file.write(field::INCOMPATIBLE, Bytes::copy_from_slice(&cleared)).await?;
            self.file.flush(FlushLevel::Durable).await?;
        }
        Ok(())
    }
}
