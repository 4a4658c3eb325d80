//! A minimal Runtime API, which a function's binary asks for its events
//! (<https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html>).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tiny_http::{Header, Request, Response, Server};

use crate::project::{ACCOUNT, Project, REGION};

const PATIENCE: Duration = Duration::from_secs(20);

/// A function's binary, and what it is started with.
pub(super) struct Binary {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) variables: BTreeMap<String, String>,
}

impl Binary {
    /// Starts the binary.
    pub(super) fn start(&self, project: &Project) -> Result<Running> {
        let api = Server::http("127.0.0.1:0").map_err(|error| anyhow::anyhow!("no Runtime API: {error}"))?;
        let mut command: Command = project.command(&self.path);
        command
            // As in Lambda: not what this machine believes.
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR")
            .envs(&self.variables)
            .env("AWS_LAMBDA_RUNTIME_API", api.server_addr().to_string())
            .env("AWS_LAMBDA_FUNCTION_NAME", &self.name)
            .env("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST")
            .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256")
            .env("AWS_LAMBDA_LOG_FORMAT", "JSON")
            .env("AWS_REGION", REGION)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let began = Instant::now();
        Ok(Running { child: command.spawn().context("it cannot be started")?, api, began })
    }

    /// From the start to the first question.
    pub(super) fn start_time(&self, project: &Project) -> Result<Duration> {
        let mut running = self.start(project)?;
        let _question = running.question()?;
        Ok(running.began.elapsed())
    }
}

/// A running binary; dropping it kills it.
pub(super) struct Running {
    child: Child,
    api: Server,
    pub(super) began: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
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
    pub(super) fn question(&mut self) -> Result<Request> {
        let request = self.request()?;
        ensure!(request.url().ends_with("/invocation/next"), "it has said {}", request.url());
        Ok(request)
    }

    /// Answers a question with an event; returns the next question, and how long the answer took.
    pub(super) fn invocation(&mut self, question: Request, event: &Value) -> Result<(Request, Duration)> {
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
    pub(super) fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kibibytes * 1024)
    }

    /// The processor time that it has had.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()))?;
        let nanoseconds = tasks.map(|task| {
            let times = fs::read_to_string(task?.path().join("schedstat"))?;
            let first = times.split_whitespace().next().context("an empty schedstat")?;
            Ok(first.parse::<u64>()?)
        });
        Ok(Duration::from_nanos(nanoseconds.sum::<Result<u64>>()?))
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with one decimal")]
pub(super) fn as_mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

pub(super) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
