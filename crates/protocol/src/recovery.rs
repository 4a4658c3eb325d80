//! What devices say of their updates on `iot/device/data`, and what the recovery of failed ones is told.

use crate::{DecodeError, OperationId, Publication, ThingName, limits};
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

/// A device's report on one try of an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateReport {
    /// The device.
    #[serde(rename = "_id_")]
    pub thing_name: ThingName,
    /// When the try was, as the device says, in Unix milliseconds: tells one try from another.
    #[serde(with = "digits")]
    pub timestamp: i64,
    /// How it ended.
    pub status: UpdateStatus,
    /// The device's model, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The firmware that it runs, if it says so.
    #[serde(rename = "FW", default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
}

impl UpdateReport {
    /// The message for the cloud.
    pub fn encode(&self) -> Publication {
        let payload = serde_json::to_vec(self).unwrap_or_default();
        Publication { topic: UPDATE_REPORTS_TOPIC.to_owned(), payload }
    }

    /// Reads the message in the cloud; none if it names no device, and so is of quite another kind: whoever else may use the topic
    /// has messages of his own.
    pub fn read(payload: &[u8]) -> Result<Option<Self>, DecodeError> {
        #[derive(Deserialize)]
        struct Named {
            #[serde(rename = "_id_")]
            id: Option<serde_json::Value>,
        }
        let Named { id } = limits::json(UPDATE_REPORTS_TOPIC, payload)?;
        match id.as_ref().and_then(serde_json::Value::as_str).map(str::parse::<ThingName>) {
            Some(Ok(_)) => Self::decode(payload).map(Some),
            _ => Ok(None),
        }
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

/// Devices send numbers as texts of digits.
mod digits {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// The largest timestamp that is taken: the year 5138.
    const MAX: i64 = 99_999_999_999_999;

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    pub(super) fn serialize<S: Serializer>(value: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let value = text.parse().ok().filter(|value| digits && (0..=MAX).contains(value));
        value.ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            D::Error::custom(format!("timestamp: got {shown:?}, expected Unix milliseconds as a text of digits"))
        })
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
        for other in [r#"{"status":"failed","pump":7}"#, r#"{"_id_":7,"status":"failed"}"#, r#"{"_id_":"a/b"}"#] {
            assert_eq!(UpdateReport::read(other.as_bytes()).unwrap(), None, "{other}");
        }
        for broken in ["", "7", r#"{"_id_":"a","timestamp":1,"status":"failed"}"#] {
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
            ("timestamp", r#"{"_id_":"a","timestamp":"-1","status":"failed"}"#.to_owned()),
            ("timestamp", r#"{"_id_":"a","timestamp":"+1","status":"failed"}"#.to_owned()),
            ("timestamp", r#"{"_id_":"a","timestamp":"","status":"failed"}"#.to_owned()),
            ("timestamp", r#"{"_id_":"a","timestamp":"999999999999999","status":"failed"}"#.to_owned()),
            ("string", r#"{"_id_":"a","timestamp":1,"status":"failed"}"#.to_owned()),
            ("FAILED", r#"{"_id_":"a","timestamp":"1","status":"FAILED"}"#.to_owned()),
            ("FW", format!(r#"{{"_id_":"a","timestamp":"1","status":"failed","FW":"{long}"}}"#)),
        ] {
            let error = UpdateReport::decode(report.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{report}: {error}");
        }
    }
}
