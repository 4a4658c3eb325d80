//! What agents say: answers to our commands, and what else TR-369 lets them say. That is known and not ours, and never an error.

use super::{CANCEL_PREFIX, SOFTWARE_VERSION, VERSION_PREFIX};
use crate::device::failed;
use crate::limits;
use crate::{
    DecodeError, DeviceEvent, OperationId, Received, Report, Response, Step, StepOutcome, redacted, reported_version,
};
use rusp_lib::usp::mod_Body::OneOfmsg_body;
use rusp_lib::usp::mod_Notify::mod_OperationComplete::OneOfoperation_resp as Completion;
use rusp_lib::usp::mod_Notify::{OneOfnotification, OperationComplete};
use rusp_lib::usp::mod_OperateResp::mod_OperationResult::OneOfoperation_resp as Acceptance;
use rusp_lib::usp::mod_Request::OneOfreq_type;
use rusp_lib::usp::mod_Response::OneOfresp_type;
use rusp_lib::usp::{Error, GetResp, Msg, Notify, OperateResp};
use rusp_lib::usp_record::mod_Record::OneOfrecord_type;
use std::collections::HashMap;
use std::fmt::{self, Write};

/// How much is repeated of a name that anybody may have given, in characters.
const MAX_NAME_CHARACTERS: usize = 128;

/// A record that carries no message. An agent says with each connection who it is (TR-369 R-MTP.6), and may say that it goes.
pub(super) fn of_record(record: &OneOfrecord_type) -> Report {
    match record {
        OneOfrecord_type::mqtt_connect(_) => introduced("MQTTConnect"),
        other => other_event(other),
    }
}

/// The message id and the subscription of a notification that wants to be answered: whatever it says, it comes again until it is.
pub(super) fn response_wanted(message: &Msg) -> Option<(String, String)> {
    let OneOfmsg_body::request(request) = &message.body.as_ref()?.msg_body else { return None };
    let OneOfreq_type::notify(notify) = &request.req_type else { return None };
    notify.send_resp.then(|| (message_id(message), notify.subscription_id.clone()))
}

fn message_id(message: &Msg) -> String {
    message.header.as_ref().map(|header| header.msg_id.clone()).unwrap_or_default()
}

/// What a message comes to.
pub(super) fn of_message(message: Msg) -> Result<Received, DecodeError> {
    let id = message_id(&message);
    match message.body.map(|body| body.msg_body).unwrap_or_default() {
        OneOfmsg_body::response(response) => match response.resp_type {
            OneOfresp_type::operate_resp(answer) => Ok(Received::of(operate_response(&id, answer))),
            OneOfresp_type::get_resp(answer) => Ok(version_response(&id, Some(answer))),
            other => Ok(Received::of(other_event(&other))),
        },
        OneOfmsg_body::error(error) => Ok(refusal(&id, &error)),
        OneOfmsg_body::request(request) => Ok(match request.req_type {
            OneOfreq_type::notify(notify) => notification(notify),
            other => Received::of(other_event(&other)),
        }),
        OneOfmsg_body::None => Err(DecodeError::malformed("USP message", "it has no body")),
    }
}

/// The operation that a command key names. None if it cannot be one of ours: keys are anybody's text.
fn operation(key: &str) -> Option<OperationId> {
    key.parse().ok()
}

/// The operation that a message's id names, before the slash. None if it is none of ours.
fn asked_for(message_id: &str) -> Option<OperationId> {
    operation(message_id.split('/').next()?)
}

fn named(text: &str) -> String {
    redacted(text).chars().take(MAX_NAME_CHARACTERS).collect()
}

fn introduced(name: &str) -> Report {
    Report::Event(DeviceEvent::Introduced { name: name.to_owned() })
}

fn other_named(name: &str) -> Report {
    Report::Event(DeviceEvent::Other { name: named(name) })
}

fn other_event(message: &impl fmt::Debug) -> Report {
    let mut name = FirstWord(String::new());
    // It stops after the first word, by an error.
    let _ = write!(name, "{message:?}");
    other_named(&name.0)
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

fn succeeded(step: Step, operation_id: OperationId, firmware_version: Option<String>) -> Report {
    Report::Response(Response { operation_id, step, outcome: StepOutcome::Succeeded { firmware_version } })
}

/// A search expression may stand for several images, and for none. One download that has begun is enough.
fn operate_response(message_id: &str, answer: OperateResp) -> Report {
    if message_id.starts_with(CANCEL_PREFIX) {
        return cancel_answered();
    }
    let Some(operation_id) = asked_for(message_id) else { return other_named("OperateResp") };
    let mut refusal = None;
    for result in answer.operation_results {
        match result.operation_resp {
            Acceptance::cmd_failure(failure) => refusal = refusal.or(Some(failure)),
            // An asynchronous command is accepted with the path of its request.
            Acceptance::req_obj_path(_) | Acceptance::req_output_args(_) | Acceptance::None => {
                return succeeded(Step::DownloadStarted, operation_id, None);
            }
        }
    }
    match refusal {
        Some(refusal) => failed(Step::DownloadStarted, operation_id, &refusal.err_code.to_string(), &refusal.err_msg),
        None => failed(Step::DownloadStarted, operation_id, "", "the agent has no firmware image that is available"),
    }
}

/// Nobody waits for it: the device has dropped the download or had nothing to drop.
fn cancel_answered() -> Report {
    Report::Event(DeviceEvent::Other { name: "CancelAnswered".into() })
}

/// An agent could not do at all what it was asked.
fn refusal(message_id: &str, error: &Error) -> Received {
    if message_id.starts_with(CANCEL_PREFIX) {
        return Received::of(cancel_answered());
    }
    if message_id.starts_with(VERSION_PREFIX) {
        return version_response(message_id, None);
    }
    Received::of(match asked_for(message_id) {
        Some(id) => failed(Step::DownloadStarted, id, &error.err_code.to_string(), &error.err_msg),
        None => other_named("Error"),
    })
}

/// The answer to the question which version it is that the device has booted.
fn version_response(message_id: &str, answer: Option<GetResp>) -> Received {
    let Some(question) = message_id.strip_prefix(VERSION_PREFIX) else { return Received::of(other_named("GetResp")) };
    let results = answer.map(|answer| answer.req_path_results).unwrap_or_default();
    let mut parameters = results.into_iter().flat_map(|result| result.resolved_path_results).flat_map(|result| {
        let path = result.resolved_path;
        result.result_params.into_iter().map(move |(name, value)| (format!("{path}{name}"), value))
    });
    let runs = parameters.find(|(path, _)| path == SOFTWARE_VERSION).and_then(|(_, value)| reported_version(&value));
    let report = match asked_for(question) {
        Some(id) => succeeded(Step::DeviceRebooted, id, runs.clone()),
        None => introduced("Version"),
    };
    Received { runs, ..Received::of(report) }
}

fn notification(notify: Notify) -> Received {
    Received::of(match notify.notification {
        OneOfnotification::event(event) => {
            let params: Params = event.params.into_iter().collect();
            match event.event_name.as_str() {
                "TransferComplete!" => transfer_report(&params),
                "Boot!" => return boot_report(&params),
                other => other_named(other),
            }
        }
        OneOfnotification::oper_complete(done) => completion(done),
        OneOfnotification::on_board_req(_) => introduced("OnBoardRequest"),
        other => other_event(&other),
    })
}

fn completion(done: OperationComplete) -> Report {
    // A known agent leaves the object out.
    let is_firmware = done.obj_path.is_empty() || done.obj_path.contains("FirmwareImage.");
    let operation_id = Some(done.command_key).filter(|_| is_firmware && done.command_name == "Download()");
    let Some(operation_id) = operation_id.as_deref().and_then(operation) else {
        return other_named(&done.command_name);
    };
    match done.operation_resp {
        // A known agent sends both members of the oneof: the failure counts, and it is the last.
        Completion::cmd_failure(failure) => {
            failed(Step::DownloadOperationDone, operation_id, &failure.err_code.to_string(), &failure.err_msg)
        }
        _ => succeeded(Step::DownloadOperationDone, operation_id, None),
    }
}

/// An event's arguments. TR-181 lets an agent leave out those that it has nothing to say about.
type Params = HashMap<String, String>;

fn text<'a>(params: &'a Params, name: &str) -> &'a str {
    params.get(name).map(String::as_str).unwrap_or_default()
}

fn transfer_report(params: &Params) -> Report {
    let command = text(params, "Command");
    let is_download = if command.is_empty() {
        text(params, "TransferType") != "Upload"
    } else {
        command.contains("FirmwareImage.") && command.ends_with("Download()")
    };
    let Some(operation_id) = operation(text(params, "CommandKey")).filter(|_| is_download) else {
        return other_named("TransferComplete!");
    };
    let (code, message) = (text(params, "FaultCode").trim(), text(params, "FaultString"));
    let is_good = if code.is_empty() { message.is_empty() } else { code.parse() == Ok(0_u32) };
    if is_good {
        return succeeded(Step::FirmwareTransferred, operation_id, None);
    }
    failed(Step::FirmwareTransferred, operation_id, code, message)
}

/// A boolean as TR-106 writes it.
fn truth(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

/// A failed boot is known to come with a broken map: its version is lost, the failure is not.
fn booted_version(params: &Params) -> Option<String> {
    let map = limits::json::<serde_json::Value>("ParameterMap", text(params, "ParameterMap").as_bytes()).ok()?;
    reported_version(map.get(SOFTWARE_VERSION)?.as_str()?)
}

/// Whether an upgrade has come through, an agent says by `FirmwareUpdated`; if it does not, its version tells.
fn boot_report(params: &Params) -> Received {
    let key = text(params, "CommandKey");
    let runs = booted_version(params);
    let Some(operation_id) = operation(key).filter(|_| key != "FirstBoot") else {
        let cause = named(if key.is_empty() { text(params, "Cause") } else { key });
        let event = DeviceEvent::Booted { cause, firmware_version: runs.clone() };
        return Received { lacks_version: runs.is_none(), runs, ..Received::of(Report::Event(event)) };
    };
    if truth(text(params, "FirmwareUpdated")) != Some(false) {
        let report = succeeded(Step::DeviceRebooted, operation_id, runs.clone());
        return Received { lacks_version: runs.is_none(), runs, ..Received::of(report) };
    }
    let message = match &runs {
        Some(version) => format!("the device booted its old image and runs {version}"),
        None => {
            format!("the device booted its old image; ParameterMap cannot be read: {}", text(params, "ParameterMap"))
        }
    };
    let report = failed(Step::DeviceRebooted, operation_id, "FirmwareNotUpdated", &message);
    Received { runs, ..Received::of(report) }
}
