//! `brep image check`: the metadata of an image, with the exit codes of `qemu-img check`.
use brep_block::CacheMode;
use brep_qcow2::{CheckMode, CheckReport, check};
use brep_replication::config::DiskFormat;
use serde_json::json;

use super::USAGE;
use super::source::{open_raw, refused, stated_format};
use crate::args::{CheckArgs, Repair};
use crate::cmd::runtime::current_thread;
use crate::exit::{self, Failure, Outcome};
use crate::output;

const CLEAN: u8 = 0;
const NOT_COMPLETED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const UNSUPPORTED: u8 = 63;

pub(crate) fn run(args: &CheckArgs) -> Outcome {
    let code = |failure: Failure| {
        let code = if failure.code == exit::USAGE { USAGE } else { NOT_COMPLETED };
        failure.with_code(code)
    };
    let format = stated_format(&args.file, args.format).map_err(code)?;
    if format == DiskFormat::Raw {
        let file = args.file.display();
        let message = format!("{file}: a raw image has no metadata that could be checked");
        return Err(Failure::new(UNSUPPORTED, message));
    }
    let mode = match args.repair {
        None => CheckMode::Report,
        Some(Repair::Leaks) => CheckMode::RepairLeaks,
        Some(Repair::All) => CheckMode::RepairAll,
    };
    let file = open_raw(&args.file, format, args.repair.is_none(), CacheMode::default())
        .map_err(|failure| failure.with_code(NOT_COMPLETED))?;
    let report = current_thread()?
        .block_on(check(&file, mode))
        .map_err(|error| refused(&args.file, error).with_code(NOT_COMPLETED))?;
    print(args, &report)?;
    Ok(exit_code(&report))
}

fn exit_code(report: &CheckReport) -> u8 {
    match report {
        CheckReport { check_errors: 1.., .. } => NOT_COMPLETED,
        CheckReport { corruptions: 1.., .. } => CORRUPT,
        CheckReport { leaks: 1.., .. } => LEAKS,
        _ => CLEAN,
    }
}

fn print(args: &CheckArgs, report: &CheckReport) -> Result<(), Failure> {
    if args.json {
        return output::json(&json!({
            "file": args.file,
            "corruptions": report.corruptions,
            "leaks": report.leaks,
            "check-errors": report.check_errors,
            "messages": report.messages,
        }));
    }
    report.messages.iter().try_for_each(|message| output::line(message))?;
    let count = |number: u64, one: &str, many: &str| match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {many}"),
    };
    if exit_code(report) == CLEAN {
        return output::line("No errors were found.");
    }
    let mut found = Vec::new();
    if report.corruptions > 0 {
        found.push(count(report.corruptions, "corruption", "corruptions"));
    }
    if report.leaks > 0 {
        found.push(count(report.leaks, "leaked cluster", "leaked clusters"));
    }
    if report.check_errors > 0 {
        found.push(count(report.check_errors, "place", "places") + " that could not be checked");
    }
    output::line(&format!("Found: {}.", found.join(", ")))?;
    if args.repair.is_none() && report.check_errors == 0 {
        let what = if report.corruptions > 0 { "all" } else { "leaks" };
        output::line(&format!("To repair: brep image check --repair {what}"))?;
    }
    Ok(())
}
