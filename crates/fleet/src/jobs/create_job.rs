//! Makes an AWS IoT job out of a user's payload.

use super::image;
use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_iot::operation::describe_job_template::DescribeJobTemplateOutput;
use aws_sdk_iot::types::{
    AbortAction, AbortConfig, AbortCriteria, ExponentialRolloutRate, JobExecutionFailureType, JobExecutionsRetryConfig,
    JobExecutionsRolloutConfig, RateIncreaseCriteria, RetryCriteria, RetryableFailureType, TargetSelection,
    TimeoutConfig,
};
use protocol::fields::ATTRIBUTE_VALUE;
use protocol::job::{Artifact, JobDocument};
use protocol::{JobId, ProtocolName, reported_version};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ops::RangeInclusive;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Jobs and job templates.
    pub iot: aws_sdk_iot::Client,
    /// Images.
    pub s3: aws_sdk_s3::Client,
    /// Where the stack is.
    pub stack: Stack,
}

/// Where the stack is.
#[derive(Debug)]
pub struct Stack {
    /// Its account's 12 digits.
    pub account: String,
    /// Its Region.
    pub region: String,
    /// The name of its job template.
    pub job_template: String,
    /// The name of its firmware bucket.
    pub firmware_bucket: String,
}

/// The payload. The first three fields are all that a user must give.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Input {
    /// The version that the devices shall run: `SemVer`, such as `1.2.3`.
    pub firmware_version: String,
    /// Who or what asks for the upgrade, such as `manual`.
    pub upgrade_trigger: String,
    /// ARN of a thing or a thing group of this account and Region.
    pub target_arn: String,
    /// The job's id. With one, the same call again makes no second job.
    #[serde(default, skip_serializing)]
    pub job_id: Option<JobId>,
    /// Whether things that join the group later are upgraded too. Default: `SNAPSHOT`, they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_selection: Option<Selection>,
    /// How fast devices are told. Default: as the job template says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// When to give the whole job up. Default: as the job template says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
    /// How often AWS IoT Jobs tries again when a device's upgrade has failed or timed out, 1 to 10. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<i32>,
    /// How long one device's upgrade may take in all, in minutes. Default: as the job template says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_minutes: Option<u32>,
    /// The image. Default: `firmware/{firmwareVersion}` in the stack's firmware bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
    /// How to talk to the devices. Default: each thing's attribute `protocol`, else `json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<ProtocolName>,
}

/// Which things a job on a group is for.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Selection {
    /// Those that are in the group now.
    Snapshot,
    /// Those too that join it later.
    Continuous,
}

/// How fast devices are told of a job.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rollout {
    /// At most so many devices a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum_per_minute: Option<i32>,
    /// Slow at first, then faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exponential_rate: Option<ExponentialRate>,
}

/// A rollout that gathers speed.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExponentialRate {
    /// Devices a minute at first.
    pub base_rate_per_minute: i32,
    /// By how much the rate is multiplied each time.
    pub increment_factor: f64,
    /// Faster after each so many devices that were told …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number_of_notified_things: Option<i32>,
    /// … or after each so many that succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number_of_succeeded_things: Option<i32>,
}

/// When to give the whole job up.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Abort {
    /// If this percentage of devices has failed …
    pub percentage: f64,
    /// … of at least so many that have ended.
    pub minimum_executed: i32,
}

/// What the caller gets.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// The job's id.
    pub job_id: JobId,
    /// Its ARN.
    pub job_arn: String,
    /// How fast devices are told, whoever has said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// When the job is given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
    /// What may not go as the caller thinks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Output {
    fn new(
        job_id: JobId,
        job_arn: Option<String>,
        rollout: Option<&JobExecutionsRolloutConfig>,
        abort: Option<&AbortConfig>,
    ) -> Self {
        let rollout = rollout.map(Rollout::from);
        let abort = abort.and_then(|config| config.criteria_list.first()).map(Abort::from);
        Self { job_id, job_arn: job_arn.unwrap_or_default(), rollout, abort, note: None }
    }
}

/// What agents report that take their version from the image's address, as the public sample's does, if that is not the version.
fn note_on_address(document: &JobDocument) -> Option<String> {
    let Artifact { url, key, .. } = &document.artifact;
    let last = |address: &str| address.rsplit('/').next().unwrap_or_default().to_owned();
    // Such an agent takes what follows the last slash of all. In the address of a key its own `?` and `#` are encoded, and each slash
    // of the query.
    let reported = match (url, key) {
        (Some(url), _) => reported_version(&last(url)),
        (None, key) => Some(last(key.as_deref()?)),
    };
    let reported = reported.unwrap_or_default();
    let version = &document.firmware_version;
    (document.protocol != Some(ProtocolName::Json) && reported != *version).then(|| {
        format!(
            "USP agents that take their version from the address, as the public sample's does, will report {reported:?} instead of \
             {version:?} and fail with VersionMismatch; others are not concerned. Let the address end in /{version} for them"
        )
    })
}

/// Creates the job, or returns the one that the same payload has made before.
pub async fn handle(adapters: &Adapters, input: Input) -> Result<Output, Error> {
    input.validate(&adapters.stack)?;
    let template = job_template(adapters).await?;
    let document = document(adapters, &input, &template).await?;
    let job_id = match &input.job_id {
        Some(id) => id.clone(),
        None => generated_id()?,
    };
    let output = create(adapters, input, job_id, &document, template).await?;
    Ok(Output { note: note_on_address(&document), ..output })
}

async fn job_template(adapters: &Adapters) -> Result<DescribeJobTemplateOutput, Error> {
    let request = adapters.iot.describe_job_template().job_template_id(&adapters.stack.job_template);
    request.send().await.map_err(|error| aws("iot:DescribeJobTemplate", &error))
}

async fn create(
    adapters: &Adapters,
    input: Input,
    job_id: JobId,
    document: &JobDocument,
    template: DescribeJobTemplateOutput,
) -> Result<Output, Error> {
    let text = serde_json::to_string(document).map_err(unbuilt)?;
    let timeout = TimeoutConfig::builder().in_progress_timeout_in_minutes(i64::from(document.timeout_minutes)).build();
    let rollout = input.rollout.as_ref().map(rollout_config).transpose()?.or(template.job_executions_rollout_config);
    let abort = input.abort.as_ref().map(abort_config).transpose()?.or(template.abort_config);
    let retries = input.retries.map(retry_config).transpose()?;
    let result = adapters
        .iot
        .create_job()
        .job_id(job_id.as_str())
        .targets(&input.target_arn)
        .document(text)
        .description(format!("Firmware {} ({})", input.firmware_version, input.upgrade_trigger))
        .target_selection(match input.target_selection {
            Some(Selection::Continuous) => TargetSelection::Continuous,
            Some(Selection::Snapshot) | None => TargetSelection::Snapshot,
        })
        .timeout_config(timeout)
        .set_job_executions_rollout_config(rollout.clone())
        .set_abort_config(abort.clone())
        .set_job_executions_retry_config(retries.or(template.job_executions_retry_config))
        .send()
        .await;
    match result {
        Ok(output) => Ok(Output::new(job_id, output.job_arn, rollout.as_ref(), abort.as_ref())),
        Err(error) => match code(&error) {
            Some("ResourceAlreadyExistsException") => existing(adapters, job_id, &document.request_digest).await,
            Some("ResourceNotFoundException") => {
                let message = format!("targetArn: {} does not exist", input.target_arn);
                Err(Error::new(ErrorName::TargetNotFound, message))
            }
            _ => Err(aws("iot:CreateJob", &error)),
        },
    }
}

/// The job that has the id already, if it was made from the same payload.
async fn existing(adapters: &Adapters, job_id: JobId, digest: &str) -> Result<Output, Error> {
    let request = adapters.iot.get_job_document().job_id(job_id.as_str());
    let document = request.send().await.map_err(|error| aws("iot:GetJobDocument", &error))?.document;
    let theirs: Option<JobDocument> = document.and_then(|text| serde_json::from_str(&text).ok());
    if theirs.is_none_or(|theirs| theirs.request_digest != digest) {
        let message = format!("jobId: {job_id} belongs to a job with another payload; choose another id");
        return Err(Error::new(ErrorName::JobConflict, message));
    }
    let request = adapters.iot.describe_job().job_id(job_id.as_str());
    let job = request.send().await.map_err(|error| aws("iot:DescribeJob", &error))?.job;
    let (rollout, abort) =
        job.as_ref().map_or((None, None), |job| (job.job_executions_rollout_config(), job.abort_config()));
    Ok(Output::new(job_id, job.as_ref().and_then(|job| job.job_arn.clone()), rollout, abort))
}

/// The job template's document with what this job is about.
async fn document(
    adapters: &Adapters,
    input: &Input,
    template: &DescribeJobTemplateOutput,
) -> Result<JobDocument, Error> {
    let text = template.document.as_deref().unwrap_or_default();
    let mut document: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).map_err(|error| {
        let name = &adapters.stack.job_template;
        Error::new(ErrorName::ServiceError, format!("the document of the job template {name}: {error}"))
    })?;
    let mut put = |name: &str, value: serde_json::Value| document.insert(name.to_owned(), value);
    put("firmwareVersion", input.firmware_version.as_str().into());
    put("upgradeTrigger", input.upgrade_trigger.as_str().into());
    put("requestDigest", digest(input)?.into());
    put("artifact", serde_json::to_value(artifact(adapters, input).await?).map_err(unbuilt)?);
    if let Some(minutes) = input.timeout_minutes {
        put("timeoutMinutes", minutes.into());
    }
    if let Some(protocol) = input.protocol {
        put("protocol", protocol.to_string().into());
    }
    serde_json::from_value(document.into()).map_err(|error| {
        let name = &adapters.stack.job_template;
        Error::new(ErrorName::ServiceError, format!("the document of the job template {name}: {error}"))
    })
}

/// The image that devices will be told of: one in the bucket is looked up now, so that a mistake shows at once and
/// not on every device.
async fn artifact(adapters: &Adapters, input: &Input) -> Result<Artifact, Error> {
    let mut artifact = input.artifact.clone().unwrap_or_default();
    artifact.sha256 = artifact.sha256.map(|text| image::sha256("artifact.sha256", &text)).transpose()?;
    if artifact.url.is_some() {
        return Ok(artifact);
    }
    let key = artifact.key.clone().unwrap_or_else(|| format!("firmware/{}", input.firmware_version));
    image::pin(&adapters.s3, &adapters.stack.firmware_bucket, key, artifact).await
}

/// Tells one request from another; the job id is no part of it.
fn digest(input: &Input) -> Result<String, Error> {
    let canonical = serde_json::to_vec(input).map_err(unbuilt)?;
    Ok(image::hexadecimal(&Sha256::digest(canonical)))
}

fn generated_id() -> Result<JobId, Error> {
    let id = format!("FirmwareUpgrade-{}", uuid::Uuid::new_v4().simple());
    id.parse().map_err(unbuilt)
}

fn rollout_config(rollout: &Rollout) -> Result<JobExecutionsRolloutConfig, Error> {
    let rate = rollout.exponential_rate.as_ref().map(|rate| {
        let criteria = RateIncreaseCriteria::builder()
            .set_number_of_notified_things(rate.number_of_notified_things)
            .set_number_of_succeeded_things(rate.number_of_succeeded_things)
            .build();
        ExponentialRolloutRate::builder()
            .base_rate_per_minute(rate.base_rate_per_minute)
            .increment_factor(rate.increment_factor)
            .rate_increase_criteria(criteria)
            .build()
    });
    Ok(JobExecutionsRolloutConfig::builder()
        .set_maximum_per_minute(rollout.maximum_per_minute)
        .set_exponential_rate(rate.transpose().map_err(unbuilt)?)
        .build())
}

impl From<&JobExecutionsRolloutConfig> for Rollout {
    fn from(config: &JobExecutionsRolloutConfig) -> Self {
        let exponential_rate = config.exponential_rate.as_ref().map(|rate| {
            let criteria = rate.rate_increase_criteria.as_ref();
            ExponentialRate {
                base_rate_per_minute: rate.base_rate_per_minute,
                increment_factor: rate.increment_factor,
                number_of_notified_things: criteria.and_then(|criteria| criteria.number_of_notified_things),
                number_of_succeeded_things: criteria.and_then(|criteria| criteria.number_of_succeeded_things),
            }
        });
        Self { maximum_per_minute: config.maximum_per_minute, exponential_rate }
    }
}

impl From<&AbortCriteria> for Abort {
    fn from(criteria: &AbortCriteria) -> Self {
        Self { percentage: criteria.threshold_percentage, minimum_executed: criteria.min_number_of_executed_things }
    }
}

fn retry_config(retries: i32) -> Result<JobExecutionsRetryConfig, Error> {
    let criteria = RetryCriteria::builder().failure_type(RetryableFailureType::All).number_of_retries(retries);
    let criteria = criteria.build().map_err(unbuilt)?;
    JobExecutionsRetryConfig::builder().criteria_list(criteria).build().map_err(unbuilt)
}

fn abort_config(abort: &Abort) -> Result<AbortConfig, Error> {
    let criteria = AbortCriteria::builder()
        .failure_type(JobExecutionFailureType::All)
        .action(AbortAction::Cancel)
        .threshold_percentage(abort.percentage)
        .min_number_of_executed_things(abort.minimum_executed)
        .build()
        .map_err(unbuilt)?;
    AbortConfig::builder().criteria_list(criteria).build().map_err(unbuilt)
}

/// The semantic version that is nearest to one such as `2.27` or `v2`.
fn semantic(version: &str) -> String {
    let mut numbers: Vec<&str> = version.trim_start_matches(['v', 'V']).split('.').collect();
    numbers.resize(3, "0");
    let version = numbers.join(".");
    if semver::Version::parse(&version).is_ok() { version } else { "1.2.3".to_owned() }
}

impl Input {
    /// Ranges are those of the `CreateJob` API
    /// (<https://docs.aws.amazon.com/iot/latest/apireference/API_CreateJob.html> and the types that it links).
    fn validate(&self, stack: &Stack) -> Result<(), Error> {
        if semver::Version::parse(&self.firmware_version).is_err() {
            let expected = format!(
                "a semantic version, MAJOR.MINOR.PATCH or MAJOR.MINOR.PATCH-PRERELEASE, such as {}. The version that devices run \
                 now may have any form; the new image must report the job's version letter for letter, so build it with that one",
                semantic(&self.firmware_version)
            );
            return Err(Error::invalid("firmwareVersion", quoted(&self.firmware_version), &expected));
        }
        // A device that has upgraded gets its version as an attribute of its thing.
        if let Err(error) = ATTRIBUTE_VALUE.check(&self.firmware_version) {
            let expected = format!("a version that a thing's attribute can hold: {}", error.expected());
            return Err(Error::invalid("firmwareVersion", quoted(&self.firmware_version), &expected));
        }
        let trigger = &self.upgrade_trigger;
        if !(1..=64).contains(&trigger.len())
            || !trigger.chars().all(|c| c.is_ascii_alphanumeric() || "_-.: ".contains(c))
        {
            let expected = "1 to 64 letters, digits, spaces and _ - . :";
            return Err(Error::invalid("upgradeTrigger", quoted(trigger), expected));
        }
        self.validate_target(stack)?;
        in_range("timeoutMinutes", self.timeout_minutes, 1..=10_080)?;
        self.rollout.as_ref().map_or(Ok(()), Rollout::validate)?;
        self.abort.as_ref().map_or(Ok(()), Abort::validate)?;
        // The limit of the CreateJob API.
        in_range("retries", self.retries, 1..=10)?;
        self.artifact.as_ref().map_or(Ok(()), |artifact| validate_artifact(artifact, stack))
    }

    fn validate_target(&self, stack: &Stack) -> Result<(), Error> {
        let (region, account) = (&stack.region, &stack.account);
        let parts: Vec<&str> = self.target_arn.splitn(6, ':').collect();
        let well_formed = match parts.as_slice() {
            ["arn", partition, "iot", arn_region, arn_account, resource] => {
                partition.starts_with("aws")
                    && arn_region == region
                    && arn_account == account
                    && resource
                        .strip_prefix("thing/")
                        .or_else(|| resource.strip_prefix("thinggroup/"))
                        .is_some_and(|name| name.parse::<protocol::ThingName>().is_ok())
            }
            _ => false,
        };
        if well_formed {
            return Ok(());
        }
        let expected = format!("the ARN of a thing or thing group of account {account} in {region}");
        Err(Error::invalid("targetArn", quoted(&self.target_arn), &expected))
    }
}

impl Rollout {
    fn validate(&self) -> Result<(), Error> {
        in_range("rollout.maximumPerMinute", self.maximum_per_minute, 1..=1000)?;
        let Some(rate) = &self.exponential_rate else { return Ok(()) };
        in_range("rollout.exponentialRate.baseRatePerMinute", Some(rate.base_rate_per_minute), 1..=1000)?;
        in_range("rollout.exponentialRate.incrementFactor", Some(rate.increment_factor), 1.1..=5.0)?;
        if !has_at_most_decimals(rate.increment_factor, 1) {
            let field = "rollout.exponentialRate.incrementFactor";
            return Err(Error::invalid(field, rate.increment_factor, "one digit after the decimal point, such as 1.5"));
        }
        let field = "rollout.exponentialRate.numberOfNotifiedThings";
        in_range(field, rate.number_of_notified_things, 1..=i32::MAX)?;
        in_range("rollout.exponentialRate.numberOfSucceededThings", rate.number_of_succeeded_things, 1..=i32::MAX)?;
        match (rate.number_of_notified_things, rate.number_of_succeeded_things) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            (None, None) => Err(Error::invalid(field, "nothing", "this or numberOfSucceededThings")),
            (Some(_), Some(_)) => Err(Error::invalid(field, "numberOfSucceededThings too", "one of the two")),
        }
    }
}

impl Abort {
    fn validate(&self) -> Result<(), Error> {
        in_range("abort.percentage", Some(self.percentage), 0.01..=100.0)?;
        in_range("abort.minimumExecuted", Some(self.minimum_executed), 1..=i32::MAX)
    }
}

fn validate_artifact(artifact: &Artifact, stack: &Stack) -> Result<(), Error> {
    match (&artifact.url, &artifact.key) {
        (Some(url), None) if artifact.bucket.is_none() => {
            if !(url.starts_with("https://") || url.starts_with("http://")) || url.len() > 2048 {
                let expected = "an http or https address of at most 2048 characters";
                return Err(Error::invalid("artifact.url", quoted(url), expected));
            }
        }
        (Some(_), _) => {
            return Err(Error::invalid("artifact.url", "bucket or key too", "either url, or bucket and key"));
        }
        (None, Some(key)) if key.is_empty() || key.len() > 1024 => {
            return Err(Error::invalid("artifact.key", quoted(key), "1 to 1024 bytes"));
        }
        (None, _) => {}
    }
    if let Some(bucket) = artifact.bucket.as_ref().filter(|bucket| **bucket != stack.firmware_bucket) {
        let expected = format!("the stack's bucket {}, the only one that it may sign for", stack.firmware_bucket);
        return Err(Error::invalid("artifact.bucket", quoted(bucket), &expected));
    }
    if let Some(version) = artifact.version_id.as_ref().filter(|version| artifact.url.is_some() || version.is_empty()) {
        let expected = "the id of a version of an object in the stack's bucket";
        return Err(Error::invalid("artifact.versionId", quoted(version), expected));
    }
    in_range("artifact.size", artifact.size, 1..=u64::MAX)?;
    artifact.sha256.as_ref().map_or(Ok(()), |text| image::sha256("artifact.sha256", text).map(|_| ()))?;
    artifact.signature.as_ref().map_or(Ok(()), |text| image::signature("artifact.signature", text).map(|_| ()))
}

fn has_at_most_decimals(value: f64, decimals: i32) -> bool {
    let scaled = value * 10_f64.powi(decimals);
    (scaled - scaled.round()).abs() < 1e-6
}

fn in_range<T>(field: &str, value: Option<T>, range: RangeInclusive<T>) -> Result<(), Error>
where
    T: PartialOrd + std::fmt::Display + Copy,
{
    match value {
        Some(value) if !range.contains(&value) => {
            Err(Error::invalid(field, value, &format!("{} to {}", range.start(), range.end())))
        }
        _ => Ok(()),
    }
}

pub(super) fn quoted(text: &str) -> String {
    format!("{:?}", text.chars().take(200).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_iot::operation::create_job::{CreateJobError, CreateJobOutput};
    use aws_sdk_iot::operation::describe_job::DescribeJobOutput;
    use aws_sdk_iot::operation::get_job_document::GetJobDocumentOutput;
    use aws_sdk_iot::types::error::ResourceAlreadyExistsException;
    use aws_sdk_s3::operation::head_object::{HeadObjectError, HeadObjectOutput};
    use aws_smithy_mocks::{RuleMode, mock, mock_client};
    use serde_json::{Value, json};

    const GROUP: &str = "arn:aws:iot:eu-west-1:000000000000:thinggroup/gateways";

    fn stack() -> Stack {
        Stack {
            account: "000000000000".into(),
            region: "eu-west-1".into(),
            job_template: "fleetflow-firmware-upgrade".into(),
            firmware_bucket: "firmware".into(),
        }
    }

    fn input(extra: Value) -> Input {
        let mut payload = json!({"firmwareVersion": "1.2.3", "upgradeTrigger": "manual", "targetArn": GROUP});
        if let (Value::Object(payload), Value::Object(extra)) = (&mut payload, extra) {
            payload.extend(extra);
        }
        serde_json::from_value(payload).unwrap()
    }

    fn template_rule() -> aws_smithy_mocks::Rule {
        mock!(aws_sdk_iot::Client::describe_job_template).then_output(|| {
            let document = r#"{"version":"1.0","workflow":"firmware-upgrade","timeoutMinutes":60}"#;
            DescribeJobTemplateOutput::builder().document(document).build()
        })
    }

    fn image_rule() -> aws_smithy_mocks::Rule {
        mock!(aws_sdk_s3::Client::head_object)
            .match_requests(|request| request.key() == Some("firmware/1.2.3"))
            .then_output(|| {
                let found = HeadObjectOutput::builder().content_length(7).version_id("v1");
                found.metadata("sha256", "ab".repeat(32)).build()
            })
    }

    fn adapters(iot: &[&aws_smithy_mocks::Rule], s3: &aws_smithy_mocks::Rule) -> Adapters {
        Adapters {
            iot: mock_client!(aws_sdk_iot, RuleMode::MatchAny, iot),
            s3: mock_client!(aws_sdk_s3, RuleMode::MatchAny, [s3]),
            stack: stack(),
        }
    }

    /// Some agents take their version from the address.
    #[test]
    fn an_address_that_does_not_end_in_the_version_is_noted() {
        let note = |artifact: Value, protocol: Value| {
            let document = json!({
                "version": "1.0", "workflow": "firmware-upgrade", "firmwareVersion": "1.2.3", "upgradeTrigger": "manual",
                "artifact": artifact, "protocol": protocol, "timeoutMinutes": 60, "requestDigest": "",
            });
            note_on_address(&serde_json::from_value(document).unwrap())
        };
        for (artifact, reported) in [
            (json!({"key": "firmware/1.2.3"}), None),
            (json!({"key": "1.2.3"}), None),
            (json!({"url": "https://example.com/a/1.2.3?token=x#y"}), None),
            (json!({"url": "https://example.com/get?file=/1.2.3"}), None),
            (json!({"url": "https://example.com/1%2E2%2E3"}), None),
            (json!({"key": "builds/42/firmware.bin"}), Some("firmware.bin")),
            (json!({"key": "1.2.3/"}), Some("")),
            (json!({"url": "https://example.com/a/1.2.3?token=x#/y"}), Some("y")),
            (json!({"url": "https://example.com/get?file=1.2.3"}), Some("get")),
        ] {
            for protocol in [Value::Null, "usp".into()] {
                let note = note(artifact.clone(), protocol);
                let expected = reported.map(|reported| format!("will report {reported:?} instead of \"1.2.3\""));
                assert_eq!(note.is_some(), expected.is_some(), "{artifact}");
                assert!(expected.is_none_or(|expected| note.unwrap().contains(&expected)), "{artifact}");
            }
            assert_eq!(note(artifact, "json".into()), None);
        }
    }

    #[tokio::test]
    async fn the_three_fields_are_enough() {
        let create = mock!(aws_sdk_iot::Client::create_job)
            .match_requests(|request| {
                let document: JobDocument = serde_json::from_str(request.document().unwrap()).unwrap();
                document.artifact.key.as_deref() == Some("firmware/1.2.3")
                    && document.artifact.size == Some(7)
                    && document.artifact.version_id.as_deref() == Some("v1")
                    && document.artifact.sha256 == Some("ab".repeat(32))
                    && document.timeout_minutes == 60
                    && request.targets() == [GROUP]
                    && request.job_id().unwrap().starts_with("FirmwareUpgrade-")
            })
            .then_output(|| CreateJobOutput::builder().job_arn("arn:job").build());
        let (template, image) = (template_rule(), image_rule());
        let output = handle(&adapters(&[&template, &create], &image), input(json!({}))).await.unwrap();
        assert_eq!(output.job_arn, "arn:job");
        assert_eq!(create.num_calls(), 1);
    }

    #[tokio::test]
    async fn the_same_payload_again_is_the_same_job_and_another_is_a_conflict() {
        let exists = || {
            mock!(aws_sdk_iot::Client::create_job).then_error(|| {
                let error = ResourceAlreadyExistsException::builder();
                let code = aws_sdk_iot::error::ErrorMetadata::builder().code("ResourceAlreadyExistsException").build();
                CreateJobError::ResourceAlreadyExistsException(error.meta(code).build())
            })
        };
        let request = input(json!({"jobId": "job-1"}));
        let digest = digest(&request).unwrap();
        for (theirs, expected) in [(digest, Ok("arn:job-1")), ("another".to_owned(), Err(ErrorName::JobConflict))] {
            let document = mock!(aws_sdk_iot::Client::get_job_document).then_output(move || {
                let document = json!({
                    "version": "1.0", "workflow": "firmware-upgrade", "firmwareVersion": "1.2.3",
                    "upgradeTrigger": "manual", "artifact": {}, "timeoutMinutes": 60, "requestDigest": theirs,
                });
                GetJobDocumentOutput::builder().document(document.to_string()).build()
            });
            let describe = mock!(aws_sdk_iot::Client::describe_job).then_output(|| {
                let job = aws_sdk_iot::types::Job::builder().job_arn("arn:job-1").build();
                DescribeJobOutput::builder().job(job).build()
            });
            let (template, image, exists) = (template_rule(), image_rule(), exists());
            let adapters = adapters(&[&template, &exists, &document, &describe], &image);
            let result = handle(&adapters, request.clone()).await;
            assert_eq!(result.as_ref().map(|output| output.job_arn.as_str()).map_err(|error| error.name), expected);
        }
    }

    #[tokio::test]
    async fn an_image_that_is_not_there_is_told_before_any_device_is() {
        let missing = mock!(aws_sdk_s3::Client::head_object)
            .then_error(|| HeadObjectError::NotFound(aws_sdk_s3::types::error::NotFound::builder().build()));
        let template = template_rule();
        let error = handle(&adapters(&[&template], &missing), input(json!({}))).await.unwrap_err();
        assert_eq!(error.name, ErrorName::ArtifactNotFound);
        assert_eq!(error.message, "artifact: s3://firmware/firmware/1.2.3 does not exist; upload the image first");
    }

    #[test]
    fn bad_input_names_the_field_the_value_and_what_was_expected() {
        let cases = [
            (
                json!({"firmwareVersion": "2.27"}),
                "firmwareVersion: got \"2.27\", expected a semantic version, MAJOR.MINOR.PATCH or MAJOR.MINOR.PATCH-PRERELEASE, \
                 such as 2.27.0. The version that devices run now may have any form; the new image must",
            ),
            (
                json!({"firmwareVersion": "wo:v8"}),
                "firmwareVersion: got \"wo:v8\", expected a semantic version, MAJOR.MINOR.PATCH or MAJOR.MINOR.PATCH-PRERELEASE, \
                 such as 1.2.3. The",
            ),
            (
                json!({"firmwareVersion": "1.1.0-rc.1+build5"}),
                "firmwareVersion: got \"1.1.0-rc.1+build5\", expected a version that a thing's attribute can hold: at most 800",
            ),
            (json!({"upgradeTrigger": ""}), "upgradeTrigger: got \"\", expected"),
            (json!({"targetArn": "arn:aws:iot:eu-west-2:000000000000:thing/a"}), "targetArn: got"),
            (json!({"targetArn": "arn:aws:iot:eu-west-1:000000000001:thing/a"}), "targetArn: got"),
            (json!({"targetArn": "arn:aws:iot:eu-west-1:000000000000:cert/a"}), "targetArn: got"),
            (json!({"timeoutMinutes": 0}), "timeoutMinutes: got 0, expected 1 to 10080"),
            (json!({"timeoutMinutes": 10081}), "timeoutMinutes: got 10081, expected 1 to 10080"),
            (json!({"rollout": {"maximumPerMinute": 1001}}), "rollout.maximumPerMinute: got 1001, expected 1 to 1000"),
            (
                json!({"rollout": {"exponentialRate": {"baseRatePerMinute": 5, "incrementFactor": 1.0}}}),
                "rollout.exponentialRate.incrementFactor: got 1, expected 1.1 to 5",
            ),
            (
                json!({"rollout": {"exponentialRate": {"baseRatePerMinute": 5, "incrementFactor": 2.0}}}),
                "rollout.exponentialRate.numberOfNotifiedThings: got nothing",
            ),
            (
                json!({"abort": {"percentage": 0.0, "minimumExecuted": 1}}),
                "abort.percentage: got 0, expected 0.01 to 100",
            ),
            (json!({"abort": {"percentage": 10.0, "minimumExecuted": 0}}), "abort.minimumExecuted: got 0"),
            (json!({"retries": 11}), "retries: got 11, expected 1 to 10"),
            (json!({"artifact": {"url": "ftp://x"}}), "artifact.url: got \"ftp://x\""),
            (json!({"artifact": {"url": "https://x", "key": "k"}}), "artifact.url: got bucket or key too"),
            (json!({"artifact": {"bucket": "other", "key": "k"}}), "artifact.bucket: got \"other\""),
            (
                json!({"rollout": {"exponentialRate": {
                    "baseRatePerMinute": 5, "incrementFactor": 1.55, "numberOfNotifiedThings": 1,
                }}}),
                "rollout.exponentialRate.incrementFactor: got 1.55, expected one digit",
            ),
            (json!({"artifact": {"url": "https://x", "versionId": "v"}}), "artifact.versionId: got \"v\""),
            (json!({"artifact": {"key": "k", "sha256": "abc"}}), "artifact.sha256: got \"abc\""),
            (json!({"artifact": {"key": "k", "signature": "abc"}}), "artifact.signature: got \"abc\""),
            (json!({"artifact": {"key": "k", "size": 0}}), "artifact.size: got 0"),
        ];
        for (extra, message) in cases {
            let error = input(extra).validate(&stack()).unwrap_err();
            assert_eq!(error.name, ErrorName::InvalidInput);
            assert!(error.message.starts_with(message), "{} does not begin with {message}", error.message);
        }
        for extra in [
            json!({"retries": 10}),
            json!({"rollout": {"maximumPerMinute": 1000}, "abort": {"percentage": 10.5, "minimumExecuted": 1}}),
            json!({"targetArn": "arn:aws:iot:eu-west-1:000000000000:thing/gateway:1"}),
            json!({"artifact": {"url": "https://images.example.com/1.2.3"}, "timeoutMinutes": 10080}),
        ] {
            assert_eq!(input(extra).validate(&stack()), Ok(()));
        }
    }
}
