//! What has been started for a job on a thing: events of job executions name neither number nor time, and of one that was deleted
//! nothing more can be learned.
//!
//! One item an operation, in the rendezvous table beside the operation's steps: found by job and thing, under
//! `{thing}#job#{job}`, which no operation's key is.

use crate::aws::{now_seconds, number, text};
use crate::error::{aws, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_dynamodb::types::AttributeValue;
use protocol::{JobId, OperationId, ThingName};
use serde::{Deserialize, Serialize};

/// As long as the items of the steps.
const KEEP_SECONDS: i64 = 14 * 24 * 3600;

/// A job execution for which a workflow has been started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Started {
    /// The operation; the sort key.
    #[serde(rename = "step")]
    pub operation_id: OperationId,
    /// Which of the job's executions on this thing.
    pub execution_number: i64,
    /// When it was queued, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_at: Option<i64>,
}

/// The operations that have been started and are not known to have ended.
#[derive(Debug, Clone)]
pub struct StartedOperations {
    client: aws_sdk_dynamodb::Client,
    table: String,
}

impl StartedOperations {
    /// Keeps them in the rendezvous table.
    pub fn new(client: aws_sdk_dynamodb::Client, table: String) -> Self {
        Self { client, table }
    }

    /// Remembers an operation.
    pub async fn add(&self, thing: &ThingName, job: &JobId, started: &Started) -> Result<(), Error> {
        let item = serde_dynamo::to_item(started).map_err(unbuilt)?;
        let put =
            self.client.put_item().table_name(&self.table).set_item(Some(item)).item("operation", key(thing, job));
        let put = put.item("expiresAt", number(now_seconds() + KEEP_SECONDS));
        put.send().await.map(|_| ()).map_err(|error| aws("dynamodb:PutItem", &error))
    }

    /// The operations of a job on a thing. A thing has few: each is another attempt.
    pub async fn of(&self, thing: &ThingName, job: &JobId) -> Result<Vec<Started>, Error> {
        let query = self.client.query().table_name(&self.table).key_condition_expression("operation = :operation");
        let query = query.expression_attribute_values(":operation", key(thing, job)).consistent_read(true);
        let items = query.send().await.map_err(|error| aws("dynamodb:Query", &error))?.items.unwrap_or_default();
        serde_dynamo::from_items(items)
            .map_err(|error| Error::new(ErrorName::ServiceError, format!("an item of the rendezvous table: {error}")))
    }

    /// Forgets an operation that has ended.
    pub async fn remove(&self, thing: &ThingName, job: &JobId, operation: &OperationId) -> Result<(), Error> {
        let delete = self.client.delete_item().table_name(&self.table).key("operation", key(thing, job));
        let delete = delete.key("step", text(operation.as_str()));
        delete.send().await.map(|_| ()).map_err(|error| aws("dynamodb:DeleteItem", &error))
    }
}

fn key(thing: &ThingName, job: &JobId) -> AttributeValue {
    text(format!("{thing}#job#{job}"))
}
