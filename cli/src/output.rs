//! What people and programs read on stdout and stderr.
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::exit::{self, Failure};

/// Prints a text and a line end. That nobody reads it any more is no failure.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    match print(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(|error| Failure::failed(format!("stdout: {error}"))),
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// As [`line`], for a program that goes on whether anybody reads it or not.
pub(crate) fn note(text: &str) -> Result<(), Failure> {
    match print(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| Failure::failed(format!("stdout: {error}"))),
    }
}

/// Prints a JSON value, over several lines.
pub(crate) fn json(value: &Value) -> Result<(), Failure> {
    line(&format!("{value:#}"))
}

/// Says on stderr why the command failed.
pub(crate) fn error(failure: &Failure) {
    let what = match failure.code {
        exit::REFUSED => "refused",
        _ => "error",
    };
    let what = Paint::for_stderr().apply(Colour::Red, what);
    // If stderr is gone, the exit code still says it.
    let _ = writeln!(io::stderr(), "brep: {what}: {failure}");
}

/// A bar that counts bytes, on a terminal only.
pub(crate) fn progress(what: &'static str) -> ProgressBar {
    bar(what, "{prefix} {bar:40} {percent} %  {binary_bytes_per_sec}")
}

/// A progress bar whose message says how far it is.
pub(crate) fn told_progress(what: &'static str) -> ProgressBar {
    bar(what, "{prefix} {bar:30} {msg}")
}

fn bar(what: &'static str, template: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template);
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(what)
}

/// A colour with a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colour {
    Green,
    Yellow,
    Red,
    Bold,
    Dim,
}

/// Colours text if a terminal will show it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint(bool);

impl Paint {
    pub(crate) fn for_stdout() -> Self {
        Paint(io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    pub(crate) fn for_stderr() -> Self {
        Paint(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Paint(false)
    }

    pub(crate) fn apply(self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Green => 32,
            Colour::Yellow => 33,
            Colour::Red => 31,
            Colour::Bold => 1,
            Colour::Dim => 2,
        };
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Rows of cells under a heading, each column as wide as its widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<Cell>>,
}

/// One cell: a text, its alignment, and its colour.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    right: bool,
    colour: Option<Colour>,
}

impl Cell {
    pub(crate) fn left(text: impl Into<String>) -> Self {
        Cell { text: text.into(), right: false, colour: None }
    }

    pub(crate) fn right(text: impl Into<String>) -> Self {
        Cell { text: text.into(), right: true, colour: None }
    }

    pub(crate) fn colour(self, colour: Colour) -> Self {
        Cell { colour: Some(colour), ..self }
    }
}

impl Table {
    pub(crate) fn new(heading: Vec<Cell>) -> Self {
        let dim = |cell: Cell| cell.colour(Colour::Dim);
        Table { rows: vec![heading.into_iter().map(dim).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    pub(crate) fn render(&self, paint: Paint) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut output = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let pad = " ".repeat(width - cell.text.chars().count());
                let text = match cell.colour {
                    Some(colour) => paint.apply(colour, &cell.text),
                    None => cell.text.clone(),
                };
                let (before, after) =
                    if cell.right { (pad, String::new()) } else { (String::new(), pad) };
                // Writing to a string cannot fail.
                let _ = write!(line, "{before}{text}{after}   ");
            }
            output.push_str(line.trim_end());
            output.push('\n');
        }
        output
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table =
            Table::new(vec![Cell::left("DISK"), Cell::right("SIZE"), Cell::left("FILE")]);
        table.row(vec![Cell::left("vda"), Cell::right("10 GiB"), Cell::left("ä.raw")]);
        table.row(vec![Cell::left("vdb-long"), Cell::right("1 B"), Cell::left("b.raw")]);
        assert_eq!(
            table.render(Paint::plain()),
            "DISK         SIZE   FILE\n\
             vda        10 GiB   ä.raw\n\
             vdb-long      1 B   b.raw\n"
        );
    }
}
