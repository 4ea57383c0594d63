//! The options of a quorum as command lines write them, flattened to pairs of a dotted name and
//! a value (spec: quorum, options; series v3, section 3).
//!
//! | name | value |
//! |---|---|
//! | `vote-threshold` | number; 1 if missing and the read pattern is `fifo` |
//! | `read-pattern` | `quorum` (default) or `fifo` |
//! | `blkverify`, `rewrite-corrupted` | `on` or `off` (default) |
//! | `children.N` | the name of a node |
//! | `children.N.ignore-errors` | `on` or `off` (default); for children that are described |
//! | `children.N.…` | whatever describes child N, for whoever opens it |
//!
//! Of an option that is written twice the last value holds. Other options come back as they are.
//!
//! ```
//! use brep_quorum::option_text::{ChildSource, QuorumText};
//!
//! let line = "read-pattern=fifo,children.0=disk0,children.1.driver=nbd,children.1.host=peer,\
//!             children.1.ignore-errors=on";
//! let pairs: Vec<_> = line.split(',').filter_map(|pair| pair.split_once('=')).collect();
//! let text = QuorumText::parse(&pairs)?;
//! assert_eq!(text.settings.vote_threshold, 1);
//! assert_eq!(text.children[0].source, ChildSource::Reference("disk0".into()));
//! assert!(text.children[1].ignore_errors);
//! # Ok::<(), brep_quorum::QuorumError>(())
//! ```
use std::collections::BTreeMap;

use crate::{QuorumError, ReadPattern, Settings};

/// What an option string says of a quorum. Nothing is opened yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuorumText {
    /// What it demands of its children, which are enough for it.
    pub settings: Settings,
    /// The children in order, at least one.
    pub children: Vec<ChildText>,
    /// Options that are none of a quorum's (`driver`, `id`, …), in their order.
    pub rest: Vec<(String, String)>,
}

/// What an option string says of one child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildText {
    /// Which device it is.
    pub source: ChildSource,
    /// See [`Child::ignore_errors`](crate::Child).
    pub ignore_errors: bool,
}

/// Where a child's device comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildSource {
    /// It is there already, under this name.
    Reference(String),
    /// It is to be opened; these are the options below `children.N.`, in their order.
    Inline(Vec<(String, String)>),
}

impl QuorumText {
    /// Takes the options of a quorum out of `pairs`.
    ///
    /// # Errors
    /// The first rule that is broken, as far as it shows in the text. Whether a child's own
    /// options make sense is for whoever opens it.
    pub fn parse<K: AsRef<str>, V: AsRef<str>>(pairs: &[(K, V)]) -> Result<Self, QuorumError> {
        let mut own = BTreeMap::new();
        let mut groups = BTreeMap::new();
        let mut rest = Vec::new();
        for (key, value) in pairs {
            let (key, value) = (key.as_ref(), value.as_ref());
            if OWN.contains(&key) {
                own.insert(key, value);
            } else if key == CHILDREN {
                return Err(QuorumError::ChildrenArray);
            } else if let Some(path) = key.strip_prefix(CHILDREN).and_then(|k| k.strip_prefix('.'))
            {
                let (index, option) = split_index(path).ok_or(QuorumError::ChildrenArray)?;
                let group: &mut Group<'_> = groups.entry(index).or_default();
                group.add(option, value);
            } else {
                rest.push((key.to_owned(), value.to_owned()));
            }
        }
        if groups.keys().copied().ne(0..groups.len()) {
            return Err(QuorumError::ChildrenArray);
        }
        let children: Vec<_> =
            groups.iter().map(|(index, group)| group.child(*index)).collect::<Result<_, _>>()?;
        let settings = settings(&own)?;
        settings.check(children.len())?;
        Ok(QuorumText { settings, children, rest })
    }
}

const CHILDREN: &str = "children";
const THRESHOLD: &str = "vote-threshold";
const PATTERN: &str = "read-pattern";
const BLKVERIFY: &str = "blkverify";
const REWRITE: &str = "rewrite-corrupted";
const IGNORE_ERRORS: &str = "ignore-errors";
const OWN: [&str; 4] = [THRESHOLD, PATTERN, BLKVERIFY, REWRITE];

/// `N` or `N.option`, with N as one writes a number.
fn split_index(path: &str) -> Option<(usize, Option<&str>)> {
    let (digits, option) = match path.split_once('.') {
        Some((_, "")) => return None,
        Some((digits, option)) => (digits, Some(option)),
        None => (path, None),
    };
    let index: usize = digits.parse().ok()?;
    // No sign, no zeroes in front: two texts must not mean one child.
    (index.to_string() == digits).then_some((index, option))
}

/// What is written of one child.
#[derive(Default)]
struct Group<'a> {
    reference: Option<&'a str>,
    ignore_errors: Option<&'a str>,
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Group<'a> {
    fn add(&mut self, option: Option<&'a str>, value: &'a str) {
        match option {
            None => self.reference = Some(value),
            Some(IGNORE_ERRORS) => self.ignore_errors = Some(value),
            Some(option) => self.options.push((option, value)),
        }
    }

    fn child(&self, index: usize) -> Result<ChildText, QuorumError> {
        if let Some(name) = self.reference {
            // A node that exists was not opened for this quorum: how it fails is not ours to say.
            if self.ignore_errors.is_some() || !self.options.is_empty() {
                return Err(QuorumError::ReferenceWithOptions(format!("{CHILDREN}.{index}")));
            }
            let source = ChildSource::Reference(name.to_owned());
            return Ok(ChildText { source, ignore_errors: false });
        }
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let source = ChildSource::Inline(self.options.iter().map(owned).collect());
        let ignore_errors = self.ignore_errors.map_or(Ok(false), |text| on(IGNORE_ERRORS, text))?;
        Ok(ChildText { source, ignore_errors })
    }
}

fn settings(own: &BTreeMap<&str, &str>) -> Result<Settings, QuorumError> {
    let switch = |name| own.get(name).map_or(Ok(false), |text| on(name, text));
    let read_pattern = own.get(PATTERN).map_or(Ok(ReadPattern::default()), |text| text.parse());
    let vote_threshold = match own.get(THRESHOLD) {
        Some(text) => number(THRESHOLD, text)?,
        // The original's command lines do without; it then let every write succeed.
        None if matches!(read_pattern, Ok(ReadPattern::Fifo)) => 1,
        None => 0,
    };
    Ok(Settings {
        vote_threshold,
        read_pattern: read_pattern?,
        blkverify: switch(BLKVERIFY)?,
        rewrite_corrupted: switch(REWRITE)?,
    })
}

/// A number; one below zero counts as zero, one beyond all bounds as the largest.
fn number(name: &'static str, text: &str) -> Result<usize, QuorumError> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(QuorumError::NotANumber(name));
    }
    if negative {
        return Ok(0);
    }
    // Of digits alone only too many do not parse.
    Ok(digits.parse().unwrap_or(usize::MAX))
}

fn on(name: &'static str, text: &str) -> Result<bool, QuorumError> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(QuorumError::NotABool(name)),
    }
}
