//! A state that sends nothing waits for a step.

use super::rendezvous::{Operation, Rendezvous};
use crate::Error;
use protocol::{OperationId, Step, ThingName};
use serde::Deserialize;

/// What a state machine asks for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Input {
    /// The device.
    pub thing_name: ThingName,
    /// The operation.
    pub operation_id: OperationId,
    /// The step to wait for.
    pub step: Step,
    /// The waiting state's token.
    pub task_token: String,
    /// The version that the device must report with it; any, if absent.
    #[serde(default)]
    pub expected_version: Option<String>,
}

/// Stores the token; an answer that came before it ends the wait at once.
pub async fn handle(rendezvous: &Rendezvous, input: Input) -> Result<(), Error> {
    let operation = Operation::new(&input.thing_name, &input.operation_id);
    let expected = input.expected_version.as_deref();
    let outcome = rendezvous.expect(&operation, input.step, &input.task_token, expected).await?;
    tracing::info!(operation = operation.key(), step = input.step.name(), ?outcome);
    Ok(())
}
