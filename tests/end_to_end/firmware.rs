//! The whole system: the deployed template, the real Lambda binaries, real MQTT over TLS, simulated devices.
//!
//! `cargo xtask test` runs them; they need its local cloud.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::JobExecutionStatus::{self, Failed, InProgress, Succeeded, TimedOut};
use aws_sdk_sfn::types::{ExecutionStatus, HistoryEventType};
use base64::Engine;
use device_simulator::provision::ProtocolMix;
use device_simulator::{CutPoint, Fault, Faults, Outcome};
use fleet::workflows::rendezvous::{Answer, Meeting, Operation, Rendezvous, Wait};
use protocol::{Command, DeviceFailure, JobId, OperationId, ProtocolName, Publication, Step, StepOutcome, ThingName};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tests::{Cloud, Ended, Proxy, ScriptedDevice, eventually, meeting, names, saw, seeded_choices, with_faults};

const DEVICE_STEPS: [Step; 4] =
    [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted];

fn nothing() -> Value {
    json!({})
}

/// When a thing's job execution was queued, in Unix seconds.
async fn queued_at(cloud: &Cloud, job: &str, thing: &ThingName) -> i64 {
    let describe = cloud.iot.describe_job_execution().job_id(job).thing_name(thing.as_str()).send().await;
    describe.unwrap().execution.unwrap().queued_at.unwrap().secs()
}

/// The operation of a job's first execution on a thing.
async fn first_operation(cloud: &Cloud, job: &str, thing: &ThingName) -> OperationId {
    OperationId::of_job_execution(&job.parse::<JobId>().unwrap(), 1, Some(queued_at(cloud, job, thing).await))
}

/// Waits until that version is recorded: a success is reported first.
async fn recorded(cloud: &Cloud, thing: &ThingName, version: &str) {
    eventually(&format!("{version} is recorded for {thing}"), || async {
        (cloud.attribute(thing, "firmwareVersion").await.as_deref() == Some(version)).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn twenty_devices_of_both_protocols_in_one_job() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("happy", 20, ProtocolMix::Mixed).await;
    let things = names(&devices);
    let image = cloud.upload("2.0.0", 300_000).await;
    let fleet = Cloud::run(devices, 1).await;
    let job = cloud.create_job(&group, &image, nothing()).await;

    let expected: BTreeMap<_, _> =
        things.iter().map(|thing| (thing.clone(), Ended::new(Succeeded, "Upgraded"))).collect();
    assert_eq!(cloud.ended(&job, &things).await, expected);
    let upgrades = fleet.stop().await;
    assert!(upgrades.iter().all(|upgrade| upgrade.outcome == Outcome::Succeeded), "{upgrades:?}");
    for thing in &things {
        recorded(&cloud, thing, "2.0.0").await;
    }
    let executions = cloud.executions_ended(&job, 20).await;
    assert_eq!(executions.len(), 20);
    for execution in executions {
        assert_eq!(execution.status, ExecutionStatus::Succeeded);
        let history = cloud.step_functions.get_execution_history().execution_arn(execution.execution_arn);
        let events = history.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
        let entered = |kind: &HistoryEventType| kind.as_str().ends_with("StateEntered");
        let transitions = events.iter().filter(|event| entered(&event.r#type)).count();
        assert!(transitions <= 11, "{transitions} transitions");
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_fault_of_a_device_has_its_end() {
    let cut = |point| Faults(vec![Fault::PowerCut(point)]);
    let one = |fault| Faults(vec![fault]);
    let upgraded = || Ended::new(Succeeded, "Upgraded");
    let cases = [
        (one(Fault::Download), Ended::new(Failed, "TransferFailed")),
        (one(Fault::Checksum), Ended::new(Failed, "InstallFailed")),
        (one(Fault::Boot), Ended::new(Failed, "ActivationFailed")),
        (one(Fault::MalformedBoot), Ended::new(Failed, "ActivationFailed")),
        (one(Fault::Refuse), Ended::new(Failed, "DownloadRefused")),
        (one(Fault::WrongVersion), Ended::new(Failed, "VersionMismatch")),
        (one(Fault::Mute), Ended::new(TimedOut, "DeviceTimedOut")),
        (one(Fault::WrongOperation), Ended::new(TimedOut, "DeviceTimedOut")),
        (one(Fault::Drop(Step::DeviceRebooted)), Ended::new(TimedOut, "DeviceTimedOut")),
        (one(Fault::Slow), upgraded()),
        (one(Fault::Duplicate), upgraded()),
        (one(Fault::Reorder(Step::FirmwareTransferred)), upgraded()),
        (one(Fault::Delay), upgraded()),
        (one(Fault::Offline), upgraded()),
        (cut(CutPoint::Started), upgraded()),
        (cut(CutPoint::Downloading), upgraded()),
        (cut(CutPoint::Transferred), upgraded()),
        (cut(CutPoint::Installed), upgraded()),
        (cut(CutPoint::Activated), upgraded()),
    ];
    let cloud = Cloud::connect().await;
    // Twice as many devices: each fault on one of each protocol.
    let (json_group, mut devices) = cloud.provision("faults", 2 * cases.len(), ProtocolMix::Mixed).await;
    with_faults(&mut devices, cases.iter().flat_map(|(faults, _)| [faults.clone(), faults.clone()]));
    let things = names(&devices);
    let ends = cases.iter().flat_map(|(_, ended)| [ended.clone(), ended.clone()]);
    let expected: BTreeMap<_, _> = things.iter().cloned().zip(ends).collect();
    let image = cloud.upload("2.1.0", 200_000).await;
    let fleet = Cloud::run(devices, 1).await;
    let job = cloud.create_job(&json_group, &image, nothing()).await;

    assert_eq!(cloud.ended(&job, &things).await, expected);
    // Each workflow ends, and as its job execution.
    let executions = cloud.executions_ended(&job, things.len()).await;
    let succeeded = executions.iter().filter(|execution| execution.status == ExecutionStatus::Succeeded).count();
    assert_eq!(succeeded, expected.values().filter(|ended| ended.status == Succeeded).count());
    // Only what has been upgraded is said to be. A device that runs the image without having said so in its answers may say so
    // with its first boot.
    let is_silent = |faults: &Faults| {
        [Fault::WrongOperation, Fault::Drop(Step::DeviceRebooted)].iter().any(|silent| faults.0.contains(silent))
    };
    let faults = cases.iter().flat_map(|(faults, _)| [faults, faults]);
    for (thing, _) in things.iter().zip(faults).filter(|(_, faults)| !is_silent(faults)) {
        recorded(&cloud, thing, if expected[thing].status == Succeeded { "2.1.0" } else { "1.0.0" }).await;
    }
    fleet.stop().await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_device_that_is_offline_is_waited_for() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("offline", 2, ProtocolMix::Mixed).await;
    let things = names(&devices);
    let image = cloud.upload("2.0.0", 10_000).await;
    let fleet = Cloud::run(devices, 1).await;
    Cloud::all_connected(&fleet).await;
    for thing in &things {
        assert!(fleet.power_off(thing).await);
        eventually("the broker notices that the device has gone", || async {
            let item = cloud.dynamodb.get_item().table_name(cloud.output("ConnectionsTableName"));
            let thing = aws_sdk_dynamodb::types::AttributeValue::S(thing.to_string());
            let got = item.key("thing", thing).send().await;
            let item = got.map_err(|error| saw(format!("{:?}", error.into_service_error()))).ok()?.item;
            saw(format!("the presence: {item:?}"));
            let item = item?;
            (item.get("connected")?.as_bool() == Ok(&false)).then_some(())
        })
        .await;
    }
    let job = cloud.create_job(&group, &image, nothing()).await;
    for thing in &things {
        cloud.await_status(&job, thing, InProgress).await;
    }
    // The waits are there, and nobody has been asked to do anything.
    for thing in &things {
        let operation = first_operation(&cloud, &job, thing).await;
        eventually("the workflow waits for the device", || async {
            meeting(&cloud, thing, &operation, Step::DeviceOnline).await?.task_token
        })
        .await;
        assert_eq!(meeting(&cloud, thing, &operation, Step::DownloadStarted).await, None);
    }
    for thing in &things {
        assert!(fleet.power_on(thing));
    }
    let ended = cloud.ended(&job, &things).await;
    assert!(ended.values().all(|ended| ended.status == Succeeded), "{ended:?}");
    fleet.stop().await;
}

/// A continuous job on whatever is not at the target version: who is, leaves the group; who comes, is upgraded.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_continuous_job_on_a_dynamic_group() {
    let cloud = Cloud::connect().await;
    let (_, first) = cloud.provision("dynamic", 2, ProtocolMix::Mixed).await;
    let prefix = first[0].thing.as_str().rsplit_once('-').unwrap().0.to_owned();
    let group = format!("outdated-{prefix}");
    // With a space, as the public sample writes it; recovery.rs has one without.
    let query = format!(
        "thingTypeName:{} AND thingName:dynamic-* AND NOT attributes.firmwareVersion: 2.0.0",
        cloud.output("ThingTypeName")
    );
    let create = cloud.iot.create_dynamic_thing_group().thing_group_name(&group).query_string(query);
    let target = create.send().await.expect("a dynamic group").thing_group_arn.unwrap();
    let members = || async {
        let list = cloud.iot.list_things_in_thing_group().thing_group_name(&group).send().await.unwrap();
        let members = list.things.unwrap_or_default();
        saw(format!("the members are {members:?}"));
        members
    };
    let image = cloud.upload("2.0.0", 1000).await;
    let mut things = names(&first);
    let fleet = Cloud::run(first, 1).await;
    let job = cloud.create_job(&target, &image, json!({"targetSelection": "CONTINUOUS"})).await;
    let ended = cloud.ended(&job, &things).await;
    assert!(ended.values().all(|ended| ended.status == Succeeded), "{ended:?}");
    eventually("who is at the target version leaves the group", || async { members().await.is_empty().then_some(()) })
        .await;

    let (_, second) = cloud.provision("dynamic", 1, ProtocolMix::Mixed).await;
    things = names(&second);
    assert_eq!(members().await, [things[0].to_string()]);
    let newcomer = Cloud::run(second, 1).await;
    assert_eq!(cloud.ended(&job, &things).await[&things[0]], Ended::new(Succeeded, "Upgraded"));
    eventually("the newcomer leaves the group too", || async { members().await.is_empty().then_some(()) }).await;
    fleet.stop().await;
    newcomer.stop().await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn cancelling_stops_the_workflow_and_tells_the_device() {
    let cloud = Cloud::connect().await;
    for mix in [ProtocolMix::All(ProtocolName::Usp), ProtocolMix::All(ProtocolName::Json)] {
        let (group, devices) = cloud.provision("cancel", 1, mix).await;
        let image = cloud.upload("2.0.0", 1000).await;
        let mut device = ScriptedDevice::connect(&devices[0]).await;
        let job = cloud.create_job(&group, &image, nothing()).await;
        let (operation, reply_to) = device.download().await;
        device.succeed(&operation, &reply_to, Step::DownloadStarted, "").await;
        eventually("the workflow waits for the transfer", || async {
            meeting(&cloud, &device.thing, &operation, Step::FirmwareTransferred).await?.task_token
        })
        .await;
        let cancel = cloud.iot.cancel_job_execution().job_id(&job).thing_name(device.thing.as_str()).force(true);
        cancel.send().await.expect("cancelled");

        let command = loop {
            // A slow answer may have had the download sent again.
            match device.command().await.command {
                Command::Download { .. } => {}
                cancel @ Command::CancelDownload { .. } => break cancel,
            }
        };
        assert_eq!(command, Command::CancelDownload { operation_id: operation });
        let execution = cloud.executions_ended(&job, 1).await.remove(0);
        let described = cloud.step_functions.describe_execution().execution_arn(execution.execution_arn).send().await;
        assert_eq!(described.unwrap().error.as_deref(), Some("JobCanceled"));
        let (status, _) = cloud.job_execution(&job, &device.thing).await.unwrap();
        assert_eq!(status, JobExecutionStatus::Canceled);
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_repeated_notification_starts_nothing_and_a_foreign_job_is_left_alone() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("notify", 2, ProtocolMix::All(ProtocolName::Json)).await;
    let things = names(&devices);
    let image = cloud.upload("2.0.0", 1000).await;
    // On one thing, by its own ARN.
    let target = cloud.iot.describe_thing().thing_name(things[0].as_str()).send().await.unwrap().thing_arn.unwrap();
    let mut device = ScriptedDevice::connect(&devices[0]).await;
    let foreign_target =
        cloud.iot.describe_thing().thing_name(things[1].as_str()).send().await.unwrap().thing_arn.unwrap();
    let foreign = format!("foreign-{}", uuid::Uuid::new_v4().simple());
    let create = cloud.iot.create_job().job_id(&foreign).targets(foreign_target);
    create.document(r#"{"operation":"reboot","firmwareVersion":"2.0.0"}"#).send().await.expect("a foreign job");

    let job = cloud.create_job(&target, &image, nothing()).await;
    let (operation, reply_to) = device.download().await;
    let document = cloud.iot.get_job_document().job_id(&job).send().await.unwrap().document.unwrap();
    let document: Value = serde_json::from_str(&document).unwrap();
    let notification = json!({"timestamp": 1, "execution": {
        "jobId": job, "status": "QUEUED", "queuedAt": queued_at(&cloud, &job, &things[0]).await, "lastUpdatedAt": 1,
        "versionNumber": 1, "executionNumber": 1,
        "jobDocument": document,
    }});
    let topic = format!("$aws/things/{}/jobs/notify-next", things[0]);
    for _ in 0..3 {
        cloud.deliver("JobNotificationsQueue", &topic, &notification).await;
    }
    for step in DEVICE_STEPS {
        device.succeed(&operation, &reply_to, step, "2.0.0").await;
    }
    let ended = cloud.ended(&job, &things[..1]).await;
    assert_eq!(ended[&things[0]], Ended::new(Succeeded, "Upgraded"));
    // And once more, now that the execution has ended.
    cloud.deliver("JobNotificationsQueue", &topic, &notification).await;
    eventually("all notifications are handled", || async {
        cloud.is_drained("JobNotificationsQueue").await.then_some(())
    })
    .await;
    assert_eq!(cloud.executions(&job).await.len(), 1);
    assert_eq!(cloud.executions(&foreign).await.len(), 0);
    assert_eq!(cloud.job_execution(&foreign, &things[1]).await.unwrap().0, JobExecutionStatus::Queued);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn two_jobs_at_once_are_done_one_after_the_other() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("two-jobs", 4, ProtocolMix::Mixed).await;
    let things = names(&devices);
    let (first, second) = (cloud.upload("2.0.0", 1000).await, cloud.upload("2.1.0", 1000).await);
    let fleet = Cloud::run(devices, 2).await;
    let jobs = [cloud.create_job(&group, &first, nothing()).await, cloud.create_job(&group, &second, nothing()).await];
    for job in &jobs {
        let ended = cloud.ended(job, &things).await;
        assert!(ended.values().all(|ended| ended.status == Succeeded), "{ended:?}");
    }
    for thing in &things {
        assert_eq!(fleet.version(thing).as_deref(), Some("2.1.0"));
    }
    let upgrades = fleet.stop().await;
    assert_eq!(upgrades.len(), 8);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn early_repeated_reordered_and_wrong_messages() {
    let cloud = Cloud::connect().await;
    for mix in [ProtocolMix::All(ProtocolName::Usp), ProtocolMix::All(ProtocolName::Json)] {
        let (group, devices) = cloud.provision("matrix", 2, mix).await;
        let image = cloud.upload("2.0.0", 1000).await;
        let mut device = ScriptedDevice::connect(&devices[0]).await;
        let mut other = ScriptedDevice::connect(&devices[1]).await;
        let job = cloud.create_job(&group, &image, nothing()).await;
        let (operation, reply_to) = device.download().await;
        let (_, other_reply_to) = other.download().await;

        // From the wrong device: it fails its own operation of that id, and nobody else's.
        let wrong: OperationId = "nobody-asked-1".parse().unwrap();
        let failure = StepOutcome::Failed(DeviceFailure { code: "7000".into(), message: "no".into() });
        other.answer(&operation, &other_reply_to, Step::FirmwareTransferred, failure.clone()).await;
        // With a wrong operation id, malformed, oversized.
        device.succeed(&wrong, &reply_to, Step::DeviceRebooted, "9.9.9").await;
        let sample = device.encoding().encode_boot(&device.thing, "1.0.0", 0);
        let malformed = format!("malformed {}", device.thing);
        device.publish(Publication { topic: sample.topic.clone(), payload: malformed.clone().into_bytes() }).await;
        let oversized = vec![b'x'; protocol::MAX_PAYLOAD_BYTES + 1];
        device.publish(Publication { topic: sample.topic.clone(), payload: oversized }).await;
        // Everything at once, before any but the first wait is there, backwards; and then the contrary.
        for step in DEVICE_STEPS.into_iter().rev() {
            device.succeed(&operation, &reply_to, step, "2.0.0").await;
        }
        for step in DEVICE_STEPS {
            eventually("the answer has come", || async {
                meeting(&cloud, &device.thing, &operation, step).await?.answer
            })
            .await;
            device.answer(&operation, &reply_to, step, failure.clone()).await;
        }

        let ended = cloud.ended(&job, &names(&devices)).await;
        assert_eq!(ended[&device.thing], Ended::new(Succeeded, "Upgraded"));
        assert_eq!(ended[&other.thing], Ended::new(Failed, "TransferFailed"));
        let encoded = base64::prelude::BASE64_STANDARD.encode(&malformed);
        assert_eq!(cloud.dead_letter(&encoded).await, "MalformedMessage");
        // Late: the workflow has ended, and nothing that the device still says changes how. What it runs now is known.
        eventually("the target is recorded", || async {
            (cloud.attribute(&device.thing, "firmwareVersion").await.as_deref() == Some("2.0.0")).then_some(())
        })
        .await;
        device.succeed(&operation, &reply_to, Step::DeviceRebooted, "0.0.1").await;
        let late = eventually("the late answer has come", || async {
            let meeting = meeting(&cloud, &device.thing, &operation, Step::DeviceRebooted).await?;
            (meeting.arrivals >= 3).then_some(meeting)
        });
        assert_eq!(late.await.answer, Some(Answer::Succeeded { firmware_version: Some("2.0.0".into()) }));
        eventually("what it runs is recorded", || async {
            (cloud.attribute(&device.thing, "firmwareVersion").await.as_deref() == Some("0.0.1")).then_some(())
        })
        .await;
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn progress_prolongs_a_wait() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("progress", 1, ProtocolMix::All(ProtocolName::Json)).await;
    let image = cloud.upload("2.0.0", 1000).await;
    let mut device = ScriptedDevice::connect(&devices[0]).await;
    let job = cloud.create_job(&group, &image, nothing()).await;
    let (operation, reply_to) = device.download().await;
    device.succeed(&operation, &reply_to, Step::DownloadStarted, "").await;
    eventually("the workflow waits for the transfer", || async {
        meeting(&cloud, &device.thing, &operation, Step::FirmwareTransferred).await?.task_token
    })
    .await;
    // One and a half deadlines in all, a sixth of one between two reports.
    let deadline: u64 = std::env::var("FLEETFLOW_STEP_TIMEOUT_SECONDS").expect("set by xtask").parse().unwrap();
    for progress in 1..=9 {
        tokio::time::sleep(std::time::Duration::from_secs(deadline) / 6).await;
        let outcome = StepOutcome::InProgress { progress: Some(progress * 10) };
        device.answer(&operation, &reply_to, Step::FirmwareTransferred, outcome).await;
    }
    for step in DEVICE_STEPS {
        device.succeed(&operation, &reply_to, step, "2.0.0").await;
    }
    let ended = cloud.ended(&job, &names(&devices)).await;
    assert_eq!(ended[&device.thing], Ended::new(Succeeded, "Upgraded"));
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn nothing_is_sent_to_devices_that_need_or_want_no_upgrade() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("eligible", 2, ProtocolMix::All(ProtocolName::Json)).await;
    let things = names(&devices);
    let attributes =
        aws_sdk_iot::types::AttributePayload::builder().attributes("upgradable", "false").merge(true).build();
    let update = cloud.iot.update_thing().thing_name(things[1].as_str()).attribute_payload(attributes);
    update.send().await.expect("the attribute is set");
    let current = cloud.upload("1.0.0", 1000).await;
    let attributes =
        aws_sdk_iot::types::AttributePayload::builder().attributes("firmwareVersion", "0.9.0").merge(true).build();
    let update = cloud.iot.update_thing().thing_name(things[1].as_str()).attribute_payload(attributes);
    update.send().await.expect("the attribute is set");
    let job = cloud.create_job(&group, &current, nothing()).await;
    let ended = cloud.ended(&job, &things).await;
    assert_eq!(ended[&things[0]], Ended::new(Succeeded, "AlreadyAtTarget"));
    assert_eq!(ended[&things[1]], Ended::new(Failed, "NotUpgradable"));
    for thing in &things {
        let operation = first_operation(&cloud, &job, thing).await;
        assert_eq!(meeting(&cloud, thing, &operation, Step::DownloadStarted).await, None);
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_thing_that_the_registry_does_not_know_is_a_reported_failure() {
    let cloud = Cloud::connect().await;
    let input = json!({
        "thingName": format!("nobody-{}", uuid::Uuid::new_v4().simple()), "jobId": "job-1", "executionNumber": 1,
        "operationId": "job-1-1",
        "document": {
            "version": "1.0", "workflow": "firmware-upgrade", "firmwareVersion": "2.0.0", "upgradeTrigger": "test",
            "artifact": {"url": "https://example.com/2.0.0"}, "timeoutMinutes": 10, "requestDigest": "",
        },
    });
    let start = cloud.step_functions.start_execution().state_machine_arn(cloud.output("FirmwareUpgradeArn"));
    let execution = start.input(input.to_string()).send().await.expect("started").execution_arn;
    let error = eventually("the execution ends", || async {
        let described = cloud.step_functions.describe_execution().execution_arn(&execution).send().await;
        let described = described.map_err(|error| saw(format!("{:?}", error.into_service_error()))).ok()?;
        saw(format!("{} {:?} {:?}", described.status, described.error, described.cause));
        (described.status == ExecutionStatus::Failed).then(|| described.error.unwrap_or_default())
    });
    assert_eq!(error.await, "DeviceNotFound");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_boot_that_nobody_asked_for_is_a_domain_event() {
    let cloud = Cloud::connect().await;
    let filter = ("FilterPolicy", r#"{"eventType":["DEVICE_BOOTED"]}"#);
    let queue = cloud.listen("EventsTopicArn", &[("RawMessageDelivery", "true"), filter]).await;

    let (_, devices) = cloud.provision("boot", 2, ProtocolMix::Mixed).await;
    for spec in &devices {
        let device = ScriptedDevice::connect(spec).await;
        device.publish(device.encoding().encode_boot(&device.thing, "1.0.0", 7)).await;
        let event = eventually("the boot is told", || async {
            let receive =
                cloud.sqs.receive_message().queue_url(&queue).visibility_timeout(2).max_number_of_messages(10);
            let received = receive.send().await;
            let received = received.map_err(|error| saw(format!("{:?}", error.into_service_error()))).ok()?;
            let messages = received.messages.unwrap_or_default();
            saw(format!("{} events: {:?}", messages.len(), messages.iter().map(|one| one.body()).collect::<Vec<_>>()));
            let events = messages.iter().filter_map(|message| serde_json::from_str::<Value>(message.body()?).ok());
            events.into_iter().find(|event| event["thingName"] == device.thing.as_str())
        })
        .await;
        assert_eq!((&event["eventType"], &event["firmwareVersion"]), (&json!("DEVICE_BOOTED"), &json!("1.0.0")));
    }
    cloud.sqs.delete_queue().queue_url(&queue).send().await.unwrap();
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn create_job_is_idempotent_and_its_errors_have_names() {
    let cloud = Cloud::connect().await;
    let (group, _) = cloud.provision("payload", 1, ProtocolMix::Mixed).await;
    let id = format!("once-{}", uuid::Uuid::new_v4().simple());
    let image = cloud.upload("2.0.0", 1000).await;
    let payload = |trigger: &str| {
        json!({
            "firmwareVersion": "2.0.0", "upgradeTrigger": trigger, "targetArn": group, "artifact": image.artifact,
            "jobId": id, "targetSelection": "CONTINUOUS", "rollout": {"maximumPerMinute": 50},
            "abort": {"percentage": 20.5, "minimumExecuted": 10}, "timeoutMinutes": 30, "protocol": "json",
        })
    };
    let first = cloud.invoke_create_job(&payload("manual")).await.expect("created");
    assert_eq!(first["jobId"], json!(id));
    assert_eq!(cloud.invoke_create_job(&payload("manual")).await, Ok(first));
    let job = cloud.iot.describe_job().job_id(&id).send().await.unwrap().job.unwrap();
    assert_eq!(job.target_selection.unwrap().as_str(), "CONTINUOUS");
    assert_eq!(job.job_executions_rollout_config.unwrap().maximum_per_minute, Some(50));
    assert_eq!(job.timeout_config.unwrap().in_progress_timeout_in_minutes, Some(30));

    let error = |payload: Value| {
        let cloud = &cloud;
        async move { cloud.invoke_create_job(&payload).await.unwrap_err() }
    };
    assert_eq!(error(payload("scheduled")).await.0, "JobConflict");
    let missing = json!({"firmwareVersion": "7.7.7", "upgradeTrigger": "manual", "targetArn": group});
    assert_eq!(error(missing).await.0, "ArtifactNotFound");
    let target = group.replace("payload-", "nobody-");
    let nowhere = json!({"firmwareVersion": "2.0.0", "upgradeTrigger": "manual", "targetArn": target, "artifact": image.artifact});
    assert_eq!(error(nowhere).await.0, "TargetNotFound");
    let (name, message) = error(json!({"firmwareVersion": "2.0.0", "upgradeTrigger": "manual", "target": group})).await;
    assert_eq!(name, "InvalidInput");
    assert!(message.starts_with("target: unknown field `target`, expected one of `firmwareVersion`"), "{message}");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_execution_that_is_stopped_by_hand_ends_its_job_execution() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("stopped", 1, ProtocolMix::All(ProtocolName::Json)).await;
    let image = cloud.upload("2.0.0", 1000).await;
    let mut device = ScriptedDevice::connect(&devices[0]).await;
    let job = cloud.create_job(&group, &image, nothing()).await;
    device.download().await;
    let execution = cloud.executions(&job).await.remove(0).execution_arn;
    let described = cloud.step_functions.describe_execution().execution_arn(&execution).send().await.unwrap();
    cloud.step_functions.stop_execution().execution_arn(&execution).send().await.expect("stopped");
    // Gap of the local cloud: its Step Functions tells EventBridge nothing. What AWS would send goes into the queue.
    let reports = cloud.queue_url("WorkflowReportsQueue").await;
    let event = json!({
        "source": "aws.states", "detail-type": "Step Functions Execution Status Change",
        "detail": {"executionArn": execution, "status": "ABORTED", "input": described.input, "error": null, "cause": null},
    });
    cloud.sqs.send_message().queue_url(reports).message_body(event.to_string()).send().await.expect("sent");
    let ended = cloud.ended(&job, &names(&devices)).await;
    assert_eq!(ended[&device.thing], Ended::new(Failed, "WorkflowStopped"));
}

/// Reports whose function dies while it works on them are delivered again, and every upgrade still succeeds.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_killed_function_loses_nothing() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("killed", 6, ProtocolMix::Mixed).await;
    let things = names(&devices);
    let image = cloud.upload("2.0.0", 1000).await;
    let fleet = Cloud::run(devices, 1).await;
    let thing = &things[0];
    let name = thing.as_str().rsplit_once('-').unwrap().0;
    // Apart from each other, for a message that is given to five functions that die is given up.
    let kill = |skip| Proxy::kill_after(name, "HandleDeviceResponse", "dynamodb.UpdateItem", skip);
    let proxy = Proxy::from_environment();
    proxy.disturb(&[0, 6, 12].map(kill)).await;
    let job = cloud.create_job(&group, &image, nothing()).await;
    let ended = cloud.ended(&job, &things).await;
    assert!(ended.values().all(|ended| ended.status == Succeeded), "{ended:?}");
    assert_eq!(proxy.disturbed().await[name].len(), 3);
    fleet.stop().await;
}

/// The table does to an item what the rules say, whatever comes in whatever order.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_table_follows_the_rules_of_the_rendezvous() {
    let cloud = Cloud::connect().await;
    let rendezvous = Rendezvous::new(&cloud.config, cloud.output("RendezvousTableName").to_owned());
    let thing: ThingName = "property-test".parse().unwrap();
    let mut next = seeded_choices();
    for _ in 0..60 {
        let operation = Operation::new(&thing, &uuid::Uuid::new_v4().to_string().parse().unwrap());
        let mut expected = Meeting::default();
        for _ in 0..6 {
            if next(2) == 0 {
                let attempt = u32::try_from(next(3)).unwrap();
                let expected_version = (next(2) == 0).then(|| "2.0.0".to_owned());
                let wait = Wait { task_token: format!("token-{}", next(1000)), attempt, expected_version };
                let _ = expected.expect(&wait);
                rendezvous.expect(&operation, Step::DeviceRebooted, &wait).await.expect("expect");
            } else {
                let answer = match next(3) {
                    0 => Answer::Succeeded { firmware_version: None },
                    1 => Answer::Succeeded { firmware_version: Some("2.0.0".into()) },
                    _ => Answer::Failed { error: fleet::ErrorName::ActivationFailed, cause: "old image".into() },
                };
                expected.arrive(&answer);
                rendezvous.arrive(&operation, Step::DeviceRebooted, &answer).await.expect("arrive");
            }
            let found = meeting(&cloud, &thing, &operation.id, Step::DeviceRebooted).await.unwrap_or_default();
            assert_eq!(found, expected);
        }
    }
}

/// What a look-up costs does not grow with the job: every one is by full key.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_look_up_costs_the_same_among_one_and_among_a_thousand_devices() {
    let cloud = Cloud::connect().await;
    let rendezvous = Rendezvous::new(&cloud.config, cloud.output("RendezvousTableName").to_owned());
    let operation =
        OperationId::of_job_execution(&format!("flat-{}", uuid::Uuid::new_v4().simple()).parse().unwrap(), 1, None);
    let answer = Answer::Succeeded { firmware_version: None };
    let mut costs = Vec::new();
    for number in 0..1000 {
        let thing: ThingName = format!("flat-{number}").parse().unwrap();
        rendezvous.arrive(&Operation::new(&thing, &operation), Step::DeviceRebooted, &answer).await.expect("arrive");
        if [0, 9, 99, 999].contains(&number) {
            let text = |value: &str| aws_sdk_dynamodb::types::AttributeValue::S(value.to_owned());
            let get = cloud.dynamodb.get_item().table_name(cloud.output("RendezvousTableName")).consistent_read(true);
            let get = get.return_consumed_capacity(aws_sdk_dynamodb::types::ReturnConsumedCapacity::Total);
            let key = Operation::new(&thing, &operation).key();
            let output = get.key("operation", text(&key)).key("step", text("DEVICE_REBOOTED")).send().await.unwrap();
            costs.push(output.consumed_capacity.unwrap().capacity_units.unwrap());
        }
    }
    println!("capacity units of a look-up among 1, 10, 100 and 1,000 devices of a job: {costs:?}");
    assert!(costs.iter().all(|cost| (cost - costs[0]).abs() < f64::EPSILON), "{costs:?}");
}
