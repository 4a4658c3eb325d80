//! Who may report for which sensors: a thing for itself, and for those that its attribute `sensors` names.

use crate::error::aws;
use crate::{Error, ErrorName};
use aws_sdk_iot::Client;
use aws_sdk_iot::operation::describe_thing::DescribeThingError;
use protocol::SensorId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The attribute of a thing that names sensors, separated by commas.
const ATTRIBUTE: &str = "sensors";
/// How long what the registry says is believed. It answers 350 such questions a second in all.
const LIFETIME: Duration = Duration::from_mins(1);
/// So many things are remembered at most.
const CAPACITY: usize = 10_000;

/// What the registry says of things, remembered for a while.
#[derive(Debug)]
pub(crate) struct Senders {
    client: Client,
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Debug, Clone)]
struct Known {
    sensors: Arc<str>,
    since: Instant,
}

impl Senders {
    pub(crate) fn new(config: &aws_config::SdkConfig) -> Self {
        Self { client: Client::new(config), known: Mutex::default() }
    }

    /// Fails with [`ErrorName::SenderMismatch`] if that thing may not report for the sensor.
    pub(crate) async fn check(&self, thing: &str, sensor: &SensorId) -> Result<(), Error> {
        if thing == sensor.as_str() {
            return Ok(());
        }
        let sensors = self.sensors(thing).await?;
        if sensors.split(',').any(|one| one == sensor.as_str()) {
            return Ok(());
        }
        let message = format!(
            "body.device: got {sensor}, expected {thing:?}, who sent it, or a sensor that its attribute {ATTRIBUTE} names"
        );
        Err(Error::new(ErrorName::SenderMismatch, message))
    }

    async fn sensors(&self, thing: &str) -> Result<Arc<str>, Error> {
        let known = self.lock().get(thing).cloned();
        if let Some(known) = known.filter(|known| known.since.elapsed() < LIFETIME) {
            return Ok(known.sensors);
        }
        let sensors: Arc<str> = self.ask(thing).await?.into();
        let mut known = self.lock();
        if known.len() >= CAPACITY {
            known.clear();
        }
        known.insert(thing.to_owned(), Known { sensors: Arc::clone(&sensors), since: Instant::now() });
        Ok(sensors)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the attribute holds; nothing if there is no such thing.
    async fn ask(&self, thing: &str) -> Result<String, Error> {
        match self.client.describe_thing().thing_name(thing).send().await {
            Ok(described) => Ok(described.attributes.and_then(|mut all| all.remove(ATTRIBUTE)).unwrap_or_default()),
            Err(error) => match error.as_service_error() {
                // A client id can be what no thing's name can.
                Some(
                    DescribeThingError::ResourceNotFoundException(_) | DescribeThingError::InvalidRequestException(_),
                ) => Ok(String::new()),
                _ => Err(aws("iot:DescribeThing", &error)),
            },
        }
    }
}
