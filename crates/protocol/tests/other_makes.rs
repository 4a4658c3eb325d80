//! Devices of other makes, as their specifications and public reports of faults have them: what is foreign is no error, and what
//! is theirs to choose is taken as it is.
#![allow(clippy::unwrap_used)]

use protocol::fields::{ATTRIBUTE_VALUE, STATUS_DETAIL};
use protocol::{
    Agent, Command, DeviceEvent, Firmware, OperationId, PresenceEvent, ProtocolName, Received, Report, Response, Step,
    StepOutcome, ThingName, protocol_of_topic,
};
use rusp_lib::usp_builder::{
    ErrorBuilder, GetReqPathResultBuilder, GetRespBuilder, MsgBuilder, NotifyBuilder, OperateRespBuilder,
    OperateRespResultBuilder, RecordBuilder, ResolvedPathResultBuilder,
};
use rusp_lib::usp_decoder::{try_decode_msg, try_decode_record};
use rusp_lib::usp_record::mod_MQTTConnectRecord::MQTTVersion;
use rusp_lib::usp_record::mod_Record::OneOfrecord_type::{self, disconnect, mqtt_connect, uds_connect};
use rusp_lib::usp_record::{DisconnectRecord, MQTTConnectRecord, Record, UDSConnectRecord};

const ENDPOINT: &str = "os::012345-0A1B2C3D4E5F";
const CONTROLLER: &str = "self::aws-dm-controller";

fn thing() -> ThingName {
    "gw-1".parse().unwrap()
}

fn operation() -> OperationId {
    "job-1-1-1795238492".parse().unwrap()
}

fn case(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../../tests/fixtures/cases/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn read(protocol: ProtocolName, payload: &[u8]) -> Received {
    protocol.encoding().decode_report(&thing(), payload).unwrap()
}

fn usp(payload: &[u8]) -> Received {
    read(ProtocolName::Usp, payload)
}

/// A record of an agent that is called otherwise than its thing.
fn from_agent(message_id: &str, body: rusp_lib::usp::Body) -> Vec<u8> {
    let message = MsgBuilder::new().with_msg_id(message_id.into()).with_body(body).build().unwrap();
    let record = RecordBuilder::new().with_version("1.3".into()).with_to_id(CONTROLLER.into());
    let record = record.with_from_id(ENDPOINT.into()).with_no_session_context_payload(&message);
    record.build().unwrap().to_vec().unwrap()
}

fn event(name: &str, params: &[(&str, &str)]) -> Vec<u8> {
    let params = params.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let notify = NotifyBuilder::new("sub-1".into()).with_send_resp(true);
    from_agent("n-1", notify.with_event("Device.".into(), name.into(), params).build().unwrap())
}

fn boot(params: &[(&str, &str)]) -> Received {
    usp(&event("Boot!", params))
}

fn step_of(received: &Received) -> Option<(Step, &StepOutcome)> {
    match &received.report {
        Report::Response(Response { step, outcome, .. }) => Some((*step, outcome)),
        Report::Event(_) => None,
    }
}

fn is_event(received: &Received) -> bool {
    matches!(received.report, Report::Event(_))
}

/// To whom a message of ours goes, by what id it is known, and what it asks for.
fn sent(payload: &[u8]) -> (String, String, String) {
    let record = try_decode_record(payload).unwrap();
    let OneOfrecord_type::no_session_context(content) = record.record_type else { panic!() };
    let message = try_decode_msg(&content.payload).unwrap();
    (record.to_id, message.header.unwrap().msg_id, format!("{:?}", message.body.unwrap()))
}

#[test]
fn who_connects_and_who_goes_is_heard_and_no_error() {
    let connected = usp(&case("usp-mqtt-connect.bin"));
    assert!(matches!(connected.report, Report::Event(DeviceEvent::Introduced { .. })), "{connected:?}");
    let agent = Agent { endpoint_id: ENDPOINT.into(), usp_version: "1.2".into() };
    assert_eq!((connected.agent, connected.acknowledgement), (Some(agent), None));

    let topic = || "agents/gw-1/usp/request".to_owned();
    for (record_type, name) in [
        (mqtt_connect(MQTTConnectRecord { version: MQTTVersion::V5, subscribed_topic: topic() }), "MQTTConnect"),
        (disconnect(DisconnectRecord { reason: "bye".into(), reason_code: 7000 }), "disconnect"),
        (disconnect(DisconnectRecord::default()), "disconnect"),
        (uds_connect(UDSConnectRecord::default()), "uds_connect"),
    ] {
        let record = Record { from_id: ENDPOINT.into(), to_id: CONTROLLER.into(), record_type, ..Record::default() };
        let received = usp(&record.to_vec().unwrap());
        let Report::Event(DeviceEvent::Other { name: said } | DeviceEvent::Introduced { name: said }) = received.report
        else {
            panic!("{:?}", received.report)
        };
        assert!(said.eq_ignore_ascii_case(name), "{said}, expected {name}");
    }
    // A session context (field 8 of a record): an agent that begins one is not answered in it.
    let session = [&[0x0a, 3][..], b"1.3", &[0x1a, 4], b"gw-1", &[0x42, 4, 8, 1, 16, 1]].concat();
    let received = usp(&session);
    assert_eq!(received.report, Report::Event(DeviceEvent::Other { name: "session_context".into() }));
    assert!(
        ProtocolName::Usp.encoding().decode_report(&thing(), &session[..5]).is_err(),
        "a record that holds nothing"
    );
}

/// A message goes to the endpoint that the agent says it is, on the topic of its thing; without one to the thing's name.
#[test]
fn messages_go_to_the_endpoint_that_an_agent_says_it_is() {
    let received = usp(&case("usp-onboard-other-endpoint-id.bin"));
    assert!(matches!(received.report, Report::Event(DeviceEvent::Introduced { .. })), "{received:?}");
    let acknowledgement = received.acknowledgement.unwrap();
    assert!(acknowledgement.topic.starts_with("agents/gw-1/usp/request/"), "{}", acknowledgement.topic);
    let (to, message_id, body) = sent(&acknowledgement.payload);
    assert_eq!((to.as_str(), message_id.as_str()), (ENDPOINT, "ONBOARD-1"));
    assert!(body.contains("notify_resp"), "{body}");

    let encoding = ProtocolName::Usp.encoding();
    let agents = ["os::012345-0A1B2C3D4E5F", "proto::x%2Fy", "uuid:b060dfc7-5fd6-5c9f-9d25-e1c8da9b2c52"];
    for endpoint_id in agents {
        let agent = Agent { endpoint_id: endpoint_id.into(), usp_version: "1.3".into() };
        let cancel = Command::CancelDownload { operation_id: operation() };
        let command = encoding.encode_command(&thing(), Some(&agent), &cancel, 1);
        let question = encoding.encode_version_question(&thing(), Some(&agent), None, 1).unwrap();
        for message in [command, question] {
            assert_eq!(sent(&message.payload).0, endpoint_id);
            assert!(message.topic.starts_with("agents/gw-1/usp/request/"), "{}", message.topic);
        }
    }
    let command = encoding.encode_command(&thing(), None, &Command::CancelDownload { operation_id: operation() }, 1);
    assert_eq!(sent(&command.payload).0, "gw-1");
}

fn download() -> Command {
    let firmware =
        Firmware { version: "1.2.3".into(), url: "https://x/1.2.3".into(), sha256: None, size: None, signature: None };
    Command::Download { operation_id: operation(), firmware }
}

#[test]
fn no_two_messages_have_the_same_id_and_each_is_answered_by_its_operation() {
    let encoding = ProtocolName::Usp.encoding();
    let id = |now| sent(&encoding.encode_command(&thing(), None, &download(), now).payload).1;
    assert_ne!(id(1), id(2));
    // What was sent before an update of the stack had the operation alone.
    for id in [id(1), id(2), operation().to_string()] {
        let result = OperateRespResultBuilder::new("Device.X.Download()".into()).set_output_args(Vec::new());
        let answer = OperateRespBuilder::new().with_operation_results(vec![result]).build().unwrap();
        let Report::Response(response) = usp(&from_agent(&id, answer)).report else { panic!("{id}") };
        assert_eq!((response.operation_id, response.step), (operation(), Step::DownloadStarted));
    }
}

/// The reference agent, which writes no version, was only ever asked without quotes.
#[test]
fn texts_in_search_expressions_are_quoted_as_the_specification_asks() {
    let encoding = ProtocolName::Usp.encoding();
    let agent = |usp_version: &str| Agent { endpoint_id: ENDPOINT.into(), usp_version: usp_version.into() };
    for (agent, path) in [
        (Some(agent("1.3")), r#"FirmwareImage.[Status==\"Available\"].Download()"#),
        (Some(agent("")), "FirmwareImage.[Status==Available].Download()"),
        (None, "FirmwareImage.[Status==Available].Download()"),
    ] {
        let command = encoding.encode_command(&thing(), agent.as_ref(), &download(), 1);
        assert!(sent(&command.payload).2.contains(path), "{path}");
        let received = encoding.decode_command(&command.topic, &command.payload).unwrap().unwrap();
        assert_eq!(received.command, download());
    }
}

#[test]
fn of_an_address_the_last_part_is_decoded() {
    let encoding = ProtocolName::Usp.encoding();
    for (url, version) in [
        ("https://x/1%2E2%2e3", "1.2.3"),
        ("https://x/a%2Fb/1.2.3-rc.1?a=/b#/c", "1.2.3-rc.1"),
        ("https://x/1.2.3#", "1.2.3"),
    ] {
        let Command::Download { operation_id, firmware } = download() else { panic!() };
        let download = Command::Download { operation_id, firmware: Firmware { url: url.into(), ..firmware } };
        let sent = encoding.encode_command(&thing(), None, &download, 1);
        let received = encoding.decode_command(&sent.topic, &sent.payload).unwrap().unwrap();
        let Command::Download { firmware, .. } = received.command else { panic!() };
        assert_eq!((firmware.version.as_str(), firmware.url.as_str()), (version, url));
    }
}

/// TR-369 lets a command be accepted by the path of its request.
#[test]
fn a_download_that_is_accepted_has_started_however_that_is_said() {
    let result = || OperateRespResultBuilder::new("Device.DeviceInfo.FirmwareImage.1.Download()".into());
    let id = format!("{}/7", operation());
    let path = || result().set_path("Device.LocalAgent.Request.1".into());
    let refused = || result().set_failure(7004, Some("busy".into()));
    for results in [vec![path()], vec![result().set_output_args(Vec::new())], vec![refused(), path()]] {
        let answer = OperateRespBuilder::new().with_operation_results(results).build().unwrap();
        let received = usp(&from_agent(&id, answer));
        assert_eq!(
            step_of(&received),
            Some((Step::DownloadStarted, &StepOutcome::Succeeded { firmware_version: None }))
        );
    }
}

/// A search expression that fits no image has no result.
#[test]
fn a_download_that_nothing_begins_is_refused() {
    let id = format!("{}/7", operation());
    let refused = OperateRespResultBuilder::new("Device.X".into()).set_failure(7004, Some("busy".into()));
    for (results, message) in [(vec![], "no firmware image"), (vec![refused], "busy")] {
        let answer = OperateRespBuilder::new().with_operation_results(results);
        let Report::Response(response) = usp(&from_agent(&id, answer.build().unwrap())).report else { panic!() };
        let StepOutcome::Failed(failure) = response.outcome else { panic!("{response:?}") };
        assert!(response.step == Step::DownloadStarted && failure.message.contains(message), "{failure:?}");
    }
}

const VERSION: (&str, &str) = ("ParameterMap", r#"{"Device.DeviceInfo.SoftwareVersion":"1.2.3"}"#);

#[test]
fn whether_a_boot_has_updated_the_firmware_is_read_as_booleans_are_written() {
    let received = usp(&case("usp-boot-firmwareupdated-1.bin"));
    let version = || StepOutcome::Succeeded { firmware_version: Some("1.2.3".into()) };
    assert_eq!(step_of(&received), Some((Step::DeviceRebooted, &version())));
    let key = ("CommandKey", "job-1-1-1795238492");
    for updated in ["true", "1", "TRUE", " 1 ", "yes", ""] {
        let received = boot(&[key, VERSION, ("FirmwareUpdated", updated)]);
        assert_eq!(step_of(&received), Some((Step::DeviceRebooted, &version())), "{updated:?}");
    }
    let left_out = boot(&[key, VERSION]);
    assert_eq!(step_of(&left_out), Some((Step::DeviceRebooted, &version())), "the version decides");
    for updated in ["false", "0", "False"] {
        let received = boot(&[key, VERSION, ("FirmwareUpdated", updated)]);
        assert!(matches!(step_of(&received), Some((Step::DeviceRebooted, StepOutcome::Failed(_)))), "{updated}");
        assert!(!received.lacks_version && received.runs.as_deref() == Some("1.2.3"));
    }
}

#[test]
fn what_others_have_asked_for_is_an_event_and_acknowledged() {
    let received = usp(&case("usp-boot-foreign-key.bin"));
    let Report::Event(DeviceEvent::Booted { cause, firmware_version: None }) = &received.report else {
        panic!("{received:?}")
    };
    assert_eq!(cause, "reboot from UI");
    assert!(received.acknowledgement.is_some() && received.lacks_version);

    let long = "k".repeat(5000);
    for key in ["", "update tonight", "ä", "a/b c", &long] {
        let booted = boot(&[("CommandKey", key), ("Cause", "LocalReboot"), VERSION, ("FirmwareUpdated", "true")]);
        let Report::Event(DeviceEvent::Booted { cause, .. }) = &booted.report else { panic!("{booted:?}") };
        assert!(cause.len() <= 128, "{cause}");
        for other in [
            event("TransferComplete!", &[("CommandKey", key), ("FaultCode", "0")]),
            event("Periodic!", &[]),
            from_agent(
                key,
                NotifyBuilder::new("s".into())
                    .with_send_resp(true)
                    .with_value_change("Device.X".into(), "1".into())
                    .build()
                    .unwrap(),
            ),
        ] {
            let received = usp(&other);
            assert!(is_event(&received) && received.acknowledgement.is_some(), "{key} {received:?}");
        }
        let error = ErrorBuilder::new().set_err(7004, Some("no".into())).build().unwrap();
        let is_named = matches!(usp(&from_agent(key, error)).report, Report::Response(_));
        assert_eq!(is_named, key == "a/b c", "{key}: the operation a is asked for, and there is none");
    }
    assert!(is_event(&boot(&[])), "nothing at all is said of it");
}

#[test]
fn transfers_and_commands_of_other_kinds_are_not_our_download() {
    let key = ("CommandKey", "job-1-1-1795238492");
    let firmware = "Device.DeviceInfo.FirmwareImage.2.Download()";
    for (params, is_ours) in [
        (vec![key, ("Command", firmware), ("TransferType", "Download"), ("FaultCode", "0")], true),
        (vec![key, ("Command", firmware)], true),
        (vec![key, ("FaultCode", "00")], true),
        (vec![key, ("Command", "Device.DeviceInfo.VendorLogFile.1.Upload()"), ("TransferType", "Upload")], false),
        (vec![key, ("Command", "Device.DeviceInfo.VendorConfigFile.1.Restore()")], false),
        (vec![key, ("TransferType", "Upload")], false),
    ] {
        let received = usp(&event("TransferComplete!", &params));
        let good = StepOutcome::Succeeded { firmware_version: None };
        assert_eq!(step_of(&received) == Some((Step::FirmwareTransferred, &good)), is_ours, "{params:?}");
        assert_eq!(is_event(&received), !is_ours, "{params:?}");
    }
    let failed = usp(&event("TransferComplete!", &[key, ("FaultString", "no space")]));
    assert!(matches!(step_of(&failed), Some((Step::FirmwareTransferred, StepOutcome::Failed(_)))));

    let completed = |object: &str, command: &str| {
        let notify = NotifyBuilder::new("s".into()).with_send_resp(true);
        let done = notify.with_operation_complete_output_args(object.into(), command.into(), key.1.into(), [].into());
        is_event(&usp(&from_agent("n", done.build().unwrap())))
    };
    assert!(!completed("Device.DeviceInfo.FirmwareImage.2.", "Download()"));
    assert!(completed("Device.X_VENDOR.Files.1.", "Download()"));
    assert!(completed("Device.", "Reboot()"));
}

#[test]
fn a_boot_that_names_no_version_can_be_asked_for_it() {
    let encoding = ProtocolName::Usp.encoding();
    let key = ("CommandKey", "job-1-1-1795238492");
    for map in [None, Some("{}"), Some("nonsense"), Some(r#"{"Device.DeviceInfo.SoftwareVersion":1.10}"#)] {
        let map = map.map(|map| ("ParameterMap", map));
        let received = boot(&[key].into_iter().chain(map).collect::<Vec<_>>());
        assert!(received.lacks_version && received.runs.is_none(), "{map:?}");
        assert!(!boot(&[key, ("FirmwareUpdated", "0")].into_iter().chain(map).collect::<Vec<_>>()).lacks_version);
    }
    assert!(!boot(&[key, VERSION]).lacks_version);

    let answer = |path: &str, name: &str| {
        let params = vec![(name.to_owned(), "1.10".to_owned())];
        let resolved = ResolvedPathResultBuilder::new(path.into()).with_result_params(params);
        let result = GetReqPathResultBuilder::new(path.into()).with_res_path_results(vec![resolved]);
        GetRespBuilder::new().with_req_path_results(vec![result]).build().unwrap()
    };
    for operation_id in [Some(operation()), None] {
        let question = encoding.encode_version_question(&thing(), None, operation_id.as_ref(), 7).unwrap();
        let (_, id, body) = sent(&question.payload);
        assert!(body.contains("Device.DeviceInfo.SoftwareVersion"), "{body}");
        assert_eq!(encoding.decode_command(&question.topic, &question.payload), Ok(None), "is no command");
        let none = GetRespBuilder::new().with_req_path_results(Vec::new()).build().unwrap();
        let refused = ErrorBuilder::new().set_err(7016, None).build().unwrap();
        for (body, version) in [
            (answer("Device.DeviceInfo.", "SoftwareVersion"), Some("1.10")),
            (answer("", "Device.DeviceInfo.SoftwareVersion"), Some("1.10")),
            (answer("Device.DeviceInfo.", "HardwareVersion"), None),
            (none, None),
            (refused, None),
        ] {
            let received = usp(&from_agent(&id, body));
            assert_eq!(received.runs.as_deref(), version);
            assert!(!received.lacks_version, "is not asked for ever");
            match (&operation_id, &received.report) {
                (Some(id), Report::Response(response)) => {
                    let firmware_version = version.map(str::to_owned);
                    assert_eq!((&response.operation_id, response.step), (id, Step::DeviceRebooted));
                    assert_eq!(response.outcome, StepOutcome::Succeeded { firmware_version });
                }
                (None, Report::Event(DeviceEvent::Introduced { .. })) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(ProtocolName::Json.encoding().encode_version_question(&thing(), None, None, 1), None);
}

/// TR-369 R-MQTT.24: over MQTT 3.1.1 an agent appends to each topic where it listens.
#[test]
fn a_topic_may_say_where_the_agent_listens() {
    let reply_to = "/reply-to=agents%2Fgw-1%2Fusp%2Frequest";
    for (topic, client) in [
        ("controllers/self::aws-dm-controller/agents/gw-1/response", "n/a"),
        ("controllers/self::aws-dm-controller/reply", "gw-1"),
    ] {
        let expected = (ProtocolName::Usp, thing());
        assert_eq!(protocol_of_topic(&format!("{topic}{reply_to}"), client), Ok(expected.clone()));
        assert_eq!(protocol_of_topic(&format!("{topic}/reply-to="), client), Ok(expected));
    }
}

#[test]
fn json_that_nobody_computes_with_is_taken_as_it_is() {
    let json = |text: &[u8]| read(ProtocolName::Json, text);
    let progress = |received: &Received| match step_of(received) {
        Some((Step::FirmwareTransferred, StepOutcome::InProgress { progress })) => *progress,
        other => panic!("{other:?}"),
    };
    assert_eq!(progress(&json(&case("json-progress-float.json"))), Some(33));
    for (value, expected) in [
        ("33.3", Some(33)),
        ("\"45 %\"", Some(45)),
        ("99.99", Some(99)),
        ("100", Some(100)),
        ("0", Some(0)),
        ("101", None),
        ("-1", None),
        ("1e300", None),
        ("1e999", None),
        ("null", None),
        ("\"half\"", None),
        ("[1]", None),
        ("{}", None),
    ] {
        let text = format!(
            r#"{{"operationId":"x-1","name":"FIRMWARE_TRANSFERRED","status":"IN_PROGRESS","progress":{value}}}"#
        );
        assert_eq!(progress(&json(text.as_bytes())), expected, "{value}");
    }
    let bare = r#""operationId":"x-1","name":"DOWNLOAD_STARTED","status":"SUCCESS""#;
    for text in [
        format!("{{{bare}}}\0"),
        format!("\u{feff}{{{bare}}}"),
        format!("\u{feff} {{{bare}}}\r\n\0\0"),
        format!(r#"{{{bare},"timestamp":"2026-12-01T00:00:00Z"}}"#),
        format!(r#"{{{bare},"timestamp":1796028400.5,"type":7}}"#),
        format!(r#"{{{bare},"timestamp":{{"$date":1}},"firmwareVersion":2.0,"battery":{{"percent":7}}}}"#),
    ] {
        assert_eq!(step_of(&json(text.as_bytes())).unwrap().0, Step::DownloadStarted, "{text:?}");
    }
    // A boot that an unknown id belongs to is a boot.
    for id in ["\"\"", "\"from the UI\"", "null", "[7]"] {
        let text =
            format!(r#"{{"operationId":{id},"name":"DEVICE_REBOOTED","status":"SUCCESS","firmwareVersion":"1.0"}}"#);
        let received = json(text.as_bytes());
        assert!(is_event(&received) && received.runs.as_deref() == Some("1.0"), "{text}");
    }
    for (text, expected) in [
        (r#"{"name":"DEVICE_REBOOTED","status":"FAIL"}"#, "Booted"),
        (r#"{"operationId":"a b","name":"DOWNLOAD_STARTED","status":"SUCCESS"}"#, "Other"),
        (r#"{"name":"DEVICE_REBOOTED","status":"IN_PROGRESS","progress":10}"#, "Other"),
    ] {
        assert!(format!("{:?}", json(text.as_bytes()).report).contains(expected), "{text}");
    }
}

#[test]
fn what_a_device_says_of_a_failure_fits_where_it_is_told() {
    let received = read(ProtocolName::Json, &case("json-error-with-format-characters.json"));
    let Some((Step::DownloadStarted, StepOutcome::Failed(failure))) = step_of(&received) else {
        panic!("{received:?}")
    };
    assert!(STATUS_DETAIL.check(&failure.message).is_err(), "as the device has said it");
    let told = STATUS_DETAIL.fit(&failure.message).unwrap();
    assert!(STATUS_DETAIL.check(&told).is_ok() && told.contains("space"), "{told}");
}

#[test]
fn a_version_that_no_attribute_holds_is_none_for_a_job() {
    let job: serde_json::Value = serde_json::from_slice(&case("job-version-with-build-metadata.json")).unwrap();
    assert!(ATTRIBUTE_VALUE.check(job["firmwareVersion"].as_str().unwrap()).is_err());
}

#[test]
fn others_connections_are_events_or_nothing() {
    let event = |name: &str| PresenceEvent::read(serde_json::from_slice(&case(name)).unwrap()).unwrap();
    assert_eq!(event("presence-connect-failed.json"), None);
    assert!(event("presence-iotconsole.json").unwrap().client_id.starts_with("iotconsole-"));
}
