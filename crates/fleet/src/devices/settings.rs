//! What settings a device has confirmed, and the push that is under way: one item a thing.
//!
//! [`SettingsTable::claim`], [`SettingsTable::begin`] and [`SettingsTable::answer`] are one conditional write each. A
//! thing belongs to its newest session, and has one push at a time. What has been confirmed is forgotten when it is sent
//! anew, so that a device whose answer was lost is never taken for one that has the old value.

use crate::aws::{now_seconds, text};
use crate::error::aws;
use crate::tasks::{Outcome, Tasks};
use crate::workflows::rendezvous::Wait;
use crate::{Error, ErrorName};
use aws_sdk_dynamodb::operation::update_item::{UpdateItemError, builders::UpdateItemFluentBuilder};
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue, ReturnValuesOnConditionCheckFailure};
use protocol::settings::{SettingOutcome, SettingResponse, Settings};
use protocol::{OperationId, SettingName, ThingName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Items go a year after the last push; a device that comes back later gets its settings again.
const KEEP_SECONDS: i64 = 365 * 24 * 3600;
/// What the attribute of a confirmed setting begins with.
const CONFIRMED: &str = "confirmed:";

type Item = HashMap<String, AttributeValue>;

/// A push of settings to a device: the wait of one state for the answers to several commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Push {
    /// What each setting's operation id begins with.
    pub operation_id: OperationId,
    /// When the session began, in Unix milliseconds: orders the pushes of a thing.
    pub connected_at: i64,
    /// The waiting state's token.
    pub task_token: String,
    /// How often the state has been retried.
    pub attempt: u32,
    /// What the device shall have.
    pub wanted: Settings,
    /// The first answer to each setting.
    pub answers: BTreeMap<SettingName, SettingOutcome>,
}

impl Push {
    /// A push that nothing has been heard of yet.
    pub fn new(operation_id: OperationId, connected_at: i64, wait: Wait, wanted: Settings) -> Self {
        let Wait { task_token, attempt, .. } = wait;
        Self { operation_id, connected_at, task_token, attempt, wanted, answers: BTreeMap::new() }
    }

    /// The settings that have no answer yet.
    fn unanswered(&self) -> Settings {
        let missing = self.wanted.iter().filter(|(name, _)| !self.answers.contains_key(*name));
        missing.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// How the push has ended; `None` as long as an answer is missing.
    fn result(&self) -> Option<Result<(), Error>> {
        if !self.unanswered().is_empty() {
            return None;
        }
        let reports: Vec<(bool, String)> = self.wanted.keys().map(|name| self.report(name)).collect();
        if reports.iter().all(|(confirmed, _)| *confirmed) {
            return Some(Ok(()));
        }
        let sentences: Vec<String> = reports.into_iter().map(|(_, sentence)| sentence).collect();
        Some(Err(Error::new(ErrorName::SettingFailed, sentences.join("; "))))
    }

    fn output(&self, thing: &ThingName) -> serde_json::Value {
        serde_json::json!({"thingName": thing, "operationId": self.operation_id, "settings": self.wanted})
    }

    /// Whether the device has the setting as it was wanted, and a sentence about it.
    fn report(&self, name: &SettingName) -> (bool, String) {
        match (self.wanted.get(name), self.answers.get(name)) {
            (Some(wanted), Some(SettingOutcome::Success { value: Some(value) })) if !value.is_same(wanted) => {
                (false, format!("{name}: the device has set {value}, {wanted} was wanted"))
            }
            (Some(wanted), Some(SettingOutcome::Success { .. })) => (true, format!("{name}: confirmed as {wanted}")),
            (_, Some(SettingOutcome::Fail { error })) => {
                (false, format!("{name}: the device failed with error {error}"))
            }
            _ => (false, format!("{name}: no answer")),
        }
    }
}

/// The table of settings.
#[derive(Debug, Clone)]
pub struct SettingsTable {
    table: String,
    dynamodb: aws_sdk_dynamodb::Client,
    tasks: Tasks,
}

impl SettingsTable {
    /// The table that `SETTINGS_TABLE` names.
    pub fn from_environment(config: &aws_config::SdkConfig) -> Result<Self, String> {
        Ok(Self::new(config, crate::config::required("SETTINGS_TABLE")?))
    }

    /// Keeps settings in that table.
    pub fn new(config: &aws_config::SdkConfig, table: String) -> Self {
        Self { table, dynamodb: aws_sdk_dynamodb::Client::new(config), tasks: Tasks::new(config) }
    }

    /// The table behind a client of the test's own.
    #[cfg(test)]
    pub(crate) fn of(dynamodb: aws_sdk_dynamodb::Client, table: String) -> Self {
        let config = aws_config::SdkConfig::builder().behavior_version(aws_config::BehaviorVersion::latest()).build();
        Self { table, dynamodb, tasks: Tasks::new(&config) }
    }

    /// The session that began at this time (Unix milliseconds) takes charge of the thing: what the device has confirmed
    /// last, setting by setting. Fails as `SessionSuperseded` if a newer session has done so.
    pub async fn claim(&self, thing: &ThingName, connected_at: i64) -> Result<Settings, Error> {
        let update = self
            .update(thing)
            .update_expression("SET newestSession = :session, expiresAt = :expiresAt")
            .condition_expression("attribute_not_exists(newestSession) OR newestSession <= :session")
            .expression_attribute_values(":session", AttributeValue::N(connected_at.to_string()))
            .return_values(ReturnValue::AllNew);
        match written(update).await? {
            Written::Yes(item) => Ok(confirmed(item)),
            Written::No(_) => Err(superseded()),
        }
    }

    /// A state waits for a push's answers: what is to be sent. Nothing, if the answers are there already, or if a later
    /// attempt of the state is. Another session's push that is still waiting ends. Fails as `SessionSuperseded` if there
    /// is a newer session.
    pub async fn begin(&self, thing: &ThingName, push: &Push) -> Result<Settings, Error> {
        match self.replace(thing, push).await? {
            Written::Yes(old) => {
                if let Some(old) = open_push(&old)? {
                    // All its answers may be there, if the function died that was to say so.
                    let result = old.result().unwrap_or_else(|| Err(superseded()));
                    self.tasks.complete(&old.task_token, result.map(|()| old.output(thing))).await?;
                }
                Ok(push.wanted.clone())
            }
            Written::No(item) => match open_push(&item)? {
                Some(found) if found.operation_id == push.operation_id => self.wait_again(thing, push).await,
                _ => Err(superseded()),
            },
        }
    }

    /// Makes this the thing's push, unless it is that already or there is a newer session.
    async fn replace(&self, thing: &ThingName, push: &Push) -> Result<Written, Error> {
        let sent: Vec<String> = (0..push.wanted.len()).map(|index| format!("#sent{index}")).collect();
        let mut update = self
            .update(thing)
            .expression_attribute_names("#push", "push")
            .update_expression(format!(
                "SET #push = :push, newestSession = :session, expiresAt = :expiresAt REMOVE {}",
                sent.join(", ")
            ))
            .condition_expression(
                "(attribute_not_exists(newestSession) OR newestSession <= :session) \
                 AND (attribute_not_exists(#push) OR #push.operationId <> :operation)",
            )
            .expression_attribute_values(":push", serde_dynamo::to_attribute_value(push).map_err(|e| broken(&e))?)
            .expression_attribute_values(":operation", text(push.operation_id.as_str()))
            .expression_attribute_values(":session", AttributeValue::N(push.connected_at.to_string()))
            .return_values(ReturnValue::AllOld);
        for (placeholder, name) in sent.iter().zip(push.wanted.keys()) {
            update = update.expression_attribute_names(placeholder, format!("{CONFIRMED}{name}"));
        }
        written(update).await
    }

    /// The state has been retried: its new token takes the old one's place, what has been answered stays.
    async fn wait_again(&self, thing: &ThingName, push: &Push) -> Result<Settings, Error> {
        let update = self
            .update(thing)
            .expression_attribute_names("#push", "push")
            .update_expression("SET #push.taskToken = :token, #push.attempt = :attempt, expiresAt = :expiresAt")
            .condition_expression(
                "#push.operationId = :operation AND #push.attempt <= :attempt AND newestSession <= :session",
            )
            .expression_attribute_values(":token", text(&push.task_token))
            .expression_attribute_values(":attempt", AttributeValue::N(push.attempt.to_string()))
            .expression_attribute_values(":operation", text(push.operation_id.as_str()))
            .expression_attribute_values(":session", AttributeValue::N(push.connected_at.to_string()))
            .return_values(ReturnValue::AllNew);
        let later_attempt = |found: &Push| found.operation_id == push.operation_id && found.attempt > push.attempt;
        match written(update).await? {
            Written::No(item) if open_push(&item)?.as_ref().is_some_and(later_attempt) => Ok(Settings::new()),
            Written::No(_) => Err(superseded()),
            Written::Yes(item) => {
                let push = open_push(&item)?.unwrap_or_else(|| push.clone());
                self.complete(thing, &push).await?;
                Ok(push.unanswered())
            }
        }
    }

    /// A device has answered a command of its push. What it says it has set is kept as confirmed.
    pub async fn answer(&self, thing: &ThingName, response: &SettingResponse) -> Result<Outcome, Error> {
        let Some(operation_id) = response.push() else { return Ok(Outcome::Rejected) };
        let answer = serde_dynamo::to_attribute_value(&response.outcome).map_err(|error| broken(&error))?;
        let confirm = match &response.outcome {
            SettingOutcome::Success { value: Some(_) } => ", #confirmed = :value",
            SettingOutcome::Success { value: None } => ", #confirmed = #push.wanted.#name",
            SettingOutcome::Fail { .. } => "",
        };
        let mut update = self
            .update(thing)
            .expression_attribute_names("#push", "push")
            .update_expression(format!("SET #push.answers.#name = :answer, expiresAt = :expiresAt{confirm}"))
            .condition_expression(
                "#push.operationId = :operation AND attribute_exists(#push.wanted.#name) \
                 AND attribute_not_exists(#push.answers.#name)",
            )
            .expression_attribute_names("#name", response.name.as_str())
            .expression_attribute_values(":operation", text(operation_id.as_str()))
            .expression_attribute_values(":answer", answer)
            .return_values(ReturnValue::AllNew);
        if !confirm.is_empty() {
            update = update.expression_attribute_names("#confirmed", format!("{CONFIRMED}{}", response.name));
        }
        if let SettingOutcome::Success { value: Some(value) } = &response.outcome {
            let value = serde_dynamo::to_attribute_value(value).map_err(|error| broken(&error))?;
            update = update.expression_attribute_values(":value", value);
        }
        match written(update).await? {
            Written::Yes(item) => match open_push(&item)? {
                Some(push) => self.complete(thing, &push).await,
                None => Ok(Outcome::Late),
            },
            Written::No(item) => match open_push(&item)?.filter(|push| push.operation_id == operation_id) {
                None => self.doubt(thing, response).await,
                Some(push) if !push.answers.contains_key(&response.name) => Ok(Outcome::Rejected),
                // An earlier delivery may have died before it could end the task.
                Some(push) => match self.complete(thing, &push).await? {
                    Outcome::Applied if push.result().is_some() => Ok(Outcome::Applied),
                    _ => Ok(Outcome::Duplicate),
                },
            },
        }
    }

    /// A device has carried out a command that is not of its last push, perhaps after those: nobody knows what it has now,
    /// so the next session sends that setting again.
    async fn doubt(&self, thing: &ThingName, response: &SettingResponse) -> Result<Outcome, Error> {
        let SettingOutcome::Success { value } = &response.outcome else { return Ok(Outcome::Late) };
        let value = serde_dynamo::to_attribute_value(value).map_err(|error| broken(&error))?;
        let update = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .key("thing", text(thing.as_str()))
            .update_expression("REMOVE #confirmed")
            .condition_expression("attribute_exists(#confirmed) AND #confirmed <> :value")
            .expression_attribute_names("#confirmed", format!("{CONFIRMED}{}", response.name))
            .expression_attribute_values(":value", value);
        written(update).await.map(|_| Outcome::Late)
    }

    /// Ends the waiting state if all answers are there.
    async fn complete(&self, thing: &ThingName, push: &Push) -> Result<Outcome, Error> {
        let Some(result) = push.result() else { return Ok(Outcome::Applied) };
        self.tasks.complete(&push.task_token, result.map(|()| push.output(thing))).await
    }

    fn update(&self, thing: &ThingName) -> UpdateItemFluentBuilder {
        self.dynamodb
            .update_item()
            .table_name(&self.table)
            .key("thing", text(thing.as_str()))
            .expression_attribute_values(":expiresAt", AttributeValue::N((now_seconds() + KEEP_SECONDS).to_string()))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
    }
}

/// Whether a condition held, with the item that the write returned or that the condition was held against.
enum Written {
    Yes(Item),
    No(Item),
}

async fn written(update: UpdateItemFluentBuilder) -> Result<Written, Error> {
    let error = match update.send().await {
        Ok(output) => return Ok(Written::Yes(output.attributes.unwrap_or_default())),
        Err(error) => error,
    };
    match error.as_service_error() {
        Some(UpdateItemError::ConditionalCheckFailedException(failed)) => {
            Ok(Written::No(failed.item().cloned().unwrap_or_default()))
        }
        _ => Err(aws("dynamodb:UpdateItem", &error)),
    }
}

/// What an item says is confirmed.
fn confirmed(item: Item) -> Settings {
    let confirmed = item.into_iter().filter_map(|(attribute, value)| {
        let name = attribute.strip_prefix(CONFIRMED)?.parse().ok()?;
        Some((name, serde_dynamo::from_attribute_value(value).ok()?))
    });
    confirmed.collect()
}

fn open_push(item: &Item) -> Result<Option<Push>, Error> {
    let Some(push) = item.get("push") else { return Ok(None) };
    serde_dynamo::from_attribute_value(push.clone()).map(Some).map_err(|error| broken(&error))
}

fn superseded() -> Error {
    Error::new(ErrorName::SessionSuperseded, "the device has come online anew, and gets its settings in that session")
}

fn broken(error: &serde_dynamo::Error) -> Error {
    Error::new(ErrorName::ServiceError, format!("an item of the settings table: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::settings::SettingValue;

    fn push(answers: &[(&str, SettingOutcome)]) -> Push {
        let wanted = [("SET_MODE", "AUTO".to_owned()), ("SET_ROOM", "kitchen".to_owned())];
        let wanted = wanted.map(|(name, value)| (name.parse().unwrap(), SettingValue::Text(value)));
        let wait = Wait { task_token: "token".into(), attempt: 0, expected_version: None };
        let mut push = Push::new("push-1".parse().unwrap(), 1, wait, wanted.into());
        push.answers = answers.iter().map(|(name, outcome)| (name.parse().unwrap(), outcome.clone())).collect();
        push
    }

    #[test]
    fn a_push_ends_when_every_setting_is_answered_and_tells_of_each() {
        let done = || SettingOutcome::Success { value: None };
        let other = || SettingOutcome::Success { value: Some(SettingValue::Text("ECO".into())) };
        let failed = || SettingOutcome::Fail { error: "17".into() };
        assert_eq!(push(&[]).result(), None);
        assert_eq!(push(&[("SET_MODE", failed())]).result(), None);
        assert_eq!(push(&[("SET_MODE", done()), ("SET_ROOM", done())]).result(), Some(Ok(())));
        let cause = |answers: &[_]| push(answers).result().unwrap().unwrap_err().to_string();
        assert_eq!(
            cause(&[("SET_MODE", other()), ("SET_ROOM", done())]),
            "SettingFailed: SET_MODE: the device has set ECO, AUTO was wanted; SET_ROOM: confirmed as kitchen"
        );
        assert_eq!(
            cause(&[("SET_MODE", done()), ("SET_ROOM", failed())]),
            "SettingFailed: SET_MODE: confirmed as AUTO; SET_ROOM: the device failed with error 17"
        );
    }

    #[test]
    fn a_push_comes_out_of_the_table_as_it_went_in() {
        let number = |value| SettingValue::Number(serde_json::Number::from_f64(value).unwrap());
        let mut push = push(&[("SET_MODE", SettingOutcome::Success { value: Some(number(21.5)) })]);
        push.wanted.insert("SET_TEMP".parse().unwrap(), number(-3.25));
        push.wanted.insert("SET_EXACT".parse().unwrap(), number(23.687_050_846_691_058));
        push.wanted.insert("SET_MOST".parse().unwrap(), SettingValue::Number(u64::MAX.into()));
        push.wanted.insert("SET_LEAST".parse().unwrap(), SettingValue::Number(i64::MIN.into()));
        push.wanted.insert("SET_LOCK".parse().unwrap(), SettingValue::Boolean(false));
        let value = serde_dynamo::to_attribute_value(&push).unwrap();
        assert_eq!(open_push(&HashMap::from([("push".to_owned(), value)])), Ok(Some(push)));
    }
}
