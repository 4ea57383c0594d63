//! Which tests there are, and which of them are meant.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::workspace;

/// A test that says nothing else has this long.
const DEADLINE: Duration = Duration::from_secs(60);

/// How many times as long as it says a test has in its long form.
const LONGER: u32 = 20;

/// One numbered test.
#[derive(Clone, Debug)]
pub(crate) struct Test {
    /// `NNN-name`.
    pub(crate) name: String,
    pub(crate) script: PathBuf,
    /// The first line of the script's docstring.
    pub(crate) purpose: String,
    /// After this its processes are killed and it has failed.
    pub(crate) deadline: Duration,
}

impl Test {
    /// The file with the output that the test must print.
    pub(crate) fn expected(&self) -> PathBuf {
        self.script.with_extension("out")
    }

    fn number(&self) -> &str {
        self.name.split('-').next().unwrap_or_default()
    }

    fn matches(&self, selector: &str) -> bool {
        match selector.parse::<u32>() {
            Ok(number) => self.number().parse() == Ok(number),
            Err(_) => self.name.contains(selector),
        }
    }
}

/// All tests of a folder, by number.
pub(crate) fn all(folder: &Path) -> Result<Vec<Test>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut tests = Vec::new();
    for entry in entries {
        let script = entry?.path();
        if script.extension().is_some_and(|extension| extension == "py") {
            tests.push(parse(script)?);
        }
    }
    tests.sort_by(|a, b| a.name.cmp(&b.name));
    for pair in tests.windows(2) {
        let [a, b] = pair else { continue };
        ensure!(a.number() != b.number(), "{} and {} have one number", a.name, b.name);
    }
    Ok(tests)
}

fn parse(script: PathBuf) -> Result<Test> {
    let name = script.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
    let numbered = name
        .split_once('-')
        .is_some_and(|(n, _)| n.len() == 3 && n.bytes().all(|digit| digit.is_ascii_digit()));
    ensure!(numbered, "{} is not named NNN-what-it-checks.py", script.display());
    let text = fs::read_to_string(&script)?;
    let purpose = text
        .lines()
        .find_map(|line| line.strip_prefix("\"\"\""))
        .with_context(|| format!("{name} does not open with a docstring"))?;
    let purpose = purpose.trim_end_matches("\"\"\"").to_owned();
    let deadline = match text.lines().find_map(|line| line.strip_prefix("# deadline_s: ")) {
        Some(seconds) => match seconds.trim().parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => bail!("{name}: its deadline is not a number of seconds"),
        },
        None => DEADLINE,
    };
    let deadline = if workspace::is_long() { deadline * LONGER } else { deadline };
    Ok(Test { name, script, purpose, deadline })
}

/// The tests that one of the selectors means; a selector that means none is an error.
pub(crate) fn select(tests: Vec<Test>, selectors: &[String]) -> Result<Vec<Test>> {
    for selector in selectors {
        ensure!(
            tests.iter().any(|test| test.matches(selector)),
            "no test is named by `{selector}`"
        );
    }
    let wanted = |test: &Test| selectors.is_empty() || selectors.iter().any(|s| test.matches(s));
    Ok(tests.into_iter().filter(wanted).collect())
}
