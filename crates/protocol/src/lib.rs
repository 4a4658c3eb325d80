//! What crosses a process boundary: ids, topics, commands, responses, job documents, domain events,
//! and the two device encodings.
//!
//! No AWS and no I/O in here: the cloud (`fleet`), the devices (`device-simulator`), workers on premises
//! (`on-premises-worker`) and the tests share these types and nothing else.

mod device;
pub mod events;
pub mod fields;
mod ids;
pub mod job;
mod json;
mod json_text;
mod limits;
pub mod on_premises;
mod operation;
mod presence;
pub mod recovery;
pub mod settings;
pub mod telemetry;
mod text;
mod usp;
mod verbatim;
mod whole;

pub use device::{
    Agent, DecodeError, DeviceProtocol, Publication, Received, ReceivedCommand, ReplyTo, protocol_of_topic,
};
pub use ids::{
    Building, HandlerName, InvalidId, JobId, OperationId, ReadingId, SensorId, SettingName, Tenant, ThingName,
    WorkerName,
};
pub use json_text::{JsonText, json_object};
pub use limits::{MAX_JSON_DEPTH, MAX_PAYLOAD_BYTES, check_depth, check_object, trimmed};
pub use operation::{Command, DeviceEvent, DeviceFailure, Firmware, Report, Response, Step, StepOutcome};
pub use presence::{Presence, PresenceEvent, PresenceKind};
pub use text::{redacted, reported_version};
pub use whole::{optional_whole, whole};

/// How a device encodes its messages: the value of the job document's and the thing attribute's `protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProtocolName {
    /// JSON objects on `devices/{thing}/…`.
    Json,
    /// USP (TR-369 1.1 to 1.4) protobuf records on `agents/{thing}/…`.
    Usp,
}

impl ProtocolName {
    /// Every protocol that the system speaks.
    pub const ALL: [Self; 2] = [Self::Json, Self::Usp];

    /// The encoding behind the name: the one place that a third protocol is added to.
    pub fn encoding(self) -> &'static dyn DeviceProtocol {
        match self {
            Self::Json => &json::Json,
            Self::Usp => &usp::Usp,
        }
    }
}

impl std::str::FromStr for ProtocolName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "json" => Ok(Self::Json),
            "usp" => Ok(Self::Usp),
            other => Err(format!("{other:?} is no device protocol: expected \"json\" or \"usp\"")),
        }
    }
}

impl std::fmt::Display for ProtocolName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Usp => "usp",
        })
    }
}
