//! A state that sends nothing waits for a step.

use super::rendezvous::{Operation, Rendezvous, Wait};
use crate::Error;
use crate::device_registry::{DeviceRegistry, Said};
use protocol::{OperationId, Step, ThingName};
use serde::Deserialize;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Where the token waits for the answer.
    pub rendezvous: Rendezvous,
    /// Where the versions of devices are kept.
    pub registry: DeviceRegistry,
}

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

/// Stores the token; an answer that came before it ends the wait at once. If that was a boot into another version than the
/// target, whoever heard it could not know, so the version is recorded here.
pub async fn handle(adapters: &Adapters, input: Input) -> Result<(), Error> {
    let operation = Operation::new(&input.thing_name, &input.operation_id);
    let arrival = adapters.rendezvous.expect(&operation, input.step, &input.wait).await?;
    tracing::info!(operation = operation.key(), step = input.step.name(), outcome = ?arrival.outcome);
    let runs = arrival.stray_version().map(str::to_owned);
    adapters.registry.record(&input.thing_name, &Said { runs, ..Said::default() }).await
}
