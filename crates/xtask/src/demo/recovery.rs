//! The recovery of failed updates: a device fails, is parked and restored, fails again, is quarantined, and is released.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Demo, DemoOptions, POLL_INTERVAL};
use crate::cloud::{Cloud, FixedPorts, STACK};
use crate::deploy;
use crate::process::{GRACE, Process};
use crate::program::Programs;
use crate::project::Project;

const THING: &str = "sim-0001";
const GROUP: &str = "outdated";
const VERSION: &str = "2.28.0";
/// Nobody wants to watch a day pass.
const PARAMETERS: &[(&str, &str)] = &[("ParkingSeconds", "20"), ("SettlingSeconds", "5")];
/// Failures in a cycle, as the template has it.
const ATTEMPTS: u32 = 10;

/// What is known of the device: its item in the table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Device {
    phase: String,
    attempts: u32,
    cycles: u32,
    ignored: u32,
}

impl Device {
    fn of(answer: &Value) -> Self {
        let number = |name: &str| answer[name].as_str().and_then(|text| text.parse().ok()).unwrap_or_default();
        Self {
            phase: answer["phase"].as_str().unwrap_or("ACTIVE").to_owned(),
            attempts: number("attempts"),
            cycles: number("cycles"),
            ignored: number("ignored"),
        }
    }

    /// One line about it.
    fn line(&self) -> String {
        let Self { phase, attempts, cycles, ignored } = self;
        let ignored = if *ignored > 0 { format!(", {ignored} more ignored") } else { String::new() };
        format!("{phase:<11}  cycle {}: {attempts} of {ATTEMPTS} failures{ignored}", cycles + 1)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Execution {
    job_execution_summary: Summary,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    status: String,
    execution_number: u64,
}

/// How far the story is: a line of the closing table.
struct Chapter {
    name: &'static str,
    executions: String,
    attributes: String,
}

/// Runs the whole demonstration; succeeds if the whole story has happened.
pub(super) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    if options.fail.is_some() {
        bail!("--fail is not for this demonstration: its device fails in its own way");
    }
    let programs = Programs::built(project)?;
    let simulator = programs.path("device-simulator")?.to_owned();
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    let outputs = deploy::deploy(project, &cloud, &programs, &deploy::parameters(PARAMETERS))?;
    let demo = Demo { project, cloud: &cloud, outputs, simulator, options };
    let chapters = demo.tell()?;
    println!("\n{:<20}  {:<44}  FW, model", THING, "job executions");
    for Chapter { name, executions, attributes } in chapters {
        println!("{name:<20}  {executions:<44}  {attributes}");
    }
    println!("\n{THING} was parked, restored, quarantined and released");
    demo.keep()
}

impl Demo<'_> {
    fn tell(&self) -> Result<Vec<Chapter>> {
        self.provision_stuck_device()?;
        let job = self.create_continuous_job()?;
        let fleet = self.start_failing_device()?;
        let mut chapters = Vec::new();

        self.follow_until("it is parked", &fleet, |device| device.phase == "PARKED")?;
        chapters.push(self.chapter("parked", &job, |open| open == 0)?);
        self.follow_until("its time is over", &fleet, |device| device.cycles == 1)?;
        chapters.push(self.chapter("restored", &job, |open| open > 0)?);
        self.follow_until("it is quarantined", &fleet, |device| device.phase == "QUARANTINED")?;
        chapters.push(self.chapter("quarantined", &job, |open| open == 0)?);
        self.read_notification()?;
        // People have mended the device meanwhile.
        fleet.interrupt(GRACE);
        self.release()?;
        chapters.push(self.chapter("released", &job, |open| open > 0)?);
        Ok(chapters)
    }

    /// A device with the attributes that the job's group asks for.
    fn provision_stuck_device(&self) -> Result<()> {
        let mut command = self.simulate("provision");
        command
            .args(["--thing", THING, "--attribute", "FW=2.27", "--attribute", "model=wo:v8"])
            .args(["--policy", self.outputs.get("DevicePolicyName")?])
            .args(["--thing-type", self.outputs.get("ThingTypeName")?])
            .args(["--protocol", if self.options.protocol.name() == "usp" { "usp" } else { "json" }]);
        self.run("provision", &mut command).map(drop)
    }

    /// A job for whoever has the old firmware, which AWS IoT tries again as often as it can.
    fn create_continuous_job(&self) -> Result<String> {
        let mut command = self.cloud.tool(self.project, "aws");
        command.args(["iot", "create-dynamic-thing-group", "--thing-group-name", GROUP, "--output", "json"]);
        command.args(["--query-string", "attributes.model:\"wo:v8\" AND attributes.FW:\"2.27\""]);
        let answer: Value = serde_json::from_str(&self.run("create-group", &mut command)?)?;
        let artifact = self.upload()?;
        self.create_job(&json!({
            "firmwareVersion": VERSION,
            "upgradeTrigger": "recovery",
            "targetArn": answer["thingGroupArn"],
            "targetSelection": "CONTINUOUS",
            "retries": 10,
            // Its devices fail often: that is no reason to stop.
            "abort": { "percentage": 100, "minimumExecuted": 1000 },
            "artifact": artifact,
        }))
    }

    fn start_failing_device(&self) -> Result<Process> {
        let mut command = self.fleet_command(["--failing-updates", "always"]);
        command.args(["--step-delay", "200ms"]);
        self.start_fleet(&mut command, Some(&self.cloud.run.log("simulator")))
    }

    /// Shows what happens to the device until that is so.
    fn follow_until(&self, what: &str, fleet: &Process, is: impl Fn(&Device) -> bool) -> Result<()> {
        let started = Instant::now();
        let mut shown = Device::default();
        eprintln!("{THING}, until {what}:");
        self.project.processes.wait_for(&format!("{THING}, until {what}"), POLL_INTERVAL, self.time_limit(), || {
            let device = self.device()?;
            if device != shown {
                eprintln!("  {:>4.0} s  {}", started.elapsed().as_secs_f32(), device.line());
                shown = device;
            }
            if is(&shown) {
                return Ok(Some(()));
            }
            match fleet.status() {
                Some(status) => Err(fleet.ended_early(status)),
                None => Ok(None),
            }
        })
    }

    fn device(&self) -> Result<Device> {
        let key = json!({"thing": {"S": THING}}).to_string();
        let query = "Item.{phase:phase.S,attempts:attempts.N,cycles:cycles.N,ignored:ignored.N}";
        let table = self.outputs.get("RecoveryTableName")?;
        let answer = self.aws(&["dynamodb", "get-item", "--table-name", table, "--key", &key, "--query", query])?;
        Ok(Device::of(&answer))
    }

    /// The device's executions in the job, when as many of them are open as shall be.
    fn chapter(&self, name: &'static str, job: &str, is: impl Fn(usize) -> bool) -> Result<Chapter> {
        let what = format!("the job executions of a device that is {name}");
        let executions = self.project.processes.wait_for(&what, POLL_INTERVAL, self.time_limit(), || {
            let executions = self.job_executions(job)?;
            let open = executions.iter().filter(|one| matches!(one.status.as_str(), "QUEUED" | "IN_PROGRESS")).count();
            Ok(is(open).then_some(executions))
        })?;
        let last = executions.iter().map(|one| one.execution_number).max().unwrap_or_default();
        let counts = super::counts(executions.iter().map(|one| one.status.as_str())).unwrap_or_default();
        let thing: Value = self.aws(&["iot", "describe-thing", "--thing-name", THING])?;
        let attribute = |name: &str| thing["attributes"][name].as_str().unwrap_or("-").to_owned();
        let attributes = format!("{}, {}", attribute("FW"), attribute("model"));
        let chapter = Chapter { name, executions: format!("number 1 to {last}: {counts}"), attributes };
        eprintln!("  {name}: job executions {}; FW, model: {}", chapter.executions, chapter.attributes);
        Ok(chapter)
    }

    fn job_executions(&self, job: &str) -> Result<Vec<Summary>> {
        let list = ["iot", "list-job-executions-for-thing", "--thing-name", THING, "--job-id", job];
        let answer: Value = self.aws(&list)?;
        let executions: Vec<Execution> = serde_json::from_value(answer["executionSummaries"].clone())
            .context("the job executions have another shape than expected")?;
        Ok(executions.into_iter().map(|one| one.job_execution_summary).collect())
    }

    /// Reads what operators are told, as they do, and takes it out of their queue.
    fn read_notification(&self) -> Result<()> {
        let url = self.outputs.get("RecoveryNotificationsQueueUrl")?;
        let receive = ["sqs", "receive-message", "--queue-url", url];
        eprintln!("$ aws {}", receive.join(" "));
        let message = self.project.processes.wait_for(
            "the message to the operators",
            POLL_INTERVAL,
            self.time_limit(),
            || {
                let mut command = self.cloud.tool(self.project, "aws");
                command.args(receive).args(["--output", "json"]);
                let log = self.cloud.run.log("receive-message");
                let answer = self.project.processes.output("`aws sqs receive-message`", &mut command, &log)?;
                // An empty queue has an empty answer.
                let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
                Ok(answer["Messages"].as_array().and_then(|messages| messages.first().cloned()))
            },
        )?;
        let body = message["Body"].as_str().unwrap_or_default();
        eprintln!("  {body}");
        ensure!(body.contains(THING), "the message is about another device: {body}");
        let receipt = message["ReceiptHandle"].as_str().context("a message without a receipt handle")?;
        let mut command = self.cloud.tool(self.project, "aws");
        command.args(["sqs", "delete-message", "--queue-url", url, "--receipt-handle", receipt]);
        command.args(["--endpoint-url", &self.cloud.endpoint]);
        self.project.processes.output(
            "`aws sqs delete-message`",
            &mut command,
            &self.cloud.run.log("delete-message"),
        )?;
        Ok(())
    }

    /// Releases the device as the README does.
    fn release(&self) -> Result<()> {
        let payload = json!({"action": "release", "thingName": THING}).to_string();
        let mut command = self.cloud.tool(self.project, "sam");
        command.args(["remote", "invoke", "RestoreAttributesFunction", "--stack-name", STACK, "--event", &payload]);
        let answer = self.run("release", &mut command)?;
        eprintln!("  {}", answer.trim());
        ensure!(answer.contains("\"RELEASED\""), "the device was not released: {answer}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_becomes_a_line() {
        let device = Device::of(&json!({"phase": "PARKED", "attempts": "10", "cycles": "0", "ignored": "2"}));
        assert_eq!(device.line(), "PARKED       cycle 1: 10 of 10 failures, 2 more ignored");
        assert_eq!(Device::of(&Value::Null).line(), "ACTIVE       cycle 1: 0 of 10 failures");
    }
}
