//! The difference between what a test should print and what it printed.

use std::fmt::Write;

/// More lines than this are compared without looking for common ones: the table is quadratic.
const LINES_MAX: usize = 2000;

/// A unified diff in one hunk without far-away context; `None` if the texts are equal.
pub(crate) fn unified(expected: &str, actual: &str) -> Option<String> {
    if expected == actual {
        return None;
    }
    let (a, b): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), actual.lines().collect());
    let lines = if a.len() > LINES_MAX || b.len() > LINES_MAX {
        let gone = a.iter().map(|line| ('-', *line));
        gone.chain(b.iter().map(|line| ('+', *line))).collect()
    } else {
        compare(&a, &b)
    };
    let mut text = String::from("--- expected\n+++ printed\n");
    let changed = |at: usize| lines.get(at).is_some_and(|(mark, _)| *mark != ' ');
    let mut shown = true;
    for (at, (mark, line)) in lines.iter().enumerate() {
        if (at.saturating_sub(3)..=at + 3).any(changed) {
            shown = true;
            let _ = writeln!(text, "{mark}{line}");
        } else if shown {
            shown = false;
            text.push_str("@@\n");
        }
    }
    if a == b {
        text.push_str("(they differ in the end of the last line only)\n");
    }
    Some(text)
}

/// Longest common subsequence: every line with ' ', '-' or '+'.
fn compare<'a>(a: &[&'a str], b: &[&'a str]) -> Vec<(char, &'a str)> {
    let width = b.len() + 1;
    let mut length = vec![0_u32; (a.len() + 1) * width];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            length[i * width + j] = if a[i] == b[j] {
                length[(i + 1) * width + j + 1] + 1
            } else {
                length[(i + 1) * width + j].max(length[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < a.len() && j < b.len() {
        if a[i] == b[j] {
            lines.push((' ', a[i]));
            (i, j) = (i + 1, j + 1);
        } else if length[(i + 1) * width + j] >= length[i * width + j + 1] {
            lines.push(('-', a[i]));
            i += 1;
        } else {
            lines.push(('+', b[j]));
            j += 1;
        }
    }
    lines.extend(a[i..].iter().map(|line| ('-', *line)));
    lines.extend(b[j..].iter().map(|line| ('+', *line)));
    lines
}
