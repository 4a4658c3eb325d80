//! Traffic of devices in the field, recorded: all of it is read, and means what it meant there.
#![allow(clippy::unwrap_used)]

use protocol::job::NotifyNext;
use protocol::{DeviceEvent, PresenceEvent, ProtocolName, Report, Response, StepOutcome, ThingName};
use serde::Deserialize;

#[derive(Deserialize)]
struct Recorded {
    topic: String,
    hex: String,
    #[serde(default)]
    text: String,
}

impl Recorded {
    /// Some texts were recorded in place of their bytes.
    fn bytes(&self) -> Vec<u8> {
        let digits: Option<Vec<u8>> =
            (0..self.hex.len() / 2).map(|i| u8::from_str_radix(self.hex.get(2 * i..2 * i + 2)?, 16).ok()).collect();
        digits.filter(|bytes| !bytes.is_empty()).unwrap_or_else(|| self.text.clone().into_bytes())
    }
}

fn recorded(name: &str) -> Vec<Recorded> {
    let path = format!("{}/../../tests/fixtures/captures/{name}.jsonl", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// One line a report: short enough to compare a whole recording at a glance.
fn describe(report: &Report) -> String {
    match report {
        Report::Response(Response { operation_id, step, outcome }) => {
            let outcome = match outcome {
                StepOutcome::Succeeded { firmware_version: Some(version) } => {
                    format!("ok {version}")
                }
                StepOutcome::Succeeded { firmware_version: None } => "ok".into(),
                StepOutcome::InProgress { .. } => "in progress".into(),
                StepOutcome::Failed(failure) => {
                    format!("failed {}: {}", failure.code, failure.message)
                }
            };
            format!("{operation_id} {} {outcome}", step.name())
        }
        Report::Event(DeviceEvent::Booted { cause, firmware_version }) => {
            format!("booted {cause} {firmware_version:?}")
        }
        Report::Event(DeviceEvent::Introduced { name }) => format!("introduced {name}"),
        Report::Event(DeviceEvent::Other { name }) => format!("other {name}"),
    }
}

/// What the agents of a recording said, in order. Their replies went to a topic that the old cloud chose.
fn usp_reports(name: &str) -> Vec<String> {
    let thing: ThingName = "agent".parse().unwrap();
    let from_agent = |message: &Recorded| message.topic.starts_with("controllers/");
    let read = |message: Recorded| {
        let received = ProtocolName::Usp.encoding().decode_report(&thing, &message.bytes()).unwrap();
        let acknowledged = if received.acknowledgement.is_some() { " (acknowledge)" } else { "" };
        describe(&received.report) + acknowledged
    };
    recorded(name).into_iter().filter(from_agent).map(read).collect()
}

#[test]
fn a_good_upgrade() {
    let reports = usp_reports("fw-happy");
    assert_eq!(
        reports,
        [
            "FIRMWARE-DOWNLOAD@1795238493588 DOWNLOAD_STARTED ok",
            "FirmwareUpgrade-EjPjLG8wy1 FIRMWARE_TRANSFERRED ok",
            "FirmwareUpgrade-EjPjLG8wy1 DOWNLOAD_OPERATION_DONE ok",
            "FirmwareUpgrade-EjPjLG8wy1 DEVICE_REBOOTED ok 1.2.3",
            "booted FirstBoot Some(\"1.2.1\")",
        ]
    );
}

#[test]
fn failed_downloads_and_boots() {
    let of = |key: &str| -> Vec<String> {
        usp_reports("fw-fail").into_iter().filter(|report| report.starts_with(key)).collect()
    };
    assert_eq!(
        of("FirmwareUpgrade-kM0OhnYrKs"),
        [
            "FirmwareUpgrade-kM0OhnYrKs FIRMWARE_TRANSFERRED failed 1478164480: Download operation is failed, fault code (404)",
            // Both members of the oneof were sent: the failure counts.
            "FirmwareUpgrade-kM0OhnYrKs DOWNLOAD_OPERATION_DONE failed 7022: Error not specified by vendor",
            // And yet it claims to have booted.
            "FirmwareUpgrade-kM0OhnYrKs DEVICE_REBOOTED ok 404",
        ]
    );
    assert_eq!(
        of("FirmwareUpgrade-zDQB3yd2Kn"),
        [
            "FirmwareUpgrade-zDQB3yd2Kn FIRMWARE_TRANSFERRED ok",
            "FirmwareUpgrade-zDQB3yd2Kn DOWNLOAD_OPERATION_DONE ok",
            "FirmwareUpgrade-zDQB3yd2Kn DEVICE_REBOOTED failed FirmwareNotUpdated: the device booted its old image; \
             ParameterMap cannot be read: {\"Device.DeviceInfo.SoftwareVersion\":1.2.1\"}",
        ]
    );
}

#[test]
fn a_refusal() {
    let reports = usp_reports("reject");
    assert_eq!(reports, ["FIRMWARE-DOWNLOAD@1795241026497 DOWNLOAD_STARTED failed 7002: Request denied"]);
}

#[test]
fn commands_to_agents_read_as_the_agents_read_them() {
    for (name, commands) in [("fw-happy", 1), ("fw-fail", 3), ("reject", 1)] {
        let to_agent = |message: &Recorded| message.topic.starts_with("agents/");
        let received: Vec<_> = recorded(name)
            .iter()
            .filter(|message| to_agent(message))
            .map(|message| ProtocolName::Usp.encoding().decode_command(&message.topic, &message.bytes()).unwrap())
            .collect();
        assert_eq!(received.len(), commands);
        for command in received.into_iter().flatten() {
            let reply = command.reply_to.topic;
            assert!(reply.starts_with("controllers/self::aws-usp-controller/usp/reply-to/"), "{reply}");
            assert_eq!(command.reply_to.requester, "self::aws-usp-controller");
        }
    }
}

#[test]
fn everything_that_the_broker_itself_published() {
    let (mut presence, mut jobs, mut foreign) = (0, 0, 0);
    for name in ["config-1", "fw-fail", "fw-happy", "go", "onprem", "reject"] {
        for message in recorded(name) {
            if message.topic.starts_with("$aws/events/presence/") {
                let event: PresenceEvent = serde_json::from_slice(&message.bytes()).unwrap();
                assert!(message.topic.ends_with(&event.client_id));
                presence += 1;
            } else if message.topic.ends_with("/jobs/notify-next") {
                let next: NotifyNext = serde_json::from_slice(&message.bytes()).unwrap();
                jobs += 1;
                foreign += next.execution.iter().filter(|next| next.job_document.get("workflow").is_none()).count();
            }
        }
    }
    assert_eq!((presence, jobs, foreign), (28, 11, 6));
}

#[test]
fn what_belongs_to_other_workflows_is_no_answer_to_a_firmware_command() {
    for name in ["config-1", "go", "onprem"] {
        for message in recorded(name) {
            assert!(protocol::protocol_of_topic(&message.topic, "agent").is_err(), "{}", message.topic);
        }
    }
}

#[test]
fn a_setting_and_its_confirmation() {
    use protocol::settings::{SettingCommand, SettingOutcome, SettingResponse, thing_of_response};
    let messages = recorded("config-1");
    let find = |end: &str| messages.iter().find(|message| message.topic.ends_with(end)).unwrap();
    let command = SettingCommand::decode(&find("/config_req").bytes()).unwrap();
    assert_eq!((command.name.as_str(), command.value.to_string().as_str()), ("SET_TEMP", "24.84"));
    let answer = find("/config_resp");
    assert_eq!(thing_of_response(&answer.topic).unwrap().as_str(), "CM-Test");
    let response = SettingResponse::decode(&answer.bytes()).unwrap();
    assert_eq!((&response.operation_id, &response.name), (&command.operation_id, &command.name));
    assert_eq!(response.outcome, SettingOutcome::Success { value: Some(command.value) });
}

#[test]
fn a_step_that_no_workflow_knows_is_an_error() {
    let thing: ThingName = "gateway-1".parse().unwrap();
    let payload = br#"{"operationId":"job-1-1","name":"DEFRAGMENTED","type":"RESP","status":"SUCCESS"}"#;
    assert!(ProtocolName::Json.encoding().decode_report(&thing, payload).is_err());
}
