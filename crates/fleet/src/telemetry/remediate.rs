//! Follows new readings, and has sensors bring their surroundings back.
//!
//! What is decided is kept before it is done: a call that dies in between lets the next one do it. All of a sensor's readings in
//! a batch are followed with one read and one write, so that a flood of one sensor costs the others nothing.

use super::readings::Sample;
pub use super::remedies::{Adapters, Places, Rule, Rules};
use super::remedies::{OLDEST, settle};
use crate::error::unbuilt;
use crate::{Error, ErrorName};
pub use aws_lambda_events::event::dynamodb::Event;
use aws_lambda_events::event::dynamodb::EventRecord;
use aws_lambda_events::event::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use futures_util::{StreamExt, stream};
use std::collections::BTreeMap;

/// How many sensors are seen to at once.
const AT_ONCE: usize = 32;

/// Follows the readings of a stream's batch; names the record from which on the stream shall deliver again.
/// `now` is in Unix milliseconds.
pub async fn handle(adapters: &Adapters, event: Event, now: i64) -> DynamoDbEventResponse {
    let mut sensors: BTreeMap<String, Vec<(usize, Sample)>> = BTreeMap::new();
    let mut failed = Vec::new();
    for (index, record) in event.records.iter().enumerate() {
        match read(record) {
            Ok(sample) => sensors.entry(sample.device.to_string()).or_default().push((index, sample)),
            Err(error) => failed.extend(bury(adapters, record, &error).await.err().map(|_| index)),
        }
    }
    let followed = sensors.values().map(async |readings| (readings[0].0, follow(adapters, readings, now).await));
    let mut followed = stream::iter(followed).buffer_unordered(AT_ONCE);
    while let Some((first, result)) = followed.next().await {
        if let Err(error) = result {
            tracing::warn!(outcome = "RETRY", error = error.name.as_str(), message = error.message);
            failed.push(first);
        }
    }
    let mut response = DynamoDbEventResponse::default();
    // The stream begins again at the first of them.
    let first = failed.into_iter().min().and_then(|index| event.records[index].change.sequence_number.clone());
    response.batch_item_failures.extend(first.map(|number| {
        let mut failure = DynamoDbBatchItemFailure::default();
        failure.item_identifier = Some(number);
        failure
    }));
    response
}

/// A row that no reading can be read from is no reason to stop.
fn read(record: &EventRecord) -> Result<Sample, Error> {
    serde_dynamo::from_item(record.change.new_image.clone())
        .map_err(|error| Error::new(ErrorName::MalformedMessage, format!("row of the table of readings: {error}")))
}

async fn bury(adapters: &Adapters, record: &EventRecord, error: &Error) -> Result<(), Error> {
    tracing::error!(outcome = "DEAD_LETTERED", error = error.name.as_str(), message = error.message);
    let body = serde_json::to_string(&record.change).map_err(unbuilt)?;
    adapters.dead_letters.send(body, record.event_source_arn.as_deref(), error).await
}

/// Follows a sensor's readings, the oldest first. The broker's time says which are too old: sensors' clocks may be slow.
async fn follow(adapters: &Adapters, readings: &[(usize, Sample)], now: i64) -> Result<(), Error> {
    let device = readings[0].1.device.as_str();
    let (climate, ()) = adapters
        .climates
        .change(device, |climate| {
            for (_, sample) in readings.iter().filter(|(_, sample)| sample.received_at > now - OLDEST) {
                climate.follow(&adapters.rules, sample, now);
            }
        })
        .await?;
    settle(adapters, device, climate.pending(), now).await
}
