//! A table whose items change by rules: read, apply the rule, write if nobody else has written meanwhile.

use crate::aws::text;
use crate::error::{aws, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::AttributeValue;
use serde::{Serialize, de::DeserializeOwned};
use std::marker::PhantomData;
use std::time::Duration;

/// How often a change is tried when others change the same item. One of them gets through each time.
const TRIES: u32 = 30;

/// What is kept under one key. The default is what is known of a key that has no item.
pub trait Item: Serialize + DeserializeOwned + Default + Clone + PartialEq {
    /// The attribute that is the table's key.
    const KEY: &'static str;

    /// Counts the item's writes; 0 before the first.
    fn revision(&mut self) -> &mut u64;
}

/// Where the items are.
#[derive(Debug, Clone)]
pub struct ItemTable<T> {
    client: aws_sdk_dynamodb::Client,
    name: String,
    items: PhantomData<T>,
}

impl<T: Item> ItemTable<T> {
    /// The table of that name.
    pub fn new(config: &aws_config::SdkConfig, name: String) -> Self {
        Self { client: aws_sdk_dynamodb::Client::new(config), name, items: PhantomData }
    }

    /// What is known under a key.
    pub async fn get(&self, key: &str) -> Result<T, Error> {
        let get = self.client.get_item().table_name(&self.name).key(T::KEY, text(key));
        let output = get.consistent_read(true).send().await.map_err(|error| aws("dynamodb:GetItem", &error))?;
        let Some(item) = output.item else { return Ok(T::default()) };
        serde_dynamo::from_item(item).map_err(unbuilt)
    }

    /// Applies a rule to the item: one conditional write, which no other change can come between. Nothing is written if
    /// the rule changes nothing. Fails with [`ErrorName::Throttled`] if others are always quicker.
    pub async fn change<O>(&self, key: &str, rule: impl Fn(&mut T) -> O) -> Result<(T, O), Error> {
        for attempt in 1..=TRIES {
            let known = self.get(key).await?;
            let mut item = known.clone();
            let outcome = rule(&mut item);
            if item == known || self.replace(key, known, &mut item).await? {
                return Ok((item, outcome));
            }
            tokio::time::sleep(Duration::from_millis(5 * u64::from(attempt))).await;
        }
        Err(Error::new(ErrorName::Throttled, format!("the item of {key} was changed {TRIES} times meanwhile")))
    }

    /// Writes an item if it still is what it was.
    async fn replace(&self, key: &str, mut known: T, item: &mut T) -> Result<bool, Error> {
        let revision = *known.revision();
        *item.revision() = revision + 1;
        let fields = serde_dynamo::to_item(&*item).map_err(unbuilt)?;
        let put = self.client.put_item().table_name(&self.name).set_item(Some(fields)).item(T::KEY, text(key));
        let put = match revision {
            0 => put.condition_expression(format!("attribute_not_exists({})", T::KEY)),
            revision => put
                .condition_expression("revision = :revision")
                .expression_attribute_values(":revision", AttributeValue::N(revision.to_string())),
        };
        match put.send().await {
            Ok(_) => Ok(true),
            Err(error) => match error.as_service_error() {
                Some(PutItemError::ConditionalCheckFailedException(_)) => Ok(false),
                _ => Err(aws("dynamodb:PutItem", &error)),
            },
        }
    }
}
