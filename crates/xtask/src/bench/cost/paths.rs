//! The ways through each workflow, run by simulated devices one after the other: what waits together is handled together, and
//! costs less than what comes alone.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path as FilePath, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::meter::{Meter, Reading};
use super::{Workflows, monthly, worst};
use crate::bench::stack::Stack;
use crate::cloud::{Cloud, FixedPorts};
use crate::costs::{Amounts, Measured, Path, Prices, Workflow};
use crate::deploy::{self, Outputs};
use crate::process::{GRACE, Kind, Process};
use crate::program::{Programs, released};
use crate::project::Project;

const DEVICES: usize = 10;
/// Devices whose whole story of failures is told.
const FAILING: usize = 5;
/// `RecoveryAttempts` times `RecoveryCycles`.
const FAILURES: usize = 20;
const SENSORS: usize = 20;
const READINGS: usize = 30;
/// How many readings a sensor sends in vain.
const VAIN_READINGS: usize = 8;
/// How upgrades are known to fail after most of their work; the most expensive one counts.
const FAILURES_OF_UPGRADES: &[(&str, &str, &str)] = &[
    ("mute", "mute", "never answers a command sent three times"),
    ("cut", "power-cut@installed", "loses power with the image written, and does not come back"),
    ("gone", "power-cut@activated", "says that the image is installed, and does not come back from its reboot"),
    ("old", "wrong-version", "runs its old image after the reboot"),
];
const IMAGE_BYTES: usize = 64 * 1024;
const POLL: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_mins(5);
/// When nothing was metered for so long, nothing will be.
const QUIET: Duration = Duration::from_secs(6);
/// Between the starts of two devices, or two jobs.
const APART: Duration = Duration::from_millis(700);

/// Nobody wants to wait for deadlines of the field. Devices that come online get settings in another cloud, or they would
/// in each measurement.
const PARAMETERS: &[(&str, &str)] = &[
    ("ConfigPushEnabled", "false"),
    ("AcknowledgeTimeoutSeconds", "5"),
    ("InstallTimeoutSeconds", "10"),
    ("RebootTimeoutSeconds", "10"),
    ("ParkingSeconds", "1"),
    ("SettlingSeconds", "1"),
    ("WorkerLeaseSeconds", "3"),
    ("WorkerHeartbeatSeconds", "9"),
    ("RemediationEffectSeconds", "3"),
];
const PUSH_PARAMETERS: &[(&str, &str)] = &[("SettingTimeoutSeconds", "5")];

/// An execution, as `state_transitions.py` prints it.
#[derive(Deserialize)]
pub(super) struct Execution {
    pub(super) name: String,
    status: String,
    transitions: u64,
}

/// A deployed stack with meters.
pub(super) struct Bench<'a> {
    pub(super) stack: Stack<'a>,
    pub(super) meter: Meter,
    simulator: PathBuf,
}

/// Runs everything; what was counted, and what of the stack costs by the month.
pub(super) fn run(project: &Project, prices: &Prices) -> Result<(Workflows, Amounts)> {
    let program = |name| released(project, name, &["--package", name]);
    let [simulator, worker, proxy] = ["device-simulator", "on-premises-worker", "aws-proxy"].map(program);
    let (simulator, worker, proxy) = (simulator?, worker?, proxy?);
    let mut workflows = Workflows::new();
    let mut add = |workflow: Workflow, measured: Measured| {
        workflows.insert(workflow.key().to_owned(), measured);
    };
    let bench = Bench::deployed(project, &simulator, &proxy, PARAMETERS)?;
    let monthly = monthly(&bench.stack)?;
    add(Workflow::Firmware, bench.firmware(prices)?);
    add(Workflow::OnPremises, bench.on_premises(&worker)?);
    add(Workflow::Recovery, bench.recovery()?);
    add(Workflow::Telemetry, bench.telemetry()?);
    drop(bench);
    let bench = Bench::deployed(project, &simulator, &proxy, PUSH_PARAMETERS)?;
    add(Workflow::Config, bench.config()?);
    Ok((workflows, monthly))
}

impl<'a> Bench<'a> {
    fn deployed(
        project: &'a Project,
        simulator: &FilePath,
        proxy: &FilePath,
        parameters: &[(&str, &str)],
    ) -> Result<Self> {
        let cloud = Cloud::start_with_proxy(project, proxy, FixedPorts::default(), false)?;
        let outputs = deploy::deploy_released(project, &cloud, &deploy::parameters(parameters))?;
        Self::metered(project, simulator, cloud, outputs)
    }

    /// With programs of the development profile, which are built already as a rule.
    pub(super) fn of_development(project: &'a Project, programs: &Programs) -> Result<Self> {
        let cloud = Cloud::start_with_proxy(project, programs.path("aws-proxy")?, FixedPorts::default(), false)?;
        let outputs = deploy::deploy(project, &cloud, programs, &deploy::parameters(PARAMETERS))?;
        Self::metered(project, programs.path("device-simulator")?, cloud, outputs)
    }

    fn metered(project: &'a Project, simulator: &FilePath, cloud: Cloud, outputs: Outputs) -> Result<Self> {
        let proxy = cloud.environment().into_iter().find(|(name, _)| *name == "FLEETFLOW_PROXY");
        let (_, proxy) = proxy.context("the local cloud has no proxy")?;
        let meter = Meter { proxy, file: cloud.run.log("metering") };
        Ok(Self { stack: Stack { project, cloud, outputs }, meter, simulator: simulator.to_owned() })
    }

    /// A job for devices that are online.
    fn firmware(&self, prices: &Prices) -> Result<Measured> {
        let upgraded = "upgraded by a job";
        let happy = self.upgrade("happy", &[], upgraded, "SUCCEEDED")?;
        let failed = FAILURES_OF_UPGRADES.iter().map(|(name, fault, about)| {
            self.upgrade(name, &["--fail", &format!("{fault}=100%"), "--offline-for", "1h"], about, "FAILED")
        });
        let worst = worst(prices, failed.collect::<Result<_>>()?)?;
        Ok(Measured { unit: "device".to_owned(), happy, worst })
    }

    fn upgrade(&self, name: &str, faults: &[&str], about: &str, status: &str) -> Result<Path> {
        eprintln!("firmware upgrade, {name}");
        let machine = self.stack.outputs.get("FirmwareUpgradeArn")?;
        let group = self.provision(name, DEVICES, "DevicePolicyName", "mixed", &["--thing-group", name])?;
        let fleet = self.start(name, "run", name, faults)?;
        self.settle()?;
        let known = self.names(machine)?;
        let since = self.meter.reset()?;
        self.create_job(name, &group)?;
        let executions = self.ended(machine, &known, DEVICES, status)?;
        self.settle()?;
        let mut reading = self.meter.read(since)?;
        reading.executions(executions.len(), transitions(&executions));
        reading.job_executions(executions.len());
        fleet.interrupt(GRACE);
        self.settle()?;
        Ok(reading.path(about.to_owned(), DEVICES))
    }

    fn create_job(&self, name: &str, group: &str) -> Result<()> {
        let artifact = self.stack.upload(IMAGE_BYTES)?;
        let payload = self.stack.cloud.run.file(&format!("{name}.json"));
        let job = json!({
            "firmwareVersion": "2.0.0", "upgradeTrigger": "bench", "targetArn": group,
            "artifact": artifact, "rollout": {"maximumPerMinute": 60}, "abort": {"percentage": 100, "minimumExecuted": 1000},
        });
        fs::write(&payload, job.to_string())?;
        let mut invoke = self.stack.cloud.tool(self.stack.project, "aws");
        invoke.args(["lambda", "invoke"]);
        invoke.args(["--function-name", &self.stack.function("CreateJobFunction")?, "--payload"]);
        invoke.arg(format!("file://{}", payload.display())).arg(self.stack.cloud.run.file("create-job.json"));
        self.command("create-job", &mut invoke)
    }

    /// Jobs for a worker, and for nobody.
    fn on_premises(&self, program: &FilePath) -> Result<Measured> {
        let nobody = self.jobs(FAILING, "sent four times to workers that are not there", "FAILED")?;
        let worker = self.start_worker(program)?;
        let happy = self.jobs(DEVICES, "added by a worker at once", "SUCCEEDED")?;
        worker.interrupt(GRACE);
        self.settle()?;
        Ok(Measured { unit: "job".to_owned(), happy, worst: nobody })
    }

    fn jobs(&self, jobs: usize, about: &str, status: &str) -> Result<Path> {
        eprintln!("on-premises job, {about}");
        let machine = self.stack.outputs.get("OnPremisesJobArn")?;
        let known = self.names(machine)?;
        let since = self.meter.reset()?;
        for _ in 0..jobs {
            let start = ["stepfunctions", "start-execution", "--state-machine-arn", machine, "--input"];
            let _: Value = self.stack.aws(&[start.as_slice(), &["{\"a\":15,\"b\":42}"]].concat())?;
        }
        let executions = self.ended(machine, &known, jobs, status)?;
        self.settle()?;
        let mut reading = self.meter.read(since)?;
        reading.executions(executions.len(), transitions(&executions));
        Ok(reading.path(about.to_owned(), jobs))
    }

    fn start_worker(&self, program: &FilePath) -> Result<Process> {
        let folder = self.stack.cloud.run.file("worker");
        fs::create_dir_all(&folder)?;
        let mut create = self.stack.cloud.tool(self.stack.project, "aws");
        create.args(["iot", "create-keys-and-certificate", "--set-as-active", "--query", "certificateArn"]);
        create.args(["--output", "text", "--certificate-pem-outfile"]).arg(folder.join("certificate.pem"));
        create.arg("--private-key-outfile").arg(folder.join("private.key"));
        let log = self.stack.cloud.run.log("create-certificate");
        let arn = self.stack.project.processes.output("`aws iot create-keys-and-certificate`", &mut create, &log)?;
        let mut attach = self.stack.cloud.tool(self.stack.project, "aws");
        let policy = self.stack.outputs.get("Tenant1WorkerPolicyName")?;
        attach.args(["iot", "attach-policy", "--policy-name", policy, "--target", arn.trim()]);
        self.command("attach-policy", &mut attach)?;
        let (endpoint, ca) = (&self.stack.cloud.mqtt, self.stack.cloud.ca.display());
        let config = format!(
            "tenant = \"tenant1\"\nworker = \"worker-1\"\nendpoint = \"{endpoint}\"\ncertificate = \"certificate.pem\"\n\
             private_key = \"private.key\"\nca = \"{ca}\"\njournal = \"journal\"\n"
        );
        fs::write(folder.join("worker.toml"), config)?;
        let mut run = self.stack.project.command(program);
        run.arg("run").arg("--config").arg(folder.join("worker.toml"));
        let worker = self.spawn("worker", &mut run)?;
        self.settle()?;
        Ok(worker)
    }

    /// Devices that fail until they are given up.
    fn recovery(&self) -> Result<Measured> {
        eprintln!("failed-update recovery");
        self.provision(
            "failing",
            FAILING,
            "DevicePolicyName",
            "json",
            &["--attribute", "FW=2.27", "--attribute", "model=wo:v8"],
        )?;
        self.settle()?;
        let since = self.meter.reset()?;
        self.fail(1..=1)?;
        self.settle()?;
        let happy = self.meter.read(since)?.path("a failure is counted, and the job tries again".to_owned(), FAILING);
        // One that is parked comes back before it fails again.
        let machine = self.stack.outputs.get("FailedUpdateRecoveryArn")?;
        let mut known = BTreeSet::new();
        for failures in [2..=FAILURES / 2, FAILURES / 2 + 1..=FAILURES] {
            self.fail(failures)?;
            self.ended(machine, &known, FAILING, "SUCCEEDED")?;
            known = self.names(machine)?;
        }
        self.settle()?;
        let mut reading = self.meter.read(since)?;
        let all = self.executions(machine)?;
        reading.executions(all.len(), transitions(&all));
        let about = "all of a device that fails 20 times: parked, restored and quarantined".to_owned();
        Ok(Measured { unit: "device".to_owned(), happy, worst: reading.path(about, FAILING) })
    }

    /// These failures of each device.
    fn fail(&self, failures: RangeInclusive<usize>) -> Result<()> {
        let of_all = |failure| (1..=FAILING).map(move |device| failed_update(&format!("failing-{device:04}"), failure));
        self.publish(failures.flat_map(of_all))
    }

    /// Publishes messages, each with its topic and payload.
    pub(super) fn publish(&self, messages: impl Iterator<Item = Value>) -> Result<()> {
        let file = self.stack.cloud.run.file("messages.jsonl");
        fs::write(&file, messages.map(|message| message.to_string()).collect::<Vec<_>>().join("\n"))?;
        let mut command = self.stack.cloud.script(self.stack.project, "publish_messages.py");
        command.arg(&file);
        self.command("publish-messages", &mut command)
    }

    /// Readings of sensors that are well, and of others that no remediation helps.
    fn telemetry(&self) -> Result<Measured> {
        eprintln!("telemetry");
        let about = format!("kept, {SENSORS} sensors, a reading a second each, gathered for five seconds");
        let readings = READINGS.to_string();
        let well = self.monitor("well", SENSORS, &["--velocity", "1", "--readings", &readings])?;
        let happy = well.path(about, SENSORS * READINGS);
        let readings = VAIN_READINGS.to_string();
        let arguments = ["--velocity", "0", "--min-temp", "40", "--remediation-factor", "0", "--readings", &readings];
        let vain = self.monitor("vain", DEVICES, &arguments)?;
        let about = "out of the band: a remediation, its check, and word to people that it was in vain".to_owned();
        let mut worst = vain.path(about, DEVICES);
        // The other readings are as all are.
        for (amounts, others) in [(&mut worst.amounts, &happy.amounts), (&mut worst.calls, &happy.calls)] {
            for (item, amount) in amounts.iter_mut() {
                let other = others.get(item).copied().unwrap_or_default();
                let readings = (1..VAIN_READINGS).map(|_| other).sum::<f64>();
                *amount = (*amount - readings).max(other);
            }
        }
        Ok(Measured { unit: "reading".to_owned(), happy, worst })
    }

    fn monitor(&self, name: &str, sensors: usize, arguments: &[&str]) -> Result<Reading> {
        self.provision(name, sensors, "MonitoringDevicePolicyName", "json", &["--attribute", "building=1"])?;
        self.settle()?;
        let since = self.meter.reset()?;
        let arguments = [&["--building", "1", "--update-frequency", "1s"], arguments].concat();
        let monitor = self.start(name, "monitor", name, &arguments)?;
        let status = self.stack.project.processes.finish(&monitor)?;
        ensure!(status.success(), "the sensors have failed ({status})");
        self.settle()?;
        // The check of a remediation comes later, and again.
        self.settle()?;
        self.meter.read(since)
    }

    /// Devices that come online and confirm their settings, or do not.
    fn config(&self) -> Result<Measured> {
        let happy = self.push("happy", &[], "comes online, gets one setting and confirms it", "SUCCEEDED")?;
        let faults = ["--fail", "mute=100%"];
        let worst = self.push("mute", &faults, "comes online and never answers settings sent three times", "FAILED")?;
        Ok(Measured { unit: "device".to_owned(), happy, worst })
    }

    fn push(&self, name: &str, faults: &[&str], about: &str, status: &str) -> Result<Path> {
        eprintln!("configuration push, {name}");
        let machine = self.stack.outputs.get("ConfigPushArn")?;
        self.provision(name, DEVICES, "DevicePolicyName", "json", &[])?;
        self.settle()?;
        let known = self.names(machine)?;
        let since = self.meter.reset()?;
        let mut fleet = Vec::new();
        for device in 1..=DEVICES {
            let thing = format!("{name}-{device:04}");
            fleet.push(self.start(
                &thing,
                "run",
                name,
                &[&["--thing", &thing, "--answer-delay", "1s"], faults].concat(),
            )?);
            std::thread::sleep(APART);
        }
        let executions = self.ended(machine, &known, DEVICES, status)?;
        self.settle()?;
        let mut reading = self.meter.read(since)?;
        reading.executions(executions.len(), transitions(&executions));
        for device in fleet {
            device.interrupt(GRACE);
        }
        Ok(reading.path(about.to_owned(), DEVICES))
    }

    /// Registers devices in a folder of their name; the ARN of the group of that name, if they have one.
    pub(super) fn provision(
        &self,
        name: &str,
        count: usize,
        policy: &str,
        protocol: &str,
        arguments: &[&str],
    ) -> Result<String> {
        let mut command = self.simulate("provision", name);
        command.args(["--quiet", "--count", &count.to_string(), "--prefix", name, "--protocol", protocol]);
        command.args(["--policy", self.stack.outputs.get(policy)?]).args(arguments);
        command.args(["--thing-type", self.stack.outputs.get("ThingTypeName")?]);
        self.command("provision", &mut command)?;
        if !arguments.contains(&"--thing-group") {
            return Ok(String::new());
        }
        let described: Value = self.stack.aws(&["iot", "describe-thing-group", "--thing-group-name", name])?;
        Ok(described["thingGroupArn"].as_str().context("the group has no ARN")?.to_owned())
    }

    fn simulate(&self, subcommand: &str, folder: &str) -> Command {
        let mut command = self.stack.project.command(&self.simulator);
        command.envs(self.stack.cloud.environment()).arg(subcommand);
        command.arg("--certificates").arg(self.stack.cloud.run.file(folder));
        command
    }

    /// Starts simulated devices.
    fn start(&self, name: &str, subcommand: &str, folder: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = self.simulate(subcommand, folder);
        command.args(["--endpoint", &self.stack.cloud.mqtt]).arg("--ca").arg(&self.stack.cloud.ca);
        if subcommand == "run" {
            command.args(["--quiet", "--step-delay", "500ms", "--first-boot-delay", "1day"]);
        }
        self.spawn(name, command.args(arguments))
    }

    fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        let log = self.stack.cloud.run.log(&format!("bench-{name}"));
        let process = self.stack.project.processes.spawn(name, Kind::Task, command, Some(&log))?;
        self.stack.cloud.run.add(name, &process)?;
        Ok(process)
    }

    fn command(&self, name: &str, command: &mut Command) -> Result<()> {
        self.stack.project.processes.run(&format!("`{name}`"), command, &self.stack.cloud.run.log(name))
    }

    /// Waits until nothing happens any more.
    pub(super) fn settle(&self) -> Result<()> {
        let (mut len, mut since) = (0, Instant::now());
        self.stack.project.processes.wait_for("the end of what happens", POLL, LIMIT, || {
            if self.meter.len() != len {
                (len, since) = (self.meter.len(), Instant::now());
            }
            Ok((since.elapsed() >= QUIET).then_some(()))
        })
    }

    pub(super) fn executions(&self, machine: &str) -> Result<Vec<Execution>> {
        let script = "state_transitions.py";
        let mut command = self.stack.cloud.script(self.stack.project, script);
        self.stack.measure(script, command.args(["--state-machine", machine]))
    }

    pub(super) fn names(&self, machine: &str) -> Result<BTreeSet<String>> {
        Ok(self.executions(machine)?.into_iter().map(|execution| execution.name).collect())
    }

    /// So many executions that were not known before, when all have ended with that status.
    fn ended(&self, machine: &str, known: &BTreeSet<String>, count: usize, status: &str) -> Result<Vec<Execution>> {
        let what = format!("the end of {count} executions");
        let executions = self.stack.project.processes.wait_for(&what, POLL, LIMIT, || {
            let mut executions = self.executions(machine)?;
            executions.retain(|execution| !known.contains(&execution.name));
            let ended = executions.iter().filter(|execution| execution.status != "RUNNING").count();
            Ok((ended >= count).then_some(executions))
        })?;
        match executions.iter().find(|execution| execution.status != status) {
            Some(other) => bail!("the execution {} is {}, not {status}", other.name, other.status),
            None if executions.len() == count => Ok(executions),
            None => bail!("{} executions instead of {count}", executions.len()),
        }
    }
}

/// A thing's report of its failure of that number.
pub(super) fn failed_update(thing: &str, number: usize) -> Value {
    let time = (1_711_320_208_793 + number).to_string();
    let payload = json!({"_id_": thing, "timestamp": time, "status": "failed", "model": "wo:v8", "FW": "2.27"});
    json!({"topic": "iot/device/data", "payload": payload})
}

pub(super) fn transitions(executions: &[Execution]) -> u64 {
    executions.iter().map(|execution| execution.transitions).sum()
}
