//! The table of devices that could not update themselves: one item a thing.

use super::device::Device;
use crate::aws::text;
use crate::error::{aws, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::AttributeValue;
use protocol::ThingName;
use std::time::Duration;

/// How often a change is tried when others change the same item. One of them gets through each time.
const TRIES: u32 = 30;

/// Where the items are.
#[derive(Debug, Clone)]
pub struct RecoveryTable {
    client: aws_sdk_dynamodb::Client,
    name: String,
}

impl RecoveryTable {
    /// The table of that name.
    pub fn new(config: &aws_config::SdkConfig, name: String) -> Self {
        Self { client: aws_sdk_dynamodb::Client::new(config), name }
    }

    /// What is known of a device: nothing, for one that has never failed.
    pub async fn get(&self, thing: &ThingName) -> Result<Device, Error> {
        let get = self.client.get_item().table_name(&self.name).key("thing", text(thing.as_str()));
        let output = get.consistent_read(true).send().await.map_err(|error| aws("dynamodb:GetItem", &error))?;
        let Some(item) = output.item else { return Ok(Device::default()) };
        serde_dynamo::from_item(item).map_err(unbuilt)
    }

    /// Applies a rule to the item: one conditional write, which no other change can come between. Nothing is written if
    /// the rule changes nothing. Fails with [`ErrorName::Throttled`] if others are always quicker.
    pub async fn change<T>(&self, thing: &ThingName, rule: impl Fn(&mut Device) -> T) -> Result<(Device, T), Error> {
        for attempt in 1..=TRIES {
            let known = self.get(thing).await?;
            let mut device = known.clone();
            let outcome = rule(&mut device);
            if device == known || self.replace(thing, &known, &mut device).await? {
                return Ok((device, outcome));
            }
            tokio::time::sleep(Duration::from_millis(5 * u64::from(attempt))).await;
        }
        Err(Error::new(ErrorName::Throttled, format!("the item of {thing} was changed {TRIES} times meanwhile")))
    }

    /// Writes an item if it still is what it was.
    async fn replace(&self, thing: &ThingName, known: &Device, device: &mut Device) -> Result<bool, Error> {
        device.revision = known.revision + 1;
        let item = serde_dynamo::to_item(&*device).map_err(unbuilt)?;
        let put =
            self.client.put_item().table_name(&self.name).set_item(Some(item)).item("thing", text(thing.as_str()));
        let put = match known.revision {
            0 => put.condition_expression("attribute_not_exists(thing)"),
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
