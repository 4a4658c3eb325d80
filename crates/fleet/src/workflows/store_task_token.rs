//! A state that sends nothing waits for a step.

use super::rendezvous::{Operation, Rendezvous, Wait};
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
    /// How the state waits.
    pub wait: Wait,
}

/// Stores the token; an answer that came before it ends the wait at once.
pub async fn handle(rendezvous: &Rendezvous, input: Input) -> Result<(), Error> {
    let operation = Operation::new(&input.thing_name, &input.operation_id);
    let outcome = rendezvous.expect(&operation, input.step, &input.wait).await?;
    tracing::info!(operation = operation.key(), step = input.step.name(), ?outcome);
    Ok(())
}
