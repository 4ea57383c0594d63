//! Debian's backports as a source of packages.
//!
//! A newer QEMU than the release's own is there; and where one of QEMU's packages came from
//! backports, the others have to come from there as well.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const SOURCES: &str = "/etc/apt/sources.list.d";
/// What a Debian release itself comes from.
const RELEASE: &str = "debian.sources";
/// What is added to it here.
const OURS: &str = "brep-backports.sources";

/// Adds the release's backports to apt's sources unless they are there; returns the suite.
pub(crate) fn enable() -> Result<String> {
    let os = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = codename(&os).context("/etc/os-release names no VERSION_CODENAME")?;
    let suite = format!("{codename}-backports");
    let folder = Path::new(SOURCES);
    if !offers(folder, &suite)? {
        let release = folder.join(RELEASE);
        let text = fs::read_to_string(&release)
            .ok()
            .and_then(|text| with_suite(&text, codename, &suite))
            .with_context(|| {
                format!(
                    "add {suite} to apt's sources by hand: {} lacks {codename}",
                    release.display()
                )
            })?;
        let ours = folder.join(OURS);
        println!("adding {suite} in {}", ours.display());
        fs::write(&ours, text).with_context(|| format!("cannot write {}", ours.display()))?;
    }
    Ok(suite)
}

fn codename(os_release: &str) -> Option<&str> {
    os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).map(str::trim)
}

/// Whether one of apt's own files names the suite.
fn offers(folder: &Path, suite: &str) -> Result<bool> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "sources" || e == "list"));
    files.push("/etc/apt/sources.list".into());
    Ok(files.iter().any(|file| names(&fs::read_to_string(file).unwrap_or_default(), suite)))
}

fn names(sources: &str, suite: &str) -> bool {
    let lines = sources.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(str::split_whitespace).any(|word| word == suite)
}

/// The stanza of the release itself, with another suite.
fn with_suite(sources: &str, codename: &str, suite: &str) -> Option<String> {
    let is_suites = |line: &str| line.starts_with("Suites:");
    let stanza = sources.split("\n\n").find(|stanza| {
        let mut lines = stanza.lines().filter(|line| is_suites(line));
        lines.any(|line| line.split_whitespace().any(|word| word == codename))
    })?;
    let lines = stanza.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let change =
        |line| if is_suites(line) { format!("Suites: {suite}\n") } else { format!("{line}\n") };
    Some(lines.map(change).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "Types: deb\n# a snapshot\nURIs: http://deb.debian.org/debian\n\
        Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\n\
        Types: deb\nURIs: http://deb.debian.org/debian-security\nSuites: bookworm-security\n\
        Components: main\n";

    #[test]
    fn only_the_suite_differs_from_the_releases_own_stanza() {
        let ours = with_suite(DEBIAN, "bookworm", "bookworm-backports").expect("a stanza");
        assert_eq!(
            ours,
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm-backports\n\
             Components: main\nSigned-By: /k.gpg\n"
        );
        assert_eq!(with_suite(DEBIAN, "trixie", "trixie-backports"), None);
    }

    #[test]
    fn a_suite_in_a_comment_or_within_a_word_is_not_offered() {
        assert!(names("deb http://x bookworm-backports main", "bookworm-backports"));
        assert!(!names("# Suites: bookworm-backports", "bookworm-backports"));
        assert!(!names("Suites: bookworm-backports-sloppy", "bookworm-backports"));
    }

    #[test]
    fn the_codename_is_a_whole_variable() {
        assert_eq!(
            codename("VERSION=\"12 (bookworm)\"\nVERSION_CODENAME=bookworm\n"),
            Some("bookworm")
        );
        assert_eq!(codename("ID=debian\n"), None);
    }
}
