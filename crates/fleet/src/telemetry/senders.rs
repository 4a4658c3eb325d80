//! Who may report for which sensors: a thing for itself, and for those that its attribute `sensors` names.

use crate::{Error, ErrorName, things};
use aws_sdk_iot::Client;
use futures_util::{StreamExt, stream};
use protocol::SensorId;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The attribute of a thing that names sensors, separated by commas.
const ATTRIBUTE: &str = "sensors";
/// How long what the registry says is believed. It answers 350 such questions a second in all.
const LIFETIME: Duration = Duration::from_mins(1);
/// So many things are remembered at most.
const CAPACITY: usize = 10_000;

/// How many things are asked for at once.
const AT_ONCE: usize = 10;

/// Fails with [`ErrorName::SenderMismatch`] unless a thing's `sensors` name the sensor.
pub(crate) fn check(thing: &str, sensors: &str, sensor: &SensorId) -> Result<(), Error> {
    if sensors.split(',').any(|one| one == sensor.as_str()) {
        return Ok(());
    }
    let message = format!(
        "body.device: got {sensor}, expected {thing:?}, who sent it, or a sensor that its attribute {ATTRIBUTE} names"
    );
    Err(Error::new(ErrorName::SenderMismatch, message))
}

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

    /// The sensors that each of these things may report for beside itself.
    pub(crate) async fn sensors_of(&self, things: BTreeSet<&str>) -> HashMap<String, Result<Arc<str>, Error>> {
        let asked = things.into_iter().map(async |thing| (thing.to_owned(), self.sensors(thing).await));
        stream::iter(asked).buffer_unordered(AT_ONCE).collect().await
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
        let thing = things::describe(&self.client, thing).await?;
        Ok(thing.and_then(|mut thing| thing.attributes.remove(ATTRIBUTE)).unwrap_or_default())
    }
}
