//! Who is a thing of the registry, and what it says of it.
//!
//! Anybody with credentials may connect under a name that is no thing's, and report on what is none. That is known and foreign: it
//! starts nothing and is kept nowhere.

use crate::Error;
use crate::error::{aws, code};
use crate::queue::MqttMessage;
use protocol::recovery::UpdateReport;
use std::collections::HashMap;

/// A thing as the registry has it.
pub(crate) struct Thing {
    pub(crate) attributes: HashMap<String, String>,
    /// Counts its changes.
    pub(crate) version: i64,
}

/// A thing; none if the registry has no such thing. It answers 350 such questions a second
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>), and refuses further ones as throttled.
pub(crate) async fn describe(iot: &aws_sdk_iot::Client, thing: &str) -> Result<Option<Thing>, Error> {
    match iot.describe_thing().thing_name(thing).send().await {
        Ok(described) => {
            Ok(Some(Thing { attributes: described.attributes.unwrap_or_default(), version: described.version }))
        }
        // A client's id can be what no thing's name can.
        Err(error) if matches!(code(&error), Some("ResourceNotFoundException" | "InvalidRequestException")) => Ok(None),
        Err(error) => Err(aws("iot:DescribeThing", &error)),
    }
}

/// A report on an update of a thing, and when the broker got it (Unix milliseconds); none if the message is about what is no thing.
pub(crate) async fn update_report(
    iot: &aws_sdk_iot::Client,
    message: &MqttMessage,
) -> Result<Option<(UpdateReport, i64)>, Error> {
    let Some((report, received_at)) = message.update_report()? else {
        tracing::info!(topic = message.topic, outcome = "IGNORED", "no report: it names no thing");
        return Ok(None);
    };
    if describe(iot, report.thing_name.as_str()).await?.is_none() {
        tracing::info!(thing = report.thing_name.as_str(), outcome = "IGNORED", "the registry has no such thing");
        return Ok(None);
    }
    message.check_sender(&report.thing_name)?;
    Ok(Some((report, received_at)))
}
