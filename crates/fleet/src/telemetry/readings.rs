//! Readings as they are kept, one row each, and which batch has taken which.

use crate::Error;
use crate::aws::{number, text};
use crate::error::{aws, code, unbuilt};
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::ReturnValuesOnConditionCheckFailure;
use protocol::{Building, ReadingId, SensorId};
use serde::{Deserialize, Serialize};

/// In seconds.
const DAY: i64 = 86_400;

/// A reading as it is kept: a row of the table, a line of the history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sample {
    /// The sensor.
    pub(crate) device: SensorId,
    /// When it was measured, in Unix milliseconds: as the sensor says, else when the broker got it.
    pub(crate) time: i64,
    /// Tells it from the sensor's other readings.
    pub(crate) id: ReadingId,
    /// In degrees Celsius.
    pub(crate) temperature: f64,
    /// In percent.
    pub(crate) humidity: f64,
    /// Where.
    pub(crate) building: Building,
    /// When the broker got it, in Unix milliseconds.
    pub(crate) received_at: i64,
}

impl Sample {
    /// The table's sort key: by time, and no two are the same.
    pub(crate) fn sort_key(&self) -> String {
        format!("{:014}#{}", self.time, self.id)
    }

    /// Both parts of the table's key.
    pub(crate) fn key(&self) -> (String, String) {
        (self.device.to_string(), self.sort_key())
    }
}

/// Which batch has taken a reading, and since when it works on it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Holder {
    /// The batch's name: the key of its object in the history.
    #[serde(rename = "batchName")]
    pub(crate) batch: String,
    /// In Unix milliseconds.
    pub(crate) taken_at: i64,
}

/// The table of readings, and that of batches whose metrics are added.
#[derive(Debug, Clone)]
pub(crate) struct Readings {
    client: Client,
    table: String,
    batches: String,
    keep_days: u32,
}

impl Readings {
    pub(crate) fn new(config: &aws_config::SdkConfig, table: String, batches: String, keep_days: u32) -> Self {
        Self { client: Client::new(config), table, batches, keep_days }
    }

    /// Writes a reading's row for a batch, unless it has one: then says whose it is.
    pub(crate) async fn take(&self, sample: &Sample, batch: &Holder) -> Result<Option<Holder>, Error> {
        let fields = serde_dynamo::to_item(sample).map_err(unbuilt)?;
        let put = self
            .client
            .put_item()
            .table_name(&self.table)
            .set_item(Some(fields))
            .item("reading", text(sample.sort_key()))
            .item("batchName", text(&batch.batch))
            .item("takenAt", number(batch.taken_at))
            .item("expiresAt", number(self.expiry(sample.received_at)))
            .condition_expression("attribute_not_exists(device)")
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        let Err(error) = put.send().await else { return Ok(None) };
        match error.as_service_error() {
            Some(PutItemError::ConditionalCheckFailedException(failed)) => {
                let row = failed.item.clone().unwrap_or_default();
                serde_dynamo::from_item(row).map(Some).map_err(unbuilt)
            }
            _ => Err(aws("dynamodb:PutItem", &error)),
        }
    }

    /// Gives a reading of a batch that has died to another one; false if somebody else was quicker.
    pub(crate) async fn take_over(&self, sample: &Sample, from: &Holder, to: &Holder) -> Result<bool, Error> {
        let update = self
            .client
            .update_item()
            .table_name(&self.table)
            .key("device", text(sample.device.as_str()))
            .key("reading", text(sample.sort_key()))
            .update_expression("SET batchName = :to, takenAt = :now")
            .condition_expression("batchName = :from AND takenAt = :since")
            .expression_attribute_values(":to", text(&to.batch))
            .expression_attribute_values(":now", number(to.taken_at))
            .expression_attribute_values(":from", text(&from.batch))
            .expression_attribute_values(":since", number(from.taken_at));
        match update.send().await {
            Ok(_) => Ok(true),
            Err(error) if code(&error) == Some("ConditionalCheckFailedException") => Ok(false),
            Err(error) => Err(aws("dynamodb:UpdateItem", &error)),
        }
    }

    /// Whether a batch's metrics are added.
    pub(crate) async fn is_finished(&self, batch: &str) -> Result<bool, Error> {
        let get = self.client.get_item().table_name(&self.batches).key("batchName", text(batch)).consistent_read(true);
        let found = get.send().await.map_err(|error| aws("dynamodb:GetItem", &error))?;
        Ok(found.item.is_some_and(|item| item.contains_key("finishedAt")))
    }

    /// Asks to add the metrics of a batch that has died: one at a time may. False if another call is at it, or has been.
    pub(crate) async fn resume(&self, batch: &str, now: i64, longest_call: i64) -> Result<bool, Error> {
        let put = self
            .client
            .put_item()
            .table_name(&self.batches)
            .item("batchName", text(batch))
            .item("resumedAt", number(now))
            .item("expiresAt", number(self.expiry(now) + DAY))
            .condition_expression(
                "attribute_not_exists(batchName) OR attribute_not_exists(finishedAt) AND resumedAt < :dead",
            )
            .expression_attribute_values(":dead", number(now - longest_call));
        match put.send().await {
            Ok(_) => Ok(true),
            Err(error) if code(&error) == Some("ConditionalCheckFailedException") => Ok(false),
            Err(error) => Err(aws("dynamodb:PutItem", &error)),
        }
    }

    /// Notes that a batch's metrics are added.
    pub(crate) async fn finish(&self, batch: &str, now: i64) -> Result<(), Error> {
        let put = self
            .client
            .put_item()
            .table_name(&self.batches)
            .item("batchName", text(batch))
            .item("finishedAt", number(now))
            // A little longer than its rows.
            .item("expiresAt", number(self.expiry(now) + DAY));
        put.send().await.map(|_| ()).map_err(|error| aws("dynamodb:PutItem", &error))
    }

    fn expiry(&self, received_at: i64) -> i64 {
        expiry(received_at, self.keep_days)
    }
}

/// When what was received then may be forgotten, in Unix seconds.
pub(crate) fn expiry(received_at: i64, keep_days: u32) -> i64 {
    received_at / 1000 + i64::from(keep_days) * DAY
}
