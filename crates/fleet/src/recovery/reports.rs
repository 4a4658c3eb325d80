//! What devices report of their updates, as far as it is heard.

use crate::allowance::{Allowances, Unasked};
use crate::queue::MqttMessage;
use crate::{Error, things};
use protocol::recovery::UpdateReport;

/// The report of a message, and when the broker got it (Unix milliseconds); none if the message is none, is about what is no thing, or
/// is one of too many. They are counted for whoever speaks: a device that speaks for others does not use up what these may say.
pub(super) async fn heard(
    iot: &aws_sdk_iot::Client,
    allowances: &Allowances,
    message: &MqttMessage,
    report: Option<(UpdateReport, i64)>,
) -> Result<Option<(UpdateReport, i64)>, Error> {
    let Some((report, received_at)) = report else {
        tracing::info!(topic = message.topic, outcome = "IGNORED", "no report: it names no thing");
        return Ok(None);
    };
    let client = message.sender().unwrap_or(report.thing_name.as_str());
    if !allowances.allows(client, Unasked::UpdateReport, message.said(), received_at).await? {
        return Ok(None);
    }
    if things::describe(iot, report.thing_name.as_str()).await?.is_none() {
        tracing::info!(thing = report.thing_name.as_str(), outcome = "IGNORED", "the registry has no such thing");
        return Ok(None);
    }
    message.check_sender(&report.thing_name)?;
    Ok(Some((report, received_at)))
}
