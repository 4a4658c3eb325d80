//! What sensors report on `monitoring-device/building-{n}`, and what they are asked to do about it on
//! `monitoring-device/remediation-{n}`.

use crate::{Building, DecodeError, Publication, ReadingId, SensorId, limits, verbatim};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

/// The topic of a building's readings.
pub fn readings_topic(building: &Building) -> String {
    format!("monitoring-device/building-{building}")
}

/// The building whose readings' topic this is, if it is one.
pub fn building_of_readings(topic: &str) -> Option<Building> {
    topic.strip_prefix("monitoring-device/building-")?.parse().ok()
}

/// The topic on which a building's sensors hear what they shall do.
pub fn remediations_topic(building: &Building) -> String {
    format!("monitoring-device/remediation-{building}")
}

/// Each message is an object with this one field.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope<T> {
    body: T,
}

/// The value of `action` in a reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Monitor {
    Monitor,
}

/// The value of `action` in a remediation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Remediate {
    Remediate,
}

/// What tells one reading of a sensor from another, as the sensor says. A message that is delivered twice is then known to
/// be the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadingIdentity {
    /// Used once by a sensor.
    pub id: ReadingId,
    /// When the sensor measured, in Unix milliseconds.
    pub time: i64,
}

/// One sample of a sensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The sensor.
    pub device: SensorId,
    /// In degrees Celsius.
    pub temperature: f64,
    /// Relative humidity in percent.
    pub humidity: f64,
    /// None of sensors that know neither ids nor the time.
    pub identity: Option<ReadingIdentity>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ReadingBody {
    device: SensorId,
    temperature: f64,
    humidity: f64,
    action: Monitor,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "verbatim::optional")]
    id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "whole_time")]
    time: Option<i64>,
}

/// A sensor's own fields may be called so, in whatever form: then they are no identity.
fn whole_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let text = verbatim::optional(deserializer)?;
    Ok(text.and_then(|text| text.strip_suffix(".0").unwrap_or(&text).parse().ok()))
}

impl Reading {
    /// The temperatures that a sensor on Earth can measure, in degrees Celsius.
    pub const TEMPERATURES: std::ops::RangeInclusive<f64> = -100.0..=200.0;
    /// What sensors say of relative humidity, in percent. In wet or dry air they measure a little more than there can be: the
    /// formula of a common one ranges so (Sensirion's `SHT4x`). That is kept as it was measured, and the temperature with it.
    pub const HUMIDITIES: std::ops::RangeInclusive<f64> = -6.0..=119.0;

    /// The message for the cloud.
    pub fn encode(&self, building: &Building) -> Publication {
        let (id, time) = self.identity.clone().map(|identity| (identity.id.to_string(), identity.time)).unzip();
        let body = ReadingBody {
            device: self.device.clone(),
            temperature: self.temperature,
            humidity: self.humidity,
            action: Monitor::Monitor,
            id,
            time,
        };
        Publication {
            topic: readings_topic(building),
            payload: serde_json::to_vec(&Envelope { body }).unwrap_or_default(),
        }
    }

    /// Reads the message in the cloud. The sizes of its values are not looked at.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let ReadingBody { device, temperature, humidity, action: Monitor::Monitor, id, time } =
            decode("reading", payload)?;
        let identity = id.and_then(|id| Some(ReadingIdentity { id: id.parse().ok()?, time: time? }));
        Ok(Self { device, temperature, humidity, identity })
    }
}

/// What a sensor's surroundings shall be brought to. The sensor compares the temperature with the one it has measured last: if
/// it is lower it cools, else it warms.
#[derive(Debug, Clone, PartialEq)]
pub struct Remediation {
    /// The sensor.
    pub device: SensorId,
    /// In degrees Celsius.
    pub temperature: f64,
    /// Relative humidity in percent.
    pub humidity: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct RemediationBody {
    device: SensorId,
    temperature: f64,
    humidity: f64,
    action: Remediate,
}

impl Remediation {
    /// The message for a building's sensors.
    pub fn encode(&self, building: &Building) -> Publication {
        let body = RemediationBody {
            device: self.device.clone(),
            temperature: self.temperature,
            humidity: self.humidity,
            action: Remediate::Remediate,
        };
        let payload = serde_json::to_vec(&Envelope { body }).unwrap_or_default();
        Publication { topic: remediations_topic(building), payload }
    }

    /// Reads the message at the sensor.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let RemediationBody { device, temperature, humidity, action: Remediate::Remediate } =
            decode("remediation", payload)?;
        Ok(Self { device, temperature, humidity })
    }
}

fn decode<T: DeserializeOwned>(what: &str, payload: &[u8]) -> Result<T, DecodeError> {
    let Envelope { body } = limits::json(what, payload)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const KNOWN: &str = r#"{"body":{"device":"930129302","temperature":27.4,"humidity":60.4,"action":"Monitor"}}"#;

    #[test]
    fn a_reading_is_read_and_written_as_the_known_sensors_do() {
        let reading = Reading::decode(KNOWN.as_bytes()).unwrap();
        assert_eq!((reading.device.as_str(), reading.temperature, reading.humidity), ("930129302", 27.4, 60.4));
        let building: Building = "7".parse().unwrap();
        let message = reading.encode(&building);
        assert_eq!(
            (message.topic.as_str(), String::from_utf8(message.payload).unwrap()),
            ("monitoring-device/building-7", KNOWN.into())
        );
        assert_eq!(building_of_readings(&message.topic), Some(building));
        assert_eq!(building_of_readings("monitoring-device/remediation-7"), None);
    }

    #[test]
    fn a_reading_that_names_itself_keeps_its_name() {
        let identity = ReadingIdentity { id: "r-1".parse().unwrap(), time: 1_700_000_000_123 };
        let reading =
            Reading { device: "a".parse().unwrap(), temperature: -3.0, humidity: 0.0, identity: Some(identity) };
        assert_eq!(Reading::decode(&reading.encode(&"1".parse().unwrap()).payload).unwrap(), reading);
    }

    #[test]
    fn a_remediation_is_written_as_the_known_sensors_read_it() {
        let remediation = Remediation { device: "930129302".parse().unwrap(), temperature: 21.0, humidity: 50.0 };
        let message = remediation.encode(&"7".parse().unwrap());
        assert_eq!(message.topic, "monitoring-device/remediation-7");
        assert_eq!(
            serde_json::from_slice::<Value>(&message.payload).unwrap(),
            json!({"body": {"device": "930129302", "temperature": 21.0, "humidity": 50.0, "action": "Remediate"}})
        );
        assert_eq!(Remediation::decode(&message.payload).unwrap(), remediation);
    }

    #[test]
    fn what_is_no_reading_says_which_field_is_wrong() {
        let with = |field: &str, value: Value| {
            let mut message: Value = serde_json::from_str(KNOWN).unwrap();
            message["body"][field] = value;
            message.to_string()
        };
        let without = |field: &str| {
            let mut message: Value = serde_json::from_str(KNOWN).unwrap();
            message["body"].as_object_mut().unwrap().remove(field);
            message.to_string()
        };
        for (said, message) in [
            ("missing field `body`", "{}".to_owned()),
            (
                "expected value",
                r#"{"body":{"device":"1","temperature":NaN,"humidity":1,"action":"Monitor"}}"#.to_owned(),
            ),
            (
                "number out of range",
                r#"{"body":{"device":"1","temperature":1e999,"humidity":1,"action":"Monitor"}}"#.to_owned(),
            ),
            ("body.temperature: invalid type: string", with("temperature", json!("27.4"))),
            ("body.temperature: invalid type: null", with("temperature", Value::Null)),
            ("body: missing field `humidity`", without("humidity")),
            ("body: missing field `device`", without("device")),
            ("no sensor", with("device", json!("a/b"))),
            ("body.device: invalid type: integer", with("device", json!(930_129_302))),
            ("unknown variant `Remediate`", with("action", json!("Remediate"))),
            ("bytes", format!("{}{KNOWN}", " ".repeat(1024 * 1024))),
        ] {
            let error = Reading::decode(message.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
    }
}
