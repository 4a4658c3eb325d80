//! Hostile input: whatever comes from outside, every decoder gives a value or an error that a person can read.
//!
//! Good messages of every kind are damaged in several ways at once, and read by every decoder. `PROPTEST_CASES=1000000 cargo test
//! --release -p protocol --test hostile` is the long run.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::sample::Index;
use protocol::on_premises::{JobMessage, WorkerMessage, WorkerReply};
use protocol::recovery::{Failure, UpdateReport};
use protocol::settings::{SettingCommand, SettingResponse};
use protocol::telemetry::{Reading, Remediation};
use protocol::{
    Command, DecodeError, DeviceFailure, Firmware, MAX_PAYLOAD_BYTES, ProtocolName, ReplyTo, Response, Step,
    StepOutcome, ThingName, job::JobDocument,
};

/// How long an error may be, in bytes: it must not carry the whole message.
const MAX_ERROR_BYTES: usize = 4096;

fn thing() -> ThingName {
    "gateway:1_a".parse().unwrap()
}

/// A good message of every kind.
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
        r#"{"version":"1.0","workflow":"firmware-upgrade","firmwareVersion":"2.0.0","upgradeTrigger":"manual","artifact":{"key":"a"},"timeoutMinutes":1440,"requestDigest":"0"}"#,
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
        corpus.push(encoding.encode_command(&thing(), &download, 1).payload);
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

/// Reads bytes with every decoder; returns what those say that cannot.
fn decode_all(bytes: &[u8]) -> Vec<String> {
    fn said<T>(result: Result<T, DecodeError>) -> Option<String> {
        result.err().map(|error| error.to_string())
    }
    fn json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Option<String> {
        // The cloud cuts what it says of these.
        serde_json::from_slice::<T>(bytes).err().map(|_| "no such object".to_owned())
    }
    let mut errors = Vec::new();
    for protocol in ProtocolName::ALL {
        let encoding = protocol.encoding();
        let topic = encoding.command_filter(&thing()).replace(['+', '#'], "response");
        errors.push(said(encoding.decode_report(&thing(), bytes)));
        errors.push(said(encoding.decode_command(&topic, bytes)));
    }
    errors.push(said(SettingCommand::decode(bytes)));
    errors.push(said(SettingResponse::decode(bytes).map(|response| response.push().map(drop))));
    errors.push(said(UpdateReport::decode(bytes)));
    errors.push(said(JobMessage::decode(bytes)));
    errors.push(said(WorkerMessage::decode(bytes)));
    errors.push(said(WorkerReply::decode(bytes)));
    errors.push(said(Reading::decode(bytes)));
    errors.push(said(Remediation::decode(bytes)));
    errors.push(json::<JobDocument>(bytes));
    errors.push(json::<Failure>(bytes));
    errors.into_iter().flatten().collect()
}

/// What is done to a message.
#[derive(Debug, Clone)]
enum Damage {
    Set(Index, u8),
    Cut(Index, Index),
    Insert(Index, Vec<u8>),
    /// A piece again and again.
    Repeat(Index, u8, u8),
    /// A piece of another message.
    Splice(Index, Index, Index),
    /// Brackets that are never closed.
    Nest(Index, u16),
    /// A number of so many digits.
    Number(Index, u16),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, value)| Damage::Set(at, value)),
        (at(), at()).prop_map(|(from, to)| Damage::Cut(from, to)),
        (at(), proptest::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (at(), any::<u8>(), any::<u8>()).prop_map(|(at, length, times)| Damage::Repeat(at, length, times)),
        (at(), at(), at()).prop_map(|(at, other, from)| Damage::Splice(at, other, from)),
        (at(), any::<u16>()).prop_map(|(at, depth)| Damage::Nest(at, depth)),
        (at(), any::<u16>()).prop_map(|(at, digits)| Damage::Number(at, digits)),
    ]
}

fn apply(damage: &Damage, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    let place = |at: &Index, bytes: &Vec<u8>| at.index(bytes.len() + 1);
    match damage {
        Damage::Set(at, value) => {
            let at = place(at, bytes);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *value;
            }
        }
        Damage::Cut(from, to) => {
            let (from, to) = (place(from, bytes), place(to, bytes));
            bytes.drain(from.min(to)..from.max(to));
        }
        Damage::Insert(at, inserted) => {
            let at = place(at, bytes);
            bytes.splice(at..at, inserted.iter().copied());
        }
        Damage::Repeat(at, length, times) => {
            let at = place(at, bytes);
            let piece = bytes[at..bytes.len().min(at + usize::from(*length))].repeat(usize::from(*times));
            bytes.splice(at..at, piece);
        }
        Damage::Splice(at, other, from) => {
            let at = place(at, bytes);
            let other = other.get(corpus);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from.index(other.len())..]);
        }
        Damage::Nest(at, depth) => {
            let at = place(at, bytes);
            bytes.splice(at..at, b"[".repeat(usize::from(*depth)));
        }
        Damage::Number(at, digits) => {
            let at = place(at, bytes);
            bytes.splice(at..at, b"9".repeat(usize::from(*digits)));
        }
    }
}

fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
    for error in decode_all(bytes) {
        prop_assert!(!error.is_empty() && error.len() <= MAX_ERROR_BYTES, "{} bytes of an error", error.len());
    }
    Ok(())
}

#[test]
fn every_message_of_the_corpus_is_read_by_somebody() {
    let kinds = decode_all(b"").len();
    for message in corpus() {
        assert!(decode_all(&message).len() < kinds, "{}", String::from_utf8_lossy(&message));
    }
}

/// The size is looked at before anything else: a message that is too large costs nothing more.
#[test]
fn what_is_too_large_is_not_read() {
    let mut reading = corpus()[3].clone();
    reading.resize(MAX_PAYLOAD_BYTES + 1, b' ');
    assert!(matches!(Reading::decode(&reading), Err(DecodeError::TooLarge(_))));
    assert!(matches!(UpdateReport::decode(&reading), Err(DecodeError::TooLarge(_))));
    assert!(matches!(WorkerMessage::decode(&reading), Err(DecodeError::TooLarge(_))));
    assert!(matches!(SettingResponse::decode(&reading), Err(DecodeError::TooLarge(_))));
    for protocol in ProtocolName::ALL {
        assert!(matches!(protocol.encoding().decode_report(&thing(), &reading), Err(DecodeError::TooLarge(_))));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), topic in ".{0,64}") {
        let _ = protocol::protocol_of_topic(&topic);
        let _ = protocol::settings::thing_of_response(&topic);
        let _ = protocol::on_premises::tenant_of_answer(&topic);
        let _ = protocol::telemetry::building_of_readings(&topic);
        check(&bytes)?;
    }

    #[test]
    fn no_damage_makes_a_decoder_panic_or_talk_for_ever(
        which in any::<Index>(), damages in proptest::collection::vec(damage(), 1..6),
    ) {
        let corpus = corpus();
        let mut bytes = which.get(&corpus).clone();
        for damage in &damages {
            apply(damage, &mut bytes, &corpus);
        }
        check(&bytes)?;
    }
}
