//! Each function's binary behind a minimal Runtime API: from its start to its first question, its first invocation and those
//! after it, its memory and its size (<https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html>).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use tiny_http::{Header, Request, Response, Server};

use super::Findings;
use crate::cloud::{Cloud, FixedPorts};
use crate::deploy;
use crate::project::{ACCOUNT, Project, REGION};

const STARTS: usize = 30;
const FIRST_INVOCATIONS: usize = 15;
const INVOCATIONS: usize = 500;
const PATIENCE: Duration = Duration::from_secs(20);

/// A deployed function.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Function {
    #[serde(rename = "FunctionName")]
    name: String,
    code_size: u64,
    environment: Option<Environment>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Environment {
    variables: BTreeMap<String, String>,
}

/// A function's binary, and what it is started with.
struct Binary {
    name: String,
    path: PathBuf,
    variables: BTreeMap<String, String>,
    zipped: u64,
}

/// Deploys to a local cloud and measures every function.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    deploy::deploy(project, &cloud, &[])?;
    let mut rows = Vec::new();
    for binary in binaries(project, &cloud)? {
        eprintln!("{}", binary.name);
        rows.push(row(project, &binary).with_context(|| format!("{} cannot be measured", binary.name))?);
    }
    Ok(Findings {
        about: format!(
            "Each Lambda function's binary, alone, with a minimal Runtime API and the local cloud: median of {STARTS} \
             starts until it asks for its first event; median of {FIRST_INVOCATIONS} first invocations, each in a new \
             process, and of {INVOCATIONS} further ones in one, with one call to AWS or two; the most memory that it had; \
             its size, stripped and zipped."
        ),
        columns: ["function", "start", "first invocation", "further ones", "memory", "size", "zipped"]
            .map(String::from)
            .into(),
        rows,
    })
}

fn binaries(project: &Project, cloud: &Cloud) -> Result<Vec<Binary>> {
    let mut list = cloud.tool(project, "aws");
    list.args(["lambda", "list-functions", "--output", "json", "--query", "Functions[]"]);
    let answer =
        project.processes.output("`aws lambda list-functions`", &mut list, &cloud.run.log("list-functions"))?;
    let functions: Vec<Function> =
        serde_json::from_str(&answer).context("functions have another shape than expected")?;
    let mut binaries = Vec::new();
    for entry in fs::read_dir(project.root.join("target/lambda"))? {
        let folder = entry?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let camel: String = name.split('-').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        let is_ours = |function: &&Function| function.name.contains(&format!("-{camel}Function"));
        // The folder may hold what another checkout's state has built.
        let Some(function) = functions.iter().find(is_ours) else { continue };
        let mut variables: BTreeMap<String, String> =
            cloud.environment().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        variables.extend(function.environment.iter().flat_map(|environment| environment.variables.clone()));
        let path = folder.join("bootstrap");
        binaries.push(Binary { name, path, variables, zipped: function.code_size });
    }
    binaries.sort_by(|one, other| one.name.cmp(&other.name));
    ensure!(!binaries.is_empty(), "target/lambda holds no function of the stack");
    Ok(binaries)
}

fn row(project: &Project, binary: &Binary) -> Result<Vec<String>> {
    let starts = (0..STARTS).map(|_| start(project, binary)).collect::<Result<Vec<_>>>()?;
    let (first, further, memory) = invoke(project, binary)?;
    let size = fs::metadata(&binary.path)?.len();
    let milliseconds = |time: Option<Duration>| {
        time.map_or_else(|| "-".to_owned(), |time| format!("{:.1} ms", time.as_secs_f64() * 1000.0))
    };
    Ok(vec![
        binary.name.clone(),
        milliseconds(Some(median(starts))),
        milliseconds(first),
        milliseconds(further),
        format!("{:.1} MiB", as_mebibytes(memory)),
        format!("{:.1} MiB", as_mebibytes(size)),
        format!("{:.1} MiB", as_mebibytes(binary.zipped)),
    ])
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with one decimal")]
fn as_mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// A running binary; dropping it kills it.
struct Running {
    child: Child,
    api: Server,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn new(project: &Project, binary: &Binary) -> Result<Self> {
        let api = Server::http("127.0.0.1:0").map_err(|error| anyhow::anyhow!("no Runtime API: {error}"))?;
        let mut command: Command = project.command(&binary.path);
        command
            .envs(&binary.variables)
            .env("AWS_LAMBDA_RUNTIME_API", api.server_addr().to_string())
            .env("AWS_LAMBDA_FUNCTION_NAME", &binary.name)
            .env("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST")
            .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256")
            .env("AWS_LAMBDA_LOG_FORMAT", "JSON")
            .env("AWS_REGION", REGION)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self { child: command.spawn().context("it cannot be started")?, api })
    }

    /// The next request of the binary.
    fn request(&mut self) -> Result<Request> {
        match self.api.recv_timeout(PATIENCE)? {
            Some(request) => Ok(request),
            None => match self.child.try_wait()? {
                Some(status) => bail!("it has ended: {status}"),
                None => bail!("it has asked for nothing within {PATIENCE:?}"),
            },
        }
    }

    /// Waits until the binary asks for an event.
    fn question(&mut self) -> Result<Request> {
        let request = self.request()?;
        ensure!(request.url().ends_with("/invocation/next"), "it has said {}", request.url());
        Ok(request)
    }

    /// Answers a question with an event; returns the next question, and how long the answer took.
    fn invocation(&mut self, question: Request, event: &Value) -> Result<(Request, Duration)> {
        let deadline = std::time::SystemTime::now() + Duration::from_mins(1);
        let deadline = deadline.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis().to_string();
        let arn = format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:bench");
        let mut response = Response::from_string(event.to_string());
        for (name, value) in [
            ("Lambda-Runtime-Aws-Request-Id", "8476a536-e9f4-11e8-9739-2dfe598c3fcd"),
            ("Lambda-Runtime-Deadline-Ms", deadline.as_str()),
            ("Lambda-Runtime-Invoked-Function-Arn", arn.as_str()),
        ] {
            let header = Header::from_bytes(name, value).map_err(|()| anyhow::anyhow!("{name} is no header"))?;
            response.add_header(header);
        }
        let begin = Instant::now();
        question.respond(response)?;
        let answer = self.request()?;
        let time = begin.elapsed();
        let url = answer.url().to_owned();
        answer.respond(Response::empty(202))?;
        ensure!(url.ends_with("/response") || url.ends_with("/error"), "it has said {url}");
        Ok((self.question()?, time))
    }

    /// The most memory that the binary has had, in bytes.
    fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kibibytes * 1024)
    }
}

/// From the start to the first question.
fn start(project: &Project, binary: &Binary) -> Result<Duration> {
    let begin = Instant::now();
    let mut running = Running::new(project, binary)?;
    let _question = running.question()?;
    Ok(begin.elapsed())
}

/// The medians of first invocations and of those after them, and the memory at their end.
fn invoke(project: &Project, binary: &Binary) -> Result<(Option<Duration>, Option<Duration>, u64)> {
    let mut running = Running::new(project, binary)?;
    let mut question = running.question()?;
    let Some(event) = event(&binary.name) else { return Ok((None, None, running.memory()?)) };
    let mut first = Vec::new();
    for _ in 0..FIRST_INVOCATIONS {
        running = Running::new(project, binary)?;
        question = running.question()?;
        let (next, time) = running.invocation(question, &event)?;
        question = next;
        first.push(time);
    }
    let mut further = Vec::new();
    for _ in 0..INVOCATIONS {
        let (next, time) = running.invocation(question, &event)?;
        question = next;
        further.push(time);
    }
    Ok((Some(median(first)), Some(median(further)), running.memory()?))
}

/// An event with which a function calls AWS once or twice; none for those that do more, or something else.
fn event(binary: &str) -> Option<Value> {
    let wait = json!({"taskToken": "bench", "attempt": 0});
    Some(match binary {
        // What nobody can read goes to the dead-letter queue.
        "handle-device-response"
        | "ingest-telemetry"
        | "record-success"
        | "start-workflow"
        | "stop-workflow"
        | "track-presence"
        | "update-job" => {
            let arn = format!("arn:aws:sqs:{REGION}:{ACCOUNT}:bench");
            json!({"Records": [{"messageId": "1", "body": "bench", "eventSource": "aws:sqs", "eventSourceARN": arn}]})
        }
        // The image is not there.
        "create-job" => json!({
            "firmwareVersion": "1.0.0", "upgradeTrigger": "bench",
            "targetArn": format!("arn:aws:iot:{REGION}:{ACCOUNT}:thing/bench"), "artifact": {"key": "bench"},
        }),
        "store-task-token" => json!({
            "thingName": "bench", "operationId": "bench", "step": "FIRMWARE_TRANSFERRED", "wait": wait,
        }),
        "publish-to-device" => json!({
            "thingName": "bench", "operationId": "bench", "command": {"name": "CANCEL_DOWNLOAD", "protocol": "json"},
        }),
        "get-device-settings" => json!({"thingName": "bench", "externalId": "bench", "connectedAt": 1}),
        // Nobody knows the device.
        "restore-attributes" => json!({"action": "release", "thingName": "bench"}),
        // No readings: what is measured is the way there and back.
        "remediate" => json!({"Records": []}),
        _ => return None,
    })
}
