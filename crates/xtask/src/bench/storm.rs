//! Thousands of devices that connect within seconds: each session starts its push once, whatever the rush.

use anyhow::{Result, ensure};
use serde::Deserialize;

use super::Findings;
use super::stack::{Stack, percentile};
use crate::project::Project;

const SESSIONS: usize = 5000;
const REPEATS: usize = 500;
const SECONDS: u32 = 10;

/// What `storm.py` prints.
#[derive(Deserialize)]
struct Storm {
    sessions: usize,
    events: usize,
    /// How long it took to send them.
    seconds: f64,
    executions: usize,
    twice: usize,
    lost: usize,
    /// Executions of no session.
    unknown: usize,
    /// From the first event to the start of the last execution, in seconds.
    drained: f64,
    /// From an event to the start of its execution, in seconds, sorted.
    ages: Vec<f64>,
    /// The most messages in both queues.
    deepest: usize,
}

/// Lets it storm over a new stack.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let stack = Stack::deployed(project, &[("ConfigPushEnabled", "true")])?;
    eprintln!("{SESSIONS} sessions, {REPEATS} of their events twice, in {SECONDS} s");
    let mut command = stack.cloud.script(project, "storm.py");
    command
        .args(["--queue", &stack.queue("PresenceQueue")?, "--queue", &stack.queue("SessionsQueue")?])
        .args(["--state-machine", stack.outputs.get("ConfigPushArn")?])
        .args(["--sessions", &SESSIONS.to_string(), "--repeats", &REPEATS.to_string()])
        .args(["--seconds", &SECONDS.to_string()]);
    let storm: Storm = stack.measure("storm.py", &mut command)?;
    let (twice, lost, unknown) = (storm.twice, storm.lost, storm.unknown);
    ensure!(
        twice == 0 && lost == 0 && unknown == 0,
        "of {} sessions {lost} have no execution, {twice} executions are second ones, {unknown} of no session",
        storm.sessions
    );
    Ok(findings(&storm))
}

fn findings(storm: &Storm) -> Findings {
    let seconds = |seconds: f64| format!("{seconds:.1} s");
    let figures = [
        ("sessions", storm.sessions.to_string()),
        ("events, with those that came twice", storm.events.to_string()),
        ("sent within", seconds(storm.seconds)),
        ("executions started", storm.executions.to_string()),
        ("started twice", storm.twice.to_string()),
        ("lost", storm.lost.to_string()),
        ("drained after", seconds(storm.drained)),
        ("from an event to its execution, p50", seconds(percentile(&storm.ages, 50))),
        ("p95", seconds(percentile(&storm.ages, 95))),
        ("longest", seconds(percentile(&storm.ages, 100))),
        ("most messages in the queues", storm.deepest.to_string()),
    ];
    Findings {
        about: format!(
            "Connect events of {} devices within {SECONDS} s, a tenth of them twice, put into the queue as the topic rule does it, on \
             the local cloud with five concurrent invocations of a function at most: an emulator's speed, not that of AWS. The \
             configuration push is a single state here, as the local interpreter would take minutes for what comes after the \
             start; everything before it is the real thing. A queue's age is not emulated: the longest way from the sending of an \
             event to the start of its execution stands for it. The depth of both queues was looked at twice a second. The \
             benchmark fails unless each session has one execution.",
            storm.sessions
        ),
        columns: ["storm", "measured"].map(String::from).into(),
        rows: figures.map(|(name, value)| vec![name.to_owned(), value]).into(),
    }
}
