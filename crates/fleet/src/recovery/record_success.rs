//! A device has updated itself after all: its history is cleared and, if it is parked, its parking ends.

use super::registry::Registry;
use super::reports;
use crate::Error;
use crate::allowance::Allowances;
use crate::aws::now_seconds;
use crate::queue::MqttMessage;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// What is known of devices, and the registry.
    pub registry: Registry,
    /// How many reports of a device are heard.
    pub allowances: Allowances,
}

/// Handles one queued report of a success.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let Adapters { registry, allowances } = adapters;
    let message = MqttMessage::parse(body)?;
    let report = reports::heard(&registry.iot, allowances, &message, message.update_report()?).await?;
    let Some((report, received_at)) = report else { return Ok(()) };
    let thing = &report.thing_name;
    let (device, outcome) =
        registry.table.change(thing.as_str(), |device| device.succeed(received_at, now_seconds())).await?;
    // Whatever the outcome: an earlier delivery of this message may have been broken off here.
    if device.held.is_some() {
        registry.reconcile(thing).await?;
    }
    tracing::info!(thing = thing.as_str(), timestamp = report.timestamp, ?outcome);
    Ok(())
}
