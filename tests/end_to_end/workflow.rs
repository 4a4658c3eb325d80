//! The state machines path by path: their tasks' answers are given, so that each way through a definition can be gone.
//!
//! `cargo xtask test` runs these tests; they need its local cloud, whose Step Functions takes answers from the execution's
//! input (see `local/stepfunctions_local.py`).
#![allow(clippy::unwrap_used)]

use aws_sdk_sfn::types::{HistoryEvent, HistoryEventType};
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tests::{Cloud, Pushed};

/// A way through a state machine.
struct Path {
    /// Answers that are others than those of the good way: by state, one an attempt, the last one for all further ones.
    answers: Vec<(&'static str, Vec<Value>)>,
    /// The states that are entered.
    states: Vec<&'static str>,
    /// The outcome in the output, or the error's name and a part of its cause.
    end: End,
}

fn error(name: &str, cause: &str) -> Value {
    json!({"error": name, "cause": cause})
}

/// The cause of a function's error, as Lambda reports it.
fn function_error(name: &str) -> Value {
    error(name, &json!({"errorType": name, "errorMessage": "what the function said"}).to_string())
}

fn result(value: &Value) -> Value {
    json!({ "result": value })
}

/// Runs an execution whose tasks get these answers, to its end.
async fn run(cloud: &Cloud, machine: &str, input: &Value, answers: Value) -> Pushed {
    let mut input = input.clone();
    input["mocked"] = answers;
    let start = cloud.step_functions.start_execution().state_machine_arn(cloud.output(machine));
    let arn = start.input(input.to_string()).send().await.unwrap().execution_arn;
    cloud.ended_push(&arn).await
}

/// Goes one way; says how it differs from what was expected.
async fn go(
    cloud: &Cloud,
    machine: &str,
    input: &Value,
    good: &Value,
    path: &Path,
    outcome: &str,
) -> Result<(), String> {
    let mut mocked = good.clone();
    for (state, answers) in &path.answers {
        mocked[*state] = json!(answers);
    }
    let ended = run(cloud, machine, input, mocked).await;
    let entered = states(cloud, &ended).await;
    let found = match &path.end {
        Ok(expected) => ended.output.pointer(outcome).is_some_and(|value| value == *expected),
        // A sentence, also where AWS has passed on what a function said.
        Err((name, cause)) => {
            let (error, said) = &ended.error;
            error == name && said.contains(cause) && !said.contains("\"errorType\"")
        }
    };
    if found && entered == path.states {
        return Ok(());
    }
    Err(format!("{:?}: {:?} {:?} {} by {entered:?}", path.answers, ended.status, ended.error, ended.output))
}

async fn history(cloud: &Cloud, ended: &Pushed) -> Vec<HistoryEvent> {
    let history = cloud.step_functions.get_execution_history().execution_arn(&ended.arn);
    history.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap()
}

async fn states(cloud: &Cloud, ended: &Pushed) -> Vec<String> {
    let events = history(cloud, ended).await.into_iter();
    events.filter_map(|event| Some(event.state_entered_event_details?.name)).collect()
}

/// How often a task was tried.
async fn attempts(cloud: &Cloud, ended: &Pushed, task: &str) -> usize {
    let (mut current, mut count) = (String::new(), 0);
    for event in history(cloud, ended).await {
        if let Some(entered) = event.state_entered_event_details {
            current = entered.name;
        }
        count += usize::from(current == task && event.r#type == HistoryEventType::TaskScheduled);
    }
    count
}

async fn go_all(machine: &str, input: Value, good: Value, paths: Vec<Path>, outcome: &str) {
    let cloud = Cloud::connect().await;
    let ends = join_all(paths.iter().map(|path| go(&cloud, machine, &input, &good, path, outcome))).await;
    let wrong: Vec<String> = ends.into_iter().filter_map(Result::err).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

type End = Result<&'static str, (&'static str, &'static str)>;

/// A path on which one state has these answers.
fn one(state: &'static str, answers: Vec<Value>, states: Vec<&'static str>, end: End) -> Path {
    Path { answers: vec![(state, answers)], states, end }
}

fn timeout() -> Value {
    error("States.Timeout", "")
}

fn busy() -> Value {
    error("Lambda.TooManyRequestsException", "slow down")
}

/// What get-device-settings answers.
fn settings(changed: &Value) -> Value {
    result(&json!({"settings": {"A": 1, "B": 2}, "changed": changed, "source": "API"}))
}

/// What it says of a failure.
fn failure(name: &str) -> Value {
    error(name, "what the function said")
}

/// The way of a push up to its wait, and then on.
fn pushed(more: &[&'static str]) -> Vec<&'static str> {
    [&["IsDeviceKnown", "ReadDevice", "GetSettings", "IsPushNeeded", "PushSettings"], more].concat()
}

/// The input of a push, and the answers that let it succeed.
fn good_push() -> (Value, Value) {
    let good = json!({
        "ReadDevice": [result(&json!({"thingName": "t", "attributes": {"externalId": "u"}}))],
        "GetSettings": [settings(&json!({"A": 1, "B": 2}))],
        "PushSettings": [result(&json!({}))],
    });
    (json!({"thingName": "t", "connectedAt": 1}), good)
}

async fn push(paths: Vec<Path>) {
    let (input, good) = good_push();
    go_all("ConfigPushArn", input, good, paths, "/status").await;
}

/// What `ReadAnswers` finds: the open push, with one answer.
fn answers_of(operation: &str) -> Value {
    let answers = json!({"A": {"M": {"status": {"S": "FAIL"}, "error": {"S": "17"}}}});
    result(&json!({"Item": {"push": {"M": {"operationId": {"S": operation}, "answers": {"M": answers}}}}}))
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn what_was_throttled_killed_or_slow_in_a_push_is_tried_again() {
    let read = || result(&json!({"thingName": "t", "attributes": {"externalId": "u"}}));
    let got = || settings(&json!({"A": 1, "B": 2}));
    let slow = || error("Iot.ThrottlingException", "slow down");
    let killed = || error("Runtime.ExitError", "signal: killed");
    let too_long = || error("Sandbox.Timedout", "after 35.00 seconds");
    push(vec![
        one("ReadDevice", vec![slow(), timeout(), slow(), read()], pushed(&[]), Ok("SUCCESS")),
        one("GetSettings", vec![error("SQS.SdkClientException", "slow down"), got()], pushed(&[]), Ok("SUCCESS")),
        // Its request was lost, or waited in the queue for too long.
        one("GetSettings", vec![timeout(), timeout(), got()], pushed(&[]), Ok("SUCCESS")),
        one("PushSettings", vec![killed(), busy(), too_long(), result(&json!({}))], pushed(&[]), Ok("SUCCESS")),
        one("PushSettings", vec![timeout(), timeout(), result(&json!({}))], pushed(&[]), Ok("SUCCESS")),
    ])
    .await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_end_of_a_configuration_push() {
    let read = |end: &'static str| vec!["IsDeviceKnown", "ReadDevice", end];
    let got = |end: &'static str| vec!["IsDeviceKnown", "ReadDevice", "GetSettings", end];
    let failed = "ConfigPushFailed";
    let unchanged = vec!["IsDeviceKnown", "ReadDevice", "GetSettings", "IsPushNeeded", "SettingsUnchanged"];
    let superseded = |error: fn(&str) -> Value| vec![error("SessionSuperseded")];
    let unread = |answer: Value| vec![("PushSettings", vec![timeout()]), ("ReadAnswers", vec![answer])];
    let aws = |name: &str| vec![error(name, "no")];
    let refused = error("SettingFailed", "A: the device failed with error 17");
    let mut paths = vec![
        one("GetSettings", vec![settings(&json!({}))], unchanged, Ok("UNCHANGED")),
        one("GetSettings", superseded(failure), got("SessionSuperseded"), Ok("SUPERSEDED")),
        one("PushSettings", superseded(function_error), pushed(&["SessionSuperseded"]), Ok("SUPERSEDED")),
        one("ReadDevice", aws("Iot.ResourceNotFoundException"), read(failed), Err(("DeviceNotFound", "no thing t"))),
        one("ReadDevice", aws("Iot.UnauthorizedException"), read(failed), Err(("ServiceError", "Iot.Unauthorized"))),
        one("GetSettings", vec![timeout()], got(failed), Err(("ServiceError", "States.Timeout"))),
        one(
            "PushSettings",
            vec![refused],
            pushed(&[failed]),
            Err(("SettingFailed", "A: the device failed with error 17")),
        ),
        Path {
            answers: unread(answers_of("another push")),
            states: pushed(&["ReadAnswers", "IsSessionSuperseded", "SessionSuperseded"]),
            end: Ok("SUPERSEDED"),
        },
        Path {
            answers: unread(error("DynamoDB.ResourceNotFoundException", "no")),
            states: pushed(&["ReadAnswers", failed]),
            end: Err(("DeviceTimedOut", "which were sent three times")),
        },
    ];
    for name in ["ExternalIdMissing", "ProfileNotFound", "SettingsApiRefused", "InvalidSettings", "ServiceError"] {
        paths.push(one("GetSettings", vec![failure(name)], got(failed), Err((name, "what the function said"))));
    }
    for name in ["InvalidInput", "ServiceError"] {
        let end = Err((name, "what the function said"));
        paths.push(one("PushSettings", vec![function_error(name)], pushed(&[failed]), end));
    }
    push(paths).await;
}

/// For a session start-workflow has read the thing: the registry is not asked again.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_push_whose_device_has_been_read_reads_it_not_again() {
    let (mut input, mut good) = good_push();
    input["externalId"] = json!("user-7");
    good["ReadDevice"] = json!([error("Iot.ResourceNotFoundException", "it was asked")]);
    let states = vec!["IsDeviceKnown", "GetSettings", "IsPushNeeded", "PushSettings"];
    go_all("ConfigPushArn", input, good, vec![Path { answers: vec![], states, end: Ok("user-7") }], "/externalId")
        .await;
}

const WAITS: [&str; 5] = ["AwaitOnline", "DispatchDownload", "AwaitTransfer", "AwaitInstallation", "AwaitReboot"];

/// The input of an upgrade, and the answers that let it succeed.
fn good_upgrade() -> (Value, Value) {
    let input = json!({
        "thingName": "t", "jobId": "j", "executionNumber": 1, "operationId": "j-1",
        "document": {"version": "1.0", "workflow": "firmware-upgrade", "firmwareVersion": "2.0.0", "upgradeTrigger": "test",
            "artifact": {"url": "https://example.com/2.0.0"}, "timeoutMinutes": 60, "requestDigest": ""},
    });
    let old = json!({"thingName": "t", "attributes": {"firmwareVersion": "1.0.0"}});
    let mut good = json!({"ReadDevice": [result(&old)]});
    for state in WAITS.into_iter().chain(["ReportStart", "ReportSuccess", "ReportFailure", "CancelDownload"]) {
        good[state] = json!([result(&json!({}))]);
    }
    (input, good)
}

/// The way of an upgrade that succeeds.
fn upgraded() -> Vec<&'static str> {
    [&["ReadDevice", "IsUpgradeNeeded", "ReportStart"][..], &WAITS, &["ReportSuccess"]].concat()
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_way_through_a_firmware_upgrade() {
    let (input, good) = good_upgrade();
    let thing = |attributes: Value| result(&json!({"thingName": "t", "attributes": attributes}));
    let whole = upgraded();
    let failed_at = |state: &str, cancelled: bool| {
        let reached = whole.iter().position(|other| *other == state).unwrap();
        let mut states = whole[..=reached].to_vec();
        if cancelled {
            states.push("CancelDownload");
        }
        states.extend(["ReportFailure", "UpgradeFailed"]);
        states
    };
    let mut paths = vec![
        one("ReadDevice", vec![thing(json!({}))], whole.clone(), Ok("Upgraded")),
        one(
            "ReadDevice",
            vec![thing(json!({"firmwareVersion": "2.0.0"}))],
            vec!["ReadDevice", "IsUpgradeNeeded", "ReportSuccess"],
            Ok("AlreadyAtTarget"),
        ),
        one(
            "ReadDevice",
            vec![thing(json!({"upgradable": "false"}))],
            vec!["ReadDevice", "IsUpgradeNeeded", "ReportFailure", "UpgradeFailed"],
            Err(("NotUpgradable", "upgradable")),
        ),
        one(
            "ReadDevice",
            vec![error("Iot.ResourceNotFoundException", "")],
            failed_at("ReadDevice", false),
            Err(("DeviceNotFound", "the registry has no thing t")),
        ),
        one(
            "ReadDevice",
            vec![error("Iot.UnauthorizedException", "no")],
            failed_at("ReadDevice", false),
            Err(("ServiceError", "Iot.UnauthorizedException")),
        ),
    ];
    // Every task is tried again when it was throttled; and a function that was killed or took too long.
    for (state, name) in [
        ("ReadDevice", "Iot.ThrottlingException"),
        ("ReportStart", "SNS.ThrottledException"),
        ("ReportSuccess", "SNS.ThrottledException"),
    ] {
        let answers = vec![error(name, "slow"), error(name, "slow"), good[state][0].clone()];
        paths.push(one(state, answers, whole.clone(), Ok("Upgraded")));
    }
    for state in WAITS {
        let names = ["Lambda.TooManyRequestsException", "Runtime.ExitError", "Sandbox.Timedout"];
        let mut answers: Vec<Value> = names.map(|name| error(name, "again")).into();
        answers.push(result(&json!({})));
        paths.push(one(state, answers, whole.clone(), Ok("Upgraded")));
        // A job that was cancelled ends whichever wait it is; a device that has been asked is told.
        let asked = state != "AwaitOnline";
        paths.push(one(state, vec![error("JobCanceled", "why")], failed_at(state, asked), Err(("JobCanceled", "why"))));
        let late = if state == "DispatchDownload" || !asked { "States.Timeout" } else { "States.HeartbeatTimeout" };
        let cause = if state == "DispatchDownload" { "sent three times over json, the default" } else { "device" };
        paths.push(one(state, vec![error(late, "")], failed_at(state, asked), Err(("DeviceTimedOut", cause))));
    }
    // Whatever else ends a wait, a device that may have the command is told that nobody waits for it any more.
    for state in WAITS {
        let states = failed_at(state, state != "AwaitOnline");
        let gone = "Lambda.ResourceNotFoundException";
        let end = Err(("ServiceError", "Lambda.ResourceNotFoundException: no such function"));
        paths.push(one(state, vec![error(gone, "no such function")], states.clone(), end));
        let end = Err(("InvalidInput", "what the function said"));
        paths.push(one(state, vec![function_error("InvalidInput")], states.clone(), end));
        // What Step Functions says of a function that did not say it: no JSON, though some is in it.
        let unclear = "Lambda did not return an error type. Returned payload: {\"errorMessage\":\"timed out\"}";
        paths.push(one(state, vec![error(gone, unclear)], states, Err(("ServiceError", "Returned payload"))));
    }
    // A good end that cannot be reported is told by Step Functions.
    let unreported = [&whole[..], &["UpgradeFailed"]].concat();
    let end =
        Err(("Upgraded", "the upgrade has succeeded, which could not be reported: SNS.NotFoundException: no topic"));
    paths.push(one("ReportSuccess", vec![error("SNS.NotFoundException", "no topic")], unreported, end));
    // An address that has expired is signed again; one that does not become good ends the workflow, and the device is told.
    let expired = error("AddressExpired", "status 403");
    paths.push(one("AwaitTransfer", vec![expired, result(&json!({}))], whole.clone(), Ok("Upgraded")));
    for (state, name) in [
        ("DispatchDownload", "DownloadRefused"),
        ("AwaitTransfer", "TransferFailed"),
        ("AwaitInstallation", "InstallFailed"),
        ("AwaitReboot", "ActivationFailed"),
        ("AwaitReboot", "VersionMismatch"),
    ] {
        paths.push(one(
            state,
            vec![error(name, "the device said")],
            failed_at(state, false),
            Err((name, "the device said")),
        ));
    }
    go_all("FirmwareUpgradeArn", input, good, paths, "/outcome").await;
}

const PARK: [&str; 4] = ["ChooseAction", "ParkDevice", "WaitBeforeRestore", "RestoreDevice"];
const QUARANTINE: [&str; 7] = [
    "ChooseAction",
    "QuarantineDevice",
    "AwaitGroupUpdate",
    "AddToFailedGroup",
    "ConfirmQuarantine",
    "IsQuarantined",
    "NotifyOperators",
];

fn payload(payload: &Value) -> Value {
    result(&json!({"StatusCode": 200, "Payload": payload}))
}

fn outcome(outcome: &str) -> Value {
    payload(&json!({"thingName": "t", "outcome": outcome}))
}

/// The input of a recovery with that decision.
fn decided(decision: &str) -> Value {
    json!({
        "thingName": "t", "operationId": "o", "timestamp": 1, "receivedAt": 2, "decision": decision, "attempt": 10, "cycle": 1,
    })
}

/// The answers that let a recovery park a device and bring it back, or quarantine it.
fn good_recoveries() -> (Value, Value) {
    let parking = json!({
        "ParkDevice": [outcome("PARKED")], "RestoreDevice": [outcome("RESTORED")],
    });
    let quarantine = json!({
        "QuarantineDevice": [outcome("QUARANTINED")],
        "AddToFailedGroup": [result(&json!({}))], "ConfirmQuarantine": [outcome("QUARANTINED")],
        "NotifyOperators": [result(&json!({"MessageId": "m"}))],
    });
    (parking, quarantine)
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_way_through_the_recovery_of_a_failed_update() {
    let (parking, quarantine) = good_recoveries();
    let mut parkings = vec![one("RestoreDevice", vec![outcome("NOT_PARKED")], PARK.to_vec(), Ok("NOT_PARKED"))];
    let released = [&QUARANTINE[..6], &["ReleasedMeanwhile"]].concat();
    let mut quarantines =
        vec![one("ConfirmQuarantine", vec![outcome("NOT_QUARANTINED")], released, Ok("NOT_QUARANTINED"))];
    let ways = [(&parking, &PARK[..], &mut parkings), (&quarantine, &QUARANTINE[..], &mut quarantines)];
    for (good, way, paths) in ways {
        let last = if way.len() == PARK.len() { "RESTORED" } else { "QUARANTINED" };
        for (index, state) in way.iter().enumerate().filter(|(_, state)| !good[**state].is_null()) {
            let failed = [&way[..=index], &["RecoveryFailed"]].concat();
            let good = &good[*state][0];
            let (refused, names) = match *state {
                "AddToFailedGroup" => {
                    let again = vec![error("Iot.ThrottlingException", "slow"), timeout(), good.clone()];
                    paths.push(one(state, again, way.to_vec(), Ok(last)));
                    ("Iot.UnauthorizedException", &[][..])
                }
                // It is repeated whatever the error is.
                "NotifyOperators" => {
                    let again = vec![error("SNS.ThrottledException", "slow"), timeout(), good.clone()];
                    paths.push(one(state, again, way.to_vec(), Ok(last)));
                    ("SNS.AuthorizationErrorException", &[][..])
                }
                _ => {
                    let killed = error("Runtime.ExitError", "signal: killed");
                    let again = vec![busy(), killed, error("Sandbox.Timedout", "after 60.00 seconds"), good.clone()];
                    paths.push(one(state, again, way.to_vec(), Ok(last)));
                    let [throttled, unavailable] = ["Throttled", "ServiceUnavailable"].map(function_error);
                    paths.push(one(
                        state,
                        vec![timeout(), throttled, unavailable, good.clone()],
                        way.to_vec(),
                        Ok(last),
                    ));
                    let names = &["InvalidInput", "ServiceError", "DeviceNotFound"];
                    ("Lambda.ResourceNotFoundException", &names[..])
                }
            };
            for name in names {
                let end = Err((*name, "what the function said"));
                paths.push(one(state, vec![function_error(name)], failed.clone(), end));
            }
            paths.push(one(state, vec![error(refused, "no")], failed, Err(("ServiceError", refused))));
        }
    }
    let machine = "FailedUpdateRecoveryArn";
    let unknown = "decision: got RETRY, expected PARK or QUARANTINE";
    let none = vec![one("ParkDevice", vec![], vec!["ChooseAction", "RecoveryFailed"], Err(("InvalidInput", unknown)))];
    go_all(machine, decided("RETRY"), parking.clone(), none, "/outcome").await;
    go_all(machine, decided("PARK"), parking, parkings, "/outcome").await;
    go_all(machine, decided("QUARANTINE"), quarantine, quarantines, "/outcome").await;
}

/// The input of a job on premises, and the answers that let it succeed.
fn good_job() -> (Value, Value) {
    let answers = json!({"RunJob": [result(&json!({"result": "done"}))], "ReadUnreadJobs": [unread(None)]});
    (json!({"tenant": "tenant1", "handler": "add", "a": 1}), answers)
}

/// What is known of a tenant's last answer without a token: when it came, and its exception.
fn unread(answer: Option<(u64, &str)>) -> Value {
    let item = answer.map(|(at, exception)| {
        json!({"job": {"S": "tenant1"}, "answeredAt": {"N": at.to_string()}, "exception": {"S": exception}})
    });
    result(&item.map_or_else(|| json!({}), |item| json!({ "Item": item })))
}

/// After every test's execution has begun.
const IN_2100: u64 = 4_102_444_800_000;

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_way_through_a_job_on_premises() {
    let (input, good) = good_job();
    let way = || vec!["RunJob"];
    let failed = || vec!["RunJob", "JobFailed"];
    let timed_out = || vec!["RunJob", "ReadUnreadJobs", "JobFailed"];
    let after_silence = |read: Vec<Value>, cause| Path {
        answers: vec![("RunJob", vec![error("States.HeartbeatTimeout", "")]), ("ReadUnreadJobs", read)],
        states: timed_out(),
        end: Err(("WorkerTimedOut", cause)),
    };
    let silent = || error("States.HeartbeatTimeout", "");
    let done = || result(&json!({"result": "done"}));
    let exception =
        |name: &str, cause: &str| error("WorkerException", &json!({"exception": name, "cause": cause}).to_string());
    let killed = error("Runtime.ExitError", "signal: killed");
    let long = "the job took longer than it may";
    let silence = "no worker has given a sign of life; the job was sent four times";
    let mut paths = vec![
        one(
            "RunJob",
            vec![busy(), killed, error("Sandbox.Timedout", "after 10.00 seconds"), done()],
            way(),
            Ok("done"),
        ),
        one(
            "RunJob",
            vec![function_error("Throttled"), function_error("ServiceUnavailable"), done()],
            way(),
            Ok("done"),
        ),
        one("RunJob", vec![silent(), silent(), silent(), done()], way(), Ok("done")),
        // Who answers without a token is told apart from one who is silent, or was before this job.
        after_silence(vec![unread(None)], silence),
        after_silence(vec![unread(Some((1_700_000_000_000, "JSONDecodeError")))], silence),
        after_silence(
            vec![unread(Some((IN_2100, "JSONDecodeError")))],
            "a worker has answered without a task token (JSONDecodeError) at 2100-01-01T00:00:00",
        ),
        after_silence(vec![unread(Some((IN_2100, "")))], "without a task token (no exception)"),
        after_silence(vec![function_error("NotUpgradable")], silence),
        one("RunJob", vec![timeout()], failed(), Err(("WorkerTimedOut", long))),
        one("RunJob", vec![exception("KeyError", "b is missing"), done()], failed(), Err(("KeyError", "b is missing"))),
        one("RunJob", vec![exception("KeyError", ""), done()], failed(), Err(("KeyError", ""))),
        one("RunJob", vec![error("ResultMissing", "none"), done()], failed(), Err(("ResultMissing", "none"))),
        // A name that nobody gave on purpose is the platform's, however much it looks like a worker's.
        one("RunJob", vec![error("KeyError", "")], failed(), Err(("ServiceError", "KeyError"))),
        one(
            "RunJob",
            vec![error("Lambda.ResourceNotFoundException", "no")],
            failed(),
            Err(("ServiceError", "Lambda.ResourceNotFoundException")),
        ),
    ];
    for name in ["InvalidInput", "ServiceError"] {
        paths.push(one("RunJob", vec![function_error(name)], failed(), Err((name, "what the function said"))));
    }
    go_all("OnPremisesJobArn", input, good, paths, "/lambdaOutput/result").await;
}

/// A way through a state machine, and the answers that lead there.
struct Way {
    machine: &'static str,
    input: Value,
    answers: Value,
    states: Vec<&'static str>,
    outcome: &'static str,
    end: End,
}

/// Ways that together come by every task of every state machine.
fn ways() -> Vec<Way> {
    let (push, push_answers) = good_push();
    let (upgrade, upgrade_answers) = good_upgrade();
    let (parking, quarantine) = good_recoveries();
    let (job, job_answers) = good_job();
    let mut unanswered = push_answers.clone();
    unanswered["PushSettings"] = json!([timeout()]);
    unanswered["ReadAnswers"] = json!([answers_of("another push")]);
    let mut given_up = upgrade_answers.clone();
    given_up["AwaitTransfer"] = json!([error("States.HeartbeatTimeout", "")]);
    let mut unread_job = job_answers.clone();
    unread_job["RunJob"] = json!([error("States.HeartbeatTimeout", "")]);
    unread_job["ReadUnreadJobs"] = json!([unread(Some((IN_2100, "JSONDecodeError")))]);
    let to_transfer = &upgraded()[..6];
    let way = |machine, input: &Value, answers, states: &[&'static str], outcome, end| {
        let (input, states) = (input.clone(), states.to_vec());
        Way { machine, input, answers, states, outcome, end }
    };
    vec![
        way("ConfigPushArn", &push, push_answers, &pushed(&[]), "/status", Ok("SUCCESS")),
        way(
            "ConfigPushArn",
            &push,
            unanswered,
            &pushed(&["ReadAnswers", "IsSessionSuperseded", "SessionSuperseded"]),
            "/status",
            Ok("SUPERSEDED"),
        ),
        way("FirmwareUpgradeArn", &upgrade, upgrade_answers, &upgraded(), "/outcome", Ok("Upgraded")),
        way(
            "FirmwareUpgradeArn",
            &upgrade,
            given_up,
            &[to_transfer, &["CancelDownload", "ReportFailure", "UpgradeFailed"]].concat(),
            "/outcome",
            Err(("DeviceTimedOut", "progress")),
        ),
        way("FailedUpdateRecoveryArn", &decided("PARK"), parking, &PARK, "/outcome", Ok("RESTORED")),
        way("FailedUpdateRecoveryArn", &decided("QUARANTINE"), quarantine, &QUARANTINE, "/outcome", Ok("QUARANTINED")),
        way("OnPremisesJobArn", &job, job_answers, &["RunJob"], "/lambdaOutput/result", Ok("done")),
        way(
            "OnPremisesJobArn",
            &job,
            unread_job,
            &["RunJob", "ReadUnreadJobs", "JobFailed"],
            "/lambdaOutput/result",
            Err(("WorkerTimedOut", "JSONDecodeError")),
        ),
    ]
}

impl Way {
    /// Its tasks.
    fn tasks(&self) -> Vec<&'static str> {
        self.states.iter().copied().filter(|state| !self.answers[*state].is_null()).collect()
    }

    /// The answers with others before those of one task.
    fn after(&self, task: &str, errors: &[Value]) -> Vec<Value> {
        [errors, self.answers[task].as_array().unwrap()].concat()
    }
}

/// The tasks of all state machines: the output with the machine's ARN, and the task's name.
fn all_tasks() -> BTreeSet<(String, String)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../statemachine");
    let mut tasks = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().trim_end_matches(".asl.json");
        let camel: String = name.split('-').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        let machine: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let states = machine["States"].as_object().unwrap().iter();
        let of_machine = states.filter(|(_, state)| state["Type"] == "Task");
        tasks.extend(of_machine.map(|(task, _)| (format!("{camel}Arn"), task.clone())));
    }
    tasks
}

/// Each task of each state machine is tried again after errors that no list of ours or AWS's has, and goes on as if nothing had been.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_error_that_no_one_knows_is_tried_again_in_every_task() {
    let unknown = [
        "ErrorOfNextYear",
        "Runtime.Unknown",
        "Lambda.ClientExecutionTimeoutException",
        "Iot.SdkClientException",
        "Iot.IotException",
        "Sandbox.Timedout",
        "&alloc::boxed::Box<dyn core::any::Any + core::marker::Send>",
    ]
    .map(|name| error(name, "bootstrap exited during init"));
    let mut tried = BTreeSet::new();
    for way in ways() {
        tried.extend(way.tasks().into_iter().map(|task| (way.machine.to_owned(), task.to_owned())));
        let paths =
            way.tasks().into_iter().map(|task| one(task, way.after(task, &unknown), way.states.clone(), way.end));
        let paths = paths.collect();
        go_all(way.machine, way.input, way.answers, paths, way.outcome).await;
    }
    assert_eq!(tried, all_tasks());
}

/// What cannot pass is not tried again, though the next answer would be good.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_error_that_cannot_pass_stops_every_task_at_once() {
    let cloud = &Cloud::connect().await;
    for way in &ways() {
        let tries = way.tasks().into_iter().flat_map(|task| {
            ["NotUpgradable", "Lambda.ResourceNotFoundException"].map(|name| async move {
                let mut answers = way.answers.clone();
                answers[task] = json!(way.after(task, &[function_error(name)]));
                let ended = run(cloud, way.machine, &way.input, answers).await;
                assert_eq!(attempts(cloud, &ended, task).await, 1, "{}: {task} after {name}: {ended:?}", way.machine);
            })
        });
        join_all(tries).await;
    }
}

/// Nothing catches what Step Functions itself gives up on, so nothing of ours may count on it.
/// (<https://docs.aws.amazon.com/step-functions/latest/dg/concepts-error-handling.html>)
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn what_aws_does_not_let_anyone_catch_is_not_caught_here() {
    let uncaught = |name| {
        one("GetSettings", vec![error(name, "")], vec!["IsDeviceKnown", "ReadDevice", "GetSettings"], Err((name, "")))
    };
    push(["States.Runtime", "States.DataLimitExceeded"].map(uncaught).into()).await;
}
