//! Every Lambda function, on an AWS that takes whatever it is told and knows nothing.

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig};
use aws_sdk_dynamodb::config::{Credentials, SharedCredentialsProvider};
use aws_smithy_http_client::test_util::infallible_client_fn;
use fleet::allowance::Allowances;
use fleet::device_registry::DeviceRegistry;
use fleet::devices::agents::Agents;
use fleet::devices::worker_jobs::{self, WorkerJobs};
use fleet::devices::{
    configure_iot, get_device_settings, handle_device_response, presence, publish_to_device, settings,
};
use fleet::job_executions::JobExecutions;
use fleet::jobs::{create_job, update_job};
use fleet::lambda::{MAX_BATCH_BYTES, MAX_INPUT_BYTES, QueuedMessage, SqsEvent, batch, decode};
use fleet::queue::{DeadLetters, Queue};
use fleet::recovery::{Limits, RecoveryTable, Registry, record_success, restore_attributes, retry_counter};
use fleet::tasks::Tasks;
use fleet::telemetry::{check_remediation, ingest_telemetry, remediate};
use fleet::workflows::started::StartedOperations;
use fleet::workflows::{rendezvous::Rendezvous, start_workflow, stop_workflow, store_task_token};
use fleet::{Error, ErrorName};
use std::time::{Duration, SystemTime};
use ureq::http::{Request, Response, Uri};

/// When all of this happens, in Unix milliseconds.
pub(crate) const NOW: i64 = 1_764_000_000_000;

/// The functions behind queues.
pub(crate) const QUEUED: [&str; 10] = [
    "check-remediation",
    "get-device-settings",
    "handle-device-response",
    "ingest-telemetry",
    "record-success",
    "retry-counter",
    "start-workflow",
    "stop-workflow",
    "track-presence",
    "update-job",
];

/// The others, and what all that are behind queues have in common.
pub(crate) const INVOKED: [&str; 8] = [
    "any behind a queue",
    "await-device",
    "configure-iot",
    "create-job",
    "publish-to-device",
    "remediate",
    "restore-attributes",
    "store-task-token",
];

/// Whether a function is invoked with batches.
pub(crate) fn takes_batches(function: &str) -> bool {
    ["any behind a queue", "remediate"].contains(&function)
}

/// A runtime of one thread, as the functions have it.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be built")
}

/// What the functions reach.
pub(crate) struct Functions {
    presence: presence::Adapters,
    start: start_workflow::Adapters,
    stop: stop_workflow::Adapters,
    responses: handle_device_response::Adapters,
    successes: record_success::Adapters,
    job_updates: update_job::Adapters,
    telemetry: ingest_telemetry::Adapters,
    remedies: remediate::Adapters,
    jobs: create_job::Adapters,
    commands: publish_to_device::Adapters,
    waits: store_task_token::Adapters,
    settings: get_device_settings::Adapters,
    counter: retry_counter::Adapters,
    restoring: restore_attributes::Adapters,
    dead_letters: DeadLetters,
}

fn aws() -> SdkConfig {
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static("eu-west-1"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::for_tests()))
        .retry_config(RetryConfig::disabled())
        .http_client(infallible_client_fn(|request: Request<_>| answer(request.uri())))
        .build()
}

/// Nothing, in the words of the API that is asked.
fn answer(uri: &Uri) -> Response<&'static str> {
    let host = uri.host().unwrap_or_default();
    let answer = if host.starts_with("sns.") {
        "<PublishResponse><PublishResult/></PublishResponse>"
    } else if uri.path().starts_with("/job-templates/") {
        r#"{"document":"{\"version\":\"1.0\",\"workflow\":\"firmware-upgrade\",\"timeoutMinutes\":60}"}"#
    } else {
        "{}"
    };
    Response::builder().body(answer).expect("a response can be built")
}

impl Functions {
    #[allow(clippy::too_many_lines, reason = "one after the other")]
    pub(crate) fn new() -> Self {
        let aws = &aws();
        let text = || "x".to_owned();
        let rendezvous = Rendezvous::new(aws, text());
        let agents = Agents::new(aws, text());
        let device_registry = DeviceRegistry::new(aws, true);
        let settings = settings::SettingsTable::new(aws, text());
        let limits = worker_jobs::Limits {
            table: text(),
            bucket: text(),
            tenants: vec!["tenant1".to_owned()],
            lease: 1000,
            max_result_bytes: 1_000_000,
        };
        let (iot, s3) = (aws_sdk_iot::Client::new(aws), aws_sdk_s3::Client::new(aws));
        let mqtt = aws_sdk_iotdataplane::Client::new(aws);
        let worker_jobs = WorkerJobs::new(aws, mqtt.clone(), limits);
        let job_executions = aws_sdk_iotjobsdataplane::Client::new(aws);
        let executions = JobExecutions::new(job_executions.clone());
        let started = StartedOperations::new(aws_sdk_dynamodb::Client::new(aws), text());
        let notifications = Queue::new(aws, text());
        let allowances = Allowances::new(aws_sdk_dynamodb::Client::new(aws), text());
        let registry = Registry { iot: iot.clone(), table: RecoveryTable::new(aws, text()) };
        Self {
            presence: presence::Adapters {
                connections: presence::Connections::new(aws, text()),
                rendezvous: rendezvous.clone(),
                sessions: None,
            },
            start: start_workflow::Adapters {
                step_functions: aws_sdk_sfn::Client::new(aws),
                iot: iot.clone(),
                firmware_upgrade_arn: text(),
                config_push_arn: text(),
                failed_update_recovery_arn: text(),
                on_premises_job_arn: text(),
                allowances: allowances.clone(),
                executions: executions.clone(),
                started: started.clone(),
                stack: text(),
                owns_device_topics: true,
            },
            stop: stop_workflow::Adapters {
                rendezvous: rendezvous.clone(),
                started,
                executions: executions.clone(),
                notifications: notifications.clone(),
            },
            responses: handle_device_response::Adapters {
                owns_device_topics: true,
                rendezvous: rendezvous.clone(),
                agents: agents.clone(),
                registry: device_registry.clone(),
                settings: settings.clone(),
                allowances: allowances.clone(),
                sns: aws_sdk_sns::Client::new(aws),
                events_topic_arn: text(),
                mqtt: mqtt.clone(),
                worker_jobs: worker_jobs.clone(),
            },
            successes: record_success::Adapters { registry: registry.clone(), allowances: allowances.clone() },
            job_updates: update_job::Adapters {
                jobs: job_executions,
                executions,
                registry: device_registry.clone(),
                notifications,
            },
            telemetry: ingest_telemetry::Adapters::new(aws, readings()),
            remedies: remediate::Adapters::new(aws, mqtt.clone(), remedies(), rules()),
            jobs: create_job::Adapters {
                iot,
                s3: s3.clone(),
                stack: create_job::Stack {
                    account: "123456789012".to_owned(),
                    region: "eu-west-1".to_owned(),
                    job_template: text(),
                    firmware_bucket: text(),
                },
            },
            commands: publish_to_device::Adapters {
                rendezvous: rendezvous.clone(),
                agents,
                settings: settings.clone(),
                registry: device_registry.clone(),
                mqtt,
                s3,
                firmware_bucket: text(),
                worker_jobs,
                owns_device_topics: true,
            },
            waits: store_task_token::Adapters { rendezvous, registry: device_registry },
            settings: get_device_settings::Adapters::without_api(settings, Tasks::new(aws))
                .expect("the schema is good"),
            counter: retry_counter::Adapters {
                table: registry.table.clone(),
                iot: registry.iot.clone(),
                allowances,
                recoveries: Queue::new(aws, text()),
                successes: Queue::new(aws, text()),
                limits: Limits { attempts: 10, cycles: 2 },
            },
            restoring: restore_attributes::Adapters { registry, failed_group: text() },
            dead_letters: DeadLetters::new(aws, text()),
        }
    }

    /// Gives a function behind a queue a message.
    pub(crate) async fn deliver(&self, function: &str, body: &str) -> Result<(), Error> {
        match function {
            "check-remediation" => check_remediation::handle(&self.remedies, body, NOW).await,
            "get-device-settings" => get_device_settings::handle(&self.settings, body).await,
            "handle-device-response" => handle_device_response::handle(&self.responses, body).await,
            "ingest-telemetry" => {
                let message = QueuedMessage { id: "m".to_owned(), body: body.to_owned() };
                let deadline = SystemTime::now() + Duration::from_secs(10);
                ingest_telemetry::handle(&self.telemetry, &[message], NOW, deadline).await.into_iter().collect()
            }
            "record-success" => record_success::handle(&self.successes, body).await,
            "retry-counter" => retry_counter::handle(&self.counter, body).await,
            "start-workflow" => start_workflow::handle(&self.start, body).await,
            "stop-workflow" => stop_workflow::handle(&self.stop, body).await,
            "track-presence" => presence::track(&self.presence, body).await,
            "update-job" => update_job::handle(&self.job_updates, body).await,
            other => panic!("{other} is behind no queue"),
        }
    }

    /// Invokes a function with a payload.
    pub(crate) async fn invoke(&self, function: &str, payload: &str) -> Result<(), Error> {
        match function {
            "any behind a queue" => {
                let event: SqsEvent = decode(payload, MAX_BATCH_BYTES)?;
                let fails = |messages: Vec<QueuedMessage>| async move {
                    messages.iter().map(|message| Err(Error::new(ErrorName::MalformedMessage, &message.body))).collect()
                };
                batch(&self.dead_letters, fails, event).await;
                Ok(())
            }
            "await-device" => presence::await_device(&self.presence, one(payload)?).await,
            // Its answer would go to whatever address is given.
            "configure-iot" => one::<configure_iot::Input>(payload).map(drop),
            "create-job" => create_job::handle(&self.jobs, one(payload)?).await.map(drop),
            "publish-to-device" => publish_to_device::handle(&self.commands, one(payload)?).await,
            "remediate" => {
                remediate::handle(&self.remedies, decode(payload, MAX_BATCH_BYTES)?, NOW).await;
                Ok(())
            }
            "restore-attributes" => restore_attributes::handle(&self.restoring, one(payload)?).await.map(drop),
            "store-task-token" => store_task_token::handle(&self.waits, one(payload)?).await,
            other => panic!("{other} is not invoked"),
        }
    }
}

fn one<T: serde::de::DeserializeOwned>(payload: &str) -> Result<T, Error> {
    decode(payload, MAX_INPUT_BYTES)
}

fn readings() -> ingest_telemetry::Places {
    let text = || "x".to_owned();
    ingest_telemetry::Places { monitoring_table: text(), batches_table: text(), reading_days: 30, bucket: text() }
}

fn remedies() -> remediate::Places {
    let text = || "x".to_owned();
    remediate::Places {
        climates_table: text(),
        remediations_table: text(),
        reading_days: 30,
        checks_queue_url: "https://sqs.eu-west-1.amazonaws.com/123456789012/x".to_owned(),
        alarm_topic_arn: text(),
        dead_letter_queue_url: "https://sqs.eu-west-1.amazonaws.com/123456789012/x".to_owned(),
    }
}

fn rules() -> remediate::Rules {
    let rule = remediate::Rule {
        target: 21.0,
        band: 2.0,
        hysteresis: 0.5,
        cool_down: 60_000,
        actions_an_hour: 6,
        effect_after: 60_000,
    };
    remediate::Rules { temperature: rule.clone(), humidity: rule }
}
