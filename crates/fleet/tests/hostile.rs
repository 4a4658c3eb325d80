//! Hostile input: whatever a Lambda function is given, it does its work or fails with a name of ours, and needs no more memory than
//! the input is worth.
//!
//! Each function runs as it is, on an AWS that takes whatever it is told and knows nothing. Good payloads and queue messages of every
//! kind are damaged in several ways at once, and given to every function. `docs/testing.md` has the long run.
#![allow(clippy::unwrap_used)]

#[path = "../../protocol/tests/damage/mod.rs"]
mod damage;
#[path = "hostile/functions.rs"]
mod functions;

use base64::{Engine, prelude::BASE64_STANDARD};
use damage::{damaged, damages, within_memory};
use fleet::ErrorName;
use fleet::lambda::{MAX_BATCH_BYTES, MAX_INPUT_BYTES};
use functions::{Functions, INVOKED, QUEUED};
use proptest::prelude::*;
use proptest::sample::Index;
use protocol::{MAX_JSON_DEPTH, ProtocolName, ReplyTo, Response, Step, StepOutcome};
use serde_json::json;
use std::sync::LazyLock;

/// How long an error may be, in bytes: it must not carry the whole message.
const MAX_ERROR_BYTES: usize = 10_000;
const DOCUMENT: &str = r#"{"version":"1.0","workflow":"firmware-upgrade","firmwareVersion":"2.0.0","upgradeTrigger":"manual","artifact":{"key":"a","size":7},"timeoutMinutes":1440,"requestDigest":"0"}"#;
const WAIT: &str = r#"{"taskToken":"token","attempt":0,"expectedVersion":"2.0.0"}"#;

/// A good MQTT message of every kind, with its topic.
static MESSAGES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let notify_next = format!(
        r#"{{"timestamp":1,"execution":{{"jobId":"job-1","executionNumber":2,"queuedAt":1795238492,"jobDocument":{DOCUMENT}}}}}"#
    );
    let mut messages: Vec<(String, Vec<u8>)> = [
        ("$aws/things/gateway-1/jobs/notify-next", notify_next.as_str()),
        ("$aws/events/presence/connected/gateway-1", r#"{"clientId":"gateway-1","timestamp":1,"eventType":"connected","sessionIdentifier":"s","principalIdentifier":"p","ipAddress":"1.2.3.4","versionNumber":3}"#),
        ("$aws/events/jobExecution/job-1/canceled", r#"{"jobId":"job-1","thingArn":"arn:aws:iot:eu-west-1:123456789012:thing/gateway-1","status":"CANCELED"}"#),
        ("iot/device/data", r#"{"_id_":"gateway-1","timestamp":"1711320208793","status":"failed","model":"wo:v8","FW":"2.27"}"#),
        ("devices/gateway-1/config_resp", r#"{"name":"SET_TEMP","operationId":"p.SET_TEMP","status":"SUCCESS","value":24.84,"error":0}"#),
        ("tenant1/to/lambda", r#"{"result":57,"TaskToken":"job-1.0123456789abcdef"}"#),
        ("tenant1/to/lambda", r#"{"TaskToken":"job-1.0123456789abcdef","action":"claim","worker":"w","request":"r"}"#),
        ("tenant1/to/lambda", r#"{"TaskToken":"job-1.0123456789abcdef","heartbeat":true,"progress":50,"worker":"w","fence":3,"request":"r"}"#),
        ("monitoring-device/building-1", r#"{"body":{"device":"gateway-1","temperature":27.4,"humidity":60.4,"action":"Monitor","id":"a","time":1764000000000}}"#),
    ]
    .map(|(topic, payload)| (topic.to_owned(), payload.as_bytes().to_vec()))
    .into();
    let thing = "gateway-1".parse().unwrap();
    for encoding in ProtocolName::ALL.map(ProtocolName::encoding) {
        let outcome = StepOutcome::Succeeded { firmware_version: Some("2.0.0".into()) };
        let response = Response { operation_id: "job-1-2".parse().unwrap(), step: Step::DeviceRebooted, outcome };
        let answer = encoding.encode_response(&thing, &response, &ReplyTo::default(), 1).unwrap();
        let boot = encoding.encode_boot(&thing, "2.0.0", 1);
        messages.extend([answer, boot].map(|message| (message.topic, message.payload)));
    }
    messages
});

/// The payloads of [`MESSAGES`].
static PAYLOADS: LazyLock<Vec<Vec<u8>>> =
    LazyLock::new(|| MESSAGES.iter().map(|(_, payload)| payload.clone()).collect());

/// A good queue message of every kind.
static BODIES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let input = format!(
        r#"{{"thingName":"t","jobId":"j","executionNumber":1,"queuedAt":1,"operationId":"j-1-1","document":{DOCUMENT}}}"#
    );
    let ended = json!({"detail-type": "Step Functions Execution Status Change", "detail": {"status": "ABORTED", "input": input}});
    let others = [
        r#"{"scheduledTime":"2026-11-24T03:00:00Z","input":{"a":15,"b":42}}"#.to_owned(),
        r#"{"eventType":"FIRMWARE_UPGRADE_FAIL","thingName":"t","jobId":"j","executionNumber":1,"operationId":"j-1","firmwareVersion":"2.0.0","reason":"TransferFailed","cause":"no space","step":"FIRMWARE_TRANSFERRED"}"#.to_owned(),
        r#"{"device":"gateway-1","remedy":"1#a"}"#.to_owned(),
        r#"{"nextOf":"gateway-1"}"#.to_owned(),
        r#"{"thingName":"t","operationId":"o","timestamp":1,"receivedAt":2,"model":"m","firmware":"f","decision":"PARK","attempt":10,"cycle":1}"#.to_owned(),
        r#"{"taskToken":"token","waitsUntil":9e15,"device":{"thingName":"t","externalId":"user-1","connectedAt":1}}"#.to_owned(),
        ended.to_string(),
    ];
    let messages = MESSAGES.iter().map(|(topic, payload)| envelope(topic, payload));
    messages.chain(others).map(String::into_bytes).collect()
});

/// A good payload of every function that is invoked with one.
static INPUTS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let publish = |command: &str| format!(r#"{{"thingName":"t","operationId":"o","command":{command}}}"#);
    let body = serde_json::to_string(&envelope("devices/t/firmware_resp", b"{}")).unwrap();
    let image = r#"{"device":{"S":"t"},"time":{"N":"1"},"id":{"S":"a"},"temperature":{"N":"27.4"},"humidity":{"N":"60"},"building":{"S":"1"},"receivedAt":{"N":"1764000000000"}}"#;
    [
        r#"{"firmwareVersion":"1.2.3","upgradeTrigger":"manual","targetArn":"arn:aws:iot:eu-west-1:123456789012:thinggroup/all"}"#.to_owned(),
        r#"{"firmwareVersion":"1.2.3","upgradeTrigger":"manual","targetArn":"arn:aws:iot:eu-west-1:123456789012:thing/t","jobId":"job-1","targetSelection":"CONTINUOUS","rollout":{"maximumPerMinute":5,"exponentialRate":{"baseRatePerMinute":1,"incrementFactor":1.5,"numberOfNotifiedThings":3}},"abort":{"percentage":10.5,"minimumExecuted":3},"retries":2,"timeoutMinutes":60,"artifact":{"url":"https://example.com/a","sha256":"SHA256","size":7,"signature":"SIGNATURE"},"protocol":"usp"}"#.replace("SHA256", &"0".repeat(64)).replace("SIGNATURE", &BASE64_STANDARD.encode([0; 64])),
        publish(&format!(r#"{{"name":"DOWNLOAD_FIRMWARE","protocol":"usp","wait":{WAIT},"firmwareVersion":"2.0.0","artifact":{{"url":"https://example.com/a"}},"urlLifetimeSeconds":60}}"#)),
        publish(&format!(r#"{{"name":"AWAIT_TRANSFER","protocol":"json","wait":{WAIT},"firmwareVersion":"2.0.0","artifact":{{"key":"k","bucket":"x","versionId":"v"}},"urlLifetimeSeconds":3600.0}}"#)),
        publish(r#"{"name":"CANCEL_DOWNLOAD","protocol":"json"}"#),
        publish(&format!(r#"{{"name":"APPLY_SETTINGS","wait":{WAIT},"connectedAt":1,"settings":{{"SET_TEMP":21.5,"SET_MODE":"ECO"}}}}"#)),
        publish(&format!(r#"{{"name":"RUN_JOB","tenant":"tenant1","handler":"add","wait":{WAIT},"input":{{"a":15,"b":[1,{{"c":null}}]}}}}"#)),
        format!(r#"{{"thingName":"t","operationId":"o","step":"DEVICE_REBOOTED","wait":{WAIT}}}"#),
        format!(r#"{{"thingName":"t","operationId":"o","wait":{WAIT}}}"#),
        r#"{"action":"park","thingName":"t","operationId":"o"}"#.to_owned(),
        r#"{"action":"release","thingNames":["t","u","v"]}"#.to_owned(),
        r#"{"RequestType":"Delete","ResponseURL":"http://127.0.0.1:1","StackId":"s","RequestId":"r","LogicalResourceId":"l"}"#.to_owned(),
        format!(r#"{{"Records":[{{"eventName":"INSERT","eventSourceARN":"a","awsRegion":"r","dynamodb":{{"ApproximateCreationDateTime":1764000000.5,"Keys":{{}},"NewImage":{image},"SequenceNumber":"1","SizeBytes":9,"StreamViewType":"NEW_IMAGE"}}}}]}}"#),
        format!(r#"{{"Records":[{{"messageId":"m","body":{body},"eventSourceARN":"a","attributes":{{}},"messageAttributes":{{}}}},{{"messageId":"n","body":"7"}}]}}"#),
    ]
    .map(String::into_bytes)
    .into()
});

/// What a topic rule makes of a message.
fn envelope(topic: &str, payload: &[u8]) -> String {
    json!({
        "topic": topic, "payload": BASE64_STANDARD.encode(payload), "clientId": "gateway-1", "principal": "a".repeat(64),
        "id": "00000000-0000-0000-0000-000000000000", "receivedAt": functions::NOW,
    })
    .to_string()
}

/// Every function, in this thread.
struct Bench {
    functions: Functions,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new() -> Self {
        Self { functions: Functions::new(), runtime: functions::runtime() }
    }

    /// Gives a message to every function behind a queue; returns what they said.
    fn deliver(&self, body: &str) -> Vec<Result<(), ErrorName>> {
        Self::run(&QUEUED, body, |name| self.runtime.block_on(self.functions.deliver(name, body)))
    }

    /// Invokes every other function with a payload.
    fn invoke(&self, payload: &str) -> Vec<Result<(), ErrorName>> {
        Self::run(&INVOKED, payload, |name| self.runtime.block_on(self.functions.invoke(name, payload)))
    }

    fn run(names: &[&str], input: &str, call: impl Fn(&str) -> Result<(), fleet::Error>) -> Vec<Result<(), ErrorName>> {
        let called = names.iter().map(|name| within_memory(name, input.len(), || call(name)));
        called
            .map(|result| {
                result.map_err(|error| {
                    let length = error.message.len();
                    assert!((1..=MAX_ERROR_BYTES).contains(&length), "{length} bytes of an error");
                    error.name
                })
            })
            .collect()
    }
}

thread_local! {
    static BENCH: Bench = Bench::new();
}

fn deliver(body: &[u8]) -> Vec<Result<(), ErrorName>> {
    BENCH.with(|bench| bench.deliver(&String::from_utf8_lossy(body)))
}

fn invoke(payload: &[u8]) -> Vec<Result<(), ErrorName>> {
    BENCH.with(|bench| bench.invoke(&String::from_utf8_lossy(payload)))
}

#[test]
fn every_function_is_here() {
    let mut known: Vec<&str> = QUEUED.into_iter().chain(INVOKED).collect();
    known.sort_unstable();
    let binaries = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/bin")).unwrap();
    let mut binaries: Vec<String> =
        binaries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    binaries.sort_unstable();
    assert_eq!(known, [&["any behind a queue"], &*binaries.iter().map(String::as_str).collect::<Vec<_>>()].concat());
}

/// Else nothing is tested but how they are refused.
#[test]
fn what_is_good_is_taken_by_somebody() {
    for (inputs, take) in [(&BODIES, deliver as fn(&[u8]) -> _), (&INPUTS, invoke)] {
        for input in inputs.iter() {
            let outcomes: Vec<Result<(), ErrorName>> = take(input);
            assert!(outcomes.iter().any(Result::is_ok), "{}: {outcomes:?}", String::from_utf8_lossy(input));
        }
    }
}

#[test]
fn what_is_too_large_is_not_read() {
    let large = |bytes: usize| format!(r#"{{"topic":"{}"}}"#, "x".repeat(bytes)).into_bytes();
    assert_eq!(deliver(&large(256 * 1024)), QUEUED.map(|_| Err(ErrorName::MessageTooLarge)));
    for (name, outcome) in INVOKED.into_iter().zip(invoke(&large(MAX_BATCH_BYTES))) {
        assert_eq!(outcome, Err(ErrorName::InvalidInput), "{name}");
    }
    // An input that fits a batch is too large for a single function.
    let small: Vec<&str> = INVOKED.into_iter().filter(|name| !functions::takes_batches(name)).collect();
    let refused = INVOKED.into_iter().zip(invoke(format!("{{}}{}", " ".repeat(MAX_INPUT_BYTES)).as_bytes()));
    for (name, outcome) in refused.filter(|(name, _)| small.contains(name)) {
        assert_eq!(outcome, Err(ErrorName::InvalidInput), "{name}");
    }
}

#[test]
fn what_is_too_deep_is_not_read() {
    let nested = [b"[".repeat(MAX_JSON_DEPTH + 1), b"]".repeat(MAX_JSON_DEPTH + 1)].concat();
    assert_eq!(deliver(&nested), QUEUED.map(|_| Err(ErrorName::MalformedMessage)));
    assert_eq!(invoke(&nested), INVOKED.map(|_| Err(ErrorName::InvalidInput)));
    for (topic, payload) in MESSAGES.iter() {
        let wrapped = [br#"{"a":"#.as_slice(), &nested, b",", &payload[1..]].concat();
        let outcomes = deliver(envelope(topic, &wrapped).as_bytes());
        // Some look at the topic first. A worker's answer that cannot be read is the failure of its job.
        let refused = [ErrorName::MalformedMessage, ErrorName::InvalidInput];
        let is_answer = topic.ends_with("/to/lambda");
        let is_read = |outcome: &Result<(), ErrorName>| !outcome.is_err_and(|name| refused.contains(&name));
        let read = outcomes.iter().filter(|outcome| is_read(outcome)).count();
        let all = read == usize::from(is_answer);
        assert!(all, "{topic}: {outcomes:?}");
    }
}

/// Inputs of the largest size that are nothing but a great many small pieces.
#[test]
fn the_memory_that_an_input_needs_is_bounded_by_its_size() {
    for piece in ["0,", "[],", "{},", "\"\",", r#"{"":0},"#] {
        let filled = |bytes: usize| piece.repeat(bytes / piece.len());
        let job = format!(r#"{{"TaskToken":"job-1.0123456789abcdef","result":[{}0]}}"#, filled(120 * 1024));
        deliver(envelope("tenant1/to/lambda", job.as_bytes()).as_bytes());
        let document =
            format!(r#"{{"execution":{{"jobId":"j","executionNumber":1,"jobDocument":[{}0]}}}}"#, filled(120 * 1024));
        deliver(envelope("$aws/things/gateway-1/jobs/notify-next", document.as_bytes()).as_bytes());
        deliver(format!(r#"{{"scheduledTime":"t","input":{{"a":[{}0]}}}}"#, filled(240 * 1024)).as_bytes());
        invoke(format!(r#"{{"firmwareVersion":[{}0]}}"#, filled(1000 * 1024)).as_bytes());
        let command = format!(
            r#"{{"name":"RUN_JOB","tenant":"tenant1","wait":{WAIT},"input":{{"a":[{}0]}}}}"#,
            filled(200 * 1024)
        );
        invoke(format!(r#"{{"operationId":"o","command":{command}}}"#).as_bytes());
    }
}

#[test]
fn a_reading_received_at_the_end_of_the_numbers_is_out_of_range() {
    let (topic, reading) = MESSAGES.iter().find(|(topic, _)| topic.contains("building")).unwrap();
    let mut body: serde_json::Value = serde_json::from_str(&envelope(topic, reading)).unwrap();
    let place = QUEUED.iter().position(|name| *name == "ingest-telemetry").unwrap();
    for received_at in [i64::MIN, i64::MAX] {
        body["receivedAt"] = received_at.into();
        assert_eq!(deliver(body.to_string().as_bytes())[place], Err(ErrorName::ReadingOutOfRange));
    }
}

proptest! {
    #[test]
    fn no_text_makes_a_function_panic(text in ".{0,128}") {
        deliver(text.as_bytes());
        invoke(text.as_bytes());
    }

    #[test]
    fn no_damaged_payload_makes_a_function_panic(which in any::<Index>(), damages in damages()) {
        invoke(&damaged(&INPUTS, which, &damages));
    }

    #[test]
    fn no_damaged_queue_message_makes_a_function_panic(which in any::<Index>(), damages in damages()) {
        deliver(&damaged(&BODIES, which, &damages));
    }

    #[test]
    fn no_damaged_device_message_makes_a_function_panic(which in any::<Index>(), damages in damages()) {
        let (topic, _) = which.get(&MESSAGES);
        deliver(envelope(topic, &damaged(&PAYLOADS, which, &damages)).as_bytes());
    }
}
