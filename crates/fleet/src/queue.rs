//! Messages as they come out of a queue, and where those go that nobody can read.

use crate::error::{aws, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_sqs::{Client, types::MessageAttributeValue};
use base64::{Engine, prelude::BASE64_STANDARD};
use protocol::ThingName;
use protocol::recovery::UpdateReport;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// How much of a message is kept among the dead letters, in bytes: SQS takes 256 KiB at least
/// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html>), the reason included.
const MAX_BODY_BYTES: usize = 240 * 1024;

/// The largest message that is read, in bytes: the most that SNS and `EventBridge` deliver. Those of topic rules are smaller.
const MAX_MESSAGE_BYTES: usize = 256 * 1024;

/// An MQTT message, as every topic rule of the template puts it into a queue: the bytes untouched.
#[derive(Debug, Deserialize)]
pub struct MqttMessage {
    /// The topic that it was published on. It names the thing; the payload is never believed for that.
    pub topic: String,
    /// The payload, base64.
    payload: String,
    /// The MQTT client that published it; `n/a` if it was not published by MQTT. Only where the topic names no thing.
    #[serde(default, rename = "clientId")]
    client_id: Option<String>,
    /// Whose credentials it was published with: a certificate's id, or what AWS IAM or Amazon Cognito calls the caller
    /// (<https://docs.aws.amazon.com/iot/latest/developerguide/iot-sql-functions.html#iot-function-principal>).
    #[serde(default)]
    principal: Option<String>,
    /// The topic rule's name for it, the same wherever it is sent again. Only where messages have no names of their own.
    #[serde(default)]
    pub id: Option<String>,
    /// When the broker got it, in Unix milliseconds.
    #[serde(default, rename = "receivedAt")]
    received_at: Option<i64>,
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

    /// What tells it from others that were published at the same time.
    pub(crate) fn said(&self) -> &[u8] {
        self.payload.as_bytes()
    }

    /// The thing that published it, unless somebody with IAM credentials did, such as people who try a workflow: their policy has
    /// let them. Who is neither (an identity of Amazon Cognito, whoever a custom authorizer lets in) is nobody: no thing has that
    /// name.
    pub fn sender(&self) -> Option<&str> {
        match self.principal.as_deref() {
            Some(principal) if is_iam_identity(principal) => None,
            Some(principal) if !is_certificate(principal) => Some(NOBODY),
            _ => Some(self.client_id.as_deref().unwrap_or(NOBODY)),
        }
    }

    /// When the broker got it, in Unix milliseconds.
    pub fn received_at(&self) -> Result<i64, Error> {
        let missing = || Error::new(ErrorName::MalformedMessage, "receivedAt: missing in a message of the topic rule");
        self.received_at.ok_or_else(missing)
    }

    /// A report on an update, and when the broker got it (Unix milliseconds); none if the message is no report. Its topic is the
    /// same for all devices, so the payload names the thing: see [`Self::check_sender`].
    pub fn update_report(&self) -> Result<Option<(UpdateReport, i64)>, Error> {
        let report = UpdateReport::read(&self.payload()?)?;
        let dated =
            |report: UpdateReport| self.received_at().map(|received_at| (report.dated(received_at), received_at));
        report.map(dated).transpose()
    }

    /// Fails with [`ErrorName::SenderMismatch`] unless the device that reports on a thing has connected as that thing.
    pub fn check_sender(&self, thing: &ThingName) -> Result<(), Error> {
        match self.sender() {
            Some(client) if client != thing.as_str() => Err(Error::new(
                ErrorName::SenderMismatch,
                format!("_id_: got {thing}, expected {client:?}, the client that sent it"),
            )),
            _ => Ok(()),
        }
    }

    /// The payload as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        json(&self.topic, &self.payload()?)
    }
}

/// What a topic rule calls a client that there is none of
/// (<https://docs.aws.amazon.com/iot/latest/developerguide/iot-sql-functions.html#iot-function-clientid>). No thing's name has a
/// slash.
const NOBODY: &str = "n/a";

/// The account of its root user, a user's unique id, or a role's with the name of its session: what `aws:userid` is
/// (<https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_variables.html#principaltable>).
fn is_iam_identity(principal: &str) -> bool {
    let is_id = |id: &str| id.len() >= 16 && id.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    let is_account = |id: &str| id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_digit());
    match principal.split_once(':') {
        None => is_account(principal) || principal.starts_with("AIDA") && is_id(principal),
        Some((role, session)) => role.starts_with("AROA") && is_id(role) && !session.is_empty(),
    }
}

/// A certificate's id is a SHA-256 in hexadecimal.
fn is_certificate(principal: &str) -> bool {
    principal.len() == 64 && principal.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Reads JSON, unless it is too large or too deep; `what` is named in the error.
pub fn json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        let message = format!("{what}: got {} bytes, expected at most {MAX_MESSAGE_BYTES}", bytes.len());
        return Err(Error::new(ErrorName::MessageTooLarge, message));
    }
    let bytes = protocol::trimmed(bytes);
    protocol::check_depth(bytes)?;
    protocol::check_object(what, bytes)?;
    serde_json::from_slice(bytes).map_err(|error| Error::new(ErrorName::MalformedMessage, format!("{what}: {error}")))
}

/// How long after a failed attempt the next one is asked for.
const ASK_AFTER_SECONDS: [i32; 2] = [2, 300];

/// A question for a thing's next job execution, in the queue of their announcements.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NextOf {
    /// The thing.
    pub next_of: ThingName,
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

    /// Asks start-workflow, whose queue this must be, for a thing's next job execution: no document says whether AWS IoT Jobs
    /// announces an attempt that follows a failed one, nor how long it takes to queue it. Whatever has been started by then is
    /// not started again.
    pub async fn ask_for_next(&self, thing: &ThingName) -> Result<(), Error> {
        let question = serde_json::to_string(&NextOf { next_of: thing.clone() }).map_err(unbuilt)?;
        for delay in ASK_AFTER_SECONDS {
            let send = self.client.send_message().queue_url(&self.url).message_body(&question).delay_seconds(delay);
            send.send().await.map_err(|error| aws("sqs:SendMessage", &error))?;
        }
        Ok(())
    }

    /// Passes a message on.
    pub async fn send(&self, body: &str) -> Result<(), Error> {
        let sent = self.client.send_message().queue_url(&self.url).message_body(body).send().await;
        sent.map(|_| ()).map_err(|error| aws("sqs:SendMessage", &error))
    }
}

/// Whether SQS takes the character in an attribute
/// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html>).
fn is_allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{fffd}' | '\u{10000}'..)
}

/// The dead-letter queue.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    client: Client,
    queue_url: String,
}

impl DeadLetters {
    /// Sends to that queue.
    pub fn new(config: &aws_config::SdkConfig, queue_url: String) -> Self {
        Self { client: Client::new(config), queue_url }
    }

    /// Sends to the queue that `DEAD_LETTER_QUEUE_URL` names.
    pub fn from_environment(config: &aws_config::SdkConfig) -> Result<Self, String> {
        Ok(Self::new(config, crate::config::required("DEAD_LETTER_QUEUE_URL")?))
    }

    /// Keeps a message that will never pass, with the reason and the queue that it came from as attributes. Of a body that leaves
    /// no room for these, the beginning is kept.
    pub async fn send(&self, mut body: String, source: Option<&str>, reason: &Error) -> Result<(), Error> {
        body.truncate(body.floor_char_boundary(MAX_BODY_BYTES));
        let mut request = self.client.send_message().queue_url(&self.queue_url).message_body(body);
        let message = reason.message.chars().take(1000).map(|c| if is_allowed(c) { c } else { '\u{fffd}' }).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_no_characters_that_a_queue_refuses() {
        let all = "\u{0}\u{1}\t\n\r ä\u{d7ff}\u{e000}\u{fffd}\u{fffe}\u{ffff}\u{10000}\u{10ffff}";
        let allowed: String = all.chars().filter(|c| is_allowed(*c)).collect();
        assert_eq!(allowed, "\t\n\r ä\u{d7ff}\u{e000}\u{fffd}\u{10000}\u{10ffff}");
    }

    #[test]
    fn an_array_is_no_message() {
        let error = MqttMessage::parse(r#" ["topic", "e30=", null]"#).expect_err("an array");
        assert_eq!(error.name, ErrorName::MalformedMessage);
        assert!(error.message.contains("queue message") && error.message.contains("expected an object"), "{error}");
    }

    #[test]
    fn a_device_reports_on_itself_only_and_people_on_any() {
        let report = br#"{"_id_":"gateway-1","timestamp":"1","status":"failed"}"#;
        let certificate = "0123456789abcdef".repeat(4);
        let cases = [
            (Some("gateway-1"), Some(certificate.as_str()), true),
            (Some("gateway-2"), Some(&certificate), false),
            (Some("n/a"), Some(&certificate), false),
            (Some("gateway-2"), None, false),
            (None, None, false),
            (Some("n/a"), Some("AIDACKCEVSQ6C2EXAMPLE"), true),
            (Some("iotconsole-1"), Some("AROADBQP57FF2AEXAMPLE:me"), true),
            (Some("iotconsole-1"), Some("123456789012"), true),
            // Of Amazon Cognito, or let in by a custom authorizer, whatever name they connect under.
            (Some("gateway-1"), Some("eu-west-1:9d0e2a0c-0000-4000-8000-000000000000"), false),
            (Some("gateway-1"), Some("AROA"), false),
            (Some("gateway-1"), Some("somebody"), false),
            (Some("gateway-1"), Some("AIDACKCEVSQ6C2EXAMPLE:me"), false),
        ];
        for (client, principal, allowed) in cases {
            let message = serde_json::json!({
                "topic": "iot/device/data", "payload": BASE64_STANDARD.encode(report), "clientId": client,
                "principal": principal, "receivedAt": 5,
            });
            let message = MqttMessage::parse(&message.to_string()).unwrap();
            let (report, received_at) = message.update_report().unwrap().unwrap();
            let expected = if allowed { Ok(()) } else { Err(ErrorName::SenderMismatch) };
            let checked = message.check_sender(&report.thing_name).map_err(|error| error.name);
            assert_eq!((received_at, checked), (5, expected), "{client:?} {principal:?}");
        }
    }
}
