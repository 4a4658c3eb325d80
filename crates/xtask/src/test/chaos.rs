//! `cargo xtask test --chaos`: the long run of made-up faults, and a table of what became of them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::{Passed, Stack, TestOptions, cargo};
use crate::cloud::Cloud;
use crate::console;
use crate::project::Project;
use crate::settings_api::SettingsApi;

/// Template parameters of the long run. Deadlines leave room for a message that is delivered again a few times, since so many
/// cases at the same time kill the functions that handle each other's messages; and for an outage.
const PARAMETERS: &[(&str, &str)] = &[
    ("AcknowledgeTimeoutSeconds", "8"),
    ("TransferTimeoutSeconds", "240"),
    ("InstallTimeoutSeconds", "240"),
    ("RebootTimeoutSeconds", "240"),
    ("SettingTimeoutSeconds", "8"),
    ("ParkingSeconds", "30"),
    ("SettlingSeconds", "3"),
    ("WorkerTimeoutSeconds", "300"),
    ("WorkerHeartbeatSeconds", "150"),
    ("WorkerLeaseSeconds", "15"),
    ("TelemetryWindowSeconds", "1"),
    ("TemperatureCoolDownSeconds", "4"),
    ("RemediationEffectSeconds", "3"),
];
/// How long an API is out in the long run: to these deadlines about what an hour is to those of the template. Only queues deliver again
/// after a minute, here as there.
const OUTAGE_SECONDS: &str = "150";
/// What the names of these tests, and of no others, have in them.
pub(super) const NAMES: &str = "_under_faults";
/// How many workflows of the long run are tried at the same time.
const AT_ONCE: &str = "3";
const REPORTS: &str = "target/chaos";
const COLUMNS: [&str; 9] =
    ["workflow", "cases", "with disturbed calls", "survived", "stuck", "wrong", "lost", "seconds", "seed"];

/// What the tests say of a workflow.
#[derive(Deserialize)]
struct Report {
    workflow: String,
    seed: u64,
    cases: usize,
    disturbed: usize,
    survived: usize,
    stuck: usize,
    wrong: usize,
    lost: usize,
    seconds: u64,
}

/// Runs the cases of each workflow, one workflow after the other, and prints the table whether they have passed or not.
pub(super) fn chaos(project: &Project, options: &TestOptions, cases: u32, passed: &mut Passed) -> Result<()> {
    let reports = project.root.join(REPORTS);
    if reports.exists() {
        fs::remove_dir_all(&reports).with_context(|| format!("{} cannot be emptied", reports.display()))?;
    }
    let stack = Stack::deployed(project, PARAMETERS, passed)?;
    let mut tests = tests(project, options, &stack.cloud, &stack.settings_api, AT_ONCE);
    tests.env("FLEETFLOW_CHAOS_CASES", cases.to_string()).env("FLEETFLOW_CHAOS_REPORTS", &reports);
    tests.env("FLEETFLOW_CHAOS_OUTAGE_SECONDS", OUTAGE_SECONDS);
    tests.envs(options.case.map(|case| ("FLEETFLOW_CHAOS_CASE", case.to_string())));
    let outcome = passed.command(project, "Made-up faults", tests);
    println!("\n{}\n", console::table(&COLUMNS.map(String::from), &rows(&reports)?));
    outcome?;
    stack.stop(passed)
}

/// The command that tries workflows, so many at the same time.
pub(super) fn tests(
    project: &Project,
    options: &TestOptions,
    cloud: &Cloud,
    settings_api: &SettingsApi,
    at_once: &str,
) -> Command {
    let mut tests = cargo(project, &["test", "--workspace", "--test", "chaos", "--no-fail-fast", "--"]);
    tests.args(["--ignored", "--nocapture", "--test-threads", at_once]).args(&options.filter);
    tests.envs(cloud.environment()).envs(settings_api.environment());
    tests.envs(options.seed.map(|seed| ("FLEETFLOW_SEED", seed.to_string())));
    tests
}

fn rows(reports: &Path) -> Result<Vec<Vec<String>>> {
    let mut files: Vec<_> = match fs::read_dir(reports) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    files.sort();
    let mut rows = Vec::new();
    for file in files {
        let report: Report =
            serde_json::from_slice(&fs::read(&file)?).with_context(|| format!("{} is no report", file.display()))?;
        let Report { workflow, seed, cases, disturbed, survived, stuck, wrong, lost, seconds } = report;
        let numbers = [cases, disturbed, survived, stuck, wrong, lost].map(|number| number.to_string());
        let row = std::iter::once(workflow).chain(numbers).chain([seconds.to_string(), seed.to_string()]);
        rows.push(row.collect());
    }
    Ok(rows)
}
