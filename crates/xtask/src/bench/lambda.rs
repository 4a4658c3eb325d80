//! Each function's binary behind a minimal Runtime API: from its start to its first question, its first invocation and those
//! after it, its memory and its size.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Findings;
use super::runtime_api::{Binary, as_mebibytes, median};
use crate::cloud::{Cloud, FixedPorts};
use crate::deploy;
use crate::functions::{self, Function};
use crate::project::{ACCOUNT, Project, REGION};

const STARTS: usize = 30;
const FIRST_INVOCATIONS: usize = 15;
const INVOCATIONS: usize = 500;

/// Deploys to a local cloud and measures every function.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    deploy::deploy_released(project, &cloud, &[])?;
    let mut rows = Vec::new();
    for (binary, zipped) in binaries(project, &cloud)? {
        eprintln!("{}", binary.name);
        rows.push(row(project, &binary, zipped).with_context(|| format!("{} cannot be measured", binary.name))?);
    }
    Ok(Findings {
        about: format!(
            "Each Lambda function's binary, alone, with a minimal Runtime API and the local cloud: median of {STARTS} \
             starts until it asks for its first event; median of {FIRST_INVOCATIONS} first invocations, each in a new \
             process, and of {INVOCATIONS} further ones in one, with one call to AWS or two (remediate: none; configure-iot \
             answers CloudFormation only, and is not invoked); the most memory that it had; its size, stripped and zipped."
        ),
        columns: ["function", "start", "first invocation", "further ones", "memory", "size", "zipped"]
            .map(String::from)
            .into(),
        rows,
    })
}

/// The binaries, and how large they are when zipped.
fn binaries(project: &Project, cloud: &Cloud) -> Result<Vec<(Binary, u64)>> {
    let functions = functions::list(project, cloud)?;
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
        variables.extend(function.variables().clone());
        let path = folder.join("bootstrap");
        binaries.push((Binary { name, path, variables }, function.code_size));
    }
    binaries.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
    ensure!(!binaries.is_empty(), "target/lambda holds no function of the stack");
    Ok(binaries)
}

fn row(project: &Project, binary: &Binary, zipped: u64) -> Result<Vec<String>> {
    let starts = (0..STARTS).map(|_| binary.start_time(project)).collect::<Result<Vec<_>>>()?;
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
        format!("{:.1} MiB", as_mebibytes(zipped)),
    ])
}

/// The medians of first invocations and of those after them, and the memory at their end.
fn invoke(project: &Project, binary: &Binary) -> Result<(Option<Duration>, Option<Duration>, u64)> {
    let mut running = binary.start(project)?;
    let mut question = running.question()?;
    let Some(event) = event(&binary.name) else { return Ok((None, None, running.memory()?)) };
    let mut first = Vec::new();
    for _ in 0..FIRST_INVOCATIONS {
        running = binary.start(project)?;
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

/// An event with which a function calls AWS once or twice; none for the one that does something else.
fn event(binary: &str) -> Option<Value> {
    let wait = json!({"taskToken": "bench", "attempt": 0});
    Some(match binary {
        // What nobody can read goes to the dead-letter queue.
        "check-remediation"
        | "get-device-settings"
        | "handle-device-response"
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
        "await-device" => json!({"thingName": "bench", "operationId": "bench", "wait": wait}),
        // The same failure each time: it counts once.
        "retry-counter" => json!({"thingName": "bench", "operationId": "bench-1", "timestamp": 1, "receivedAt": 1}),
        "store-task-token" => json!({
            "thingName": "bench", "operationId": "bench", "step": "FIRMWARE_TRANSFERRED", "wait": wait,
        }),
        "publish-to-device" => json!({
            "thingName": "bench", "operationId": "bench", "command": {"name": "CANCEL_DOWNLOAD", "protocol": "json"},
        }),
        // Nobody knows the device.
        "restore-attributes" => json!({"action": "release", "thingName": "bench"}),
        // No readings: what is measured is the way there and back.
        "remediate" => json!({"Records": []}),
        _ => return None,
    })
}
