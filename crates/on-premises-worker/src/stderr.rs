//! What a program writes to stderr: its progress, lines to log, and the end that explains a failure.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};

/// So much of a line is looked at, in bytes.
const LINE_BYTES: usize = 1024;
const TAIL_LINES: usize = 20;
const TAIL_BYTES: usize = 4096;
/// So many lines are logged in a second, and so many reports of progress told.
const LINES_A_SECOND: u32 = 100;

/// The last lines, shared with whoever reads them while more come.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push_back(line.to_owned());
        while lines.len() > TAIL_LINES || lines.iter().map(String::len).sum::<usize>() > TAIL_BYTES {
            lines.pop_front();
        }
    }

    /// The last lines.
    pub(crate) fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// Reads to the end, in bounded memory.
pub(crate) async fn read(mut stderr: impl AsyncRead + Unpin, tail: Tail, on_progress: impl Fn(u8)) {
    let mut lines = Lines {
        line: Vec::new(),
        tail,
        logged: Budget::default(),
        told: Budget::default(),
        percent: None,
        on_progress,
    };
    let mut buffer = vec![0; 8192];
    // A program whose stderr cannot be read any more has ended.
    while let Ok(length @ 1..) = stderr.read(&mut buffer).await {
        lines.take(&buffer[..length]);
    }
    lines.end_line();
}

struct Lines<F> {
    line: Vec<u8>,
    tail: Tail,
    logged: Budget,
    told: Budget,
    /// The progress that was told last.
    percent: Option<u8>,
    on_progress: F,
}

/// How many lines there were in this second.
#[derive(Default)]
struct Budget {
    lines: u32,
    since: Option<Instant>,
}

impl Budget {
    /// The number of this line.
    fn take(&mut self) -> u32 {
        if self.since.is_none_or(|since| since.elapsed() > Duration::from_secs(1)) {
            (self.lines, self.since) = (0, Some(Instant::now()));
        }
        self.lines = self.lines.saturating_add(1);
        self.lines
    }
}

impl<F: Fn(u8)> Lines<F> {
    fn take(&mut self, bytes: &[u8]) {
        for (number, part) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if number > 0 {
                self.end_line();
            }
            let room = LINE_BYTES - self.line.len();
            self.line.extend_from_slice(&part[..part.len().min(room)]);
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
        self.line.clear();
        if let Some(percent) = progress(&line) {
            self.tell(percent);
        } else if !line.is_empty() {
            self.tail.push(&line);
            self.log(&line);
        }
    }

    /// Tells of progress if it is news, unless the program floods.
    fn tell(&mut self, percent: u8) {
        if self.percent != Some(percent) && self.told.take() <= LINES_A_SECOND {
            self.percent = Some(percent);
            (self.on_progress)(percent);
        }
    }

    /// Logs a line, unless the program floods.
    fn log(&mut self, line: &str) {
        match self.logged.take() {
            ..=LINES_A_SECOND => tracing::info!(line, "the program says"),
            number if number == LINES_A_SECOND + 1 => tracing::warn!("the program says too much, lines are left out"),
            _ => {}
        }
    }
}

/// The percentage of a line `progress: N`.
fn progress(line: &str) -> Option<u8> {
    let percent: f64 = line.strip_prefix("progress:")?.trim_end_matches('%').trim().parse().ok()?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (0.0..=100.0).contains(&percent).then_some(percent as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_text(text: &[u8]) -> (String, Vec<u8>) {
        let (tail, percents) = (Tail::default(), Mutex::new(Vec::new()));
        read(text, tail.clone(), |percent| percents.lock().unwrap().push(percent)).await;
        (tail.text(), percents.into_inner().unwrap())
    }

    #[tokio::test]
    async fn progress_is_told_and_the_rest_is_kept() {
        let (tail, percents) =
            read_text(b"begin\nprogress: 5\n\nprogress: 40.7 %\nprogress: 101\r\nprogress: x\nend").await;
        assert_eq!(percents, [5, 40]);
        assert_eq!(tail, "begin\nprogress: 101\nprogress: x\nend");
    }

    #[tokio::test]
    async fn a_flood_of_progress_is_bounded() {
        let (_, percents) = read_text("progress: 7\n".repeat(10_000).as_bytes()).await;
        assert_eq!(percents, [7]);
        let begin = Instant::now();
        let (_, percents) = read_text("progress: 1\nprogress: 2\n".repeat(100_000).as_bytes()).await;
        let seconds = usize::try_from(begin.elapsed().as_secs()).unwrap() + 1;
        assert!(percents.len() <= seconds * LINES_A_SECOND as usize, "{}", percents.len());
        // A line of any length is one.
        let long = format!("progress: {}", "0".repeat(1 << 20));
        assert_eq!(read_text(long.as_bytes()).await.1, [0]);
    }

    #[tokio::test]
    async fn only_the_end_of_much_is_kept() {
        let many: String = (0..1000).map(|number| format!("line {number}\n")).collect();
        let (tail, _) = read_text(many.as_bytes()).await;
        assert!(tail.starts_with("line 980\n") && tail.ends_with("line 999"), "{tail}");
        let (tail, _) = read_text(&b"x".repeat(1 << 20)).await;
        assert_eq!(tail.len(), LINE_BYTES);
        let long = format!("{}\n", "y".repeat(900)).repeat(50);
        assert!(read_text(long.as_bytes()).await.0.len() <= TAIL_BYTES + TAIL_LINES);
        assert_eq!(read_text(b"\xff\n").await.0, "\u{fffd}");
    }
}
