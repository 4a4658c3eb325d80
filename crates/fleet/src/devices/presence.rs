//! Which devices have a connection, and the workflows that wait for one.

use crate::aws::{now_seconds, number, text};
use crate::error::{aws, code};
use crate::queue::{MqttMessage, Queue};
use crate::workflows::rendezvous::{Answer, Operation, Rendezvous, Wait};
use crate::{Error, ErrorName};
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue};
use protocol::{OperationId, Presence, PresenceEvent, PresenceKind, Step, ThingName};
use serde::Deserialize;
use std::collections::HashMap;

/// How long an item is kept after a connection was opened, in seconds. Of a thing that stays connected for longer, fleet indexing
/// is asked.
const KEEP_CONNECTED_SECONDS: i64 = 90 * 24 * 3600;
/// How long it is kept after any other write: longer than a workflow can wait for the device (two weeks), and than an event can be
/// late (four days in the queue, and two weeks among the dead letters).
const KEEP_SECONDS: i64 = 30 * 24 * 3600;

/// What both handlers reach.
#[derive(Debug)]
pub struct Adapters {
    /// The table of connections.
    pub connections: Connections,
    /// Where waiting workflows are.
    pub rendezvous: Rendezvous,
    /// Where new sessions are told of; none if nobody wants to know.
    pub sessions: Option<Queue>,
}

impl Adapters {
    /// The tables that the function's environment names.
    pub fn from_environment(config: &aws_config::SdkConfig) -> Result<Self, String> {
        Ok(Self {
            connections: Connections::new(config, crate::config::required("CONNECTIONS_TABLE")?),
            rendezvous: Rendezvous::new(config, crate::config::required("RENDEZVOUS_TABLE")?),
            sessions: crate::config::optional("SESSIONS_QUEUE_URL").map(|url| Queue::new(config, url)),
        })
    }
}

/// What a state machine asks of `await-device`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AwaitInput {
    /// The device.
    pub thing_name: ThingName,
    /// The operation that needs it online.
    pub operation_id: OperationId,
    /// How the state waits.
    pub wait: Wait,
}

/// A state waits until the device is online: at once, if it is.
///
/// The operation is noted in the device's item by the same write that reads its presence, and a connection reads
/// the noted operations by the same write that records it: whichever comes second wakes the workflow.
pub async fn await_device(adapters: &Adapters, input: AwaitInput) -> Result<(), Error> {
    let operation = Operation::new(&input.thing_name, &input.operation_id);
    let outcome = adapters.rendezvous.expect(&operation, Step::DeviceOnline, &input.wait).await?.outcome;
    let device = adapters.connections.note_waiting(&operation).await?;
    let online = match &device.presence {
        Some(presence) => presence.connected,
        None => adapters.connections.is_connected_by_index(&input.thing_name).await,
    };
    tracing::info!(operation = operation.key(), online, ?outcome);
    if online { wake(adapters, &operation).await } else { Ok(()) }
}

/// Handles one queued lifecycle event: records it, wakes whoever waits for the device, and passes a new session on.
pub async fn track(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let message = MqttMessage::parse(body)?;
    let event = PresenceEvent::read(message.json()?)
        .map_err(|error| Error::new(ErrorName::MalformedMessage, format!("{}: {error}", message.topic)))?;
    // A refused connection, or what AWS has added since: the topic rule leaves them out.
    let Some(event) = event else {
        tracing::info!(topic = message.topic, outcome = "IGNORED", "no connection that opens or closes");
        return Ok(());
    };
    // Clients that are no things (a person's test client) may have any id.
    let Ok(thing) = event.client_id.parse::<ThingName>() else {
        tracing::info!(client = event.client_id, outcome = "IGNORED", "no thing has this name");
        return Ok(());
    };
    let (device, outcome) = adapters.connections.record(&thing, &event).await?;
    tracing::info!(thing = thing.as_str(), event = ?event.event_type, session = event.session_identifier, outcome);
    // What follows is done for a known event too: an earlier try may have died before it came so far. A connection that
    // is not the last one any more, or has closed already, is of no interest to anybody.
    if event.event_type != PresenceKind::Connected || !device.presence.is_some_and(|known| event.is(&known)) {
        return Ok(());
    }
    for id in device.awaited_by {
        wake(adapters, &Operation { thing: thing.clone(), id }).await?;
    }
    match &adapters.sessions {
        Some(queue) => queue.send(body).await,
        None => Ok(()),
    }
}

async fn wake(adapters: &Adapters, operation: &Operation) -> Result<(), Error> {
    let online = Answer::Succeeded { firmware_version: None };
    let outcome = adapters.rendezvous.arrive(operation, Step::DeviceOnline, &online).await?.outcome;
    tracing::info!(operation = operation.key(), step = Step::DeviceOnline.name(), ?outcome);
    adapters.connections.forget_waiting(operation).await
}

/// A device's item.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its last known connection; none before its first.
    pub presence: Option<Presence>,
    /// The operations that wait for it to come online.
    pub awaited_by: Vec<OperationId>,
}

/// The table of connections: one item a thing.
#[derive(Debug)]
pub struct Connections {
    table: String,
    dynamodb: aws_sdk_dynamodb::Client,
    iot: aws_sdk_iot::Client,
}

impl Connections {
    /// Keeps connections in that table.
    pub fn new(config: &aws_config::SdkConfig, table: String) -> Self {
        Self { table, dynamodb: aws_sdk_dynamodb::Client::new(config), iot: aws_sdk_iot::Client::new(config) }
    }

    /// Takes in an event if it is newer than what is known, by one conditional write; says what is known then.
    async fn record(&self, thing: &ThingName, event: &PresenceEvent) -> Result<(Device, &'static str), Error> {
        // Two events of one device at the same moment: the loser looks again. More than two is a storm, which the
        // queue spreads.
        for _ in 0..3 {
            let known = self.read(thing).await?;
            if known.presence.as_ref().is_some_and(|presence| !event.supersedes(presence)) {
                return Ok((known, "STALE"));
            }
            if let Some(device) = self.replace(thing, &event.presence(), known.presence.as_ref()).await? {
                return Ok((device, "APPLIED"));
            }
        }
        Err(Error::new(ErrorName::Throttled, format!("{thing}: too many presence events at once")))
    }

    async fn read(&self, thing: &ThingName) -> Result<Device, Error> {
        let request = self.dynamodb.get_item().table_name(&self.table).key("thing", text(thing.as_str()));
        let output = request.consistent_read(true).send().await.map_err(|error| aws("dynamodb:GetItem", &error))?;
        Ok(device(output.item.unwrap_or_default()))
    }

    /// Writes the presence unless somebody else did since `known` was read (`None` then).
    async fn replace(
        &self,
        thing: &ThingName,
        presence: &Presence,
        known: Option<&Presence>,
    ) -> Result<Option<Device>, Error> {
        let request = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .key("thing", text(thing.as_str()))
            .update_expression(
                "SET connected = :connected, sessionIdentifier = :session, versionNumber = :version, #at = :at, \
                 expiresAt = :expiresAt",
            )
            .expression_attribute_names("#at", "timestamp")
            .expression_attribute_values(":connected", AttributeValue::Bool(presence.connected))
            .expression_attribute_values(":session", text(&presence.session_identifier))
            .expression_attribute_values(":version", number(presence.version_number))
            .expression_attribute_values(":at", number(presence.timestamp))
            .expression_attribute_values(":expiresAt", number(now_seconds() + kept_for(presence)))
            .return_values(ReturnValue::AllNew);
        let request = match known {
            None => request.condition_expression("attribute_not_exists(sessionIdentifier)"),
            Some(known) => request
                .condition_expression("versionNumber = :knownVersion AND sessionIdentifier = :knownSession AND connected = :knownConnected")
                .expression_attribute_values(":knownVersion", number(known.version_number))
                .expression_attribute_values(":knownSession", text(&known.session_identifier))
                .expression_attribute_values(":knownConnected", AttributeValue::Bool(known.connected)),
        };
        match request.send().await {
            Ok(output) => Ok(Some(device(output.attributes.unwrap_or_default()))),
            Err(error) if code(&error) == Some("ConditionalCheckFailedException") => Ok(None),
            Err(error) => Err(aws("dynamodb:UpdateItem", &error)),
        }
    }

    async fn note_waiting(&self, operation: &Operation) -> Result<Device, Error> {
        self.change_waiting(operation, "ADD awaitedBy :operation SET expiresAt = :expiresAt").await
    }

    async fn forget_waiting(&self, operation: &Operation) -> Result<(), Error> {
        self.change_waiting(operation, "DELETE awaitedBy :operation SET expiresAt = :expiresAt").await.map(|_| ())
    }

    async fn change_waiting(&self, operation: &Operation, change: &str) -> Result<Device, Error> {
        let output = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .key("thing", text(operation.thing.as_str()))
            .update_expression(change)
            .expression_attribute_values(":operation", AttributeValue::Ss(vec![operation.id.to_string()]))
            .expression_attribute_values(":expiresAt", number(now_seconds() + KEEP_SECONDS))
            .return_values(ReturnValue::AllNew)
            .send()
            .await
            .map_err(|error| aws("dynamodb:UpdateItem", &error))?;
        Ok(device(output.attributes.unwrap_or_default()))
    }

    /// Asks fleet indexing about a device of which nothing is known: it was connected before this stack was deployed, or never,
    /// or for so long that its item has expired. Unknown counts as not connected.
    async fn is_connected_by_index(&self, thing: &ThingName) -> bool {
        match self.iot.get_thing_connectivity_data().thing_name(thing.as_str()).send().await {
            Ok(output) => output.connected.unwrap_or(false),
            Err(error) => {
                let error = aws("iot:GetThingConnectivityData", &error);
                tracing::warn!(thing = thing.as_str(), error = error.name.as_str(), message = error.message);
                false
            }
        }
    }
}

/// An item that has expired and is not deleted yet is still the broker's last word, so nobody looks at the time when reading one.
fn kept_for(presence: &Presence) -> i64 {
    if presence.connected { KEEP_CONNECTED_SECONDS } else { KEEP_SECONDS }
}

fn device(mut item: HashMap<String, AttributeValue>) -> Device {
    let awaited_by = match item.remove("awaitedBy") {
        Some(AttributeValue::Ss(ids)) => ids.iter().filter_map(|id| id.parse().ok()).collect(),
        _ => Vec::new(),
    };
    Device { presence: serde_dynamo::from_item(item).ok(), awaited_by }
}
