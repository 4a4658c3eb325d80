//! Sends a command to a device, or a job to workers on premises. The token of the state that waits for the answer is stored first.

use super::agents::Agents;
use super::settings::{Push, SettingsTable};
use super::worker_jobs::{Order, WorkerJobs};
use crate::aws::{self, now_millis};
use crate::device_registry::{DeviceRegistry, Said};
use crate::tasks::Outcome;
use crate::workflows::rendezvous::{Operation, Rendezvous, Wait};
use crate::{Error, ErrorName, error};
use aws_sdk_s3::presigning::PresigningConfig;
use futures_util::future::try_join_all;
use protocol::job::Artifact;
use protocol::settings::{SettingCommand, Settings, operation_of};
use protocol::{
    Command, Firmware, HandlerName, JsonText, OperationId, ProtocolName, Publication, Step, Tenant, ThingName,
};
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::time::Duration;

/// Seven days, the most that a signature of version 4 allows; also the longest timer of a job.
const LONGEST_LIFETIME_SECONDS: u64 = 7 * 24 * 3600;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Where the token waits for the answer.
    pub rendezvous: Rendezvous,
    /// What USP agents call themselves.
    pub agents: Agents,
    /// Where a push of settings waits for its answers.
    pub settings: SettingsTable,
    /// Where the versions of devices are kept.
    pub registry: DeviceRegistry,
    /// Carries the command.
    pub mqtt: aws_sdk_iotdataplane::Client,
    /// Signs the image's address.
    pub s3: aws_sdk_s3::Client,
    /// The stack's firmware bucket.
    pub firmware_bucket: String,
    /// Jobs of workers on premises.
    pub worker_jobs: WorkerJobs,
    /// Whether this stack hears workers' answers.
    pub owns_device_topics: bool,
}

/// What a state machine asks for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Input {
    /// The device; none for a job, which is for whichever worker takes it.
    pub thing_name: Option<ThingName>,
    /// The operation.
    pub operation_id: OperationId,
    /// What shall be done.
    #[serde(deserialize_with = "command")]
    pub command: CommandInput,
}

/// Reads a command. A job is read by itself: what an enum with a tag holds, serde has parsed before, and its numbers with it.
fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CommandInput, D::Error> {
    #[derive(Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        name: Cow<'a, str>,
    }
    let text = JsonText::deserialize(deserializer)?;
    let named: Named = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
    let command = if named.name == "RUN_JOB" {
        serde_json::from_str::<RunJob>(text.get()).map(CommandInput::RunJob)
    } else {
        serde_json::from_str(text.get())
    };
    command.map_err(D::Error::custom)
}

/// The command of an [`Input`].
#[derive(Debug, Deserialize)]
#[serde(tag = "name", rename_all = "SCREAMING_SNAKE_CASE", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum CommandInput {
    /// Download, install and boot an image; a state waits for the acknowledgement.
    DownloadFirmware {
        /// How the device wants to be talked to.
        protocol: ProtocolName,
        /// How the state waits.
        wait: Wait,
        /// The target version.
        firmware_version: String,
        /// The image.
        artifact: Box<Artifact>,
        /// How long the image's address must be good: until the job's deadline, in seconds.
        #[serde(deserialize_with = "protocol::whole")]
        url_lifetime_seconds: u64,
    },
    /// Wait for the image to be on the device. If it has said that the image's address has expired, it is told it again, freshly
    /// signed.
    AwaitTransfer {
        /// How the device wants to be talked to.
        protocol: ProtocolName,
        /// How the state waits.
        wait: Wait,
        /// The target version.
        firmware_version: String,
        /// The image.
        artifact: Box<Artifact>,
        /// How long the image's address must be good, in seconds.
        #[serde(deserialize_with = "protocol::whole")]
        url_lifetime_seconds: u64,
    },
    /// Give the download up; nobody waits.
    CancelDownload {
        /// How the device wants to be talked to.
        protocol: ProtocolName,
    },
    /// Take settings over; a state waits until each is confirmed. Every device speaks JSON here.
    ApplySettings {
        /// How the state waits.
        wait: Wait,
        /// When the session began, in Unix milliseconds.
        #[serde(deserialize_with = "protocol::whole")]
        connected_at: i64,
        /// The settings, at least one.
        settings: Settings,
    },
    /// Run a job on premises; a state waits for its result.
    #[serde(skip_deserializing)]
    RunJob(RunJob),
}

/// The job of a [`CommandInput`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunJob {
    #[serde(rename = "name")]
    _name: IgnoredAny,
    /// Whose workers.
    tenant: Tenant,
    /// What shall be done; each worker has a default.
    #[serde(default)]
    handler: Option<HandlerName>,
    /// How the state waits.
    wait: Wait,
    /// What with.
    #[serde(deserialize_with = "protocol::json_object")]
    input: JsonText,
}

/// Publishes the command, unless its answer is there already.
pub async fn handle(adapters: &Adapters, input: Input) -> Result<(), Error> {
    let Input { thing_name, operation_id, command } = input;
    let operation = || match &thing_name {
        Some(thing) => Ok(Operation::new(thing, &operation_id)),
        None => Err(Error::invalid("thingName", "nothing", "the device's name")),
    };
    match command {
        CommandInput::CancelDownload { protocol } => {
            let operation = operation()?;
            send(adapters, &operation, protocol, &Command::CancelDownload { operation_id }).await?;
            // It may have come through all the same, and be back already.
            let runs = adapters.rendezvous.give_up(&operation).await?;
            adapters.registry.record(&operation.thing, &Said { runs, ..Said::default() }).await
        }
        CommandInput::DownloadFirmware { protocol, wait, firmware_version, artifact, url_lifetime_seconds } => {
            let operation = operation()?;
            let lifetime = lifetime(url_lifetime_seconds);
            let firmware = firmware(adapters, firmware_version, *artifact, lifetime).await?;
            let outcome = adapters.rendezvous.expect(&operation, Step::DownloadStarted, &wait).await?.outcome;
            if outcome != Outcome::Waiting {
                let reason = "not sent: the answer is there, or a later attempt is";
                tracing::info!(operation = operation.key(), ?outcome, reason);
                return Ok(());
            }
            send(adapters, &operation, protocol, &Command::Download { operation_id, firmware }).await
        }
        CommandInput::AwaitTransfer { protocol, wait, firmware_version, artifact, url_lifetime_seconds } => {
            let operation = operation()?;
            let arrival = adapters.rendezvous.expect(&operation, Step::FirmwareTransferred, &wait).await?;
            if arrival.outcome != Outcome::Waiting || !arrival.is_interrupted() {
                return Ok(());
            }
            if artifact.url.is_some() {
                let cause = "the image's address has expired; it is the job's own, so it cannot be signed again";
                send(adapters, &operation, protocol, &Command::CancelDownload { operation_id }).await?;
                return adapters.rendezvous.fail(&operation, &Error::new(ErrorName::TransferFailed, cause)).await;
            }
            let firmware = firmware(adapters, firmware_version, *artifact, lifetime(url_lifetime_seconds)).await?;
            send(adapters, &operation, protocol, &Command::Download { operation_id, firmware }).await
        }
        CommandInput::ApplySettings { wait, connected_at, settings } => {
            let operation = operation()?;
            if settings.is_empty() {
                return Err(Error::invalid("settings", "none", "at least one"));
            }
            apply_settings(adapters, &operation, &Push::new(operation_id, connected_at, wait, settings)).await
        }
        CommandInput::RunJob(_) if !adapters.owns_device_topics => {
            let expected = "own: the stack that hears workers' answers runs jobs on premises";
            Err(Error::invalid("DeviceTopics", "shared", expected))
        }
        CommandInput::RunJob(RunJob { tenant, handler, wait, input, .. }) => {
            adapters.worker_jobs.dispatch(&Order { tenant, operation: operation_id, handler, wait, input }).await
        }
    }
}

fn lifetime(seconds: u64) -> Duration {
    Duration::from_secs(seconds.min(LONGEST_LIFETIME_SECONDS))
}

async fn send(
    adapters: &Adapters,
    operation: &Operation,
    protocol: ProtocolName,
    command: &Command,
) -> Result<(), Error> {
    let thing = &operation.thing;
    // Read anew for each attempt: an agent that has just come online says who it is when the workflow is on its way already.
    let agent = match protocol {
        ProtocolName::Usp => adapters.agents.of(thing).await?,
        ProtocolName::Json => None,
    };
    let publication = protocol.encoding().encode_command(thing, agent.as_ref(), command, now_millis());
    publish(adapters, operation, publication).await
}

/// Sends each setting that has no answer yet as an operation of its own.
async fn apply_settings(adapters: &Adapters, operation: &Operation, push: &Push) -> Result<(), Error> {
    let thing = &operation.thing;
    let unanswered = adapters.settings.begin(thing, push).await?;
    let commands = unanswered.into_iter().map(|(name, value)| {
        let operation_id = operation_of(&push.operation_id, &name)
            .map_err(|error| Error::new(ErrorName::InvalidInput, format!("operationId: {error}")))?;
        Ok(SettingCommand { operation_id, name, value }.encode(thing, now_millis()))
    });
    let commands = commands.collect::<Result<Vec<_>, Error>>()?;
    try_join_all(commands.into_iter().map(|publication| publish(adapters, operation, publication))).await?;
    Ok(())
}

async fn publish(adapters: &Adapters, operation: &Operation, publication: Publication) -> Result<(), Error> {
    let topic = publication.topic.clone();
    aws::publish(&adapters.mqtt, publication).await?;
    tracing::info!(operation = operation.key(), topic, "published");
    Ok(())
}

async fn firmware(
    adapters: &Adapters,
    version: String,
    artifact: Artifact,
    url_lifetime: Duration,
) -> Result<Firmware, Error> {
    let url = match (artifact.url, artifact.key) {
        (Some(url), _) => url,
        (None, Some(key)) => {
            check_bucket(artifact.bucket.as_deref(), &adapters.firmware_bucket)?;
            sign(adapters, key, artifact.version_id, url_lifetime).await?
        }
        (None, None) => {
            return Err(Error::invalid("artifact", "neither url nor key", "one of them"));
        }
    };
    Ok(Firmware { version, url, sha256: artifact.sha256, size: artifact.size, signature: artifact.signature })
}

/// The key of another stack's job is not looked for in this one's bucket.
fn check_bucket(named: Option<&str>, own: &str) -> Result<(), Error> {
    match named.filter(|bucket| *bucket != own) {
        Some(other) => Err(Error::invalid("artifact.bucket", other, &format!("{own}, the bucket of this stack"))),
        None => Ok(()),
    }
}

async fn sign(
    adapters: &Adapters,
    key: String,
    version_id: Option<String>,
    lifetime: Duration,
) -> Result<String, Error> {
    let lifetime = PresigningConfig::expires_in(lifetime)
        .map_err(|error| Error::new(ErrorName::ServiceError, format!("presigned URL: {error}")))?;
    let request = adapters.s3.get_object().bucket(&adapters.firmware_bucket).key(key).set_version_id(version_id);
    let signed = request.presigned(lifetime).await.map_err(|error| error::aws("s3:GetObject", &error))?;
    Ok(signed.uri().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lambda::{MAX_INPUT_BYTES, decode};
    use serde_json::Value;

    #[test]
    fn the_input_of_a_job_stays_as_it_was() {
        for exact in [
            r#"{"a":117.63331139400017,"b":0}"#,
            r#"{"z":123456789012345678901234567890,"a":-9223372036854775809}"#,
            r#"{"b":1.0,"a":[0.1e-7,{"TaskToken":1e2}]}"#,
        ] {
            let text = format!(
                r#"{{"operationId":"o","command":{{"name":"RUN_JOB","tenant":"tenant1","handler":null,
                "wait":{{"taskToken":"t","attempt":0}},"input":{exact}}}}}"#
            );
            let input: Input = decode(&text, MAX_INPUT_BYTES).unwrap();
            let CommandInput::RunJob(job) = input.command else { panic!("{exact}") };
            assert_eq!(job.input.get(), exact);
        }
        for (input, expected) in [("7", "expected an object"), (r#"{},"more":1"#, "unknown field `more`")] {
            let text = format!(
                r#"{{"operationId":"o","command":{{"name":"RUN_JOB","tenant":"tenant1",
                "wait":{{"taskToken":"t","attempt":0}},"input":{input}}}}}"#
            );
            let error = decode::<Input>(&text, MAX_INPUT_BYTES).unwrap_err();
            assert!(error.name == ErrorName::InvalidInput && error.message.contains(expected), "{error}");
        }
    }

    #[test]
    fn seconds_may_come_as_they_are_computed() {
        for name in ["DOWNLOAD_FIRMWARE", "AWAIT_TRANSFER"] {
            let command = serde_json::json!({
                "name": name, "protocol": "json", "wait": {"taskToken": "t", "attempt": 1.0}, "firmwareVersion": "1.2.3",
                "artifact": {"key": "k", "size": 7.0}, "urlLifetimeSeconds": 3600.0,
            });
            let input = serde_json::json!({"thingName": "t", "operationId": "o", "command": command});
            assert!(serde_json::from_value::<Input>(input).is_ok(), "{name}");
        }
    }

    #[test]
    fn an_image_in_another_stack_s_bucket_is_refused() {
        assert_eq!(check_bucket(None, "ours"), Ok(()));
        assert_eq!(check_bucket(Some("ours"), "ours"), Ok(()));
        let error = check_bucket(Some("theirs"), "ours").unwrap_err();
        assert_eq!(error.name, ErrorName::InvalidInput);
        assert!(error.message.contains("artifact.bucket") && error.message.contains("theirs"), "{}", error.message);
    }

    type Calls = std::sync::Arc<std::sync::Mutex<Vec<String>>>;

    /// What the function reaches, on an AWS that answers each call with the item of a meeting, and what it is told.
    fn adapters(owns_device_topics: bool, meeting: &Value) -> (Adapters, Calls) {
        use aws_smithy_http_client::test_util::infallible_client_fn;
        let calls = Calls::default();
        let noted = calls.clone();
        let answer = serde_json::json!({"Attributes": meeting}).to_string();
        let http = infallible_client_fn(move |request: ureq::http::Request<_>| {
            let body = String::from_utf8_lossy(request.body().bytes().unwrap_or_default());
            noted.lock().unwrap().push(format!("{} {body}", request.uri()));
            ureq::http::Response::builder().body(answer.clone()).unwrap()
        });
        let config = aws::of_test(http);
        let mqtt = aws_sdk_iotdataplane::Client::from_conf((&config).into());
        let limits = super::super::worker_jobs::Limits {
            table: "x".into(),
            bucket: "x".into(),
            tenants: vec!["tenant1".into()],
            lease: 20_000,
            max_result_bytes: 1,
        };
        let adapters = Adapters {
            rendezvous: Rendezvous::new(&config, "rendezvous".into()),
            agents: Agents::new(&config, "rendezvous".into()),
            settings: SettingsTable::new(&config, "settings".into()),
            registry: DeviceRegistry::new(&config, owns_device_topics),
            mqtt: mqtt.clone(),
            s3: aws_sdk_s3::Client::new(&config),
            firmware_bucket: "firmware".into(),
            worker_jobs: WorkerJobs::new(&config, mqtt, limits),
            owns_device_topics,
        };
        (adapters, calls)
    }

    #[tokio::test]
    async fn a_stack_that_does_not_hear_workers_runs_no_jobs_of_theirs() {
        let command = serde_json::json!({
            "name": "RUN_JOB", "tenant": "tenant1", "wait": {"taskToken": "t", "attempt": 0}, "input": {},
        });
        let input = serde_json::json!({"operationId": "o", "command": command});
        let (adapters, calls) = adapters(false, &Value::Null);
        let error = handle(&adapters, serde_json::from_value(input).unwrap()).await.unwrap_err();
        assert_eq!(error.name, ErrorName::InvalidInput);
        assert!(error.message.starts_with("DeviceTopics: got shared"), "{}", error.message);
        assert_eq!(calls.lock().unwrap().len(), 0);
    }

    /// One that the cloud has signed is signed anew; the job's own has expired for good.
    #[tokio::test]
    async fn an_address_that_has_expired_is_signed_anew_if_it_can_be() {
        for (artifact, commands) in [
            (serde_json::json!({"key": "k", "versionId": "v1"}), vec!["versionId=v1"]),
            (serde_json::json!({"url": "https://example.com/k"}), vec!["CANCEL_DOWNLOAD", "TransferFailed"]),
        ] {
            let command = serde_json::json!({
                "name": "AWAIT_TRANSFER", "protocol": "json", "wait": {"taskToken": "t", "attempt": 1},
                "firmwareVersion": "1.2.3", "artifact": artifact, "urlLifetimeSeconds": 3600,
            });
            let input = serde_json::json!({"thingName": "t", "operationId": "o", "command": command});
            let (adapters, calls) = adapters(true, &serde_json::json!({"interrupted": {"BOOL": true}}));
            assert_eq!(handle(&adapters, serde_json::from_value(input).unwrap()).await, Ok(()));
            let calls = calls.lock().unwrap();
            let told = calls.iter().filter(|call| call.contains("/topics/") || call.contains(":answer"));
            let mut told: Vec<_> = told.collect();
            // The error is the answer of each step.
            told.dedup_by_key(|call| call.contains(":answer"));
            assert_eq!(told.len(), commands.len(), "{told:?}");
            assert!(commands.iter().zip(&told).all(|(command, call)| call.contains(command)), "{told:?}");
        }
    }
}
