//! Names of things, jobs and operations, valid from the moment they exist.

use crate::fields::{Characters, Field, JOB_ID, THING_NAME};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A text that is no valid id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is no {kind}: expected {expected}")]
pub struct InvalidId {
    kind: &'static str,
    value: String,
    expected: String,
}

/// An id of ours: no API of AWS knows it.
const fn ours(name: &'static str, max: usize, punctuation: &'static str) -> Field {
    Field { name, characters: Characters::Ascii(punctuation), max, is_required: true }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $field:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id as it stands on the wire.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                const FIELD: Field = $field;
                let Err(error) = FIELD.check(text) else { return Ok(Self(text.to_owned())) };
                let value = text.chars().take(200).collect();
                Err(InvalidId { kind: FIELD.name, value, expected: error.expected().to_owned() })
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id! {
    /// A thing's name in the AWS IoT registry, which is its MQTT client id too
    /// (pattern of the `CreateThing` API).
    ThingName, THING_NAME
}
id! {
    /// An AWS IoT job's id (pattern of the `CreateJob` API).
    JobId, JOB_ID
}
id! {
    /// One thing that one device is asked to do. Never used twice for a thing: a job's operation is the
    /// job's id, the number of its execution and when that was queued.
    OperationId, ours("operation id", 128, ":_.@-")
}

id! {
    /// A setting of a device, such as `SET_TEMP`.
    SettingName, ours("setting name", 40, "_")
}

id! {
    /// A customer whose workers run jobs on premises. It is the first level of topics and the beginning of its workers'
    /// client ids, so it has no punctuation.
    Tenant, ours("tenant", 32, "")
}

id! {
    /// A worker on premises; of all those of its tenant no other has this name.
    WorkerName, ours("worker name", 64, "_-")
}

id! {
    /// What a worker can do with a job, such as `add`.
    HandlerName, ours("handler name", 64, "_-")
}

id! {
    /// A sensor: a thing that reports on itself, or one that a thing reports for.
    SensorId, ours("sensor", 128, ":_-")
}

id! {
    /// Where sensors are; the end of their topics.
    Building, ours("building", 64, "_-")
}

id! {
    /// Tells a reading from the others of its sensor.
    ReadingId, ours("reading id", 64, "_-")
}

/// A thing that is a sensor itself.
impl From<ThingName> for SensorId {
    fn from(thing: ThingName) -> Self {
        Self(thing.0)
    }
}

impl OperationId {
    /// The operation by which a job execution upgrades its device, so that it never meets an answer to an earlier one: a
    /// retried execution has a new number, and one of a job that was deleted and made again under its id has, with the same
    /// number, been queued at another time (Unix seconds).
    pub fn of_job_execution(job: &JobId, execution_number: i64, queued_at: Option<i64>) -> Self {
        Self(match queued_at {
            Some(queued_at) => format!("{job}-{execution_number}-{queued_at}"),
            None => format!("{job}-{execution_number}"),
        })
    }

    /// Whether it ends as [`Self::of_job_execution`] ends one: a stack of Fleetflow has made it, this one or another.
    pub fn names_a_job_execution(&self) -> bool {
        let is_number = |text: Option<&str>, digits: usize| {
            text.is_some_and(|text| text.len() >= digits && text.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let mut parts = self.0.rsplit('-');
        is_number(parts.next(), 10) && is_number(parts.next(), 1) && parts.next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_checked_against_the_patterns_of_the_service() {
        assert!("gateway:1_a-B".parse::<ThingName>().is_ok());
        for bad in ["", "a/b", "a#", "a b", "ä", &"x".repeat(129)] {
            assert!(bad.parse::<ThingName>().is_err(), "{bad}");
        }
        assert!("a:b".parse::<JobId>().is_err());
        let error = "a/b".parse::<ThingName>().unwrap_err().to_string();
        assert_eq!(error, "\"a/b\" is no thing name: expected 1 to 128 characters of a-z A-Z 0-9 : _ -");
    }

    #[test]
    fn operations_of_two_executions_differ() {
        let job: JobId = "job-1".parse().unwrap();
        assert_eq!(OperationId::of_job_execution(&job, 2, None).as_str(), "job-1-2");
        assert_eq!(OperationId::of_job_execution(&job, 2, Some(1_795_238_492)).as_str(), "job-1-2-1795238492");
        let longest = OperationId::of_job_execution(&"j".repeat(64).parse().unwrap(), i64::MAX, Some(i64::MAX));
        assert!(longest.as_str().parse::<OperationId>().is_ok());
        for (operation, is_ours) in
            [("job-1-2-1795238492", true), ("reboot-1", false), ("1-1795238492", false), ("a-x-1795238492", false)]
        {
            let operation: OperationId = operation.parse().unwrap();
            assert_eq!(operation.names_a_job_execution(), is_ours, "{operation}");
        }
    }
}
