//! USP devices (TR-369 1.1 to 1.4): protobuf records over MQTT, as `rusp-lib` reads and writes them.

mod report;

use crate::device::thing_between;
use crate::limits;
use crate::{
    Agent, Command, DecodeError, DeviceProtocol, Firmware, OperationId, Publication, Received, ReceivedCommand,
    ReplyTo, Response, Step, StepOutcome, ThingName, reported_version,
};
use percent_encoding::percent_decode_str;
use rusp_lib::usp::mod_Body::OneOfmsg_body;
use rusp_lib::usp::mod_Request::OneOfreq_type;
use rusp_lib::usp::{Body, Msg, Operate};
use rusp_lib::usp_builder::{
    GetBuilder, MsgBuilder, NotifyBuilder, NotifyRespBuilder, OperateBuilder, OperateRespBuilder,
    OperateRespResultBuilder, RecordBuilder,
};
use rusp_lib::usp_decoder::{try_decode_msg, try_decode_record};
use rusp_lib::usp_record::Record;
use rusp_lib::usp_record::mod_Record::OneOfrecord_type;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The encoding of USP agents.
pub(crate) struct Usp;

/// Our endpoint id; devices in the field are configured with it.
const CONTROLLER: &str = "self::aws-dm-controller";
/// TR-369 wants a text in a search expression in quotes. The reference agent was only ever seen to be asked without them,
/// and it is known by naming no version of USP in its records.
const DOWNLOAD: &str = "Device.DeviceInfo.FirmwareImage.[Status==\"Available\"].Download()";
const REFERENCE_DOWNLOAD: &str = "Device.DeviceInfo.FirmwareImage.[Status==Available].Download()";
const SOFTWARE_VERSION: &str = "Device.DeviceInfo.SoftwareVersion";
/// Marks the message ids of cancellations, whose answers no step waits for.
const CANCEL_PREFIX: &str = "cancel/";
/// Marks the message ids of questions for the version; what follows is the operation that waits for it, if one does.
const VERSION_PREFIX: &str = "version/";
/// TR-369 R-CTL: vendor extensions begin with `X_`; devices that do not know it ignore it.
const SIGNATURE_ARG: &str = "X_FLEETFLOW_Signature";

impl DeviceProtocol for Usp {
    fn thing_of_report(&self, topic: &str, client: &str) -> Option<Result<ThingName, DecodeError>> {
        // Over MQTT 3.1.1 an agent may append where it listens (TR-369 R-MQTT.24): commands go there anyway.
        let topic = topic.split_once("/reply-to=").map_or(topic, |(topic, _)| topic);
        if topic == reply_topic() {
            return Some(client.parse().map_err(|error| DecodeError::malformed("client id", error)));
        }
        let prefix = format!("controllers/{CONTROLLER}/agents/");
        // Commands that were sent before this version asked for answers on `agents/{thing}/reply`.
        thing_between(topic, &prefix, "/response").or_else(|| thing_between(topic, &prefix, "/reply")).map(Ok)
    }

    fn encode_command(&self, thing: &ThingName, agent: Option<&Agent>, command: &Command, now: i64) -> Publication {
        let operation = command.operation_id().as_str();
        // The direct answer repeats nothing of the command but its message id, and no two messages may have the same.
        let (message_id, operate) = match command {
            Command::Download { firmware, .. } => {
                let names_its_version = agent.is_some_and(|agent| !agent.usp_version.is_empty());
                let path = if names_its_version { DOWNLOAD } else { REFERENCE_DOWNLOAD };
                let operate = OperateBuilder::new(path.into())
                    .with_command_key(operation.into())
                    .with_send_resp(true)
                    .with_input_args(download_args(firmware));
                (format!("{operation}/{now}"), operate)
            }
            // TR-369: an asynchronous command in progress is an object with a Cancel() of its own.
            Command::CancelDownload { .. } => {
                let path = format!("Device.LocalAgent.Request.[CommandKey==\"{operation}\"].Cancel()");
                (format!("{CANCEL_PREFIX}{operation}/{now}"), OperateBuilder::new(path).with_send_resp(true))
            }
        };
        request(thing, agent, &message_id, operate.build())
    }

    fn encode_version_question(
        &self,
        thing: &ThingName,
        agent: Option<&Agent>,
        operation: Option<&OperationId>,
        now: i64,
    ) -> Option<Publication> {
        let operation = operation.map(OperationId::as_str).unwrap_or_default();
        let get = GetBuilder::new().with_params(vec![SOFTWARE_VERSION.into()]).build();
        Some(request(thing, agent, &format!("{VERSION_PREFIX}{operation}/{now}"), get))
    }

    fn decode_report(&self, thing: &ThingName, payload: &[u8]) -> Result<Received, DecodeError> {
        let record = decode_record(payload)?;
        let agent = Agent { endpoint_id: record.from_id, usp_version: record.version };
        let agent = Some(agent).filter(|agent| !agent.endpoint_id.is_empty());
        let content = match record.record_type {
            OneOfrecord_type::no_session_context(content) => content,
            OneOfrecord_type::None => return Err(DecodeError::malformed("USP record", "it holds nothing")),
            other => return Ok(Received { agent, ..Received::of(report::of_record(&other)) }),
        };
        let message = decode_message(&content.payload)?;
        let asks = report::response_wanted(&message);
        let received = report::of_message(message)?;
        let acknowledgement = asks.map(|(message_id, subscription)| {
            request(thing, agent.as_ref(), &message_id, NotifyRespBuilder::new(subscription).build())
        });
        Ok(Received { agent, acknowledgement, ..received })
    }

    fn command_filter(&self, thing: &ThingName) -> String {
        format!("agents/{thing}/usp/request/#")
    }

    fn decode_command(&self, topic: &str, payload: &[u8]) -> Result<Option<ReceivedCommand>, DecodeError> {
        let record = decode_record(payload)?;
        let OneOfrecord_type::no_session_context(content) = record.record_type else { return Ok(None) };
        let message = decode_message(&content.payload)?;
        let message_id = message.header.map(|header| header.msg_id).unwrap_or_default();
        let Some(Body { msg_body: OneOfmsg_body::request(request) }) = message.body else {
            return Ok(None);
        };
        let OneOfreq_type::operate(operate) = request.req_type else { return Ok(None) };
        let command = if matches!(operate.command.as_str(), DOWNLOAD | REFERENCE_DOWNLOAD) {
            let operation_id = operation_id(&operate.command_key)?;
            Command::Download { operation_id, firmware: firmware(operate)? }
        } else if let Some(key) = cancelled_key(&operate.command) {
            Command::CancelDownload { operation_id: operation_id(key)? }
        } else {
            return Err(DecodeError::malformed("Operate.command", format!("{:?} is not supported", operate.command)));
        };
        let encoded = topic.split_once('=').map(|(_, reply)| reply).unwrap_or_default();
        let topic = percent_decode_str(encoded).decode_utf8_lossy().into_owned();
        Ok(Some(ReceivedCommand { command, reply_to: ReplyTo { topic, message_id, requester: record.from_id } }))
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
                StepOutcome::Failed(failure) => OperateRespResultBuilder::new(REFERENCE_DOWNLOAD.into())
                    .set_failure(failure.code.parse().unwrap_or(7002), Some(failure.message.clone())),
                _ => OperateRespResultBuilder::new(REFERENCE_DOWNLOAD.into()).set_output_args(Vec::new()),
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

/// A message to an agent: to the endpoint that it says it is, else to its thing's name.
fn request(
    thing: &ThingName,
    agent: Option<&Agent>,
    message_id: &str,
    body: Result<Body, impl std::fmt::Display>,
) -> Publication {
    let endpoint_id = agent.map_or(thing.as_str(), |agent| &agent.endpoint_id);
    Publication { topic: request_topic(thing), payload: record(endpoint_id, CONTROLLER, message_id, body) }
}

fn decode_record(payload: &[u8]) -> Result<Record, DecodeError> {
    limits::check_size(payload)?;
    caught("USP record", || try_decode_record(payload))
}

fn decode_message(payload: &[u8]) -> Result<Msg, DecodeError> {
    caught("USP message", || try_decode_msg(payload))
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
        ("Command", REFERENCE_DOWNLOAD),
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
