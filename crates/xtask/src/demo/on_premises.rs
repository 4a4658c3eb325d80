//! Jobs on premises: two workers of a tenant add, fail and take over from one another.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Demo, DemoOptions, POLL_INTERVAL};
use crate::cloud::{Cloud, FixedPorts};
use crate::deploy;
use crate::process::{Kind, Process};
use crate::program::Programs;
use crate::project::Project;

const TENANT: &str = "tenant1";
const WORKERS: [&str; 2] = ["worker-1", "worker-2"];
/// Nobody wants to wait two minutes for the take-over.
const PARAMETERS: &[(&str, &str)] = &[("WorkerLeaseSeconds", "9"), ("WorkerHeartbeatSeconds", "60")];
/// A job that takes its time, and says how far it is.
const SLOW: &str = "#!/bin/sh\nread -r input\nfor part in 1 2 3 4 5 6 7 8; do echo \"progress: ${part}0\" >&2; sleep 1; done\n\
                    echo '{\"done\": true}'\n";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Execution {
    status: String,
    output: Option<String>,
    error: Option<String>,
    cause: Option<String>,
}

/// A job that has ended: a line of the closing table.
struct Line {
    input: String,
    outcome: String,
}

/// Runs the whole demonstration; succeeds if every job has ended as it should.
pub(super) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    if options.fail.is_some() {
        bail!("--fail is not for this demonstration: it has no devices");
    }
    let programs = Programs::built(project)?;
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    let outputs = deploy::deploy(project, &cloud, &programs, &deploy::parameters(PARAMETERS))?;
    let demo = Demo { project, cloud: &cloud, outputs, simulator: PathBuf::new(), options };
    let lines = demo.run_jobs(programs.path("on-premises-worker")?)?;
    println!("\n{:<44}  outcome", "input");
    for Line { input, outcome } in lines {
        println!("{input:<44}  {outcome}");
    }
    println!("\nEvery job ended as it should, the last one on the worker that took over");
    demo.keep()
}

impl Demo<'_> {
    fn run_jobs(&self, program: &Path) -> Result<Vec<Line>> {
        let workers = [self.start_worker(program, WORKERS[0])?, self.start_worker(program, WORKERS[1])?];
        let mut lines = vec![
            self.job("sum", &json!({"a": 15, "b": 42}), |ended| ended.result() == Some(json!(57)))?,
            self.job("missing", &json!({"a": 15}), |ended| ended.error.as_deref() == Some("KeyError"))?,
        ];
        let slow = json!({"handler": "slow"});
        let arn = self.start("slow", &slow)?;
        let what = "a worker runs the job `slow`";
        let runner = self.project.processes.wait_for(what, POLL_INTERVAL, self.time_limit(), || {
            Ok(WORKERS.iter().position(|worker| self.log(worker).lines().any(is_start_of_slow)))
        })?;
        eprintln!("{} runs it, and is killed:", WORKERS[runner]);
        workers[runner].kill();
        lines.push(self.ended(&arn, &slow, |ended| ended.result() == Some(json!({"done": true})))?);
        workers[1 - runner].interrupt(crate::process::GRACE);
        Ok(lines)
    }

    fn log(&self, worker: &str) -> String {
        fs::read_to_string(self.cloud.run.log(worker)).unwrap_or_default()
    }

    /// A worker with a key and a certificate of its own.
    fn start_worker(&self, program: &Path, name: &str) -> Result<Process> {
        let folder = self.cloud.run.file(name);
        let config = folder.join("worker.toml");
        fs::create_dir_all(&folder)?;
        self.certify(&folder)?;
        fs::write(folder.join("slow"), SLOW)?;
        fs::write(&config, self.config(name, &folder))?;
        let mut command = self.project.command(program);
        command.arg("run").arg("--config").arg(&config);
        eprintln!("$ {}", self.project.line(&command));
        let log = self.cloud.run.log(name);
        let worker = self.project.processes.spawn(name, Kind::Task, &mut command, Some(&log))?;
        self.cloud.run.add(name, &worker)?;
        self.project.processes.wait_for(
            &format!("the connection of {name}"),
            POLL_INTERVAL,
            self.time_limit(),
            || Ok(self.log(name).contains("online=true").then_some(())),
        )?;
        Ok(worker)
    }

    fn certify(&self, folder: &Path) -> Result<()> {
        let mut create = self.cloud.tool(self.project, "aws");
        create.args([
            "iot",
            "create-keys-and-certificate",
            "--set-as-active",
            "--query",
            "certificateArn",
            "--output",
            "text",
        ]);
        create.arg("--certificate-pem-outfile").arg(folder.join("certificate.pem"));
        create.arg("--private-key-outfile").arg(folder.join("private.key"));
        let arn = self.run("create-certificate", &mut create)?;
        let mut attach = self.cloud.tool(self.project, "aws");
        let policy = self.outputs.get("Tenant1WorkerPolicyName")?;
        attach.args(["iot", "attach-policy", "--policy-name", policy, "--target", arn.trim()]);
        self.run("attach-policy", &mut attach).map(drop)
    }

    fn config(&self, name: &str, folder: &Path) -> String {
        let (endpoint, ca) = (&self.cloud.mqtt, self.cloud.ca.display());
        format!(
            "tenant = \"{TENANT}\"\nworker = \"{name}\"\nendpoint = \"{endpoint}\"\ncertificate = \"certificate.pem\"\n\
             private_key = \"private.key\"\nca = \"{ca}\"\njournal = \"journal\"\n\n\
             [handlers.slow]\nprogram = \"/bin/sh\"\narguments = [\"{}\"]\nenvironment = [\"PATH\"]\n",
            folder.join("slow").display()
        )
    }

    fn job(&self, name: &str, input: &Value, is: impl Fn(&Execution) -> bool) -> Result<Line> {
        let arn = self.start(name, input)?;
        self.ended(&arn, input, is)
    }

    fn start(&self, name: &str, input: &Value) -> Result<String> {
        let machine = self.outputs.get("OnPremisesJobArn")?;
        let text = input.to_string();
        let mut start = self.cloud.tool(self.project, "aws");
        start.args(["stepfunctions", "start-execution", "--state-machine-arn", machine, "--input", &text]);
        start.args(["--output", "json"]);
        let answer: Value = serde_json::from_str(&self.run(&format!("start-{name}"), &mut start)?)?;
        Ok(answer["executionArn"].as_str().context("an execution without an ARN")?.to_owned())
    }

    fn ended(&self, arn: &str, input: &Value, is: impl Fn(&Execution) -> bool) -> Result<Line> {
        let what = format!("the end of the job {input}");
        let ended = self.project.processes.wait_for(&what, POLL_INTERVAL, self.time_limit(), || {
            let execution: Execution = self.aws(&["stepfunctions", "describe-execution", "--execution-arn", arn])?;
            Ok((execution.status != "RUNNING").then_some(execution))
        })?;
        let line = Line { input: input.to_string(), outcome: ended.outcome() };
        eprintln!("  {}", line.outcome);
        ensure!(is(&ended), "the job {input} ended otherwise than it should: {}", line.outcome);
        Ok(line)
    }
}

/// Whether the line of a worker's log says that it has begun to run the slow job.
fn is_start_of_slow(line: &str) -> bool {
    line.contains("started") && line.contains("slow")
}

impl Execution {
    fn result(&self) -> Option<Value> {
        let output: Value = serde_json::from_str(self.output.as_deref()?).ok()?;
        Some(output["lambdaOutput"]["result"].clone())
    }

    fn outcome(&self) -> String {
        match (&self.output, &self.error) {
            (Some(output), _) => format!("{} {output}", self.status),
            (None, error) => {
                let word = |text: &Option<String>| text.clone().unwrap_or_default();
                format!("{} {}: {}", self.status, word(error), word(&self.cause))
            }
        }
    }
}
