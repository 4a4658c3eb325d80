//! Counts a device's failed update, and says what it comes to. Only a decision to park a device or to give it up starts an execution.

use super::device::{Counted, Limits};
use super::reports;
use super::table::RecoveryTable;
use crate::Error;
use crate::allowance::Allowances;
use crate::error::unbuilt;
use crate::execution_name::execution_name;
use crate::queue::{MqttMessage, Queue};
use protocol::recovery::{Decision, Failure, RecoveryInput, UpdateReport, UpdateStatus};
use protocol::{OperationId, ThingName};

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// What is known of devices.
    pub table: RecoveryTable,
    /// The registry, which knows what a thing is.
    pub iot: aws_sdk_iot::Client,
    /// How many reports of a device are heard.
    pub allowances: Allowances,
    /// Where start-workflow learns of decisions.
    pub recoveries: Queue,
    /// Where record-success learns of successes.
    pub successes: Queue,
    /// The retry budget.
    pub limits: Limits,
}

/// Handles one queued report of a failure. The same report again changes nothing and comes to the same decision, whose execution
/// is started once.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let message = MqttMessage::parse(body)?;
    // What the topic rules could not read comes here, and may be a success.
    let report = message.update_report()?;
    if report.as_ref().is_some_and(|(report, _)| report.status == UpdateStatus::Succeeded) {
        return adapters.successes.send(body).await;
    }
    let report = reports::heard(&adapters.iot, &adapters.allowances, &message, report).await?;
    let Some((report, received_at)) = report else { return Ok(()) };
    let input = count(adapters, failure(report, received_at)?).await?;
    if matches!(input.decision, Decision::Park | Decision::Quarantine) {
        adapters.recoveries.send(&serde_json::to_string(&input).map_err(unbuilt)?).await?;
    }
    Ok(())
}

fn failure(report: UpdateReport, received_at: i64) -> Result<Failure, Error> {
    let UpdateReport { thing_name, timestamp, model, firmware, .. } = report;
    let operation_id = operation_of(&thing_name, timestamp)?;
    Ok(Failure { thing_name, operation_id, timestamp, received_at, model, firmware })
}

/// Names the failure that a device reports for that time (Unix milliseconds), and whatever is done about it.
pub fn operation_of(thing: &ThingName, timestamp: i64) -> Result<OperationId, Error> {
    execution_name(&[thing.to_string(), timestamp.to_string(), "failed".to_owned()]).parse().map_err(unbuilt)
}

/// Counts one failure, once. What is logged here is the log of failed updates.
async fn count(adapters: &Adapters, failure: Failure) -> Result<RecoveryInput, Error> {
    let thing = failure.thing_name.as_str();
    let (device, counted) = adapters.table.change(thing, |device| device.fail(&failure, adapters.limits)).await?;
    let Counted { decision, attempt, cycle } = counted;
    tracing::info!(
        outcome = "COUNTED",
        thing,
        operation = failure.operation_id.as_str(),
        failed_at = failure.timestamp,
        received_at = failure.received_at,
        model = failure.model,
        firmware = failure.firmware,
        ?decision,
        attempt,
        cycle,
        phase = ?device.phase,
    );
    Ok(RecoveryInput { failure, decision, attempt, cycle })
}
