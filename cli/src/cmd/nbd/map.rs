//! The state of every range of an export, as a server tells it.
use std::collections::BTreeMap;

use brep_block::BlockDevice;
use brep_nbd::client::Connection;
use brep_nbd::proto::client::Extent;
use brep_nbd::proto::wire::BASE_ALLOCATION;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::output;

/// Bytes that share their state in every context.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    offset: u64,
    len: u64,
    /// One for each context.
    states: Vec<u64>,
}

/// Most states that are told apart when bytes are added up: a server may invent ever new ones.
const STATES_MAX: usize = 1 << 16;

/// How many bytes are in each state.
#[derive(Debug, Default)]
struct Totals(BTreeMap<Vec<u64>, u64>);

impl Totals {
    fn add(&mut self, len: u64, states: &[u64]) -> Result<(), Failure> {
        if let Some(sum) = self.0.get_mut(states) {
            *sum += len;
            return Ok(());
        }
        if self.0.len() == STATES_MAX {
            return Err(Failure::failed(format!(
                "the server tells of more than {STATES_MAX} different states: they are not added \
                 up; try without --totals"
            )));
        }
        self.0.insert(states.to_vec(), len);
        Ok(())
    }
}

/// Prints the runs of an export in the meta contexts that it was connected with, or what they add
/// up to.
pub(super) async fn show(disk: &Connection, totals: bool, json: bool) -> Result<(), Failure> {
    let contexts = disk.contexts().iter().map(|context| context.name.clone()).collect();
    let mut sums = totals.then(Totals::default);
    let mut printer = Printer { contexts, json, begun: false };
    let mut open: Option<Run> = None;
    let mut offset = 0;
    while offset < disk.size() {
        let found = disk.start_meta_status(offset, disk.size() - offset).await?;
        for (len, states) in together(&found) {
            match (&mut sums, &mut open) {
                (Some(sums), _) => sums.add(len, &states)?,
                (None, Some(run)) if run.states == states => run.len += len,
                (None, open) => {
                    if let Some(run) = open.replace(Run { offset, len, states }) {
                        printer.run(&run)?;
                    }
                }
            }
            offset += len;
        }
    }
    for (states, sum) in sums.iter().flat_map(|sums| &sums.0) {
        printer.total(states, *sum, disk.size())?;
    }
    if let Some(run) = open {
        printer.run(&run)?;
    }
    printer.end()
}

/// As far as all contexts reach: lengths, and the states that they share there.
fn together(contexts: &[Vec<Extent>]) -> Vec<(u64, Vec<u64>)> {
    let mut rest: Vec<_> = contexts.iter().map(|extents| extents.iter().copied()).collect();
    let mut current: Vec<_> = rest.iter_mut().map(Iterator::next).collect();
    let mut runs = Vec::new();
    while let Some(extents) = current.iter().copied().collect::<Option<Vec<Extent>>>() {
        let Some(len) = extents.iter().map(|extent| extent.len).min() else { break };
        runs.push((len, extents.iter().map(|extent| extent.flags).collect()));
        for (extent, rest) in current.iter_mut().zip(&mut rest) {
            match extent {
                Some(extent) if extent.len > len => extent.len -= len,
                extent => *extent = rest.next(),
            }
        }
    }
    runs
}

/// Prints line by line: an export may have more runs than fit into memory.
struct Printer {
    contexts: Vec<String>,
    json: bool,
    begun: bool,
}

impl Printer {
    fn run(&mut self, run: &Run) -> Result<(), Failure> {
        let Run { offset, len, states } = run;
        if self.json {
            return self.item(json!({ "offset": offset, "length": len }), states);
        }
        output::line(format!("{offset:>16} {len:>16} {}", self.text(states)).trim_end())
    }

    fn total(&mut self, states: &[u64], len: u64, size: u64) -> Result<(), Failure> {
        let percent = len as f64 * 100.0 / size as f64;
        if self.json {
            return self.item(json!({ "length": len, "percent": percent }), states);
        }
        output::line(format!("{len:>16} {percent:>5.1} % {}", self.text(states)).trim_end())
    }

    fn text(&self, states: &[u64]) -> String {
        let said = self.contexts.iter().zip(states).map(|(context, &state)| {
            let said = describe(context, state);
            match self.contexts.len() {
                1 => format!("{state:>4}  {said}"),
                // So that there are columns.
                _ => format!("{state:>4}  {said:<12}"),
            }
        });
        said.collect()
    }

    fn item(&mut self, mut value: Value, states: &[u64]) -> Result<(), Failure> {
        let said = |context: &str, state: u64| (json!(state), json!(describe(context, state)));
        if let ([context], [state]) = (self.contexts.as_slice(), states) {
            (value["type"], value["description"]) = said(context, *state);
        } else {
            for (context, state) in self.contexts.iter().zip(states) {
                let (kind, description) = said(context, *state);
                value["states"][context] = json!({ "type": kind, "description": description });
            }
        }
        let before = if std::mem::replace(&mut self.begun, true) { ", " } else { "[ " };
        output::line(&format!("{before}{value}"))
    }

    fn end(&self) -> Result<(), Failure> {
        match (self.json, self.begun) {
            (true, true) => output::line("]"),
            (true, false) => output::line("[]"),
            (false, _) => Ok(()),
        }
    }
}

/// What a state means, for the contexts that have a meaning known to all; else nothing.
fn describe(context: &str, state: u64) -> String {
    let said = match (context, state) {
        (BASE_ALLOCATION, 0) => "data",
        (BASE_ALLOCATION, 1) => "hole",
        (BASE_ALLOCATION, 2) => "zero",
        (BASE_ALLOCATION, 3) => "hole,zero",
        ("qemu:allocation-depth", 0) => "unallocated",
        ("qemu:allocation-depth", 1) => "local",
        ("qemu:allocation-depth", depth) => return format!("backing depth {depth}"),
        (bitmap, 0) if bitmap.starts_with("qemu:dirty-bitmap:") => "clean",
        (bitmap, 1) if bitmap.starts_with("qemu:dirty-bitmap:") => "dirty",
        _ => "",
    };
    said.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(extents: &[(u64, u64)]) -> Vec<Extent> {
        extents.iter().map(|&(len, flags)| Extent { len, flags }).collect()
    }

    #[test]
    fn contexts_are_told_together_as_far_as_all_of_them_reach() {
        let found = [extents(&[(10, 0), (5, 3), (100, 0)]), extents(&[(4, 1), (8, 0)])];
        let runs = [(4, vec![0, 1]), (6, vec![0, 0]), (2, vec![3, 0])];
        assert_eq!(together(&found), runs);
        assert_eq!(together(&found[..1]), [(10, vec![0]), (5, vec![3]), (100, vec![0])]);
    }

    #[test]
    fn a_server_that_invents_states_is_not_followed_for_ever() {
        let mut totals = Totals::default();
        for state in 0..STATES_MAX as u64 {
            totals.add(1, &[0, state]).unwrap();
        }
        totals.add(4, &[0, 7]).unwrap();
        assert_eq!(totals.0[&vec![0, 7]], 5);
        assert!(totals.add(1, &[1, 0]).is_err());
        assert_eq!(totals.0.len(), STATES_MAX);
    }
}
