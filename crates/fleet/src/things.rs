//! Who is a thing of the registry, what it says of it, and what functions change of that.
//!
//! Anybody with credentials may connect under a name that is no thing's, and report on what is none. That is known and foreign: it
//! starts nothing and is kept nowhere.

use crate::error::{aws, code};
use crate::{Error, ErrorName};
use aws_sdk_iot::types::AttributePayload;
use protocol::ThingName;
use std::collections::HashMap;

/// A thing as the registry has it.
pub(crate) struct Thing {
    pub(crate) attributes: HashMap<String, String>,
    /// Counts its changes.
    pub(crate) version: i64,
}

/// A thing; none if the registry has no such thing. It answers 350 such questions a second
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html>), and refuses further ones as throttled.
pub(crate) async fn describe(iot: &aws_sdk_iot::Client, thing: &str) -> Result<Option<Thing>, Error> {
    match iot.describe_thing().thing_name(thing).send().await {
        Ok(described) => {
            Ok(Some(Thing { attributes: described.attributes.unwrap_or_default(), version: described.version }))
        }
        // A client's id can be what no thing's name can.
        Err(error) if matches!(code(&error), Some("ResourceNotFoundException" | "InvalidRequestException")) => Ok(None),
        Err(error) => Err(aws("iot:DescribeThing", &error)),
    }
}

/// The attributes of things that functions write, and no others: IAM can allow `iot:UpdateThing` on things, and cannot say which
/// of their attributes (<https://docs.aws.amazon.com/service-authorization/latest/reference/list_awsiot.html>). What somebody may
/// do follows from others, which only operators write (docs/security.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WrittenAttribute {
    /// The version that the device says it runs.
    FirmwareVersion,
    /// The protocol that it has said so in.
    Protocol,
    /// Its firmware for dynamic thing groups, hidden while the device is held.
    Firmware,
    /// Its model for them, likewise.
    Model,
}

impl WrittenAttribute {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::FirmwareVersion, Self::Protocol, Self::Firmware, Self::Model];

    /// What the registry calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FirmwareVersion => "firmwareVersion",
            Self::Protocol => "protocol",
            Self::Firmware => "FW",
            Self::Model => "model",
        }
    }

    /// That of a name; fails if functions do not write it.
    pub fn named(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|attribute| attribute.name() == name);
        found.ok_or_else(|| Error::invalid("attribute", name, &format!("one of {:?}", Self::ALL.map(Self::name))))
    }
}

/// Whether attributes were changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    Yes,
    /// Somebody else has changed the thing since it was read.
    Outdated,
}

/// Changes attributes of a thing, if it still has that version. All others stay.
pub(crate) async fn write(
    iot: &aws_sdk_iot::Client,
    thing: &ThingName,
    attributes: impl IntoIterator<Item = (WrittenAttribute, String)>,
    version: i64,
) -> Result<Written, Error> {
    let attributes = attributes.into_iter().map(|(attribute, value)| (attribute.name().to_owned(), value)).collect();
    let payload = AttributePayload::builder().set_attributes(Some(attributes)).merge(true).build();
    let update = iot.update_thing().thing_name(thing.as_str()).attribute_payload(payload).expected_version(version);
    match update.send().await {
        Ok(_) => Ok(Written::Yes),
        Err(error) => match code(&error) {
            Some("VersionConflictException") => Ok(Written::Outdated),
            Some("ResourceNotFoundException") => Err(unknown(thing)),
            _ => Err(aws("iot:UpdateThing", &error)),
        },
    }
}

/// The error of a thing that there is not.
pub(crate) fn unknown(thing: &ThingName) -> Error {
    Error::new(ErrorName::DeviceNotFound, format!("the registry has no thing {thing}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_iot::error::ErrorMetadata;
    use aws_sdk_iot::operation::update_thing::{UpdateThingError, UpdateThingOutput};
    use aws_smithy_mocks::{mock, mock_client};

    async fn written(rule: aws_smithy_mocks::Rule) -> Result<Written, ErrorName> {
        let iot = mock_client!(aws_sdk_iot, [&rule]);
        let thing = "gateway-1".parse().unwrap();
        let attributes = [(WrittenAttribute::Firmware, "2.1".to_owned())];
        write(&iot, &thing, attributes, 7).await.map_err(|error| error.name)
    }

    #[tokio::test]
    async fn other_attributes_stay_and_a_changed_thing_is_left_alone() {
        let update = mock!(aws_sdk_iot::Client::update_thing)
            .match_requests(|request| {
                let payload = request.attribute_payload().unwrap();
                let attributes = payload.attributes().unwrap();
                request.expected_version() == Some(7)
                    && payload.merge()
                    && *attributes == [("FW".into(), "2.1".into())].into()
            })
            .then_output(|| UpdateThingOutput::builder().build());
        assert_eq!(written(update).await, Ok(Written::Yes));
        for (code, expected) in [
            ("VersionConflictException", Ok(Written::Outdated)),
            ("ResourceNotFoundException", Err(ErrorName::DeviceNotFound)),
            ("InvalidRequestException", Err(ErrorName::RequestRefused)),
            ("AccessDeniedException", Err(ErrorName::ServiceError)),
        ] {
            let refusal = mock!(aws_sdk_iot::Client::update_thing)
                .then_error(move || UpdateThingError::generic(ErrorMetadata::builder().code(code).build()));
            assert_eq!(written(refusal).await, expected, "{code}");
        }
    }
}
