//! How a run shows itself: a bar in a terminal, plain lines otherwise.

use crate::fleet::{EndedUpgrade, Outcome};
use crate::{Fleet, Phase};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

const REDRAW: Duration = Duration::from_millis(200);

/// How much a run says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verbosity {
    /// A bar when standard error is a terminal, else a line for each message and step.
    Normal,
    /// Warnings and errors only.
    Quiet,
}

/// The bar of this process and the log that goes past it. Make one, once.
#[derive(Clone)]
pub struct Display {
    bar: ProgressBar,
}

impl Display {
    /// Starts the log. `total`: how many things there are to do, if that is known.
    pub fn start(verbosity: Verbosity, total: Option<u64>) -> Self {
        let has_bar = verbosity == Verbosity::Normal && io::stderr().is_terminal();
        let target = if has_bar { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(total, target);
        let template = if total.is_some() { "{elapsed} [{bar:30}] {pos}/{len} {msg}" } else { "{elapsed} {pos} {msg}" };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        let level = if has_bar || verbosity == Verbosity::Quiet { "warn" } else { "info" };
        Self { bar }.with_log(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level)))
    }

    /// Starts the log alone: no bar, and lines from that level on.
    pub fn log(level: &str) -> Self {
        Self { bar: ProgressBar::hidden() }.with_log(EnvFilter::new(level))
    }

    fn with_log(self, filter: EnvFilter) -> Self {
        let display = self;
        // A log that exists already, in a test, is as good.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_target(false)
            .with_ansi(false)
            .with_writer(display.clone())
            .try_init();
        display
    }

    /// One more thing is done.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Shows a fleet until dropped, and says when all of it is connected.
    pub async fn follow(&self, fleet: &Fleet) -> ! {
        let mut redraw = tokio::time::interval(REDRAW);
        let mut is_connected = false;
        loop {
            redraw.tick().await;
            let (ended, phases) = (fleet.ended(), fleet.phases());
            // The first phase is that without a connection.
            if !is_connected && phases[0] == 0 {
                is_connected = true;
                tracing::info!("all {} devices are connected", phases.iter().sum::<usize>());
            }
            self.bar.set_position(ended.len() as u64);
            self.bar.set_message(summary(phases, &ended, fleet.total_applied()));
        }
    }
}

/// Counts by phase and outcome, without those that are zero.
fn summary(phases: [usize; Phase::ALL.len()], ended: &[EndedUpgrade], applied: usize) -> String {
    let mut parts: Vec<_> = Phase::ALL.iter().zip(phases).map(|(phase, count)| (phase.name(), count)).collect();
    parts.push(("succeeded", count(ended, Outcome::Succeeded)));
    parts.push(("failed", count(ended, Outcome::Failed)));
    parts.push(("cancelled", count(ended, Outcome::Cancelled)));
    parts.push(("settings applied", applied));
    let shown: Vec<_> =
        parts.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{count} {name}")).collect();
    shown.join(", ")
}

/// How many operations ended so.
pub fn count(ended: &[EndedUpgrade], outcome: Outcome) -> usize {
    ended.iter().filter(|ended| ended.outcome == outcome).count()
}

impl<'a> MakeWriter<'a> for Display {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for Display {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bar.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_leaves_out_what_is_not_there() {
        assert_eq!(summary([0, 3, 0, 2, 0, 0, 0], &[], 0), "3 idle, 2 downloading");
        assert_eq!(summary([0, 3, 0, 0, 0, 0, 0], &[], 6), "3 idle, 6 settings applied");
    }
}
