//! A job has reached a device: starts the workflow that its document asks for, once.

use crate::error::{aws, code};
use crate::queue::MqttMessage;
use crate::{Error, ErrorName};
use protocol::job::{JobDocument, NextExecution, NotifyNext, UpgradeInput, WorkflowName};
use protocol::{OperationId, ThingName};
use sha2::{Digest, Sha256};

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Starts executions.
    pub step_functions: aws_sdk_sfn::Client,
    /// The state machine behind [`WorkflowName::FirmwareUpgrade`].
    pub firmware_upgrade_arn: String,
}

/// Handles one queued `notify-next`. A repeat starts nothing; a job that is not ours is left alone.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let message = MqttMessage::parse(body)?;
    let thing = thing_of_topic(&message.topic)?;
    let Some(execution) = message.json::<NotifyNext>()?.execution else {
        tracing::info!(thing = thing.as_str(), outcome = "IGNORED", "nothing is pending");
        return Ok(());
    };
    if execution.job_document.get("workflow").is_none() {
        tracing::info!(thing = thing.as_str(), job = execution.job_id.as_str(), outcome = "IGNORED", "foreign job");
        return Ok(());
    }
    start(adapters, &thing, &execution).await
}

async fn start(adapters: &Adapters, thing: &ThingName, execution: &NextExecution) -> Result<(), Error> {
    let document: JobDocument = serde_json::from_value(execution.job_document.clone())
        .map_err(|error| Error::new(ErrorName::InvalidInput, format!("jobDocument: {error}")))?;
    let state_machine = match document.workflow {
        WorkflowName::FirmwareUpgrade => &adapters.firmware_upgrade_arn,
    };
    let job = &execution.job_id;
    let input = UpgradeInput {
        thing_name: thing.clone(),
        job_id: job.clone(),
        execution_number: execution.execution_number,
        operation_id: OperationId::of_job_execution(job, execution.execution_number),
        document,
    };
    let input =
        serde_json::to_string(&input).map_err(|error| Error::new(ErrorName::ServiceError, error.to_string()))?;
    let name = execution_name(&[job.as_str(), thing.as_str(), &execution.execution_number.to_string()]);
    let request = adapters.step_functions.start_execution().state_machine_arn(state_machine).name(&name).input(input);
    let outcome = match request.send().await {
        Ok(_) => "APPLIED",
        Err(error) if code(&error) == Some("ExecutionAlreadyExists") => "DUPLICATE",
        Err(error) => return Err(aws("states:StartExecution", &error)),
    };
    tracing::info!(thing = thing.as_str(), job = job.as_str(), execution = name, outcome);
    Ok(())
}

fn thing_of_topic(topic: &str) -> Result<ThingName, Error> {
    topic
        .strip_prefix("$aws/things/")
        .and_then(|rest| rest.strip_suffix("/jobs/notify-next"))
        .and_then(|thing| thing.parse().ok())
        .ok_or_else(|| Error::invalid("topic", topic, "$aws/things/{thing}/jobs/notify-next"))
}

/// The same parts always make the same name, other parts another one: Step Functions then refuses a second start.
/// At most 80 characters of the set that it allows
/// (<https://docs.aws.amazon.com/step-functions/latest/apireference/API_StartExecution.html>). The parts are there
/// to be read; the hash tells `a-b` + `c` from `a` + `b-c`.
fn execution_name(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    let digest: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let readable: String = parts.join("-").replace(':', "_").chars().take(63).collect();
    format!("{readable}-{digest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_deterministic_distinct_and_allowed() {
        let name = execution_name(&["job-1", "gateway:7", "1"]);
        assert_eq!(name, execution_name(&["job-1", "gateway:7", "1"]));
        assert!(name.starts_with("job-1-gateway_7-1-"), "{name}");
        assert_ne!(execution_name(&["a-b", "c", "1"]), execution_name(&["a", "b-c", "1"]));
        assert_ne!(execution_name(&["a", "b:c", "1"]), execution_name(&["a", "b_c", "1"]));
        let long = execution_name(&["j".repeat(64).as_str(), "t".repeat(128).as_str(), "12"]);
        assert_eq!(long.len(), 80);
        assert!(long.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)));
    }
}
