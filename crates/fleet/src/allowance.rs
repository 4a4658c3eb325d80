//! How much one device may cause in an hour by what it says unasked: what is beyond costs a write that is refused, and has no effect.

use crate::Error;
use crate::aws::{now_seconds, number, text};
use crate::error::aws;
use aws_sdk_dynamodb::operation::update_item::UpdateItemError;
use aws_sdk_dynamodb::operation::update_item::builders::UpdateItemFluentBuilder;
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValuesOnConditionCheckFailure};
use sha2::{Digest, Sha256};

/// How many messages of a kind a device is heard with in an hour: ten times what an honest one that is ill says.
pub const AN_HOUR: u32 = 100;

/// In milliseconds.
const HOUR: i64 = 3_600_000;
/// How long an item is kept: longer than a message waits as a rule. One that comes later is counted anew.
const KEEP_SECONDS: i64 = 24 * 3600;

/// What a device says of its own accord.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unasked {
    /// An update has failed or has succeeded.
    UpdateReport,
    /// It has booted.
    Boot,
    /// It has come online.
    Session,
    /// It has said who it is, or which version it runs.
    Introduction,
}

impl Unasked {
    fn name(self) -> &'static str {
        match self {
            Self::UpdateReport => "update-report",
            Self::Boot => "boot",
            Self::Session => "session",
            Self::Introduction => "introduction",
        }
    }
}

/// The table of what devices were heard with. One item a device, kind and hour.
#[derive(Debug, Clone)]
pub struct Allowances {
    client: aws_sdk_dynamodb::Client,
    table: String,
}

impl Allowances {
    /// Kept in that table.
    pub fn new(client: aws_sdk_dynamodb::Client, table: String) -> Self {
        Self { client, table }
    }

    /// Those of the table that the environment names.
    pub fn from_environment(config: &aws_config::SdkConfig) -> Result<Self, String> {
        Ok(Self::new(aws_sdk_dynamodb::Client::new(config), crate::config::required("ALLOWANCES_TABLE")?))
    }

    /// Whether a client is heard with what it said then (Unix milliseconds of the broker; never the device's own time). The same
    /// message again is no further one: a queue may deliver it often. The first that is refused in an hour is logged, the others
    /// are not: that too would cost.
    pub async fn allows(&self, client: &str, what: Unasked, said: &[u8], received_at: i64) -> Result<bool, Error> {
        let key = text(format!("{client}#{}#{}", what.name(), received_at.div_euclid(HOUR)));
        // One number a message, for an item is billed by its size: messages of one millisecond are told apart by a byte of their hash.
        let message = received_at.rem_euclid(HOUR) * 256 + i64::from(Sha256::digest(said)[0]);
        let heard = self
            .update(&key)
            .update_expression("SET expiresAt = :expiresAt ADD heard :heard")
            .condition_expression("attribute_not_exists(heard) OR size(heard) < :most OR contains(heard, :message)")
            .expression_attribute_values(":expiresAt", number(now_seconds() + KEEP_SECONDS))
            .expression_attribute_values(":heard", AttributeValue::Ns(vec![message.to_string()]))
            .expression_attribute_values(":message", number(message))
            .expression_attribute_values(":most", number(AN_HOUR.into()))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        let Err(error) = heard.send().await else { return Ok(true) };
        match error.as_service_error() {
            Some(UpdateItemError::ConditionalCheckFailedException(failed)) => {
                if !failed.item().is_some_and(|item| item.contains_key("refused")) {
                    self.note_refusal(&key, client, what).await?;
                }
                Ok(false)
            }
            _ => Err(aws("dynamodb:UpdateItem", &error)),
        }
    }

    async fn note_refusal(&self, key: &AttributeValue, client: &str, what: Unasked) -> Result<(), Error> {
        tracing::warn!(
            outcome = "REFUSED",
            client,
            what = what.name(),
            "more than {AN_HOUR} an hour: no more are heard in this one"
        );
        let note = self.update(key).update_expression("SET refused = :true");
        let noted = note.expression_attribute_values(":true", AttributeValue::Bool(true)).send().await;
        noted.map(|_| ()).map_err(|error| aws("dynamodb:UpdateItem", &error))
    }

    fn update(&self, key: &AttributeValue) -> UpdateItemFluentBuilder {
        self.client.update_item().table_name(&self.table).key("allowance", key.clone())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use aws_sdk_dynamodb::operation::update_item::UpdateItemOutput;
    use aws_sdk_dynamodb::types::error::ConditionalCheckFailedException;
    use aws_smithy_mocks::{Rule, RuleMode, mock, mock_client};
    use std::collections::HashMap;

    fn heard() -> Rule {
        mock!(aws_sdk_dynamodb::Client::update_item).then_output(|| UpdateItemOutput::builder().build())
    }

    fn refused(is_known: bool) -> Rule {
        mock!(aws_sdk_dynamodb::Client::update_item)
            .match_requests(|request| request.condition_expression().is_some())
            .then_error(move || {
                let failed = ConditionalCheckFailedException::builder();
                let item = is_known.then(|| HashMap::from([("refused".to_owned(), AttributeValue::Bool(true))]));
                UpdateItemError::ConditionalCheckFailedException(failed.set_item(item).build())
            })
    }

    /// One of which nothing has been used.
    pub(crate) fn unused() -> Allowances {
        Allowances::new(mock_client!(aws_sdk_dynamodb, RuleMode::MatchAny, [&heard()]), "allowances".to_owned())
    }

    /// One of which everything has been used.
    pub(crate) fn used_up() -> Allowances {
        Allowances::new(mock_client!(aws_sdk_dynamodb, RuleMode::MatchAny, [&refused(true)]), "allowances".to_owned())
    }

    #[tokio::test]
    async fn the_first_refusal_of_an_hour_is_noted_and_the_others_cost_one_write() {
        for (is_known, notes) in [(false, 1), (true, 0)] {
            let (refused, note) = (refused(is_known), heard());
            let client = mock_client!(aws_sdk_dynamodb, RuleMode::MatchAny, [&refused, &note]);
            let allowances = Allowances::new(client, "allowances".to_owned());
            assert_eq!(allowances.allows("gateway-7", Unasked::Boot, b"", 7 * HOUR + 5).await, Ok(false));
            assert_eq!((refused.num_calls(), note.num_calls()), (1, notes));
        }
    }

    /// The hour and the time in it are the broker's.
    #[tokio::test]
    async fn each_hour_has_its_own_item() {
        let rule = mock!(aws_sdk_dynamodb::Client::update_item)
            .match_requests(|request| {
                let message = request.expression_attribute_values().unwrap()[":message"].as_n().unwrap();
                // The hash of nothing begins with e3.
                let is_it = message.parse() == Ok(5 * 256 + 0xe3);
                is_it && request.key().unwrap()["allowance"].as_s().unwrap() == "gateway-7#session#7"
            })
            .then_output(|| UpdateItemOutput::builder().build());
        let allowances = Allowances::new(mock_client!(aws_sdk_dynamodb, [&rule]), "allowances".to_owned());
        assert_eq!(allowances.allows("gateway-7", Unasked::Session, b"", 7 * HOUR + 5).await, Ok(true));
    }
}
