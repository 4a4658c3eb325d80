//! A job execution has ended behind its workflow's back: cancelled by an operator, timed out by AWS IoT Jobs.

use super::rendezvous::{Operation, Rendezvous};
use crate::error::aws;
use crate::queue::MqttMessage;
use crate::{Error, ErrorName};
use protocol::OperationId;
use protocol::job::JobExecutionEvent;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Where the workflow waits.
    pub rendezvous: Rendezvous,
    /// Tells the number of a job execution.
    pub iot: aws_sdk_iot::Client,
}

/// Handles one queued job execution event. The workflow learns of it in the wait that it is in, or in its next one,
/// even if it has not begun yet; then it tells the device and ends.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let event: JobExecutionEvent = MqttMessage::parse(body)?.json()?;
    let error = match event.status.as_str() {
        "TIMED_OUT" => Error::new(ErrorName::JobTimedOut, "the job's timer ended the job execution"),
        "CANCELED" | "REMOVED" | "REJECTED" => {
            Error::new(ErrorName::JobCanceled, format!("the job execution is {}", event.status))
        }
        _ => return Ok(()),
    };
    let thing = event
        .thing_name()
        .ok_or_else(|| Error::new(ErrorName::MalformedMessage, format!("thingArn: got {:?}", event.thing_arn)))?;
    let number = match event.execution_number {
        Some(number) => number,
        None => execution_number(&adapters.iot, &event).await?,
    };
    let operation = Operation::new(&thing, &OperationId::of_job_execution(&event.job_id, number));
    adapters.rendezvous.fail(&operation, &error).await?;
    tracing::info!(operation = operation.key(), error = error.name.as_str(), outcome = "APPLIED");
    Ok(())
}

/// The documented form of the event has no execution number; the last one is meant then.
async fn execution_number(iot: &aws_sdk_iot::Client, event: &JobExecutionEvent) -> Result<i64, Error> {
    let thing = event.thing_name().map(String::from).unwrap_or_default();
    let request = iot.describe_job_execution().job_id(event.job_id.as_str()).thing_name(thing);
    let output = request.send().await.map_err(|error| aws("iot:DescribeJobExecution", &error))?;
    Ok(output.execution.and_then(|execution| execution.execution_number).unwrap_or(1))
}
