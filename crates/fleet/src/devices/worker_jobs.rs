//! Jobs that workers on premises run: dispatched on `{tenant}/to/worker`, answered on `{tenant}/to/lambda`.

use super::worker_job::{Answer, Claimed, Dispatch, Expected, JobHandle, Judged, KEEP_SECONDS, Renewed, WorkerJob};
use crate::aws::{now_millis, now_seconds, publish};
use crate::error::{aws, code, unbuilt};
use crate::item_table::{Item, ItemTable};
use crate::tasks::{MAX_CAUSE_CHARACTERS, Outcome, Tasks};
use crate::workflows::rendezvous::Wait;
use crate::{Error, ErrorName, config};
use aws_sdk_s3::config::RequestChecksumCalculation;
use aws_sdk_s3::presigning::PresigningConfig;
use protocol::on_premises::{
    JobMessage, Lease, Verdict, WorkerMessage, WorkerReply, WorkerResult, answer_without_token,
};
use protocol::{HandlerName, JsonText, MAX_PAYLOAD_BYTES, OperationId, Tenant, WorkerName};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::time::Duration;

/// How much data a state may pass on, in bytes (<https://docs.aws.amazon.com/step-functions/latest/dg/service-quotas.html>).
const MAX_STATE_BYTES: usize = 256 * 1024;
/// What else than the input and the result is in a state's data.
const SPARE_BYTES: usize = 2048;
/// The largest input, in bytes: it also passes through a Lambda function, with what that has to know besides.
const MAX_INPUT_BYTES: usize = 240 * 1024;
/// What else than the input is in a job's message.
const MESSAGE_BYTES: usize = 1024;
/// How long a signed address is good: workers use it at once.
const ADDRESS_LIFETIME: Duration = Duration::from_hours(1);
/// Limits of `SendTaskFailure` (<https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskFailure.html>).
const MAX_ERROR_CHARACTERS: usize = 256;
/// The exception of a job whose result Step Functions does not take.
const INVALID_RESULT: &str = "InvalidResult";

/// A job to dispatch, and the state that waits for it.
#[derive(Debug)]
pub struct Order {
    /// Whose workers.
    pub tenant: Tenant,
    /// The job: its execution's name.
    pub operation: OperationId,
    /// What shall be done; each worker has a default.
    pub handler: Option<HandlerName>,
    /// How the state waits.
    pub wait: Wait,
    /// What with: an object.
    pub input: JsonText,
}

/// What a job's state gets.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JobOutput {
    result: JsonText,
    /// Where the result is, if it is too large to be here.
    #[serde(skip_serializing_if = "Option::is_none")]
    result_s3_uri: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result_bytes: Option<u64>,
}

impl JobOutput {
    fn of(result: JsonText) -> Self {
        Self { result, result_s3_uri: None, result_bytes: None }
    }
}

/// Where jobs are kept, and their limits.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The table of jobs.
    pub table: String,
    /// The bucket of inputs and results that are too large for a message.
    pub bucket: String,
    /// Whose workers there are.
    pub tenants: Vec<String>,
    /// How long a worker may be silent, in milliseconds.
    pub lease: u32,
    /// How large a result may be.
    pub max_result_bytes: u64,
}

impl Limits {
    /// Those that the environment names.
    pub fn from_environment() -> Result<Self, String> {
        Ok(Self {
            table: config::required("WORKER_JOBS_TABLE")?,
            bucket: config::required("JOB_DATA_BUCKET")?,
            tenants: config::required("TENANTS")?.split(',').map(|tenant| tenant.trim().to_owned()).collect(),
            // Another worker has time to take over, and to say so, before the state gives up.
            lease: config::number("WORKER_HEARTBEAT_SECONDS")?
                .saturating_mul(1000)
                .div_euclid(3)
                .min(config::number("WORKER_LEASE_SECONDS")?.saturating_mul(1000)),
            max_result_bytes: config::number("MAX_RESULT_BYTES")?.into(),
        })
    }
}

/// The last answer of a tenant's worker that named no job: such a worker is not silent, but cannot read what it gets. The item
/// lies beside the tenant's jobs, under the tenant's name; the state machine reads it when a job has timed out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct UnreadJob {
    /// When, in Unix milliseconds.
    answered_at: i64,
    exception: String,
    expires_at: i64,
    revision: u64,
}

impl Item for UnreadJob {
    const KEY: &'static str = "job";

    fn revision(&mut self) -> &mut u64 {
        &mut self.revision
    }
}

/// The jobs, and what reaches workers and waiting states.
#[derive(Debug, Clone)]
pub struct WorkerJobs {
    table: ItemTable<WorkerJob>,
    unread: ItemTable<UnreadJob>,
    tasks: Tasks,
    mqtt: aws_sdk_iotdataplane::Client,
    s3: aws_sdk_s3::Client,
    limits: Limits,
}

/// A worker's job: its tenant, and the handle that the worker echoed.
struct Job<'a> {
    tenant: &'a Tenant,
    handle: JobHandle,
}

impl Job<'_> {
    fn key(&self) -> String {
        key(self.tenant, &self.handle.operation)
    }

    /// Each lease has an object of its own, so that a worker that has lost it overwrites nothing.
    fn uploaded_key(&self, fence: u64) -> String {
        self.object_key(&format!("result-{fence}.json"))
    }

    fn object_key(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.tenant, self.handle.operation)
    }
}

/// Neither part can hold a `#`.
fn key(tenant: &Tenant, operation: &OperationId) -> String {
    format!("{tenant}#{operation}")
}

fn input_key(tenant: &Tenant, operation: &OperationId) -> String {
    format!("{tenant}/{operation}/input.json")
}

impl WorkerJobs {
    /// The jobs that the environment names.
    pub fn from_environment(aws: &aws_config::SdkConfig) -> Result<Self, String> {
        Ok(Self::new(aws, crate::aws::iot_data_client(aws)?, Limits::from_environment()?))
    }

    /// The jobs of that table.
    pub fn new(aws: &aws_config::SdkConfig, mqtt: aws_sdk_iotdataplane::Client, limits: Limits) -> Self {
        // A checksum of what is signed would be one of nothing: the worker has the bytes.
        let s3 = aws_sdk_s3::config::Builder::from(aws)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .build();
        Self {
            table: ItemTable::new(aws, limits.table.clone()),
            unread: ItemTable::new(aws, limits.table.clone()),
            tasks: Tasks::new(aws),
            mqtt,
            s3: aws_sdk_s3::Client::from_conf(s3),
            limits,
        }
    }

    /// Sends a job to its tenant's workers; the state's token is kept first. If the answer is there already, the state's
    /// task ends at once.
    pub async fn dispatch(&self, order: &Order) -> Result<(), Error> {
        let Order { tenant, operation, handler, wait, input } = order;
        let input = input.compact();
        if !self.limits.tenants.iter().any(|known| known == tenant.as_str()) {
            return Err(Error::invalid("tenant", tenant, &format!("one of {}", self.limits.tenants.join(", "))));
        }
        let bytes = input.get().len();
        if bytes > MAX_INPUT_BYTES {
            let got = format!("{bytes} bytes");
            return Err(Error::invalid("input", got, &format!("at most {MAX_INPUT_BYTES} bytes")));
        }
        let is_large = bytes + MESSAGE_BYTES > MAX_PAYLOAD_BYTES;
        if is_large {
            self.put(&input_key(tenant, operation), input.to_string()).await?;
        }
        let room = MAX_STATE_BYTES.saturating_sub(bytes + SPARE_BYTES);
        let dispatch = Dispatch { wait: wait.clone(), room: room as u64, input_is_stored: is_large };
        let secret = uuid::Uuid::new_v4().simple().to_string();
        let rule = |job: &mut WorkerJob| job.expect(&dispatch, &secret, now_seconds());
        let (job, expected) = self.table.change(&key(tenant, operation), rule).await?;
        let outcome = match expected {
            Expected::Superseded => Outcome::Late,
            Expected::Answered => self.complete(&job).await?,
            Expected::Send => {
                let message = JobMessage {
                    input: if is_large { JsonText::null() } else { input },
                    task_token: job.handle(operation).to_string(),
                    handler: handler.clone(),
                    input_bytes: is_large.then_some(bytes as u64),
                };
                publish(&self.mqtt, message.encode(tenant)).await?;
                Outcome::Waiting
            }
        };
        tracing::info!(tenant = tenant.as_str(), operation = operation.as_str(), ?outcome, "dispatched");
        Ok(())
    }

    /// A worker of the tenant has said something. Fails with `MalformedMessage` if it cannot be read, or names no job.
    pub async fn hear(&self, tenant: &Tenant, payload: &[u8]) -> Result<(), Error> {
        let (text, message) = match WorkerMessage::decode(payload) {
            Ok(decoded) => decoded,
            Err(error) => {
                if let Some(exception) = answer_without_token(payload) {
                    self.note_unread_job(tenant, exception.unwrap_or_default()).await?;
                }
                return Err(error.into());
            }
        };
        let kind = kind(&message);
        let Some(handle) = JobHandle::parse(&text) else {
            tracing::warn!(tenant = tenant.as_str(), message = kind, outcome = ?Outcome::Rejected, "no handle of ours");
            return Ok(());
        };
        let job = Job { tenant, handle };
        let progress = if let WorkerMessage::Heartbeat { progress, .. } = &message { *progress } else { None };
        let outcome = match message {
            WorkerMessage::Claim { worker, request } => self.claim(&job, &worker, request).await?,
            WorkerMessage::Heartbeat { lease: Some((lease, request)), .. } => self.renew(&job, &lease, request).await?,
            WorkerMessage::Heartbeat { lease: None, .. } => self.plain_heartbeat(&job).await?,
            WorkerMessage::Release(lease) => self.release(&job, &lease).await?,
            WorkerMessage::Upload { lease, request, bytes } => self.upload(&job, &lease, request, bytes).await?,
            WorkerMessage::Succeeded { result, lease } => self.succeeded(&job, lease.as_ref(), result).await?,
            WorkerMessage::Failed { exception, cause, lease } => {
                let answer = Answer::Failed { error: error_name(&exception), cause: cause.unwrap_or_default() };
                self.answer(&job, lease.as_ref(), &answer).await?
            }
        };
        let operation = job.handle.operation.as_str();
        tracing::info!(tenant = tenant.as_str(), operation, message = kind, progress, ?outcome);
        Ok(())
    }

    async fn note_unread_job(&self, tenant: &Tenant, exception: String) -> Result<(), Error> {
        let exception: String = exception.chars().take(MAX_ERROR_CHARACTERS).collect();
        let rule = |item: &mut UnreadJob| {
            item.answered_at = now_millis();
            item.exception.clone_from(&exception);
            item.expires_at = now_seconds() + KEEP_SECONDS;
        };
        self.unread.change(tenant.as_str(), rule).await.map(drop)
    }

    fn lease(&self) -> i64 {
        self.limits.lease.into()
    }

    async fn claim(&self, job: &Job<'_>, worker: &WorkerName, request: String) -> Result<Outcome, Error> {
        let rule = |item: &mut WorkerJob| item.claim(&job.handle, worker, &request, now_millis(), self.lease());
        let (item, claimed) = self.table.change(&job.key(), rule).await?;
        let verdict = match claimed {
            // Nobody may wait for the job any more: then nobody needs to run it.
            Claimed::Granted(fence) => match self.prolong(job, &item).await? {
                Outcome::Late => Verdict::Over,
                _ => Verdict::Granted {
                    fence,
                    lease_milliseconds: self.limits.lease.into(),
                    input_url: if item.input_is_stored { Some(self.input_url(job).await?) } else { None },
                },
            },
            Claimed::Held(retry_milliseconds) => Verdict::Held { retry_milliseconds },
            Claimed::Over => Verdict::Over,
        };
        let outcome = if matches!(verdict, Verdict::Granted { .. }) { Outcome::Applied } else { Outcome::Rejected };
        self.reply(job, worker, Some(request), verdict).await?;
        Ok(outcome)
    }

    async fn renew(&self, job: &Job<'_>, lease: &Lease, request: String) -> Result<Outcome, Error> {
        let rule = |item: &mut WorkerJob| item.renew(&job.handle, lease, now_millis(), self.lease());
        let (item, renewed) = self.table.change(&job.key(), rule).await?;
        let (verdict, outcome) = match renewed {
            Renewed::Lost => (Verdict::Lost, Outcome::Rejected),
            Renewed::Over => (Verdict::Over, Outcome::Late),
            Renewed::Held => match self.prolong(job, &item).await? {
                Outcome::Late => (Verdict::Over, Outcome::Late),
                _ => (self.granted_again(lease), Outcome::Applied),
            },
        };
        self.reply(job, &lease.worker, Some(request), verdict).await?;
        Ok(outcome)
    }

    /// Tells the waiting state that somebody is at the job. If it waits no more, the job may have been sent anew meanwhile.
    async fn prolong(&self, job: &Job<'_>, item: &WorkerJob) -> Result<Outcome, Error> {
        let outcome = self.tasks.prolong(&item.task_token).await?;
        if outcome != Outcome::Late {
            return Ok(outcome);
        }
        let item_now = self.table.get(&job.key()).await?;
        if item_now.task_token == item.task_token {
            return Ok(Outcome::Late);
        }
        self.tasks.prolong(&item_now.task_token).await
    }

    fn granted_again(&self, lease: &Lease) -> Verdict {
        Verdict::Granted { fence: lease.fence, lease_milliseconds: self.limits.lease.into(), input_url: None }
    }

    async fn plain_heartbeat(&self, job: &Job<'_>) -> Result<Outcome, Error> {
        let item = self.table.get(&job.key()).await?;
        if item.is_run_by_a_plain_worker(&job.handle) {
            return self.tasks.prolong(&item.task_token).await;
        }
        Ok(Outcome::Rejected)
    }

    async fn release(&self, job: &Job<'_>, lease: &Lease) -> Result<Outcome, Error> {
        let (_, released) = self.table.change(&job.key(), |item| item.release(&job.handle, lease)).await?;
        Ok(if released { Outcome::Applied } else { Outcome::Rejected })
    }

    async fn upload(&self, job: &Job<'_>, lease: &Lease, request: String, bytes: u64) -> Result<Outcome, Error> {
        let item = self.table.get(&job.key()).await?;
        let (verdict, outcome) = match item.judge(&job.handle, Some(lease)) {
            Judged::Counts if bytes > self.limits.max_result_bytes => {
                (Verdict::TooLarge { limit: self.limits.max_result_bytes }, Outcome::Rejected)
            }
            Judged::Counts => (self.upload_address(job, lease.fence, bytes).await?, Outcome::Applied),
            Judged::Stale => (Verdict::Lost, Outcome::Rejected),
            Judged::Duplicate | Judged::Unknown => (Verdict::Over, Outcome::Late),
        };
        self.reply(job, &lease.worker, Some(request), verdict).await?;
        Ok(outcome)
    }

    async fn succeeded(&self, job: &Job<'_>, lease: Option<&Lease>, result: WorkerResult) -> Result<Outcome, Error> {
        let item = self.table.get(&job.key()).await?;
        // Only what counts is worth looking at; the rule decides again when it is written.
        if item.judge(&job.handle, lease) != Judged::Counts {
            return self.answer(job, lease, &Answer::Succeeded { result: "null".into() }).await;
        }
        let answer = match result {
            WorkerResult::Value(value) => {
                let text = value.to_string();
                let bytes = text.len() as u64;
                if bytes > item.room {
                    // Whoever answers another time has another object: what counted is not exchanged.
                    let key = job.object_key(&format!("result-{:x}.json", Sha256::digest(&text)));
                    self.put(&key, text).await?;
                    Answer::Stored { key, bytes }
                } else {
                    Answer::Succeeded { result: text }
                }
            }
            WorkerResult::Object { bytes } => {
                self.uploaded(job.uploaded_key(lease.map_or(0, |lease| lease.fence)), bytes).await?
            }
        };
        self.answer(job, lease, &answer).await
    }

    /// The result that a worker says it has uploaded.
    async fn uploaded(&self, key: String, said: u64) -> Result<Answer, Error> {
        let head = self.s3.head_object().bucket(&self.limits.bucket).key(&key).send().await;
        let missing = |cause: String| Answer::Failed { error: ErrorName::ResultMissing.to_string(), cause };
        match head {
            Ok(head) => {
                let bytes = u64::try_from(head.content_length.unwrap_or_default()).unwrap_or_default();
                Ok(if bytes == said {
                    Answer::Stored { key, bytes }
                } else {
                    missing(format!("the uploaded result has {bytes} bytes, the worker said {said}"))
                })
            }
            Err(error) if matches!(code(&error), Some("NotFound" | "NoSuchKey")) => {
                Ok(missing("the worker said that it has uploaded its result, but there is none".to_owned()))
            }
            Err(error) => Err(aws("s3:HeadObject", &error)),
        }
    }

    async fn answer(&self, job: &Job<'_>, lease: Option<&Lease>, answer: &Answer) -> Result<Outcome, Error> {
        let rule = |item: &mut WorkerJob| item.answer(&job.handle, lease, answer);
        let (item, judged) = self.table.change(&job.key(), rule).await?;
        match judged {
            Judged::Counts => self.complete(&item).await,
            // An earlier delivery may have died before it could end the task.
            Judged::Duplicate => Ok(match self.complete(&item).await? {
                Outcome::Applied => Outcome::Applied,
                _ => Outcome::Duplicate,
            }),
            Judged::Stale => {
                if let Some(lease) = lease {
                    self.reply(job, &lease.worker, None, Verdict::Lost).await?;
                }
                Ok(Outcome::Rejected)
            }
            Judged::Unknown => Ok(Outcome::Rejected),
        }
    }

    /// Ends the waiting task with the job's answer.
    async fn complete(&self, item: &WorkerJob) -> Result<Outcome, Error> {
        let output = match &item.answer {
            None => return Ok(Outcome::Waiting),
            // No exception can have a name of ours.
            Some(Answer::Failed { error, cause }) if error == ErrorName::ResultMissing.as_str() => {
                return self.tasks.fail(&item.task_token, ErrorName::ResultMissing, cause).await;
            }
            Some(Answer::Failed { error, cause }) => {
                let cause = exception(error, cause);
                return self.tasks.fail(&item.task_token, ErrorName::WorkerException, &cause).await;
            }
            Some(Answer::Succeeded { result }) => JobOutput::of(JsonText::parse(result.as_bytes()).map_err(unbuilt)?),
            Some(Answer::Stored { key, bytes }) if *bytes <= item.room => match self.read(key).await? {
                Ok(result) => JobOutput::of(result),
                Err(cause) => {
                    return self.tasks.fail(&item.task_token, ErrorName::ResultMissing, &cause).await;
                }
            },
            Some(Answer::Stored { key, bytes }) => {
                let result_s3_uri = format!("s3://{}/{key}", self.limits.bucket);
                let (result_s3_uri, result_bytes) = (Some(result_s3_uri), Some(*bytes));
                JobOutput { result: JsonText::null(), result_s3_uri, result_bytes }
            }
        };
        match self.tasks.complete(&item.task_token, Ok(output)).await {
            // JSON that Step Functions does not take, such as a number beyond every double.
            Err(error) if error.name == ErrorName::RequestRefused => {
                let cause = exception(INVALID_RESULT, &error.message);
                self.tasks.fail(&item.task_token, ErrorName::WorkerException, &cause).await
            }
            ended => ended,
        }
    }

    async fn put(&self, key: &str, text: String) -> Result<(), Error> {
        let put = self.s3.put_object().bucket(&self.limits.bucket).key(key).content_type("application/json");
        put.body(text.into_bytes().into()).send().await.map_err(|error| aws("s3:PutObject", &error))?;
        Ok(())
    }

    /// The JSON of an object, or why it is none.
    async fn read(&self, key: &str) -> Result<Result<JsonText, String>, Error> {
        let got = self.s3.get_object().bucket(&self.limits.bucket).key(key).send().await;
        let got = match got {
            Ok(got) => got,
            Err(error) if code(&error) == Some("NoSuchKey") => return Ok(Err("the result is gone".to_owned())),
            Err(error) => return Err(aws("s3:GetObject", &error)),
        };
        let body = got.body.collect().await;
        let body = body.map_err(|error| Error::new(ErrorName::ServiceUnavailable, format!("s3:GetObject: {error}")))?;
        Ok(uploaded_json(&body.into_bytes()))
    }

    async fn input_url(&self, job: &Job<'_>) -> Result<String, Error> {
        let key = input_key(job.tenant, &job.handle.operation);
        let request = self.s3.get_object().bucket(&self.limits.bucket).key(key);
        let signed = request.presigned(lifetime()?).await.map_err(|error| aws("s3:GetObject", &error))?;
        Ok(signed.uri().to_owned())
    }

    async fn upload_address(&self, job: &Job<'_>, fence: u64, bytes: u64) -> Result<Verdict, Error> {
        let length = i64::try_from(bytes).map_err(unbuilt)?;
        let request = self.s3.put_object().bucket(&self.limits.bucket).key(job.uploaded_key(fence));
        // Good for one upload, as the address is good for an hour: a result is not exchanged after it counted.
        let request = request.content_length(length).content_type("application/json").if_none_match("*");
        let signed = request.presigned(lifetime()?).await.map_err(|error| aws("s3:PutObject", &error))?;
        let headers = signed.headers().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Ok(Verdict::Upload { url: signed.uri().to_owned(), headers })
    }

    async fn reply(
        &self,
        job: &Job<'_>,
        worker: &WorkerName,
        request: Option<String>,
        verdict: Verdict,
    ) -> Result<(), Error> {
        let reply = WorkerReply { task_token: job.handle.to_string(), request, verdict };
        publish(&self.mqtt, reply.encode(job.tenant, worker)).await
    }
}

fn lifetime() -> Result<PresigningConfig, Error> {
    PresigningConfig::expires_in(ADDRESS_LIFETIME).map_err(unbuilt)
}

fn kind(message: &WorkerMessage) -> &'static str {
    match message {
        WorkerMessage::Claim { .. } => "CLAIM",
        WorkerMessage::Heartbeat { .. } => "HEARTBEAT",
        WorkerMessage::Release(_) => "RELEASE",
        WorkerMessage::Upload { .. } => "UPLOAD",
        WorkerMessage::Succeeded { .. } => "SUCCEEDED",
        WorkerMessage::Failed { .. } => "FAILED",
    }
}

/// A worker's exception as the cause of [`ErrorName::WorkerException`], from which the state machine takes the execution's error
/// and its cause. What is too long for Step Functions is cut off the worker's own text.
fn exception(name: &str, cause: &str) -> String {
    let encode = |cause: &str| json!({"exception": name, "cause": cause}).to_string();
    let whole = encode(cause);
    // Every character takes at least one in JSON.
    let excess = whole.chars().count().saturating_sub(MAX_CAUSE_CHARACTERS);
    if excess == 0 {
        return whole;
    }
    let kept = cause.chars().count().saturating_sub(excess);
    encode(&cause.chars().take(kept).collect::<String>())
}

/// The error that an execution fails with: the exception's name, unless Step Functions or we mean something by it.
fn error_name(exception: &str) -> String {
    let exception = exception.trim();
    let of_others = ["States.", "Lambda.", "Sandbox.", "Runtime."].iter().any(|prefix| exception.starts_with(prefix));
    let is_ours = ErrorName::ALL.into_iter().any(|name| name.as_str() == exception);
    let name = match exception {
        "" => "UnnamedException".to_owned(),
        _ if of_others || is_ours => format!("Worker.{exception}"),
        name => name.to_owned(),
    };
    name.chars().take(MAX_ERROR_CHARACTERS).collect()
}

/// What a worker has uploaded as its result; its size is that of the address that it got for it.
fn uploaded_json(bytes: &[u8]) -> Result<JsonText, String> {
    protocol::check_depth(bytes).map_err(|error| format!("the result: {error}"))?;
    JsonText::parse(bytes).map_err(|error| format!("the result is no JSON: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn an_uploaded_result_is_json_that_is_not_too_deep() {
        let nested = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
        assert!(uploaded_json(&nested(protocol::MAX_JSON_DEPTH)).is_ok());
        let error = uploaded_json(&nested(protocol::MAX_JSON_DEPTH + 1)).unwrap_err();
        assert!(error.contains("64"), "{error}");
        let error = uploaded_json(b"{").unwrap_err();
        assert!(error.starts_with("the result is no JSON: EOF"), "{error}");
    }

    /// The calls of the jobs, on an AWS on which Step Functions does not take a task's output.
    fn jobs() -> (WorkerJobs, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
        use aws_smithy_http_client::test_util::infallible_client_fn;
        let calls = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
        let noted = calls.clone();
        let http = infallible_client_fn(move |request: ureq::http::Request<_>| {
            let target = request.headers().get("x-amz-target").map(|target| target.to_str().unwrap().to_owned());
            let target = target.unwrap_or_default();
            let body = String::from_utf8_lossy(request.body().bytes().unwrap_or_default()).into_owned();
            let (status, answer) = if target.ends_with("SendTaskSuccess") {
                (400, r#"{"__type":"InvalidOutput","message":"no JSON"}"#)
            } else {
                (200, "{}")
            };
            noted.lock().unwrap().push(format!("{target} {body}"));
            ureq::http::Response::builder().status(status).body(answer).unwrap()
        });
        let config = crate::aws::of_test(http);
        let limits = Limits {
            table: "jobs".into(),
            bucket: "data".into(),
            tenants: vec!["tenant1".into()],
            lease: 20_000,
            max_result_bytes: 1 << 20,
        };
        (WorkerJobs::new(&config, aws_sdk_iotdataplane::Client::from_conf((&config).into()), limits), calls)
    }

    #[tokio::test]
    async fn a_result_that_step_functions_does_not_take_fails_its_job() {
        let (jobs, calls) = jobs();
        let result = r#"{"b":117.63331139400017,"a":[123456789012345678901234567890,1.0,"\ud800"]}"#;
        let mut item = WorkerJob::default();
        item.task_token = "token".into();
        item.answer = Some(Answer::Succeeded { result: result.into() });
        assert_eq!(jobs.complete(&item).await, Ok(Outcome::Applied));
        let calls: Vec<Value> = calls
            .lock()
            .unwrap()
            .iter()
            .map(|call| {
                let (target, body) = call.split_once(' ').unwrap();
                json!([target, serde_json::from_str::<Value>(body).unwrap()])
            })
            .collect();
        // What is passed on stays as it was.
        assert_eq!(calls[0][1]["output"], format!(r#"{{"result":{result}}}"#));
        assert_eq!(
            (&calls[1][0], &calls[1][1]["error"]),
            (&json!("AWSStepFunctions.SendTaskFailure"), &json!("WorkerException"))
        );
        let cause: Value = serde_json::from_str(calls[1][1]["cause"].as_str().unwrap()).unwrap();
        assert_eq!(cause["exception"], "InvalidResult");
    }

    #[tokio::test]
    async fn who_answers_without_a_token_is_noted_and_a_dead_letter() {
        let (jobs, calls) = jobs();
        let tenant = "tenant1".parse().unwrap();
        let without = br#"{"result":null,"TaskToken":null,"exception":"JSONDecodeError"}"#;
        let error = jobs.hear(&tenant, without).await.unwrap_err();
        assert_eq!(error.name, ErrorName::MalformedMessage);
        assert!(error.message.contains("no job is known (JSONDecodeError)"), "{error}");
        let noted = std::mem::take(&mut *calls.lock().unwrap());
        let written = noted.iter().find_map(|call| call.strip_prefix("DynamoDB_20120810.PutItem ")).unwrap();
        let item: Value = serde_json::from_str::<Value>(written).unwrap()["Item"].take();
        assert_eq!((&item["job"]["S"], &item["exception"]["S"]), (&json!("tenant1"), &json!("JSONDecodeError")));
        assert!(jobs.hear(&tenant, b"nothing").await.is_err());
        assert_eq!(calls.lock().unwrap().len(), 0, "it may be of anybody");
    }

    #[tokio::test]
    async fn an_upload_is_good_once() {
        let (jobs, _) = jobs();
        let handle = JobHandle::parse("job-1.a0").unwrap();
        let job = Job { tenant: &"tenant1".parse().unwrap(), handle };
        let Verdict::Upload { url, headers } = jobs.upload_address(&job, 3, 9).await.unwrap() else { panic!() };
        assert!(url.contains("/tenant1/job-1/result-3.json?"), "{url}");
        assert_eq!(headers.get("if-none-match").map(String::as_str), Some("*"));
        let signed = url.split('&').find(|part| part.starts_with("X-Amz-SignedHeaders=")).unwrap();
        assert!(signed.contains("if-none-match") && signed.contains("content-length"), "{signed}");
    }

    #[test]
    fn an_exception_is_a_cause_that_step_functions_takes_and_the_state_machine_can_read() {
        let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(read(&exception("KeyError", "b")), json!({"exception": "KeyError", "cause": "b"}));
        let quotes = "\"".repeat(MAX_CAUSE_CHARACTERS);
        for cause in ["ä".repeat(MAX_CAUSE_CHARACTERS), quotes] {
            let encoded = exception(&"ä".repeat(MAX_ERROR_CHARACTERS), &cause);
            assert!(encoded.chars().count() <= MAX_CAUSE_CHARACTERS);
            assert!(cause.starts_with(read(&encoded)["cause"].as_str().unwrap()));
        }
    }

    #[test]
    fn an_exception_gives_its_name_but_cannot_play_another_error() {
        for (exception, name) in [
            ("KeyError", "KeyError"),
            ("", "UnnamedException"),
            (" ", "UnnamedException"),
            ("States.Timeout", "Worker.States.Timeout"),
            ("Lambda.TooManyRequestsException", "Worker.Lambda.TooManyRequestsException"),
            ("Throttled", "Worker.Throttled"),
            (" Throttled\n", "Worker.Throttled"),
            ("\tStates.HeartbeatTimeout", "Worker.States.HeartbeatTimeout"),
        ] {
            assert_eq!(error_name(exception), name);
        }
        assert_eq!(error_name(&"ä".repeat(1000)).chars().count(), MAX_ERROR_CHARACTERS);
    }
}
