//! Jobs for workers on premises: `{tenant}/to/worker` and `{tenant}/to/lambda`.
//!
//! A plain worker takes [`JobMessage`] and answers with `result` or `exception`, echoing `TaskToken`. Workers of ours also
//! claim a job before they run it, so that of several only one does, and hold that claim (the lease) while they run it;
//! the cloud answers them on a topic of their own, `{tenant}/to/worker/{worker}`, which plain workers do not listen to.

use crate::{DecodeError, HandlerName, Publication, Tenant, WorkerName, limits, redacted};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// The longest `TaskToken` that is read, in bytes.
const MAX_HANDLE_BYTES: usize = 512;

/// The topic on which all workers of a tenant take jobs.
pub fn jobs_topic(tenant: &Tenant) -> String {
    format!("{tenant}/to/worker")
}

/// The topic on which one worker is answered.
pub fn replies_topic(tenant: &Tenant, worker: &WorkerName) -> String {
    format!("{tenant}/to/worker/{worker}")
}

/// The topic on which workers answer.
pub fn answers_topic(tenant: &Tenant) -> String {
    format!("{tenant}/to/lambda")
}

/// The tenant whose workers answer on this topic, if it is such a topic.
pub fn tenant_of_answer(topic: &str) -> Option<Tenant> {
    topic.strip_suffix("/to/lambda")?.parse().ok()
}

/// A job, as it goes to all workers of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct JobMessage {
    /// What the job works on; null if it is too large for a message. Whoever claims the job is told where it is.
    pub input: Value,
    /// The job's handle: opaque to the worker, which echoes it.
    #[serde(deserialize_with = "handle")]
    pub task_token: String,
    /// What shall be done with it; each worker has a default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handler: Option<HandlerName>,
    /// How large the input is, if it is not in the message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_bytes: Option<u64>,
}

impl JobMessage {
    /// The message for a tenant's workers.
    pub fn encode(&self, tenant: &Tenant) -> Publication {
        publication(jobs_topic(tenant), self)
    }

    /// Reads the message on a worker.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        limits::json("job", payload)
    }
}

/// A worker's right to run a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who has it.
    pub worker: WorkerName,
    /// The fencing number: each new lease of a job has a larger one, and what comes with an older one does not count.
    pub fence: u64,
}

/// What a worker says about a job.
#[derive(Debug, Clone, PartialEq)]
pub enum WorkerMessage {
    /// It wants to run the job.
    Claim {
        /// Who.
        worker: WorkerName,
        /// Chosen by the worker, the same when it asks again: the answer has it too.
        request: String,
    },
    /// It is still at it.
    Heartbeat {
        /// How far, in percent.
        progress: Option<u8>,
        /// Its lease, which begins anew, and the request that the answer is to have. Plain workers have none.
        lease: Option<(Lease, String)>,
    },
    /// It gives the job back.
    Release(Lease),
    /// It has a result that is too large for a message, and asks where to put it.
    Upload {
        /// Its lease.
        lease: Lease,
        /// The answer has it too.
        request: String,
        /// How large the result is.
        bytes: u64,
    },
    /// It is done.
    Succeeded {
        /// What came out.
        result: WorkerResult,
        /// Its lease. Plain workers have none.
        lease: Option<Lease>,
    },
    /// It has failed.
    Failed {
        /// Which way, such as `KeyError`.
        exception: String,
        /// In detail.
        cause: Option<String>,
        /// Its lease. Plain workers have none.
        lease: Option<Lease>,
    },
}

/// What came out of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum WorkerResult {
    /// In the message.
    Value(Value),
    /// Uploaded.
    Object {
        /// How large.
        bytes: u64,
    },
}

/// A worker's message as it is on the wire: one flat object.
#[derive(Default, Serialize, Deserialize)]
struct Wire {
    #[serde(rename = "TaskToken")]
    task_token: Option<String>,
    /// Absent, or there: a result may well be null.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    result: Option<Value>,
    #[serde(default, rename = "resultBytes", skip_serializing_if = "Option::is_none")]
    result_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exception: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    heartbeat: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    action: Option<Action>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker: Option<WorkerName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fence: Option<u64>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Claim,
    Release,
    Upload,
}

impl WorkerMessage {
    /// The message about the job with that handle.
    pub fn encode(&self, tenant: &Tenant, handle: &str) -> Publication {
        let wire = Wire { task_token: Some(handle.to_owned()), ..self.wire() };
        publication(answers_topic(tenant), &wire)
    }

    fn wire(&self) -> Wire {
        let of_lease = |lease: &Lease| (Some(lease.worker.clone()), Some(lease.fence));
        match self.clone() {
            Self::Claim { worker, request } => {
                Wire { action: Some(Action::Claim), worker: Some(worker), request: Some(request), ..Wire::default() }
            }
            Self::Heartbeat { progress, lease } => {
                let (worker, fence) = lease.as_ref().map(|(lease, _)| of_lease(lease)).unwrap_or_default();
                let request = lease.map(|(_, request)| request);
                let progress = progress.map(f64::from);
                Wire { heartbeat: Some(true), progress, worker, fence, request, ..Wire::default() }
            }
            Self::Release(lease) => {
                let (worker, fence) = of_lease(&lease);
                Wire { action: Some(Action::Release), worker, fence, ..Wire::default() }
            }
            Self::Upload { lease, request, bytes } => {
                let (worker, fence) = of_lease(&lease);
                let (request, bytes) = (Some(request), Some(bytes));
                Wire { action: Some(Action::Upload), worker, fence, request, bytes, ..Wire::default() }
            }
            Self::Succeeded { result, lease } => {
                let (worker, fence) = lease.as_ref().map(of_lease).unwrap_or_default();
                let (result, result_bytes) = match result {
                    WorkerResult::Value(result) => (result, None),
                    WorkerResult::Object { bytes } => (Value::Null, Some(bytes)),
                };
                Wire { result: Some(result), result_bytes, worker, fence, ..Wire::default() }
            }
            Self::Failed { exception, cause, lease } => {
                let (worker, fence) = lease.as_ref().map(of_lease).unwrap_or_default();
                let (result, exception) = (Some(Value::Null), Some(exception));
                Wire { result, exception, cause, worker, fence, ..Wire::default() }
            }
        }
    }

    /// Reads what a worker said: the job's handle and the message. Fails with a sentence if it cannot be read.
    pub fn decode(payload: &[u8]) -> Result<(String, Self), DecodeError> {
        let wire: Wire = limits::json("answer", payload)?;
        let Some(handle) = wire.task_token.clone() else {
            // A plain worker says so of a message that it could not read itself.
            let why = wire.exception.as_deref().unwrap_or("no exception");
            return Err(DecodeError::malformed("TaskToken", format!("it is null, so no job is known ({why})")));
        };
        if handle.is_empty() || handle.len() > MAX_HANDLE_BYTES {
            return Err(DecodeError::malformed("TaskToken", format!("expected 1 to {MAX_HANDLE_BYTES} bytes")));
        }
        Ok((handle, Self::of(wire)?))
    }

    fn of(wire: Wire) -> Result<Self, DecodeError> {
        let Wire { result, result_bytes, exception, cause, heartbeat, action, bytes, fence, .. } = wire;
        let worker = || wire.worker.clone().ok_or_else(|| missing("worker"));
        let request = || wire.request.clone().ok_or_else(|| missing("request"));
        let lease = || Ok(Lease { worker: worker()?, fence: fence.ok_or_else(|| missing("fence"))? });
        // Plain workers have none.
        let any_lease = || fence.map(|_| lease()).transpose();
        match (action, exception, result, heartbeat) {
            (Some(Action::Claim), ..) => Ok(Self::Claim { worker: worker()?, request: request()? }),
            (Some(Action::Release), ..) => lease().map(Self::Release),
            (Some(Action::Upload), ..) => {
                Ok(Self::Upload { lease: lease()?, request: request()?, bytes: bytes.ok_or_else(|| missing("bytes"))? })
            }
            (None, Some(exception), ..) => {
                let (exception, cause) = (redacted(&exception), cause.as_deref().map(redacted));
                Ok(Self::Failed { exception, cause, lease: any_lease()? })
            }
            (None, None, Some(result), _) => {
                let result = result_bytes.map_or(WorkerResult::Value(result), |bytes| WorkerResult::Object { bytes });
                Ok(Self::Succeeded { result, lease: any_lease()? })
            }
            (None, None, None, Some(true)) => {
                let lease = any_lease()?.map(|lease| Ok((lease, request()?))).transpose()?;
                Ok(Self::Heartbeat { progress: wire.progress.map(percent).transpose()?, lease })
            }
            _ => Err(DecodeError::malformed("answer", "expected result, exception or heartbeat")),
        }
    }
}

fn percent(value: f64) -> Result<u8, DecodeError> {
    if !(0.0..=100.0).contains(&value) {
        return Err(DecodeError::malformed("progress", format!("got {value}, expected 0 to 100")));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(value as u8)
}

fn missing(field: &str) -> DecodeError {
    DecodeError::malformed(field, "it is missing")
}

/// What the cloud answers a worker, on that worker's topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReply {
    /// The job's handle.
    #[serde(rename = "TaskToken")]
    pub task_token: String,
    /// The request that it answers; none, if what the worker said was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// The answer.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// The answer of a [`WorkerReply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "SCREAMING_SNAKE_CASE", rename_all_fields = "camelCase")]
pub enum Verdict {
    /// The worker has the lease, for so long from when it asked.
    Granted {
        /// The lease's fencing number.
        fence: u64,
        /// How long.
        lease_milliseconds: u64,
        /// Where the input is to be read, if it is not in the message.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        input_url: Option<String>,
    },
    /// Another worker has it; ask again then.
    Held {
        /// How long to wait.
        retry_milliseconds: u64,
    },
    /// The worker has not the lease that it believes to have: it must stop, and may claim again.
    Lost,
    /// The job has ended: there is nothing left to do.
    Over,
    /// Where the result is to be put, with these headers.
    Upload {
        /// An address for one PUT.
        url: String,
        /// What the PUT must have.
        headers: BTreeMap<String, String>,
    },
    /// The result is larger than results may be.
    TooLarge {
        /// The limit, in bytes.
        limit: u64,
    },
}

impl WorkerReply {
    /// The message for a worker.
    pub fn encode(&self, tenant: &Tenant, worker: &WorkerName) -> Publication {
        publication(replies_topic(tenant, worker), self)
    }

    /// Reads the message on the worker.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        limits::json("reply", payload)
    }
}

fn handle<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let handle = String::deserialize(deserializer)?;
    if (1..=MAX_HANDLE_BYTES).contains(&handle.len()) {
        return Ok(handle);
    }
    Err(serde::de::Error::custom(format!("TaskToken: expected 1 to {MAX_HANDLE_BYTES} bytes")))
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

fn publication(topic: String, body: &impl Serialize) -> Publication {
    // Texts, numbers and JSON values always serialize.
    Publication { topic, payload: serde_json::to_vec(body).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tenant() -> Tenant {
        "tenant1".parse().unwrap()
    }

    fn lease() -> Lease {
        Lease { worker: "w-1".parse().unwrap(), fence: 3 }
    }

    #[test]
    fn a_job_has_the_form_that_workers_know() {
        let mut job =
            JobMessage { input: json!({"a": 15, "b": 42}), task_token: "t".into(), handler: None, input_bytes: None };
        let publication = job.encode(&tenant());
        assert_eq!(publication.topic, "tenant1/to/worker");
        assert_eq!(publication.payload, br#"{"Input":{"a":15,"b":42},"TaskToken":"t"}"#);
        job.handler = Some("add".parse().unwrap());
        assert_eq!(JobMessage::decode(&job.encode(&tenant()).payload), Ok(job));
        for bad in [r#"{"Input":1}"#, r#"{"Input":1,"TaskToken":null}"#, r#"{"Input":1,"TaskToken":""}"#, "1"] {
            assert!(JobMessage::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_message_of_a_worker_comes_back_as_it_went() {
        let (worker, request) = (lease().worker, "r-1".to_owned());
        for message in [
            WorkerMessage::Claim { worker, request: request.clone() },
            WorkerMessage::Heartbeat { progress: Some(40), lease: Some((lease(), request.clone())) },
            WorkerMessage::Heartbeat { progress: None, lease: None },
            WorkerMessage::Release(lease()),
            WorkerMessage::Upload { lease: lease(), request, bytes: 1 << 20 },
            WorkerMessage::Succeeded { result: WorkerResult::Value(json!({"x": null})), lease: Some(lease()) },
            WorkerMessage::Succeeded { result: WorkerResult::Value(Value::Null), lease: None },
            WorkerMessage::Succeeded { result: WorkerResult::Object { bytes: 7 }, lease: Some(lease()) },
            WorkerMessage::Failed { exception: "KeyError".into(), cause: Some("a".into()), lease: None },
        ] {
            let publication = message.encode(&tenant(), "t");
            assert_eq!(tenant_of_answer(&publication.topic), Some(tenant()));
            assert_eq!(WorkerMessage::decode(&publication.payload), Ok(("t".to_owned(), message)));
        }
    }

    #[test]
    fn what_plain_workers_say_is_understood() {
        let read = |text: &str| WorkerMessage::decode(text.as_bytes()).map(|(_, message)| message);
        let result = |result| WorkerMessage::Succeeded { result: WorkerResult::Value(result), lease: None };
        assert_eq!(read(r#"{"result":57,"TaskToken":"t"}"#), Ok(result(json!(57))));
        assert_eq!(read(r#"{"result":null,"TaskToken":"t"}"#), Ok(result(Value::Null)));
        let failed = WorkerMessage::Failed { exception: "KeyError".into(), cause: None, lease: None };
        assert_eq!(read(r#"{"result":null,"TaskToken":"t","exception":"KeyError"}"#), Ok(failed));
        let heartbeat = WorkerMessage::Heartbeat { progress: Some(12), lease: None };
        assert_eq!(read(r#"{"TaskToken":"t","heartbeat":true,"progress":12.5}"#), Ok(heartbeat));
        for (bad, why) in [
            (r#"{"result":null,"TaskToken":null,"exception":"JSONDecodeError"}"#, "TaskToken: it is null"),
            (r#"{"result":1}"#, "TaskToken: it is null"),
            (r#"{"TaskToken":"","result":1}"#, "TaskToken: expected 1 to 512 bytes"),
            (r#"{"TaskToken":"t"}"#, "expected result, exception or heartbeat"),
            (r#"{"TaskToken":"t","heartbeat":true,"progress":101}"#, "progress: got 101, expected 0 to 100"),
            (r#"{"TaskToken":"t","action":"claim","worker":"a/b","request":"r"}"#, "worker name"),
            (r#"{"TaskToken":"t","action":"upload","worker":"a","fence":1}"#, "request: it is missing"),
            (r#"{"TaskToken":7,"result":1}"#, "answer: TaskToken: invalid type"),
            ("nothing", "answer: expected ident"),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
        let large = format!(r#"{{"TaskToken":"t","result":"{}"}}"#, "x".repeat(crate::MAX_PAYLOAD_BYTES));
        assert!(matches!(read(&large), Err(DecodeError::TooLarge(_))));
    }

    #[test]
    fn replies_come_back_as_they_went_and_only_to_one_worker() {
        let worker = lease().worker;
        for verdict in [
            Verdict::Granted { fence: 1, lease_milliseconds: 20_000, input_url: Some("https://x".into()) },
            Verdict::Held { retry_milliseconds: 5 },
            Verdict::Lost,
            Verdict::Over,
            Verdict::Upload { url: "https://x".into(), headers: [("a".to_owned(), "b".to_owned())].into() },
            Verdict::TooLarge { limit: 9 },
        ] {
            let reply = WorkerReply { task_token: "t".into(), request: Some("r".into()), verdict };
            let publication = reply.encode(&tenant(), &worker);
            assert_eq!(publication.topic, "tenant1/to/worker/w-1");
            assert_eq!(WorkerReply::decode(&publication.payload), Ok(reply));
        }
    }
}
