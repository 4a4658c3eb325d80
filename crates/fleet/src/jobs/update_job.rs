//! Keeps a job execution in step with its workflow, by the workflow's domain events.

use crate::device_registry::{DeviceRegistry, Said};
use crate::error::{aws, code};
use crate::job_executions::{JobExecutions, Standing};
use crate::queue::{Queue, json};
use crate::{Error, ErrorName};
use aws_sdk_iotjobsdataplane::types::JobExecutionStatus;
use protocol::events::{EventType, UpgradeEvent};
use protocol::fields::STATUS_DETAIL;
use protocol::job::UpgradeInput;
use serde::Deserialize;
use std::collections::HashMap;

/// The outcome of an update of a job execution that has ended already.
const LATE: &str = "LATE";

/// The good ends of the state machine (`IsUpgradeNeeded`). Of the second one nothing had to be done.
const UPGRADED: &str = "Upgraded";
const ALREADY_AT_TARGET: &str = "AlreadyAtTarget";

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Updates job executions.
    pub jobs: aws_sdk_iotjobsdataplane::Client,
    /// Tells which of them have not ended.
    pub executions: JobExecutions,
    /// The registry, where things' versions are recorded.
    pub registry: DeviceRegistry,
    /// Where start-workflow is asked to look for the next attempt.
    pub notifications: Queue,
}

/// What shall become of a job execution.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Update {
    status: JobExecutionStatus,
    /// Minutes after which AWS IoT Jobs itself ends the job execution as `TIMED_OUT`.
    timer: Option<i64>,
}

/// Handles one queued event. Repeats and events that come after the job execution has ended change nothing.
///
/// The version is recorded last: a thing that has its version leaves its dynamic group, and the job then no longer counts it if it
/// has not succeeded before. If it cannot be recorded, the message comes again, and the success stands.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let event = read(body)?;
    let Some(update) = update(&event) else { return Ok(()) };
    let (thing, job) = (&event.thing_name, &event.job_id);
    let outcome = match adapters.executions.standing(thing, job, event.execution_number, event.queued_at).await? {
        Standing::Pending(status) => apply(adapters, &event, &update, &status).await?,
        // It has ended (this is a repeat, or somebody cancelled it), or is gone.
        Standing::Ended | Standing::Unknown => LATE,
    };
    tracing::info!(thing = thing.as_str(), job = job.as_str(), status = update.status.as_str(), outcome);
    match update.status {
        JobExecutionStatus::Failed => adapters.notifications.ask_for_next(thing).await,
        JobExecutionStatus::Succeeded if event.reason.as_deref() != Some(ALREADY_AT_TARGET) => {
            // For dynamic thing groups, and for the next job.
            let runs = Some(event.firmware_version);
            // A repeat may come when the device already runs something else.
            let instead_of = event.previous_version.filter(|_| outcome == LATE);
            adapters.registry.record(&event.thing_name, &Said { runs, speaks: None, instead_of }).await
        }
        _ => Ok(()),
    }
}

/// Updates a job execution that has this status. No document says whether AWS lets one succeed or fail that has not begun: it
/// begins first.
async fn apply(
    adapters: &Adapters,
    event: &UpgradeEvent,
    update: &Update,
    status: &JobExecutionStatus,
) -> Result<&'static str, Error> {
    if *status == JobExecutionStatus::Queued && update.status != JobExecutionStatus::InProgress {
        send(&adapters.jobs, event, &Update { status: JobExecutionStatus::InProgress, timer: None }).await?;
    }
    send(&adapters.jobs, event, update).await
}

async fn send(
    jobs: &aws_sdk_iotjobsdataplane::Client,
    event: &UpgradeEvent,
    update: &Update,
) -> Result<&'static str, Error> {
    let request = jobs
        .update_job_execution()
        .job_id(event.job_id.as_str())
        .thing_name(event.thing_name.as_str())
        .execution_number(event.execution_number)
        .status(update.status.clone())
        .set_step_timeout_in_minutes(update.timer);
    let sent = match request.clone().set_status_details(Some(details(event))).send().await {
        // Unicode grows, and with it what AWS may not know: a job execution must not hang for a word.
        Err(error) if code(&error) == Some("InvalidRequestException") => {
            let (thing, job) = (event.thing_name.as_str(), event.job_id.as_str());
            let why = aws("iot:UpdateJobExecution", &error).message;
            tracing::warn!(thing, job, details = ?details(event), why, "told without its details, which were refused");
            request.send().await
        }
        sent => sent,
    };
    match sent {
        Ok(_) => Ok("APPLIED"),
        Err(error) => match code(&error) {
            // It has ended just now.
            Some("InvalidStateTransitionException" | "TerminalStateException" | "ResourceNotFoundException") => {
                Ok(LATE)
            }
            _ => Err(aws("iot:UpdateJobExecution", &error)),
        },
    }
}

/// What Step Functions says of an execution that has ended
/// (<https://docs.aws.amazon.com/step-functions/latest/dg/eventbridge-integration.html>).
#[derive(Deserialize)]
struct ExecutionEnded {
    detail: ExecutionDetail,
}

#[derive(Deserialize)]
struct ExecutionDetail {
    status: String,
    input: String,
    error: Option<String>,
    cause: Option<String>,
}

/// Reads a workflow's own report, or what Step Functions says in place of a workflow that could not report.
fn read(body: &str) -> Result<UpgradeEvent, Error> {
    let report: serde_json::Value = json("report", body.as_bytes())?;
    if report.get("detail-type").is_none() {
        return json("domain event", body.as_bytes());
    }
    let ended: ExecutionEnded = json("Step Functions event", body.as_bytes())?;
    let detail = ended.detail;
    let input: UpgradeInput = json("execution input", detail.input.as_bytes())?;
    let cause = detail.cause.unwrap_or_else(|| format!("the execution of the state machine is {}", detail.status));
    // `ReportSuccess` could not tell.
    let has_succeeded = detail.error.as_deref().is_some_and(|error| [UPGRADED, ALREADY_AT_TARGET].contains(&error));
    Ok(UpgradeEvent {
        event_type: if has_succeeded { EventType::FirmwareUpgradeSuccess } else { EventType::FirmwareUpgradeFail },
        thing_name: input.thing_name,
        job_id: input.job_id,
        execution_number: input.execution_number,
        queued_at: input.queued_at,
        operation_id: input.operation_id,
        firmware_version: input.document.firmware_version,
        reason: detail.error.or_else(|| Some(ErrorName::WorkflowStopped.as_str().to_owned())),
        cause: Some(cause),
        step: None,
        previous_version: None,
    })
}

fn update(event: &UpgradeEvent) -> Option<Update> {
    let reason = event.reason.as_deref().unwrap_or_default();
    let now = |status| Some(Update { status, timer: None });
    match event.event_type {
        EventType::FirmwareUpgradeStarted => now(JobExecutionStatus::InProgress),
        EventType::FirmwareUpgradeSuccess => now(JobExecutionStatus::Succeeded),
        // It is final already: that is how the workflow learned of it.
        EventType::FirmwareUpgradeFail
            if [ErrorName::JobCanceled, ErrorName::JobTimedOut].iter().any(|name| name.as_str() == reason) =>
        {
            None
        }
        // Nobody but AWS IoT Jobs' own timer may set TIMED_OUT, so the timer is set to the shortest that there is.
        EventType::FirmwareUpgradeFail if reason == ErrorName::DeviceTimedOut.as_str() => {
            Some(Update { status: JobExecutionStatus::InProgress, timer: Some(1) })
        }
        EventType::FirmwareUpgradeFail => now(JobExecutionStatus::Failed),
        EventType::DeviceBooted => None,
    }
}

/// Whatever a device or a service said, in what a status detail takes.
fn details(event: &UpgradeEvent) -> HashMap<String, String> {
    [
        ("firmwareVersion", Some(event.firmware_version.as_str())),
        ("reason", event.reason.as_deref()),
        ("cause", event.cause.as_deref()),
        ("step", event.step.as_deref()),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), STATUS_DETAIL.fit(value?)?)))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_iot::operation::describe_thing::DescribeThingOutput;
    use aws_sdk_iot::operation::update_thing::UpdateThingOutput;
    use aws_sdk_iotjobsdataplane::operation::describe_job_execution::{
        DescribeJobExecutionError, DescribeJobExecutionOutput,
    };
    use aws_sdk_iotjobsdataplane::operation::update_job_execution::{
        UpdateJobExecutionError, UpdateJobExecutionOutput,
    };
    use aws_sdk_iotjobsdataplane::types::JobExecution;
    use aws_smithy_http_client::test_util::infallible_client_fn;
    use aws_smithy_mocks::{RuleMode, mock, mock_client};
    use serde_json::json;
    use ureq::http::{Request, Response};

    fn event(kind: &str, reason: Option<&str>) -> UpgradeEvent {
        serde_json::from_value(json!({
            "eventType": kind, "thingName": "gateway-1", "jobId": "job-1", "executionNumber": 1,
            "operationId": "job-1-1", "firmwareVersion": "1.2.3", "reason": reason, "cause": "line\nbreak",
        }))
        .unwrap()
    }

    #[test]
    fn each_event_has_its_status() {
        let now = |status| Some(Update { status, timer: None });
        let cases = [
            (event("FIRMWARE_UPGRADE_STARTED", None), now(JobExecutionStatus::InProgress)),
            (event("FIRMWARE_UPGRADE_SUCCESS", None), now(JobExecutionStatus::Succeeded)),
            (event("FIRMWARE_UPGRADE_FAIL", Some("VersionMismatch")), now(JobExecutionStatus::Failed)),
            (
                event("FIRMWARE_UPGRADE_FAIL", Some("DeviceTimedOut")),
                Some(Update { status: JobExecutionStatus::InProgress, timer: Some(1) }),
            ),
            (event("FIRMWARE_UPGRADE_FAIL", Some("JobCanceled")), None),
            (event("FIRMWARE_UPGRADE_FAIL", Some("JobTimedOut")), None),
        ];
        for (event, expected) in cases {
            assert_eq!(update(&event), expected, "{event:?}");
        }
    }

    #[test]
    fn a_stopped_execution_is_reported_by_step_functions() {
        let input = json!({
            "thingName": "gateway-1", "jobId": "job-1", "executionNumber": 2, "operationId": "job-1-2",
            "document": {
                "version": "1.0", "workflow": "firmware-upgrade", "firmwareVersion": "1.2.3", "upgradeTrigger": "manual",
                "artifact": {}, "timeoutMinutes": 60, "requestDigest": "",
            },
        });
        let body = json!({
            "source": "aws.states", "detail-type": "Step Functions Execution Status Change",
            "detail": {"status": "ABORTED", "input": input.to_string(), "error": null, "cause": null},
        });
        let event = read(&body.to_string()).unwrap();
        assert_eq!(event.reason.as_deref(), Some("WorkflowStopped"));
        assert_eq!(event.cause.as_deref(), Some("the execution of the state machine is ABORTED"));
        assert_eq!(event.execution_number, 2);
        assert_eq!(update(&event), Some(Update { status: JobExecutionStatus::Failed, timer: None }));
        // A good end that the workflow could not report.
        for end in ["Upgraded", "AlreadyAtTarget"] {
            let body = body
                .to_string()
                .replace("ABORTED", "FAILED")
                .replace(r#""error":null"#, &format!(r#""error":"{end}""#));
            let event = read(&body).unwrap();
            assert_eq!((event.event_type, event.reason.as_deref()), (EventType::FirmwareUpgradeSuccess, Some(end)));
        }
    }

    type Updates = std::sync::Arc<std::sync::Mutex<Vec<String>>>;

    /// A queue that notes what it is sent.
    fn notifications(notes: Updates) -> Queue {
        let config = crate::aws::of_test(infallible_client_fn(move |request: Request<_>| {
            let sent: serde_json::Value = serde_json::from_slice(request.body().bytes().unwrap()).unwrap();
            notes.lock().unwrap().push(format!("{} in {} s", sent["MessageBody"], sent["DelaySeconds"]));
            Response::builder().body("{}").unwrap()
        }));
        Queue::new(&config, "https://queue".into())
    }

    /// What is done about an event, if AWS IoT Jobs has the job execution in that status, and answers the updates so.
    async fn done(
        event: &UpgradeEvent,
        status: Option<JobExecutionStatus>,
        refusal: Option<&'static str>,
    ) -> Vec<String> {
        let done = Updates::default();
        let meta = |code: &str| aws_sdk_iotjobsdataplane::error::ErrorMetadata::builder().code(code).build();
        let describe = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution).match_requests(|_| true);
        let describe = match status {
            Some(status) => describe.then_output(move || {
                let execution = JobExecution::builder().status(status.clone()).queued_at(7);
                DescribeJobExecutionOutput::builder().execution(execution.build()).build()
            }),
            None => describe.then_error(move || DescribeJobExecutionError::generic(meta("TerminalStateException"))),
        };
        let notes = done.clone();
        let update = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution).match_requests(move |request| {
            let details = request.status_details().unwrap();
            assert!(!details.contains_key("step") && details["cause"] == "line break", "{details:?}");
            notes.lock().unwrap().push(request.status().unwrap().to_string());
            true
        });
        let update = match refusal {
            None => update.then_output(|| UpdateJobExecutionOutput::builder().build()),
            Some(code) => update.then_error(move || UpdateJobExecutionError::generic(meta(code))),
        };
        let read = mock!(aws_sdk_iot::Client::describe_thing)
            .match_requests(|_| true)
            .then_output(|| DescribeThingOutput::builder().version(1).attributes("firmwareVersion", "1.1.0").build());
        let notes = done.clone();
        let record = mock!(aws_sdk_iot::Client::update_thing)
            .match_requests(move |request| {
                let payload = request.attribute_payload().unwrap();
                let version = &payload.attributes().unwrap()["firmwareVersion"];
                notes.lock().unwrap().push(format!("{} {version} {}", request.thing_name().unwrap(), payload.merge()));
                true
            })
            .then_output(|| UpdateThingOutput::builder().build());
        let jobs = mock_client!(aws_sdk_iotjobsdataplane, RuleMode::MatchAny, [&describe, &update]);
        let adapters = Adapters {
            executions: JobExecutions::new(jobs.clone()),
            jobs,
            registry: DeviceRegistry::of(mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&read, &record])),
            notifications: notifications(done.clone()),
        };
        if let Err(error) = handle(&adapters, &serde_json::to_string(event).unwrap()).await {
            done.lock().unwrap().push(error.name.as_str().to_owned());
        }
        let done = done.lock().unwrap();
        done.clone()
    }

    const VERSION: &str = "gateway-1 1.2.3 true";
    const SOON: &str = r#""{\"nextOf\":\"gateway-1\"}" in 2 s"#;
    const LATER: &str = r#""{\"nextOf\":\"gateway-1\"}" in 300 s"#;

    #[tokio::test]
    async fn a_success_is_reported_first_and_then_recorded() {
        let success = event("FIRMWARE_UPGRADE_SUCCESS", Some("Upgraded"));
        assert_eq!(done(&success, Some(JobExecutionStatus::InProgress), None).await, ["SUCCEEDED", VERSION]);
        // The device runs it, whatever has become of the job execution, also in a repeat after a crash; unless it has told of
        // another version since.
        assert_eq!(done(&success, None, None).await, [VERSION]);
        let since = |version: &str| UpgradeEvent { previous_version: Some(version.into()), ..success.clone() };
        assert_eq!(done(&since("1.1.0"), None, None).await, [VERSION]);
        assert_eq!(done(&since("1.0.0"), None, None).await, [""; 0]);
        assert_eq!(done(&since("1.0.0"), Some(JobExecutionStatus::InProgress), None).await, ["SUCCEEDED", VERSION]);
        let late = Some("InvalidStateTransitionException");
        assert_eq!(done(&success, Some(JobExecutionStatus::InProgress), late).await, ["SUCCEEDED", VERSION]);
        let throttled = Some("ThrottlingException");
        assert_eq!(done(&success, Some(JobExecutionStatus::InProgress), throttled).await, ["SUCCEEDED", "Throttled"]);
    }

    #[tokio::test]
    async fn what_has_not_begun_begins_before_it_ends() {
        let already = event("FIRMWARE_UPGRADE_SUCCESS", Some("AlreadyAtTarget"));
        assert_eq!(done(&already, Some(JobExecutionStatus::Queued), None).await, ["IN_PROGRESS", "SUCCEEDED"]);
        let started = event("FIRMWARE_UPGRADE_STARTED", None);
        assert_eq!(done(&started, Some(JobExecutionStatus::Queued), None).await, ["IN_PROGRESS"]);
        let failed = event("FIRMWARE_UPGRADE_FAIL", Some("NotUpgradable"));
        let all = ["IN_PROGRESS", "FAILED", SOON, LATER];
        assert_eq!(done(&failed, Some(JobExecutionStatus::Queued), None).await, all);
    }

    #[tokio::test]
    async fn the_next_attempt_is_asked_for_after_a_failure_also_if_it_was_reported_before() {
        let failed = event("FIRMWARE_UPGRADE_FAIL", Some("InstallFailed"));
        assert_eq!(done(&failed, Some(JobExecutionStatus::InProgress), None).await, ["FAILED", SOON, LATER]);
        assert_eq!(done(&failed, None, None).await, [SOON, LATER]);
        // Of a time-out the event of AWS IoT Jobs tells.
        let timed_out = event("FIRMWARE_UPGRADE_FAIL", Some("DeviceTimedOut"));
        assert_eq!(done(&timed_out, Some(JobExecutionStatus::InProgress), None).await, ["IN_PROGRESS"]);
    }

    /// The job was deleted and made again: what the earlier one's workflow still says is not about it.
    #[tokio::test]
    async fn a_report_on_another_job_execution_of_that_number_changes_nothing() {
        let mut success = event("FIRMWARE_UPGRADE_SUCCESS", Some("Upgraded"));
        for (queued_at, updates) in [(Some(7), vec!["SUCCEEDED", VERSION]), (Some(5), vec![VERSION])] {
            success.queued_at = queued_at;
            assert_eq!(done(&success, Some(JobExecutionStatus::InProgress), None).await, updates);
        }
    }
    #[tokio::test]
    async fn details_that_are_refused_all_the_same_are_left_out() {
        let meta = |code: &str| aws_sdk_iotjobsdataplane::error::ErrorMetadata::builder().code(code).build();
        let describe = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution)
            .match_requests(|_| true)
            .then_output(|| {
                let execution = JobExecution::builder().status(JobExecutionStatus::Queued).queued_at(7);
                DescribeJobExecutionOutput::builder().execution(execution.build()).build()
            });
        let refused = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution)
            .match_requests(|request| request.status_details().is_some())
            .then_error(move || UpdateJobExecutionError::generic(meta("InvalidRequestException")));
        let told = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution)
            .match_requests(|request| {
                request.status_details().is_none() && request.status() == Some(&JobExecutionStatus::InProgress)
            })
            .then_output(|| UpdateJobExecutionOutput::builder().build());
        let jobs = mock_client!(aws_sdk_iotjobsdataplane, RuleMode::MatchAny, [&describe, &refused, &told]);
        let adapters = Adapters {
            executions: JobExecutions::new(jobs.clone()),
            jobs,
            registry: DeviceRegistry::of(mock_client!(aws_sdk_iot, [])),
            notifications: notifications(Updates::default()),
        };
        let body = serde_json::to_string(&event("FIRMWARE_UPGRADE_STARTED", None)).unwrap();
        assert_eq!(handle(&adapters, &body).await, Ok(()));
        assert_eq!((refused.num_calls(), told.num_calls()), (1, 1));
    }
}
