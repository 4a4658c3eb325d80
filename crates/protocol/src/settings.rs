//! Settings that are pushed to devices: `devices/{thing}/config_req` and `devices/{thing}/config_resp`.
//!
//! A push carries one or more named settings. Each is an operation of its own, with its own command and its own
//! confirmation; what settings there are is no matter of this code.

use crate::device::{ErrorBody, thing_between};
use crate::{DecodeError, OperationId, Publication, SettingName, ThingName, limits};
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value, json};
use std::collections::BTreeMap;
use std::fmt;

/// How far two numbers may be apart, relative to their size, and still be the same: devices compute in single precision.
const PRECISION: f64 = 1e-6;

/// How long a value or a device's error may be, in characters: they are kept and shown.
const MAX_TEXT_CHARACTERS: usize = 1024;

/// Named settings with their values.
pub type Settings = BTreeMap<SettingName, SettingValue>;

/// A setting's value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SettingValue {
    /// On or off.
    Boolean(bool),
    /// A quantity, in the setting's own unit.
    Number(Number),
    /// A word, such as a mode's name.
    Text(String),
}

impl SettingValue {
    /// Whether a device that says one of them has done the other: numbers may differ in the last digits of a single
    /// precision.
    pub fn is_same(&self, other: &Self) -> bool {
        let (Self::Number(a), Self::Number(b)) = (self, other) else { return self == other };
        let (a, b) = (a.as_f64().unwrap_or(f64::NAN), b.as_f64().unwrap_or(f64::NAN));
        (a - b).abs() <= PRECISION * a.abs().max(b.abs()).max(1.0)
    }
}

impl fmt::Display for SettingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => f.write_str(value),
        }
    }
}

/// The operation by which a push sets one setting.
pub fn operation_of(push: &OperationId, name: &SettingName) -> Result<OperationId, crate::InvalidId> {
    format!("{push}.{name}").parse()
}

/// The topic that a thing takes settings on.
pub fn request_topic(thing: &ThingName) -> String {
    format!("devices/{thing}/config_req")
}

/// The topic that a thing answers on.
pub fn response_topic(thing: &ThingName) -> String {
    format!("devices/{thing}/config_resp")
}

/// The thing whose answers come on this topic, if it is such a topic.
pub fn thing_of_response(topic: &str) -> Option<ThingName> {
    thing_between(topic, "devices/", "/config_resp")
}

/// The command to set one setting.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SettingCommand {
    /// The operation that the answer names.
    pub operation_id: OperationId,
    /// Which setting.
    pub name: SettingName,
    /// What to set it to.
    pub value: SettingValue,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    operation_id: &'a OperationId,
    name: &'a SettingName,
    #[serde(rename = "type")]
    kind: &'a str,
    value: &'a SettingValue,
    timestamp: i64,
}

impl SettingCommand {
    /// The message for a thing. `now` is in Unix milliseconds.
    pub fn encode(&self, thing: &ThingName, now: i64) -> Publication {
        let Self { operation_id, name, value } = self;
        let request = Request { operation_id, name, kind: "REQ", value, timestamp: now };
        publication(request_topic(thing), &request)
    }

    /// Reads the message on the device.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        limits::json("config_req", payload)
    }
}

/// What became of one setting on the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SettingOutcome {
    /// The device has taken it over.
    Success {
        /// The value that it has now, if it said so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value: Option<SettingValue>,
    },
    /// It has not.
    Fail {
        /// The device's reason.
        error: String,
    },
}

/// A device's answer to a [`SettingCommand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingResponse {
    /// The operation that it answers.
    pub operation_id: OperationId,
    /// Which setting.
    pub name: SettingName,
    /// What became of it.
    pub outcome: SettingOutcome,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Status {
    Success,
    Fail,
}

/// Of the answer, what the cloud has to know. (Old devices leave `type` and `timestamp` out.)
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    name: SettingName,
    operation_id: OperationId,
    status: Status,
    #[serde(default)]
    value: Option<Value>,
    #[serde(default, deserialize_with = "error_text")]
    error: Option<String>,
}

fn error_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<ErrorBody>::deserialize(deserializer)?.map(|error| error.to_string()))
}

impl SettingResponse {
    /// The push that the operation belongs to; none if it is not an operation of this setting.
    pub fn push(&self) -> Option<OperationId> {
        self.operation_id.as_str().strip_suffix(self.name.as_str())?.strip_suffix('.')?.parse().ok()
    }

    /// The message by which a device answers. `now` is in Unix milliseconds.
    pub fn encode(&self, thing: &ThingName, now: i64) -> Publication {
        let (status, value, error) = match &self.outcome {
            SettingOutcome::Success { value } => (Status::Success, value.clone(), "0".to_owned()),
            SettingOutcome::Fail { error } => (Status::Fail, None, error.clone()),
        };
        let mut answer = json!({
            "name": self.name, "type": "RESP", "operationId": self.operation_id, "status": status, "error": error,
            "timestamp": now,
        });
        if let Some(value) = value {
            answer["value"] = json!(value);
        }
        // The reference device's error codes are numbers, 0 for none.
        if let Ok(code) = error.parse::<i64>() {
            answer["error"] = code.into();
        }
        publication(response_topic(thing), &answer)
    }

    /// Reads what a device said. Fails with a sentence if it cannot be read.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: Answer = limits::json("config_resp", payload)?;
        let outcome = match answer.status {
            Status::Success => SettingOutcome::Success { value: answer.value.map(setting_value).transpose()? },
            // A failure is one whatever value comes with it.
            Status::Fail => {
                let error = answer.error.unwrap_or_default();
                SettingOutcome::Fail { error: error.chars().take(MAX_TEXT_CHARACTERS).collect() }
            }
        };
        Ok(Self { operation_id: answer.operation_id, name: answer.name, outcome })
    }
}

fn setting_value(value: Value) -> Result<SettingValue, DecodeError> {
    match serde_json::from_value(value) {
        Ok(SettingValue::Text(text)) if text.chars().count() > MAX_TEXT_CHARACTERS => {
            Err(DecodeError::malformed("value", format!("expected at most {MAX_TEXT_CHARACTERS} characters")))
        }
        Ok(value) => Ok(value),
        Err(_) => Err(DecodeError::malformed("value", "expected a number, a text or a boolean")),
    }
}

/// The input of the configuration push's state machine. The execution's name is the push's operation id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigPushInput {
    /// The device.
    pub thing_name: ThingName,
    /// When its session began, in Unix milliseconds: a newer session's push replaces an older one's.
    pub connected_at: i64,
    /// The thing's attribute of that name, if it has been read already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_id: Option<String>,
}

fn publication(topic: String, body: &impl Serialize) -> Publication {
    // Texts, numbers and booleans always serialize.
    Publication { topic, payload: serde_json::to_vec(body).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: f64) -> SettingValue {
        SettingValue::Number(Number::from_f64(value).unwrap())
    }

    fn command() -> SettingCommand {
        let name: SettingName = "SET_TEMP".parse().unwrap();
        let operation_id = operation_of(&"gateway-1-5af548b1-0".parse().unwrap(), &name).unwrap();
        SettingCommand { operation_id, name, value: number(21.5) }
    }

    #[test]
    fn a_command_has_the_form_that_devices_know() {
        let publication = command().encode(&"gateway-1".parse().unwrap(), 1000);
        assert_eq!(publication.topic, "devices/gateway-1/config_req");
        assert_eq!(
            String::from_utf8(publication.payload.clone()).unwrap(),
            r#"{"operationId":"gateway-1-5af548b1-0.SET_TEMP","name":"SET_TEMP","type":"REQ","value":21.5,"timestamp":1000}"#
        );
        assert_eq!(SettingCommand::decode(&publication.payload).unwrap(), command());
    }

    #[test]
    fn an_answer_comes_back_as_it_was_sent() {
        let thing: ThingName = "gateway-1".parse().unwrap();
        for outcome in [
            SettingOutcome::Success { value: Some(number(21.5)) },
            SettingOutcome::Success { value: None },
            SettingOutcome::Fail { error: "17".into() },
            SettingOutcome::Fail { error: "valve stuck".into() },
        ] {
            let SettingCommand { operation_id, name, .. } = command();
            let response = SettingResponse { operation_id, name, outcome };
            let publication = response.encode(&thing, 1000);
            assert_eq!(thing_of_response(&publication.topic), Some(thing.clone()));
            assert_eq!(SettingResponse::decode(&publication.payload).unwrap(), response);
            assert_eq!(response.push().unwrap().as_str(), "gateway-1-5af548b1-0");
        }
    }

    #[test]
    fn old_devices_leave_out_type_and_timestamp_and_nobody_else_anything() {
        let old =
            br#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"FAIL","error":{"code":"E3","message":"hot"}}"#;
        let response = SettingResponse::decode(old).unwrap();
        assert_eq!(response.outcome, SettingOutcome::Fail { error: "E3: hot".into() });
        let odd =
            br#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"FAIL","type":1,"timestamp":"17","value":{}}"#;
        assert_eq!(SettingResponse::decode(odd).unwrap().outcome, SettingOutcome::Fail { error: String::new() });
        let long = |status: &str| {
            let text = "x".repeat(2000);
            let answer = json!({"name": "A", "operationId": "p.A", "status": status, "value": text, "error": text});
            SettingResponse::decode(answer.to_string().as_bytes())
        };
        assert_eq!(long("FAIL").unwrap().outcome, SettingOutcome::Fail { error: "x".repeat(1024) });
        assert!(long("SUCCESS").unwrap_err().to_string().contains("at most 1024 characters"));
        for (payload, error) in [
            (r#"{"name":"SET_TEMP","status":"SUCCESS"}"#, "missing field `operationId`"),
            (r#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"success"}"#, "unknown variant `success`"),
            (r#"{"name":"SET/TEMP","operationId":"p.SET_TEMP","status":"FAIL"}"#, "is no setting name"),
            (r#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"SUCCESS","value":[1]}"#, "expected a number"),
            ("21.5", "invalid type"),
        ] {
            let found = SettingResponse::decode(payload.as_bytes()).unwrap_err().to_string();
            assert!(found.contains(error), "{found}");
        }
        let large = vec![b' '; crate::MAX_PAYLOAD_BYTES + 1];
        assert_eq!(SettingResponse::decode(&large), Err(DecodeError::TooLarge(large.len())));
    }

    #[test]
    fn an_operation_of_another_setting_belongs_to_no_push() {
        let answer = |operation: &str| SettingResponse {
            operation_id: operation.parse().unwrap(),
            name: "SET_TEMP".parse().unwrap(),
            outcome: SettingOutcome::Success { value: None },
        };
        assert_eq!(answer("p-1.SET_MODE").push(), None);
        assert_eq!(answer("SET_TEMP").push(), None);
        assert_eq!(answer("p-1.SET_TEMP-other").push(), None);
        assert_eq!(answer("p.1.SET_TEMP").push().unwrap().as_str(), "p.1");
    }

    #[test]
    fn values_are_the_same_within_single_precision() {
        assert!(number(21.3).is_same(&number(f64::from(21.3_f32))));
        assert!(number(21.0).is_same(&SettingValue::Number(21.into())));
        assert!(!number(21.3).is_same(&number(21.4)));
        assert!(!SettingValue::Text("1".into()).is_same(&number(1.0)));
        assert!(SettingValue::Boolean(true).is_same(&SettingValue::Boolean(true)));
    }
}
