//! Counts a device's failed update, and says what it comes to.

use super::device::{Decision, Limits};
use super::table::RecoveryTable;
use crate::Error;
use protocol::recovery::Failure;
use serde::Serialize;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// What is known of devices.
    pub table: RecoveryTable,
    /// The retry budget.
    pub limits: Limits,
}

/// What a failure comes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// What is to be done.
    pub decision: Decision,
    /// Which failure of its cycle it is; 0 if it does not count.
    pub attempt: u32,
    /// How many a cycle has.
    pub attempts: u32,
    /// Which cycle, from 1.
    pub cycle: u32,
    /// How many there are.
    pub cycles: u32,
}

/// Counts one failure. The same failure again changes nothing and gets the same answer.
pub async fn handle(adapters: &Adapters, failure: Failure) -> Result<Output, Error> {
    let Limits { attempts, cycles } = adapters.limits;
    let (device, counted) =
        adapters.table.change(failure.thing_name.as_str(), |device| device.fail(&failure, adapters.limits)).await?;
    tracing::info!(
        thing = failure.thing_name.as_str(),
        operation = failure.operation_id.as_str(),
        decision = ?counted.decision,
        phase = ?device.phase,
        attempt = counted.attempt,
        cycle = counted.cycle,
    );
    Ok(Output { decision: counted.decision, attempt: counted.attempt, attempts, cycle: counted.cycle, cycles })
}
