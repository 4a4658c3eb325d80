//! Sends a command to a device. The token of the state that waits for the answer is stored first.

use crate::error::aws;
use crate::workflows::rendezvous::{Operation, Outcome, Rendezvous, Wait};
use crate::{Error, ErrorName};
use aws_sdk_iotdataplane::primitives::Blob;
use aws_sdk_s3::presigning::PresigningConfig;
use protocol::job::Artifact;
use protocol::{Command, Firmware, OperationId, ProtocolName, Step, ThingName};
use serde::Deserialize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seven days, the most that a signature of version 4 allows; also the longest timer of a job.
const LONGEST_LIFETIME_SECONDS: u64 = 7 * 24 * 3600;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Where the token waits for the answer.
    pub rendezvous: Rendezvous,
    /// Carries the command.
    pub mqtt: aws_sdk_iotdataplane::Client,
    /// Signs the image's address.
    pub s3: aws_sdk_s3::Client,
    /// The stack's firmware bucket.
    pub firmware_bucket: String,
}

/// What a state machine asks for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Input {
    /// The device.
    pub thing_name: ThingName,
    /// The operation.
    pub operation_id: OperationId,
    /// How the device wants to be talked to.
    pub protocol: ProtocolName,
    /// What it shall do.
    pub command: CommandInput,
}

/// The command of an [`Input`].
#[derive(Debug, Deserialize)]
#[serde(tag = "name", rename_all = "SCREAMING_SNAKE_CASE", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum CommandInput {
    /// Download, install and boot an image; a state waits for the acknowledgement.
    DownloadFirmware {
        /// How the state waits.
        wait: Wait,
        /// The target version.
        firmware_version: String,
        /// The image.
        artifact: Box<Artifact>,
        /// How long the image's address must be good: until the job's deadline, in seconds.
        url_lifetime_seconds: u64,
    },
    /// Give the download up; nobody waits.
    CancelDownload,
}

/// Publishes the command, unless its answer is there already.
pub async fn handle(adapters: &Adapters, input: Input) -> Result<(), Error> {
    let operation = Operation::new(&input.thing_name, &input.operation_id);
    let command = match input.command {
        CommandInput::CancelDownload => Command::CancelDownload { operation_id: input.operation_id },
        CommandInput::DownloadFirmware { wait, firmware_version, artifact, url_lifetime_seconds } => {
            let lifetime = Duration::from_secs(url_lifetime_seconds.min(LONGEST_LIFETIME_SECONDS));
            let firmware = firmware(adapters, firmware_version, *artifact, lifetime).await?;
            let outcome = adapters.rendezvous.expect(&operation, Step::DownloadStarted, &wait).await?;
            if outcome != Outcome::Waiting {
                tracing::info!(
                    operation = operation.key(),
                    ?outcome,
                    "not sent: the answer is there, or a later attempt is"
                );
                return Ok(());
            }
            Command::Download { operation_id: input.operation_id, firmware }
        }
    };
    let publication = input.protocol.encoding().encode_command(&input.thing_name, &command, now_millis());
    let topic = publication.topic.clone();
    let publish = adapters.mqtt.publish().topic(publication.topic).qos(1).payload(Blob::new(publication.payload));
    publish.send().await.map_err(|error| aws("iot:Publish", &error))?;
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
        (None, Some(key)) => sign(adapters, key, url_lifetime).await?,
        (None, None) => {
            return Err(Error::invalid("artifact", "neither url nor key", "one of them"));
        }
    };
    Ok(Firmware { version, url, sha256: artifact.sha256, size: artifact.size, signature: artifact.signature })
}

async fn sign(adapters: &Adapters, key: String, lifetime: Duration) -> Result<String, Error> {
    let lifetime = PresigningConfig::expires_in(lifetime)
        .map_err(|error| Error::new(ErrorName::ServiceError, format!("presigned URL: {error}")))?;
    let request = adapters.s3.get_object().bucket(&adapters.firmware_bucket).key(key);
    let signed = request.presigned(lifetime).await.map_err(|error| aws("s3:GetObject", &error))?;
    Ok(signed.uri().to_owned())
}

fn now_millis() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |elapsed| i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX))
}
