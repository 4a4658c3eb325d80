//! What the commands print: one line a step with the time it took.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A step under way: a spinner in a terminal, two plain lines elsewhere.
pub(crate) struct Step {
    title: String,
    started: Instant,
    spinner: ProgressBar,
}

impl Step {
    /// Announces the step. It counts as failed unless [`Step::done`] is called.
    pub(crate) fn start(title: impl Into<String>) -> Self {
        let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if spinner.is_hidden() {
            return Self::plain(title);
        }
        let title = title.into();
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}");
        spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        spinner.set_message(title.clone());
        spinner.enable_steady_tick(Duration::from_millis(100));
        Self { title, started: Instant::now(), spinner }
    }

    /// Announces a step beside which something else moves in the terminal.
    pub(crate) fn plain(title: impl Into<String>) -> Self {
        let title = title.into();
        eprintln!("{title}");
        Self { title, started: Instant::now(), spinner: ProgressBar::hidden() }
    }

    /// Announces a step whose own output follows below its title.
    pub(crate) fn title(title: impl Into<String>) -> Self {
        let title = title.into();
        eprintln!("\n== {title}");
        Self { title, started: Instant::now(), spinner: ProgressBar::hidden() }
    }

    /// The step has succeeded; returns the time that it took.
    pub(crate) fn done(mut self) -> Duration {
        self.close("done");
        self.started.elapsed()
    }

    fn close(&mut self, outcome: &str) {
        let title = std::mem::take(&mut self.title);
        if title.is_empty() {
            return;
        }
        let seconds = self.started.elapsed().as_secs_f32();
        if self.spinner.is_hidden() {
            eprintln!("  {outcome} in {seconds:.1} s");
        } else {
            self.spinner.finish_and_clear();
            let mark = if outcome == "done" { "✓" } else { "✗" };
            eprintln!("{mark} {title}  {seconds:.1} s");
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.close("failed");
    }
}

/// A table: the first column to the left, the others to the right.
pub(crate) fn table(columns: &[String], rows: &[Vec<String>]) -> String {
    let all = || std::iter::once(columns).chain(rows.iter().map(Vec::as_slice));
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths).enumerate().map(|(index, (cell, width))| match index {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    all().map(line).collect::<Vec<_>>().join("\n")
}
