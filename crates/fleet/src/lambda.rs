//! What every binary does with its handler: logs, decoding, error naming, partial batches.

use crate::queue::DeadLetters;
use crate::{Error, ErrorName};
use aws_lambda_events::event::sqs::SqsMessage;
pub use aws_lambda_events::event::sqs::{SqsBatchResponse, SqsEvent};
use futures_util::future::join_all;
use lambda_runtime::{Context, LambdaEvent, service_fn, tracing::init_default_subscriber};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use serde_json::value::RawValue;
use std::future::Future;
use std::time::{Duration, SystemTime};

/// The largest payload that one state or one person may send, in bytes. States pass on a quarter of that; escapes make it longer.
pub const MAX_INPUT_BYTES: usize = 1024 * 1024;
/// The largest batch of a queue or a stream, in bytes: what Lambda itself allows
/// (<https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html>).
pub const MAX_BATCH_BYTES: usize = 6 * 1024 * 1024;

/// How long a call may take where nobody says it.
const LONGEST_LOCAL_CALL: Duration = Duration::from_mins(1);
/// What a call needs, before the function's time limit ends it, to say what has become of its batch.
const ANSWER_NEEDS: Duration = Duration::from_secs(1);

/// What a function reaches, built once for the process. If that fails, the function answers every event with
/// [`ErrorName::Misconfigured`]. If it ended instead, its caller would only learn that it ended, and `cargo lambda invoke` would wait
/// for minutes.
pub async fn configured<T>(build: impl Future<Output = Result<T, String>>) -> Result<T, lambda_runtime::Error> {
    let why = match build.await {
        Ok(reached) => return Ok(reached),
        Err(why) => why,
    };
    init_default_subscriber();
    let refuse = |_: LambdaEvent<Box<RawValue>>| {
        logged(async { Err::<Value, _>(Error::new(ErrorName::Misconfigured, why.as_str())) })
    };
    lambda_runtime::run(service_fn(refuse)).await?;
    Err(why.into())
}

/// Serves a function that is invoked with one JSON payload. A payload that does not decode is `InvalidInput`.
pub async fn run<I, O, F>(handler: impl Fn(I) -> F) -> Result<(), lambda_runtime::Error>
where
    I: DeserializeOwned,
    O: Serialize,
    F: Future<Output = Result<O, Error>>,
{
    serve(MAX_INPUT_BYTES, |input, deadline| in_time(deadline, handler(input))).await
}

/// The same for a function that is invoked with a batch of a stream.
pub async fn run_stream<I, O, F>(handler: impl Fn(I) -> F) -> Result<(), lambda_runtime::Error>
where
    I: DeserializeOwned,
    O: Serialize,
    F: Future<Output = Result<O, Error>>,
{
    serve(MAX_BATCH_BYTES, |input, deadline| in_time(deadline, handler(input))).await
}

async fn serve<I, O, F>(max_bytes: usize, handler: impl Fn(I, SystemTime) -> F) -> Result<(), lambda_runtime::Error>
where
    I: DeserializeOwned,
    O: Serialize,
    F: Future<Output = Result<O, Error>>,
{
    init_default_subscriber();
    let handler = &handler;
    // As text: the runtime would parse whatever comes, and has no name of ours for what it cannot.
    lambda_runtime::run(service_fn(move |event: LambdaEvent<Box<RawValue>>| async move {
        let handling = async { handler(decode(event.payload.get(), max_bytes)?, deadline(&event.context)).await };
        // Boxed, for the compiler loses count of the calls below.
        Box::pin(logged(handling)).await
    }))
    .await
}

/// Logs the error of a call in the fields in which a queue message's is logged. The runtime logs it besides, as a text that no
/// metric filter can read.
pub async fn logged<T>(handling: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    handling.await.inspect_err(|error| {
        tracing::error!(outcome = "FAILED", error = error.name.as_str(), message = error.message);
    })
}

/// When the call is ended. `cargo lambda watch` names a time long past.
fn deadline(context: &Context) -> SystemTime {
    let now = SystemTime::now();
    if context.deadline() > now { context.deadline() } else { now + LONGEST_LOCAL_CALL }
}

/// Reads a payload, unless it is too large or too deep; the error says at which field it went wrong.
pub fn decode<I: DeserializeOwned>(payload: &str, max_bytes: usize) -> Result<I, Error> {
    if payload.len() > max_bytes {
        return Err(Error::invalid("payload", format!("{} bytes", payload.len()), &format!("at most {max_bytes}")));
    }
    let invalid = |why: String| Error::new(ErrorName::InvalidInput, format!("payload: {why}"));
    protocol::check_depth(payload.as_bytes()).map_err(|error| invalid(error.to_string()))?;
    protocol::check_object("payload", payload.as_bytes())
        .map_err(|error| Error::new(ErrorName::InvalidInput, error.to_string()))?;
    // From the text: what is only passed on stays as it is.
    let deserializer = &mut serde_json::Deserializer::from_str(payload);
    let input = serde_path_to_error::deserialize(&mut *deserializer).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { "payload".to_owned() } else { path };
        Error::new(ErrorName::InvalidInput, format!("{field}: {}", error.inner()))
    })?;
    deserializer.end().map_err(|error| invalid(error.to_string()))?;
    Ok(input)
}

/// Serves a function behind a queue, message by message. What may pass is tried again by the queue; what never
/// will goes to the dead-letter queue at once, with its reason.
pub async fn run_queue<F>(
    dead_letters: &DeadLetters,
    handler: impl Fn(String) -> F,
) -> Result<(), lambda_runtime::Error>
where
    F: Future<Output = Result<(), Error>>,
{
    let handler = &handler;
    run_batches(dead_letters, move |messages, deadline| one_by_one(handler, messages, deadline)).await
}

/// Handles the messages of a batch at the same time. One that hangs fails alone, and the queue delivers it again.
async fn one_by_one<F>(
    handler: &impl Fn(String) -> F,
    messages: Vec<QueuedMessage>,
    deadline: SystemTime,
) -> Vec<Result<(), Error>>
where
    F: Future<Output = Result<(), Error>>,
{
    join_all(messages.into_iter().map(|message| in_time(deadline, handler(message.body)))).await
}

/// Fails with a transient error shortly before the deadline: a function that is ended says nothing, and takes its batch along.
async fn in_time<T>(deadline: SystemTime, handling: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let left = deadline.duration_since(SystemTime::now()).unwrap_or_default().saturating_sub(ANSWER_NEEDS);
    tokio::time::timeout(left, handling).await.unwrap_or_else(|_| {
        let message = format!("not done {} s before the time limit: left to the next call", ANSWER_NEEDS.as_secs());
        Err(Error::new(ErrorName::ServiceUnavailable, message))
    })
}

/// A message of a queue.
#[derive(Debug, Clone)]
pub struct QueuedMessage {
    /// The queue's name for it, the same each time it is delivered.
    pub id: String,
    /// What it holds.
    pub body: String,
}

/// The same for a function that handles the messages of a batch together, and knows when it is ended; it says of each, in their
/// order, how it went.
pub async fn run_batches<F>(
    dead_letters: &DeadLetters,
    handler: impl Fn(Vec<QueuedMessage>, SystemTime) -> F,
) -> Result<(), lambda_runtime::Error>
where
    F: Future<Output = Vec<Result<(), Error>>>,
{
    let handler = &handler;
    serve(MAX_BATCH_BYTES, move |event, deadline| async move {
        Ok(batch(dead_letters, |messages| handler(messages, deadline), event).await)
    })
    .await
}

/// Handles a batch; names the messages that the queue shall deliver again.
pub async fn batch<F>(
    dead_letters: &DeadLetters,
    handler: impl Fn(Vec<QueuedMessage>) -> F,
    event: SqsEvent,
) -> SqsBatchResponse
where
    F: Future<Output = Vec<Result<(), Error>>>,
{
    let messages = event.records.iter().map(|record| QueuedMessage {
        id: record.message_id.clone().unwrap_or_default(),
        body: record.body.clone().unwrap_or_default(),
    });
    let outcomes = handler(messages.collect()).await;
    let records = event.records.into_iter();
    let settled = records.zip(outcomes).map(|(record, outcome)| settle(dead_letters, record, outcome));
    let mut response = SqsBatchResponse::default();
    response.set_failures(join_all(settled).await.into_iter().flatten());
    response
}

/// Sees to a message that went so; returns its id if the queue shall deliver it again.
async fn settle(dead_letters: &DeadLetters, message: SqsMessage, outcome: Result<(), Error>) -> Option<String> {
    let id = message.message_id.unwrap_or_default();
    let body = message.body.unwrap_or_default();
    let error = outcome.err()?;
    if error.name.is_transient() {
        tracing::warn!(outcome = "RETRY", error = error.name.as_str(), message = error.message, message_id = id);
        return Some(id);
    }
    tracing::error!(outcome = "DEAD_LETTERED", error = error.name.as_str(), message = error.message, message_id = id);
    match dead_letters.send(body, message.event_source_arn.as_deref(), &error).await {
        Ok(()) => None,
        Err(error) => {
            tracing::error!(error = error.name.as_str(), message = error.message, message_id = id);
            Some(id)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Input {
        #[serde(rename = "size")]
        _size: u32,
    }

    #[test]
    fn a_bad_payload_is_an_invalid_input_that_names_the_field() {
        let deep = "[".repeat(100);
        for (payload, message) in [
            (r#"{"size": -1}"#, "size: invalid value: integer `-1`, expected u32 at line 1 column 11"),
            (r#"{"size": 1} 2"#, "payload: trailing characters at line 1 column 13"),
            (r#"{"size": 1, "colour": 2}"#, "colour: unknown field `colour`, expected `size` at line 1 column 20"),
            ("{}", "payload: missing field `size` at line 1 column 2"),
            (r#"{"size": 1, "colour": "long"}"#, "payload: got 29 bytes, expected at most 25"),
            ("[1]", "payload: got an array, expected an object"),
            (&deep[..20], "payload: got an array, expected an object"),
        ] {
            let error = decode::<Input>(payload, 25).unwrap_err();
            assert_eq!((error.name, error.message.as_str()), (ErrorName::InvalidInput, message));
        }
        let error = decode::<Input>(&deep, 100).unwrap_err();
        assert!(error.name == ErrorName::InvalidInput && error.message.contains("nested deeper"), "{error}");
    }

    #[tokio::test]
    async fn a_message_that_hangs_takes_no_other_along() {
        let deadline = SystemTime::now() + ANSWER_NEEDS + Duration::from_millis(50);
        let message = |body: &str| QueuedMessage { id: body.to_owned(), body: body.to_owned() };
        let handler = async |body: String| if body == "hangs" { std::future::pending().await } else { Ok(()) };
        let results = one_by_one(&handler, vec![message("hangs"), message("is handled")], deadline).await;
        let names: Vec<_> = results.into_iter().map(|result| result.map_err(|error| error.name)).collect();
        assert_eq!(names, [Err(ErrorName::ServiceUnavailable), Ok(())]);
    }

    #[test]
    fn a_deadline_that_is_long_past_is_none() {
        let mut context = Context::default();
        assert!(deadline(&context) > SystemTime::now());
        context.deadline = u64::try_from(crate::aws::now_millis()).unwrap() + 5_000;
        assert_eq!(deadline(&context), context.deadline());
    }

    /// The runtime hands payloads over as the text that they are, whatever is in them.
    #[test]
    fn a_payload_comes_as_text() {
        let deserialize = |text: &str| {
            let deserializer = &mut serde_json::Deserializer::from_slice(text.as_bytes());
            serde_path_to_error::deserialize::<_, Box<RawValue>>(deserializer).map(|raw| raw.get().to_owned())
        };
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        for text in ["7", r#"{"a": [1, "\ud800"]}"#, "1e999", &deep] {
            assert_eq!(deserialize(text).unwrap(), text);
        }
    }
}
