//! The configuration push, whole: presence, queues, state machine, settings API and devices over real MQTT and TLS.
//!
//! `cargo xtask test` runs these tests; they need its local cloud.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::{AttributePayload, JobExecutionStatus};
use aws_sdk_sfn::types::ExecutionStatus::{Failed, Running, Succeeded};
use aws_sdk_sfn::types::HistoryEventType;
use base64::{Engine, prelude::BASE64_STANDARD};
use device_simulator::provision::ProtocolMix;
use device_simulator::settings_api::ApiFault;
use device_simulator::{DeviceSpec, Fault, Faults};
use fleet::devices::settings::{Push, SettingsTable};
use fleet::workflows::rendezvous::Wait;
use futures_util::future::join_all;
use protocol::settings::{SettingCommand, SettingOutcome, SettingResponse, SettingValue, Settings, response_topic};
use protocol::{OperationId, Publication, SettingName, ThingName};
use rumqttc::QoS;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use tests::{
    Cloud, MqttDevice, PATIENCE, Proxy, Pushed, eventually, kill_functions, names, saw, seeded_choices, settings_api,
    with_faults,
};

fn number(value: f64) -> SettingValue {
    SettingValue::Number(serde_json::Number::from_f64(value).unwrap())
}

fn temperature(value: f64) -> Value {
    json!({ "SET_TEMP": value })
}

fn temperatures(value: f64) -> Settings {
    serde_json::from_value(temperature(value)).unwrap()
}

fn error_of(pushed: &Pushed) -> (&str, &str) {
    (&pushed.error.0, &pushed.error.1)
}

/// Waits until every presence event that was delivered has had its effect.
async fn presence_settled(cloud: &Cloud) {
    eventually("all sessions are handled", || async {
        (cloud.is_drained("PresenceQueue").await && cloud.is_drained("SessionsQueue").await).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn settings_reach_each_device_that_comes_online_and_only_what_changed_does_again() {
    let cloud = Cloud::connect().await;
    let devices = cloud.provision_with_profiles("push", 6).await;
    let things = names(&devices);
    for (index, thing) in (0_i32..).zip(&things) {
        Cloud::wants(thing, temperature(18.5 + f64::from(index)));
    }
    let fleet = Cloud::run(devices, 0).await;
    for (index, thing) in (0_i32..).zip(&things) {
        let pushed = cloud.pushed(thing, 1).await.remove(0);
        assert_eq!(pushed.status, Succeeded, "{pushed:?}");
        let value = 18.5 + f64::from(index);
        assert_eq!((&pushed.output["status"], &pushed.output["source"]), (&json!("SUCCESS"), &json!("API")));
        assert_eq!((&pushed.output["value"], &pushed.output["settings"]), (&json!(value), &temperature(value)));
        assert_eq!(pushed.output["externalId"], format!("user-{thing}"));
        assert!(pushed.output["seconds"].as_f64().unwrap() > 0.0, "{pushed:?}");
        assert!(transitions(&cloud, &pushed).await <= 4);
        assert_eq!(fleet.settings(thing).into_values().collect::<Vec<_>>(), [number(value)]);
    }

    // Another session, the same wishes: nothing is sent. Then one wish more: only that is sent.
    let thing = &things[0];
    let again = reconnect(&cloud, &fleet, thing, 2).await;
    assert_eq!((again.status.clone(), &again.output["status"]), (Succeeded, &json!("UNCHANGED")));
    assert!(transitions(&cloud, &again).await <= 4);
    assert_eq!(fleet.applied(thing), 1);
    Cloud::wants(thing, json!({"SET_TEMP": 18.5, "SET_MODE": "ECO", "SET_CHILD_LOCK": true}));
    let more = reconnect(&cloud, &fleet, thing, 3).await;
    assert_eq!(more.output["settings"], json!({"SET_MODE": "ECO", "SET_CHILD_LOCK": true}));
    assert_eq!(more.output["value"], more.output["settings"]);
    assert_eq!(fleet.applied(thing), 3);

    // By hand, with force: everything is sent.
    let forced = cloud.ended_push(&cloud.start_push(thing, json!({"forcePush": true})).await).await;
    assert_eq!(forced.status, Succeeded, "{forced:?}");
    assert_eq!(forced.output["settings"], json!({"SET_TEMP": 18.5, "SET_MODE": "ECO", "SET_CHILD_LOCK": true}));
    assert_eq!(fleet.applied(thing), 6);
    // The parameter ForcePush stands where the state machine asks for it. (No function may end tasks of another state machine, so
    // none is made here with the parameter set.)
    let describe = cloud.step_functions.describe_state_machine().state_machine_arn(cloud.output("ConfigPushArn"));
    let definition = describe.send().await.unwrap().definition;
    assert!(definition.contains("{% false or "), "{definition}");
    fleet.stop().await;
}

/// Takes the power from a device and gives it back: how the push of the new session has ended.
async fn reconnect(cloud: &Cloud, fleet: &device_simulator::Fleet, thing: &ThingName, pushes: usize) -> Pushed {
    assert!(fleet.power_off(thing).await);
    assert!(fleet.power_on(thing));
    cloud.pushed(thing, pushes).await.pop().unwrap()
}

async fn transitions(cloud: &Cloud, pushed: &Pushed) -> usize {
    let history = cloud.step_functions.get_execution_history().execution_arn(&pushed.arn);
    let events = history.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    events.iter().filter(|event| event.r#type.as_str().ends_with("StateEntered")).count()
}

/// A device as it is sold: a clean session, `QoS` 0, it subscribes when it has been connected for a while and answers ten
/// seconds later. What was sent at once is lost; it is sent again, and done once.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_device_that_subscribes_late_and_answers_after_ten_seconds() {
    let _quiet = tests::undisturbed().await;
    let cloud = Cloud::connect().await;
    let devices = cloud.provision_with_profiles("late", 1).await;
    Cloud::wants(&devices[0].thing, temperature(19.5));
    let mut device = MqttDevice::connect(&devices[0], true).await;
    eventually("the first command is on its way, and nobody has heard it", || async {
        let execution = cloud.pushes(&device.thing).await.pop()?;
        let history = cloud.step_functions.get_execution_history().execution_arn(execution.execution_arn);
        let events = history.send().await.unwrap().events;
        saw(format!("its events: {:?}", events.iter().map(|event| &event.r#type).collect::<Vec<_>>()));
        // The request for its settings was the first task.
        let submitted = events.iter().filter(|event| event.r#type == HistoryEventType::TaskSubmitted);
        (submitted.count() > 1).then_some(())
    })
    .await;
    device.subscribe(format!("devices/{}/config_req", device.thing), QoS::AtMostOnce).await;
    let command = device.setting().await;
    assert_eq!(command.value, number(19.5));
    assert!(cloud.push_of(&device.thing).await.unwrap().attempt >= 1);
    let again = device.settings_within(Duration::from_secs(10)).await;
    assert_eq!(again.iter().find(|other| other.operation_id != command.operation_id), None);
    // As the recorded device answers, fields in its order.
    let payload = format!(
        r#"{{"name":"SET_TEMP","type":"RESP","operationId":"{}","status":"SUCCESS","value":19.5,"error":0,"timestamp":1}}"#,
        command.operation_id
    );
    device.publish(Publication { topic: response_topic(&device.thing), payload: payload.into_bytes() }).await;
    let pushed = cloud.pushed(&device.thing, 1).await.remove(0);
    assert_eq!((pushed.status.clone(), &pushed.output["value"]), (Succeeded, &json!(19.5)), "{pushed:?}");
}

/// Early, late, twice, out of order, never, with a wrong operation id, from the wrong device, malformed, oversized.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_message_matrix() {
    let _quiet = tests::undisturbed().await;
    let cloud = &Cloud::connect().await;
    let devices = cloud.provision_with_profiles("messages", 8).await;
    for thing in names(&devices) {
        Cloud::wants(&thing, temperature(20.5));
    }
    tokio::join!(
        never_and_late(cloud, &devices[0]),
        early_wrong_foreign_and_unreadable(cloud, &devices[1], &devices[2]),
        twice_and_contradicting(cloud, &devices[3]),
        out_of_order_with_partial_failure(cloud, &devices[4]),
        some_answers_missing(cloud, &devices[5]),
        refused_and_other_value(cloud, &devices[6], &devices[7]),
    );
}

async fn never_and_late(cloud: &Cloud, spec: &DeviceSpec) {
    let mut device = MqttDevice::listening(spec).await;
    let command = device.setting().await;
    let pushed = cloud.pushed(&device.thing, 1).await.remove(0);
    assert_eq!(error_of(&pushed), ("DeviceTimedOut", "SET_TEMP: no answer; each command was sent three times"));
    let repeats = device.settings_within(Duration::from_millis(100)).await;
    assert!(repeats.len() >= 2 && repeats.iter().all(|repeat| *repeat == command), "the same again: {repeats:?}");
    // The device really has the value now, if nobody waits for it any more: the next session sends nothing.
    device.confirm(&command).await;
    eventually("the late answer is kept", || async {
        (cloud.confirmed(&device.thing).await == temperatures(20.5)).then_some(())
    })
    .await;
    let again = cloud.ended_push(&cloud.start_push(&device.thing, json!({})).await).await;
    assert_eq!(again.output["status"], "UNCHANGED");
}

async fn early_wrong_foreign_and_unreadable(cloud: &Cloud, spec: &DeviceSpec, other: &DeviceSpec) {
    let mut device = MqttDevice::listening(spec).await;
    let mut foreign = MqttDevice::listening(other).await;
    let name: SettingName = "SET_TEMP".parse().unwrap();
    let done = || SettingOutcome::Success { value: Some(number(20.5)) };
    let command = device.setting().await;
    let others = foreign.setting().await;
    // Before it was asked: for the push of a session that has not begun.
    device.answer(&"tomorrow.SET_TEMP".parse().unwrap(), &name, done()).await;
    // With another operation, with another setting, and for another device.
    device.answer(&format!("{}-other", command.operation_id).parse().unwrap(), &name, done()).await;
    device.answer(&command.operation_id, &"SET_MODE".parse().unwrap(), done()).await;
    device.answer(&others.operation_id, &name, done()).await;
    foreign.answer(&command.operation_id, &name, done()).await;
    let thing = &device.thing;
    let unknown = format!(r#"{{"name":"SET_TEMP","operationId":"{thing}","status":"done"}}"#);
    let too_large = format!(r#"{{"name":"{thing}","padding":"{}"}}"#, "x".repeat(protocol::MAX_PAYLOAD_BYTES));
    for (payload, error) in [(unknown, "MalformedMessage"), (too_large, "MessageTooLarge")] {
        // The beginning tells it from others: of what is too large not all is kept.
        let start = BASE64_STANDARD.encode(&payload[..payload.len().min(60)]);
        device.publish(Publication { topic: response_topic(thing), payload: payload.into_bytes() }).await;
        assert_eq!(cloud.dead_letter(&start).await, error);
    }
    assert_eq!(cloud.dead_letters(&response_topic(thing)).await, 2);
    // Nothing of it has ended or confirmed anything.
    assert!(cloud.push_of(thing).await.unwrap().answers.is_empty());
    assert_eq!(cloud.confirmed(thing).await, Settings::new());
    device.confirm(&command).await;
    foreign.confirm(&others).await;
    for thing in [thing, &foreign.thing] {
        let pushed = cloud.pushed(thing, 1).await.remove(0);
        assert_eq!(pushed.output["value"], 20.5, "{pushed:?}");
    }
}

async fn twice_and_contradicting(cloud: &Cloud, spec: &DeviceSpec) {
    let mut device = MqttDevice::listening(spec).await;
    let command = device.setting().await;
    device.confirm(&command).await;
    device.confirm(&command).await;
    let pushed = cloud.pushed(&device.thing, 1).await.remove(0);
    assert_eq!(pushed.output["status"], "SUCCESS", "{pushed:?}");
    // Not before: the queue keeps no order, and the first answer that is handled counts.
    let contradiction = SettingOutcome::Fail { error: "9".into() };
    handled(cloud, &SettingResponse { outcome: contradiction, ..confirmation(&command) }, &device.thing).await;
    assert_eq!(cloud.confirmed(&device.thing).await, temperatures(20.5));
}

fn confirmation(command: &SettingCommand) -> SettingResponse {
    let outcome = SettingOutcome::Success { value: Some(command.value.clone()) };
    SettingResponse { operation_id: command.operation_id.clone(), name: command.name.clone(), outcome }
}

/// Brings an answer of which nothing is to be seen, and waits until it has been handled. It goes into the queue as the topic
/// rule puts it there: what is published may get there after the queue was found empty.
async fn handled(cloud: &Cloud, response: &SettingResponse, thing: &ThingName) {
    let message = response.encode(thing, 0);
    let payload = serde_json::from_slice(&message.payload).unwrap();
    cloud.deliver("DeviceResponsesQueue", &message.topic, &payload).await;
    eventually("the answer is handled", || async { cloud.is_drained("DeviceResponsesQueue").await.then_some(()) })
        .await;
}

async fn commands(device: &mut MqttDevice, count: usize) -> Vec<SettingCommand> {
    let mut commands = Vec::new();
    while commands.len() < count {
        let command = device.setting().await;
        // A slow test machine may have them sent again.
        if !commands.contains(&command) {
            commands.push(command);
        }
    }
    commands.sort_by(|a, b| a.name.cmp(&b.name));
    commands
}

async fn out_of_order_with_partial_failure(cloud: &Cloud, spec: &DeviceSpec) {
    Cloud::wants(&spec.thing, json!({"SET_TEMP": 20.5, "SET_MODE": "ECO", "SET_CHILD_LOCK": false}));
    let mut device = MqttDevice::listening(spec).await;
    let sent = commands(&mut device, 3).await;
    let operations: BTreeSet<_> = sent.iter().map(|command| &command.operation_id).collect();
    assert_eq!(operations.len(), 3, "each setting is an operation of its own");
    let [lock, mode, temperature] = &sent[..] else { panic!("{sent:?}") };
    device.confirm(temperature).await;
    device.answer(&mode.operation_id, &mode.name, SettingOutcome::Fail { error: "17".into() }).await;
    device.confirm(lock).await;
    let pushed = cloud.pushed(&device.thing, 1).await.remove(0);
    let report =
        "SET_CHILD_LOCK: confirmed as false; SET_MODE: the device failed with error 17; SET_TEMP: confirmed as 20.5";
    assert_eq!(error_of(&pushed), ("SettingFailed", report));
    // Only what failed is sent again.
    let arn = cloud.start_push(&device.thing, json!({})).await;
    // A slow test machine may have had the first ones sent again.
    let again = loop {
        let command = device.setting().await;
        if !operations.contains(&command.operation_id) {
            break command;
        }
    };
    assert_eq!(again.name, mode.name);
    device.confirm(&again).await;
    assert_eq!(cloud.ended_push(&arn).await.output["settings"], json!({"SET_MODE": "ECO"}));
}

async fn some_answers_missing(cloud: &Cloud, spec: &DeviceSpec) {
    Cloud::wants(&spec.thing, json!({"SET_TEMP": 20.5, "SET_MODE": "ECO", "SET_CHILD_LOCK": true}));
    let mut device = MqttDevice::listening(spec).await;
    let sent = commands(&mut device, 3).await;
    device.confirm(&sent[2]).await;
    device.answer(&sent[0].operation_id, &sent[0].name, SettingOutcome::Fail { error: "9".into() }).await;
    let pushed = cloud.pushed(&device.thing, 1).await.remove(0);
    let report = "SET_CHILD_LOCK: FAIL 9; SET_MODE: no answer; SET_TEMP: SUCCESS; each command was sent three times";
    assert_eq!(error_of(&pushed), ("DeviceTimedOut", report));
    let repeats = device.settings_within(Duration::from_millis(100)).await;
    // What is answered by then is not sent again.
    assert_eq!(repeats.last(), Some(&sent[1]), "{repeats:?}");
}

async fn refused_and_other_value(cloud: &Cloud, refusing: &DeviceSpec, clamping: &DeviceSpec) {
    let mut refusing = MqttDevice::listening(refusing).await;
    let mut clamping = MqttDevice::listening(clamping).await;
    let command = refusing.setting().await;
    refusing.answer(&command.operation_id, &command.name, SettingOutcome::Fail { error: "valve stuck".into() }).await;
    let command = clamping.setting().await;
    let clamped = SettingOutcome::Success { value: Some(number(20.0)) };
    clamping.answer(&command.operation_id, &command.name, clamped).await;
    let refused = cloud.pushed(&refusing.thing, 1).await.remove(0);
    assert_eq!(error_of(&refused), ("SettingFailed", "SET_TEMP: the device failed with error valve stuck"));
    assert_eq!(cloud.confirmed(&refusing.thing).await, Settings::new());
    let other = cloud.pushed(&clamping.thing, 1).await.remove(0);
    assert_eq!(error_of(&other), ("SettingFailed", "SET_TEMP: the device has set 20, 20.5 was wanted"));
    assert_eq!(cloud.confirmed(&clamping.thing).await, serde_json::from_value(json!({"SET_TEMP": 20})).unwrap());
}

/// The device comes online again before it has answered: the newer session's push is the only one.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_new_session_takes_over_the_push_of_the_last() {
    let _quiet = tests::undisturbed().await;
    let cloud = Cloud::connect().await;
    let devices = cloud.provision_with_profiles("sessions", 1).await;
    let thing = devices[0].thing.clone();
    Cloud::wants(&thing, temperature(22.5));
    let mut device = MqttDevice::listening(&devices[0]).await;
    let old = device.setting().await;
    drop(device);
    Cloud::wants(&thing, temperature(23.5));
    let mut device = MqttDevice::listening(&devices[0]).await;
    let new = loop {
        let command = device.setting().await;
        if command.operation_id != old.operation_id {
            break command;
        }
    };
    assert_eq!(new.value, number(23.5));
    // The answer to the old command comes too late for anything; so does an execution of an even older session.
    handled(&cloud, &confirmation(&old), &thing).await;
    let older = cloud.ended_push(&cloud.start_push(&thing, json!({"connectedAt": 1})).await).await;
    assert_eq!((older.status.clone(), &older.output["status"]), (Succeeded, &json!("SUPERSEDED")), "{older:?}");
    assert_eq!(cloud.confirmed(&thing).await, Settings::new());
    device.confirm(&new).await;
    let pushes = cloud.pushed(&thing, 3).await;
    let of = |command: &SettingCommand| {
        pushes.iter().find(|pushed| command.operation_id.as_str().starts_with(&pushed.name)).unwrap()
    };
    assert_eq!(of(&old).output["status"], "SUPERSEDED");
    assert_eq!(of(&new).output["value"], 23.5);
    assert_eq!(cloud.confirmed(&thing).await, temperatures(23.5));
    // The broker may bring the old command after the new one: then the device has the old value.
    device.confirm(&old).await;
    eventually("nobody knows what the device has", || async { cloud.confirmed(&thing).await.is_empty().then_some(()) })
        .await;
}

fn presence(thing: &str, kind: &str, session: &str, version: i64, timestamp: i64) -> (String, Value) {
    let event = json!({
        "clientId": thing, "timestamp": timestamp, "eventType": kind, "sessionIdentifier": session,
        "principalIdentifier": "p", "ipAddress": "127.0.0.1", "versionNumber": version,
    });
    (format!("$aws/events/presence/{kind}/{thing}"), event)
}

/// Kind, session, version and time of a presence event.
type Event = (&'static str, &'static str, i64, i64);

/// Each case: what the broker says, event by event, and how many pushes are started.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_presence_matrix() {
    let hour = 3_600_000;
    let (on, off) = ("connected", "disconnected");
    let cases: Vec<(&str, Vec<Event>, usize)> = vec![
        ("one session", vec![(on, "a", 0, 1)], 1),
        ("its connect three times", vec![(on, "a", 0, 1), (on, "a", 0, 1), (on, "a", 0, 1)], 1),
        ("connect, disconnect", vec![(on, "a", 0, 1), (off, "a", 0, 2)], 1),
        ("disconnect before its connect", vec![(off, "a", 0, 2), (on, "a", 0, 1)], 0),
        ("only a disconnect", vec![(off, "a", 0, 2)], 0),
        ("the connect again after the disconnect", vec![(on, "a", 0, 1), (off, "a", 0, 2), (on, "a", 0, 1)], 1),
        ("flapping", vec![(on, "a", 0, 1), (off, "a", 0, 2), (on, "b", 1, 3), (off, "b", 1, 4), (on, "c", 2, 5)], 3),
        ("a stale connect", vec![(on, "b", 6, 9), (on, "a", 5, 1)], 1),
        ("a stale disconnect, then the connect again", vec![(on, "b", 6, 9), (off, "a", 5, 8), (on, "b", 6, 9)], 1),
        ("a persistent session's next connection", vec![(on, "a", 0, 1), (off, "a", 0, 2), (on, "a", 1, 3)], 2),
        ("the same number, another session", vec![(on, "a", 4, 1), (on, "b", 4, 2)], 2),
        ("the number is 0 again after an hour", vec![(on, "a", 9, 1), (off, "a", 9, 2), (on, "b", 0, hour + 3)], 2),
        ("the number is 0 again, far too soon", vec![(on, "a", 9, 1), (off, "a", 9, 2), (on, "b", 0, 60_000)], 1),
    ];
    let cloud = &Cloud::connect().await;
    let run = &uuid::Uuid::new_v4().simple().to_string()[..8];
    // One event of each case at a time, so that the order of each is what the case says.
    let thing = |case: usize| format!("presence-{run}-{case}");
    // Things of a user whose profile the settings API does not know: their pushes end at once.
    let profile = format!("user-{run}");
    settings_api().remove_profile(&profile);
    for case in 0..cases.len() {
        let attributes = AttributePayload::builder().attributes("externalId", &profile).build();
        let create = cloud.iot.create_thing().thing_name(thing(case)).attribute_payload(attributes);
        create.send().await.unwrap();
    }
    let longest = cases.iter().map(|(_, events, _)| events.len()).max().unwrap();
    for round in 0..longest {
        let due = cases.iter().enumerate().filter_map(|(case, (_, events, _))| Some((case, *events.get(round)?)));
        join_all(due.map(|(case, (kind, session, version, timestamp))| async move {
            let (topic, event) = presence(&thing(case), kind, session, version, timestamp);
            cloud.deliver("PresenceQueue", &topic, &event).await;
        }))
        .await;
        presence_settled(cloud).await;
    }
    for (case, (what, _, expected)) in cases.iter().enumerate() {
        let pushes = cloud.pushed(&thing(case).parse().unwrap(), *expected).await;
        assert_eq!(pushes.len(), *expected, "{what}");
        // Unless a later session has taken over already.
        let expected = |pushed: &Pushed| ["ProfileNotFound", ""].contains(&pushed.error.0.as_str());
        assert!(pushes.iter().all(expected), "{what}: {pushes:?}");
    }
    // A person's test client is no thing, and no error either.
    let (topic, event) = presence(&format!("mqtt explorer {run}"), on, "a", 0, 1);
    cloud.deliver("PresenceQueue", &topic, &event).await;
    presence_settled(cloud).await;
    assert_eq!(cloud.dead_letters(&format!("mqtt explorer {run}")).await, 0);
}

/// What goes wrong with requests for a profile, the profile, how its push ends, and how many requests that took.
type ApiCase = (Vec<ApiFault>, Value, Result<f64, (&'static str, &'static str)>, usize);

/// What the third party does wrong, and what becomes of it.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_settings_api_has_its_faults() {
    let cloud = &Cloud::connect().await;
    let devices = cloud.provision_with_profiles("api", 13).await;
    let busy = |seconds| ApiFault::TooManyRequests { retry_after: seconds };
    let ok = || Ok(21.0);
    let cases: Vec<ApiCase> = vec![
        (vec![busy(4)], temperature(21.0), ok(), 2),
        (vec![ApiFault::Status(500), ApiFault::Status(503)], temperature(21.0), ok(), 3),
        (vec![ApiFault::Slow(Duration::from_secs(7))], temperature(21.0), ok(), 2),
        // More than one invocation waits for: the state machine tries again later.
        (vec![busy(60)], temperature(21.0), ok(), 2),
        (vec![ApiFault::Status(500); 3], temperature(21.0), ok(), 4),
        // The key may have been rotated, so it is read and tried once more.
        (vec![ApiFault::Status(403)], temperature(21.0), ok(), 2),
        (vec![ApiFault::Status(403); 2], json!({}), Err(("SettingsApiRefused", "403")), 2),
        (vec![ApiFault::Status(400)], json!({}), Err(("SettingsApiRefused", "400")), 1),
        (vec![ApiFault::Malformed], json!({}), Err(("InvalidSettings", "the settings API's answer")), 1),
        (vec![], temperature(900.0), Err(("InvalidSettings", "SET_TEMP: 900.0 is greater than the maximum of 35")), 1),
        (
            vec![],
            json!({"SET_ROOM_NAME": "x".repeat(70_000)}),
            Err(("InvalidSettings", "got more than 65536 bytes")),
            1,
        ),
        (vec![], json!({"SET_ROOM_NAME": "x".repeat(40_000)}), Err(("InvalidSettings", "SET_ROOM_NAME: ")), 1),
        (vec![], Value::Null, Err(("ProfileNotFound", "knows no profile")), 1),
    ];
    assert_eq!(cases.len(), devices.len());
    let api = settings_api();
    let profile = |thing: &ThingName| format!("user-{thing}");
    for (spec, (faults, settings, ..)) in devices.iter().zip(&cases) {
        if settings.is_null() {
            api.remove_profile(&profile(&spec.thing));
        } else {
            Cloud::wants(&spec.thing, settings.clone());
        }
        api.fail(&profile(&spec.thing), faults.clone());
    }
    let fleet = Cloud::run(devices.clone(), 0).await;
    for (spec, (faults, _, end, requests)) in devices.iter().zip(&cases) {
        let pushed = cloud.pushed(&spec.thing, 1).await.remove(0);
        match end {
            Ok(value) => assert_eq!(pushed.output["value"].as_f64(), Some(*value), "{faults:?}: {pushed:?}"),
            Err((name, cause)) => {
                assert!(pushed.error.0 == *name && pushed.error.1.contains(cause), "{faults:?}: {pushed:?}");
            }
        }
        let times = api.request_times(&profile(&spec.thing));
        assert_eq!(times.len(), *requests, "{faults:?}");
        // It was asked again when it had said, and not before. What is longer than a call may take, nobody waits for: the state
        // machine has waits of its own.
        if let Some(ApiFault::TooManyRequests { retry_after: retry_after @ ..10 }) = faults.first() {
            assert!(times[1] - times[0] >= Duration::from_secs(*retry_after), "{faults:?}");
        }
        assert!(pushed.error.1.len() < 1000, "{pushed:?}");
    }
    fleet.stop().await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_thing_without_a_profile_and_no_thing_at_all() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("no-profile", 1, ProtocolMix::Mixed).await;
    let pushed = cloud.ended_push(&cloud.start_push(&devices[0].thing, json!({})).await).await;
    let cause = format!("the thing {} has no attribute externalId", devices[0].thing);
    assert_eq!((pushed.status.clone(), error_of(&pushed)), (Failed, ("ExternalIdMissing", cause.as_str())));
    let nobody = cloud.ended_push(&cloud.start_push(&"nobody".parse().unwrap(), json!({})).await).await;
    assert_eq!(error_of(&nobody), ("DeviceNotFound", "the registry has no thing nobody"));
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_fault_of_a_device_has_its_end() {
    let _quiet = tests::undisturbed().await;
    // The error, or none; and how often the device applies something.
    let cases = [
        (Fault::Mute, Some("DeviceTimedOut"), 0),
        (Fault::Refuse, Some("SettingFailed"), 0),
        (Fault::WrongOperation, Some("DeviceTimedOut"), 1),
        (Fault::Duplicate, None, 1),
        // Later than the first wait: the command is sent again, and done once.
        (Fault::Delay, None, 1),
        // Before it answers; the new session's push takes over.
        (Fault::Disconnect, None, 2),
    ];
    let cloud = Cloud::connect().await;
    let mut devices = cloud.provision_with_profiles("push-faults", cases.len()).await;
    with_faults(&mut devices, cases.iter().map(|(fault, ..)| Faults(vec![*fault])));
    let things = names(&devices);
    for thing in &things {
        Cloud::wants(thing, temperature(17.5));
    }
    let fleet = Cloud::run_with(devices, 0, |options| {
        options.fault_timing.delay = Duration::from_secs(28);
        options.fault_timing.offline_for = Duration::from_secs(1);
    })
    .await;
    for (thing, (fault, error, applied)) in things.iter().zip(cases) {
        let sessions = if fault == Fault::Disconnect { 2 } else { 1 };
        let pushes = cloud.pushed(thing, sessions).await;
        let last = pushes.last().unwrap();
        assert_eq!((pushes.len(), last.error.0.as_str()), (sessions, error.unwrap_or_default()), "{fault}: {pushes:?}");
        if fault == Fault::Disconnect {
            assert_eq!(pushes[0].output["status"], "SUPERSEDED");
        }
        assert_eq!(fleet.applied(thing), applied, "{fault}");
    }
    fleet.stop().await;
}

/// Whatever dies on the way is delivered or tried again.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn killed_functions_lose_no_push() {
    let cloud = Cloud::connect().await;
    let devices = cloud.provision_with_profiles("push-killed", 12).await;
    let things = names(&devices);
    let profile = |thing: &ThingName| format!("user-{thing}");
    for thing in &things {
        Cloud::wants(thing, temperature(16.5));
        settings_api().fail(&profile(thing), vec![ApiFault::Slow(Duration::from_secs(3))]);
    }
    let prefix = things[0].as_str().rsplit_once('-').unwrap().0;
    let kills = [
        ("TrackPresence", "dynamodb.UpdateItem"),
        ("StartWorkflow", "states.StartExecution"),
        ("PublishToDevice", "dynamodb.UpdateItem"),
        ("PublishToDevice", "iotdata.Publish"),
        ("HandleDeviceResponse", "dynamodb.UpdateItem"),
    ];
    let proxy = Proxy::from_environment();
    proxy.disturb(&kills.map(|(function, operation)| Proxy::kill_after(prefix, function, operation, 1))).await;
    // Pushes of other tests have the same functions.
    let others_wait = tests::without_others().await;
    let fleet = Cloud::run(devices, 0).await;
    let requests = || {
        let requests: Vec<usize> = things.iter().map(|thing| settings_api().requests(&profile(thing))).collect();
        saw(format!("requests for the profiles: {requests:?}"));
        requests
    };
    // It dies while it waits for the API, which takes seconds to answer: nobody may look away for so long.
    let asked = || async { requests().contains(&1).then_some(()) };
    tests::look(PATIENCE, Duration::from_millis(20), "the API is asked", asked).await.unwrap();
    assert!(kill_functions("GetDeviceSettingsFunction") > 0);
    let again = || async { requests().into_iter().any(|count| count > 1).then_some(()) };
    eventually("the API is asked again for the same profile", again).await;
    drop(others_wait);
    for thing in &things {
        let pushes = cloud.pushed(thing, 1).await;
        assert!(pushes.len() == 1 && pushes[0].status == Succeeded, "{pushes:?}");
        assert_eq!(fleet.applied(thing), 1);
    }
    assert_eq!(proxy.disturbed().await[prefix].len(), kills.len());
    fleet.stop().await;
}

/// How many may ask the settings API at once: the template's `SettingsApiConcurrency`, as long as nobody gives it another value.
const AT_ONCE: usize = 5;

/// A settings API that takes requests and never answers holds up those who wait for it, few at a time, and no upgrade. When it is
/// back, every device gets its settings.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_upgrade_ends_while_the_settings_api_hangs() {
    const PUSHES: usize = 40;
    let _others_wait = tests::without_others().await;
    let cloud = Cloud::connect().await;
    let (group, others) = cloud.provision("hang-upgrade", 4, ProtocolMix::Mixed).await;
    let others_things = names(&others);
    let image = cloud.upload("2.0.0", 10_000).await;
    let upgrades = Cloud::run(others, 1).await;
    Cloud::all_connected(&upgrades).await;
    let devices = cloud.provision_with_profiles("hang", PUSHES).await;
    let things = names(&devices);
    for thing in &things {
        Cloud::wants(thing, temperature(14.5));
    }
    let prefix = things[0].as_str().rsplit_once('-').unwrap().0;
    let api = settings_api();
    let hang = api.hang(&format!("user-{prefix}-"));
    let fleet = Cloud::run(devices, 0).await;
    eventually("as many calls hang as may", || async {
        saw(format!("{} calls at once", api.most_at_once()));
        (api.most_at_once() >= AT_ONCE).then_some(())
    })
    .await;
    let job = cloud.create_job(&group, &image, json!({})).await;
    for (thing, ended) in cloud.ended(&job, &others_things).await {
        assert_eq!(ended, tests::Ended::new(JobExecutionStatus::Succeeded, "Upgraded"), "{thing}");
    }
    assert!(things.iter().all(|thing| fleet.applied(thing) == 0), "the API hangs");
    assert_eq!(api.most_at_once(), AT_ONCE);
    drop(hang);
    for thing in &things {
        let pushes = cloud.pushed(thing, 1).await;
        assert!(pushes.len() == 1 && pushes[0].status == Succeeded, "{pushes:?}");
        assert_eq!(fleet.applied(thing), 1, "{thing}");
    }
    assert_eq!(api.most_at_once(), AT_ONCE);
    assert_eq!(cloud.dead_letters(prefix).await, 0);
    fleet.stop().await;
    upgrades.stop().await;
}

/// What the table of settings should do to an item, in plain words.
#[derive(Default)]
struct Expected {
    newest_session: Option<i64>,
    push: Option<Push>,
    confirmed: Settings,
}

impl Expected {
    fn is_superseded(&self, session: i64) -> bool {
        self.newest_session.is_some_and(|newest| newest > session)
    }

    /// What is confirmed; none if there is a newer session.
    fn claim(&mut self, session: i64) -> Option<Settings> {
        if self.is_superseded(session) {
            return None;
        }
        self.newest_session = Some(session);
        Some(self.confirmed.clone())
    }

    /// What is sent; none if there is a newer session.
    fn begin(&mut self, push: &Push) -> Option<Settings> {
        let superseded = self.is_superseded(push.connected_at);
        match &mut self.push {
            Some(known) if known.operation_id == push.operation_id => {
                if push.attempt < known.attempt {
                    return Some(Settings::new());
                }
                if superseded {
                    return None;
                }
                known.attempt = push.attempt;
                known.task_token.clone_from(&push.task_token);
                let answers = &known.answers;
                Some(known.wanted.clone().into_iter().filter(|(name, _)| !answers.contains_key(name)).collect())
            }
            _ if superseded => None,
            _ => {
                self.newest_session = Some(push.connected_at);
                self.confirmed.retain(|name, _| !push.wanted.contains_key(name));
                self.push = Some(push.clone());
                Some(push.wanted.clone())
            }
        }
    }

    fn answer(&mut self, response: &SettingResponse) {
        let current = self.push.as_mut().filter(|push| response.push().as_ref() == Some(&push.operation_id));
        match (current, &response.outcome) {
            // Carried out after the last push, perhaps.
            (None, SettingOutcome::Success { value }) if self.confirmed.get(&response.name) != value.as_ref() => {
                self.confirmed.remove(&response.name);
            }
            (Some(push), outcome) if !push.answers.contains_key(&response.name) => {
                let Some(wanted) = push.wanted.get(&response.name) else { return };
                push.answers.insert(response.name.clone(), outcome.clone());
                if let SettingOutcome::Success { value } = outcome {
                    let value = value.clone().unwrap_or_else(|| wanted.clone());
                    self.confirmed.insert(response.name.clone(), value);
                }
            }
            _ => {}
        }
    }
}

/// The conditions of the writes are the emulator's to evaluate: it does what the rules say, whatever comes in whatever order.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_table_follows_the_rules_of_a_push() {
    let cloud = Cloud::connect().await;
    let table = SettingsTable::new(&cloud.config, cloud.output("SettingsTableName").to_owned());
    let mut next = seeded_choices();
    let names: Vec<SettingName> = ["SET_TEMP", "SET_MODE", "SET_LOCK"].map(|name| name.parse().unwrap()).into();
    for _ in 0..60 {
        let thing: ThingName = format!("table-{}", uuid::Uuid::new_v4().simple()).parse().unwrap();
        let mut expected = Expected::default();
        for _ in 0..15 {
            let session = next(3);
            let push: OperationId = format!("session-{session}").parse().unwrap();
            let value = SettingValue::Number(next(4).into());
            let name = names[usize::try_from(next(3)).unwrap()].clone();
            let connected_at = i64::try_from(session).unwrap();
            let kind = next(4);
            if kind == 0 {
                assert_eq!(table.claim(&thing, connected_at).await.ok(), expected.claim(connected_at));
            } else if kind == 1 {
                let wait = Wait {
                    task_token: format!("token-{}", next(1000)),
                    attempt: u32::try_from(next(3)).unwrap(),
                    expected_version: None,
                };
                let wanted = [(name, value), (names[0].clone(), SettingValue::Boolean(true))].into();
                let push = Push::new(push, connected_at, wait, wanted);
                assert_eq!(table.begin(&thing, &push).await.ok(), expected.begin(&push));
            } else {
                let outcome = match next(3) {
                    0 => SettingOutcome::Fail { error: "9".into() },
                    1 => SettingOutcome::Success { value: None },
                    _ => SettingOutcome::Success { value: Some(value) },
                };
                let operation_id = protocol::settings::operation_of(&push, &name).unwrap();
                let response = SettingResponse { operation_id, name, outcome };
                table.answer(&thing, &response).await.expect("an outcome");
                expected.answer(&response);
            }
            assert_eq!(cloud.push_of(&thing).await, expected.push);
            assert_eq!(cloud.confirmed(&thing).await, expected.confirmed);
        }
    }
}

/// Five hundred devices at once: each gets its settings, once, and nothing is left over.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_storm_of_connections() {
    const DEVICES: usize = 500;
    let _others_wait = tests::without_others().await;
    let cloud = Cloud::connect().await;
    let devices = cloud.provision_with_profiles("storm", DEVICES).await;
    let things = names(&devices);
    for thing in &things {
        Cloud::wants(thing, temperature(15.5));
    }
    let prefix = format!("{}-", things[0].as_str().rsplit_once('-').unwrap().0);
    let begin = std::time::Instant::now();
    let fleet = Cloud::run(devices, 0).await;
    let executions = eventually("the pushes to all devices end", || async {
        let list = cloud.step_functions.list_executions().state_machine_arn(cloud.output("ConfigPushArn"));
        let all = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
        let storm: Vec<_> = all.into_iter().filter(|execution| execution.name.starts_with(&prefix)).collect();
        let running = storm.iter().filter(|execution| execution.status == Running);
        let running: Vec<_> = running.map(|execution| execution.name.as_str()).collect();
        saw(format!("{} pushes, of which these run: {running:?}", storm.len()));
        let ended = running.is_empty();
        (storm.len() >= DEVICES && ended).then_some(storm)
    })
    .await;
    presence_settled(&cloud).await;
    println!("{DEVICES} devices connected and had their settings after {:.1} s", begin.elapsed().as_secs_f32());
    assert_eq!(executions.len(), DEVICES);
    assert!(executions.iter().all(|execution| execution.status == Succeeded), "{executions:?}");
    for thing in &things {
        let own = executions.iter().filter(|execution| execution.name.starts_with(&format!("{thing}-"))).count();
        assert_eq!((own, fleet.applied(thing)), (1, 1), "{thing}");
    }
    assert_eq!(cloud.dead_letters(&prefix).await, 0);
    fleet.stop().await;
}
