//! Doubles of the five public devices, with their habits on the wire. Each must work unmodified but for endpoint, certificates
//! and trust.
//!
//! | device | double | its habits |
//! | --- | --- | --- |
//! | USP agent | the simulator, `--habits reference-agent` | no attribute `protocol`, version with the address's query, broken JSON after a failed boot, a boot after a failed download |
//! | configuration device | [`MqttDevice::of_the_field`] | clean session, subscribes at `QoS` 0 after it has connected, answers ten seconds later |
//! | failed-update reporter | [`MqttDevice::of_the_field`] | texts for numbers, milliseconds, only `iot/device/data` |
//! | monitoring device | [`MqttDevice::of_the_field`] | client id `monitoring-device`, readings without id and time, connects again without subscribing again, crashes on a remediation without `body` |
//! | worker on premises | [`MqttDevice::of_the_field`] | client id `mqtt-container-client`, persistent session, echoes `TaskToken`, null if it could not read the message |
//!
//! Their bytes as recorded are read in `crates/protocol/tests/captures.rs`.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::JobExecutionStatus::{Failed, Succeeded};
use device_simulator::provision::{DevicePolicy, ProtocolMix, ProvisionOptions};
use device_simulator::{DeviceSpec, Habits};
use protocol::{
    Building, Command, DeviceFailure, OperationId, ProtocolName, Publication, ReplyTo, Response, Step, StepOutcome,
    ThingName,
};
use rumqttc::QoS;
use serde_json::{Value, json};
use std::time::Duration;
use tests::{Cloud, Ended, MqttDevice, ScriptedDevice, eventually, meeting, names, now, saw};

const UPGRADE: [Step; 4] =
    [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted];

async fn await_attribute(cloud: &Cloud, thing: &ThingName, name: &str, value: &str) {
    let what = format!("the attribute {name} of {thing} becomes {value}");
    eventually(&what, || async { (cloud.attribute(thing, name).await.as_deref() == Some(value)).then_some(()) }).await;
}

/// A job with the three fields of README, whose image lies where README says: its id.
async fn upgrade(cloud: &Cloud, target: &str, version: &str) -> String {
    upgrade_from(cloud, target, version, "").await
}

/// The same with the image in a folder below that one, which a fourth field names.
async fn upgrade_from(cloud: &Cloud, target: &str, version: &str, folder: &str) -> String {
    let key = format!("firmware/{folder}{version}");
    let put = cloud.s3.put_object().bucket(cloud.output("FirmwareBucketName")).key(&key);
    put.body(vec![7; 10_000].into()).send().await.unwrap();
    let mut job = json!({"firmwareVersion": version, "upgradeTrigger": "manual", "targetArn": target});
    if !folder.is_empty() {
        job["artifact"] = json!({"key": key});
    }
    cloud.invoke_create_job(&job).await.unwrap()["jobId"].as_str().unwrap().to_owned()
}

async fn end_of(cloud: &Cloud, job: &str, thing: &ThingName) -> Ended {
    cloud.ended(job, std::slice::from_ref(thing)).await.remove(thing).unwrap()
}

/// Nothing that is kept of a job execution lets its reader in.
async fn assert_no_signature(cloud: &Cloud, job: &str, thing: &ThingName) {
    let (_, details) = cloud.job_execution(job, thing).await.unwrap();
    assert!(!format!("{details:?}").contains("X-Amz-"), "{details:?}");
    for execution in cloud.executions_ended(job, 1).await {
        let history = cloud.step_functions.get_execution_history().execution_arn(execution.execution_arn);
        let events = history.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
        assert!(!format!("{events:?}").contains("X-Amz-"), "{events:?}");
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_public_usp_agent_is_upgraded_with_three_fields() {
    let cloud = Cloud::connect().await;
    let own = |options: &mut ProvisionOptions| {
        options.protocol_attribute = false;
        options.policy = DevicePolicy::Own("public-usp-agent".to_owned());
    };
    let (group, devices) = cloud.provision_with("agent", 1, ProtocolMix::All(ProtocolName::Usp), own).await;
    let thing = devices[0].thing.clone();
    assert_eq!(cloud.attribute(&thing, "protocol").await, None);
    let fleet = Cloud::run_with(devices, 3, |options| {
        options.habits = Some(Habits::ReferenceAgent);
        options.first_boot_delay = Duration::from_millis(200);
    })
    .await;
    await_attribute(&cloud, &thing, "protocol", "usp").await;

    let version = || cloud.attribute(&thing, "firmwareVersion");
    let good = upgrade(&cloud, &group, "7.0.1").await;
    assert_eq!(end_of(&cloud, &good, &thing).await, Ended::new(Succeeded, "Upgraded"));
    assert_no_signature(&cloud, &good, &thing).await;
    await_attribute(&cloud, &thing, "firmwareVersion", "7.0.1").await;
    // By their paths these let the agent fail.
    for (name, folder, reason) in [("7.404.1", "", "TransferFailed"), ("7.0.2", "boot_error/", "ActivationFailed")] {
        let job = upgrade_from(&cloud, &group, name, folder).await;
        assert_eq!(end_of(&cloud, &job, &thing).await, Ended::new(Failed, reason));
        assert_no_signature(&cloud, &job, &thing).await;
        cloud.drained(&["DeviceResponsesQueue"]).await;
        assert_eq!(version().await.as_deref(), Some("7.0.1"), "after {name}");
    }
    fleet.stop().await;
    let again = upgrade(&cloud, &group, "7.0.1").await;
    assert_eq!(end_of(&cloud, &again, &thing).await, Ended::new(Succeeded, "AlreadyAtTarget"));
}

/// The local cloud decodes the topics of some things twice (see `local/topic_decoding.py`), among them one of these.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn commands_reach_things_with_long_names_and_only_their_own_answers_count() {
    let cloud = Cloud::connect().await;
    // 86 is where it used to end.
    let long = |options: &mut ProvisionOptions| {
        options.things = [86, 127, 128].map(|length| "L".repeat(length).parse().unwrap()).to_vec();
    };
    let (group, devices) = cloud.provision_with("long", 3, ProtocolMix::All(ProtocolName::Usp), long).await;
    let things = names(&devices);
    let image = cloud.upload("2.0.0", 10_000).await;
    let encoding = ProtocolName::Usp.encoding();
    let mut clients = Vec::new();
    for device in &devices {
        let mut client = MqttDevice::connect(device, false).await;
        client.subscribe(encoding.command_filter(&device.thing), QoS::AtLeastOnce).await;
        clients.push(client);
    }
    let job = cloud.create_job(&group, &image, json!({})).await;
    let (mut commands, mut topics) = (Vec::new(), Vec::new());
    for client in &mut clients {
        let message = client.message().await;
        let received = encoding.decode_command(&message.topic, &message.payload).unwrap().unwrap();
        topics.push(message.topic.clone());
        commands.push((received.command.operation_id().clone(), received.reply_to));
    }
    let decoded_once = topics.iter().filter(|topic| topic.ends_with("controllers%2Fself::aws-dm-controller%2Freply"));
    assert!((1..3).contains(&decoded_once.count()), "{topics:?}");

    let say = |speaker: usize, (operation_id, reply_to): &(OperationId, ReplyTo), step: Step| {
        let firmware_version = (step == Step::DeviceRebooted).then(|| "2.0.0".to_owned());
        let outcome = StepOutcome::Succeeded { firmware_version };
        let response = Response { operation_id: operation_id.clone(), step, outcome };
        let message = encoding.encode_response(&things[speaker], &response, reply_to, 0).unwrap();
        let client = &clients[speaker];
        async move { client.publish(message).await }
    };
    // Another device answers the first one's command: it counts for that other device.
    say(1, &commands[0], Step::DownloadStarted).await;
    let answered = |thing: &ThingName| {
        let (cloud, thing, operation) = (&cloud, thing.clone(), commands[0].0.clone());
        async move { meeting(cloud, &thing, &operation, Step::DownloadStarted).await?.answer }
    };
    eventually("the answer is kept for whoever gave it", || answered(&things[1])).await;
    assert_eq!(answered(&things[0]).await, None);
    for (speaker, command) in commands.iter().enumerate() {
        for step in UPGRADE {
            say(speaker, command, step).await;
        }
    }
    for thing in &things {
        assert_eq!(end_of(&cloud, &job, thing).await, Ended::new(Succeeded, "Upgraded"));
    }
}

/// Does what a job's download command asks for, and boots that version.
async fn obey(device: &mut ScriptedDevice, version: &str) -> (OperationId, ReplyTo) {
    let (operation, reply_to) = device.download().await;
    for step in UPGRADE {
        device.succeed(&operation, &reply_to, step, version).await;
    }
    (operation, reply_to)
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_registry_knows_what_a_device_runs() {
    let cloud = Cloud::connect().await;
    for protocol in ProtocolName::ALL {
        let (group, devices) = cloud.provision("runs", 1, ProtocolMix::All(protocol)).await;
        let thing = devices[0].thing.clone();
        let runs = async |version: &str| await_attribute(&cloud, &thing, "firmwareVersion", version).await;
        let mut device = ScriptedDevice::connect(&devices[0]).await;
        let boot = |version: &str| device.encoding().encode_boot(&thing, version, now());
        // Unasked; what the registry does not take is left out.
        device.publish(boot("1.1.0")).await;
        runs("1.1.0").await;
        device.publish(boot("1.2.0+build")).await;
        cloud.drained(&["DeviceResponsesQueue"]).await;
        assert_eq!(cloud.attribute(&thing, "firmwareVersion").await.as_deref(), Some("1.1.0"));

        let job = upgrade(&cloud, &group, "8.0.0").await;
        let (operation, reply_to) = obey(&mut device, "8.0.0").await;
        assert_eq!(end_of(&cloud, &job, &thing).await, Ended::new(Succeeded, "Upgraded"));
        runs("8.0.0").await;
        // Its watchdog brings the old image back, and then the new one, under the key of the operation that has ended.
        for version in ["1.1.0", "8.0.0"] {
            device.succeed(&operation, &reply_to, Step::DeviceRebooted, version).await;
            runs(version).await;
        }
        let again = upgrade(&cloud, &group, "8.0.0").await;
        assert_eq!(end_of(&cloud, &again, &thing).await, Ended::new(Succeeded, "AlreadyAtTarget"));

        // Another version than the target, told in its time or before a state waits for it.
        let job = upgrade(&cloud, &group, "8.1.0").await;
        obey(&mut device, "8.0.1").await;
        assert_eq!(end_of(&cloud, &job, &thing).await, Ended::new(Failed, "VersionMismatch"));
        runs("8.0.1").await;
        let job = upgrade(&cloud, &group, "8.1.0").await;
        let (operation, reply_to) = device.download().await;
        for step in
            [Step::DeviceRebooted, Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone]
        {
            device.succeed(&operation, &reply_to, step, "8.0.2").await;
        }
        assert_eq!(end_of(&cloud, &job, &thing).await, Ended::new(Failed, "VersionMismatch"));
        runs("8.0.2").await;

        // After a failed download nothing of that operation counts, and its address stays a secret.
        let job = upgrade(&cloud, &group, "8.2.0").await;
        let received = device.command().await;
        let Command::Download { operation_id, firmware } = received.command else { panic!("{:?}", received.command) };
        assert!(firmware.url.contains("X-Amz-Signature"), "{}", firmware.url);
        device.succeed(&operation_id, &received.reply_to, Step::DeviceRebooted, "404").await;
        let failure = DeviceFailure { code: "7022".into(), message: format!("cannot get {}", firmware.url) };
        let (reply_to, step) = (&received.reply_to, Step::FirmwareTransferred);
        device.answer(&operation_id, reply_to, step, StepOutcome::Failed(failure)).await;
        device.succeed(&operation_id, reply_to, Step::DeviceRebooted, "404").await;
        assert_eq!(end_of(&cloud, &job, &thing).await, Ended::new(Failed, "TransferFailed"));
        assert_no_signature(&cloud, &job, &thing).await;
        let (_, details) = cloud.job_execution(&job, &thing).await.unwrap();
        assert!(details["cause"].contains("firmware/8.2.0?…"), "{details:?}");
        cloud.drained(&["DeviceResponsesQueue"]).await;
        assert_eq!(cloud.attribute(&thing, "firmwareVersion").await.as_deref(), Some("8.0.2"));
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_protocol_that_is_not_ours_is_refused_before_anything_is_sent() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("foreign", 1, ProtocolMix::All(ProtocolName::Usp)).await;
    let thing = &devices[0].thing;
    cloud.set_attribute(thing, "protocol", "lwm2m").await;
    let device = ScriptedDevice::connect(&devices[0]).await;
    device.publish(device.encoding().encode_boot(thing, "1.0.1", now())).await;
    await_attribute(&cloud, thing, "firmwareVersion", "1.0.1").await;
    assert_eq!(cloud.attribute(thing, "protocol").await.as_deref(), Some("lwm2m"), "it is another product's");
    let job = upgrade(&cloud, &group, "8.3.0").await;
    assert_eq!(end_of(&cloud, &job, thing).await, Ended::new(Failed, "InvalidInput"));
    let (_, details) = cloud.job_execution(&job, thing).await.unwrap();
    assert!(details["cause"].starts_with("protocol: got lwm2m, expected json or usp"), "{details:?}");
}

async fn of_the_field(device: &DeviceSpec, clean_session: bool) -> MqttDevice {
    let client = device.thing.as_str();
    MqttDevice::of_the_field(device.thing.clone(), client, &device.certificates, clean_session).await
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_public_configuration_device_gets_its_settings() {
    let cloud = Cloud::connect().await;
    let devices = cloud.provision_with_profiles("field", 1).await;
    Cloud::wants(&devices[0].thing, json!({"SET_TEMP": 24.84}));
    let mut device = of_the_field(&devices[0], true).await;
    // It takes its time, so that what is sent at once is lost.
    tokio::time::sleep(Duration::from_secs(2)).await;
    device.subscribe(protocol::settings::request_topic(&device.thing), QoS::AtMostOnce).await;
    let command = device.setting().await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (topic, operation) = (protocol::settings::response_topic(&device.thing), &command.operation_id);
    let payload = format!(
        r#"{{"name":"SET_TEMP","type":"RESP","operationId":"{operation}","status":"SUCCESS","value":24.84,"error":0,"timestamp":1795238096272}}"#
    );
    device.publish(Publication { topic, payload: payload.into_bytes() }).await;
    let pushed = cloud.pushed(&device.thing, 1).await.remove(0);
    assert_eq!(pushed.output["value"], json!(24.84), "{pushed:?}");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_public_reporter_of_failed_updates_is_counted() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("reports", 1, ProtocolMix::All(ProtocolName::Json)).await;
    let device = of_the_field(&devices[0], true).await;
    let (thing, topic) = (&device.thing, protocol::recovery::UPDATE_REPORTS_TOPIC.to_owned());
    for number in 0..2 {
        let time = now() - number;
        let payload =
            format!(r#"{{"_id_":"{thing}","timestamp":"{time}","status":"failed","model":"wo:v8","FW":"2.27"}}"#);
        device.publish(Publication { topic: topic.clone(), payload: payload.into_bytes() }).await;
    }
    cloud.await_recovery(thing, "two failures", |device| device.attempts == 2).await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_public_monitoring_device_is_told_what_it_can_read() {
    let cloud = Cloud::connect().await;
    let random = &uuid::Uuid::new_v4().simple().to_string()[..8];
    let (sensor, building) = (format!("9{random}"), format!("field-{random}"));
    let change = |options: &mut ProvisionOptions| {
        options.things = vec!["monitoring-device".parse().unwrap()];
        options.policy = DevicePolicy::Existing(cloud.output("MonitoringDevicePolicyName").to_owned());
        let attributes = [("building", &building), ("sensors", &sensor)];
        options.attributes = attributes.map(|(name, value)| (name.to_owned(), value.clone())).into();
    };
    let (_, devices) = cloud.provision_with("monitor", 1, ProtocolMix::All(ProtocolName::Json), change).await;
    let building: Building = building.parse().unwrap();
    let mut device = of_the_field(&devices[0], true).await;
    device.subscribe(protocol::telemetry::remediations_topic(&building), QoS::AtLeastOnce).await;
    let reading = || Publication {
        topic: protocol::telemetry::readings_topic(&building),
        payload: format!(r#"{{"body":{{"device":"{sensor}","temperature":27.4,"humidity":60.4,"action":"Monitor"}}}}"#)
            .into_bytes(),
    };
    device.publish(reading()).await;
    let told: Value = serde_json::from_slice(&device.message().await.payload).unwrap();
    // Without one it would crash.
    let body = told["body"].as_object().unwrap();
    assert_eq!((&body["device"], &body["action"]), (&json!(sensor), &json!("Remediate")));
    // It comes back with a clean session, hears nothing more, and its readings are kept.
    drop(device);
    let device = of_the_field(&devices[0], true).await;
    device.publish(reading()).await;
    eventually("both readings are kept", || async {
        let query = cloud.dynamodb.query().table_name(cloud.output("MonitoringTableName"));
        let query = query.key_condition_expression("device = :device");
        let value = aws_sdk_dynamodb::types::AttributeValue::S(sensor.clone());
        let count = query.expression_attribute_values(":device", value).send().await.unwrap().count;
        saw(format!("{count} readings"));
        (count == 2).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_public_worker_on_premises_adds_and_echoes() {
    const CLIENT: &str = "mqtt-container-client";
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let folder = cloud.worker_credentials(&"tenant1".parse().unwrap()).await;
    // Its own policy lets it connect under its own name.
    let topic = cloud.output("EventsTopicArn").replacen(":sns:", ":iot:", 1);
    let arn = |resource: &str| format!("{}:{resource}", topic.rsplit_once(':').unwrap().0);
    let allow = |action: &str, resource: &str| json!({"Effect": "Allow", "Action": action, "Resource": arn(resource)});
    let policy = json!({"Version": "2012-10-17", "Statement": [
        allow("iot:Connect", "client/mqtt-container-client"), allow("iot:Subscribe", "topicfilter/tenant1/to/worker"),
        allow("iot:Receive", "topic/tenant1/to/worker"), allow("iot:Publish", "topic/tenant1/to/lambda"),
    ]});
    cloud.replace_worker_policy(&folder, CLIENT, &policy).await;
    let mut worker = MqttDevice::of_the_field(CLIENT.parse().unwrap(), CLIENT, &folder, false).await;
    worker.subscribe("tenant1/to/worker".into(), QoS::AtLeastOnce).await;
    let say = |text: String| Publication { topic: "tenant1/to/lambda".into(), payload: text.into_bytes() };
    // What it could not read it answers without a token: nobody's task ends.
    worker.publish(say(r#"{"result": null, "TaskToken": null, "exception": "JSONDecodeError"}"#.into())).await;
    for (input, answer, expected) in [
        (json!({"a": 15, "b": 42}), r#""result": 57"#, Ok(json!(57))),
        (json!({"a": 15}), r#""result": null, "exception": "KeyError""#, Err("KeyError")),
    ] {
        let arn = cloud.start_job(&input).await;
        let job: Value = serde_json::from_slice(&worker.message().await.payload).unwrap();
        assert_eq!(job["Input"], input);
        // It echoes the token, and says everything twice at times.
        let text = format!(r#"{{{answer}, "TaskToken": {}}}"#, job["TaskToken"]);
        worker.publish(say(text.clone())).await;
        worker.publish(say(text)).await;
        let ended = tests::await_job(&cloud, &arn).await;
        match expected {
            Ok(result) => assert_eq!(ended.output["lambdaOutput"]["result"], result, "{ended:?}"),
            Err(name) => assert_eq!(ended.error.0, name, "{ended:?}"),
        }
    }
}
