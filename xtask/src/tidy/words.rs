//! Words that the project does not use.

use super::{Fault, Source};

const LIST: &str = "xtask/tidy/forbidden-words.txt";

/// `list` holds `WORD REASON` lines; a word is forbidden wherever it stands by itself.
pub(super) fn check(sources: &[Source], list: &str) -> Vec<Fault> {
    let words: Vec<(&str, &str)> = list
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .collect();
    let mut faults = Vec::new();
    for source in sources.iter().filter(|source| source.path != LIST) {
        for (number, line) in source.lines() {
            for (word, reason) in words.iter().filter(|(word, _)| holds(line, word)) {
                faults.push(Fault::new(&source.path, number, format!("`{word}`: {reason}")));
            }
        }
    }
    faults
}

/// Whether `word` stands in the line with no letter, digit or underscore beside it.
fn holds(line: &str, word: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        let open = !word.starts_with(joins) || !before.ends_with(joins);
        let close = !word.ends_with(joins) || !after.starts_with(joins);
        open && close
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_by_itself_and_not_inside_another() {
        for (line, found) in
            [("// HUH: later", true), ("HUHS", false), ("a(HUH)", true), ("", false)]
        {
            let source = Source { path: "a.rs".into(), text: line.into() };
            assert_eq!(
                check(&[source], "# comment\nHUH say it\n").len(),
                usize::from(found),
                "{line}"
            );
        }
    }
}
