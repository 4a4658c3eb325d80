//! Both encodings, in both directions, and against input that nobody should send.
#![allow(clippy::unwrap_used)]

use protocol::fields::check_topic;
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
            let sent = protocol.encoding().encode_command(&thing(), None, &command, 1);
            let received = protocol.encoding().decode_command(&sent.topic, &sent.payload).unwrap().unwrap();
            assert_eq!(received.command, command);
            assert_eq!(check_topic(&sent.topic), Ok(()));
        }
    }
}

#[test]
fn an_answer_arrives_as_it_was_given_and_on_a_topic_that_names_its_thing() {
    let failure = StepOutcome::Failed(DeviceFailure { code: "7004".into(), message: "no space".into() });
    for protocol in ProtocolName::ALL {
        let download = Command::Download { operation_id: operation(), firmware: firmware() };
        let sent = protocol.encoding().encode_command(&thing(), None, &download, 1);
        let received = protocol.encoding().decode_command(&sent.topic, &sent.payload).unwrap().unwrap();
        for step in
            [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted]
        {
            let version = (step == Step::DeviceRebooted).then(|| "1.2.3".to_owned());
            for outcome in [StepOutcome::Succeeded { firmware_version: version }, failure.clone()] {
                let response = Response { operation_id: operation(), step, outcome };
                let sent = protocol.encoding().encode_response(&thing(), &response, &received.reply_to, 1).unwrap();
                assert_eq!(protocol_of_topic(&sent.topic, thing().as_str()).unwrap(), (protocol, thing()));
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

/// Limits of AWS IoT: a topic has 256 bytes and 7 slashes at most, a thing's name 128 characters
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>). A topic that is published over HTTPS is percent-encoded on
/// the way, and no document says how often it is decoded.
#[test]
fn commands_reach_things_with_names_of_any_length_however_often_the_topic_is_decoded() {
    let decoded = |topic: &str| percent_encoding::percent_decode_str(topic).decode_utf8().unwrap().into_owned();
    for (length, protocol) in (1..=128).flat_map(|length| ProtocolName::ALL.map(|protocol| (length, protocol))) {
        let thing: ThingName = "L".repeat(length).parse().unwrap();
        let encoding = protocol.encoding();
        let download = Command::Download { operation_id: operation(), firmware: firmware() };
        for command in [download, Command::CancelDownload { operation_id: operation() }] {
            let sent = encoding.encode_command(&thing, None, &command, 1);
            let filter = encoding.command_filter(&thing);
            for topic in [sent.topic.clone(), decoded(&sent.topic), decoded(&decoded(&sent.topic))] {
                assert_eq!(check_topic(&topic), Ok(()));
                assert!(filter == topic || topic.starts_with(filter.strip_suffix('#').unwrap()), "{topic}");
                let received = encoding.decode_command(&topic, &sent.payload).unwrap().unwrap();
                let outcome = StepOutcome::Succeeded { firmware_version: None };
                let answer = Response { operation_id: operation(), step: Step::DownloadStarted, outcome };
                let answer = encoding.encode_response(&thing, &answer, &received.reply_to, 1).unwrap();
                assert_eq!(check_topic(&answer.topic), Ok(()));
                assert_eq!(protocol_of_topic(&answer.topic, thing.as_str()).unwrap(), (protocol, thing.clone()));
            }
        }
    }
}

#[test]
fn whose_answer_it_is_the_client_tells_where_the_topic_does_not() {
    let of = |topic: &str, client: &str| {
        protocol_of_topic(topic, client)
            .map(|(name, thing)| (name, thing.to_string()))
            .map_err(|error| error.to_string())
    };
    let ours = |thing: &str| Ok((ProtocolName::Usp, thing.to_owned()));
    let reply = "controllers/self::aws-dm-controller/reply";
    assert_eq!(of(reply, "gateway-1"), ours("gateway-1"));
    assert_eq!(
        of(reply, "n/a").unwrap_err(),
        "client id: \"n/a\" is no thing name: expected 1 to 128 characters of a-z A-Z 0-9 : _ -"
    );
    // What answers a command of an earlier version names its thing in the topic, and a device may use no other's.
    for end in ["reply", "response"] {
        assert_eq!(
            of(&format!("controllers/self::aws-dm-controller/agents/gateway-1/{end}"), "n/a"),
            ours("gateway-1")
        );
    }
    assert!(
        of("controllers/self::aws-dm-controller/gateway-1", "gateway-1").unwrap_err().contains("no device protocol")
    );
}

/// What the reference agent does with a presigned address: the last segment, query included, is its version, and the address
/// is repeated in whatever goes wrong.
#[test]
fn of_a_presigned_address_the_version_is_taken_and_the_signature_is_not_repeated() {
    let url = "https://b.example.com/firmware/1.2.3?x-id=GetObject&X-Amz-Credential=SECRET&X-Amz-Signature=SECRET";
    for protocol in ProtocolName::ALL {
        let encoding = protocol.encoding();
        let read = |step, outcome| {
            let response = Response { operation_id: operation(), step, outcome };
            let reply_to = ReplyTo { message_id: operation().to_string(), ..ReplyTo::default() };
            let sent = encoding.encode_response(&thing(), &response, &reply_to, 1).unwrap();
            encoding.decode_report(&thing(), &sent.payload).unwrap()
        };
        let version = url.rsplit_once('/').unwrap().1;
        let booted = read(Step::DeviceRebooted, StepOutcome::Succeeded { firmware_version: Some(version.into()) });
        assert_eq!(booted.runs.as_deref(), Some("1.2.3"), "{protocol}");
        let Report::Response(Response { outcome: StepOutcome::Succeeded { firmware_version }, .. }) = booted.report
        else {
            panic!("{protocol}")
        };
        assert_eq!(firmware_version.as_deref(), Some("1.2.3"), "{protocol}");
        let sent = encoding.encode_boot(&thing(), version, 1);
        let unasked = encoding.decode_report(&thing(), &sent.payload).unwrap();
        assert_eq!(unasked.runs.as_deref(), Some("1.2.3"), "{protocol}");
        for step in [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone] {
            let failure = DeviceFailure { code: "7".into(), message: format!("cannot get {url}") };
            let failed = format!("{:?}", read(step, StepOutcome::Failed(failure)));
            assert!(failed.contains("cannot get https://b.example.com/firmware/1.2.3?…"), "{failed}");
            assert!(!failed.contains("SECRET"), "{failed}");
        }
    }
    let json = |text: &str| ProtocolName::Json.encoding().decode_report(&thing(), text.as_bytes());
    for odd in [
        format!(r#"{{"operationId":"a-1","name":"{url}","status":"SUCCESS"}}"#),
        format!(r#"{{"operationId":"a-1","name":"DOWNLOAD_STARTED","status":"{url}"}}"#),
    ] {
        let error = json(&odd).unwrap_err().to_string();
        assert!(error.contains("firmware/1.2.3") && !error.contains("SECRET"), "{error}");
    }
    let failed = r#"{"operationId":"a-1","name":"DEVICE_REBOOTED","status":"FAIL","firmwareVersion":"1.0.0"}"#;
    assert_eq!(json(failed).unwrap().runs.as_deref(), Some("1.0.0"), "what runs is told by a failed boot too");
    let other = r#"{"operationId":"a-1","name":"DOWNLOAD_STARTED","status":"SUCCESS","firmwareVersion":"1.0.0"}"#;
    assert_eq!(json(other).unwrap().runs, None, "only a boot tells what runs");
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
        (r#"{"name":"DOWNLOAD_STARTED","status":"SUCCESS"}"#, "operationId: DOWNLOAD_STARTED needs one"),
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
