//! Jobs for workers on premises: `{tenant}/to/worker` and `{tenant}/to/lambda`.
//!
//! A plain worker takes [`JobMessage`] and answers with `result` or `exception`, echoing `TaskToken`. Workers of ours also
//! claim a job before they run it, so that of several only one does, and hold that claim (the lease) while they run it;
//! the cloud answers them on a topic of their own, `{tenant}/to/worker/{worker}`, which plain workers do not listen to.

use crate::{DecodeError, HandlerName, JsonText, Publication, Tenant, WorkerName, limits, redacted};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// The longest `TaskToken` that is read, in bytes.
const MAX_HANDLE_BYTES: usize = 512;
/// The exception of a job whose answer cannot be read.
const INVALID_ANSWER: &str = "InvalidAnswer";
/// Where an exception that is an object may have its name.
const NAMES_OF_EXCEPTIONS: [&str; 4] = ["name", "type", "errorType", "exception"];

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
    pub input: JsonText,
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
    Value(JsonText),
    /// Uploaded.
    Object {
        /// How large.
        bytes: u64,
    },
}

/// A worker's message as it is on the wire: one flat object. Plain workers may have fields of their own, under names that mean
/// something here: so each field is read only if it is needed.
#[derive(Default, Serialize, Deserialize)]
struct Wire {
    #[serde(rename = "TaskToken")]
    task_token: Option<String>,
    /// Absent, or there: a result may well be null.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    result: Option<JsonText>,
    #[serde(default, rename = "resultBytes", skip_serializing_if = "Option::is_none")]
    result_bytes: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exception: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cause: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    heartbeat: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    action: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<JsonText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fence: Option<JsonText>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Claim,
    Release,
    Upload,
}

/// A field of a message that is sent.
fn sent(value: impl Serialize) -> Option<JsonText> {
    JsonText::of(&value).ok()
}

/// A field of a message that came; none if it is missing or is none of ours.
fn read<T: DeserializeOwned>(field: Option<&JsonText>) -> Option<T> {
    serde_json::from_str(field?.get()).ok()
}

/// The same for a field that must be there.
fn required<T: DeserializeOwned>(name: &str, field: Option<&JsonText>) -> Result<T, DecodeError> {
    let field = field.ok_or_else(|| DecodeError::malformed(name, "it is missing"))?;
    serde_json::from_str(field.get()).map_err(|error| DecodeError::malformed(name, error))
}

impl WorkerMessage {
    /// The message about the job with that handle.
    pub fn encode(&self, tenant: &Tenant, handle: &str) -> Publication {
        let wire = Wire { task_token: Some(handle.to_owned()), ..self.wire() };
        publication(answers_topic(tenant), &wire)
    }

    fn wire(&self) -> Wire {
        match self {
            Self::Claim { worker, request } => {
                Wire { action: sent(Action::Claim), worker: sent(worker), request: sent(request), ..Wire::default() }
            }
            Self::Heartbeat { progress, lease } => {
                let (lease, request) = lease.as_ref().map(|(lease, request)| (lease, request)).unzip();
                // Those who read it expect a number, however it is written.
                let progress = progress.map(f64::from).and_then(sent);
                Wire { heartbeat: sent(true), progress, request: request.and_then(sent), ..Wire::under(lease) }
            }
            Self::Release(lease) => Wire { action: sent(Action::Release), ..Wire::under(Some(lease)) },
            Self::Upload { lease, request, bytes } => {
                let (request, bytes) = (sent(request), sent(bytes));
                Wire { action: sent(Action::Upload), request, bytes, ..Wire::under(Some(lease)) }
            }
            Self::Succeeded { result, lease } => {
                let (result, result_bytes) = match result {
                    WorkerResult::Value(result) => (result.clone(), None),
                    WorkerResult::Object { bytes } => (JsonText::null(), sent(bytes)),
                };
                Wire { result: Some(result), result_bytes, ..Wire::under(lease.as_ref()) }
            }
            Self::Failed { exception, cause, lease } => {
                let (exception, cause) = (sent(exception), cause.as_ref().and_then(sent));
                Wire { result: Some(JsonText::null()), exception, cause, ..Wire::under(lease.as_ref()) }
            }
        }
    }

    /// Reads what a worker said: the job's handle and the message. An answer that is no JSON, or too deep, is a failure of its
    /// job if the job's handle can be found in it. Fails with a sentence if nothing can be read.
    pub fn decode(payload: &[u8]) -> Result<(String, Self), DecodeError> {
        let wire: Wire = match limits::json("answer", payload) {
            Ok(wire) => wire,
            Err(error) => return failure_of(payload, &error).ok_or(error),
        };
        let Some(handle) = wire.task_token.clone() else {
            let why = exception_of(&wire).map_or_else(|| "no exception".to_owned(), |(exception, _)| exception);
            return Err(DecodeError::malformed("TaskToken", format!("it is null, so no job is known ({why})")));
        };
        if handle.is_empty() || handle.len() > MAX_HANDLE_BYTES {
            return Err(DecodeError::malformed("TaskToken", format!("expected 1 to {MAX_HANDLE_BYTES} bytes")));
        }
        Ok((handle, wire.message()?))
    }
}

impl Wire {
    /// A message under a lease; plain workers have none.
    fn under(lease: Option<&Lease>) -> Self {
        let (worker, fence) = lease.map(|lease| (&lease.worker, lease.fence)).unzip();
        Self { worker: worker.and_then(sent), fence: fence.and_then(sent), ..Self::default() }
    }

    fn message(self) -> Result<WorkerMessage, DecodeError> {
        let request = || required("request", self.request.as_ref());
        let lease = || {
            let worker = required("worker", self.worker.as_ref())?;
            Ok(Lease { worker, fence: required("fence", self.fence.as_ref())? })
        };
        // Plain workers have none, whatever their own fields say.
        let any_lease: Option<Lease> = lease().ok();
        match read(self.action.as_ref()) {
            Some(Action::Claim) => {
                let worker = required("worker", self.worker.as_ref())?;
                return Ok(WorkerMessage::Claim { worker, request: request()? });
            }
            Some(Action::Release) => return lease().map(WorkerMessage::Release),
            Some(Action::Upload) => {
                let (lease, request) = (lease()?, request()?);
                return Ok(WorkerMessage::Upload { lease, request, bytes: required("bytes", self.bytes.as_ref())? });
            }
            None => {}
        }
        if let Some((exception, cause)) = exception_of(&self) {
            return Ok(WorkerMessage::Failed { exception, cause, lease: any_lease });
        }
        if let Some(result) = self.result {
            let bytes = read(self.result_bytes.as_ref());
            let result = bytes.map_or(WorkerResult::Value(result), |bytes| WorkerResult::Object { bytes });
            return Ok(WorkerMessage::Succeeded { result, lease: any_lease });
        }
        if read(self.heartbeat.as_ref()) == Some(true) {
            let lease = any_lease.map(|lease| Ok((lease, request()?))).transpose()?;
            return Ok(WorkerMessage::Heartbeat { progress: progress(self.progress.as_ref()), lease });
        }
        Err(DecodeError::malformed("answer", "expected result, exception or heartbeat"))
    }
}

/// Name and cause of an exception, if there is one. Some workers write an object, or anything else: that is a failure as well.
fn exception_of(wire: &Wire) -> Option<(String, Option<String>)> {
    let exception = wire.exception.as_ref()?;
    let (name, whole) = match serde_json::from_str(exception.get()) {
        Ok(Value::String(name)) => (name, None),
        Ok(Value::Object(fields)) => {
            let name = NAMES_OF_EXCEPTIONS.iter().find_map(|name| fields.get(*name)?.as_str());
            (name.unwrap_or_default().to_owned(), Some(exception.get()))
        }
        _ => (String::new(), Some(exception.get())),
    };
    let cause = match &wire.cause {
        Some(cause) => Some(read(Some(cause)).unwrap_or_else(|| cause.to_string())),
        None => whole.map(str::to_owned),
    };
    Some((redacted(&name), cause.as_deref().map(redacted)))
}

/// A worker's progress, in percent: nobody needs it, so one that is none is left out.
fn progress(field: Option<&JsonText>) -> Option<u8> {
    let percent = read::<f64>(field).filter(|percent| (0.0..=100.0).contains(percent))?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Some(percent as u8)
}

/// The failure of a job whose answer is no JSON that can be read.
fn failure_of(payload: &[u8], why: &DecodeError) -> Option<(String, WorkerMessage)> {
    // An object that was read up to a field of the wrong kind is another matter: its handle is no text.
    let is_json = std::str::from_utf8(payload).is_ok()
        && serde_json::from_slice::<serde::de::IgnoredAny>(limits::trimmed(payload)).is_ok();
    if is_json && *why != DecodeError::TooDeep {
        return None;
    }
    let handle = handle_in(&String::from_utf8_lossy(payload))?;
    let cause = Some(format!("the worker's answer cannot be read: {why}"));
    Some((handle, WorkerMessage::Failed { exception: INVALID_ANSWER.to_owned(), cause, lease: None }))
}

/// The handle that follows `TaskToken` in a text, in whichever quotes; none if there are several.
fn handle_in(text: &str) -> Option<String> {
    let is_of_handle = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    let mut handles = text.split("TaskToken").skip(1).filter_map(|rest| {
        let rest = rest.trim_start_matches(['\\', '"', '\'']).trim_start().strip_prefix(':')?;
        let rest = rest.trim_start().trim_start_matches('\\').strip_prefix(['"', '\''])?;
        let handle = &rest[..rest.find(|c| !is_of_handle(c))?];
        (1..=MAX_HANDLE_BYTES).contains(&handle.len()).then_some(handle)
    });
    let handle = handles.next()?;
    handles.all(|other| other == handle).then(|| handle.to_owned())
}

/// Whether a payload is the answer of a worker that could not read its job: it has a token, and that is null. Plain workers know
/// no job then; its exception, if it has one.
pub fn answer_without_token(payload: &[u8]) -> Option<Option<String>> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "TaskToken", deserialize_with = "present")]
        task_token: Option<JsonText>,
        #[serde(default)]
        exception: Option<JsonText>,
    }
    let Answer { task_token, exception } = limits::json("answer", payload).ok()?;
    let exception = exception_of(&Wire { exception, ..Wire::default() }).map(|(name, _)| name);
    task_token.is_some_and(|token| token.is_null()).then_some(exception)
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

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<JsonText>, D::Error> {
    JsonText::deserialize(deserializer).map(Some)
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
        let mut job = JobMessage {
            input: json!({"a": 15, "b": 42}).into(),
            task_token: "t".into(),
            handler: None,
            input_bytes: None,
        };
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
            WorkerMessage::Succeeded { result: WorkerResult::Value(json!({"x": null}).into()), lease: Some(lease()) },
            WorkerMessage::Succeeded { result: WorkerResult::Value(JsonText::null()), lease: None },
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
        let result =
            |result: Value| WorkerMessage::Succeeded { result: WorkerResult::Value(result.into()), lease: None };
        assert_eq!(read(r#"{"result":57,"TaskToken":"t"}"#), Ok(result(json!(57))));
        assert_eq!(read(r#"{"result":null,"TaskToken":"t"}"#), Ok(result(Value::Null)));
        let failed = WorkerMessage::Failed { exception: "KeyError".into(), cause: None, lease: None };
        assert_eq!(read(r#"{"result":null,"TaskToken":"t","exception":"KeyError"}"#), Ok(failed));
        let heartbeat = WorkerMessage::Heartbeat { progress: Some(12), lease: None };
        assert_eq!(read(r#"{"TaskToken":"t","heartbeat":true,"progress":12.5}"#), Ok(heartbeat));
        // Nobody needs to know how far it is.
        for progress in ["101", "-1", r#""half""#, "null", "1e400"] {
            let text = format!(r#"{{"TaskToken":"t","heartbeat":true,"progress":{progress}}}"#);
            assert_eq!(read(&text), Ok(WorkerMessage::Heartbeat { progress: None, lease: None }), "{progress}");
        }
        for (bad, why) in [
            (r#"{"result":null,"TaskToken":null,"exception":"JSONDecodeError"}"#, "TaskToken: it is null"),
            (r#"{"result":1}"#, "TaskToken: it is null"),
            (r#"{"TaskToken":"","result":1}"#, "TaskToken: expected 1 to 512 bytes"),
            (r#"{"TaskToken":"t"}"#, "expected result, exception or heartbeat"),
            (r#"{"TaskToken":"t","heartbeat":"yes"}"#, "expected result, exception or heartbeat"),
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
    fn a_result_and_an_input_keep_every_digit_and_their_order() {
        for exact in [
            "117.63331139400017",
            "123456789012345678901234567890",
            r#"{"z":-9223372036854775809,"a":1.0,"b":[1e2,0.10]}"#,
        ] {
            let answer = format!(r#"{{"TaskToken":"t","result":{exact}}}"#);
            let (_, message) = WorkerMessage::decode(answer.as_bytes()).unwrap();
            assert_eq!(message.encode(&tenant(), "t").payload, answer.as_bytes());
            let job = format!(r#"{{"Input":{exact},"TaskToken":"t"}}"#);
            assert_eq!(JobMessage::decode(job.as_bytes()).unwrap().encode(&tenant()).payload, job.as_bytes());
        }
    }

    #[test]
    fn an_exception_of_whatever_kind_is_a_failure() {
        for (text, exception, cause) in [
            (r#"{"type":"KeyError","message":"b"}"#, "KeyError", Some(r#"{"type":"KeyError","message":"b"}"#)),
            (r#"{"code":12345678901234567890123}"#, "", Some(r#"{"code":12345678901234567890123}"#)),
            (r#"["KeyError"]"#, "", Some(r#"["KeyError"]"#)),
            ("7", "", Some("7")),
            (r#""KeyError","cause":{"at":1.0}"#, "KeyError", Some(r#"{"at":1.0}"#)),
            (
                r#""KeyError","cause":"b","worker":"my host","fence":"high","action":"add","bytes":-1"#,
                "KeyError",
                Some("b"),
            ),
        ] {
            let answer = format!(r#"{{"result":null,"TaskToken":"t","exception":{text}}}"#);
            let (exception, cause) = (exception.to_owned(), cause.map(str::to_owned));
            let failed = WorkerMessage::Failed { exception, cause, lease: None };
            assert_eq!(WorkerMessage::decode(answer.as_bytes()), Ok(("t".to_owned(), failed)), "{answer}");
        }
        let none = br#"{"result":1,"TaskToken":"t","exception":null}"#;
        assert!(matches!(WorkerMessage::decode(none), Ok((_, WorkerMessage::Succeeded { .. }))));
    }

    #[test]
    fn an_answer_that_is_no_json_fails_its_job_if_that_can_be_found() {
        let deep = format!(r#"{{"result":{}{},"TaskToken":"job-1.a0"}}"#, "[".repeat(65), "]".repeat(65));
        for answer in [
            r#"{"result": NaN, "TaskToken": "job-1.a0"}"#,
            r#"{"TaskToken":"job-1.a0","result":"cut of"#,
            "{'result': 57, 'TaskToken': 'job-1.a0'}",
            r#""{\"TaskToken\": \"job-1.a0\"}" }"#,
            r#"{"TaskToken":"job-1.a0","result":Infinity,"echo":{"TaskToken":"job-1.a0"}}"#,
            &deep,
        ] {
            let (handle, message) = WorkerMessage::decode(answer.as_bytes()).expect(answer);
            let WorkerMessage::Failed { exception, cause, lease: None } = message else { panic!("{answer}") };
            assert_eq!((handle.as_str(), exception.as_str()), ("job-1.a0", "InvalidAnswer"), "{answer}");
            assert!(cause.is_some_and(|cause| cause.starts_with("the worker's answer cannot be read: ")), "{answer}");
        }
        for answer in [
            "nothing",
            "{'result': 57, 'TaskToken': None}",
            r#"{"TaskToken": null, "result": NaN}"#,
            r#"{"TaskToken":"job-1.a0","result":NaN,"echo":{"TaskToken":"job-2.b1"}}"#,
            r#"{"TaskToken":"cut"#,
            r#"{"TaskToken":["job-1.a0"],"result":1}"#,
            r#"[{"TaskToken":"job-1.a0"}]"#,
        ] {
            assert!(WorkerMessage::decode(answer.as_bytes()).is_err(), "{answer}");
        }
    }

    #[test]
    fn who_answers_without_a_token_is_not_silent() {
        let read = |text: &str| answer_without_token(text.as_bytes());
        let exception = Some(Some("JSONDecodeError".to_owned()));
        assert_eq!(read(r#"{"result":null,"TaskToken":null,"exception":"JSONDecodeError"}"#), exception);
        assert_eq!(read(r#"{"TaskToken":null,"exception":{"type":"JSONDecodeError"}}"#), exception);
        assert_eq!(read(r#"{"TaskToken":null,"result":57}"#), Some(None));
        for other in [r#"{"TaskToken":"t","result":1}"#, r#"{"result":1}"#, "null", "nothing", r#"{"TaskToken":7}"#] {
            assert_eq!(read(other), None, "{other}");
        }
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
