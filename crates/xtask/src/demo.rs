//! `cargo xtask demo`: a job over a fleet of simulated devices, from the payload to the closing table.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{IsTerminal, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cloud::{self, Cloud, FixedPorts, STACK};
use crate::console::Step;
use crate::deploy::{self, Outputs};
use crate::process::{GRACE, Kind, Process};
use crate::project::Project;

const VERSION: &str = "2.0.0";
const IMAGE_KEY: &str = "firmware/2.0.0";
const IMAGE_SIZE: usize = 256 * 1024;
/// Template parameters of the demonstration: nobody wants to watch the deadlines of the field pass.
const DEMO_PARAMETERS: &[(&str, &str)] = &[
    ("AcknowledgeTimeoutSeconds", "30"),
    ("TransferTimeoutSeconds", "120"),
    ("InstallTimeoutSeconds", "60"),
    ("RebootTimeoutSeconds", "60"),
];
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// How long the job waits for the fleet to connect, and how much longer for each device.
const CONNECTION_LIMIT: Duration = Duration::from_secs(8);
const CONNECTION_TIME: Duration = Duration::from_millis(100);
/// Faults after which an upgrade fails.
const FAILING: [&str; 8] =
    ["download", "checksum", "boot", "malformed-boot", "refuse", "mute", "wrong-version", "wrong-operation"];
/// Faults after which an upgrade may fail: it depends on the report that is lost, and on the deadlines.
const MAY_FAIL: [&str; 2] = ["drop", "power-cut"];

/// What `demo` takes.
#[derive(Args)]
pub(crate) struct DemoOptions {
    /// How many devices to simulate.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    devices: u32,
    /// Faults of the simulated devices, such as `boot=3,download=2`; `device-simulator run --help` lists them.
    #[arg(long, value_name = "KIND=COUNT,…")]
    fail: Option<String>,
    /// What the devices speak.
    #[arg(long, value_enum, default_value_t = Protocol::Mixed)]
    protocol: Protocol,
    /// Let the local cloud run on afterwards, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Give up when the job is not over after this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    time_limit: u64,
}

/// The protocols of the simulated devices.
#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    /// Half of them JSON, half of them USP.
    Mixed,
    Json,
    Usp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Json => "json",
            Self::Usp => "usp",
        }
    }
}

/// The summary of a job execution, of which there is one a device.
#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Execution {
    thing_arn: String,
    job_execution_summary: Summary,
}

#[derive(Clone, Deserialize)]
struct Summary {
    status: String,
}

impl Execution {
    fn thing(&self) -> &str {
        self.thing_arn.rsplit('/').next().unwrap_or(&self.thing_arn)
    }

    fn status(&self) -> &str {
        &self.job_execution_summary.status
    }

    fn is_final(&self) -> bool {
        !matches!(self.status(), "QUEUED" | "IN_PROGRESS")
    }

    fn succeeded(&self) -> bool {
        self.status() == "SUCCEEDED"
    }
}

/// A line of the simulator's report.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Report {
    thing: String,
    from: Option<String>,
    to: Option<String>,
    seconds: Option<f64>,
    reason: Option<String>,
}

/// Runs the whole demonstration; succeeds when exactly the devices with a fault have failed.
pub(crate) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    let expected = expected_failures(options.fail.as_deref(), options.devices)?;
    let simulator = simulator(project)?;
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    let outputs = deploy::deploy(project, &cloud, &deploy::parameters(DEMO_PARAMETERS))?;
    let demo = Demo { project, cloud: &cloud, outputs, simulator, options };
    demo.provision()?;
    let artifact = demo.upload()?;
    let fleet = demo.start_fleet()?;
    demo.await_connections(&fleet)?;
    let job = demo.create_job(&artifact)?;
    let executions = demo.follow(&job, &fleet)?;
    // It ends by itself when each of its devices has an outcome; one that never answers has none.
    fleet.interrupt(GRACE);
    drop(fleet);
    demo.table(&job, &executions)?;
    if options.keep {
        println!("\nThe local cloud runs on at {}; Ctrl-C stops it.", cloud.endpoint);
        cloud::stay(project)?;
    }
    verdict(&executions, &expected)
}

/// Builds the simulator; the rest of the demonstration would be in vain without it.
fn simulator(project: &Project) -> Result<PathBuf> {
    let logs = project.state();
    fs::create_dir_all(&logs)?;
    let mut build = project.command("cargo");
    build.args(["build", "--package", "device-simulator", "--message-format", "json-render-diagnostics"]);
    let step = Step::start(format!("$ {}", project.line(&build)));
    let log = logs.join("simulator-build.log");
    let messages = project.processes.output("`cargo build --package device-simulator`", &mut build, &log)?;
    step.done();
    // Cargo knows where its target folder is, whatever the settings.
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "device-simulator")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("Cargo has built no program named device-simulator")
}

struct Demo<'a> {
    project: &'a Project,
    cloud: &'a Cloud,
    outputs: Outputs,
    simulator: PathBuf,
    options: &'a DemoOptions,
}

impl Demo<'_> {
    fn devices(&self) -> PathBuf {
        self.cloud.run.file("devices")
    }

    fn report(&self) -> PathBuf {
        self.cloud.run.file("report.json")
    }

    /// A command of the simulator.
    fn simulate(&self, subcommand: &str) -> Command {
        let mut command = self.project.command(&self.simulator);
        command.envs(self.cloud.environment()).arg(subcommand).arg("--certificates").arg(self.devices());
        command
    }

    fn run(&self, name: &str, command: &mut Command) -> Result<String> {
        let line = self.project.line(command);
        let step = Step::plain(format!("$ {line}"));
        let words: Vec<&str> = line.split(' ').take(3).collect();
        let output =
            self.project.processes.output(&format!("`{}`", words.join(" ")), command, &self.cloud.run.log(name))?;
        step.done();
        Ok(output)
    }

    /// Registers the devices.
    fn provision(&self) -> Result<()> {
        // The group's name is the last part of its ARN.
        let group = self.outputs.get("ThingGroupArn")?.rsplit('/').next().unwrap_or_default();
        let mut command = self.simulate("provision");
        command
            .args(["--count", &self.options.devices.to_string(), "--prefix", "sim"])
            .args(["--policy", self.outputs.get("DevicePolicyName")?])
            .args(["--thing-group", group])
            .args(["--protocol", self.options.protocol.name()]);
        self.run("provision", &mut command).map(drop)
    }

    /// Puts a firmware image of random bytes into the stack's bucket and returns the payload's `artifact`.
    fn upload(&self) -> Result<Value> {
        let mut image = vec![0; IMAGE_SIZE];
        File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut image)).context("no random bytes")?;
        let file = self.cloud.run.file("firmware-2.0.0.bin");
        fs::write(&file, &image)?;
        let mut command = self.cloud.tool(self.project, "aws");
        let target = format!("s3://{}/{IMAGE_KEY}", self.outputs.get("FirmwareBucketName")?);
        command.args(["s3", "cp", "--no-progress"]).arg(&file).arg(target);
        self.run("upload", &mut command)?;
        let sha256 = format!("{:x}", Sha256::digest(&image));
        Ok(json!({ "key": IMAGE_KEY, "sha256": sha256, "size": IMAGE_SIZE }))
    }

    /// Starts the devices. In a terminal their progress bar is the demonstration's; else a log takes it.
    fn start_fleet(&self) -> Result<Process> {
        let mut command = self.simulate("run");
        command
            .args(["--endpoint", &self.cloud.mqtt, "--upgrades", "1", "--ca"])
            .arg(&self.cloud.ca)
            .arg("--report")
            .arg(self.report());
        if let Some(faults) = &self.options.fail {
            command.args(["--fail", faults]);
        }
        eprintln!("$ {}", self.project.line(&command));
        let log = (!std::io::stderr().is_terminal()).then(|| self.cloud.run.log("simulator"));
        let fleet = self.project.processes.spawn("The device simulator", Kind::Task, &mut command, log.as_deref())?;
        self.cloud.run.add("simulator", &fleet)?;
        Ok(fleet)
    }

    /// Waits until the cloud knows that the devices are online. Those that are late or shall be offline are upgraded
    /// as soon as they come, so it is no failure when some are missing.
    fn await_connections(&self, fleet: &Process) -> Result<()> {
        let table = self.outputs.get("ConnectionsTableName")?;
        let arguments = ["dynamodb", "scan", "--select", "COUNT", "--table-name", table];
        let started = Instant::now();
        let limit = CONNECTION_LIMIT + CONNECTION_TIME * self.options.devices;
        let connected =
            self.project.processes.wait_for("the connection of the devices", POLL_INTERVAL, limit * 2, || {
                let answer: Value = self.aws(&arguments)?;
                let connected = answer["Count"].as_u64().unwrap_or_default();
                if let Some(status) = fleet.status() {
                    return Err(fleet.ended_early(status));
                }
                let enough = connected >= u64::from(self.options.devices) || started.elapsed() > limit;
                Ok(enough.then_some(connected))
            })?;
        eprintln!("{connected} of {} devices are connected", self.options.devices);
        Ok(())
    }

    /// Invokes create-job as the README does and returns the job's id.
    fn create_job(&self, artifact: &Value) -> Result<String> {
        let payload = json!({
            "firmwareVersion": VERSION,
            "upgradeTrigger": "manual",
            "targetArn": self.outputs.get("ThingGroupArn")?,
            "artifact": artifact,
        });
        let file = self.cloud.run.file("create-job.json");
        fs::write(&file, serde_json::to_string_pretty(&payload)?)?;
        let mut command = self.cloud.tool(self.project, "sam");
        command.args(["remote", "invoke", "CreateJobFunction", "--stack-name", STACK, "--event-file"]).arg(file);
        let answer = self.run("create-job", &mut command)?;
        job_id(&answer).with_context(|| format!("create-job answered without a jobId: {}", answer.trim()))
    }

    /// Waits until every job execution is final; ends with a clear sentence when a part of the system dies.
    fn follow(&self, job: &str, fleet: &Process) -> Result<Vec<Execution>> {
        let limit = Duration::from_secs(self.options.time_limit);
        let quiet = std::io::stderr().is_terminal();
        let (mut shown, mut ended) = (String::new(), None);
        eprintln!("Job {job}: {} devices", self.options.devices);
        self.project.processes.wait_for(&format!("the end of the job {job}"), POLL_INTERVAL, limit, || {
            let executions = self.executions(job)?;
            let counts = counts(&executions);
            if !quiet && counts != shown {
                eprintln!("  {counts}");
                shown = counts;
            }
            let expected = usize::try_from(self.options.devices)?;
            if executions.len() >= expected && executions.iter().all(Execution::is_final) {
                return Ok(Some(executions));
            }
            self.expect_alive(fleet, &mut ended)?;
            Ok(None)
        })
    }

    /// A simulator that has ended by itself has outcomes for all devices, and the cloud must follow soon.
    fn expect_alive(&self, fleet: &Process, ended: &mut Option<Instant>) -> Result<()> {
        let Some(status) = fleet.status() else { return Ok(()) };
        let report = self.report();
        if !report.exists() {
            return Err(fleet.ended_early(status));
        }
        let since = ended.get_or_insert_with(Instant::now);
        if since.elapsed() > Duration::from_mins(2) {
            bail!(
                "the devices have ended their upgrades ({}), but the job is not over after two more minutes",
                report.display()
            );
        }
        Ok(())
    }

    fn executions(&self, job: &str) -> Result<Vec<Execution>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Answer {
            execution_summaries: Vec<Execution>,
        }
        // The command follows the pages itself.
        let arguments = ["iot", "list-job-executions-for-job", "--job-id", job];
        Ok(self.aws::<Answer>(&arguments)?.execution_summaries)
    }

    /// What update-job has noted on a failed job execution.
    fn reason(&self, job: &str, thing: &str) -> Result<String> {
        let arguments = ["iot", "describe-job-execution", "--job-id", job, "--thing-name", thing];
        let answer: Value = self.aws(&arguments)?;
        let details = &answer["execution"]["statusDetails"]["detailsMap"];
        let details: BTreeMap<String, String> = serde_json::from_value(details.clone()).unwrap_or_default();
        let parts = ["reason", "cause"].into_iter().filter_map(|name| details.get(name).map(String::as_str));
        Ok(parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": "))
    }

    fn aws<T: for<'de> Deserialize<'de>>(&self, arguments: &[&str]) -> Result<T> {
        let mut command = self.cloud.tool(self.project, "aws");
        command.args(arguments).args(["--output", "json"]);
        let name = format!("`aws {}`", arguments[..2].join(" "));
        let answer = self.project.processes.output(&name, &mut command, &self.cloud.run.log(arguments[1]))?;
        serde_json::from_str(&answer)
            .with_context(|| format!("{name} printed something else than was expected: {answer}"))
    }

    /// Prints what became of each device.
    fn table(&self, job: &str, executions: &[Execution]) -> Result<()> {
        let reports = reports(&self.report());
        let mut executions: Vec<&Execution> = executions.iter().collect();
        executions.sort_by_key(|execution| execution.thing());
        println!("\n{:<14} {:<10} {:<10} {:>8}  outcome", "device", "from", "to", "seconds");
        for execution in &executions {
            let none = Report::default();
            let report = reports.get(execution.thing()).unwrap_or(&none);
            let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
            let seconds = report.seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1}"));
            let outcome = self.outcome(job, execution, report)?;
            println!(
                "{:<14} {:<10} {:<10} {seconds:>8}  {outcome}",
                execution.thing(),
                text(&report.from),
                text(&report.to)
            );
        }
        let upgraded = executions.iter().filter(|execution| execution.succeeded()).count();
        println!("\n{upgraded} of {} devices upgraded", executions.len());
        println!("Logs: {}", self.cloud.run.folder.join("logs").display());
        Ok(())
    }

    fn outcome(&self, job: &str, execution: &Execution, report: &Report) -> Result<String> {
        if execution.succeeded() {
            return Ok(execution.status().to_owned());
        }
        let mut reason = self.reason(job, execution.thing())?;
        if reason.is_empty() {
            reason = report.reason.clone().unwrap_or_else(|| "no reason was given".to_owned());
        }
        Ok(format!("{}: {reason}", execution.status()))
    }
}

fn reports(path: &Path) -> BTreeMap<String, Report> {
    let reports: Vec<Report> =
        fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    reports.into_iter().map(|report| (report.thing.clone(), report)).collect()
}

fn counts(executions: &[Execution]) -> String {
    let mut counts = BTreeMap::<&str, usize>::new();
    for execution in executions {
        *counts.entry(execution.status()).or_default() += 1;
    }
    if counts.is_empty() {
        return "no job executions yet".to_owned();
    }
    counts.iter().map(|(status, count)| format!("{count} {status}")).collect::<Vec<_>>().join(", ")
}

/// Finds the job's id in what `sam remote invoke` printed around the function's answer.
fn job_id(answer: &str) -> Option<String> {
    let json = &answer[answer.find('{')?..=answer.rfind('}')?];
    let value: Value = serde_json::from_str(json).ok()?;
    value["jobId"].as_str().map(ToOwned::to_owned)
}

/// How many devices must fail, and how many may, with these faults.
fn expected_failures(faults: Option<&str>, devices: u32) -> Result<RangeInclusive<usize>> {
    let devices = usize::try_from(devices)?;
    let (mut least, mut most) = (0, 0);
    for fault in faults.unwrap_or_default().split(',').map(str::trim).filter(|fault| !fault.is_empty()) {
        let (kind, amount) = fault
            .split_once('=')
            .with_context(|| format!("`{fault}` of --fail is not KIND=COUNT, for example boot=3"))?;
        let kind = kind.split('@').next().unwrap_or(kind);
        let count = match amount.strip_suffix('%') {
            Some(_) => None,
            None => Some(amount.parse().with_context(|| {
                format!("`{amount}` in `{fault}` of --fail is neither a number of devices nor a percentage")
            })?),
        };
        if FAILING.contains(&kind) {
            least += count.unwrap_or(0);
        }
        if FAILING.contains(&kind) || MAY_FAIL.contains(&kind) {
            most += count.unwrap_or(devices);
        }
    }
    if least > devices {
        bail!("--fail injects {least} faults into {devices} devices");
    }
    Ok(least..=most.min(devices))
}

fn verdict(executions: &[Execution], expected: &RangeInclusive<usize>) -> Result<()> {
    let failed = executions.iter().filter(|execution| !execution.succeeded()).count();
    if expected.contains(&failed) {
        return Ok(());
    }
    let asked = if expected.start() == expected.end() {
        expected.start().to_string()
    } else {
        format!("{} to {}", expected.start(), expected.end())
    };
    bail!("{failed} devices were not upgraded, but {asked} faults were asked for")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn execution(status: &str) -> Execution {
        Execution {
            thing_arn: "arn:aws:iot:eu-west-1:000000000000:thing/sim-0001".to_owned(),
            job_execution_summary: Summary { status: status.to_owned() },
        }
    }

    #[test]
    fn without_faults_nothing_may_fail() {
        assert_eq!(expected_failures(None, 20).unwrap(), 0..=0);
        assert_eq!(expected_failures(Some("slow=3,offline=2"), 20).unwrap(), 0..=0);
    }

    #[test]
    fn faults_are_counted() {
        assert_eq!(expected_failures(Some("boot=3,download=2"), 20).unwrap(), 5..=5);
        assert_eq!(expected_failures(Some("boot=3,power-cut@transferred=2"), 20).unwrap(), 3..=5);
        assert_eq!(expected_failures(Some("boot=10%"), 20).unwrap(), 0..=20);
    }

    #[test]
    fn wrong_faults_are_named() {
        let error = |faults: &str| expected_failures(Some(faults), 20).unwrap_err().to_string();
        assert!(error("boot").contains("`boot`"));
        assert!(error("boot=many").contains("`many`"));
        assert!(error("boot=21").contains("21 faults into 20 devices"));
    }

    #[test]
    fn the_job_id_is_found_in_what_sam_prints() {
        assert_eq!(job_id("Invoking\n{\"jobId\": \"job-1\", \"jobArn\": \"a\"}\n").as_deref(), Some("job-1"));
        assert_eq!(job_id("{\"errorType\": \"InvalidInput\"}"), None);
        assert_eq!(job_id("nothing"), None);
    }

    #[test]
    fn executions_are_judged_by_status() {
        assert!(!execution("QUEUED").is_final());
        assert!(execution("TIMED_OUT").is_final());
        assert_eq!(execution("SUCCEEDED").thing(), "sim-0001");
        assert!(verdict(&[execution("SUCCEEDED"), execution("FAILED")], &(1..=1)).is_ok());
        assert!(verdict(&[execution("FAILED")], &(0..=0)).unwrap_err().to_string().contains("1 devices"));
    }
}
