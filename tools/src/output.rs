//! Results on stdout, messages on stderr. A reader that went away is no error.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use crate::error::Failed;

/// Prints one line of a result.
pub(crate) fn line(text: &str) -> Result<(), Failed> {
    let mut out = io::stdout().lock();
    let printed = writeln!(out, "{text}").and_then(|()| out.flush());
    forgive_broken_pipe(printed)
}

/// Prints one JSON object as one line, and flushes it.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failed> {
    let text = serde_json::to_string(value).map_err(|error| Failed::Output(error.into()))?;
    line(&text)
}

/// Prints bytes as they are.
pub(crate) fn raw(bytes: &[u8]) -> Result<(), Failed> {
    let mut out = io::stdout().lock();
    let printed = out.write_all(bytes).and_then(|()| out.flush());
    forgive_broken_pipe(printed)
}

/// Says something to the person at the terminal.
pub(crate) fn hint(text: &str) {
    // If even stderr is gone there is nobody to tell.
    let _ = writeln!(io::stderr(), "{text}");
}

fn forgive_broken_pipe(printed: io::Result<()>) -> Result<(), Failed> {
    match printed {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failed::Output(error)),
        _ => Ok(()),
    }
}

/// Rows in columns: text to the left, numbers to the right.
#[derive(Debug)]
pub(crate) struct Table {
    align: &'static [Align],
    rows: Vec<Vec<String>>,
}

/// Where a column's text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

impl Table {
    pub(crate) fn new(align: &'static [Align], head: &[&str]) -> Self {
        let head = head.iter().map(|&text| text.to_owned()).collect();
        Self {
            align,
            rows: vec![head],
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(crate) fn print(&self) -> Result<(), Failed> {
        self.lines().iter().try_for_each(|text| line(text))
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        let width_of = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.align.len()).map(width_of).collect();
        let render = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).zip(self.align);
            let cells: Vec<_> = cells
                .map(|((cell, &width), align)| match align {
                    Align::Left => format!("{cell:<width$}"),
                    Align::Right => format!("{cell:>width$}"),
                })
                .collect();
            cells.join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(render).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[Align::Left, Align::Right], &["name", "n"]);
        table.row(vec!["ä".into(), "1000".into()]);
        assert_eq!(table.lines(), ["name     n", "ä     1000"]);
    }
}
