//! The state of every range of an export, as a server tells it.
use std::collections::BTreeMap;

use brep_block::BlockDevice;
use brep_nbd::client::Connection;
use brep_nbd::proto::wire::BASE_ALLOCATION;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::output;

/// Ranges that share their state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    offset: u64,
    len: u64,
    state: u64,
}

/// Prints the runs of an export in the meta context that it was connected with, or what they add
/// up to.
pub(super) async fn show(
    disk: &Connection,
    context: &str,
    totals: bool,
    json: bool,
) -> Result<(), Failure> {
    let mut sums: BTreeMap<u64, u64> = BTreeMap::new();
    let mut printer = Printer { context, json, begun: false };
    let mut open: Option<Run> = None;
    let mut offset = 0;
    while offset < disk.size() {
        let (len, state) = disk.start_context_status(offset, disk.size() - offset).await?;
        *sums.entry(state).or_default() += len;
        match &mut open {
            Some(run) if run.state == state => run.len += len,
            open => {
                if let Some(run) = open.replace(Run { offset, len, state }).filter(|_| !totals) {
                    printer.run(run)?;
                }
            }
        }
        offset += len;
    }
    if totals {
        for (&state, &sum) in &sums {
            printer.total(state, sum, disk.size())?;
        }
    } else if let Some(run) = open {
        printer.run(run)?;
    }
    printer.end()
}

/// Prints line by line: an export may have more runs than fit into memory.
struct Printer<'a> {
    context: &'a str,
    json: bool,
    begun: bool,
}

impl Printer<'_> {
    fn run(&mut self, run: Run) -> Result<(), Failure> {
        let Run { offset, len, state } = run;
        let said = describe(self.context, state);
        if self.json {
            return self.item(&json!({
                "offset": offset, "length": len, "type": state, "description": said,
            }));
        }
        output::line(format!("{offset:>16} {len:>16} {state:>4}  {said}").trim_end())
    }

    fn total(&mut self, state: u64, len: u64, size: u64) -> Result<(), Failure> {
        let said = describe(self.context, state);
        let percent = len as f64 * 100.0 / size as f64;
        if self.json {
            return self.item(&json!({
                "length": len, "percent": percent, "type": state, "description": said,
            }));
        }
        output::line(format!("{len:>16} {percent:>5.1} % {state:>4}  {said}").trim_end())
    }

    fn item(&mut self, value: &Value) -> Result<(), Failure> {
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
