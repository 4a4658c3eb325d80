//! Both encodings, in both directions, and against input that nobody should send.
#![allow(clippy::unwrap_used)]

use protocol::{
    Command, DeviceEvent, DeviceFailure, Firmware, MAX_PAYLOAD_BYTES, OperationId, ProtocolName, ReplyTo, Report,
    Response, Step, StepOutcome, ThingName, protocol_of_topic,
};

fn thing() -> ThingName {
    "gateway:1_a".parse().unwrap()
}

fn operation() -> OperationId {
    "FirmwareUpgrade-1-2".parse().unwrap()
}

fn firmware() -> Firmware {
    Firmware {
        version: "1.2.3".into(),
        url: "https://bucket.example.com/firmware/1.2.3?X-Amz-Expires=3600#x".into(),
        sha256: Some("ab".repeat(32)),
        size: Some(1_000_000),
        signature: Some("c2ln".into()),
    }
}

#[test]
fn a_command_arrives_as_it_was_sent() {
    for protocol in ProtocolName::ALL {
        let bare = Firmware { sha256: None, size: None, signature: None, ..firmware() };
        for command in [
            Command::Download { operation_id: operation(), firmware: firmware() },
            Command::Download { operation_id: operation(), firmware: bare },
            Command::CancelDownload { operation_id: operation() },
        ] {
            let sent = protocol.encoding().encode_command(&thing(), &command, 1);
            let received = protocol.encoding().decode_command(&sent.topic, &sent.payload).unwrap().unwrap();
            assert_eq!(received.command, command);
            assert!(sent.topic.len() <= 256 && sent.topic.matches('/').count() <= 7, "{}", sent.topic);
        }
    }
}

#[test]
fn an_answer_arrives_as_it_was_given_and_on_a_topic_that_names_its_thing() {
    let failure = StepOutcome::Failed(DeviceFailure { code: "7004".into(), message: "no space".into() });
    for protocol in ProtocolName::ALL {
        let download = Command::Download { operation_id: operation(), firmware: firmware() };
        let sent = protocol.encoding().encode_command(&thing(), &download, 1);
        let received = protocol.encoding().decode_command(&sent.topic, &sent.payload).unwrap().unwrap();
        for step in
            [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted]
        {
            let version = (step == Step::DeviceRebooted).then(|| "1.2.3".to_owned());
            for outcome in [StepOutcome::Succeeded { firmware_version: version }, failure.clone()] {
                let response = Response { operation_id: operation(), step, outcome };
                let sent = protocol.encoding().encode_response(&thing(), &response, &received.reply_to, 1).unwrap();
                assert_eq!(protocol_of_topic(&sent.topic).unwrap(), (protocol, thing()));
                let report = protocol.encoding().decode_report(&thing(), &sent.payload).unwrap().report;
                match report {
                    Report::Response(got) if matches!(response.outcome, StepOutcome::Failed(_)) => {
                        assert!(matches!(got.outcome, StepOutcome::Failed(_)), "{got:?}");
                        assert_eq!((got.step, got.operation_id), (step, operation()));
                    }
                    report => assert_eq!(report, Report::Response(response.clone())),
                }
            }
        }
    }
}

#[test]
fn progress_is_a_word_of_json_devices_only() {
    let outcome = StepOutcome::InProgress { progress: Some(40) };
    let response = Response { operation_id: operation(), step: Step::FirmwareTransferred, outcome };
    let json = ProtocolName::Json.encoding();
    let sent = json.encode_response(&thing(), &response, &ReplyTo::default(), 1).unwrap();
    assert_eq!(json.decode_report(&thing(), &sent.payload).unwrap().report, Report::Response(response.clone()));
    assert_eq!(ProtocolName::Usp.encoding().encode_response(&thing(), &response, &ReplyTo::default(), 1), None);
}

#[test]
fn a_boot_that_nobody_asked_for_is_an_event() {
    for protocol in ProtocolName::ALL {
        let sent = protocol.encoding().encode_boot(&thing(), "1.0.0", 1);
        let report = protocol.encoding().decode_report(&thing(), &sent.payload).unwrap().report;
        let Report::Event(DeviceEvent::Booted { firmware_version, .. }) = report else { panic!("{report:?}") };
        assert_eq!(firmware_version.as_deref(), Some("1.0.0"));
    }
}

#[test]
fn a_boot_failure_is_not_lost_for_its_spelling() {
    for protocol in ProtocolName::ALL {
        let encoding = protocol.encoding();
        let sent = encoding.encode_malformed_boot_failure(&thing(), &operation(), &ReplyTo::default(), 1);
        let report = encoding.decode_report(&thing(), &sent.payload).unwrap().report;
        let Report::Response(Response { step: Step::DeviceRebooted, outcome: StepOutcome::Failed(_), .. }) = report
        else {
            panic!("{protocol}: {report:?}")
        };
    }
}

#[test]
fn old_json_devices_leave_fields_out_and_write_errors_their_way() {
    let read = |text: &str| ProtocolName::Json.encoding().decode_report(&thing(), text.as_bytes());
    let bare = r#"{"operationId":"a-1","name":"DOWNLOAD_STARTED","status":"SUCCESS"}"#;
    assert!(read(bare).is_ok());
    for error in [r#"{"code":7,"message":"full"}"#, "7", r#""full""#, "0"] {
        let text = format!(r#"{{"operationId":"a-1","name":"DOWNLOAD_STARTED","status":"FAIL","error":{error}}}"#);
        let Report::Response(Response { outcome: StepOutcome::Failed(_), .. }) = read(&text).unwrap().report else {
            panic!("{text}")
        };
    }
    for (bad, reason) in [
        (r#"{"operationId":"a-1","name":"DOWNLOAD_STARTED","status":"MAYBE"}"#, "unknown variant `MAYBE`"),
        (r#"{"operationId":"a b","name":"DOWNLOAD_STARTED","status":"SUCCESS"}"#, "is no operation id"),
        (r#"{"name":"DOWNLOAD_STARTED","status":"SUCCESS"}"#, "operationId: DOWNLOAD_STARTED needs one"),
        (r#"{"operationId":"a-1","name":"DOWNLOAD_STARTED","status":"IN_PROGRESS","progress":101}"#, "0 to 100"),
        ("[]", "firmware_resp"),
    ] {
        let error = read(bad).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn what_is_larger_than_the_broker_carries_is_not_read() {
    for protocol in ProtocolName::ALL {
        let error = protocol.encoding().decode_report(&thing(), &vec![b'['; MAX_PAYLOAD_BYTES + 1]).unwrap_err();
        assert_eq!(error.to_string(), "the payload has 131073 bytes, more than the 131072 that a message may have");
    }
    let deep = "[".repeat(MAX_PAYLOAD_BYTES);
    assert!(ProtocolName::Json.encoding().decode_report(&thing(), deep.as_bytes()).is_err());
}

/// Inner lengths that reach beyond the outer one: the library's arithmetic overflows there.
#[test]
fn lengths_that_contradict_each_other_are_malformed() {
    let encoding = ProtocolName::Usp.encoding();
    for bytes in [&[90, 1, 193, 0, 0, 0, 0][..], &[90, 1, 193, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        let error = encoding.decode_report(&thing(), bytes).unwrap_err();
        assert_eq!(error.to_string(), "USP record: its lengths contradict each other");
    }
}
