//! What one device can cause by saying something again and again: it is bounded, and costs others nothing.
//!
//! `cargo xtask test` runs them; they need its local cloud.
#![allow(clippy::unwrap_used)]

use device_simulator::provision::ProtocolMix;
use fleet::allowance::AN_HOUR;
use futures_util::future::join_all;
use protocol::recovery::{UpdateReport, UpdateStatus};
use protocol::{DeviceFailure, OperationId, ProtocolName, ReplyTo, Step, StepOutcome, ThingName};
use tests::{Cloud, MqttDevice, ScriptedDevice, now, saw};

const HOUR: i64 = 3_600_000;
/// More than a device is heard with in two hours, should the test run through the end of one.
const FLOOD: i64 = 2 * AN_HOUR as i64 + 50;

fn failure(thing: &ThingName, timestamp: i64) -> UpdateReport {
    let status = UpdateStatus::Failed;
    UpdateReport { thing_name: thing.clone(), timestamp, status, model: None, firmware: None }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_device_that_reports_failures_without_end_is_heard_a_hundred_times_an_hour() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("flood", 2, ProtocolMix::Mixed).await;
    let [bad, honest] = [&devices[0], &devices[1]];
    let [flooding, other] = [MqttDevice::connect(bad, true).await, MqttDevice::connect(honest, true).await];
    let begin = now();
    join_all((0..FLOOD).map(|number| flooding.publish(failure(&bad.thing, begin + number).encode()))).await;
    other.publish(failure(&honest.thing, begin).encode()).await;
    cloud.await_recovery(&honest.thing, "another device is heard", |device| device.attempts == 1).await;
    cloud.drained(&["FailedUpdatesQueue", "RecoveriesQueue"]).await;
    assert_heard(&cloud, &format!("{}#update-report", bad.thing), begin).await;
    let device = cloud.recovery(&bad.thing).await;
    assert!(i64::from(device.cycles * 10 + device.attempts + device.ignored) < FLOOD, "{device:?}");
    // It is parked by its tenth, and may be given up by its twentieth; nothing else has an execution.
    let executions = cloud.executions_of("FailedUpdateRecoveryArn", &bad.thing).await;
    assert!((1..=2).contains(&executions.len()), "{executions:?}");
}

/// What a device answers that was never asked leaves nothing behind, and is no error.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_answer_to_an_operation_that_never_was_leaves_nothing_behind() {
    let cloud = Cloud::connect().await;
    for protocol in [ProtocolName::Json, ProtocolName::Usp] {
        let (_, devices) = cloud.provision("unasked", 1, ProtocolMix::All(protocol)).await;
        let thing = &devices[0].thing;
        let device = ScriptedDevice::connect(&devices[0]).await;
        // Called as ours are: a boot under another name would be somebody else's doing.
        let operation: OperationId = format!("never-{thing}-1-1795238492").parse().unwrap();
        let reply_to = ReplyTo { topic: "controllers/self::aws-dm-controller/reply".into(), ..ReplyTo::default() };
        for code in ["7", DeviceFailure::ADDRESS_EXPIRED] {
            let failure = StepOutcome::Failed(DeviceFailure { code: code.into(), message: "no".into() });
            device.answer(&operation, &reply_to, Step::FirmwareTransferred, failure).await;
        }
        device.succeed(&operation, &reply_to, Step::FirmwareTransferred, "9.9.9").await;
        device.succeed(&operation, &reply_to, Step::DeviceRebooted, "9.9.9").await;
        cloud.drained(&["DeviceResponsesQueue"]).await;
        let query = cloud.dynamodb.query().table_name(cloud.output("RendezvousTableName")).consistent_read(true);
        let key = aws_sdk_dynamodb::types::AttributeValue::S(format!("{thing}#{operation}"));
        let query =
            query.key_condition_expression("operation = :operation").expression_attribute_values(":operation", key);
        let items = query.send().await.unwrap().items.unwrap_or_default();
        saw(format!("{items:?}"));
        assert!(items.is_empty(), "{protocol}: {items:?}");
        assert_ne!(cloud.attribute(thing, "firmwareVersion").await.as_deref(), Some("9.9.9"), "{protocol}");
        assert_eq!(cloud.dead_letters(operation.as_str()).await, 0, "{protocol}");
    }
}

/// A device that boots again and again does not write into the registry without end.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_device_that_boots_without_end_is_heard_a_hundred_times_an_hour() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("boots", 1, ProtocolMix::All(ProtocolName::Usp)).await;
    let thing = &devices[0].thing;
    let device = ScriptedDevice::connect(&devices[0]).await;
    let (begin, before) = (now(), version_of(&cloud, thing).await);
    for number in 0..FLOOD {
        device.publish(device.encoding().encode_boot(thing, &format!("1.0.{number}"), now())).await;
    }
    cloud.drained(&["DeviceResponsesQueue"]).await;
    assert_heard(&cloud, &format!("{thing}#boot"), begin).await;
    let changes = version_of(&cloud, thing).await - before;
    assert!((1..FLOOD).contains(&changes), "{changes} changes");
}

/// A client was heard a hundred times in an hour. What the broker gets within the same millisecond is one to it. The test may run
/// through the end of an hour.
async fn assert_heard(cloud: &Cloud, client: &str, begin: i64) {
    let mut heard = Vec::new();
    for hour in begin / HOUR..=now() / HOUR {
        let key = aws_sdk_dynamodb::types::AttributeValue::S(format!("{client}#{hour}"));
        let get = cloud.dynamodb.get_item().table_name(cloud.output("AllowancesTableName")).key("allowance", key);
        let item = get.consistent_read(true).send().await.unwrap().item.unwrap_or_default();
        heard.push(item.get("heard").map_or(0, |heard| heard.as_ns().unwrap().len()));
        saw(format!("{client}: {item:?}"));
    }
    assert!(heard.contains(&(AN_HOUR as usize)), "{client}: {heard:?}");
    assert!(heard.iter().all(|count| *count <= AN_HOUR as usize), "{client}: {heard:?}");
}

/// How often a thing has been changed.
async fn version_of(cloud: &Cloud, thing: &ThingName) -> i64 {
    let version = cloud.iot.describe_thing().thing_name(thing.as_str()).send().await.unwrap().version;
    saw(format!("version {version} of {thing}"));
    version
}
