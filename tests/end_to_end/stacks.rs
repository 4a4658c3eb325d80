//! Two stacks in one account and Region: the topic rules of both hear everything.
//!
//! `cargo xtask test` deploys the second stack for these tests, after all others.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::JobExecutionStatus::Succeeded;
use aws_sdk_iotdataplane::primitives::Blob;
use device_simulator::provision::ProtocolMix;
use protocol::telemetry::Reading;
use serde_json::json;
use std::collections::BTreeMap;
use tests::{Cloud, Ended, eventually, names, now, saw};

/// The executions of one of a stack's state machines.
async fn executions(cloud: &Cloud, state_machine: &str) -> Vec<String> {
    let list = cloud.step_functions.list_executions().state_machine_arn(cloud.output(state_machine));
    let listed = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    let names: Vec<_> = listed.into_iter().map(|execution| execution.name).collect();
    saw(format!("{state_machine}: {names:?}"));
    names
}

async fn readings(cloud: &Cloud) -> Vec<String> {
    let scan = cloud.dynamodb.scan().table_name(cloud.output("MonitoringTableName")).into_paginator();
    let items = scan.items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    let devices: Vec<_> = items.into_iter().map(|item| item["device"].as_s().unwrap().clone()).collect();
    saw(format!("readings of {devices:?}"));
    devices
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_second_stack_runs_its_own_jobs_and_leaves_the_rest_to_the_first() {
    let (first, second) = (Cloud::connect().await, Cloud::connect_to_second().await);
    let (group, devices) = first.provision("both", 2, ProtocolMix::Mixed).await;
    let things = names(&devices);
    let fleet = Cloud::run(devices, 1).await;
    // As in a run of all tests, where the first stack has dead letters.
    let dead_letter = first.sqs.send_message().queue_url(first.output("DeadLetterQueueUrl"));
    dead_letter.message_body("to the first stack").send().await.unwrap();

    for (ours, theirs, version) in [(&second, &first, "2.0.0"), (&first, &second, "2.1.0")] {
        let image = ours.upload(version, 50_000).await;
        let job = ours.create_job(&group, &image, json!({})).await;
        let expected: BTreeMap<_, _> =
            things.iter().map(|thing| (thing.clone(), Ended::new(Succeeded, "Upgraded"))).collect();
        assert_eq!(ours.ended(&job, &things).await, expected);
        assert_eq!(ours.executions_ended(&job, 2).await.len(), 2);
        assert_eq!(theirs.executions(&job).await.len(), 0, "the other stack's");
    }
    fleet.stop().await;

    let failing = first.thing("both-failing").await;
    first.fail(&failing, [now()]).await;
    let building = "both".parse().unwrap();
    let sensor = first.thing("both-sensor").await;
    let device = sensor.as_str().parse().unwrap();
    let reading = Reading { device, temperature: 21.0, humidity: 50.0, identity: None }.encode(&building);
    first.mqtt.publish().topic(reading.topic).payload(Blob::new(reading.payload)).qos(1).send().await.unwrap();
    eventually("the first stack counts the failure", || async {
        (first.recovery(&failing).await.attempts == 1).then_some(())
    })
    .await;
    eventually("the first stack keeps the reading", || async {
        readings(&first).await.iter().any(|device| device == sensor.as_str()).then_some(())
    })
    .await;

    for state_machine in ["ConfigPushArn", "FailedUpdateRecoveryArn", "OnPremisesJobArn"] {
        assert_eq!(executions(&second, state_machine).await, [""; 0], "{state_machine}");
    }
    assert_eq!(second.recovery(&failing).await, fleet::recovery::Device::default());
    assert_eq!(readings(&second).await, [""; 0]);
    assert!(second.is_drained("DeadLetterQueue").await, "something was malformed to the second stack");
}
