//! Running a command with its output shown as it comes and kept.

use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow};

/// This program, for those that it starts: under a name that stays good while it runs. Its file
/// does not, for a build of the workspace replaces it.
pub(crate) fn own_binary() -> PathBuf {
    PathBuf::from(format!("/proc/{}/exe", std::process::id()))
}

/// What a command said.
pub(crate) struct Outcome {
    pub(crate) success: bool,
    /// Standard output's lines, then standard error's, without colours.
    pub(crate) lines: Vec<String>,
}

/// Runs a command to its end; its output goes on to ours line by line.
pub(crate) fn run(command: &mut Command) -> Result<Outcome> {
    let name = command.get_program().to_string_lossy().into_owned();
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let stdout = child.stdout.take().context("no pipe")?;
    let stderr = child.stderr.take().context("no pipe")?;
    let errors = thread::spawn(move || forward(stderr, std::io::stderr()));
    let mut lines = forward(stdout, std::io::stdout())?;
    lines.extend(errors.join().map_err(|_| anyhow!("the reader of {name} panicked"))??);
    Ok(Outcome { success: child.wait()?.success(), lines })
}

fn forward(from: impl Read, mut to: impl Write) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        to.write_all(&line)?;
        lines.push(without_colours(String::from_utf8_lossy(&line).trim_end()));
        line.clear();
    }
    Ok(lines)
}

/// Drops the escape sequences that colour a terminal.
fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            chars.by_ref().find(char::is_ascii_alphabetic);
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_do_not_hide_a_closing_line() {
        assert_eq!(without_colours("\x1b[32;1m Summary\x1b[0m 3 tests"), " Summary 3 tests");
    }

    #[test]
    fn a_failing_command_is_a_failure_with_its_output_kept() {
        let outcome = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]));
        let outcome = outcome.expect("sh runs");
        assert!(!outcome.success);
        assert_eq!(outcome.lines, ["out", "err"]);
    }
}
