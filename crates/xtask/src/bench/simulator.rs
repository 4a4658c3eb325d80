//! The device simulator against a broker that can take ten thousand devices. The broker is a program of its own: only who
//! measures has to compile it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Findings;
use crate::process::Kind;
use crate::program::released;
use crate::project::Project;

const MANIFEST: &str = "crates/simulator-bench/Cargo.toml";
/// The first is what the memory of the others is compared with.
const DEVICES: [u64; 4] = [1, 100, 1000, 10_000];
/// What a device may have, in KiB.
const TARGET: f64 = 40.0;

/// What was measured of a fleet.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Measured {
    devices: u64,
    connect_seconds: f64,
    /// Of the process, in KiB, when all are connected.
    connected_memory: u64,
    /// The same after the messages.
    memory: u64,
    peak_memory: u64,
    messages_per_second: f64,
}

/// Folders that are deleted when they are not needed any more.
struct Temporary([PathBuf; 2]);

impl Drop for Temporary {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// Builds both programs and measures one size of the fleet after the other.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let simulator = released(project, "device-simulator", &["--package", "device-simulator"])?;
    let target = project.root.join("target");
    let target = target.to_str().context("the checkout's path is no text")?;
    let arguments = ["--manifest-path", MANIFEST, "--target-dir", target];
    let bench = released(project, "simulator-bench", &arguments)?;
    let measured = run(project, &simulator, &bench)?;
    let base = measured.first().context("nothing was measured")?;
    Ok(Findings {
        about: format!(
            "A release build of the device simulator, one process, against a `rumqttd` on the same machine: mutual TLS, each device \
             with a key (P-256) and a certificate of its own, half of them JSON and half USP, their state in memory rather \
             than on the disk. Time from the start of the process until each device is subscribed, to a fifth of a second; \
             resident memory of the process beyond that with one device ({:.1} MiB), for each of the others, once all are \
             connected and after the messages; then settings that devices are sent, 20 each, the next when the last is \
             answered, and their answers. Broker and simulator share the processors. The target is {TARGET:.0} KiB a device at \
             most.",
            mebibytes(base.connected_memory)
        ),
        columns: [
            "devices",
            "connected after",
            "connected, a device",
            "after messages, a device",
            "peak of the process",
            "messages",
        ]
        .map(String::from)
        .into(),
        rows: measured.iter().map(|measured| row(measured, base)).collect(),
    })
}

fn run(project: &Project, simulator: &Path, bench: &Path) -> Result<Vec<Measured>> {
    let name = format!("fleetflow-{}", std::process::id());
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let temporary = Temporary([project.state().join(&name), parent.join(&name)]);
    let [folder, state] = &temporary.0;
    let mut command = project.command(bench);
    command.arg("--simulator").arg(simulator).arg("--folder").arg(folder).arg("--state").arg(state);
    command.args(DEVICES.map(|devices| devices.to_string()));
    // Beside its progress, which is for the terminal.
    let answer = project.state().join("simulator-bench.out");
    command.stdout(File::create(&answer)?);
    let process = project.processes.spawn("The benchmark of the simulator", Kind::Task, &mut command, None)?;
    let status = project.processes.finish(&process)?;
    if !status.success() {
        bail!("the simulator cannot be measured ({status})");
    }
    let lines = fs::read_to_string(&answer)?;
    lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn row(measured: &Measured, base: &Measured) -> Vec<String> {
    let each = |memory: u64, base_memory: u64| match measured.devices - base.devices {
        0 => "-".to_owned(),
        others => format!("{:.1} KiB", kibibytes(memory.saturating_sub(base_memory)) / kibibytes(others)),
    };
    vec![
        measured.devices.to_string(),
        format!("{:.1} s", measured.connect_seconds),
        each(measured.connected_memory, base.connected_memory),
        each(measured.memory, base.memory),
        format!("{:.1} MiB", mebibytes(measured.peak_memory)),
        format!("{:.0} /s", measured.messages_per_second),
    ]
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with one decimal")]
fn kibibytes(number: u64) -> f64 {
    number as f64
}

fn mebibytes(kibibytes: u64) -> f64 {
    self::kibibytes(kibibytes) / 1024.0
}
