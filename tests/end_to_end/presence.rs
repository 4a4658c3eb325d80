//! Who takes part: only things that have a user. Whoever else uses the broker starts nothing, leaves nothing behind and raises no
//! alarm.
//!
//! `cargo xtask test` runs these tests; they need its local cloud.
#![allow(clippy::unwrap_used)]

use aws_sdk_dynamodb::types::AttributeValue;

use base64::{Engine, prelude::BASE64_STANDARD};
use device_simulator::DeviceSpec;
use device_simulator::provision::ProtocolMix;
use protocol::recovery::{UPDATE_REPORTS_TOPIC, UpdateReport, UpdateStatus};
use protocol::{Publication, ThingName};
use rumqttc::QoS;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use tests::{Attempt, Cloud, MqttDevice, WorkerProcess, allows, alone, credential, eventually, now, saw};

/// The longest that a workflow can wait for a device, in seconds: the limit of its state machine.
const LONGEST_WAIT: i64 = 14 * 24 * 3600;

/// A client's item in the table of connections.
async fn item(cloud: &Cloud, client: &str) -> Option<HashMap<String, AttributeValue>> {
    let get = cloud.dynamodb.get_item().table_name(cloud.output("ConnectionsTableName")).consistent_read(true);
    let item = get.key("thing", AttributeValue::S(client.to_owned())).send().await.unwrap().item;
    saw(format!("the connection of {client}: {item:?}"));
    item
}

/// For how many seconds an item is kept from now on; none if for ever.
fn kept_for(item: &HashMap<String, AttributeValue>) -> Option<i64> {
    Some(item.get("expiresAt")?.as_n().unwrap().parse::<i64>().unwrap() - now() / 1000)
}

/// Waits until the client's connection is known as open, or as closed: for how long that is kept.
async fn connection(cloud: &Cloud, client: &str, open: bool) -> i64 {
    let what = format!("{client} is known as {}", if open { "connected" } else { "disconnected" });
    let found = eventually(&what, || async {
        let item = item(cloud, client).await?;
        (item.get("connected")?.as_bool() == Ok(&open)).then_some(item)
    });
    kept_for(&found.await).unwrap_or_else(|| panic!("the item of {client} is kept for ever"))
}

/// Waits until all that was said so far has been handled: what is said now starts a push and a recovery, and then nothing waits.
async fn settled(cloud: &Cloud) {
    let participant = cloud.provision_with_profiles("participant", 1).await.remove(0);
    Cloud::wants(&participant.thing, json!({"SET_TEMP": 20.5}));
    let mut device = MqttDevice::listening(&participant).await;
    let command = device.setting().await;
    device.confirm(&command).await;
    assert_eq!(cloud.pushed(&participant.thing, 1).await[0].output["status"], "SUCCESS");
    cloud.fail(&participant.thing, [now()]).await;
    cloud.await_recovery(&participant.thing, "one failure", |device| device.attempts == 1).await;
    let queues = ["PresenceQueue", "SessionsQueue", "FailedUpdatesQueue", "SucceededUpdatesQueue", "RecoveriesQueue"];
    cloud.drained(&queues).await;
}

async fn started_nothing(cloud: &Cloud, client: &str) {
    for machine in ["ConfigPushArn", "FailedUpdateRecoveryArn"] {
        let executions = cloud.executions_of(machine, &client.parse().unwrap()).await;
        assert!(executions.is_empty(), "{client} has started {executions:?}");
    }
}

/// A certificate that may do what the console's test client may: anything.
async fn console(cloud: &Cloud) -> PathBuf {
    let name = format!("console-{}", uuid::Uuid::new_v4().simple());
    let document = json!({"Version": "2012-10-17", "Statement": [{
        "Effect": "Allow", "Action": ["iot:Connect", "iot:Subscribe", "iot:Receive", "iot:Publish"], "Resource": "*",
    }]});
    cloud.iot.create_policy().policy_name(&name).policy_document(document.to_string()).send().await.unwrap();
    let made = cloud.iot.create_keys_and_certificate().set_as_active(true).send().await.unwrap();
    let attach = cloud.iot.attach_policy().policy_name(&name).target(made.certificate_arn.unwrap());
    attach.send().await.unwrap();
    let folder = Cloud::folder(&name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("certificate.pem"), made.certificate_pem.unwrap()).unwrap();
    std::fs::write(folder.join("private.key"), made.key_pair.unwrap().private_key.unwrap()).unwrap();
    folder
}

fn report(thing: &str, status: UpdateStatus) -> UpdateReport {
    UpdateReport { thing_name: thing.parse().unwrap(), timestamp: now(), status, model: None, firmware: None }
}

/// The broker tells of a refused connection, and a client that has no part in this can hear it.
async fn refuse(broker: &mut MqttDevice, device: &DeviceSpec, client: &str) -> Value {
    broker.subscribe(format!("$aws/events/presence/connect_failed/{client}"), QoS::AtLeastOnce).await;
    assert!(!allows(Some(&credential(&device.certificates)), client, &Attempt::Connect).await);
    serde_json::from_slice(&broker.message().await.payload).unwrap()
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn presence_of_what_is_no_thing_or_has_no_user_starts_nothing_and_expires() {
    let cloud = Cloud::connect().await;
    let run = &uuid::Uuid::new_v4().simple().to_string()[..8];
    let (_, devices) = cloud.provision("no-user", 1, ProtocolMix::Mixed).await;
    let no_user = &devices[0].thing;
    let device = MqttDevice::connect(&devices[0], true).await;
    let console_id = format!("iotconsole-{run}-a776-472a-9121-000000000000");
    let folder = console(&cloud).await;
    let mut console = MqttDevice::connect_as(console_id.parse().unwrap(), &console_id, &folder, true).await;

    let refused = format!("gateway-{run}");
    let event = refuse(&mut console, &devices[0], &refused).await;
    assert_eq!((event["eventType"].as_str(), event.get("versionNumber")), (Some("connect_failed"), None), "{event}");
    // The rule leaves these out; were they to come all the same, they are nobody's fault.
    for kind in ["connect_failed", "of_the_future"] {
        let event = json!({
            "clientId": refused, "timestamp": now(), "eventType": kind, "connectFailureReason": "AUTHORIZATION_FAILED",
            "principalIdentifier": "0123456789abcdef", "sessionIdentifier": "00000000-0000-0000-0000-000000000000",
            "ipAddress": "192.0.2.1",
        });
        cloud.deliver("PresenceQueue", &format!("$aws/events/presence/{kind}/{refused}"), &event).await;
    }

    let unregistered: ThingName = format!("unregistered-{run}").parse().unwrap();
    let begin = now();
    cloud.fail(&unregistered, begin..begin + 10).await;
    cloud.report(&unregistered, UpdateStatus::Succeeded, begin + 10).await;
    // What is behind somebody's gateway, and what is of quite another kind.
    let behind = format!("behind-{run}");
    for status in [UpdateStatus::Failed, UpdateStatus::Succeeded] {
        device.publish(report(&behind, status).encode()).await;
    }
    for foreign in
        [json!({"sensor": run}), json!({"status": "failed", "pump": 7}), json!({"status": 7, "_id_": behind})]
    {
        let (topic, payload) = (UPDATE_REPORTS_TOPIC.to_owned(), foreign.to_string().into_bytes());
        device.publish(Publication { topic, payload }).await;
    }

    let connected = connection(&cloud, &console_id, true).await;
    connection(&cloud, no_user.as_str(), true).await;
    settled(&cloud).await;
    for client in [&console_id, no_user.as_str(), &refused, unregistered.as_str(), &behind] {
        started_nothing(&cloud, client).await;
    }
    assert_eq!(item(&cloud, &refused).await, None);
    assert_eq!(cloud.recovery(&unregistered).await, fleet::recovery::Device::default());
    assert_eq!(cloud.recovery(&behind.parse().unwrap()).await, fleet::recovery::Device::default());
    // By the clients' names, and by the beginning of what was said with credentials of a person.
    let reported = BASE64_STANDARD.encode(format!(r#"{{"_id_":"{unregistered}","#)).replace('=', "");
    for text in [&console_id, no_user.as_str(), &refused, &reported[..reported.len() - 2]] {
        assert_eq!(cloud.dead_letters(text).await, 0, "{text}");
    }

    drop(console);
    let disconnected = connection(&cloud, &console_id, false).await;
    assert!(LONGEST_WAIT < disconnected && disconnected < connected, "{disconnected} s, {connected} s");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn presence_of_a_thing_that_is_awaited_is_kept_for_longer_than_it_can_be() {
    let cloud = Cloud::connect().await;
    let (target, devices) = cloud.provision("awaited", 1, ProtocolMix::Mixed).await;
    let thing = devices[0].thing.as_str();
    let image = cloud.upload("2.0.0", 1000).await;
    let job = cloud.create_job(&target, &image, json!({})).await;
    let awaited = eventually("the workflow waits for the device", || async {
        item(&cloud, thing).await.filter(|item| item.contains_key("awaitedBy"))
    });
    let kept = kept_for(&awaited.await);
    assert!(kept.is_some_and(|seconds| seconds > LONGEST_WAIT), "{kept:?}");
    let device = MqttDevice::connect(&devices[0], true).await;
    let found = eventually("nobody waits any more", || async {
        item(&cloud, thing).await.filter(|item| !item.contains_key("awaitedBy"))
    });
    assert!(kept_for(&found.await).is_some_and(|seconds| seconds > LONGEST_WAIT));
    drop(device);
    cloud.iot.cancel_job().job_id(&job).force(true).send().await.unwrap();
}

/// A command of the README, with the stack's outputs in place.
fn of_readme(cloud: &Cloud, begins: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let from = readme.find(begins).unwrap_or_else(|| panic!("README.md has no {begins:?}"));
    let command = readme[from + begins.len()..].replace("\\\n", " ");
    let words = command.lines().next().unwrap().replace("$(output ", "$(").replace('"', "");
    let word = |word: &str| match word.strip_prefix("$(").and_then(|word| word.strip_suffix(')')) {
        Some(output) => cloud.output(output).to_owned(),
        None => word.to_owned(),
    };
    words.split_whitespace().map(word).collect()
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn presence_of_a_sensor_and_a_worker_as_the_readme_makes_them_starts_no_push() {
    let cloud = Cloud::connect().await;
    let folder = Cloud::folder("readme-sensors");
    std::fs::create_dir_all(&folder).unwrap();
    let provision = of_readme(&cloud, "cargo run --bin device-simulator -- provision --count 3 --prefix sensor ");
    let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("device-simulator");
    let mut command = Command::new(program);
    command.current_dir(&folder).args(["provision", "--count", "3", "--prefix", "sensor"]).args(provision);
    assert!(command.status().unwrap().success());
    let sensors = DeviceSpec::load_all(&folder.join("sensors")).unwrap();
    let sensor = MqttDevice::connect(&sensors[0], true).await;

    let _alone = alone("tenant2").await;
    let worker = format!("worker-{}", uuid::Uuid::new_v4().simple());
    let process = WorkerProcess::start(&cloud, "tenant2", &worker, "").await;

    connection(&cloud, sensors[0].thing.as_str(), true).await;
    settled(&cloud).await;
    started_nothing(&cloud, sensors[0].thing.as_str()).await;
    let list = cloud.step_functions.list_executions().state_machine_arn(cloud.output("ConfigPushArn"));
    let pushes = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    assert!(!pushes.iter().any(|push| push.name.contains(&worker)), "{pushes:?}");
    assert_eq!(cloud.dead_letters(&worker).await, 0);
    assert_eq!(cloud.dead_letters(sensors[0].thing.as_str()).await, 0);
    drop((sensor, process));
}
