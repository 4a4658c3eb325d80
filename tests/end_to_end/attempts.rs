//! Attempts at one job on one thing: their events name neither number nor time, and nobody may announce the next one.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::JobExecutionStatus::{Failed, InProgress, Succeeded, TimedOut};
use aws_sdk_sfn::types::ExecutionStatus;
use device_simulator::provision::ProtocolMix;
use protocol::{Command, DeviceFailure, OperationId, ProtocolName, ReplyTo, Step, StepOutcome};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;
use tests::{Cloud, Ended, ScriptedDevice, eventually, names, saw};

const DEVICE_STEPS: [Step; 4] =
    [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted];

/// The next download of another operation than these.
async fn other_download(device: &mut ScriptedDevice, known: &[&OperationId]) -> (OperationId, ReplyTo) {
    loop {
        let received = device.command().await;
        if let Command::Download { operation_id, .. } = received.command
            && !known.contains(&&operation_id)
        {
            return (operation_id, received.reply_to);
        }
    }
}

async fn do_all(device: &ScriptedDevice, operation: &OperationId, reply_to: &ReplyTo, version: &str) {
    for step in DEVICE_STEPS {
        device.succeed(operation, reply_to, step, version).await;
    }
}

/// How often a device says that it is at it, and how many times.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
const PROGRESS_REPORTS: u32 = 30;

/// With which errors the failed workflows of a job have ended.
async fn errors(cloud: &Cloud, job: &str, count: usize) -> BTreeSet<String> {
    let mut errors = BTreeSet::new();
    for execution in cloud.executions_ended(job, count).await {
        if execution.status == ExecutionStatus::Failed {
            let described = cloud.step_functions.describe_execution().execution_arn(execution.execution_arn).send();
            errors.insert(described.await.unwrap().error.unwrap_or_default());
        }
    }
    errors
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn attempts_that_time_out_are_tried_again_and_the_second_succeeds() {
    // Each attempt has the time of its job, and no more while others use up the functions.
    let _quiet = tests::undisturbed().await;
    let cloud = Cloud::connect().await;
    let more = json!({"retries": 1, "timeoutMinutes": 2});
    let (mut device, job) = ScriptedDevice::with_job(&cloud, "again", ProtocolName::Json, more).await;
    let things = [device.thing.clone()];
    let (first, reply_to) = device.download().await;
    device.succeed(&first, &reply_to, Step::DownloadStarted, "").await;

    // The event of the first attempt's end may come when the second one has begun: it ends the first workflow only.
    // Until then it is at it, or a busy machine may find the wait for its progress over first.
    let mut second = None;
    for _ in 0..PROGRESS_REPORTS {
        second = tokio::time::timeout(PROGRESS_INTERVAL, other_download(&mut device, &[&first])).await.ok();
        if second.is_some() {
            break;
        }
        let progress = StepOutcome::InProgress { progress: Some(10) };
        device.answer(&first, &reply_to, Step::FirmwareTransferred, progress).await;
    }
    let (second, reply_to) = second.expect("the second attempt is dispatched");
    eventually("the first workflow ends", || async {
        let executions = cloud.executions(&job).await;
        executions.iter().any(|one| one.status == ExecutionStatus::Failed).then_some(())
    })
    .await;
    do_all(&device, &second, &reply_to, "2.0.0").await;
    assert_eq!(cloud.ended(&job, &things).await[&things[0]], Ended::new(Succeeded, "Upgraded"));
    assert_eq!(errors(&cloud, &job, 2).await, BTreeSet::from(["JobTimedOut".to_owned()]));
    let describe = cloud.iot.describe_job_execution().job_id(&job).thing_name(things[0].as_str()).execution_number(1);
    assert_eq!(describe.send().await.unwrap().execution.unwrap().status, Some(TimedOut));
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn attempts_that_failed_are_followed_by_the_next_without_being_announced() {
    let cloud = Cloud::connect().await;
    let more = json!({"retries": 2});
    let (mut device, job) = ScriptedDevice::with_job(&cloud, "retry", ProtocolName::Usp, more).await;
    let things = [device.thing.clone()];
    let failure = || StepOutcome::Failed(DeviceFailure { code: "7000".into(), message: "no".into() });
    let (first, reply_to) = device.download().await;
    device.answer(&first, &reply_to, Step::FirmwareTransferred, failure()).await;
    let (second, reply_to) = other_download(&mut device, &[&first]).await;
    device.answer(&second, &reply_to, Step::FirmwareTransferred, failure()).await;
    let (third, reply_to) = other_download(&mut device, &[&first, &second]).await;
    do_all(&device, &third, &reply_to, "2.0.0").await;
    assert_eq!(cloud.ended(&job, &things).await[&things[0]], Ended::new(Succeeded, "Upgraded"));
    assert_eq!(cloud.executions_ended(&job, 3).await.len(), 3);
    let describe = cloud.iot.describe_job_execution().job_id(&job).thing_name(things[0].as_str()).execution_number(2);
    assert_eq!(describe.send().await.unwrap().execution.unwrap().status, Some(Failed));
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn attempts_of_a_job_that_was_deleted_and_made_again_run() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("recreated", 1, ProtocolMix::All(ProtocolName::Json)).await;
    let things = names(&devices);
    let job = format!("recreated-{}", uuid::Uuid::new_v4().simple());
    let mut device = ScriptedDevice::connect(&devices[0]).await;
    let mut known: Vec<OperationId> = Vec::new();
    for version in ["2.0.0", "2.1.0"] {
        let image = cloud.upload(version, 1000).await;
        cloud.create_job(&group, &image, json!({"jobId": job})).await;
        let (operation, reply_to) = other_download(&mut device, &known.iter().collect::<Vec<_>>()).await;
        do_all(&device, &operation, &reply_to, version).await;
        assert_eq!(cloud.ended(&job, &things).await[&things[0]], Ended::new(Succeeded, "Upgraded"));
        known.push(operation);
        cloud.iot.delete_job().job_id(&job).force(true).send().await.expect("deleted");
    }
    assert_eq!(cloud.executions_ended(&job, 2).await.len(), 2);
}

/// Nothing can be learned any more of what was deleted.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn attempts_that_are_deleted_by_force_end_their_workflows() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("deleted", 1, ProtocolMix::All(ProtocolName::Json)).await;
    let things = names(&devices);
    let image = cloud.upload("2.0.0", 1000).await;
    let mut device = ScriptedDevice::connect(&devices[0]).await;
    let job = cloud.create_job(&group, &image, json!({})).await;
    let (operation, reply_to) = device.download().await;
    device.succeed(&operation, &reply_to, Step::DownloadStarted, "").await;
    cloud.await_status(&job, &things[0], InProgress).await;
    let delete = cloud.iot.delete_job_execution().job_id(&job).thing_name(things[0].as_str()).execution_number(1);
    delete.force(true).send().await.expect("deleted");
    loop {
        let command = device.command().await.command;
        saw(format!("{command:?}"));
        if command == (Command::CancelDownload { operation_id: operation.clone() }) {
            break;
        }
    }
    assert_eq!(errors(&cloud, &job, 1).await, BTreeSet::from(["JobCanceled".to_owned()]));
}
