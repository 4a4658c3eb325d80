//! A job has reached a device, a device has come online or has failed to update itself once too often, or a schedule is due: starts
//! the workflow, once.

use super::started::{Started, StartedOperations};
use crate::allowance::{Allowances, Unasked};
use crate::error::{aws, code, unbuilt};
use crate::execution_name::execution_name;
use crate::job_executions::{JobExecutions, Next, Standing, is_unsettled, unix_seconds};
use crate::queue::{MqttMessage, NextOf, json};
use crate::{Error, ErrorName, things};
use protocol::job::{JobDocument, NextExecution, NotifyNext, UpgradeInput, WorkflowName};
use protocol::recovery::RecoveryInput;
use protocol::settings::ConfigPushInput;
use protocol::{InvalidId, JobId, JsonText, OperationId, PresenceEvent, ThingName};
use serde::Deserialize;
use serde_json::Value;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Starts executions.
    pub step_functions: aws_sdk_sfn::Client,
    /// The registry, which knows who takes part.
    pub iot: aws_sdk_iot::Client,
    /// The state machine behind [`WorkflowName::FirmwareUpgrade`].
    pub firmware_upgrade_arn: String,
    /// The state machine that brings settings to devices.
    pub config_push_arn: String,
    /// The state machine that takes care of devices that cannot update themselves.
    pub failed_update_recovery_arn: String,
    /// The state machine that runs jobs on premises.
    pub on_premises_job_arn: String,
    /// Tells whether a job execution still waits.
    pub executions: JobExecutions,
    /// How often a device may come online and get its settings.
    pub allowances: Allowances,
    /// By which job executions' events find what runs.
    pub started: StartedOperations,
    /// The stack's name: jobs that name another one are left to that.
    pub stack: String,
    /// Whether jobs that name no stack are this one's.
    pub owns_device_topics: bool,
}

/// An execution to start, once.
struct Start<'a> {
    state_machine: &'a str,
    /// The execution's name.
    name: String,
    input: Result<String, serde_json::Error>,
    /// The job execution that it is for, if it is for one.
    job: Option<(ThingName, JobId, Started)>,
}

/// A schedule that is due, as `JobScheduleResource` of the template puts it into a queue.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Scheduled {
    /// As `EventBridge` Scheduler says it: the same when it says it twice.
    scheduled_time: String,
    #[serde(deserialize_with = "protocol::json_object")]
    input: JsonText,
}

/// Handles one queued message: of the broker (a job that has reached its device, a device that has come online), of retry-counter
/// (a device that is to be parked or given up), of a schedule, or a question for a device's next job. A repeat starts nothing; a job that is not
/// ours is left alone, and so is what is no thing.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let start = if let Ok(scheduled) = json::<Scheduled>("schedule", body.as_bytes()) {
        Some(of_schedule(adapters, &scheduled))
    } else if let Ok(recovery) = json::<RecoveryInput>("decision", body.as_bytes()) {
        Some(of_recovery(adapters, &recovery))
    } else if let Ok(NextOf { next_of: thing }) = json("question", body.as_bytes()) {
        match adapters.executions.next(&thing).await? {
            Next::Nothing => of_job(adapters, thing, NotifyNext { execution: None })?,
            Next::Queued(execution) => of_job(adapters, thing, NotifyNext { execution: Some(execution) })?,
            Next::Begun(job) => {
                let (thing, blocked_by) = (thing.as_str(), job.as_str());
                tracing::info!(
                    thing,
                    blocked_by,
                    outcome = "IGNORED",
                    "a job is in progress, and those behind it wait"
                );
                None
            }
        }
    } else {
        of_message(adapters, &MqttMessage::parse(body)?).await?
    };
    match start {
        Some(start) if is_due(adapters, &start).await? => begin(adapters, start).await,
        _ => Ok(()),
    }
}

/// Whether the execution shall start. That of a job execution not if it has ended meanwhile: whoever ends one looks first for what
/// runs and here it is written first, so one of the two sees the other.
async fn is_due(adapters: &Adapters, start: &Start<'_>) -> Result<bool, Error> {
    let Some((thing, job, operation)) = &start.job else { return Ok(true) };
    adapters.started.add(thing, job, operation).await?;
    let (number, queued_at) = (operation.execution_number, operation.queued_at);
    let is_new = queued_at.is_some_and(is_unsettled);
    match adapters.executions.standing(thing, job, number, queued_at).await? {
        Standing::Pending(_) => Ok(true),
        Standing::Unknown if is_new => {
            let message =
                format!("the job {job} was queued for {thing} just now, and AWS IoT Jobs does not have it (yet)");
            Err(Error::new(ErrorName::ServiceUnavailable, message))
        }
        Standing::Ended | Standing::Unknown => {
            tracing::info!(thing = thing.as_str(), job = job.as_str(), number, queued_at, outcome = "LATE");
            Ok(false)
        }
    }
}

/// What a message of the broker starts, if anything.
async fn of_message<'a>(adapters: &'a Adapters, message: &MqttMessage) -> Result<Option<Start<'a>>, Error> {
    if message.topic.starts_with("$aws/events/presence/") {
        return of_session(adapters, &message.json()?).await;
    }
    of_job(adapters, thing_of_topic(&message.topic)?, message.json()?)
}

async fn begin(adapters: &Adapters, start: Start<'_>) -> Result<(), Error> {
    let name = start.name;
    let input = start.input.map_err(unbuilt)?;
    let request = adapters.step_functions.start_execution().state_machine_arn(start.state_machine);
    let outcome = match request.name(&name).input(input).send().await {
        Ok(_) => "APPLIED",
        Err(error) if code(&error) == Some("ExecutionAlreadyExists") => "DUPLICATE",
        Err(error) => return Err(aws("states:StartExecution", &error)),
    };
    tracing::info!(execution = name, state_machine = start.state_machine, outcome);
    Ok(())
}

/// The job on premises that is due.
fn of_schedule<'a>(adapters: &'a Adapters, scheduled: &Scheduled) -> Start<'a> {
    let key = ["scheduled".to_owned(), "job".to_owned(), scheduled.scheduled_time.clone()];
    Start {
        state_machine: &adapters.on_premises_job_arn,
        name: execution_name(&key),
        input: Ok(scheduled.input.to_string()),
        job: None,
    }
}

/// The workflow of a job execution, by the job's document.
fn of_job(adapters: &Adapters, thing: ThingName, next: NotifyNext) -> Result<Option<Start<'_>>, Error> {
    let Some(execution) = next.execution else {
        tracing::info!(thing = thing.as_str(), outcome = "IGNORED", "nothing is pending");
        return Ok(None);
    };
    let NextExecution { job_id, execution_number, queued_at, job_document } = execution;
    let queued_at = queued_at.map(unix_seconds);
    let workflow = job_document.get("workflow");
    let stack = job_document.get("stack").and_then(Value::as_str);
    // Other products' jobs may have workflows too, even of that name, and another stack of ours has jobs of its own. What create-job
    // made before stacks had names has a digest.
    let is_nameless_of_ours = adapters.owns_device_topics && job_document.get("requestDigest").is_some();
    let is_ours = workflow.is_some_and(|name| WorkflowName::deserialize(name).is_ok())
        && stack.map_or(is_nameless_of_ours, |stack| stack == adapters.stack);
    if !is_ours {
        let (thing, blocked_by) = (thing.as_str(), job_id.as_str());
        tracing::info!(thing, blocked_by, outcome = "IGNORED", "foreign job: until it has ended, ours behind it wait");
        return Ok(None);
    }
    let document: JobDocument = serde_json::from_value(job_document)
        .map_err(|error| Error::new(ErrorName::InvalidInput, format!("jobDocument: {error}")))?;
    let state_machine = match document.workflow {
        WorkflowName::FirmwareUpgrade => &adapters.firmware_upgrade_arn,
    };
    let operation_id = OperationId::of_job_execution(&job_id, execution_number, queued_at);
    let attempt = queued_at.map_or(execution_number.to_string(), |time| format!("{execution_number}-{time}"));
    let key = [job_id.to_string(), thing.to_string(), attempt];
    let job =
        (thing.clone(), job_id.clone(), Started { operation_id: operation_id.clone(), execution_number, queued_at });
    let input = UpgradeInput { thing_name: thing, job_id, execution_number, queued_at, operation_id, document };
    Ok(Some(Start { state_machine, name: execution_name(&key), input: serde_json::to_string(&input), job: Some(job) }))
}

/// The configuration push of a session; none if its client is no thing, or one that has no user. The connection's number
/// belongs to its key: a persistent session keeps its identifier over connections.
async fn of_session<'a>(adapters: &'a Adapters, event: &PresenceEvent) -> Result<Option<Start<'a>>, Error> {
    let thing_name: ThingName = event
        .client_id
        .parse()
        .map_err(|error: InvalidId| Error::new(ErrorName::MalformedMessage, format!("clientId: {error}")))?;
    let session = format!("{} {}", event.session_identifier, event.version_number);
    if !adapters.allowances.allows(&event.client_id, Unasked::Session, session.as_bytes(), event.timestamp).await? {
        return Ok(None);
    }
    let thing = things::describe(&adapters.iot, thing_name.as_str()).await?;
    let external_id = thing.and_then(|mut thing| thing.attributes.remove("externalId")).filter(|id| !id.is_empty());
    if external_id.is_none() {
        tracing::info!(client = event.client_id, outcome = "IGNORED", "no thing with the attribute externalId");
        return Ok(None);
    }
    let key = [thing_name.to_string(), event.session_identifier.clone(), event.version_number.to_string()];
    let input = ConfigPushInput { thing_name, connected_at: event.timestamp, external_id };
    Ok(Some(Start {
        state_machine: &adapters.config_push_arn,
        name: execution_name(&key),
        input: serde_json::to_string(&input),
        job: None,
    }))
}

/// The recovery of a device that has failed once too often. The execution's name is the failure's operation.
fn of_recovery<'a>(adapters: &'a Adapters, input: &RecoveryInput) -> Start<'a> {
    Start {
        state_machine: &adapters.failed_update_recovery_arn,
        name: input.failure.operation_id.to_string(),
        input: serde_json::to_string(input),
        job: None,
    }
}

fn thing_of_topic(topic: &str) -> Result<ThingName, Error> {
    topic
        .strip_prefix("$aws/things/")
        .and_then(|rest| rest.strip_suffix("/jobs/notify-next"))
        .and_then(|thing| thing.parse().ok())
        .ok_or_else(|| Error::invalid("topic", topic, "$aws/things/{thing}/jobs/notify-next, or presence"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_dynamodb::operation::put_item::PutItemOutput;
    use aws_sdk_iotjobsdataplane::operation::describe_job_execution::DescribeJobExecutionOutput;
    use aws_sdk_iotjobsdataplane::types::{JobExecution, JobExecutionStatus};
    use aws_sdk_sfn::operation::start_execution::{StartExecutionError, StartExecutionOutput};
    use aws_smithy_mocks::{mock, mock_client};

    fn message(document: &serde_json::Value) -> String {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let execution = serde_json::json!({
            "jobId": "job-1", "executionNumber": 2, "queuedAt": 1_795_238_492, "jobDocument": document,
        });
        let payload = serde_json::json!({"timestamp": 1, "execution": execution}).to_string();
        let topic = "$aws/things/gateway-1/jobs/notify-next";
        serde_json::json!({"topic": topic, "payload": BASE64_STANDARD.encode(payload)}).to_string()
    }

    fn ours() -> serde_json::Value {
        serde_json::json!({
            "version": "1.0", "workflow": "firmware-upgrade", "firmwareVersion": "1.2.3", "upgradeTrigger": "manual",
            "artifact": {}, "timeoutMinutes": 60, "requestDigest": "",
        })
    }

    /// AWS IoT Jobs, whose second job execution of each job on each thing was queued then.
    fn executions(queued_at: i64) -> JobExecutions {
        let describe = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution)
            .match_requests(|request| request.execution_number() == Some(2))
            .then_output(move || {
                let execution = JobExecution::builder().status(JobExecutionStatus::Queued).queued_at(queued_at);
                DescribeJobExecutionOutput::builder().execution(execution.build()).build()
            });
        JobExecutions::new(mock_client!(aws_sdk_iotjobsdataplane, [&describe]))
    }

    fn remembered() -> StartedOperations {
        let put = mock!(aws_sdk_dynamodb::Client::put_item)
            .match_requests(|request| {
                let item = request.item().unwrap();
                item["operation"].as_s().unwrap() == "gateway-1#job#job-1"
                    && item["step"].as_s().unwrap() == "job-1-2-1795238492"
                    && item["queuedAt"].as_n().unwrap() == "1795238492"
            })
            .then_output(|| PutItemOutput::builder().build());
        StartedOperations::new(mock_client!(aws_sdk_dynamodb, [&put]), "rendezvous".into())
    }

    fn adapters(
        step_functions: aws_sdk_sfn::Client,
        iot: aws_sdk_iot::Client,
        executions: JobExecutions,
        started: StartedOperations,
    ) -> Adapters {
        Adapters {
            step_functions,
            iot,
            firmware_upgrade_arn: "arn:state-machine".into(),
            config_push_arn: "arn:config-push".into(),
            failed_update_recovery_arn: "arn:recovery".into(),
            on_premises_job_arn: "arn:on-premises".into(),
            allowances: crate::allowance::tests::unused(),
            executions,
            started,
            stack: "fleetflow".into(),
            owns_device_topics: true,
        }
    }

    async fn outcome(code: Option<&'static str>, document: &serde_json::Value) -> (Result<(), Error>, usize) {
        outcome_of(code, document, 1_795_238_492).await
    }

    async fn outcome_of(
        code: Option<&'static str>,
        document: &serde_json::Value,
        queued_at: i64,
    ) -> (Result<(), Error>, usize) {
        let start = mock!(aws_sdk_sfn::Client::start_execution).match_requests(|request| {
            let input: UpgradeInput = serde_json::from_str(request.input().unwrap()).unwrap();
            input.operation_id.as_str() == "job-1-2-1795238492"
                && request.name().unwrap().starts_with("job-1-gateway-1-2-1795238492-")
        });
        let start = match code {
            None => start.then_output(|| {
                let started = StartExecutionOutput::builder().execution_arn("arn:execution");
                started.start_date(aws_sdk_sfn::primitives::DateTime::from_secs(0)).build().unwrap()
            }),
            Some(code) => start.then_error(move || {
                StartExecutionError::generic(aws_sdk_sfn::error::ErrorMetadata::builder().code(code).build())
            }),
        };
        let adapters = adapters(
            mock_client!(aws_sdk_sfn, [&start]),
            mock_client!(aws_sdk_iot, []),
            executions(queued_at),
            remembered(),
        );
        (handle(&adapters, &message(document)).await, start.num_calls())
    }

    #[tokio::test]
    async fn a_schedule_starts_its_job_under_the_name_of_its_time() {
        let start = mock!(aws_sdk_sfn::Client::start_execution)
            .match_requests(|request| {
                request.state_machine_arn() == Some("arn:on-premises")
                    && request.input() == Some(r#"{"b":117.63331139400017,"a":123456789012345678901}"#)
                    && request.name().unwrap().starts_with("scheduled-job-2026-11-24T03_00_00Z-")
            })
            .then_error(|| {
                let already = aws_sdk_sfn::error::ErrorMetadata::builder().code("ExecutionAlreadyExists");
                StartExecutionError::generic(already.build())
            });
        let adapters =
            adapters(mock_client!(aws_sdk_sfn, [&start]), mock_client!(aws_sdk_iot, []), executions(0), remembered());
        let body =
            r#"{"scheduledTime":"2026-11-24T03:00:00Z","input":{"b":117.63331139400017,"a":123456789012345678901}}"#;
        assert_eq!(handle(&adapters, body).await, Ok(()));
        assert_eq!(start.num_calls(), 1);
        let broken = handle(&adapters, r#"{"scheduledTime":"2026-11-24T03:00:00Z","input":7}"#).await;
        assert_eq!(broken.unwrap_err().name, ErrorName::MalformedMessage);
    }

    #[tokio::test]
    async fn a_repeat_is_no_error_and_a_throttled_start_is_tried_again() {
        assert_eq!(outcome(None, &ours()).await, (Ok(()), 1));
        assert_eq!(outcome(Some("ExecutionAlreadyExists"), &ours()).await, (Ok(()), 1));
        let (result, _) = outcome(Some("ThrottlingException"), &ours()).await;
        assert!(result.unwrap_err().name.is_transient());
    }

    /// Whoever deletes or cancels a job before its notification is handled finds nothing that runs.
    #[tokio::test]
    async fn a_job_execution_that_is_gone_by_then_starts_nothing() {
        assert_eq!(outcome_of(None, &ours(), 1_795_238_494).await, (Ok(()), 0));
    }

    /// What AWS IoT Jobs announces it may not tell yet where it is asked, and it announces once.
    #[tokio::test]
    async fn a_job_execution_that_is_unknown_just_after_it_was_queued_is_asked_for_again() {
        use aws_sdk_iotjobsdataplane::operation::describe_job_execution::DescribeJobExecutionError;
        for (age, result) in [(5, Err(ErrorName::ServiceUnavailable)), (60, Ok(false))] {
            let unknown = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution).then_error(|| {
                let code = aws_sdk_iotjobsdataplane::error::ErrorMetadata::builder().code("ResourceNotFoundException");
                DescribeJobExecutionError::generic(code.build())
            });
            let put = mock!(aws_sdk_dynamodb::Client::put_item).then_output(|| PutItemOutput::builder().build());
            let adapters = adapters(
                mock_client!(aws_sdk_sfn, []),
                mock_client!(aws_sdk_iot, []),
                JobExecutions::new(mock_client!(aws_sdk_iotjobsdataplane, [&unknown])),
                StartedOperations::new(mock_client!(aws_sdk_dynamodb, [&put]), "rendezvous".into()),
            );
            let next: NotifyNext = serde_json::from_value(serde_json::json!({"execution": {
                "jobId": "job-1", "executionNumber": 1, "queuedAt": crate::aws::now_seconds() - age, "jobDocument": ours(),
            }}))
            .unwrap();
            let start = of_job(&adapters, "gateway-1".parse().unwrap(), next).unwrap().unwrap();
            assert_eq!(is_due(&adapters, &start).await.map_err(|error| error.name), result, "{age} s");
        }
    }

    #[tokio::test]
    async fn a_foreign_job_is_left_alone_and_a_broken_document_of_ours_is_told() {
        for foreign in [
            serde_json::json!({"operation": "reboot"}),
            serde_json::json!({"workflow": "reboot"}),
            serde_json::json!({"workflow": {"steps": []}, "stack": 7}),
            serde_json::json!({"workflow": "firmware-upgrade", "image": "https://example.com/7"}),
            serde_json::json!(["reboot"]),
            serde_json::json!(null),
        ] {
            assert_eq!(outcome(None, &foreign).await, (Ok(()), 0), "{foreign}");
        }
        // Two stacks in an account hear of each other's jobs; those made before name none.
        let mut named = ours();
        for (stack, starts) in [("fleetflow", 1), ("fleetflow-2", 0)] {
            named["stack"] = stack.into();
            assert_eq!(outcome(None, &named).await, (Ok(()), starts), "{stack}");
        }
        for ours in [
            serde_json::json!({"workflow": "firmware-upgrade", "stack": "fleetflow"}),
            serde_json::json!({"workflow": "firmware-upgrade", "requestDigest": ""}),
        ] {
            let (result, starts) = outcome(None, &ours).await;
            assert_eq!((result.unwrap_err().name, starts), (ErrorName::InvalidInput, 0), "{ours}");
        }
    }

    /// Whoever asks for a thing's next job finds the one that blocks the queue, and leaves it alone.
    #[tokio::test]
    async fn a_job_at_the_head_of_the_queue_is_no_error_for_whoever_asks_for_the_next() {
        for (status, document) in [
            (JobExecutionStatus::InProgress, r#"{"operation":"reboot"}"#),
            (JobExecutionStatus::Queued, r#"{"operation":"reboot"}"#),
            (JobExecutionStatus::Queued, "reboot"),
        ] {
            let next = mock!(aws_sdk_iotjobsdataplane::Client::describe_job_execution)
                .match_requests(|request| request.job_id() == Some("$next"))
                .then_output(move || {
                    let execution = JobExecution::builder().status(status.clone()).job_id("foreign-1");
                    let execution = execution.execution_number(1).job_document(document);
                    DescribeJobExecutionOutput::builder().execution(execution.build()).build()
                });
            let executions = JobExecutions::new(mock_client!(aws_sdk_iotjobsdataplane, [&next]));
            let adapters =
                adapters(mock_client!(aws_sdk_sfn, []), mock_client!(aws_sdk_iot, []), executions, remembered());
            assert_eq!(handle(&adapters, r#"{"nextOf":"gateway-1"}"#).await, Ok(()), "{document}");
            assert_eq!(next.num_calls(), 1);
        }
    }

    /// What becomes of a broker's message, with such an answer of the registry, and with what the execution begins.
    async fn start_of(
        topic: &str,
        payload: &serde_json::Value,
        registry: aws_smithy_mocks::Rule,
    ) -> (Result<(), Error>, Option<serde_json::Value>) {
        start_with(topic, payload, &registry, crate::allowance::tests::unused()).await
    }

    async fn start_with(
        topic: &str,
        payload: &serde_json::Value,
        registry: &aws_smithy_mocks::Rule,
        allowances: Allowances,
    ) -> (Result<(), Error>, Option<serde_json::Value>) {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let started = std::sync::Arc::new(std::sync::Mutex::new(None));
        let seen = std::sync::Arc::clone(&started);
        let start = mock!(aws_sdk_sfn::Client::start_execution)
            .match_requests(move |request| {
                *seen.lock().unwrap() = request.input().map(|input| serde_json::from_str(input).unwrap());
                true
            })
            .then_error(|| {
                let already = aws_sdk_sfn::error::ErrorMetadata::builder().code("ExecutionAlreadyExists");
                StartExecutionError::generic(already.build())
            });
        let (step_functions, iot) = (mock_client!(aws_sdk_sfn, [&start]), mock_client!(aws_sdk_iot, [registry]));
        let adapters = Adapters { allowances, ..adapters(step_functions, iot, executions(0), remembered()) };
        let message = serde_json::json!({
            "topic": topic, "payload": BASE64_STANDARD.encode(payload.to_string()), "clientId": "gateway-7",
            "principal": "a".repeat(64), "receivedAt": 5,
        });
        let outcome = handle(&adapters, &message.to_string()).await;
        let started = started.lock().unwrap().take();
        (outcome, started)
    }

    fn thing(attributes: &[(&str, &str)]) -> aws_smithy_mocks::Rule {
        use aws_sdk_iot::operation::describe_thing::DescribeThingOutput;
        let attributes: std::collections::HashMap<String, String> =
            attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        mock!(aws_sdk_iot::Client::describe_thing)
            .then_output(move || DescribeThingOutput::builder().set_attributes(Some(attributes.clone())).build())
    }

    fn registry_says(code: &'static str) -> aws_smithy_mocks::Rule {
        use aws_sdk_iot::operation::describe_thing::DescribeThingError;
        mock!(aws_sdk_iot::Client::describe_thing).then_error(move || {
            DescribeThingError::generic(aws_sdk_iot::error::ErrorMetadata::builder().code(code).build())
        })
    }

    #[tokio::test]
    async fn only_things_with_an_external_id_get_their_settings() {
        let topic = "$aws/events/presence/connected/gateway-7";
        let event = serde_json::json!({
            "clientId": "gateway-7", "timestamp": 1, "eventType": "connected", "sessionIdentifier": "s", "versionNumber": 0,
        });
        let (outcome, started) = start_of(topic, &event, thing(&[("externalId", "user-7")])).await;
        let expected = serde_json::json!({"thingName": "gateway-7", "connectedAt": 1, "externalId": "user-7"});
        assert_eq!((outcome, started), (Ok(()), Some(expected)));
        for foreign in [thing(&[]), thing(&[("externalId", "")]), registry_says("ResourceNotFoundException")] {
            assert_eq!(start_of(topic, &event, foreign).await, (Ok(()), None));
        }
        // In a storm of connections: the queue delivers it again.
        let (outcome, started) = start_of(topic, &event, registry_says("ThrottlingException")).await;
        assert!(outcome.unwrap_err().name.is_transient() && started.is_none());
    }

    /// What is decided about a device starts its recovery, under the name of the failure.
    #[tokio::test]
    async fn a_decision_starts_the_recovery_of_a_device() {
        let body = r#"{"thingName":"gateway-7","operationId":"o-1","timestamp":1,"receivedAt":2,"decision":"PARK","attempt":10,"cycle":1}"#;
        let start = mock!(aws_sdk_sfn::Client::start_execution)
            .match_requests(move |request| {
                request.state_machine_arn() == Some("arn:recovery")
                    && request.name() == Some("o-1")
                    && request.input() == Some(body)
            })
            .then_error(|| {
                let already = aws_sdk_sfn::error::ErrorMetadata::builder().code("ExecutionAlreadyExists");
                StartExecutionError::generic(already.build())
            });
        let adapters =
            adapters(mock_client!(aws_sdk_sfn, [&start]), mock_client!(aws_sdk_iot, []), executions(0), remembered());
        assert_eq!((handle(&adapters, body).await, start.num_calls()), (Ok(()), 1));
    }

    #[tokio::test]
    async fn a_session_beyond_the_allowance_of_its_hour_costs_nothing_more() {
        let topic = "$aws/events/presence/connected/gateway-7";
        let event = serde_json::json!({
            "clientId": "gateway-7", "timestamp": 1, "eventType": "connected", "sessionIdentifier": "s", "versionNumber": 0,
        });
        let registry = thing(&[("externalId", "user-7")]);
        let (outcome, started) = start_with(topic, &event, &registry, crate::allowance::tests::used_up()).await;
        assert_eq!((outcome, started, registry.num_calls()), (Ok(()), None, 0));
    }
}
