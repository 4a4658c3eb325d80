//! Hides a device from its dynamic thing groups, and shows it again: park, restore, quarantine, release.

use super::device::{Device, Phase, Values};
use super::registry::{Reconciled, Registry};
use crate::aws::now_millis;
use crate::error::{aws, code};
use crate::{Error, ErrorName};
use futures_util::future::join_all;
use protocol::{OperationId, ThingName};
use serde::{Deserialize, Serialize};

/// How many things one call may release: the function's time is bounded, and so is the rate of the registry's API.
const MAX_THINGS: usize = 100;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Hide a device that retry-counter has decided to park.
    Park,
    /// Show it again, because its time is over.
    Restore,
    /// Hide a device that retry-counter has decided to quarantine; or, if it is not quarantined any more, take it out
    /// of the group of failed devices.
    Quarantine,
    /// An operator's word: show a device again, whatever it is, and forget its failures.
    Release,
}

/// What the function is invoked with.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Input {
    action: Action,
    /// The thing.
    thing_name: Option<ThingName>,
    /// Or several, to release.
    thing_names: Option<Vec<ThingName>>,
    /// Of the failure that was one too many; for all actions but release.
    operation_id: Option<OperationId>,
}

/// What has become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Outcome {
    /// Its attributes are `moveOut`.
    Parked,
    /// It is not parked for this failure any more: nothing was done.
    NotParked,
    /// Its attributes are back.
    Restored,
    /// Its attributes are `failedtoupdate`.
    Quarantined,
    /// It is not quarantined for this failure any more.
    NotQuarantined,
    /// Its attributes are back, it has left the group of failed devices, and its failures are forgotten.
    Released,
    /// There was nothing to forget.
    NothingToRelease,
    /// It did not work.
    Failed,
}

/// What has become of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    thing_name: ThingName,
    outcome: Outcome,
    /// `FW` and `model` as they are now.
    #[serde(skip_serializing_if = "Values::is_empty")]
    attributes: Values,
    /// Those that an operator had changed meanwhile, and that were left so.
    #[serde(skip_serializing_if = "Values::is_empty")]
    changed_by_operator: Values,
    /// Why it did not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// What the function answers.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Output {
    /// For `thingName`.
    One(Done),
    /// For `thingNames`.
    Many {
        /// Each of them, in the order of the input.
        things: Vec<Done>,
        /// How many did not work.
        failed: usize,
    },
}

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// The registry.
    pub registry: Registry,
    /// The static thing group of quarantined devices.
    pub failed_group: String,
}

/// Does it. Every action may be repeated, whether it was broken off or not.
pub async fn handle(adapters: &Adapters, input: Input) -> Result<Output, Error> {
    let Input { action, thing_name, thing_names, operation_id } = input;
    let named = thing_name.clone();
    let done = match (action, thing_name, thing_names, operation_id) {
        (Action::Park, Some(thing), None, Some(operation)) => adapters.park(&thing, &operation).await,
        (Action::Restore, Some(thing), None, Some(operation)) => adapters.restore(&thing, &operation).await,
        (Action::Quarantine, Some(thing), None, Some(operation)) => adapters.quarantine(&thing, &operation).await,
        (Action::Release, Some(thing), None, None) => adapters.release(&thing).await,
        (Action::Release, None, Some(things), None) => return adapters.release_all(things).await,
        (Action::Release, ..) => Err(Error::invalid(
            "thingName",
            "another payload",
            "thingName or thingNames, and nothing else, for release",
        )),
        _ => Err(Error::invalid(
            "thingName",
            "another payload",
            "thingName and operationId, and nothing else, for park, restore and quarantine",
        )),
    };
    if let (Err(error), Some(thing)) = (&done, named)
        && error.name == ErrorName::DeviceNotFound
    {
        // It has been deleted meanwhile. Nothing is held that does not exist, so what is known of it may expire.
        adapters.registry.table.change(thing.as_str(), |device| device.release(now_millis())).await?;
    }
    done.map(Output::One)
}

impl Adapters {
    async fn park(&self, thing: &ThingName, operation: &OperationId) -> Result<Done, Error> {
        let reconciled = self.registry.reconcile(thing).await?;
        let is_parked = reconciled.device.is_held(Phase::Parked, operation);
        Ok(done(thing, if is_parked { Outcome::Parked } else { Outcome::NotParked }, reconciled))
    }

    async fn restore(&self, thing: &ThingName, operation: &OperationId) -> Result<Done, Error> {
        let (_, is_restored) = self.registry.table.change(thing.as_str(), |device| device.restore(operation)).await?;
        let reconciled = self.registry.reconcile(thing).await?;
        Ok(done(thing, if is_restored { Outcome::Restored } else { Outcome::NotParked }, reconciled))
    }

    async fn quarantine(&self, thing: &ThingName, operation: &OperationId) -> Result<Done, Error> {
        let reconciled = self.registry.reconcile(thing).await?;
        if reconciled.device.phase != Phase::Quarantined {
            self.leave_failed_group(thing).await?;
        }
        let is_quarantined = reconciled.device.is_held(Phase::Quarantined, operation);
        Ok(done(thing, if is_quarantined { Outcome::Quarantined } else { Outcome::NotQuarantined }, reconciled))
    }

    async fn release(&self, thing: &ThingName) -> Result<Done, Error> {
        let rule = |device: &mut Device| (device.phase != Phase::Active, device.release(now_millis()));
        let (_, (was_held, was_known)) = self.registry.table.change(thing.as_str(), rule).await?;
        // In any case: an earlier release may have been broken off here.
        self.leave_failed_group(thing).await?;
        let mut reconciled = self.registry.reconcile(thing).await?;
        if !was_held {
            reconciled.changed_by_operator.clear();
        }
        Ok(done(thing, if was_known { Outcome::Released } else { Outcome::NothingToRelease }, reconciled))
    }

    async fn release_all(&self, things: Vec<ThingName>) -> Result<Output, Error> {
        if !(1..=MAX_THINGS).contains(&things.len()) {
            return Err(Error::invalid("thingNames", format!("{} things", things.len()), "1 to 100"));
        }
        let things: Vec<Done> = join_all(things.iter().map(|thing| self.release_or_tell(thing))).await;
        let failed = things.iter().filter(|done| done.outcome == Outcome::Failed).count();
        Ok(Output::Many { things, failed })
    }

    async fn release_or_tell(&self, thing: &ThingName) -> Done {
        self.release(thing).await.unwrap_or_else(|error| {
            tracing::error!(thing = thing.as_str(), error = error.name.as_str(), message = error.message);
            let outcome = Outcome::Failed;
            let (attributes, changed_by_operator) = Default::default();
            let (error, message) = (Some(error.name), Some(error.message));
            Done { thing_name: thing.clone(), outcome, attributes, changed_by_operator, error, message }
        })
    }

    async fn leave_failed_group(&self, thing: &ThingName) -> Result<(), Error> {
        let remove = self.registry.iot.remove_thing_from_thing_group().thing_name(thing.as_str());
        match remove.thing_group_name(&self.failed_group).send().await {
            Ok(_) => Ok(()),
            // The thing, or the group, is gone.
            Err(error) if code(&error) == Some("ResourceNotFoundException") => Ok(()),
            Err(error) => Err(aws("iot:RemoveThingFromThingGroup", &error)),
        }
    }
}

fn done(thing: &ThingName, outcome: Outcome, reconciled: Reconciled) -> Done {
    let Reconciled { device, attributes, mut changed_by_operator } = reconciled;
    // Elsewhere they differ because the device is held, or for reasons of another time.
    if !matches!(outcome, Outcome::Restored | Outcome::Released) {
        changed_by_operator.clear();
    }
    tracing::info!(thing = thing.as_str(), ?outcome, phase = ?device.phase, ?changed_by_operator);
    Done { thing_name: thing.clone(), outcome, attributes, changed_by_operator, error: None, message: None }
}
