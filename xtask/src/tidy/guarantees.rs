//! Every guarantee names a test, and every test that it names exists.
//!
//! A row of a table in the page holds `crate::path::test_name` or `iotest NNN` in backquotes; a case
//! of an end-to-end test is `iotest NNN: text`, where the test has that text.

use super::{Fault, Source};

const PAGE: &str = "docs/reference/guarantees.md";

pub(super) fn check(sources: &[Source]) -> Vec<Fault> {
    let Some(page) = sources.iter().find(|source| source.path == PAGE) else {
        return vec![Fault::new(PAGE, 0, "the page is missing")];
    };
    let mut faults = Vec::new();
    for (number, line) in page.lines() {
        faults.extend(missing(sources, page, number, line));
        if is_row(page, number, line) && tests_in(line).is_empty() {
            faults.push(Fault::new(PAGE, number, "this guarantee names no test"));
        }
    }
    faults
}

/// The tests that a line of a page names.
pub(super) fn tests_in(line: &str) -> Vec<&str> {
    line.split('`').skip(1).step_by(2).filter(|code| is_test(code)).collect()
}

/// Of the tests that a line names those that do not exist.
pub(super) fn missing(sources: &[Source], page: &Source, number: usize, line: &str) -> Vec<Fault> {
    let absent = tests_in(line).into_iter().filter(|test| !exists(sources, test));
    absent
        .map(|test| Fault::new(&page.path, number, format!("there is no test `{test}`")))
        .collect()
}

/// A row of a table's body: neither the heading nor the line below it.
pub(super) fn is_row(page: &Source, number: usize, line: &str) -> bool {
    let next = page.text.lines().nth(number);
    let is_rule = |line: &str| line.starts_with("|-") || line.starts_with("| -");
    line.starts_with('|') && !is_rule(line) && !next.is_some_and(is_rule)
}

fn is_test(code: &str) -> bool {
    code.starts_with("iotest ") || (code.contains("::") && !code.contains(['(', ' ', '<']))
}

fn exists(sources: &[Source], test: &str) -> bool {
    if let Some(test) = test.strip_prefix("iotest ") {
        let (number, case) = test.split_once(": ").unwrap_or((test, ""));
        let start = format!("xtask/iotests/{}-", number.trim());
        return sources
            .iter()
            .any(|s| s.path.starts_with(&start) && s.has_extension("py") && s.text.contains(case));
    }
    let path: Vec<&str> = test.split("::").collect();
    let [package, modules @ .., name] = path.as_slice() else { return false };
    // What holds the test: a file of that name, or a module within a file.
    let module = modules.last();
    let folder = format!("{package}/");
    sources
        .iter()
        .filter(|source| source.path.starts_with(&folder) && source.has_extension("rs"))
        .filter(|source| module.is_none_or(|module| holds_module(source, module)))
        .any(|source| holds_test(source, name))
}

fn holds_module(source: &Source, module: &str) -> bool {
    source.path.ends_with(&format!("/{module}.rs"))
        || source.path.ends_with(&format!("/{module}/mod.rs"))
        || source.text.contains(&format!("mod {module} {{"))
}

/// The name of the test function that a line declares.
pub(super) fn declared(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let line = line.strip_prefix("async ").unwrap_or(line);
    line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')).map(|(name, _)| name)
}

/// A function of that name with an attribute that makes it a test within a few lines above it.
fn holds_test(source: &Source, name: &str) -> bool {
    let lines: Vec<&str> = source.text.lines().collect();
    let is_attribute = |line: &&&str| line.trim_start().starts_with(['#', '/']);
    lines.iter().enumerate().filter(|(_, line)| declared(line) == Some(name)).any(|(at, _)| {
        let above = lines.get(..at).unwrap_or_default();
        above.iter().rev().take_while(is_attribute).any(|line| {
            let line = line.trim_start();
            line.starts_with("#[test]") || line.starts_with("#[tokio::test")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(row: &str) -> Vec<Source> {
        let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
        vec![
            source(PAGE, &format!("| what | tests |\n|---|---|\n{row}\n")),
            source(
                "block/src/file.rs",
                "mod tests {\n    #[tokio::test]\n    async fn holds() {}\n    fn helper() {}\n}\n",
            ),
            source("xtask/iotests/012-x.py", "a case"),
        ]
    }

    #[test]
    fn tests_that_exist_are_good() {
        for row in [
            "| a | `block::file::tests::holds` |",
            "| a | `iotest 012`, `block::tests::holds` |",
            "| a | `iotest 012: a case` |",
        ] {
            assert_eq!(check(&sources(row)), [], "{row}");
        }
    }

    #[test]
    fn tests_that_do_not_exist_are_faults() {
        for row in [
            "| a | `block::tests::helper` |",
            "| a | `block::tests::missing` |",
            "| a | `nbd::tests::holds` |",
            "| a | `block::other::holds` |",
            "| a | `iotest 013` |",
            "| a | `iotest 012: another case` |",
        ] {
            assert_eq!(check(&sources(row)).len(), 1, "{row}");
        }
    }

    #[test]
    fn a_guarantee_without_a_test_is_a_fault() {
        assert_eq!(check(&sources("| nothing is ever lost | |")).len(), 1);
    }
}
