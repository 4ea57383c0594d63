//! Modules stay short, and every crate has a README.

use std::collections::BTreeMap;

use super::{Fault, Source};

/// A module of more lines has to be listed with a reason.
const MODULE_LINES_MAX: usize = 600;
/// Tests are read one by one, so their files may be longer.
const TESTS_LINES_MAX: usize = 1000;
const LIST: &str = "xtask/tidy/long-modules.txt";

/// `ratchet` lists long modules as `PATH LINES REASON`: they may shrink, but not grow.
pub(super) fn check(sources: &[Source], ratchet: &str) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut listed = parse(ratchet, &mut faults);
    for source in sources.iter().filter(|source| source.has_extension("rs")) {
        let lines = source.text.lines().count();
        let limit = if is_test(&source.path) { TESTS_LINES_MAX } else { MODULE_LINES_MAX };
        let most = match listed.remove(source.path.as_str()) {
            Some((line, _)) if lines <= limit => {
                faults.push(Fault::new(LIST, line, format!("{} is short now", source.path)));
                continue;
            }
            Some((_, most)) => most,
            None => limit,
        };
        if lines > most {
            let what = format!("{lines} lines, at most {most}: split it at a concept");
            faults.push(Fault::new(&source.path, 0, what));
        }
    }
    for (path, (line, _)) in listed {
        faults.push(Fault::new(LIST, line, format!("{path} is not there")));
    }
    faults.extend(crates_without_readme(sources));
    faults
}

fn parse<'a>(ratchet: &'a str, faults: &mut Vec<Fault>) -> BTreeMap<&'a str, (usize, usize)> {
    let mut listed = BTreeMap::new();
    for (index, line) in ratchet.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.splitn(3, ' ');
        match (words.next(), words.next().and_then(|lines| lines.parse().ok()), words.next()) {
            (Some(path), Some(lines), Some(_reason)) => {
                listed.insert(path, (index + 1, lines));
            }
            _ => faults.push(Fault::new(LIST, index + 1, "not `PATH LINES REASON`")),
        }
    }
    listed
}

fn is_test(path: &str) -> bool {
    path.contains("/tests/") || path.ends_with("/tests.rs")
}

fn crates_without_readme(sources: &[Source]) -> Vec<Fault> {
    let has = |path: &str| sources.iter().any(|source| source.path == path);
    let manifests = sources.iter().filter(|source| source.path.ends_with("/Cargo.toml"));
    manifests
        // The binary's README is the project's.
        .filter(|manifest| !manifest.text.contains("readme = \"../README.md\""))
        .map(|manifest| manifest.path.replace("Cargo.toml", "README.md"))
        .filter(|readme| !has(readme))
        .map(|readme| Fault::new(&readme, 0, "every crate says in a README what it is"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, lines: usize) -> Source {
        Source { path: path.into(), text: "x\n".repeat(lines) }
    }

    #[test]
    fn a_long_module_is_a_fault_unless_it_is_listed_and_has_not_grown() {
        let long = [source("a/src/b.rs", 700)];
        assert_eq!(check(&long, "").len(), 1);
        assert_eq!(check(&long, "a/src/b.rs 650 a table\n").len(), 1);
        assert_eq!(check(&long, "# why\n\na/src/b.rs 700 a table\n"), []);
    }

    #[test]
    fn an_entry_that_is_no_longer_needed_has_to_go() {
        assert_eq!(check(&[source("a/src/b.rs", 10)], "a/src/b.rs 700 a table\n").len(), 1);
        assert_eq!(check(&[], "a/src/b.rs 700 a table\n").len(), 1);
        assert_eq!(check(&[], "a/src/b.rs 700\n").len(), 1);
    }

    #[test]
    fn a_crate_without_a_readme_is_a_fault() {
        let bare = [source("a/Cargo.toml", 1)];
        assert_eq!(check(&bare, "")[0].file, "a/README.md");
        assert_eq!(check(&[source("a/Cargo.toml", 1), source("a/README.md", 1)], ""), []);
    }
}
