//! What devices say of themselves, kept in the registry: a thing's attributes `firmwareVersion` and `protocol`.

use crate::things::WrittenAttribute::{FirmwareVersion, Protocol};
use crate::things::{self, Thing, Written, WrittenAttribute};
use crate::{Error, ErrorName};
use protocol::fields::ATTRIBUTE_VALUE;
use protocol::{ProtocolName, ThingName};
use std::collections::HashMap;

/// How often a thing is read anew because somebody else has changed it meanwhile.
const ATTEMPTS: u32 = 5;

/// What a device has said of itself at a boot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// The version that it runs.
    pub runs: Option<String>,
    /// The protocol that it said so in.
    pub speaks: Option<ProtocolName>,
    /// The version that the registry had before: if it has yet another one now, that is newer.
    pub instead_of: Option<String>,
}

/// The registry, as far as devices' boots change it.
#[derive(Debug, Clone)]
pub struct DeviceRegistry {
    /// None if the things' attributes are another stack's.
    iot: Option<aws_sdk_iot::Client>,
}

impl DeviceRegistry {
    /// The registry of this account, unless another stack of it hears the devices: that one records what they say.
    pub fn new(config: &aws_config::SdkConfig, owns_device_topics: bool) -> Self {
        Self { iot: owns_device_topics.then(|| aws_sdk_iot::Client::new(config)) }
    }

    /// That of a test.
    #[cfg(test)]
    pub(crate) fn of(iot: aws_sdk_iot::Client) -> Self {
        Self { iot: Some(iot) }
    }

    /// Records what a device has said, if the thing's attributes say something else. All other attributes stay, and what
    /// somebody else changes at the same time. What the registry does not take is logged.
    pub async fn record(&self, thing: &ThingName, said: &Said) -> Result<(), Error> {
        let Some(iot) = self.iot.as_ref().filter(|_| *said != Said::default()) else { return Ok(()) };
        for _ in 0..ATTEMPTS {
            let Some(Thing { attributes, version }) = things::describe(iot, thing.as_str()).await? else {
                tracing::info!(thing = thing.as_str(), outcome = "IGNORED", "the registry has no such thing");
                return Ok(());
            };
            let changes = changes(&attributes, said);
            if changes.is_empty() {
                return Ok(());
            }
            match things::write(iot, thing, changes.clone(), version).await {
                Ok(Written::Yes) => {
                    tracing::info!(thing = thing.as_str(), ?changes, outcome = "APPLIED", "attributes recorded");
                    return Ok(());
                }
                Ok(Written::Outdated) => {}
                // A thing without a type has three attributes at most
                // (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html#thing-limits>): sent again it is refused again.
                Err(error) if matches!(error.name, ErrorName::RequestRefused | ErrorName::DeviceNotFound) => {
                    let (thing, message) = (thing.as_str(), error.message);
                    tracing::warn!(thing, ?changes, outcome = "REJECTED", error = error.name.as_str(), message);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorName::Throttled, format!("the thing {thing} was changed again and again meanwhile")))
    }
}

/// The attributes to change. The protocol is remembered once: whoever sets the attribute, in the registry or by hand, has the
/// last word.
fn changes(attributes: &HashMap<String, String>, said: &Said) -> HashMap<WrittenAttribute, String> {
    let mut changes = HashMap::new();
    let known = attributes.get(FirmwareVersion.name());
    let is_outdated = said.instead_of.is_some() && known != said.instead_of.as_ref();
    if let Some(version) = said.runs.as_ref().filter(|version| known != Some(version) && !is_outdated) {
        if ATTRIBUTE_VALUE.check(version).is_ok() {
            changes.insert(FirmwareVersion, version.clone());
        } else {
            tracing::warn!(version, outcome = "REJECTED", "the registry takes no such attribute");
        }
    }
    // JSON is what a device without the attribute is spoken to in.
    if said.speaks == Some(ProtocolName::Usp) && !attributes.contains_key(Protocol.name()) {
        changes.insert(Protocol, ProtocolName::Usp.to_string());
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn changes(before: &HashMap<String, String>, said: &Said) -> HashMap<String, String> {
        let changes = super::changes(before, said).into_iter();
        changes.map(|(attribute, value)| (attribute.name().to_owned(), value)).collect()
    }

    #[test]
    fn only_what_differs_is_recorded_and_the_protocol_only_once() {
        use ProtocolName::{Json, Usp};
        for (before, runs, speaks, expected) in [
            (&[][..], "1.2.3", Usp, &[("firmwareVersion", "1.2.3"), ("protocol", "usp")][..]),
            (&[], "1.2.3", Json, &[("firmwareVersion", "1.2.3")]),
            (&[("firmwareVersion", "1.2.3"), ("protocol", "usp")], "1.2.3", Usp, &[]),
            (&[("firmwareVersion", "2.0.0")], "1.2.3", Json, &[("firmwareVersion", "1.2.3")]),
            // An operator's word, and another product's attribute, stay.
            (&[("protocol", "json"), ("FW", "1")], "1.2.3", Usp, &[("firmwareVersion", "1.2.3")]),
            (&[("protocol", "lwm2m")], "1.2.3", Usp, &[("firmwareVersion", "1.2.3")]),
            // What the registry would refuse.
            (&[], "1.2.3+build.5", Json, &[]),
            (&[("protocol", "usp")], "ä", Usp, &[]),
        ] {
            let said = Said { runs: Some(runs.to_owned()), speaks: Some(speaks), instead_of: None };
            assert_eq!(changes(&attributes(before), &said), attributes(expected), "{before:?} {said:?}");
        }
        let long = Said { runs: Some("1".repeat(801)), ..Said::default() };
        assert_eq!(changes(&attributes(&[]), &long), attributes(&[]));
        assert_eq!(changes(&attributes(&[]), &Said::default()), attributes(&[]));
    }

    /// A report may come again when the device runs something else.
    #[test]
    fn a_newer_version_is_not_replaced_by_an_older_report() {
        let said = Said { runs: Some("2.0.0".into()), speaks: None, instead_of: Some("1.0.0".into()) };
        for (known, expected) in [("1.0.0", &[("firmwareVersion", "2.0.0")][..]), ("2.0.0", &[]), ("3.0.0", &[])] {
            assert_eq!(changes(&attributes(&[("firmwareVersion", known)]), &said), attributes(expected), "{known}");
        }
    }
}
