//! What the commands print: one line a step with the time it took, and signs of life while it takes long.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a step says that it goes on: on a terminal, and elsewhere.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(500);
const PIPE_INTERVAL: Duration = Duration::from_secs(30);
/// How much of a log's end holds the progress of the program that writes it, in bytes.
const PROGRESS_BYTES: u64 = 4096;

/// All spinners of the terminal, which may turn at the same time.
static SPINNERS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));

/// A step under way: a spinner in a terminal; elsewhere a line at its begin, at its end, and each half minute between.
pub(crate) struct Step {
    title: String,
    started: Instant,
    spinner: ProgressBar,
    ticker: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Step {
    /// Announces the step. It counts as failed unless [`Step::done`] is called.
    pub(crate) fn start(title: impl Into<String>) -> Self {
        Self::begin(title.into(), None)
    }

    /// The same for a step that runs Cargo, whose log tells how many crates of how many are done. See [`CARGO_PROGRESS`].
    pub(crate) fn compiling(title: impl Into<String>, log: &Path) -> Self {
        Self::begin(title.into(), Some(log.to_owned()))
    }

    fn begin(title: String, log: Option<PathBuf>) -> Self {
        let spinner = if SPINNERS.is_hidden() {
            eprintln!("{title}");
            ProgressBar::hidden()
        } else {
            let spinner = SPINNERS.add(ProgressBar::new_spinner());
            let style = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}");
            spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            spinner.set_message(title.clone());
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        };
        let started = Instant::now();
        let ticker = Some(ticker(title.clone(), started, spinner.clone(), log));
        Self { title, started, spinner, ticker }
    }

    /// Announces a step beside which something else moves in the terminal.
    pub(crate) fn plain(title: impl Into<String>) -> Self {
        let title = title.into();
        say(&title);
        Self { title, started: Instant::now(), spinner: ProgressBar::hidden(), ticker: None }
    }

    /// Announces a step whose own output follows below its title.
    pub(crate) fn title(title: impl Into<String>) -> Self {
        Self::plain(format!("\n== {}", title.into()))
    }

    /// The step has succeeded; returns the time that it took.
    pub(crate) fn done(mut self) -> Duration {
        self.close("done");
        self.started.elapsed()
    }

    fn close(&mut self, outcome: &str) {
        if let Some((stop, ticker)) = self.ticker.take() {
            drop(stop);
            // It only prints, and has nothing to tell of its end.
            let _ = ticker.join();
        }
        let title = std::mem::take(&mut self.title);
        if title.is_empty() {
            return;
        }
        let seconds = self.started.elapsed().as_secs_f32();
        if self.spinner.is_hidden() {
            say(&format!("  {outcome} in {seconds:.1} s"));
        } else {
            self.spinner.finish_and_clear();
            let mark = if outcome == "done" { "✓" } else { "✗" };
            say(&format!("{mark} {title}  {seconds:.1} s"));
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.close("failed");
    }
}

/// Prints a line above the spinners that turn.
pub(crate) fn say(line: &str) {
    SPINNERS.suspend(|| eprintln!("{line}"));
}

/// Tells that a step goes on until the sender is dropped.
fn ticker(title: String, started: Instant, spinner: ProgressBar, log: Option<PathBuf>) -> (Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = channel();
    let interval = if spinner.is_hidden() { PIPE_INTERVAL } else { TERMINAL_INTERVAL };
    let tick = move || {
        while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            let progress = log.as_deref().and_then(progress);
            if spinner.is_hidden() {
                let progress = progress.map(|progress| format!(", {progress}")).unwrap_or_default();
                eprintln!("  … {} s{progress}", started.elapsed().as_secs());
            } else if let Some(progress) = progress {
                spinner.set_message(format!("{title}  {progress}"));
            }
        }
    };
    (stop, std::thread::spawn(tick))
}

/// The environment in which Cargo writes its counter where [`Step::compiling`] finds it, though no terminal shows it.
pub(crate) const CARGO_PROGRESS: [(&str, &str); 2] =
    [("CARGO_TERM_PROGRESS_WHEN", "always"), ("CARGO_TERM_PROGRESS_WIDTH", "80")];

/// What Cargo is at, by the end of its log.
fn progress(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(PROGRESS_BYTES))).ok()?;
    let mut end = Vec::new();
    file.read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    if end.lines().last().is_some_and(|line| line.contains("waiting for file lock")) {
        return Some("waits for another Cargo of this checkout".to_owned());
    }
    counter(&end).map(|(done, all)| format!("{done} of {all} crates"))
}

/// The last counter in Cargo's output, such as `Building [=====>    ] 123/456: serde`.
fn counter(output: &str) -> Option<(u32, u32)> {
    let (_, last) = output.rsplit_once("Building [")?;
    let (_, counter) = last.split_once("] ")?;
    let (done, rest) = counter.split_once('/')?;
    let all: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((done.parse().ok()?, all.parse().ok()?))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_counts_what_it_has_built() {
        let output = "   Compiling a v1.0.0\r    Building [=>   ] 3/421: a(build)\r    Building [==>  ] 17/421: b, c\r";
        assert_eq!(counter(output), Some((17, 421)));
        assert_eq!(counter("   Compiling a v1.0.0\n    Finished `dev` profile\n"), None);
        assert_eq!(counter("    Building [=>   ] 3"), None, "cut off");
    }
}
