//! The firmware upgrade: a job over the fleet, from the payload to the closing table.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::faults::{self, Faults};
use super::{Demo, DemoOptions, POLL_INTERVAL, counts};
use crate::cloud::{Cloud, FixedPorts, STACK};
use crate::deploy;
use crate::process::{GRACE, Process};
use crate::program::Programs;
use crate::project::Project;

const VERSION: &str = "2.0.0";
const IMAGE_KEY: &str = "firmware/2.0.0";
const IMAGE_SIZE: usize = 256 * 1024;
/// Template parameters of the demonstration: nobody wants to watch the deadlines of the field pass.
const PARAMETERS: &[(&str, &str)] = &[
    ("AcknowledgeTimeoutSeconds", "5"),
    ("TransferTimeoutSeconds", "120"),
    ("InstallTimeoutSeconds", "60"),
    ("RebootTimeoutSeconds", "60"),
    // The other demonstration is for that.
    ("ConfigPushEnabled", "false"),
];
/// How long the job waits for the fleet to connect, and how much longer for each device.
const CONNECTION_LIMIT: Duration = Duration::from_secs(8);
const CONNECTION_TIME: Duration = Duration::from_millis(100);
const FAULTS: Faults = Faults {
    failing: &["download", "checksum", "boot", "malformed-boot", "refuse", "mute", "wrong-version", "wrong-operation"],
    // It depends on the report that is lost, and on the deadlines.
    may_fail: &["drop", "power-cut"],
};

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

/// Runs the whole demonstration.
pub(super) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    let expected = FAULTS.expected_failures(&faults::parse(options.fail.as_deref())?, options.devices)?;
    let programs = Programs::built(project)?;
    let simulator = programs.path("device-simulator")?.to_owned();
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    let outputs = deploy::deploy(project, &cloud, &programs, &deploy::parameters(PARAMETERS))?;
    let demo = Demo { project, cloud: &cloud, outputs, simulator, options };
    demo.provision()?;
    let artifact = demo.upload()?;
    let fleet = demo.start_upgrades()?;
    demo.await_connections(&fleet)?;
    let job = demo.create_job(&json!({
        "firmwareVersion": VERSION,
        "upgradeTrigger": "manual",
        "targetArn": demo.outputs.get("ThingGroupArn")?,
        "artifact": artifact,
        // All at once, and to the end: a demonstration shows its failures.
        "rollout": { "maximumPerMinute": 1000 },
        "abort": { "percentage": 100, "minimumExecuted": options.devices + 1 },
    }))?;
    let executions = demo.follow(&job, &fleet)?;
    // It ends by itself when each of its devices has an outcome; one that never answers has none.
    fleet.interrupt(GRACE);
    drop(fleet);
    demo.table(&job, &executions)?;
    demo.keep()?;
    let failed = executions.iter().filter(|execution| !execution.succeeded()).count();
    faults::verdict(failed, &expected, "were not upgraded")
}

impl Demo<'_> {
    fn report(&self) -> PathBuf {
        self.cloud.run.file("report.json")
    }

    /// Puts a firmware image of random bytes into the stack's bucket and returns the payload's `artifact`.
    pub(super) fn upload(&self) -> Result<Value> {
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
    fn start_upgrades(&self) -> Result<Process> {
        let mut command = self.fleet_command(["--upgrades", "1"]);
        command.arg("--report").arg(self.report());
        if let Some(faults) = &self.options.fail {
            command.args(["--fail", faults]);
        }
        let log = (!std::io::stderr().is_terminal()).then(|| self.cloud.run.log("simulator"));
        self.start_fleet(&mut command, log.as_deref())
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
    pub(super) fn create_job(&self, payload: &Value) -> Result<String> {
        let file = self.cloud.run.file("create-job.json");
        fs::write(&file, serde_json::to_string_pretty(payload)?)?;
        let mut command = self.cloud.tool(self.project, "sam");
        command.args(["remote", "invoke", "CreateJobFunction", "--stack-name", STACK, "--event-file"]).arg(file);
        let answer = self.run("create-job", &mut command)?;
        job_id(&answer).with_context(|| format!("create-job answered without a jobId: {}", answer.trim()))
    }

    /// Waits until every job execution is final; ends with a clear sentence when a part of the system dies.
    fn follow(&self, job: &str, fleet: &Process) -> Result<Vec<Execution>> {
        let limit = self.time_limit();
        let quiet = std::io::stderr().is_terminal();
        let (mut shown, mut ended) = (String::new(), None);
        eprintln!("Job {job}: {} devices", self.options.devices);
        self.project.processes.wait_for(&format!("the end of the job {job}"), POLL_INTERVAL, limit, || {
            let executions = self.executions(job)?;
            let counts =
                counts(executions.iter().map(Execution::status)).unwrap_or_else(|| "no job executions yet".to_owned());
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

/// Finds the job's id in what `sam remote invoke` printed around the function's answer.
fn job_id(answer: &str) -> Option<String> {
    let json = &answer[answer.find('{')?..=answer.rfind('}')?];
    let value: Value = serde_json::from_str(json).ok()?;
    value["jobId"].as_str().map(ToOwned::to_owned)
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
        assert!(execution("SUCCEEDED").succeeded());
        assert!(!execution("REJECTED").succeeded());
    }
}
