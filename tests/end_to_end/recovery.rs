//! Recovery of failed updates, end to end: the deployed template, the real Lambda binaries, real MQTT over TLS.
//!
//! `cargo xtask test` runs them; they need its local cloud.
#![allow(clippy::unwrap_used)]

use aws_config::SdkConfig;
use aws_sdk_iot::types::JobExecutionStatus;
use aws_sdk_sfn::types::ExecutionStatus;
use device_simulator::provision::ProtocolMix;
use device_simulator::{FailingUpdates, FleetOptions};
use fleet::allowance::Allowances;
use fleet::queue::Queue;
use fleet::recovery::restore_attributes::{self, Input};
use fleet::recovery::{Limits, Phase, RecoveryTable, Registry, record_success, retry_counter};
use fleet::{Error, ErrorName};
use protocol::ThingName;
use protocol::recovery::{Decision, Failure, RecoveryInput, UPDATE_REPORTS_TOPIC, UpdateReport, UpdateStatus};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use tests::{Cloud, Crash, MqttDevice, ORIGINAL, crashing, now, saw};

/// What the tests' stack is deployed with by default.
const LIMITS: Limits = Limits { attempts: 10, cycles: 2 };

/// The attributes of a thing as they are when `FW` and `model` have these values.
fn attributes(firmware: &str, model: &str) -> BTreeMap<String, String> {
    [("FW", firmware), ("model", model), ("site", "north")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

fn original() -> BTreeMap<String, String> {
    let [(_, firmware), (_, model)] = ORIGINAL;
    attributes(firmware, model)
}

/// Waits until the thing's attributes are these.
async fn await_attributes(cloud: &Cloud, thing: &ThingName, expected: &BTreeMap<String, String>) {
    tests::eventually(&format!("the attributes of {thing} are {expected:?}"), || async {
        (cloud.attributes(thing).await == *expected).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn ten_failures_at_once_park_a_device_once_and_its_time_brings_it_back() {
    let cloud = Cloud::connect().await;
    let thing = cloud.thing("park").await;
    let begin = now();
    cloud.fail(&thing, begin..begin + 10).await;
    let parked = cloud.await_recovery(&thing, "parked", |device| device.phase == Phase::Parked).await;
    assert_eq!((parked.attempts, parked.cycles, parked.ignored), (10, 0, 0));
    await_attributes(&cloud, &thing, &attributes("moveOut", "moveOut")).await;

    // Said again, and further ones.
    cloud.fail(&thing, begin..begin + 10).await;
    cloud.fail(&thing, begin + 10..begin + 13).await;
    let later = cloud.await_recovery(&thing, "three are ignored", |device| device.ignored == 3).await;
    let operation = parked.held.unwrap().operation_id;
    assert_eq!((later.attempts, &later.held.unwrap().operation_id), (10, &operation));

    // Only the decision has an execution.
    let recovered = cloud.recovered(&thing, 1).await;
    let [outcome, attempt] = ["outcome", "attempt"].map(|name| &recovered[0].output[name]);
    assert_eq!((outcome, attempt), (&json!("RESTORED"), &json!(10)), "{recovered:?}");
    assert_eq!(cloud.attributes(&thing).await, original());
    let device = cloud.recovery(&thing).await;
    assert_eq!((device.phase, device.attempts, device.cycles), (Phase::Active, 0, 1));
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn what_an_operator_changes_during_a_parking_stays() {
    let cloud = Cloud::connect().await;
    let thing = cloud.thing("edit").await;
    let begin = now();
    cloud.fail(&thing, begin..begin + 10).await;
    await_attributes(&cloud, &thing, &attributes("moveOut", "moveOut")).await;
    cloud
        .await_recovery(&thing, "parked", |device| device.held.as_ref().is_some_and(fleet::recovery::Held::is_marked))
        .await;
    cloud.set_attribute(&thing, "FW", "3.0").await;
    cloud.set_attribute(&thing, "site", "south").await;
    let recovered = cloud.recovered(&thing, 1).await;
    let restored = recovered.iter().find(|one| one.output["outcome"] == "RESTORED").unwrap();
    assert_eq!(restored.output["changedByOperator"], json!({"FW": "3.0"}));
    let mut expected = attributes("3.0", "wo:v8");
    expected.insert("site".into(), "south".into());
    assert_eq!(cloud.attributes(&thing).await, expected);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_success_ends_the_parking_and_restoring_does_nothing_then() {
    let cloud = Cloud::connect().await;
    let thing = cloud.thing("success").await;
    let begin = now();
    cloud.fail(&thing, begin..begin + 10).await;
    await_attributes(&cloud, &thing, &attributes("moveOut", "moveOut")).await;
    for _ in 0..2 {
        cloud.report(&thing, UpdateStatus::Succeeded, begin + 10).await;
    }
    await_attributes(&cloud, &thing, &original()).await;
    let device = cloud.await_recovery(&thing, "cleared", |device| device.phase == Phase::Active).await;
    assert_eq!((device.attempts, device.cycles, device.ignored), (0, 0, 0));
    // While the timer of the parking still runs, the device may get other attributes.
    cloud.set_attribute(&thing, "FW", "2.28").await;
    let recovered = cloud.recovered(&thing, 1).await;
    let timed: Vec<_> = recovered.iter().filter(|one| one.output["outcome"] == "NOT_PARKED").collect();
    assert_eq!((timed.len(), &timed[0].output["changedByOperator"]), (1, &json!({})));
    assert_eq!(cloud.attributes(&thing).await, attributes("2.28", "wo:v8"));
    // A new history.
    cloud.fail(&thing, [begin + 20]).await;
    assert_eq!(cloud.await_recovery(&thing, "one failure", |device| device.attempts == 1).await.cycles, 0);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_second_cycle_quarantines_once_and_an_operator_releases() {
    let cloud = Cloud::connect().await;
    let things = [cloud.thing("quarantine").await, cloud.thing("quarantine").await];
    let begin = now();
    for thing in &things {
        cloud.fail(thing, begin..begin + 10).await;
    }
    for thing in &things {
        cloud.recovered(thing, 1).await;
        // More than are left of its budget, all at once.
        cloud.fail(thing, begin + 100..begin + 112).await;
    }
    for thing in &things {
        let recovered = cloud.recovered(thing, 2).await;
        assert!(recovered.iter().all(|one| one.status == ExecutionStatus::Succeeded), "{recovered:?}");
        let outcomes = |outcome: &str| recovered.iter().filter(|one| one.output["outcome"] == outcome).count();
        assert_eq!((outcomes("RESTORED"), outcomes("QUARANTINED")), (1, 1), "{recovered:?}");
        assert_eq!(cloud.attributes(thing).await, attributes("failedtoupdate", "failedtoupdate"));
        assert!(cloud.is_in_failed_group(thing).await);
        let device = cloud.recovery(thing).await;
        assert_eq!((device.phase, device.attempts, device.cycles, device.ignored), (Phase::Quarantined, 10, 1, 2));
    }
    let messages = cloud.quarantines(&things, 2).await;
    assert_eq!(messages.len(), 2, "{messages:?}");
    assert!(messages.iter().all(|message| message["cycle"] == 2 && message["eventType"] == "DEVICE_QUARANTINED"));

    let unknown = format!("{}-unknown", things[0]);
    let names = [things[0].as_str(), &unknown, things[1].as_str()];
    let answer = cloud.restore_attributes(&json!({"action": "release", "thingNames": names})).await.unwrap();
    let outcomes: Vec<_> = answer["things"].as_array().unwrap().iter().map(|one| one["outcome"].clone()).collect();
    assert_eq!((outcomes, &answer["failed"]), (vec!["RELEASED".into(), "FAILED".into(), "RELEASED".into()], &json!(1)));
    assert_eq!(answer["things"][1]["error"], "DeviceNotFound");
    for thing in &things {
        assert_eq!(cloud.attributes(thing).await, original());
        assert!(!cloud.is_in_failed_group(thing).await);
    }
    // A late repeat of an old failure does not count, a new one begins a fresh history.
    let thing = &things[0];
    let again = cloud.restore_attributes(&json!({"action": "release", "thingName": thing})).await.unwrap();
    assert_eq!(again["outcome"], "NOTHING_TO_RELEASE");
    cloud.fail(thing, [begin + 200]).await;
    let device = cloud.await_recovery(thing, "a fresh history", |device| device.attempts == 1).await;
    assert_eq!((device.phase, device.cycles, device.ignored), (Phase::Active, 0, 0));
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_payload_of_an_operator_that_is_wrong_says_how() {
    let cloud = Cloud::connect().await;
    let many: Vec<String> = (0..101).map(|number| format!("t-{number}")).collect();
    for (payload, expected) in [
        (json!({"thingName": "t"}), "missing field `action`"),
        (json!({"action": "free", "thingName": "t"}), "action: unknown variant `free`"),
        (json!({"action": "release"}), "thingName or thingNames"),
        (json!({"action": "release", "thingName": "a/b"}), "a-z A-Z 0-9 : _ -"),
        (json!({"action": "release", "thingNames": []}), "expected 1 to 100"),
        (json!({"action": "release", "thingNames": many}), "got 101 things"),
        (json!({"action": "park", "thingName": "t"}), "thingName and operationId"),
        (json!({"action": "release", "thing": "t"}), "unknown field `thing`"),
    ] {
        let (name, message) = cloud.restore_attributes(&payload).await.unwrap_err();
        assert_eq!(name, "InvalidInput", "{payload}");
        assert!(message.contains(expected), "{payload}: {message}");
    }
    let (name, _) = cloud.restore_attributes(&json!({"action": "release", "thingName": "nobody"})).await.unwrap_err();
    assert_eq!(name, "DeviceNotFound");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_device_reports_on_itself_only() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("reporter", 2, ProtocolMix::Mixed).await;
    let (own, other) = (devices[0].thing.clone(), devices[1].thing.clone());
    let device = MqttDevice::connect(&devices[0], true).await;
    let report = |thing: &ThingName, status| UpdateReport {
        thing_name: thing.clone(),
        timestamp: now(),
        status,
        model: None,
        firmware: None,
    };
    for status in [UpdateStatus::Failed, UpdateStatus::Succeeded] {
        device.publish(report(&other, status).encode()).await;
    }
    device.publish(report(&own, UpdateStatus::Failed).encode()).await;
    cloud.await_recovery(&own, "one failure", |device| device.attempts == 1).await;
    // What is no report of ours, what cannot be read.
    for (payload, expected) in [
        (json!({"_id_": own, "timestamp": "7", "status": "failed", "model": "x".repeat(801)}), "MalformedMessage"),
        (json!({"_id_": own, "timestamp": "7", "status": "succeeded", "FW": "x".repeat(801)}), "MalformedMessage"),
    ] {
        let (topic, payload) = (UPDATE_REPORTS_TOPIC.to_owned(), payload.to_string().into_bytes());
        device.publish(protocol::Publication { topic, payload: payload.clone() }).await;
        let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, payload);
        assert_eq!(cloud.dead_letter(&text).await, expected);
    }
    let nothing = fleet::recovery::Device::default();
    assert_eq!(cloud.recovery(&other).await, nothing, "a device has spoken for another");
    assert_eq!(cloud.recovered(&own, 0).await.len(), 0);
}

/// The handlers of this process, on the stack's tables and registry.
struct Functions {
    registry: Registry,
    allowances: Allowances,
    /// A queue that nobody reads: what is decided here starts nothing.
    recoveries: Queue,
    failed_group: String,
}

impl Functions {
    async fn new(cloud: &Cloud, config: &SdkConfig) -> Self {
        let table = RecoveryTable::new(config, cloud.output("RecoveryTableName").to_owned());
        let registry = Registry { iot: aws_sdk_iot::Client::new(config), table };
        let allowances = cloud.output("AllowancesTableName").to_owned();
        let unread = cloud.sqs.create_queue().queue_name("unread-recoveries").send().await.unwrap();
        Self {
            registry,
            allowances: Allowances::new(aws_sdk_dynamodb::Client::new(config), allowances),
            recoveries: Queue::new(config, unread.queue_url.unwrap()),
            failed_group: cloud.output("FailedThingGroupName").to_owned(),
        }
    }

    async fn count(&self, thing: &ThingName, number: i64) -> Result<(), Error> {
        let adapters = retry_counter::Adapters {
            table: self.registry.table.clone(),
            iot: self.registry.iot.clone(),
            allowances: self.allowances.clone(),
            recoveries: self.recoveries.clone(),
            successes: self.recoveries.clone(),
            limits: LIMITS,
        };
        retry_counter::handle(&adapters, &report(thing, UpdateStatus::Failed, number)).await
    }

    async fn restore_attributes(&self, payload: Value) -> Result<String, Error> {
        let input: Input = serde_json::from_value(payload).unwrap();
        let (registry, failed_group) = (self.registry.clone(), self.failed_group.clone());
        let output =
            restore_attributes::handle(&restore_attributes::Adapters { registry, failed_group }, input).await?;
        Ok(serde_json::to_value(output).unwrap()["outcome"].as_str().unwrap().to_owned())
    }

    async fn act(&self, action: &str, thing: &ThingName, number: i64) -> Result<String, Error> {
        let operation = operation(thing, number);
        self.restore_attributes(json!({"action": action, "thingName": thing, "operationId": operation})).await
    }

    async fn succeed(&self, thing: &ThingName, received_at: i64) -> Result<(), Error> {
        let adapters =
            record_success::Adapters { registry: self.registry.clone(), allowances: self.allowances.clone() };
        record_success::handle(&adapters, &report(thing, UpdateStatus::Succeeded, received_at)).await
    }
}

/// A report as it comes out of a queue.
/// When the reports of these tests begin, in Unix milliseconds.
const BEGINNING: i64 = 1_711_320_208_000;

fn report(thing: &ThingName, status: UpdateStatus, number: i64) -> String {
    let time = BEGINNING + number;
    let report = UpdateReport { thing_name: thing.clone(), timestamp: time, status, model: None, firmware: None };
    let payload = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, report.encode().payload);
    json!({"topic": UPDATE_REPORTS_TOPIC, "payload": payload, "clientId": thing, "receivedAt": time}).to_string()
}

fn operation(thing: &ThingName, number: i64) -> protocol::OperationId {
    retry_counter::operation_of(thing, BEGINNING + number).unwrap()
}

/// What one invocation does, in the order of a device's life.
#[derive(Debug, Clone, Copy)]
enum Effect {
    Count(i64),
    Park(i64),
    Restore(i64),
    Quarantine(i64),
    Release,
    Succeed(i64),
}

impl Effect {
    async fn run(self, functions: &Functions, thing: &ThingName) -> Result<(), Error> {
        match self {
            Self::Count(number) => functions.count(thing, number).await,
            Self::Park(number) => functions.act("park", thing, number).await.map(drop),
            Self::Restore(number) => functions.act("restore", thing, number).await.map(drop),
            Self::Quarantine(number) => functions.act("quarantine", thing, number).await.map(drop),
            Self::Release => {
                functions.restore_attributes(json!({"action": "release", "thingName": thing})).await.map(drop)
            }
            Self::Succeed(at) => functions.succeed(thing, at).await,
        }
    }
}

/// A device's life up to an effect, which dies so and is tried again; then what is known of the device and its attributes.
/// None if the effect has fewer calls.
async fn after_crash(cloud: &Cloud, before: &[Effect], effect: Effect, crash: Crash) -> Option<String> {
    let thing = cloud.thing("crash").await;
    let functions = Functions::new(cloud, &cloud.config).await;
    for effect in before {
        effect.run(&functions, &thing).await.unwrap();
    }
    let (config, calls) = crashing(&cloud.config, crash);
    let died = effect.run(&Functions::new(cloud, &config).await, &thing).await;
    let (Crash::Before(call) | Crash::After(call)) = crash;
    let finished = calls.load(Ordering::SeqCst) < call;
    assert_eq!(died.is_ok(), finished, "{effect:?} {crash:?}: {died:?}");
    assert!(died.is_ok_and(|()| finished) || calls.load(Ordering::SeqCst) == call, "it goes on after its death");
    // As Step Functions and the queue do.
    effect.run(&functions, &thing).await.unwrap();
    let device = cloud.recovery(&thing).await;
    let number = |held: &fleet::recovery::Held| (1..=50).find(|number| held.operation_id == operation(&thing, *number));
    let held = device.held.as_ref().and_then(number);
    let (phase, attempts, cycles, ignored) = (device.phase, device.attempts, device.cycles, device.ignored);
    let (attributes, failed) = (cloud.attributes(&thing).await, cloud.is_in_failed_group(&thing).await);
    let state = format!("{phase:?} {attempts} {cycles} {ignored} {held:?} {attributes:?} {failed}");
    (!finished).then_some(state)
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_crash_between_any_two_effects_repairs_itself() {
    use Effect::{Count, Park, Quarantine, Release, Restore, Succeed};
    let cloud = Cloud::connect().await;
    let failed: Vec<Effect> = (1..=10).map(Count).collect();
    let parked = [failed.clone(), vec![Park(10)]].concat();
    let restored = [parked.clone(), vec![Restore(10)]].concat();
    let failed_again = [restored, (11..=20).map(Count).collect()].concat();
    let quarantined = [failed_again.clone(), vec![Quarantine(20)]].concat();
    let moved = r#"{"FW": "moveOut", "model": "moveOut", "site": "north"}"#;
    let back = r#"{"FW": "2.27", "model": "wo:v8", "site": "north"}"#;
    let given_up = r#"{"FW": "failedtoupdate", "model": "failedtoupdate", "site": "north"}"#;
    let cases = [
        (&failed[..9], Count(10), format!("Parked 10 0 0 Some(10) {back} false"), 5),
        (&failed, Park(10), format!("Parked 10 0 0 Some(10) {moved} false"), 10),
        (&parked, Restore(10), format!("Active 0 1 0 Some(10) {back} false"), 7),
        (&parked, Succeed(50), format!("Active 0 0 0 Some(10) {back} false"), 7),
        (&parked, Release, format!("Active 0 0 0 Some(10) {back} false"), 8),
        (&failed_again, Quarantine(20), format!("Quarantined 10 1 0 Some(20) {given_up} false"), 10),
        (&quarantined, Release, format!("Active 0 0 0 Some(20) {back} false"), 8),
    ];
    for (before, effect, expected, at_least) in cases {
        let mut calls = 0;
        'calls: for call in 1.. {
            for crash in [Crash::Before(call), Crash::After(call)] {
                let Some(state) = after_crash(&cloud, before, effect, crash).await else { break 'calls };
                assert_eq!(state, expected, "{effect:?} {crash:?}");
            }
            calls = call;
        }
        println!("{effect:?}: dies before and after each of {calls} calls");
        assert!(calls >= at_least, "{effect:?} has {calls} calls only");
    }
}

/// A thing's executions in a job, by number: their statuses.
async fn job_executions(cloud: &Cloud, job: &str, thing: &ThingName) -> BTreeMap<i64, JobExecutionStatus> {
    let list = cloud.iot.list_job_executions_for_thing().thing_name(thing.as_str()).job_id(job);
    let executions = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    let summaries = executions.into_iter().filter_map(|one| one.job_execution_summary);
    let statuses = summaries.filter_map(|one| Some((one.execution_number?, one.status?))).collect();
    saw(format!("job executions of {thing}: {statuses:?}"));
    statuses
}

/// Waits until the device is held in that phase, out of its dynamic group, and no execution of its job is open: all of
/// them.
async fn held_executions(
    cloud: &Cloud,
    job: &str,
    thing: &ThingName,
    phase: Phase,
    group: &str,
) -> BTreeMap<i64, JobExecutionStatus> {
    tests::eventually(&format!("{thing} is {phase:?} and has no open job execution"), || async {
        let is_held = cloud.recovery(thing).await.phase == phase;
        let members = cloud.iot.list_things_in_thing_group().thing_group_name(group).send().await.unwrap();
        saw(format!("the group's members are {:?}", members.things()));
        let executions = job_executions(cloud, job, thing).await;
        let is_open =
            |status: &JobExecutionStatus| matches!(status, JobExecutionStatus::Queued | JobExecutionStatus::InProgress);
        (is_held && members.things().is_empty() && !executions.values().any(is_open)).then_some(executions)
    })
    .await
}

fn count(executions: &BTreeMap<i64, JobExecutionStatus>, status: &JobExecutionStatus) -> usize {
    executions.values().filter(|one| *one == status).count()
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_continuous_job_reaches_a_device_again_after_its_parking_and_after_its_release() {
    use JobExecutionStatus::{Failed, Succeeded};
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud
        .provision_with("stuck", 1, ProtocolMix::Mixed, |options| {
            options.attributes = ORIGINAL.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        })
        .await;
    let thing = devices[0].thing.clone();
    let group = format!("outdated-{thing}");
    let query = format!(r#"thingName:{thing} AND attributes.model:"wo:v8" AND attributes.FW:2.27"#);
    let create = cloud.iot.create_dynamic_thing_group().thing_group_name(&group).query_string(query);
    let target = create.send().await.expect("a dynamic group").thing_group_arn.unwrap();
    let image = cloud.upload("2.28.0", 1000).await;
    // It fails in both cycles, all retries of the platform included, and succeeds when it has been released.
    let failing = |options: &mut FleetOptions| options.failing_updates = Some(FailingUpdates::Always);
    let fleet = Cloud::run_with(devices.clone(), 0, failing).await;
    let job = cloud.create_job(&target, &image, json!({"targetSelection": "CONTINUOUS", "retries": 10})).await;

    let before = held_executions(&cloud, &job, &thing, Phase::Parked, &group).await;
    assert!((10..=11).contains(&count(&before, &Failed)), "{before:?}");
    cloud.await_recovery(&thing, "restored", |device| device.cycles == 1).await;
    let restored = tests::eventually("the restored device has a new execution", || async {
        let executions = job_executions(&cloud, &job, &thing).await;
        (executions.len() > before.len()).then_some(executions)
    });
    restored.await;
    let after = held_executions(&cloud, &job, &thing, Phase::Quarantined, &group).await;
    assert!((20..=22).contains(&count(&after, &Failed)), "{after:?}");
    assert_eq!(cloud.quarantines(std::slice::from_ref(&thing), 1).await.len(), 1);
    assert!(cloud.is_in_failed_group(&thing).await);
    assert_eq!(job_executions(&cloud, &job, &thing).await, after, "a quarantined device gets nothing");
    fleet.stop().await;

    let mended = Cloud::run_with(devices, 0, |options| options.report_updates = true).await;
    let released = cloud.restore_attributes(&json!({"action": "release", "thingName": thing})).await.unwrap();
    assert_eq!(released["attributes"], json!({"FW": "2.27", "model": "wo:v8"}));
    let last = tests::eventually("the released device is upgraded", || async {
        let executions = job_executions(&cloud, &job, &thing).await;
        (count(&executions, &Succeeded) == 1).then_some(executions)
    });
    assert_eq!(last.await.len(), after.len() + 1);
    let is_cleared = |device: &fleet::recovery::Device| device.phase == Phase::Active && device.attempts == 0;
    cloud.await_recovery(&thing, "cleared", is_cleared).await;
    mended.stop().await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_device_that_fails_twice_and_then_succeeds_keeps_no_history() {
    use JobExecutionStatus::{Failed, Succeeded};
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("twice", 1, ProtocolMix::Mixed).await;
    let thing = devices[0].thing.clone();
    let image = cloud.upload("2.28.0", 1000).await;
    let failing = |options: &mut FleetOptions| options.failing_updates = Some(FailingUpdates::First(2));
    let fleet = Cloud::run_with(devices, 3, failing).await;
    let job = cloud.create_job(&group, &image, json!({"retries": 10})).await;
    let executions = tests::eventually("the third execution succeeds", || async {
        let executions = job_executions(&cloud, &job, &thing).await;
        (count(&executions, &Succeeded) == 1).then_some(executions)
    });
    assert_eq!(executions.await, BTreeMap::from([(1, Failed), (2, Failed), (3, Succeeded)]));
    assert_eq!(fleet.stop().await.len(), 3);
    let nothing = fleet::recovery::Device::default();
    let is_cleared = |device: &fleet::recovery::Device| *device != nothing && device.attempts == 0;
    cloud.await_recovery(&thing, "cleared", is_cleared).await;
    assert_eq!(cloud.recovered(&thing, 0).await.len(), 0);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_release_while_the_group_settles_leaves_the_device_free() {
    let cloud = Cloud::connect().await;
    let thing = cloud.thing("settle").await;
    let begin = now();
    cloud.fail(&thing, begin..begin + 10).await;
    cloud.recovered(&thing, 1).await;
    cloud.fail(&thing, begin + 100..begin + 110).await;
    await_attributes(&cloud, &thing, &attributes("failedtoupdate", "failedtoupdate")).await;
    let released = cloud.restore_attributes(&json!({"action": "release", "thingName": thing})).await.unwrap();
    assert_eq!(released["outcome"], "RELEASED", "{released}");
    let recovered = cloud.recovered(&thing, 2).await;
    assert_eq!(recovered.iter().filter(|one| one.output["outcome"] == "NOT_QUARANTINED").count(), 1);
    assert_eq!(cloud.attributes(&thing).await, original());
    assert!(!cloud.is_in_failed_group(&thing).await);
    assert_eq!(cloud.quarantines(std::slice::from_ref(&thing), 0).await, Vec::<Value>::new());
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_thing_that_is_gone_ends_its_recovery_and_is_forgotten() {
    let cloud = Cloud::connect().await;
    let thing = cloud.thing("gone").await;
    let begin = now();
    cloud.fail(&thing, begin..begin + 9).await;
    cloud.await_recovery(&thing, "nine failures", |device| device.attempts == 9).await;
    // It is deleted when the tenth has been counted already.
    let tenth = begin + 9;
    let functions = Functions::new(&cloud, &cloud.config).await;
    functions.count(&thing, tenth).await.unwrap();
    cloud.await_recovery(&thing, "held", |device| device.phase == Phase::Parked).await;
    cloud.iot.delete_thing().thing_name(thing.as_str()).send().await.unwrap();
    let operation_id = operation(&thing, tenth);
    let (thing_name, model, firmware) = (thing.clone(), None, None);
    let failure = Failure { thing_name, operation_id, timestamp: tenth, received_at: tenth, model, firmware };
    let input = RecoveryInput { failure, decision: Decision::Park, attempt: 10, cycle: 1 };
    let start = cloud.step_functions.start_execution().state_machine_arn(cloud.output("FailedUpdateRecoveryArn"));
    let start = start.name(input.failure.operation_id.as_str()).input(serde_json::to_string(&input).unwrap());
    start.send().await.unwrap();
    let recovered = cloud.recovered(&thing, 1).await;
    let failed: Vec<_> = recovered.iter().filter(|one| one.status == ExecutionStatus::Failed).collect();
    assert_eq!(failed.len(), 1, "{recovered:?}");
    assert_eq!(failed[0].error.0, ErrorName::DeviceNotFound.as_str());
    let item = serde_json::to_value(cloud.recovery(&thing).await).unwrap();
    assert!(item["phase"] == "ACTIVE" && item["expiresAt"].is_i64(), "it is held for ever: {item}");
}
