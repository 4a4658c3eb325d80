//! Hostile input: whatever comes from outside, every decoder gives a value or an error that a person can read.
//!
//! Good messages of every kind are damaged in several ways at once, and read by every decoder. `docs/testing.md` has the long run.
#![allow(clippy::unwrap_used)]

mod damage;

use damage::{damaged, damages, within_memory};
use proptest::prelude::*;
use proptest::sample::Index;
use protocol::on_premises::{JobMessage, WorkerMessage, WorkerReply};
use protocol::recovery::UpdateReport;
use protocol::settings::{SettingCommand, SettingResponse};
use protocol::telemetry::{Reading, Remediation};
use protocol::{
    Command, DecodeError, DeviceFailure, Firmware, MAX_JSON_DEPTH, MAX_PAYLOAD_BYTES, PresenceEvent, PresenceKind,
    ProtocolName, ReplyTo, Response, Step, StepOutcome, ThingName,
};
use std::sync::LazyLock;

/// How long an error may be, in bytes: it must not carry the whole message.
const MAX_ERROR_BYTES: usize = 4096;

fn thing() -> ThingName {
    "gateway:1_a".parse().unwrap()
}

/// A good message of every kind.
static CORPUS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(corpus);

fn corpus() -> Vec<Vec<u8>> {
    let mut corpus: Vec<Vec<u8>> = [
        r#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"SUCCESS","value":24.84,"error":0}"#,
        r#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"FAIL","error":{"code":"7","message":"no"}}"#,
        r#"{"_id_":"3hwC2y7","timestamp":"1711320208793","status":"failed","model":"wo:v8","FW":"2.27"}"#,
        r#"{"body":{"device":"930129302","temperature":27.4,"humidity":60.4,"action":"Monitor","id":"a","time":1}}"#,
        r#"{"body":{"device":"930129302","temperature":21.0,"humidity":50.0,"action":"Remediate"}}"#,
        r#"{"Input":{"a":15,"b":42},"TaskToken":"job-1.0123456789abcdef","handler":"add"}"#,
        r#"{"result":57,"TaskToken":"job-1.0123456789abcdef"}"#,
        r#"{"result":null,"TaskToken":"job-1.0123456789abcdef","exception":"KeyError"}"#,
        r#"{"TaskToken":"job-1.0123456789abcdef","heartbeat":true,"progress":50,"worker":"w","fence":3,"request":"r"}"#,
        r#"{"TaskToken":"job-1.0123456789abcdef","action":"upload","worker":"w","fence":3,"request":"r","bytes":9}"#,
        r#"{"TaskToken":"job-1.0123456789abcdef","verdict":"UPLOAD","url":"https://b.example.com","headers":{"a":"b"}}"#,
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    let firmware = Firmware {
        version: "1.2.3".into(),
        url: "https://bucket.example.com/firmware/1.2.3?X-Amz-Expires=3600".into(),
        sha256: Some("ab".repeat(32)),
        size: Some(1_000_000),
        signature: Some("c2ln".into()),
    };
    let failure = DeviceFailure { code: "7004".into(), message: "no space".into() };
    let outcomes = [StepOutcome::Succeeded { firmware_version: Some("1.2.3".into()) }, StepOutcome::Failed(failure)];
    for protocol in ProtocolName::ALL {
        let encoding = protocol.encoding();
        let operation_id: protocol::OperationId = "job-1-2".parse().unwrap();
        let download = Command::Download { operation_id: operation_id.clone(), firmware: firmware.clone() };
        corpus.push(encoding.encode_command(&thing(), None, &download, 1).payload);
        for outcome in &outcomes {
            let response =
                Response { operation_id: operation_id.clone(), step: Step::DeviceRebooted, outcome: outcome.clone() };
            corpus.extend(
                encoding.encode_response(&thing(), &response, &ReplyTo::default(), 1).map(|message| message.payload),
            );
        }
        corpus.push(encoding.encode_boot(&thing(), "1.2.3", 1).payload);
    }
    corpus
}

type Decoder = fn(&[u8]) -> Result<(), DecodeError>;

/// Every decoder, and its message.
const DECODERS: [(&str, Decoder); 12] = [
    ("report of a JSON device", |bytes| report(ProtocolName::Json, bytes)),
    ("report of a USP agent", |bytes| report(ProtocolName::Usp, bytes)),
    ("command to a JSON device", |bytes| command(ProtocolName::Json, bytes)),
    ("command to a USP agent", |bytes| command(ProtocolName::Usp, bytes)),
    ("command to set something", |bytes| SettingCommand::decode(bytes).map(drop)),
    ("answer about a setting", |bytes| SettingResponse::decode(bytes).map(|response| drop(response.push()))),
    ("report of an update", |bytes| UpdateReport::decode(bytes).map(drop)),
    ("job on premises", |bytes| JobMessage::decode(bytes).map(drop)),
    ("worker's answer", |bytes| WorkerMessage::decode(bytes).map(drop)),
    ("reply to a worker", |bytes| WorkerReply::decode(bytes).map(drop)),
    ("reading", |bytes| Reading::decode(bytes).map(drop)),
    ("remediation", |bytes| Remediation::decode(bytes).map(drop)),
];

fn report(protocol: ProtocolName, bytes: &[u8]) -> Result<(), DecodeError> {
    protocol.encoding().decode_report(&thing(), bytes).map(drop)
}

fn command(protocol: ProtocolName, bytes: &[u8]) -> Result<(), DecodeError> {
    let topic = protocol.encoding().command_filter(&thing()).replace(['+', '#'], "reply-to=a%2Fb");
    protocol.encoding().decode_command(&topic, bytes).map(drop)
}

/// Reads bytes with every decoder.
fn decode_all(bytes: &[u8]) -> [Result<(), DecodeError>; DECODERS.len()] {
    DECODERS.map(|(name, decode)| within_memory(name, bytes.len(), || decode(bytes)))
}

/// The library that reads USP panics on some damaged messages; the decoder catches that. Nothing is to be written of it: that
/// would cost more memory than the decoder.
static SILENCE: LazyLock<()> = LazyLock::new(|| {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.location().is_some_and(|location| location.file().contains("quick-protobuf")) {
            hook(panic);
        }
    }));
});

fn check(bytes: &[u8]) {
    LazyLock::force(&SILENCE);
    for error in decode_all(bytes).into_iter().filter_map(Result::err) {
        let error = error.to_string();
        assert!(!error.is_empty() && error.len() <= MAX_ERROR_BYTES, "{} bytes of an error", error.len());
    }
}

#[test]
fn every_message_of_the_corpus_is_read_by_somebody() {
    for message in CORPUS.iter() {
        assert!(decode_all(message).iter().any(Result::is_ok), "{}", String::from_utf8_lossy(message));
    }
}

/// The size is looked at before anything else: a message that is too large costs nothing more.
#[test]
fn what_is_too_large_is_not_read() {
    for (index, result) in decode_all(&vec![b' '; MAX_PAYLOAD_BYTES + 1]).into_iter().enumerate() {
        assert_eq!(result, Err(DecodeError::TooLarge(MAX_PAYLOAD_BYTES + 1)), "{}", DECODERS[index].0);
    }
}

/// So is the depth.
#[test]
fn what_is_too_deep_is_not_read() {
    let nested = "[".repeat(MAX_JSON_DEPTH + 1);
    for (index, result) in decode_all(nested.as_bytes()).into_iter().enumerate() {
        match DECODERS[index].0 {
            name if name.contains("USP") => assert!(matches!(result, Err(DecodeError::Malformed(_))), "{name}"),
            name => assert_eq!(result, Err(DecodeError::TooDeep), "{name}"),
        }
    }
}

/// Messages of the largest size that are nothing but a great many small pieces.
#[test]
fn the_memory_that_a_message_needs_is_bounded_by_its_size() {
    let filled = |begin: &str, piece: &[u8], end: &str| {
        let room = MAX_PAYLOAD_BYTES - begin.len() - end.len();
        [begin.as_bytes(), &piece.repeat(room / piece.len()), end.as_bytes()].concat()
    };
    for piece in ["0,", "[],", "{},", "\"\",", "{\"\":0},", "[[0]],", "\"\\u0000\","] {
        check(&filled(r#"{"TaskToken":"t","Input":["#, piece.as_bytes(), "0]}"));
        check(&filled(r#"{"TaskToken":"t","result":["#, piece.as_bytes(), "0]}"));
        check(&filled(r#"{"operationId":"o","name":"SET_TEMP","status":"FAIL","error":["#, piece.as_bytes(), "0]}"));
    }
    let headers: String = (0..9000).map(|index| format!(r#""{index}":"","#)).collect();
    check(format!(r#"{{"TaskToken":"t","verdict":"UPLOAD","url":"u","headers":{{{headers}"":""}}}}"#).as_bytes());
    for message in usp_of_many_pieces() {
        check(&message);
    }
}

/// USP messages that repeat an empty field: two bytes each.
fn usp_of_many_pieces() -> Vec<Vec<u8>> {
    // A field of that number with these bytes.
    let field = |number: u8, bytes: &[u8]| {
        let mut length = bytes.len();
        let mut encoded = vec![number << 3 | 2];
        while length >= 0x80 {
            encoded.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
            length >>= 7;
        }
        encoded.push(u8::try_from(length).unwrap());
        encoded.extend_from_slice(bytes);
        encoded
    };
    let mut messages = Vec::new();
    // Body: request (1) or response (2); in it one of the kinds; in it a field again and again.
    for (body, kind, repeated) in
        (1..=2).flat_map(|body| (1..=12).flat_map(move |kind| (1..=8).map(move |n| (body, kind, n))))
    {
        let pieces = field(repeated, b"").repeat(60_000);
        let message = field(2, &field(body, &field(kind, &pieces)));
        // Record: no_session_context (7) with a payload (2).
        messages.push(field(7, &field(2, &message)));
    }
    messages
}

#[test]
fn a_time_at_the_end_of_the_numbers_is_only_an_old_or_a_new_one() {
    let event = |timestamp, version_number: i64| PresenceEvent {
        client_id: "gateway-1".into(),
        timestamp,
        event_type: PresenceKind::Connected,
        session_identifier: version_number.to_string(),
        version_number,
    };
    assert!(!event(i64::MIN, 0).supersedes(&event(2000, 5).presence()));
    assert!(event(i64::MAX, 0).supersedes(&event(-2000, 5).presence()));
}

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), topic in ".{0,64}") {
        let _ = protocol::protocol_of_topic(&topic, &topic);
        let _ = protocol::settings::thing_of_response(&topic);
        let _ = protocol::on_premises::tenant_of_answer(&topic);
        let _ = protocol::telemetry::building_of_readings(&topic);
        check(&bytes);
    }

    #[test]
    fn no_damage_makes_a_decoder_panic_or_talk_for_ever(which in any::<Index>(), damages in damages()) {
        check(&damaged(&CORPUS, which, &damages));
    }
}
