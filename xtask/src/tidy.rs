//! The project's own rules, which no other tool checks.

mod cases;
mod guarantees;
mod iotests;
mod layout;
mod links;
mod outside;
mod sources;
mod words;

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// A broken rule.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    /// Relative to the workspace.
    file: String,
    /// From 1; 0 means the file as a whole.
    line: usize,
    what: String,
}

impl Fault {
    fn new(file: &str, line: usize, what: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line, what: what.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.what),
            line => write!(f, "{}:{line}: {}", self.file, self.what),
        }
    }
}

/// A text file of the project.
struct Source {
    /// Relative to the workspace, with `/`.
    path: String,
    text: String,
}

impl Source {
    fn has_extension(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|own| own == extension)
    }

    /// Numbered from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

/// Prints every broken rule; succeeds if there is none.
pub(crate) fn check(workspace: &Workspace) -> Result<bool> {
    let root = &workspace.root;
    let sources = read(root)?;
    let rule = |name: &str| {
        let file = root.join("xtask/tidy").join(name);
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let mut faults = layout::check(&sources, &rule("long-modules.txt")?);
    faults.extend(words::check(&sources, &rule("forbidden-words.txt")?));
    faults.extend(links::check(root, &sources));
    faults.extend(guarantees::check(&sources));
    faults.extend(cases::check(&sources));
    faults.extend(iotests::check(&sources));
    faults.extend(outside::check(&sources));
    for fault in &faults {
        println!("{fault}");
    }
    println!("tidy: {} files, {} faults", sources.len(), faults.len());
    Ok(faults.is_empty())
}

fn read(root: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in sources::files(root)? {
        // Binary test data has no lines to look at.
        if let Ok(text) = fs::read_to_string(root.join(&path)) {
            sources.push(Source { path: display(&path), text });
        }
    }
    Ok(sources)
}

fn display(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
