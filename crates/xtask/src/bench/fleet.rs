//! Firmware upgrades of whole fleets, each by one job: how fast they go, and whether the time grows with the fleet or faster.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Findings;
use super::stack::{Stack, count, exponent, percentile};
use crate::process::{GRACE, Kind, Process};
use crate::program::released;
use crate::project::Project;

const DEVICES: [usize; 3] = [50, 200, 1000];
const IMAGE_BYTES: usize = 64 * 1024;
const POLL: Duration = Duration::from_secs(1);
/// How long a device may take to connect, at the slowest.
const CONNECTION_TIME: Duration = Duration::from_millis(500);

/// What `time_upgrades.py` prints.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Timed {
    executions: Vec<Execution>,
    lookup_milliseconds: f64,
}

/// An execution; times are in seconds since the job's creation.
#[derive(Deserialize)]
struct Execution {
    status: String,
    began: f64,
    ended: f64,
}

/// Upgrades one fleet after the other in one cloud.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let simulator = released(project, "device-simulator", &["--package", "device-simulator"])?;
    let stack = Stack::deployed(project, &[("ConfigPushEnabled", "false")])?;
    let bench = Bench { stack, simulator };
    let artifact = bench.stack.upload(IMAGE_BYTES)?;
    let mut measured = Vec::new();
    let mut connected = 0;
    for devices in DEVICES {
        eprintln!("{devices} devices");
        connected += devices;
        let timed = bench.upgrade(devices, connected, &artifact);
        measured.push((devices, timed.with_context(|| format!("{devices} devices cannot be measured"))?));
    }
    let growth =
        exponent(&measured.iter().map(|(devices, timed)| (count(*devices), timed.total())).collect::<Vec<_>>());
    Ok(Findings {
        about: format!(
            "Firmware upgrades of simulated devices (half JSON, half USP, mutual TLS, images of {} KiB, no time for the work of a \
             real device) by one job for all, on the local cloud, which runs on the same machine as the devices do: an emulator's \
             speed, not that of AWS. Times from the creation of the job to the end of a device's workflow. Growth: the time of \
             all upgrades goes with the number of devices to the power of {growth:.2}. Look-up: the time of handle-device-response \
             for a reply that has come before (of 100 in an invocation, median of 20), when the whole job is in the rendezvous \
             table.",
            IMAGE_BYTES / 1024
        ),
        columns: ["devices", "upgrades", "p50", "p95", "p99", "first began after", "all upgraded after", "look-up"]
            .map(String::from)
            .into(),
        rows: measured.iter().map(|(devices, timed)| timed.row(*devices)).collect(),
    })
}

impl Timed {
    /// Until all have ended.
    fn total(&self) -> f64 {
        self.executions.iter().map(|execution| execution.ended).fold(0.0, f64::max)
    }

    fn row(&self, devices: usize) -> Vec<String> {
        let seconds = |seconds: f64| format!("{seconds:.1} s");
        let mut ends: Vec<f64> = self.executions.iter().map(|execution| execution.ended).collect();
        ends.sort_by(f64::total_cmp);
        let first = self.executions.iter().map(|execution| execution.began).fold(f64::INFINITY, f64::min);
        vec![
            devices.to_string(),
            format!("{:.1} /s", count(devices) / self.total()),
            seconds(percentile(&ends, 50)),
            seconds(percentile(&ends, 95)),
            seconds(percentile(&ends, 99)),
            seconds(first),
            seconds(self.total()),
            format!("{:.1} ms", self.lookup_milliseconds),
        ]
    }
}

struct Bench<'a> {
    stack: Stack<'a>,
    simulator: PathBuf,
}

impl Bench<'_> {
    /// Registers a fleet, connects it and upgrades it. `connected` is how many devices will have been connected then.
    fn upgrade(&self, devices: usize, connected: usize, artifact: &Value) -> Result<Timed> {
        let prefix = format!("bench{devices}");
        let folder = self.stack.cloud.run.file(&prefix);
        let group = self.provision(&prefix, devices, &folder)?;
        let fleet = self.connect(devices, &folder)?;
        self.await_connections(&fleet, connected)?;
        let payload = self.stack.cloud.run.file(&format!("{prefix}.json"));
        let job = json!({
            "firmwareVersion": "2.0.0", "upgradeTrigger": "bench", "targetArn": group, "artifact": artifact,
        });
        fs::write(&payload, job.to_string())?;
        let mut command = self.stack.cloud.script(self.stack.project, "time_upgrades.py");
        command
            .args(["--create-job", &self.stack.function("CreateJobFunction")?])
            .args(["--handle-response", &self.stack.function("HandleDeviceResponseFunction")?])
            .args(["--state-machine", self.stack.outputs.get("FirmwareUpgradeArn")?])
            .args(["--thing", &format!("{prefix}-0001"), "--devices", &devices.to_string()])
            .arg("--payload")
            .arg(&payload);
        let timed: Timed = self.stack.measure("time_upgrades.py", &mut command)?;
        let failed = timed.executions.iter().filter(|execution| execution.status != "SUCCEEDED").count();
        ensure!(failed == 0, "{failed} of {devices} upgrades have failed");
        fleet.interrupt(GRACE);
        Ok(timed)
    }

    /// The ARN of the fleet's group.
    fn provision(&self, prefix: &str, devices: usize, folder: &Path) -> Result<String> {
        let mut command = self.simulate("provision", folder);
        command
            .args(["--quiet", "--count", &devices.to_string(), "--prefix", prefix, "--thing-group", prefix])
            .args(["--policy", self.stack.outputs.get("DevicePolicyName")?, "--protocol", "mixed"])
            .args(["--thing-type", self.stack.outputs.get("ThingTypeName")?]);
        let log = self.stack.cloud.run.log("provision");
        self.stack.project.processes.run("`device-simulator provision`", &mut command, &log)?;
        let described: Value = self.stack.aws(&["iot", "describe-thing-group", "--thing-group-name", prefix])?;
        Ok(described["thingGroupArn"].as_str().context("the group has no ARN")?.to_owned())
    }

    fn connect(&self, devices: usize, folder: &Path) -> Result<Process> {
        let mut command = self.simulate("run", folder);
        command
            .args(["--quiet", "--upgrades", "1", "--step-delay", "0s", "--first-boot-delay", "1day"])
            .args(["--endpoint", &self.stack.cloud.mqtt])
            .arg("--ca")
            .arg(&self.stack.cloud.ca);
        let log = self.stack.cloud.run.log(&format!("simulator-{devices}"));
        let fleet = self.stack.project.processes.spawn("The simulator", Kind::Task, &mut command, Some(&log))?;
        self.stack.cloud.run.add(&format!("simulator-{devices}"), &fleet)?;
        Ok(fleet)
    }

    fn simulate(&self, subcommand: &str, folder: &Path) -> std::process::Command {
        let mut command = self.stack.project.command(&self.simulator);
        command.envs(self.stack.cloud.environment()).arg(subcommand).arg("--certificates").arg(folder);
        command
    }

    fn await_connections(&self, fleet: &Process, devices: usize) -> Result<()> {
        let table = self.stack.outputs.get("ConnectionsTableName")?;
        let limit = CONNECTION_TIME * u32::try_from(devices)? + GRACE;
        self.stack.project.processes.wait_for("the connection of all devices", POLL, limit, || {
            let answer: Value = self.stack.aws(&["dynamodb", "scan", "--select", "COUNT", "--table-name", table])?;
            if let Some(status) = fleet.status() {
                bail!(fleet.ended_early(status));
            }
            let connected = answer["Count"].as_u64().and_then(|count| usize::try_from(count).ok());
            Ok(connected.filter(|connected| *connected >= devices).map(drop))
        })
    }
}
