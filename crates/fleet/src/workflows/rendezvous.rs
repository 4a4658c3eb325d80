//! Where a waiting state and a device's answer meet, in either order.
//!
//! One item a step, found by its full key: `{thing}#{operation}` and the step. [`Rendezvous::expect`] writes the
//! task token, [`Rendezvous::arrive`] the answer, each with one `UpdateItem` that returns the whole item; whoever
//! finds the other's half there completes the task. The first answer stays, so a repeat changes nothing, and a
//! crash between the write and the completion is mended by the repeat of either side.

use crate::aws::{now_seconds, text};
use crate::error::{aws, code};
use crate::tasks::{Outcome, Tasks};
use crate::{Error, ErrorName};
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use protocol::{OperationId, Step, ThingName};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Items go two weeks after they were last written: longer than the longest job (seven days, the limit of AWS IoT
/// Jobs' own timer) can wait for them.
const KEEP_SECONDS: i64 = 14 * 24 * 3600;

/// How many repeats of an answer may mend what an earlier delivery has left undone: several times as often as a queue delivers a
/// message, for a dead letter may come back. What comes more often is said by the device.
const MENDING_REPEATS: u32 = 500;

/// An operation of a thing: what all its steps' keys begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// The device.
    pub thing: ThingName,
    /// What it is doing.
    pub id: OperationId,
}

impl Operation {
    /// An operation of that thing.
    pub fn new(thing: &ThingName, id: &OperationId) -> Self {
        Self { thing: thing.clone(), id: id.clone() }
    }

    /// The partition key. Neither part can hold a `#`.
    pub fn key(&self) -> String {
        format!("{}#{}", self.thing, self.id)
    }
}

/// How a step ended, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Answer {
    /// Done; after a reboot with the version that the device now runs.
    Succeeded {
        /// As the device reported it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        firmware_version: Option<String>,
    },
    /// Failed.
    Failed {
        /// Which way.
        error: ErrorName,
        /// In detail.
        cause: String,
    },
}

/// A state's wait for a step.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wait {
    /// The waiting state's token.
    pub task_token: String,
    /// How often the state has been retried: a slow function of an earlier attempt must not replace the token of a
    /// later one.
    #[serde(deserialize_with = "protocol::whole")]
    pub attempt: u32,
    /// The version that the answer must report; any, if absent.
    #[serde(default)]
    pub expected_version: Option<String>,
}

/// A step's item. Either half may be there first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meeting {
    /// The waiting state's task token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_token: Option<String>,
    /// The attempt that the token belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// The version that the answer must report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_version: Option<String>,
    /// The first answer that came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answer>,
    /// How many answers came.
    #[serde(default)]
    pub arrivals: u32,
    /// The device cannot go on before the waiting state has done something again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
    /// Only of the reboot: a step before it has failed on the device, so what is told of a reboot is no news.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub download_failed: bool,
}

impl Meeting {
    /// What the `UpdateItem` of `expect` does to the item; `false` if its condition refuses.
    #[must_use]
    pub fn expect(&mut self, wait: &Wait) -> bool {
        if self.attempt.is_some_and(|attempt| attempt > wait.attempt) {
            return false;
        }
        self.task_token = Some(wait.task_token.clone());
        self.attempt = Some(wait.attempt);
        self.expected_version.clone_from(&wait.expected_version);
        true
    }

    /// What the `UpdateItem` of `arrive` does to the item: the first answer stays.
    pub fn arrive(&mut self, answer: &Answer) {
        self.answer.get_or_insert_with(|| answer.clone());
        self.arrivals += 1;
    }

    /// A version that the device has booted though the waiting state expects another one.
    fn stray_version(&self) -> Option<&str> {
        let Some(Answer::Succeeded { firmware_version }) = &self.answer else { return None };
        firmware_version.as_deref().filter(|version| self.expected_version.as_deref().is_some_and(|it| it != *version))
    }

    /// The task to complete and how, once both halves are there.
    pub fn completion(&self) -> Option<(&str, Result<Option<&str>, Error>)> {
        let token = self.task_token.as_deref()?;
        let result = match self.answer.as_ref()? {
            Answer::Failed { error, cause } => Err(Error::new(*error, cause)),
            Answer::Succeeded { firmware_version } => match (&self.expected_version, firmware_version) {
                (Some(expected), reported) if Some(expected) != reported.as_ref() => {
                    let reported = reported.as_deref().unwrap_or("no version");
                    let cause = format!("the device reports {reported}, the target is {expected}");
                    Err(Error::new(ErrorName::VersionMismatch, cause))
                }
                (_, reported) => Ok(reported.as_deref()),
            },
        };
        Some((token, result))
    }
}

/// What has become of an answer or of a wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// What it came to.
    pub outcome: Outcome,
    /// The item with it.
    meeting: Meeting,
}

impl Arrival {
    /// Whether the device has said that it cannot go on before the waiting state has done something again.
    pub fn is_interrupted(&self) -> bool {
        self.meeting.interrupted
    }

    /// Whether the version that a device reports with its reboot is for whoever hears it to record. It is not:
    /// - after the download has failed: a known agent still says that it has booted;
    /// - if the waiting state takes it as its target: the workflow records that after it has reported its success;
    /// - before a state waits for it, as long as it may still be taken: the wait decides, or [`Rendezvous::give_up`];
    /// - of an operation that there is not.
    pub fn is_news(&self, version: &str) -> bool {
        let Meeting { task_token, expected_version, answer, download_failed, .. } = &self.meeting;
        let is_early = task_token.is_none() && matches!(answer, Some(Answer::Succeeded { .. }));
        let is_taken = self.outcome == Outcome::Applied && expected_version.as_deref() == Some(version);
        !download_failed && !is_early && !is_taken && self.outcome != Outcome::Rejected
    }

    /// A version that the device has booted though the waiting state expects another one.
    pub fn stray_version(&self) -> Option<&str> {
        self.meeting.stray_version()
    }
}

/// The table of meetings and the tasks that they complete.
#[derive(Debug, Clone)]
pub struct Rendezvous {
    table: String,
    dynamodb: aws_sdk_dynamodb::Client,
    tasks: Tasks,
}

impl Rendezvous {
    /// Meets in that table.
    pub fn new(config: &aws_config::SdkConfig, table: String) -> Self {
        Self { table, dynamodb: aws_sdk_dynamodb::Client::new(config), tasks: Tasks::new(config) }
    }

    /// A state waits for the step. If the answer is there already, the task ends at once.
    pub async fn expect(&self, operation: &Operation, step: Step, wait: &Wait) -> Result<Arrival, Error> {
        let mut values = HashMap::from([
            (":token".to_owned(), text(&wait.task_token)),
            (":attempt".to_owned(), AttributeValue::N(wait.attempt.to_string())),
        ]);
        let update = match &wait.expected_version {
            Some(version) => {
                values.insert(":version".to_owned(), text(version));
                "SET taskToken = :token, attempt = :attempt, expiresAt = :expiresAt, expectedVersion = :version"
            }
            None => "SET taskToken = :token, attempt = :attempt, expiresAt = :expiresAt REMOVE expectedVersion",
        };
        let condition = Some("attribute_not_exists(attempt) OR attempt <= :attempt");
        let Some(meeting) = self.update(operation, step, update, condition, values).await? else {
            return Ok(Arrival { outcome: Outcome::Late, meeting: Meeting::default() });
        };
        let outcome = self.complete(operation, step, &meeting).await?.unwrap_or(Outcome::Waiting);
        Ok(Arrival { outcome, meeting })
    }

    /// A device says that a step has ended. If a state waits for it, its task ends. `Rejected` if there is no such operation: it has
    /// a first item before its command is sent, and nothing is kept of what was never asked.
    pub async fn answer(&self, operation: &Operation, step: Step, answer: &Answer) -> Result<Arrival, Error> {
        let (update, values) = arriving(answer)?;
        match self.update_known(operation, step, update, values).await? {
            Some(meeting) => self.arrived(operation, step, meeting).await,
            None => Ok(Arrival { outcome: Outcome::Rejected, meeting: Meeting::default() }),
        }
    }

    /// The cloud says that a step has ended, even if its operation has not begun.
    pub async fn arrive(&self, operation: &Operation, step: Step, answer: &Answer) -> Result<Arrival, Error> {
        let (update, values) = arriving(answer)?;
        let meeting = self.update(operation, step, update, None, values).await?.unwrap_or_default();
        self.arrived(operation, step, meeting).await
    }

    async fn arrived(&self, operation: &Operation, step: Step, meeting: Meeting) -> Result<Arrival, Error> {
        if meeting.arrivals > MENDING_REPEATS {
            return Ok(Arrival { outcome: Outcome::Duplicate, meeting });
        }
        let outcome = self.complete(operation, step, &meeting).await?.unwrap_or(Outcome::Waiting);
        let repeated = outcome != Outcome::Applied && meeting.arrivals > 1;
        Ok(Arrival { outcome: if repeated { Outcome::Duplicate } else { outcome }, meeting })
    }

    /// A step has failed, and the operation with it: whichever step is waited for, now or later, fails as well. Unless
    /// the step has another answer already, which stands.
    pub async fn fail_step(&self, operation: &Operation, step: Step, error: &Error) -> Result<Arrival, Error> {
        let answer = Answer::Failed { error: error.name, cause: error.message.clone() };
        let arrival = self.answer(operation, step, &answer).await?;
        if arrival.outcome == Outcome::Rejected || arrival.meeting.arrivals > MENDING_REPEATS {
            return Ok(arrival);
        }
        if step != Step::DeviceRebooted && !matches!(arrival.meeting.answer, Some(Answer::Succeeded { .. })) {
            let values = HashMap::from([(":true".to_owned(), AttributeValue::Bool(true))]);
            let update = "SET downloadFailed = :true, expiresAt = :expiresAt";
            self.update(operation, Step::DeviceRebooted, update, None, values).await?;
        }
        // Also if it is a repeat: an earlier delivery may have died before it came so far.
        if arrival.meeting.answer.as_ref() == Some(&answer) {
            self.fail(operation, error).await?;
        }
        Ok(arrival)
    }

    /// The workflow no longer waits for the device's reboot: what it reports from now on is late. Returns the version that it
    /// has reported too early to be taken.
    pub async fn give_up(&self, operation: &Operation) -> Result<Option<String>, Error> {
        let cause = "the workflow has given the operation up".to_owned();
        let answer = Answer::Failed { error: ErrorName::DeviceTimedOut, cause };
        let meeting = self.arrive(operation, Step::DeviceRebooted, &answer).await?.meeting;
        Ok(match meeting.answer {
            Some(Answer::Succeeded { firmware_version }) if !meeting.download_failed => firmware_version,
            _ => None,
        })
    }

    /// Ends the whole operation: every step that has no answer yet fails with this error.
    pub async fn fail(&self, operation: &Operation, error: &Error) -> Result<(), Error> {
        let answer = Answer::Failed { error: error.name, cause: error.message.clone() };
        for step in Step::ALL {
            self.arrive(operation, step, &answer).await?;
        }
        Ok(())
    }

    /// The device is still at it: the waiting state's deadline begins anew.
    pub async fn progress(&self, operation: &Operation, step: Step) -> Result<Outcome, Error> {
        let meeting = self.meeting(operation, step).await?;
        // A report of progress keeps nothing alive that nobody has begun to wait for, and is no half of a meeting.
        let Some(token) = meeting.task_token else { return Ok(Outcome::Late) };
        self.tasks.prolong(&token).await
    }

    /// The device cannot go on before the waiting state has done something again: its attempt fails with an error that is tried
    /// again, and the next one finds the note. That is no answer of the step, which is still open. A state that does not wait yet
    /// finds the note as well.
    pub async fn interrupt(&self, operation: &Operation, step: Step, error: &Error) -> Result<Outcome, Error> {
        let values = HashMap::from([(":true".to_owned(), AttributeValue::Bool(true))]);
        let update = "SET interrupted = :true, expiresAt = :expiresAt";
        let Some(meeting) = self.update_known(operation, step, update, values).await? else {
            return Ok(Outcome::Rejected);
        };
        match meeting.task_token {
            _ if meeting.answer.is_some() => Ok(Outcome::Late),
            Some(token) => self.tasks.fail(&token, error.name, &error.message).await,
            None => Ok(Outcome::Waiting),
        }
    }

    async fn meeting(&self, operation: &Operation, step: Step) -> Result<Meeting, Error> {
        let get = self.dynamodb.get_item().table_name(&self.table).set_key(Some(key(operation, step)));
        let got = get.consistent_read(true).send().await.map_err(|error| aws("dynamodb:GetItem", &error))?;
        let Some(item) = got.item else { return Ok(Meeting::default()) };
        serde_dynamo::from_item(item).map_err(|error| broken_item(&error))
    }

    /// Writes the item of an operation that has begun; `None` if there is none. As a rule the step has an item already; only for what
    /// comes before its wait the operation is looked up.
    async fn update_known(
        &self,
        operation: &Operation,
        step: Step,
        expression: &str,
        values: HashMap<String, AttributeValue>,
    ) -> Result<Option<Meeting>, Error> {
        let is_there = Some("attribute_exists(operation)");
        let written = self.update(operation, step, expression, is_there, values.clone()).await?;
        if written.is_some() || !self.has_begun(operation).await? {
            return Ok(written);
        }
        self.update(operation, step, expression, None, values).await
    }

    /// Whether there is such an operation: before a command is sent, its first step has an item.
    pub async fn has_begun(&self, operation: &Operation) -> Result<bool, Error> {
        Ok(self.meeting(operation, Step::DownloadStarted).await? != Meeting::default())
    }

    /// Writes the item and returns it whole; `None` if the condition refuses.
    async fn update(
        &self,
        operation: &Operation,
        step: Step,
        expression: &str,
        condition: Option<&str>,
        mut values: HashMap<String, AttributeValue>,
    ) -> Result<Option<Meeting>, Error> {
        values.insert(":expiresAt".to_owned(), AttributeValue::N((now_seconds() + KEEP_SECONDS).to_string()));
        let written = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(operation, step)))
            .update_expression(expression)
            .set_condition_expression(condition.map(str::to_owned))
            .set_expression_attribute_values(Some(values))
            .return_values(ReturnValue::AllNew)
            .send()
            .await;
        match written {
            Ok(output) => serde_dynamo::from_item(output.attributes.unwrap_or_default())
                .map(Some)
                .map_err(|error| broken_item(&error)),
            Err(error) if code(&error) == Some("ConditionalCheckFailedException") => Ok(None),
            Err(error) => Err(aws("dynamodb:UpdateItem", &error)),
        }
    }

    /// Completes the waiting task if both halves are there; `None` if one is missing.
    async fn complete(&self, operation: &Operation, step: Step, meeting: &Meeting) -> Result<Option<Outcome>, Error> {
        let Some((token, result)) = meeting.completion() else { return Ok(None) };
        let output = result.map(|firmware_version| {
            serde_json::json!({
                "thingName": operation.thing, "operationId": operation.id, "step": step,
                "firmwareVersion": firmware_version,
            })
        });
        self.tasks.complete(token, output).await.map(Some)
    }
}

/// How the first answer stays, and the others are counted.
fn arriving(answer: &Answer) -> Result<(&'static str, HashMap<String, AttributeValue>), Error> {
    let value = serde_dynamo::to_attribute_value(answer).map_err(|error| broken_item(&error))?;
    let values = HashMap::from([(":answer".to_owned(), value), (":one".to_owned(), AttributeValue::N("1".to_owned()))]);
    Ok(("SET answer = if_not_exists(answer, :answer), expiresAt = :expiresAt ADD arrivals :one", values))
}

fn key(operation: &Operation, step: Step) -> HashMap<String, AttributeValue> {
    HashMap::from([("operation".to_owned(), text(operation.key())), ("step".to_owned(), text(step.name()))])
}

fn broken_item(error: &serde_dynamo::Error) -> Error {
    Error::new(ErrorName::ServiceError, format!("an item of the rendezvous table: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "1.0.0";
    const TARGET: &str = "2.0.0";

    fn wait() -> Wait {
        Wait { task_token: "t".to_owned(), attempt: 0, expected_version: Some(TARGET.to_owned()) }
    }

    fn booted(version: &str) -> Answer {
        Answer::Succeeded { firmware_version: Some(version.to_owned()) }
    }

    fn failed(error: ErrorName) -> Answer {
        Answer::Failed { error, cause: String::new() }
    }

    /// What a device says of its version, and whether it is news, by what has happened to the item before.
    #[test]
    fn a_version_is_news_unless_the_workflow_takes_it_or_the_download_failed() {
        use Outcome::{Applied, Duplicate, Late, Waiting};
        let (mut waiting, mut early, mut cancelled) = (Meeting::default(), Meeting::default(), Meeting::default());
        assert!(waiting.expect(&wait()));
        early.arrive(&booted(TARGET));
        cancelled.arrive(&failed(ErrorName::JobCanceled));
        let contradictory = Meeting { download_failed: true, ..early.clone() };
        for (item, outcome, version, is_news) in [
            (&waiting, Applied, TARGET, false),
            (&waiting, Applied, OLD, true),
            (&waiting, Late, TARGET, true),
            (&waiting, Duplicate, TARGET, true),
            (&early, Waiting, TARGET, false),
            (&early, Duplicate, TARGET, false),
            (&cancelled, Duplicate, TARGET, true),
            (&contradictory, Waiting, "404", false),
            (&Meeting { download_failed: true, ..cancelled.clone() }, Duplicate, "404", false),
            (&Meeting { download_failed: true, ..waiting.clone() }, Duplicate, OLD, false),
            (&Meeting::default(), Outcome::Rejected, TARGET, false),
        ] {
            let arrival = Arrival { outcome, meeting: item.clone() };
            assert_eq!(arrival.is_news(version), is_news, "{item:?} {outcome:?} {version}");
        }
    }

    #[test]
    fn a_wait_that_finds_another_version_says_which() {
        for (answer, stray) in
            [(booted(OLD), Some(OLD)), (booted(TARGET), None), (failed(ErrorName::ActivationFailed), None)]
        {
            let mut meeting = Meeting::default();
            meeting.arrive(&answer);
            assert!(meeting.expect(&wait()));
            assert_eq!(meeting.stray_version(), stray, "{answer:?}");
        }
    }
}
