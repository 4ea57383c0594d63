//! Links between the project's pages lead somewhere.

use std::path::{Component, Path, PathBuf};

use super::{Fault, Source};

/// Checks relative links in Markdown: the file, and the heading where one is named.
pub(super) fn check(root: &Path, sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for page in sources.iter().filter(|source| source.has_extension("md")) {
        for (number, link) in links(page) {
            if let Some(what) = broken(root, sources, page, &link) {
                faults.push(Fault::new(&page.path, number, what));
            }
        }
    }
    faults
}

/// The targets of `[text](target)`, outside of code blocks.
fn links(page: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (number, line) in page.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code || line.starts_with("    ") {
            continue;
        }
        for part in line.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')') {
                found.push((number, target.to_owned()));
            }
        }
    }
    found
}

fn broken(root: &Path, sources: &[Source], page: &Source, link: &str) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, heading) = link.split_once('#').unwrap_or((link, ""));
    let path = if file.is_empty() {
        PathBuf::from(&page.path)
    } else {
        let folder = Path::new(&page.path).parent().unwrap_or(Path::new(""));
        normal(&folder.join(file))
    };
    let target = sources.iter().find(|source| Path::new(&source.path) == path);
    if target.is_none() && !root.join(&path).exists() {
        return Some(format!("the link {link} leads nowhere"));
    }
    let missing = !heading.is_empty() && !target.is_some_and(|page| has_heading(page, heading));
    missing.then(|| format!("the link {link} names a heading that is not there"))
}

/// Without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

fn has_heading(page: &Source, anchor: &str) -> bool {
    page.text.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == anchor)
}

/// The anchor that a heading gets: lower case, spaces as hyphens, no punctuation.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            '-' | '_' => Some(c),
            c if c.is_alphanumeric() => Some(c),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(link: &str) -> usize {
        let page = |path: &str, text: String| Source { path: path.into(), text };
        let pages = [
            page("docs/a/one.md", format!("# One\nsee [x]({link})\n")),
            page("docs/b/two.md", "# Two: the `second`\n".into()),
        ];
        check(Path::new("/nonexistent"), &pages).len()
    }

    #[test]
    fn links_to_pages_and_headings_that_exist_are_good() {
        for link in ["../b/two.md", "../b/two.md#two-the-second", "#one", "https://example.org/x"] {
            assert_eq!(faults(link), 0, "{link}");
        }
    }

    #[test]
    fn links_that_lead_nowhere_are_faults() {
        for link in ["two.md", "../b/two.md#three", "#two"] {
            assert_eq!(faults(link), 1, "{link}");
        }
    }
}
