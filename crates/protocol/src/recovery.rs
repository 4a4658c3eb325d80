//! What devices say of their updates on `iot/device/data`, and what the recovery of failed ones is told.

use crate::{DecodeError, OperationId, Publication, ThingName, limits, verbatim};
use serde::{Deserialize, Serialize};

/// The topic that devices report the end of an update on.
pub const UPDATE_REPORTS_TOPIC: &str = "iot/device/data";

/// How long a model's or firmware's name may be, in characters: the limit of a thing's attribute
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>).
const MAX_TEXT_CHARACTERS: usize = 800;

/// How an update has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpdateStatus {
    /// The device could not update itself.
    Failed,
    /// It could.
    Succeeded,
}

/// A device's report on one try of an update. The known devices write texts for numbers, others write numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateReport {
    /// The device.
    #[serde(rename = "_id_", deserialize_with = "verbatim::parsed")]
    pub thing_name: ThingName,
    /// When the try was, as the device says, in Unix milliseconds: tells one try from another. Devices may write seconds,
    /// milliseconds, microseconds or nanoseconds. If it cannot be read it is later than any: see [`Self::dated`].
    #[serde(with = "time", default = "time::unknown")]
    pub timestamp: i64,
    /// How it ended.
    pub status: UpdateStatus,
    /// The device's model, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "verbatim::optional")]
    pub model: Option<String>,
    /// The firmware that it runs, if it says so.
    #[serde(rename = "FW", default, skip_serializing_if = "Option::is_none", deserialize_with = "verbatim::optional")]
    pub firmware: Option<String>,
}

/// How far a device's clock may be ahead of the broker's, in milliseconds.
const MAX_AHEAD: i64 = 24 * 3_600_000;

impl UpdateReport {
    /// The message for the cloud.
    pub fn encode(&self) -> Publication {
        let payload = serde_json::to_vec(self).unwrap_or_default();
        Publication { topic: UPDATE_REPORTS_TOPIC.to_owned(), payload }
    }

    /// Reads the message in the cloud; none if it names no device or does not say how an update has ended, and so is of quite another
    /// kind: whoever else may use the topic has messages of his own.
    pub fn read(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        #[derive(Deserialize)]
        struct Named {
            #[serde(rename = "_id_", default, deserialize_with = "verbatim::optional")]
            id: Option<String>,
            #[serde(default, deserialize_with = "verbatim::optional")]
            status: Option<String>,
        }
        let Named { id, status } = limits::json(UPDATE_REPORTS_TOPIC, payload)?;
        let is_named = id.is_some_and(|id| id.parse::<ThingName>().is_ok());
        let is_ended = status.is_some_and(|status| serde_json::from_value::<UpdateStatus>(status.into()).is_ok());
        if is_named && is_ended { Self::decode(payload).map(Some) } else { Ok(None) }
    }

    /// The report, dated by the broker (Unix milliseconds) if its device is far ahead of that, or has no time that can be read: until
    /// such a date came, nothing else that the device says would be newer.
    #[must_use]
    pub fn dated(self, received_at: i64) -> Self {
        let is_ahead = self.timestamp > received_at.saturating_add(MAX_AHEAD);
        Self { timestamp: if is_ahead { received_at } else { self.timestamp }, ..self }
    }

    /// Reads a message that is a device's report.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let report: Self = limits::json(UPDATE_REPORTS_TOPIC, payload)?;
        for (field, text) in [("model", &report.model), ("FW", &report.firmware)] {
            if text.as_ref().is_some_and(|text| text.chars().count() > MAX_TEXT_CHARACTERS) {
                let error = format!("{field}: expected at most {MAX_TEXT_CHARACTERS} characters");
                return Err(DecodeError::malformed(UPDATE_REPORTS_TOPIC, error));
            }
        }
        Ok(report)
    }
}

/// A failed update, as it is counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The device.
    pub thing_name: ThingName,
    /// Names this failure, and whatever is done about it.
    pub operation_id: OperationId,
    /// When the device says that it failed, in Unix milliseconds.
    #[serde(deserialize_with = "crate::whole")]
    pub timestamp: i64,
    /// When the broker got the report, in Unix milliseconds: devices' clocks are not to be trusted.
    #[serde(deserialize_with = "crate::whole")]
    pub received_at: i64,
    /// The device's model, as it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The firmware that it runs, as it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
}

/// What a failure comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Decision {
    /// The platform may try again.
    Retry,
    /// The cycle's retry budget is used up: the device rests.
    Park,
    /// All cycles are used up: people have to look.
    Quarantine,
    /// The device is held already, or the failure is older than its last success or release.
    Ignored,
}

/// What the state machine of the recovery is started with: the failure that was one too many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryInput {
    /// The failure.
    #[serde(flatten)]
    pub failure: Failure,
    /// [`Decision::Park`] or [`Decision::Quarantine`]: nothing else needs an execution.
    pub decision: Decision,
    /// Which failure of its cycle it is.
    #[serde(deserialize_with = "crate::whole")]
    pub attempt: u32,
    /// Which cycle, from 1.
    #[serde(deserialize_with = "crate::whole")]
    pub cycle: u32,
}

/// Points in time, of which the size tells the unit.
mod time {
    use serde::{Deserializer, Serializer};

    /// The year 5138 in seconds is 1973 in milliseconds, and so on.
    const FIRST_MILLISECONDS: i64 = 100_000_000_000;
    const FIRST_MICROSECONDS: i64 = FIRST_MILLISECONDS * 1000;
    const FIRST_NANOSECONDS: i64 = FIRST_MICROSECONDS * 1000;

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    pub(super) fn serialize<S: Serializer>(value: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        let text = super::verbatim::optional(deserializer)?.unwrap_or_default();
        let number = text.trim();
        // A fraction of a unit is less than what tells two tries apart.
        let whole = number.split('.').next().unwrap_or_default();
        let value = if number.contains(['e', 'E']) { floating(number) } else { whole.parse().ok() };
        Ok(value.filter(|value| *value >= 0).map_or(unknown(), milliseconds))
    }

    /// Later than any time that there is.
    pub(super) fn unknown() -> i64 {
        i64::MAX
    }

    /// As some libraries write large numbers.
    fn floating(number: &str) -> Option<i64> {
        const BEYOND_64_BITS: f64 = 9_223_372_036_854_775_808.0;
        let number: f64 = number.parse().ok()?;
        #[expect(clippy::cast_possible_truncation, reason = "it is within the bounds")]
        (0.0..BEYOND_64_BITS).contains(&number).then_some(number as i64)
    }

    fn milliseconds(value: i64) -> i64 {
        match value {
            ..FIRST_MILLISECONDS => value * 1000,
            FIRST_MILLISECONDS..FIRST_MICROSECONDS => value,
            FIRST_MICROSECONDS..FIRST_NANOSECONDS => value / 1000,
            FIRST_NANOSECONDS.. => value / 1_000_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_written_as_the_known_devices_do() {
        let text = r#"{"_id_":"3hwC2y7","timestamp":"1711320208793","status":"failed","model":"wo:v8","FW":"2.27"}"#;
        let report = UpdateReport::decode(text.as_bytes()).unwrap();
        assert_eq!((report.thing_name.as_str(), report.timestamp), ("3hwC2y7", 1_711_320_208_793));
        assert_eq!(report.status, UpdateStatus::Failed);
        assert_eq!((report.model.as_deref(), report.firmware.as_deref()), (Some("wo:v8"), Some("2.27")));
        assert_eq!(String::from_utf8(report.encode().payload).unwrap(), text);
    }

    #[test]
    fn a_message_of_another_kind_is_no_report_and_no_error() {
        for other in [
            r#"{"status":"failed","pump":7}"#,
            r#"{"_id_":[7],"status":"failed"}"#,
            r#"{"_id_":"a/b"}"#,
            r#"{"_id_":"a","temperature":21}"#,
            r#"{"_id_":"a","timestamp":1,"status":"online"}"#,
        ] {
            assert_eq!(UpdateReport::read(other.as_bytes()).unwrap(), None, "{other}");
        }
        for broken in ["", "7", "{\"status\": fail"] {
            assert!(UpdateReport::read(broken.as_bytes()).is_err(), "{broken}");
        }
        let report = br#"{"_id_":"a","timestamp":"1","status":"failed"}"#;
        assert_eq!(UpdateReport::read(report).unwrap().unwrap(), UpdateReport::decode(report).unwrap());
    }

    #[test]
    fn what_is_no_report_says_which_field_is_wrong() {
        let long = "x".repeat(801);
        for (field, report) in [
            ("_id_", r#"{"timestamp":"1","status":"failed"}"#.to_owned()),
            ("a/b", r#"{"_id_":"a/b","timestamp":"1","status":"failed"}"#.to_owned()),
            ("FAILED", r#"{"_id_":"a","timestamp":"1","status":"FAILED"}"#.to_owned()),
            ("FW", format!(r#"{{"_id_":"a","timestamp":"1","status":"failed","FW":"{long}"}}"#)),
        ] {
            let error = UpdateReport::decode(report.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{report}: {error}");
        }
    }

    #[test]
    fn numbers_are_as_good_as_texts_and_stay_what_they_are() {
        let report = r#"{"_id_":30210,"timestamp":1711320208793,"status":"failed","model":8,"FW":2.10}"#;
        let report = UpdateReport::read(report.as_bytes()).unwrap().unwrap();
        assert_eq!((report.thing_name.as_str(), report.timestamp), ("30210", 1_711_320_208_793));
        assert_eq!((report.model.as_deref(), report.firmware.as_deref()), (Some("8"), Some("2.10")));
        let odd = r#"{"_id_":"a","timestamp":"1","status":"failed","model":null,"FW":{"major":2}}"#;
        let odd = UpdateReport::decode(odd.as_bytes()).unwrap();
        assert_eq!((odd.model, odd.firmware), (None, None), "what a device does not say so is not known");
    }

    #[test]
    fn the_size_of_a_time_tells_its_unit() {
        let time = |text: &str| {
            let report = format!(r#"{{"_id_":"a","timestamp":{text},"status":"failed"}}"#);
            UpdateReport::decode(report.as_bytes()).map(|report| report.timestamp)
        };
        for text in [
            "1711320208",
            "1711320208.5",
            "\"1711320208\"",
            "1711320208000",
            "\" 1711320208000 \"",
            "1711320208000000",
            "\"1711320208000000\"",
            "1711320208000000000",
        ] {
            assert_eq!(time(text), Ok(1_711_320_208_000), "{text}");
        }
        assert_eq!(
            (time("0"), time("99999999999"), time("100000000000")),
            (Ok(0), Ok(99_999_999_999_000), Ok(100_000_000_000))
        );
    }

    #[test]
    fn a_report_whose_time_cannot_be_read_is_dated_by_the_broker() {
        for time in
            ["\"-1\"", "-1", "\"\"", "\"2026-12-01T00:00:00Z\"", "null", "true", "1e300", "99999999999999999999", "[7]"]
        {
            let report = format!(r#"{{"_id_":"a","timestamp":{time},"status":"failed"}}"#);
            assert_eq!(UpdateReport::decode(report.as_bytes()).unwrap().dated(7).timestamp, 7, "{time}");
        }
        assert_eq!(UpdateReport::decode(br#"{"_id_":"a","status":"failed"}"#).unwrap().dated(7).timestamp, 7);
    }

    /// Half a century ahead, and that in milliseconds: the device has lost its clock.
    #[test]
    fn a_report_from_the_future_is_dated_by_the_broker() {
        let report = r#"{"_id_":"a","timestamp":"17104550400000","status":"failed"}"#;
        let report = UpdateReport::decode(report.as_bytes()).unwrap();
        let (now, day) = (1_711_320_208_000, 86_400_000);
        assert_eq!(report.clone().dated(now).timestamp, now);
        for timestamp in [0, now - day, now, now + day] {
            let report = UpdateReport { timestamp, ..report.clone() };
            assert_eq!(report.clone().dated(now), report);
        }
        assert_eq!(UpdateReport { timestamp: now + day + 1, ..report }.dated(now).timestamp, now);
    }
}
