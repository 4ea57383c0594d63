//! Every row of the original's tables has a test, or a reason why it has none.
//!
//! The page has a table for each section; its rows begin with `§SECTION.ROW`. A test that says
//! `Row: §SECTION.ROW` above its name, of one row or several, stands in those rows.

use std::collections::BTreeMap;

use super::guarantees::{declared, is_row, missing, tests_in};
use super::{Fault, Source};

const PAGE: &str = "docs/internals/original-cases.md";

/// The sections, and how many rows each has: none is left out silently.
const ROWS: [(u32, u32); 13] = [
    (3, 10),
    (4, 6),
    (5, 5),
    (6, 10),
    (7, 9),
    (8, 18),
    (9, 3),
    (10, 6),
    (11, 27),
    (12, 4),
    (13, 12),
    (14, 54),
    (15, 6),
];

/// How a row begins whose cell for tests has none.
const EXCUSE: &str = "none: ";

pub(super) fn check(sources: &[Source]) -> Vec<Fault> {
    let Some(page) = sources.iter().find(|source| source.path == PAGE) else {
        return vec![Fault::new(PAGE, 0, "the page is missing")];
    };
    let (rows, mut faults) = rows(page);
    let expected =
        ROWS.iter().flat_map(|(section, count)| (1..=*count).map(move |row| (section, row)));
    let expected: Vec<String> =
        expected.map(|(section, row)| format!("§{section}.{row}")).collect();
    for id in &expected {
        if !rows.contains_key(id.as_str()) {
            faults.push(Fault::new(PAGE, 0, format!("the row {id} is missing")));
        }
    }
    for (id, (number, line)) in &rows {
        if !expected.iter().any(|expected| expected == id) {
            faults.push(Fault::new(PAGE, *number, format!("{id} is no row of the original's")));
        }
        faults.extend(missing(sources, page, *number, line));
        if tests_in(line).is_empty() && !line.contains(&format!("| {EXCUSE}")) {
            faults.push(Fault::new(PAGE, *number, format!("{id} names no test")));
        }
    }
    faults.extend(sources.iter().flat_map(|source| unlisted(source, &rows)));
    faults
}

type Rows<'a> = BTreeMap<&'a str, (usize, &'a str)>;

/// By their names; a name that is there twice is a fault.
fn rows(page: &Source) -> (Rows<'_>, Vec<Fault>) {
    let (mut rows, mut faults) = (Rows::new(), Vec::new());
    for (number, line) in page.lines().filter(|(number, line)| is_row(page, *number, line)) {
        let id = line.split('|').nth(1).unwrap_or("").trim();
        if id.starts_with('§') && rows.insert(id, (number, line)).is_some() {
            faults.push(Fault::new(PAGE, number, format!("{id} is there twice")));
        }
    }
    (rows, faults)
}

/// Tests that name a row which does not name them.
fn unlisted(source: &Source, rows: &Rows<'_>) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut named: Vec<&str> = Vec::new();
    for (number, line) in source.lines().filter(|_| source.has_extension("rs")) {
        if let Some(list) = line.trim_start().strip_prefix("/// Row: ") {
            let ids = list.split(", ").map(|id| id.trim_end_matches('.'));
            named.extend(ids.filter(|id| id.starts_with('§')));
        }
        let Some(name) = declared(line) else { continue };
        for id in named.drain(..) {
            let stands_there = |(_, row): &(usize, &str)| {
                tests_in(row).iter().any(|test| test.rsplit("::").next() == Some(name))
            };
            if !rows.get(id).is_some_and(stands_there) {
                let what = format!("{PAGE} does not name {name} in the row {id}");
                faults.push(Fault::new(&source.path, number, what));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All rows, each with one test; `change` makes something wrong.
    fn faults(change: impl FnOnce(&mut String, &mut String)) -> Vec<String> {
        let mut page = "| row | what | tests |\n|---|---|---|\n".to_owned();
        for (section, count) in ROWS {
            for row in 1..=count {
                page += &format!("| §{section}.{row} | what | `block::cases::holds` |\n");
            }
        }
        let mut test = "/// Row: §3.1, §3.2.\n#[test]\nfn holds() {}\n".to_owned();
        change(&mut page, &mut test);
        let source = |path: &str, text| Source { path: path.into(), text };
        let sources = [source(PAGE, page), source("block/tests/cases.rs", test)];
        check(&sources).into_iter().map(|fault| fault.what).collect()
    }

    fn replaced(from: &str, to: &str) -> Vec<String> {
        faults(|page, _| *page = page.replacen(from, to, 1))
    }

    #[test]
    fn a_page_with_every_row_is_good() {
        assert_eq!(faults(|_, _| {}), [""; 0]);
        let excused = "| §7.1 | what | none: there is nothing like it |";
        assert_eq!(replaced("| §7.1 | what | `block::cases::holds` |", excused), [""; 0]);
    }

    #[test]
    fn rows_that_are_missing_unknown_or_there_twice_are_faults() {
        assert_eq!(replaced("| §7.1 |", "| 7.1 |"), ["the row §7.1 is missing"]);
        let both = ["§7.2 is there twice", "the row §7.1 is missing"];
        assert_eq!(replaced("| §7.1 |", "| §7.2 |"), both);
        let both = ["the row §7.1 is missing", "§7.99 is no row of the original's"];
        assert_eq!(replaced("| §7.1 |", "| §7.99 |"), both);
    }

    #[test]
    fn rows_without_tests_and_tests_that_do_not_exist_are_faults() {
        assert_eq!(
            replaced("| §7.1 | what | `block::cases::holds` |", "| §7.1 | what | later |"),
            ["§7.1 names no test"]
        );
        assert_eq!(
            replaced("| §7.1 | what | `block::cases::holds` |", "| §7.1 | what | `block::x::y` |"),
            ["there is no test `block::x::y`"]
        );
    }

    #[test]
    fn a_test_that_names_a_row_stands_in_it() {
        let fault = format!("{PAGE} does not name holds in the row §3.2");
        let row = "| §3.2 | what | none: nothing |";
        assert_eq!(replaced("| §3.2 | what | `block::cases::holds` |", row), [fault]);
        let fault = format!("{PAGE} does not name holds in the row §99.1");
        assert_eq!(faults(|_, test| *test = test.replacen("§3.2", "§99.1", 1)), [fault]);
    }
}
