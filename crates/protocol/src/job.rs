//! The document that a firmware job carries, and the message in which it reaches the cloud's workflow.

use crate::{JobId, OperationId, ProtocolName, ThingName, optional_whole, whole};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// The workflow that a job document asks for. A job without one is not ours to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkflowName {
    /// `statemachine/firmware-upgrade.asl.json`
    FirmwareUpgrade,
}

/// Where an image is and how to know it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Artifact {
    /// An address that devices can reach as it is. Either this or bucket and key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The S3 bucket; the stack's own when only a key is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// The key in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The version of the object: whatever becomes of the key meanwhile, devices get this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// SHA-256 of the image, 64 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Length of the image in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_whole")]
    pub size: Option<u64>,
    /// Ed25519 signature over the image, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// What a firmware job tells its workflow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobDocument {
    /// Version of this document's form.
    pub version: String,
    /// The workflow to run.
    pub workflow: WorkflowName,
    /// The stack that shall run it: all stacks of an account hear of it. Jobs made before name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<String>,
    /// The version that devices shall run afterwards.
    pub firmware_version: String,
    /// Who or what asked for it.
    pub upgrade_trigger: String,
    /// The image.
    pub artifact: Artifact,
    /// How to talk to the devices; by default each thing's attribute `protocol` says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<ProtocolName>,
    /// How long one device's upgrade may take in all, in minutes.
    #[serde(deserialize_with = "whole")]
    pub timeout_minutes: u32,
    /// SHA-256 of the request that made the job: tells a repeat from another job under the same id.
    pub request_digest: String,
}

/// The input of the firmware upgrade's state machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeInput {
    /// The device.
    pub thing_name: ThingName,
    /// The job.
    pub job_id: JobId,
    /// Which of the job's executions on this thing.
    #[serde(deserialize_with = "whole")]
    pub execution_number: i64,
    /// When it was queued, in Unix seconds: a job that is deleted and made again counts its executions anew.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_whole")]
    pub queued_at: Option<i64>,
    /// What the device's answers will name.
    pub operation_id: OperationId,
    /// What the job asks for.
    pub document: JobDocument,
}

/// `$aws/things/{thing}/jobs/notify-next`
/// (<https://docs.aws.amazon.com/iot/latest/developerguide/jobs-comm-notifications.html>).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NotifyNext {
    /// The next pending job execution; none when nothing is pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution: Option<NextExecution>,
}

/// The job execution inside [`NotifyNext`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NextExecution {
    /// The job.
    pub job_id: JobId,
    /// Counts the job's executions on this thing, from 1.
    #[serde(deserialize_with = "whole")]
    pub execution_number: i64,
    /// When it was queued, in Unix seconds
    /// (<https://docs.aws.amazon.com/iot/latest/apireference/API_iot-jobs-data_JobExecution.html>).
    #[serde(default, deserialize_with = "optional_whole")]
    pub queued_at: Option<i64>,
    /// The document, ours or not.
    #[serde(default, deserialize_with = "readable")]
    pub job_document: serde_json::Value,
}

/// What others write in their documents may be beyond what is read here, such as a number beyond every double: then it is none of
/// ours.
fn readable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<serde_json::Value, D::Error> {
    let document = Box::<RawValue>::deserialize(deserializer)?;
    Ok(serde_json::from_str(document.get()).unwrap_or_default())
}

/// `$aws/events/jobExecution/{jobId}/{operation}`: what has become of a job execution is the topic's end. It does not say which
/// execution of that job on that thing
/// (<https://docs.aws.amazon.com/iot/latest/developerguide/events-jobs.html>).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobExecutionEvent {
    /// The job.
    pub job_id: JobId,
    /// ARN of the thing; its name is what follows the last `/`.
    pub thing_arn: String,
    /// When it was announced, in Unix seconds.
    #[serde(default)]
    pub timestamp: i64,
}

impl JobExecutionEvent {
    /// The thing's name out of its ARN.
    pub fn thing_name(&self) -> Option<ThingName> {
        self.thing_arn.rsplit_once('/').and_then(|(_, name)| name.parse().ok())
    }
}
