//! The trait that every device encoding implements, cloud side and device side.

use crate::limits::{MAX_JSON_DEPTH, MAX_PAYLOAD_BYTES};
use crate::{Command, OperationId, ProtocolName, Report, Response, Step, ThingName, redacted};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An MQTT message to be published at `QoS` 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// Where to.
    pub topic: String,
    /// What.
    pub payload: Vec<u8>,
}

/// How an agent calls itself (USP): an endpoint id need not be the name of the thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Agent {
    /// Who messages to it are addressed to: it drops others.
    pub endpoint_id: String,
    /// The version of USP that it writes its records in; empty if it does not say.
    #[serde(default)]
    pub usp_version: String,
}

/// What one message from a device comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// What the device said.
    pub report: Report,
    /// The version that the device runs, if it says so.
    pub runs: Option<String>,
    /// It has booted and not said what it runs: [`DeviceProtocol::encode_version_question`] asks it.
    pub lacks_version: bool,
    /// Who it says it is.
    pub agent: Option<Agent>,
    /// What it has asked the cloud to send back once its report has taken effect.
    pub acknowledgement: Option<Publication>,
}

impl Received {
    /// A report and nothing else.
    pub(crate) fn of(report: Report) -> Self {
        Self { report, runs: None, lacks_version: false, agent: None, acknowledgement: None }
    }
}

/// How a device answers one command: kept by the device for as long as the operation lasts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyTo {
    /// The topic that the command named for its direct answer (USP).
    pub topic: String,
    /// The id of the command's message (USP).
    pub message_id: String,
    /// Who sent it (USP).
    pub requester: String,
}

/// A command as it reached a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedCommand {
    /// What to do.
    pub command: Command,
    /// How to answer.
    pub reply_to: ReplyTo,
}

/// A message that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No device publishes on this topic.
    #[error("no device protocol uses the topic {0:?}")]
    UnknownTopic(String),
    /// Larger than the broker carries.
    #[error("the payload has {0} bytes, more than the {MAX_PAYLOAD_BYTES} that a message may have")]
    TooLarge(usize),
    /// JSON whose arrays and objects lie deeper in each other than those of any message.
    #[error("the payload is nested deeper than the {MAX_JSON_DEPTH} levels that a message may have")]
    TooDeep,
    /// Not what the protocol says.
    #[error("{0}")]
    Malformed(String),
}

/// How long a reason is, in characters.
const MAX_REASON_CHARACTERS: usize = 1000;

impl DecodeError {
    pub(crate) fn malformed(what: &str, why: impl std::fmt::Display) -> Self {
        // Whatever the message holds may be quoted in it.
        Self::Malformed(redacted(&format!("{what}: {why}")).chars().take(MAX_REASON_CHARACTERS).collect())
    }
}

/// A device encoding: topics and payloads of one kind of device, in both directions.
///
/// The cloud uses the first half, devices (the simulator) the second.
pub trait DeviceProtocol: Send + Sync {
    /// The thing that reports, if the topic is one that such devices publish on; an error if that is no thing. `client` is
    /// the MQTT client that published it: a device's is called as its thing, and not every topic names that.
    fn thing_of_report(&self, topic: &str, client: &str) -> Option<Result<ThingName, DecodeError>>;

    /// The message that carries a command to a device, which is addressed as the agent that it has said it is. `now` is in Unix
    /// milliseconds; no two messages of an operation may have the same.
    fn encode_command(&self, thing: &ThingName, agent: Option<&Agent>, command: &Command, now: i64) -> Publication;

    /// The message that asks a device which version it runs, for an operation that waits to know; `None` where the protocol has no
    /// word for it. `now` is in Unix milliseconds.
    fn encode_version_question(
        &self,
        thing: &ThingName,
        agent: Option<&Agent>,
        operation: Option<&OperationId>,
        now: i64,
    ) -> Option<Publication>;

    /// Reads what a device said. Fails with a sentence if it cannot be read.
    fn decode_report(&self, thing: &ThingName, payload: &[u8]) -> Result<Received, DecodeError>;

    /// The topic filter that a device of this kind subscribes to.
    fn command_filter(&self, thing: &ThingName) -> String;

    /// Reads a command on the device; `None` for messages that are no commands.
    fn decode_command(&self, topic: &str, payload: &[u8]) -> Result<Option<ReceivedCommand>, DecodeError>;

    /// The message by which a device answers a command; `None` where the protocol has no word for it (USP agents
    /// report no progress). `now` is in Unix milliseconds.
    fn encode_response(
        &self,
        thing: &ThingName,
        response: &Response,
        reply_to: &ReplyTo,
        now: i64,
    ) -> Option<Publication>;

    /// The message by which a device tells that it has booted by itself. `now` is in Unix milliseconds.
    fn encode_boot(&self, thing: &ThingName, firmware_version: &str, now: i64) -> Publication;

    /// What a device with a known fault sends after a boot that failed: hardly readable, yet a failure.
    fn encode_malformed_boot_failure(
        &self,
        thing: &ThingName,
        operation: &OperationId,
        reply_to: &ReplyTo,
        now: i64,
    ) -> Publication;
}

/// The protocol and thing that a device's report belongs to, by its topic and the MQTT client that published it.
pub fn protocol_of_topic(topic: &str, client: &str) -> Result<(ProtocolName, ThingName), DecodeError> {
    let found =
        ProtocolName::ALL.into_iter().find_map(|name| Some((name, name.encoding().thing_of_report(topic, client)?)));
    let (name, thing) = found.ok_or_else(|| DecodeError::UnknownTopic(topic.to_owned()))?;
    Ok((name, thing?))
}

/// The thing between a topic's prefix and suffix.
pub(crate) fn thing_between(topic: &str, prefix: &str, suffix: &str) -> Option<ThingName> {
    topic.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()
}

/// Devices write an error as an object, a number or a text. A failure must not be lost for its spelling.
#[derive(Serialize)]
pub(crate) struct ErrorBody {
    pub(crate) code: String,
    pub(crate) message: String,
}

impl<'de> Deserialize<'de> for ErrorBody {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Ok(match Value::deserialize(deserializer)? {
            Value::Object(fields) => Self {
                code: redacted(&fields.get("code").map(text).unwrap_or_default()),
                message: redacted(&fields.get("message").map(text).unwrap_or_default()),
            },
            other => Self { code: redacted(&text(&other)), message: String::new() },
        })
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code.as_str(), self.message.as_str()) {
            (only, "") | ("", only) => f.write_str(only),
            (code, message) => write!(f, "{code}: {message}"),
        }
    }
}

/// A report that a step has failed.
pub(crate) fn failed(step: Step, operation_id: OperationId, code: &str, message: &str) -> Report {
    let failure = crate::DeviceFailure { code: redacted(code), message: redacted(message) };
    let outcome = crate::StepOutcome::Failed(failure);
    Report::Response(Response { operation_id, step, outcome })
}
