//! What every binary does with its handler: logs, decoding, error naming, partial batches.

use crate::queue::DeadLetters;
use crate::{Error, ErrorName};
use aws_lambda_events::event::sqs::{SqsBatchResponse, SqsEvent, SqsMessage};
use futures_util::future::join_all;
use lambda_runtime::{Diagnostic, LambdaEvent, service_fn, tracing::init_default_subscriber};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::future::Future;

/// Serves a function that is invoked with one JSON payload. A payload that does not decode is `InvalidInput`.
pub async fn run<I, O, F>(handler: impl Fn(I) -> F) -> Result<(), lambda_runtime::Error>
where
    I: DeserializeOwned,
    O: Serialize,
    F: Future<Output = Result<O, Error>>,
{
    init_default_subscriber();
    let handler = &handler;
    lambda_runtime::run(service_fn(move |event: LambdaEvent<Value>| async move {
        let input = decode(event.payload).map_err(logged)?;
        handler(input).await.map_err(logged)
    }))
    .await
}

/// Reads a payload; the error says at which field it went wrong.
fn decode<I: DeserializeOwned>(payload: Value) -> Result<I, Error> {
    serde_path_to_error::deserialize(payload).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { "payload".to_owned() } else { path };
        Error::new(ErrorName::InvalidInput, format!("{field}: {}", error.inner()))
    })
}

fn logged(error: Error) -> Diagnostic {
    tracing::error!(error = error.name.as_str(), message = error.message);
    error.into()
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
    run_batches(dead_letters, move |messages| async move {
        join_all(messages.iter().map(|message| handler(message.body.clone()))).await
    })
    .await
}

/// A message of a queue.
#[derive(Debug, Clone)]
pub struct QueuedMessage {
    /// The queue's name for it, the same each time it is delivered.
    pub id: String,
    /// What it holds.
    pub body: String,
}

/// The same for a function that handles the messages of a batch together; it says of each, in their order, how it went.
pub async fn run_batches<F>(
    dead_letters: &DeadLetters,
    handler: impl Fn(Vec<QueuedMessage>) -> F,
) -> Result<(), lambda_runtime::Error>
where
    F: Future<Output = Vec<Result<(), Error>>>,
{
    init_default_subscriber();
    let handler = &handler;
    lambda_runtime::run(service_fn(move |event: LambdaEvent<SqsEvent>| async move {
        let records = event.payload.records;
        let messages = records.iter().map(|record| QueuedMessage {
            id: record.message_id.clone().unwrap_or_default(),
            body: record.body.clone().unwrap_or_default(),
        });
        let outcomes = handler(messages.collect()).await;
        let settled = records.into_iter().zip(outcomes).map(|(record, outcome)| settle(dead_letters, record, outcome));
        let mut response = SqsBatchResponse::default();
        response.set_failures(join_all(settled).await.into_iter().flatten());
        Ok::<_, Diagnostic>(response)
    }))
    .await
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
        for (payload, message) in [
            (serde_json::json!({"size": -1}), "size: invalid value: integer `-1`, expected u32"),
            (serde_json::json!({"size": 1, "colour": 2}), "colour: unknown field `colour`, expected `size`"),
            (serde_json::json!({}), "payload: missing field `size`"),
        ] {
            let error = decode::<Input>(payload).unwrap_err();
            assert_eq!((error.name, error.message.as_str()), (ErrorName::InvalidInput, message));
        }
    }
}
