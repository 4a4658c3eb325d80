//! Keeps a job execution in step with its workflow, by the workflow's domain events.

use crate::error::{aws, code};
use crate::queue::json;
use crate::{Error, ErrorName};
use aws_sdk_iotjobsdataplane::types::JobExecutionStatus;
use protocol::events::{EventType, UpgradeEvent};
use protocol::fields::STATUS_DETAIL;
use protocol::job::UpgradeInput;
use serde::Deserialize;
use std::collections::HashMap;

/// What shall become of a job execution.
#[derive(Debug, PartialEq, Eq)]
struct Update {
    status: JobExecutionStatus,
    /// Minutes after which AWS IoT Jobs itself ends the job execution as `TIMED_OUT`.
    timer: Option<i64>,
}

/// Handles one queued event. Repeats and events that come after the job execution has ended change nothing.
pub async fn handle(jobs: &aws_sdk_iotjobsdataplane::Client, body: &str) -> Result<(), Error> {
    let event = read(body)?;
    let Some(update) = update(&event) else { return Ok(()) };
    let request = jobs
        .update_job_execution()
        .job_id(event.job_id.as_str())
        .thing_name(event.thing_name.as_str())
        .execution_number(event.execution_number)
        .status(update.status.clone())
        .set_step_timeout_in_minutes(update.timer);
    let sent = match request.clone().set_status_details(Some(details(&event))).send().await {
        // Unicode grows, and with it what AWS may not know: a job execution must not hang for a word.
        Err(error) if code(&error) == Some("InvalidRequestException") => {
            let (thing, job) = (event.thing_name.as_str(), event.job_id.as_str());
            tracing::warn!(thing, job, details = ?details(&event), %error, "told without its details, which were refused");
            request.send().await
        }
        sent => sent,
    };
    let outcome = match sent {
        Ok(_) => "APPLIED",
        Err(error) => match code(&error) {
            // Final already (this is a repeat, or somebody cancelled it), or deleted.
            Some("InvalidStateTransitionException" | "TerminalStateException" | "ResourceNotFoundException") => "LATE",
            _ => return Err(aws("iot:UpdateJobExecution", &error)),
        },
    };
    let thing = event.thing_name.as_str();
    tracing::info!(thing, job = event.job_id.as_str(), status = update.status.as_str(), outcome);
    Ok(())
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
    Ok(UpgradeEvent {
        event_type: EventType::FirmwareUpgradeFail,
        thing_name: input.thing_name,
        job_id: input.job_id,
        execution_number: input.execution_number,
        operation_id: input.operation_id,
        firmware_version: input.document.firmware_version,
        reason: detail.error.or_else(|| Some(ErrorName::WorkflowStopped.as_str().to_owned())),
        cause: Some(cause),
        step: None,
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
    use aws_sdk_iotjobsdataplane::operation::update_job_execution::{
        UpdateJobExecutionError, UpdateJobExecutionOutput,
    };
    use aws_sdk_iotjobsdataplane::types::error::{
        InvalidRequestException, InvalidStateTransitionException, ThrottlingException,
    };
    use aws_smithy_mocks::{RuleMode, mock, mock_client};
    use serde_json::json;

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
    }

    #[tokio::test]
    async fn details_are_told_in_characters_that_aws_takes() {
        let updated = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution)
            .match_requests(|request| {
                let details = request.status_details().unwrap();
                details["reason"] == "InstallFailed"
                    && details["cause"] == "line break"
                    && !details.contains_key("step")
            })
            .then_output(|| UpdateJobExecutionOutput::builder().build());
        let client = mock_client!(aws_sdk_iotjobsdataplane, [&updated]);
        let body = serde_json::to_string(&event("FIRMWARE_UPGRADE_FAIL", Some("InstallFailed"))).unwrap();
        assert_eq!(handle(&client, &body).await, Ok(()));
        assert_eq!(updated.num_calls(), 1);
    }

    #[tokio::test]
    async fn details_that_are_refused_all_the_same_are_left_out() {
        let refused = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution)
            .match_requests(|request| request.status_details().is_some())
            .then_error(|| {
                let code = aws_sdk_iotjobsdataplane::error::ErrorMetadata::builder().code("InvalidRequestException");
                let error = InvalidRequestException::builder().meta(code.build());
                UpdateJobExecutionError::InvalidRequestException(error.build())
            });
        let told = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution)
            .match_requests(|request| {
                request.status_details().is_none() && request.status() == Some(&JobExecutionStatus::Failed)
            })
            .then_output(|| UpdateJobExecutionOutput::builder().build());
        let client = mock_client!(aws_sdk_iotjobsdataplane, RuleMode::MatchAny, [&refused, &told]);
        let body = serde_json::to_string(&event("FIRMWARE_UPGRADE_FAIL", Some("InstallFailed"))).unwrap();
        assert_eq!(handle(&client, &body).await, Ok(()));
        assert_eq!((refused.num_calls(), told.num_calls()), (1, 1));
    }

    #[tokio::test]
    async fn a_final_job_execution_is_no_error_and_a_throttled_call_is() {
        let body = serde_json::to_string(&event("FIRMWARE_UPGRADE_SUCCESS", None)).unwrap();
        let meta = |code: &str| aws_sdk_iotjobsdataplane::error::ErrorMetadata::builder().code(code).build();
        let is_final = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution).then_error(move || {
            let error = InvalidStateTransitionException::builder().meta(meta("InvalidStateTransitionException"));
            UpdateJobExecutionError::InvalidStateTransitionException(error.build())
        });
        assert_eq!(handle(&mock_client!(aws_sdk_iotjobsdataplane, [&is_final]), &body).await, Ok(()));
        let throttled = mock!(aws_sdk_iotjobsdataplane::Client::update_job_execution).then_error(move || {
            let error = ThrottlingException::builder().meta(meta("ThrottlingException"));
            UpdateJobExecutionError::ThrottlingException(error.build())
        });
        let error = handle(&mock_client!(aws_sdk_iotjobsdataplane, [&throttled]), &body).await.unwrap_err();
        assert_eq!(error.name, ErrorName::Throttled);
    }
}
