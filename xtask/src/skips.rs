//! Tests that were not run because a program is missing, and which of them may be missing.
//!
//! A unit test says `SKIP: <test>: <program> not found` on standard error, an end-to-end test
//! ends with a reason. Both become a [`Skip`]. A run with `--ci` fails on a skip that the list
//! of allowed ones does not hold with the same name and reason.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// A test that was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Skip {
    pub(crate) test: String,
    pub(crate) reason: String,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.test, self.reason)
    }
}

impl Skip {
    /// Reads `TEST: REASON`. The name may hold `::`, the two are split at `: `.
    fn parse(text: &str) -> Option<Self> {
        let (test, reason) = text.split_once(": ")?;
        Some(Self { test: test.trim().to_owned(), reason: reason.trim().to_owned() })
    }
}

/// The skips that nextest's JUnit report holds in the tests' kept output.
pub(crate) fn in_junit(report: &Path) -> Result<Vec<Skip>> {
    let text = fs::read_to_string(report)
        .with_context(|| format!("nextest wrote no report {}", report.display()))?;
    Ok(find(&text))
}

fn find(report: &str) -> Vec<Skip> {
    let mut skips: Vec<Skip> = Vec::new();
    for line in report.lines() {
        let Some((before, skip)) = line.split_once("SKIP: ") else { continue };
        // A line of output starts its line in the report, or follows the opening tag.
        if !(before.is_empty() || before.ends_with('>')) {
            continue;
        }
        let text = unescape(skip.split('<').next().unwrap_or_default());
        let skip = Skip::parse(&text)
            .unwrap_or_else(|| Skip { test: text.clone(), reason: "no reason given".into() });
        if !skips.contains(&skip) {
            skips.push(skip);
        }
    }
    skips
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&amp;", "&")
}

/// The file of allowed skips: `TEST: REASON` a line, `#` begins a comment line.
pub(crate) fn allowed(file: &Path) -> Result<Vec<Skip>> {
    let text =
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut skips = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match Skip::parse(line) {
            Some(skip) => skips.push(skip),
            None => bail!("{}: not `TEST: REASON`: {line}", file.display()),
        }
    }
    Ok(skips)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_found_at_the_start_of_kept_output_and_inside_it() {
        let report = "<testcase name=\"a\">\n<system-err>SKIP: nbd::serves_fio: fio not found\n\
                      SKIP: x: a &amp; b\n  echo SKIP: not this one\nSKIP: x: a &amp; b</system-err>";
        let skips: Vec<String> = find(report).iter().map(Skip::to_string).collect();
        assert_eq!(skips, ["nbd::serves_fio: fio not found", "x: a & b"]);
    }

    #[test]
    fn a_skip_without_a_reason_is_still_counted() {
        assert_eq!(find("SKIP: something")[0].reason, "no reason given");
    }
}
