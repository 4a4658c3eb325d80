//! What USP agents call themselves. Messages to them are addressed so, for they drop what is addressed to others; an endpoint id
//! need not be a thing's name (TR-369, R-E2E.1).

use crate::Error;
use crate::aws::{now_seconds, number, text};
use crate::error::{aws, code, unbuilt};
use aws_sdk_dynamodb::types::AttributeValue;
use protocol::{Agent, ThingName};
use std::collections::HashMap;

/// Where an operation's items have its key, an agent's has its thing's name: that holds no `#`, so no operation is called so.
const SORT_KEY: &str = "AGENT";
/// How long an item is kept after the agent has last said who it is, in seconds; it is kept for longer once half of that is over.
const KEEP_SECONDS: i64 = 2 * 365 * 24 * 3600;

/// The agents of things, in the table of the rendezvous.
#[derive(Debug, Clone)]
pub struct Agents {
    table: String,
    dynamodb: aws_sdk_dynamodb::Client,
}

impl Agents {
    /// Keeps them in that table.
    pub fn new(config: &aws_config::SdkConfig, table: String) -> Self {
        Self { table, dynamodb: aws_sdk_dynamodb::Client::new(config) }
    }

    /// The agent on a thing; none if it is known to be nothing else than the thing's name says.
    pub async fn of(&self, thing: &ThingName) -> Result<Option<Agent>, Error> {
        let get = self.dynamodb.get_item().table_name(&self.table).set_key(Some(key(thing)));
        let got = get.consistent_read(true).send().await.map_err(|error| aws("dynamodb:GetItem", &error))?;
        got.item.map(|item| serde_dynamo::from_item(item).map_err(unbuilt)).transpose()
    }

    /// An agent has said who it is. One that is called as its thing, and writes no version, has an item only if it had another name
    /// before.
    pub async fn note(&self, thing: &ThingName, agent: &Agent) -> Result<(), Error> {
        let is_as_expected = agent.endpoint_id == thing.as_str() && agent.usp_version.is_empty();
        let whose =
            if is_as_expected { "attribute_exists(endpointId) AND" } else { "attribute_not_exists(endpointId) OR" };
        let condition = format!("{whose} (endpointId <> :endpoint OR uspVersion <> :version OR expiresAt < :soon)");
        let update = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key(thing)))
            .update_expression("SET endpointId = :endpoint, uspVersion = :version, expiresAt = :expiresAt")
            .condition_expression(condition)
            .expression_attribute_values(":endpoint", text(&agent.endpoint_id))
            .expression_attribute_values(":version", text(&agent.usp_version))
            .expression_attribute_values(":expiresAt", number(now_seconds() + KEEP_SECONDS))
            .expression_attribute_values(":soon", number(now_seconds() + KEEP_SECONDS / 2));
        match update.send().await {
            Ok(_) => {
                tracing::info!(thing = thing.as_str(), ?agent, outcome = "APPLIED", "the agent is known");
                Ok(())
            }
            Err(error) if code(&error) == Some("ConditionalCheckFailedException") => Ok(()),
            Err(error) => Err(aws("dynamodb:UpdateItem", &error)),
        }
    }
}

fn key(thing: &ThingName) -> HashMap<String, AttributeValue> {
    HashMap::from([("operation".to_owned(), text(thing.as_str())), ("step".to_owned(), text(SORT_KEY))])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn an_agent_that_is_what_its_thing_says_needs_no_item_of_its_own() {
        use aws_smithy_http_client::test_util::infallible_client_fn;
        for (endpoint_id, usp_version, is_needed) in
            [("gw-1", "", false), ("gw-1", "1.3", true), ("os::012345-0A", "", true), ("os::012345-0A", "1.3", true)]
        {
            let asked = Arc::new(Mutex::new(String::new()));
            let seen = Arc::clone(&asked);
            let http = infallible_client_fn(move |request: ureq::http::Request<_>| {
                *seen.lock().unwrap() =
                    String::from_utf8_lossy(request.body().bytes().unwrap_or_default()).into_owned();
                ureq::http::Response::builder().body("{}").unwrap()
            });
            let agents = Agents::new(&crate::aws::of_test(http), "rendezvous".into());
            let agent = Agent { endpoint_id: endpoint_id.into(), usp_version: usp_version.into() };
            agents.note(&"gw-1".parse().unwrap(), &agent).await.unwrap();
            let asked = asked.lock().unwrap();
            assert_eq!(asked.contains("attribute_not_exists(endpointId) OR"), is_needed, "{agent:?}");
            assert_eq!(asked.contains("attribute_exists(endpointId) AND"), !is_needed, "{agent:?}");
        }
    }
}
