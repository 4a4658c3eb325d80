//! USP 1.1 devices (TR-369): protobuf records over MQTT, as `rusp-lib` reads and writes them.

use crate::device::{failed, thing_between};
use crate::limits;
use crate::{
    Command, DecodeError, DeviceEvent, DeviceProtocol, Firmware, OperationId, Publication, Received, ReceivedCommand,
    ReplyTo, Report, Response, Step, StepOutcome, ThingName, redacted, reported_version,
};
use percent_encoding::percent_decode_str;
use rusp_lib::usp::mod_Body::OneOfmsg_body;
use rusp_lib::usp::mod_Notify::OneOfnotification;
use rusp_lib::usp::mod_Notify::mod_OperationComplete::OneOfoperation_resp as Completion;
use rusp_lib::usp::mod_OperateResp::mod_OperationResult::OneOfoperation_resp as Acceptance;
use rusp_lib::usp::mod_Request::OneOfreq_type;
use rusp_lib::usp::mod_Response::OneOfresp_type;
use rusp_lib::usp::{Body, Msg, Notify, Operate};
use rusp_lib::usp_builder::{
    MsgBuilder, NotifyBuilder, NotifyRespBuilder, OperateBuilder, OperateRespBuilder, OperateRespResultBuilder,
    RecordBuilder,
};
use rusp_lib::usp_decoder::{try_decode_msg, try_decode_record};
use rusp_lib::usp_record::mod_Record::OneOfrecord_type;
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The encoding of USP agents.
pub(crate) struct Usp;

/// Our endpoint id; devices in the field are configured with it.
const CONTROLLER: &str = "self::aws-dm-controller";
const DOWNLOAD: &str = "Device.DeviceInfo.FirmwareImage.[Status==Available].Download()";
const SOFTWARE_VERSION: &str = "Device.DeviceInfo.SoftwareVersion";
/// Marks the message ids of cancellations, whose answers no step waits for.
const CANCEL_PREFIX: &str = "cancel/";
/// TR-369 R-CTL: vendor extensions begin with `X_`; devices that do not know it ignore it.
const SIGNATURE_ARG: &str = "X_FLEETFLOW_Signature";

impl DeviceProtocol for Usp {
    fn thing_of_report(&self, topic: &str, client: &str) -> Option<Result<ThingName, DecodeError>> {
        if topic == reply_topic() {
            return Some(client.parse().map_err(|error| DecodeError::malformed("client id", error)));
        }
        let prefix = format!("controllers/{CONTROLLER}/agents/");
        // Commands that were sent before this version asked for answers on `agents/{thing}/reply`.
        thing_between(topic, &prefix, "/response").or_else(|| thing_between(topic, &prefix, "/reply")).map(Ok)
    }

    fn encode_command(&self, thing: &ThingName, command: &Command, _: i64) -> Publication {
        let operation = command.operation_id().as_str();
        let (message_id, operate) = match command {
            // The direct answer repeats nothing of the command but its message id.
            Command::Download { firmware, .. } => {
                let operate = OperateBuilder::new(DOWNLOAD.into())
                    .with_command_key(operation.into())
                    .with_send_resp(true)
                    .with_input_args(download_args(firmware));
                (operation.to_owned(), operate)
            }
            // TR-369: an asynchronous command in progress is an object with a Cancel() of its own.
            Command::CancelDownload { .. } => {
                let path = format!("Device.LocalAgent.Request.[CommandKey==\"{operation}\"].Cancel()");
                (format!("{CANCEL_PREFIX}{operation}"), OperateBuilder::new(path).with_send_resp(true))
            }
        };
        let payload = record(thing.as_str(), CONTROLLER, &message_id, operate.build());
        Publication { topic: request_topic(thing), payload }
    }

    fn decode_report(&self, thing: &ThingName, payload: &[u8]) -> Result<Received, DecodeError> {
        let (_, message) = decode(payload)?;
        let message_id = message.header.map(|header| header.msg_id).unwrap_or_default();
        let body = message.body.map(|body| body.msg_body).unwrap_or_default();
        match body {
            OneOfmsg_body::response(response) => {
                let report = match response.resp_type {
                    OneOfresp_type::operate_resp(answer) => operate_response(&message_id, answer)?,
                    other => other_event(&other),
                };
                Ok(unacknowledged(report))
            }
            OneOfmsg_body::error(_) if message_id.starts_with(CANCEL_PREFIX) => Ok(unacknowledged(cancel_answered())),
            OneOfmsg_body::error(error) => {
                let operation_id = operation_of_message(&message_id)?;
                let code = error.err_code.to_string();
                Ok(unacknowledged(failed(Step::DownloadStarted, operation_id, &code, &error.err_msg)))
            }
            OneOfmsg_body::request(request) => match request.req_type {
                OneOfreq_type::notify(notify) => {
                    let acknowledgement = notify.send_resp.then(|| {
                        let body = NotifyRespBuilder::new(notify.subscription_id.clone()).build();
                        Publication {
                            topic: request_topic(thing),
                            payload: record(thing.as_str(), CONTROLLER, &message_id, body),
                        }
                    });
                    let (report, runs) = notification(notify)?;
                    Ok(Received { report, runs, acknowledgement })
                }
                other => Ok(unacknowledged(other_event(&other))),
            },
            OneOfmsg_body::None => Err(DecodeError::malformed("USP message", "it has no body")),
        }
    }

    fn command_filter(&self, thing: &ThingName) -> String {
        format!("agents/{thing}/usp/request/#")
    }

    fn decode_command(&self, topic: &str, payload: &[u8]) -> Result<Option<ReceivedCommand>, DecodeError> {
        let (requester, message) = decode(payload)?;
        let message_id = message.header.map(|header| header.msg_id).unwrap_or_default();
        let Some(Body { msg_body: OneOfmsg_body::request(request) }) = message.body else {
            return Ok(None);
        };
        let OneOfreq_type::operate(operate) = request.req_type else { return Ok(None) };
        let command = if operate.command == DOWNLOAD {
            let operation_id = operation_id(&operate.command_key)?;
            Command::Download { operation_id, firmware: firmware(operate)? }
        } else if let Some(key) = cancelled_key(&operate.command) {
            Command::CancelDownload { operation_id: operation_id(key)? }
        } else {
            return Err(DecodeError::malformed("Operate.command", format!("{:?} is not supported", operate.command)));
        };
        let encoded = topic.split_once('=').map(|(_, reply)| reply).unwrap_or_default();
        let topic = percent_decode_str(encoded).decode_utf8_lossy().into_owned();
        Ok(Some(ReceivedCommand { command, reply_to: ReplyTo { topic, message_id, requester } }))
    }

    fn encode_response(
        &self,
        thing: &ThingName,
        response: &Response,
        reply_to: &ReplyTo,
        _: i64,
    ) -> Option<Publication> {
        if matches!(response.outcome, StepOutcome::InProgress { .. }) {
            return None;
        }
        let key = response.operation_id.as_str();
        if response.step == Step::DownloadStarted {
            let result = match &response.outcome {
                StepOutcome::Failed(failure) => OperateRespResultBuilder::new(DOWNLOAD.into())
                    .set_failure(failure.code.parse().unwrap_or(7002), Some(failure.message.clone())),
                _ => OperateRespResultBuilder::new(DOWNLOAD.into()).set_output_args(Vec::new()),
            };
            let body = OperateRespBuilder::new().with_operation_results(vec![result]).build();
            let payload = record(&reply_to.requester, thing.as_str(), &reply_to.message_id, body);
            return Some(Publication { topic: reply_to.topic.clone(), payload });
        }
        let notify = notify(format!("{key}-{}", response.step.name()));
        let notify = match response.step {
            Step::FirmwareTransferred => notify.with_event(
                "Device.LocalAgent.".into(),
                "TransferComplete!".into(),
                transfer_complete(key, &response.outcome),
            ),
            Step::DownloadOperationDone => match &response.outcome {
                StepOutcome::Failed(failure) => notify.with_operation_complete_cmd_failure(
                    "Device.DeviceInfo.FirmwareImage.".into(),
                    "Download()".into(),
                    key.into(),
                    failure.code.parse().unwrap_or(7000),
                    failure.message.clone(),
                ),
                _ => notify.with_operation_complete_output_args(
                    "Device.DeviceInfo.FirmwareImage.".into(),
                    "Download()".into(),
                    key.into(),
                    HashMap::new(),
                ),
            },
            _ => {
                let (updated, version) = match &response.outcome {
                    StepOutcome::Succeeded { firmware_version } => ("true", firmware_version.as_deref()),
                    _ => ("false", None),
                };
                notify.with_event("Device.".into(), "Boot!".into(), boot(key, updated, &version_map(version)))
            }
        };
        Some(notification_message(thing, &reply_to.requester, key, notify))
    }

    fn encode_boot(&self, thing: &ThingName, firmware_version: &str, now: i64) -> Publication {
        let notify = notify(format!("boot-{now}")).with_event(
            "Device.".into(),
            "Boot!".into(),
            boot("FirstBoot", "false", &version_map(Some(firmware_version))),
        );
        notification_message(thing, CONTROLLER, &now.to_string(), notify)
    }

    fn encode_malformed_boot_failure(
        &self,
        thing: &ThingName,
        operation: &OperationId,
        reply_to: &ReplyTo,
        _: i64,
    ) -> Publication {
        let key = operation.as_str();
        let broken_json = format!("{{\"{SOFTWARE_VERSION}\":1.2.1\"}}");
        let notify = notify(format!("{key}-boot")).with_event(
            "Device.".into(),
            "Boot!".into(),
            boot(key, "false", &broken_json),
        );
        notification_message(thing, &reply_to.requester, key, notify)
    }
}

/// Where devices answer commands. It does not name the thing, which the rule knows by the client that answers: so a request's
/// topic names the thing once, and has at most 256 bytes and 7 slashes, whatever the thing is called and however often the
/// reply topic in it is decoded on the way (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>).
fn reply_topic() -> String {
    format!("controllers/{CONTROLLER}/reply")
}

fn request_topic(thing: &ThingName) -> String {
    format!("agents/{thing}/usp/request/reply-to={}", reply_topic().replace('/', "%2F"))
}

fn decode(payload: &[u8]) -> Result<(String, Msg), DecodeError> {
    limits::check_size(payload)?;
    let record = caught("USP record", || try_decode_record(payload))?;
    let OneOfrecord_type::no_session_context(content) = record.record_type else {
        return Err(DecodeError::malformed("USP record", "expected no_session_context"));
    };
    let message = caught("USP message", || try_decode_msg(&content.payload))?;
    Ok((record.from_id, message))
}

/// The library's arithmetic overflows on some damaged messages. It is checked in every build (see the workspace's profiles):
/// unchecked it could read for ever.
fn caught<T, E: std::fmt::Display>(what: &str, read: impl FnOnce() -> Result<T, E>) -> Result<T, DecodeError> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(DecodeError::malformed(what, format!("{error:#}"))),
        Err(_) => Err(DecodeError::malformed(what, "its lengths contradict each other")),
    }
}

fn operation_id(key: &str) -> Result<OperationId, DecodeError> {
    key.parse().map_err(|error| DecodeError::malformed("CommandKey", error))
}

fn operation_of_message(message_id: &str) -> Result<OperationId, DecodeError> {
    message_id.parse().map_err(|error| DecodeError::malformed("Header.msg_id", error))
}

/// Of a value's debug output the first word. The rest is never written: it is many times as long as the message.
struct FirstWord(String);

impl fmt::Write for FirstWord {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
        self.0.push_str(&text[..end.unwrap_or(text.len())]);
        if end.is_some() { Err(fmt::Error) } else { Ok(()) }
    }
}

fn unacknowledged(report: Report) -> Received {
    Received { report, runs: None, acknowledgement: None }
}

fn other_event(message: &impl fmt::Debug) -> Report {
    let mut name = FirstWord(String::new());
    // It stops after the first word, by an error.
    let _ = write!(name, "{message:?}");
    Report::Event(DeviceEvent::Other { name: name.0 })
}

/// Nobody waits for it: the device has dropped the download or had nothing to drop.
fn cancel_answered() -> Report {
    Report::Event(DeviceEvent::Other { name: "CancelAnswered".into() })
}

fn operate_response(message_id: &str, answer: rusp_lib::usp::OperateResp) -> Result<Report, DecodeError> {
    if message_id.starts_with(CANCEL_PREFIX) {
        return Ok(cancel_answered());
    }
    let operation_id = operation_of_message(message_id)?;
    let Some(result) = answer.operation_results.into_iter().next() else {
        return Err(DecodeError::malformed("OperateResp", "it has no operation result"));
    };
    match result.operation_resp {
        Acceptance::cmd_failure(failure) => {
            Ok(failed(Step::DownloadStarted, operation_id, &failure.err_code.to_string(), &failure.err_msg))
        }
        Acceptance::req_obj_path(_) | Acceptance::req_output_args(_) | Acceptance::None => {
            Ok(succeeded(Step::DownloadStarted, operation_id, None))
        }
    }
}

fn succeeded(step: Step, operation_id: OperationId, firmware_version: Option<String>) -> Report {
    Report::Response(Response { operation_id, step, outcome: StepOutcome::Succeeded { firmware_version } })
}

/// What is notified, and the version that the device runs, if that is a boot.
fn notification(notify: Notify) -> Result<(Report, Option<String>), DecodeError> {
    let report = match notify.notification {
        OneOfnotification::event(event) => {
            let params: HashMap<String, String> = event.params.into_iter().collect();
            match event.event_name.as_str() {
                "TransferComplete!" => transfer_report(&params)?,
                "Boot!" => {
                    let version = booted_version(&params);
                    return Ok((boot_report(&params, version.clone())?, version));
                }
                other => other_named(other),
            }
        }
        OneOfnotification::oper_complete(done) if done.command_name == "Download()" => {
            let operation_id = operation_id(&done.command_key)?;
            match done.operation_resp {
                // A known agent sends both members of the oneof: the failure counts, and it is the last.
                Completion::cmd_failure(failure) => {
                    failed(Step::DownloadOperationDone, operation_id, &failure.err_code.to_string(), &failure.err_msg)
                }
                _ => succeeded(Step::DownloadOperationDone, operation_id, None),
            }
        }
        OneOfnotification::oper_complete(done) => other_named(&done.command_name),
        other => other_event(&other),
    };
    Ok((report, None))
}

fn other_named(name: &str) -> Report {
    Report::Event(DeviceEvent::Other { name: redacted(name) })
}

fn param<'a>(params: &'a HashMap<String, String>, name: &str) -> Result<&'a str, DecodeError> {
    params.get(name).map(String::as_str).ok_or_else(|| DecodeError::malformed(name, "missing"))
}

fn transfer_report(params: &HashMap<String, String>) -> Result<Report, DecodeError> {
    let operation_id = operation_id(param(params, "CommandKey")?)?;
    let code = param(params, "FaultCode")?;
    if code == "0" {
        return Ok(succeeded(Step::FirmwareTransferred, operation_id, None));
    }
    let message = params.get("FaultString").map(String::as_str).unwrap_or_default();
    Ok(failed(Step::FirmwareTransferred, operation_id, code, message))
}

/// A failed boot is known to come with a broken map: its version is lost, the failure is not.
fn booted_version(params: &HashMap<String, String>) -> Option<String> {
    let map = limits::json::<serde_json::Value>("ParameterMap", params.get("ParameterMap")?.as_bytes()).ok()?;
    reported_version(map.get(SOFTWARE_VERSION)?.as_str()?)
}

fn boot_report(params: &HashMap<String, String>, version: Option<String>) -> Result<Report, DecodeError> {
    let text = |name: &str| params.get(name).map(String::as_str).unwrap_or_default();
    let key = text("CommandKey");
    if matches!(key, "" | "FirstBoot") {
        let cause = redacted(if key.is_empty() { text("Cause") } else { key });
        return Ok(Report::Event(DeviceEvent::Booted { cause, firmware_version: version }));
    }
    let operation_id = operation_id(key)?;
    match param(params, "FirmwareUpdated")? {
        "true" => Ok(succeeded(Step::DeviceRebooted, operation_id, version)),
        "false" => {
            let message = match version {
                Some(version) => format!("the device booted its old image and runs {version}"),
                None => {
                    format!("the device booted its old image; ParameterMap cannot be read: {}", text("ParameterMap"))
                }
            };
            Ok(failed(Step::DeviceRebooted, operation_id, "FirmwareNotUpdated", &message))
        }
        other => Err(DecodeError::malformed("FirmwareUpdated", format!("{other:?}: expected \"true\" or \"false\""))),
    }
}

/// Checksum and size are arguments of TR-181's `Download()`; they are left out when unknown, because an old
/// agent may refuse what it does not know.
fn download_args(firmware: &Firmware) -> Vec<(String, String)> {
    let mut args = vec![
        ("AutoActivate".to_owned(), "true".to_owned()),
        ("URL".to_owned(), firmware.url.clone()),
        ("Username".to_owned(), String::new()),
        ("Password".to_owned(), String::new()),
    ];
    if let Some(sha256) = &firmware.sha256 {
        args.push(("CheckSumAlgorithm".to_owned(), "SHA-256".to_owned()));
        args.push(("CheckSum".to_owned(), sha256.clone()));
    }
    if let Some(size) = firmware.size {
        args.push(("FileSize".to_owned(), size.to_string()));
    }
    if let Some(signature) = &firmware.signature {
        args.push((SIGNATURE_ARG.to_owned(), signature.clone()));
    }
    args
}

fn firmware(operate: Operate) -> Result<Firmware, DecodeError> {
    let mut args: HashMap<String, String> = operate.input_args.into_iter().collect();
    let url = args.remove("URL").ok_or_else(|| DecodeError::malformed("URL", "missing"))?;
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let version = reported_version(path.rsplit('/').next().unwrap_or_default()).unwrap_or_default();
    let size = match args.remove("FileSize") {
        Some(text) => Some(text.parse().map_err(|error| DecodeError::malformed("FileSize", error))?),
        None => None,
    };
    Ok(Firmware { version, url, sha256: args.remove("CheckSum"), size, signature: args.remove(SIGNATURE_ARG) })
}

fn cancelled_key(command: &str) -> Option<&str> {
    command.strip_prefix("Device.LocalAgent.Request.[CommandKey==\"")?.strip_suffix("\"].Cancel()")
}

fn transfer_complete(key: &str, outcome: &StepOutcome) -> HashMap<String, String> {
    let (code, text) = match outcome {
        StepOutcome::Failed(failure) => (failure.code.as_str(), failure.message.as_str()),
        _ => ("0", ""),
    };
    pairs(&[
        ("Command", DOWNLOAD),
        ("CommandKey", key),
        ("TransferType", "Download"),
        ("FaultCode", code),
        ("FaultString", text),
    ])
}

fn boot(key: &str, updated: &str, parameter_map: &str) -> HashMap<String, String> {
    pairs(&[
        ("CommandKey", key),
        ("Cause", "RemoteReboot"),
        ("FirmwareUpdated", updated),
        ("ParameterMap", parameter_map),
    ])
}

fn version_map(version: Option<&str>) -> String {
    serde_json::json!({ SOFTWARE_VERSION: version.unwrap_or_default() }).to_string()
}

fn pairs(list: &[(&str, &str)]) -> HashMap<String, String> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A notification that asks for a `NotifyResp`.
fn notify(subscription_id: String) -> NotifyBuilder {
    NotifyBuilder::new(subscription_id).with_send_resp(true)
}

fn notification_message(thing: &ThingName, to: &str, message_id: &str, notify: NotifyBuilder) -> Publication {
    let to = if to.is_empty() { CONTROLLER } else { to };
    let payload = record(to, thing.as_str(), message_id, notify.build());
    Publication { topic: format!("controllers/{CONTROLLER}/agents/{thing}/response"), payload }
}

/// A record around a message. The builders fail only when a part is missing, and none is.
fn record(to: &str, from: &str, message_id: &str, body: Result<Body, impl std::fmt::Display>) -> Vec<u8> {
    let Ok(body) = body else { return Vec::new() };
    let Ok(message) = MsgBuilder::new().with_msg_id(message_id.into()).with_body(body).build() else {
        return Vec::new();
    };
    RecordBuilder::new()
        .with_version("1.1".into())
        .with_to_id(to.into())
        .with_from_id(from.into())
        .with_no_session_context_payload(&message)
        .build()
        .and_then(|record| record.to_vec())
        .unwrap_or_default()
}
