//! Messages as they come out of a queue, and where those go that nobody can read.

use crate::error::{aws, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_sqs::{Client, types::MessageAttributeValue};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, de::DeserializeOwned};

/// An MQTT message, as every topic rule of the template puts it into a queue: the bytes untouched.
#[derive(Debug, Deserialize)]
pub struct MqttMessage {
    /// The topic that it was published on. It names the thing; the payload is never believed for that.
    pub topic: String,
    /// The payload, base64.
    payload: String,
}

impl MqttMessage {
    /// Reads a queue message's body.
    pub fn parse(body: &str) -> Result<Self, Error> {
        json("queue message", body.as_bytes())
    }

    /// The payload's bytes.
    pub fn payload(&self) -> Result<Vec<u8>, Error> {
        BASE64_STANDARD
            .decode(&self.payload)
            .map_err(|error| Error::new(ErrorName::MalformedMessage, format!("payload: {error}")))
    }

    /// The payload as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        json(&self.topic, &self.payload()?)
    }
}

/// Reads JSON; `what` is named in the error.
pub fn json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::new(ErrorName::MalformedMessage, format!("{what}: {error}")))
}

/// A queue that messages are passed on to, as they are.
#[derive(Debug, Clone)]
pub struct Queue {
    client: Client,
    url: String,
}

impl Queue {
    /// Sends to that queue.
    pub fn new(config: &aws_config::SdkConfig, url: String) -> Self {
        Self { client: Client::new(config), url }
    }

    /// Passes a message on.
    pub async fn send(&self, body: &str) -> Result<(), Error> {
        let sent = self.client.send_message().queue_url(&self.url).message_body(body).send().await;
        sent.map(|_| ()).map_err(|error| aws("sqs:SendMessage", &error))
    }
}

/// The dead-letter queue.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    client: Client,
    queue_url: String,
}

impl DeadLetters {
    /// Sends to the queue that `DEAD_LETTER_QUEUE_URL` names.
    pub fn from_environment(config: &aws_config::SdkConfig) -> Result<Self, String> {
        Ok(Self { client: Client::new(config), queue_url: crate::config::required("DEAD_LETTER_QUEUE_URL")? })
    }

    /// Keeps a message that will never pass, with the reason and the queue that it came from as attributes.
    pub async fn send(&self, body: String, source: Option<&str>, reason: &Error) -> Result<(), Error> {
        let mut request = self.client.send_message().queue_url(&self.queue_url).message_body(body);
        let message = reason.message.chars().take(1000).collect();
        for (name, value) in [
            ("errorType", reason.name.as_str().to_owned()),
            ("errorMessage", message),
            ("sourceQueueArn", source.unwrap_or("unknown").to_owned()),
        ] {
            let attribute = MessageAttributeValue::builder().data_type("String").string_value(value).build();
            request = request.message_attributes(name, attribute.map_err(unbuilt)?);
        }
        request.send().await.map_err(|error| aws("sqs:SendMessage", &error))?;
        Ok(())
    }
}
