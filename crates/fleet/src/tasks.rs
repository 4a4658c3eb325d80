//! States that wait with a task token, and how they are ended from outside.

use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use serde::Serialize;

/// Limits of `SendTaskFailure` (<https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskFailure.html>).
pub(crate) const MAX_CAUSE_CHARACTERS: usize = 32_768;

/// What became of a token or an answer. Every message has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Outcome {
    /// Kept until the other half comes.
    Waiting,
    /// It took effect: the task was completed, or is one answer closer to it.
    Applied,
    /// The same has been said before: no effect.
    Duplicate,
    /// Nobody waits any more: no effect.
    Late,
    /// It answers nothing that was asked: no effect.
    Rejected,
}

/// Step Functions, as those see it who end its tasks.
#[derive(Debug, Clone)]
pub struct Tasks {
    client: aws_sdk_sfn::Client,
}

impl Tasks {
    /// The tasks of this account.
    pub fn new(config: &aws_config::SdkConfig) -> Self {
        Self { client: aws_sdk_sfn::Client::new(config) }
    }

    /// The tasks behind a client of the test's own.
    #[cfg(test)]
    pub(crate) fn of(client: aws_sdk_sfn::Client) -> Self {
        Self { client }
    }

    /// Ends a task with its output or its failure: `Applied`, or `Late` if it has ended already.
    pub async fn complete(&self, token: &str, result: Result<impl Serialize, Error>) -> Result<Outcome, Error> {
        match result {
            Ok(output) => {
                let output = serde_json::to_string(&output).map_err(unbuilt)?;
                let sent = self.client.send_task_success().task_token(token).output(output).send().await;
                outcome("states:SendTaskSuccess", sent)
            }
            Err(failure) => self.fail(token, failure.name, &failure.message).await,
        }
    }

    /// Ends a task with a failure: `Applied`, or `Late` if it has ended already. A cause that is too long for Step Functions
    /// is cut.
    pub async fn fail(&self, token: &str, name: ErrorName, cause: &str) -> Result<Outcome, Error> {
        let cause: String = cause.chars().take(MAX_CAUSE_CHARACTERS).collect();
        let sent = self.client.send_task_failure().task_token(token).error(name.as_str()).cause(cause).send().await;
        outcome("states:SendTaskFailure", sent)
    }

    /// Begins a task's deadline anew: `Applied`, or `Late` if it has ended already.
    pub async fn prolong(&self, token: &str) -> Result<Outcome, Error> {
        outcome("states:SendTaskHeartbeat", self.client.send_task_heartbeat().task_token(token).send().await)
    }
}

/// Step Functions has three ways to say that the task has ended or never was.
fn outcome<T, E>(action: &str, sent: Result<T, aws_sdk_sfn::error::SdkError<E>>) -> Result<Outcome, Error>
where
    E: aws_sdk_sfn::error::ProvideErrorMetadata + std::error::Error + 'static,
{
    match sent {
        Ok(_) => Ok(Outcome::Applied),
        Err(error) => match code(&error) {
            Some("TaskTimedOut" | "TaskDoesNotExist" | "InvalidToken") => Ok(Outcome::Late),
            _ => Err(aws(action, &error)),
        },
    }
}
