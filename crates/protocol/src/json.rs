//! JSON devices: `devices/{thing}/firmware_req` and `devices/{thing}/firmware_resp`.

use crate::device::{ErrorBody, failed, thing_between};
use crate::limits;
use crate::verbatim;
use crate::{
    Agent, Command, DecodeError, DeviceEvent, DeviceProtocol, Firmware, OperationId, Publication, Received,
    ReceivedCommand, ReplyTo, Report, Response, Step, StepOutcome, ThingName, reported_version,
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// The encoding of JSON devices.
pub(crate) struct Json;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    operation_id: OperationId,
    name: RequestName,
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<Firmware>,
    #[serde(default)]
    timestamp: Option<i64>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum RequestName {
    DownloadFirmware,
    CancelDownload,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Status {
    Success,
    Fail,
    InProgress,
}

/// What nobody needs is written and never read: old devices send neither `type` nor `timestamp`, others what they like.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "verbatim::optional")]
    operation_id: Option<String>,
    name: Step,
    #[serde(rename = "type", skip_deserializing)]
    kind: Option<&'static str>,
    status: Status,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "per_cent")]
    progress: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "version")]
    firmware_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<ErrorBody>,
    #[serde(skip_deserializing)]
    timestamp: Option<i64>,
}

/// How far a device says that it is. Nobody computes with it: what is no number of per cent is as good as none.
fn per_cent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u8>, D::Error> {
    let text = verbatim::optional(deserializer)?;
    let per_cent = text.and_then(|text| text.trim_end_matches('%').trim().parse::<f64>().ok());
    let per_cent = per_cent.filter(|number| (0.0..=100.0).contains(number));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is within the bounds")]
    Ok(per_cent.map(|number| number as u8))
}

/// A version is a text; of a number, `1.10` among them, its digits are lost.
fn version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(serde_json::from_str(Box::<RawValue>::deserialize(deserializer)?.get()).ok())
}

impl Answer {
    /// The version that the device runs, if this is about a boot.
    fn runs(&self) -> Option<String> {
        let version = self.firmware_version.as_deref().filter(|_| self.name == Step::DeviceRebooted);
        version.and_then(reported_version)
    }

    fn into_report(self) -> Result<Report, DecodeError> {
        let firmware_version = self.firmware_version.as_deref().and_then(reported_version);
        // A device that boots may have been told to by anybody.
        let operation_id = match self.operation_id.as_deref().map(str::parse::<OperationId>) {
            Some(Ok(operation_id)) => operation_id,
            _ if self.name == Step::DeviceRebooted && !matches!(self.status, Status::InProgress) => {
                let event = DeviceEvent::Booted { cause: "Reboot".to_owned(), firmware_version };
                return Ok(Report::Event(event));
            }
            None if !matches!(self.status, Status::InProgress) => {
                return Err(DecodeError::malformed("operationId", format!("{} needs one", self.name.name())));
            }
            _ => return Ok(Report::Event(DeviceEvent::Other { name: self.name.name().to_owned() })),
        };
        let outcome = match self.status {
            Status::Success => StepOutcome::Succeeded { firmware_version },
            Status::InProgress => StepOutcome::InProgress { progress: self.progress },
            Status::Fail => {
                let error = self.error.unwrap_or(ErrorBody { code: String::new(), message: String::new() });
                return Ok(failed(self.name, operation_id, &error.code, &error.message));
            }
        };
        Ok(Report::Response(Response { operation_id, step: self.name, outcome }))
    }
}

impl DeviceProtocol for Json {
    fn thing_of_report(&self, topic: &str, _: &str) -> Option<Result<ThingName, DecodeError>> {
        thing_between(topic, "devices/", "/firmware_resp").map(Ok)
    }

    fn encode_command(&self, thing: &ThingName, _: Option<&Agent>, command: &Command, now: i64) -> Publication {
        let (name, value) = match command {
            Command::Download { firmware, .. } => (RequestName::DownloadFirmware, Some(firmware.clone())),
            Command::CancelDownload { .. } => (RequestName::CancelDownload, None),
        };
        let operation_id = command.operation_id().clone();
        let request = Request { operation_id, name, kind: Some("REQ".into()), value, timestamp: Some(now) };
        publication(format!("devices/{thing}/firmware_req"), &request)
    }

    fn encode_version_question(
        &self,
        _: &ThingName,
        _: Option<&Agent>,
        _: Option<&OperationId>,
        _: i64,
    ) -> Option<Publication> {
        None
    }

    fn decode_report(&self, _: &ThingName, payload: &[u8]) -> Result<Received, DecodeError> {
        let answer: Answer = limits::json("firmware_resp", payload)?;
        let runs = answer.runs();
        Ok(Received { runs, ..Received::of(answer.into_report()?) })
    }

    fn command_filter(&self, thing: &ThingName) -> String {
        format!("devices/{thing}/firmware_req")
    }

    fn decode_command(&self, _: &str, payload: &[u8]) -> Result<Option<ReceivedCommand>, DecodeError> {
        let request: Request = limits::json("firmware_req", payload)?;
        let operation_id = request.operation_id;
        let command = match (request.name, request.value) {
            (RequestName::DownloadFirmware, Some(firmware)) => Command::Download { operation_id, firmware },
            (RequestName::DownloadFirmware, None) => {
                return Err(DecodeError::malformed("value", "missing"));
            }
            (RequestName::CancelDownload, _) => Command::CancelDownload { operation_id },
        };
        Ok(Some(ReceivedCommand { command, reply_to: ReplyTo::default() }))
    }

    fn encode_response(&self, thing: &ThingName, response: &Response, _: &ReplyTo, now: i64) -> Option<Publication> {
        let (status, progress, firmware_version, error) = match &response.outcome {
            StepOutcome::Succeeded { firmware_version } => (Status::Success, None, firmware_version.clone(), None),
            StepOutcome::InProgress { progress } => (Status::InProgress, *progress, None, None),
            StepOutcome::Failed(failure) => {
                let error = ErrorBody { code: failure.code.clone(), message: failure.message.clone() };
                (Status::Fail, None, None, Some(error))
            }
        };
        let answer = Answer {
            operation_id: Some(response.operation_id.to_string()),
            name: response.step,
            kind: Some("RESP"),
            status,
            progress,
            firmware_version,
            error,
            timestamp: Some(now),
        };
        Some(publication(format!("devices/{thing}/firmware_resp"), &answer))
    }

    fn encode_boot(&self, thing: &ThingName, firmware_version: &str, now: i64) -> Publication {
        let answer = Answer {
            operation_id: None,
            name: Step::DeviceRebooted,
            kind: Some("RESP"),
            status: Status::Success,
            progress: None,
            firmware_version: Some(firmware_version.to_owned()),
            error: None,
            timestamp: Some(now),
        };
        publication(format!("devices/{thing}/firmware_resp"), &answer)
    }

    fn encode_malformed_boot_failure(
        &self,
        thing: &ThingName,
        operation: &OperationId,
        _: &ReplyTo,
        now: i64,
    ) -> Publication {
        // The nested error is a text instead of an object, and the answer is still a failure.
        let payload = format!(
            r#"{{"operationId":"{operation}","name":"DEVICE_REBOOTED","type":"RESP","status":"FAIL","error":"boot","timestamp":{now}}}"#
        );
        Publication { topic: format!("devices/{thing}/firmware_resp"), payload: payload.into_bytes() }
    }
}

fn publication(topic: String, body: &impl Serialize) -> Publication {
    // Structs of texts and numbers always serialize.
    Publication { topic, payload: serde_json::to_vec(body).unwrap_or_default() }
}
