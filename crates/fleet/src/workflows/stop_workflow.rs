//! A job execution has ended behind its workflow's back: cancelled or deleted by an operator, timed out by AWS IoT Jobs.

use super::rendezvous::{Operation, Rendezvous};
use super::started::{Started, StartedOperations};
use crate::job_executions::{JobExecutions, Standing, is_unsettled, unix_seconds};
use crate::queue::{MqttMessage, Queue};
use crate::{Error, ErrorName};
use protocol::job::JobExecutionEvent;
use protocol::{JobId, OperationId, ThingName};

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Where the workflow waits.
    pub rendezvous: Rendezvous,
    /// What has been started for a job on a thing.
    pub started: StartedOperations,
    /// Tells which of these still have their job executions.
    pub executions: JobExecutions,
    /// Where start-workflow is asked to look for the next attempt.
    pub notifications: Queue,
}

/// Handles one queued job execution event. The workflow learns of it in the wait that it is in, or in its next one,
/// even if it has not begun yet; then it tells the device and ends.
///
/// The event does not say which attempt has ended, and may come when the next one is under way already: of those that have been
/// started each is looked up, and one that AWS IoT Jobs still has is left alone. One that is started later looks itself.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let message = MqttMessage::parse(body)?;
    let event: JobExecutionEvent = message.json()?;
    let error = match message.topic.rsplit('/').next().unwrap_or_default() {
        "timed_out" => Error::new(ErrorName::JobTimedOut, "the job's timer ended the job execution"),
        end @ ("canceled" | "removed" | "rejected" | "deleted") => {
            Error::new(ErrorName::JobCanceled, format!("the job execution is {end}"))
        }
        _ => return Ok(()),
    };
    let thing = event
        .thing_name()
        .ok_or_else(|| Error::new(ErrorName::MalformedMessage, format!("thingArn: got {:?}", event.thing_arn)))?;
    let (pending, ended) = standing(adapters, &thing, &event.job_id).await?;
    for operation_id in ended {
        let operation = Operation::new(&thing, &operation_id);
        adapters.rendezvous.fail(&operation, &error).await?;
        if error.name == ErrorName::JobTimedOut {
            adapters.notifications.ask_for_next(&thing).await?;
        }
        adapters.started.remove(&thing, &event.job_id, &operation_id).await?;
        tracing::info!(operation = operation.key(), error = error.name.as_str(), outcome = "APPLIED");
    }
    // It may be the next attempt, or this one, whose end AWS IoT Jobs does not tell yet.
    if pending && is_unsettled(unix_seconds(event.timestamp)) {
        let message = format!("the job {} has ended on {thing}, where AWS IoT Jobs still has it", event.job_id);
        return Err(Error::new(ErrorName::ServiceUnavailable, message));
    }
    Ok(())
}

/// Of what has been started for a job on a thing: whether anything still has its job execution, and what has it no more.
async fn standing(adapters: &Adapters, thing: &ThingName, job: &JobId) -> Result<(bool, Vec<OperationId>), Error> {
    let (mut pending, mut ended) = (false, Vec::new());
    for Started { operation_id, execution_number, queued_at } in adapters.started.of(thing, job).await? {
        match adapters.executions.standing(thing, job, execution_number, queued_at).await? {
            Standing::Pending(_) => pending = true,
            Standing::Ended | Standing::Unknown => ended.push(operation_id),
        }
    }
    Ok((pending, ended))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_dynamodb::operation::query::QueryOutput;
    use aws_sdk_iotjobsdataplane::error::ErrorMetadata;
    use aws_sdk_iotjobsdataplane::operation::describe_job_execution::{
        DescribeJobExecutionError, DescribeJobExecutionOutput,
    };
    use aws_sdk_iotjobsdataplane::types::{JobExecution, JobExecutionStatus};
    use aws_smithy_mocks::{RuleMode, mock, mock_client};
    use base64::{Engine, prelude::BASE64_STANDARD};
    use serde_json::json;

    fn adapters(dynamodb: aws_sdk_dynamodb::Client, jobs: aws_sdk_iotjobsdataplane::Client) -> Adapters {
        let config = aws_config::SdkConfig::builder().behavior_version(aws_config::BehaviorVersion::latest()).build();
        Adapters {
            rendezvous: Rendezvous::new(&config, "rendezvous".into()),
            started: StartedOperations::new(dynamodb, "rendezvous".into()),
            executions: JobExecutions::new(jobs),
            notifications: Queue::new(&config, "queue".into()),
        }
    }

    /// Of three attempts that have been started the last is under way, and the second one's number is another job's by now.
    #[tokio::test]
    async fn an_event_that_names_no_attempt_is_for_those_that_have_ended() {
        let query = mock!(aws_sdk_dynamodb::Client::query)
            .match_requests(|request| {
                request.expression_attribute_values().unwrap()[":operation"].as_s().unwrap() == "gateway-1#job#job-1"
            })
            .then_output(|| {
                let item = |(number, time): (i64, i64)| {
                    let operation = format!("job-1-{number}-{time}");
                    let item = json!({"step": operation, "executionNumber": number, "queuedAt": time, "expiresAt": 1});
                    serde_dynamo::to_item(item).unwrap()
                };
                QueryOutput::builder().set_items(Some([(1, 10), (2, 20), (3, 30)].map(item).into())).build()
            });
        let first = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution)
            .match_requests(|request| request.execution_number() == Some(1))
            .then_error(|| {
                let code = ErrorMetadata::builder().code("TerminalStateException");
                DescribeJobExecutionError::generic(code.build())
            });
        let others = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution)
            .match_requests(|request| request.execution_number() != Some(1))
            .then_output(|| {
                let execution = JobExecution::builder().status(JobExecutionStatus::InProgress).queued_at(30);
                DescribeJobExecutionOutput::builder().execution(execution.build()).build()
            });
        let jobs = mock_client!(aws_sdk_iotjobsdataplane, RuleMode::MatchAny, [&first, &others]);
        let adapters = adapters(mock_client!(aws_sdk_dynamodb, [&query]), jobs);
        let standing = standing(&adapters, &"gateway-1".parse().unwrap(), &"job-1".parse().unwrap()).await;
        let (pending, ended) = standing.unwrap();
        assert!(pending);
        assert_eq!(ended.iter().map(OperationId::as_str).collect::<Vec<_>>(), ["job-1-1-10", "job-1-2-20"]);
    }

    /// An event as AWS sends it: it has neither number nor time, and that of a deletion no status.
    #[tokio::test]
    async fn every_end_but_the_workflows_own_is_heard() {
        for (end, heard) in [
            ("timed_out", 1),
            ("canceled", 1),
            ("removed", 1),
            ("rejected", 1),
            ("deleted", 1),
            ("succeeded", 0),
            ("failed", 0),
        ] {
            let query = mock!(aws_sdk_dynamodb::Client::query).then_output(|| QueryOutput::builder().build());
            let adapters =
                adapters(mock_client!(aws_sdk_dynamodb, [&query]), mock_client!(aws_sdk_iotjobsdataplane, []));
            let payload = json!({
                "eventType": "JOB_EXECUTION", "eventId": "e", "timestamp": 1_795_238_500, "operation": end,
                "jobId": "job-1", "thingArn": "arn:aws:iot:eu-west-1:123456789012:thing/gateway-1", "statusDetails": {},
            });
            let topic = format!("$aws/events/jobExecution/job-1/{end}");
            let body = json!({"topic": topic, "payload": BASE64_STANDARD.encode(payload.to_string())});
            assert_eq!(handle(&adapters, &body.to_string()).await, Ok(()), "{end}");
            assert_eq!(query.num_calls(), heard, "{end}");
        }
    }

    /// AWS IoT Jobs may announce an end before it tells of it where it is asked.
    #[tokio::test]
    async fn an_end_that_is_not_told_yet_is_looked_up_once_more() {
        for (age, result) in [(5, Err(ErrorName::ServiceUnavailable)), (60, Ok(()))] {
            let item = json!({"step": "job-1-1-7", "executionNumber": 1, "queuedAt": 7, "expiresAt": 1});
            let query = mock!(aws_sdk_dynamodb::Client::query).then_output(move || {
                let item = serde_dynamo::to_item(item.clone()).unwrap();
                QueryOutput::builder().items(item).build()
            });
            let pending = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution).then_output(|| {
                let execution = JobExecution::builder().status(JobExecutionStatus::InProgress).queued_at(7);
                DescribeJobExecutionOutput::builder().execution(execution.build()).build()
            });
            let jobs = mock_client!(aws_sdk_iotjobsdataplane, [&pending]);
            let adapters = adapters(mock_client!(aws_sdk_dynamodb, [&query]), jobs);
            let payload = json!({
                "timestamp": crate::aws::now_seconds() - age, "jobId": "job-1",
                "thingArn": "arn:aws:iot:eu-west-1:123456789012:thing/gateway-1",
            });
            let topic = "$aws/events/jobExecution/job-1/canceled";
            let body = json!({"topic": topic, "payload": BASE64_STANDARD.encode(payload.to_string())});
            assert_eq!(handle(&adapters, &body.to_string()).await.map_err(|error| error.name), result, "{age} s");
        }
    }
}
