//! `cargo xtask test`: the stages, their seconds, and the closing lines.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::fuzz;
use crate::iotest;
use crate::process;
use crate::programs;
use crate::simulate;
use crate::skips::{self, Skip};
use crate::tidy;
use crate::workspace::{self, Workspace};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these stages, in their usual order
    #[arg(value_name = "STAGE")]
    stages: Vec<Stage>,
    /// Go on with the next stage after one has failed
    #[arg(long)]
    keep_going: bool,
    /// Fail on a skipped test that .ci/allowed-skips does not list with its reason
    #[arg(long)]
    ci: bool,
    /// Fail, not only warn, where a stage takes longer than its budget
    #[arg(long)]
    enforce_budgets: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Stage {
    /// The formatting of the source
    Fmt,
    /// The project's own rules: sizes, words, links, tests that the docs name
    Tidy,
    /// Lints over all targets, warnings denied
    Clippy,
    /// All targets, as the tests use them
    Build,
    /// Unit and integration tests
    Unit,
    /// The examples in the documentation
    Doctests,
    /// Histories of a pair over simulated disks, links and time; the corpus of the fuzzer
    Simulate,
    /// End-to-end tests against the real binary
    Iotests,
}

/// What a stage left for the closing lines.
#[derive(Default)]
struct Report {
    failed: bool,
    /// The test runner's own closing line.
    closing: Option<String>,
    skips: Vec<Skip>,
}

struct Done {
    stage: Stage,
    elapsed: Duration,
    report: Report,
}

/// Succeeds if every stage that was asked for has passed.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let workspace = Workspace::find()?;
    let stages = Stage::selected(&args.stages);
    check_programs(&stages)?;
    let mut done = Vec::new();
    let mut stages = stages.into_iter();
    for stage in stages.by_ref() {
        println!("==> {}", stage.name());
        let started = Instant::now();
        let report = stage.run(&workspace)?;
        let failed = report.failed;
        done.push(Done { stage, elapsed: started.elapsed(), report });
        if failed && !args.keep_going {
            break;
        }
    }
    let refused = refused_skips(&workspace, args, &done)?;
    let late = print_table(&done);
    for stage in stages {
        println!("{} was not run", stage.name());
    }
    print_closing(&done, &refused);
    let failed = done.iter().any(|done| done.report.failed);
    Ok(!failed && refused.is_empty() && !(late && args.enforce_budgets))
}

impl Stage {
    fn selected(named: &[Self]) -> Vec<Self> {
        let all = Self::value_variants().iter().copied();
        all.filter(|stage| named.is_empty() || named.contains(stage)).collect()
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    fn budget(self) -> Option<Duration> {
        match self {
            Self::Build => Some(Duration::from_secs(6 * 60)),
            _ if workspace::is_long() => None,
            Self::Unit => Some(Duration::from_secs(3 * 60)),
            Self::Simulate => Some(Duration::from_secs(5 * 60)),
            Self::Iotests => Some(Duration::from_secs(5 * 60)),
            Self::Fmt | Self::Tidy | Self::Clippy | Self::Doctests => None,
        }
    }

    /// Programs without which the stage says nothing.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Unit => &["cargo-nextest", "qemu-img", "qemu-io", "qemu-nbd"],
            Self::Iotests => &["python3", "qemu-img", "qemu-io", "qemu-nbd"],
            _ => &[],
        }
    }

    fn run(self, workspace: &Workspace) -> Result<Report> {
        let mut cargo = workspace.cargo();
        match self {
            Self::Fmt => plain(cargo.args(["fmt", "--all", "--check"])),
            Self::Tidy => Ok(Report { failed: !tidy::check(workspace)?, ..Report::default() }),
            Self::Clippy => plain(
                cargo
                    .args(["clippy", "--workspace", "--all-targets", "--"])
                    .args(["--deny", "warnings"]),
            ),
            Self::Build => {
                plain(cargo.args(["build", "--workspace", "--all-targets"]).args(PRODUCT))
            }
            Self::Unit => unit(
                workspace,
                cargo
                    .args(["nextest", "run", "--profile", workspace::nextest_profile()])
                    .args(["--workspace"])
                    .args(PRODUCT),
            ),
            Self::Doctests => doctests(cargo.args(["test", "--doc", "--workspace"]).args(PRODUCT)),
            Self::Simulate => simulate(workspace),
            Self::Iotests => iotests(workspace),
        }
    }
}

/// A build together with the simulator would give the product doors for it.
const PRODUCT: [&str; 4] = ["--exclude", simulate::PACKAGE, "--exclude", fuzz::PACKAGE];

/// Histories that a test run lives through.
fn histories() -> &'static str {
    if workspace::is_long() { "20000" } else { "2000" }
}

fn simulate(workspace: &Workspace) -> Result<Report> {
    let mut first = [simulate::tests(workspace), simulate::command(workspace)];
    first[1].arg("--plants");
    for command in &mut first {
        if !process::run(command)?.success {
            return Ok(Report { failed: true, ..Report::default() });
        }
    }
    let outcome = process::run(simulate::command(workspace).args(["--runs", histories()]))?;
    let closing = outcome.lines.iter().rev().find(|line| line.contains("histories passed"));
    let closing = closing.cloned();
    Ok(Report { failed: !outcome.success, closing, ..Report::default() })
}

fn check_programs(stages: &[Stage]) -> Result<()> {
    let names: Vec<&str> = stages.iter().flat_map(|stage| stage.needs()).copied().collect();
    let missing = programs::missing_needed(&names);
    for program in &missing {
        eprintln!("{} is missing: {}", program.name, program.remedy());
    }
    if !missing.is_empty() {
        bail!("nothing was tested: run the commands above first");
    }
    Ok(())
}

fn plain(command: &mut Command) -> Result<Report> {
    Ok(Report { failed: !process::run(command)?.success, ..Report::default() })
}

fn unit(workspace: &Workspace, command: &mut Command) -> Result<Report> {
    let junit = workspace.junit();
    // An older run's report must not speak for this one.
    if junit.exists() {
        std::fs::remove_file(&junit)?;
    }
    let outcome = process::run(command)?;
    let summary = |line: &&String| line.trim_start().starts_with("Summary [");
    let skips = match skips::in_junit(&junit) {
        Ok(skips) => skips,
        // A build that fails ends before the report.
        Err(_) if !outcome.success => Vec::new(),
        Err(error) => return Err(error),
    };
    let closing = outcome.lines.iter().rev().find(summary).cloned();
    Ok(Report { failed: !outcome.success, closing, skips })
}

/// rustdoc closes each crate by itself; the closing line is their sum.
fn doctests(command: &mut Command) -> Result<Report> {
    let outcome = process::run(command)?;
    let sum = |word: &str| outcome.lines.iter().filter_map(|line| count(line, word)).sum::<u64>();
    let closing = format!("doctests: {} passed, {} failed", sum("passed"), sum("failed"));
    Ok(Report { failed: !outcome.success, closing: Some(closing), skips: Vec::new() })
}

/// The number before `word` in a line `test result: ok. 3 passed; 0 failed; ...`.
fn count(line: &str, word: &str) -> Option<u64> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let part = counts.split("; ").find_map(|part| part.strip_suffix(word))?;
    part.trim().parse().ok()
}

/// The iotests take the binary that the build stage has left.
fn iotests(workspace: &Workspace) -> Result<Report> {
    if !workspace.brep().exists() {
        iotest::build(workspace)?;
    }
    let summary = iotest::run(workspace, &iotest::Options::default())?;
    Ok(Report {
        failed: summary.failed > 0,
        closing: Some(summary.to_string()),
        skips: summary.skips,
    })
}

fn refused_skips(workspace: &Workspace, args: &Args, done: &[Done]) -> Result<Vec<Skip>> {
    if !args.ci {
        return Ok(Vec::new());
    }
    let allowed = skips::allowed(&workspace.root.join(".ci/allowed-skips"))?;
    let skips = done.iter().flat_map(|done| &done.report.skips);
    Ok(skips.filter(|skip| !allowed.contains(skip)).cloned().collect())
}

/// Tells whether a stage took longer than its budget.
fn print_table(done: &[Done]) -> bool {
    let mut late = false;
    println!("\n{:<10} {:>9} {:>9}", "stage", "seconds", "budget");
    for Done { stage, elapsed, report } in done {
        let budget = stage.budget();
        let over = budget.is_some_and(|budget| *elapsed > budget);
        late |= over;
        println!(
            "{:<10} {:>9.1} {:>9}{}{}",
            stage.name(),
            elapsed.as_secs_f64(),
            budget.map_or_else(String::new, |budget| budget.as_secs().to_string()),
            if over { "  over budget" } else { "" },
            if report.failed { "  FAILED" } else { "" },
        );
    }
    let all: Duration = done.iter().map(|done| done.elapsed).sum();
    println!("{:<10} {:>9.1}\n", "all", all.as_secs_f64());
    late
}

fn print_closing(done: &[Done], refused: &[Skip]) {
    let skips: Vec<&Skip> = done.iter().flat_map(|done| &done.report.skips).collect();
    if !skips.is_empty() {
        println!("not run:");
    }
    for skip in skips {
        let mark = if refused.contains(skip) { "  (not in .ci/allowed-skips: FAILED)" } else { "" };
        println!("  {skip}{mark}");
    }
    for closing in done.iter().filter_map(|done| done.report.closing.as_ref()) {
        println!("{closing}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doctest_results_are_counted_and_other_lines_are_not() {
        let line = "test result: FAILED. 3 passed; 1 failed; 0 ignored; finished in 0.10s";
        assert_eq!(count(line, "passed"), Some(3));
        assert_eq!(count(line, "failed"), Some(1));
        assert_eq!(count("3 passed; 1 failed", "passed"), None);
    }

    #[test]
    fn named_stages_run_in_their_usual_order() {
        assert_eq!(Stage::selected(&[Stage::Unit, Stage::Fmt]), [Stage::Fmt, Stage::Unit]);
        assert_eq!(Stage::selected(&[]).len(), 8);
    }
}
