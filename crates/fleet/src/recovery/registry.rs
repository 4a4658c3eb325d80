//! The registry's side of the recovery: a thing's attributes follow its item in the table.

use super::device::{ATTRIBUTES, Device, Registered, Step, Values};
use super::table::RecoveryTable;
use crate::things::{self, WrittenAttribute};
use crate::{Error, ErrorName};
use protocol::{OperationId, ThingName};

/// How many steps the way from an item to its thing may have, with those that were repeated because somebody else changed
/// one of them.
const STEPS: u32 = 30;

/// The registry and the table that it follows.
#[derive(Debug, Clone)]
pub struct Registry {
    /// The registry.
    pub iot: aws_sdk_iot::Client,
    /// What is known of devices.
    pub table: RecoveryTable,
}

/// A thing that is as its item says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reconciled {
    /// The item.
    pub device: Device,
    /// The attributes now.
    pub attributes: Values,
    /// Those that an operator has changed while the device was held, and that were left so.
    pub changed_by_operator: Values,
}

impl Registry {
    /// Makes a thing's attributes what its item says, step by step, each with what was read just before. It can be
    /// repeated whenever it was broken off, and others may do the same at the same time. All other attributes stay.
    pub async fn reconcile(&self, thing: &ThingName) -> Result<Reconciled, Error> {
        for _ in 0..STEPS {
            // In this order: see `next_step`.
            let registered = self.read(thing).await?;
            let device = self.table.get(thing.as_str()).await?;
            match (device.next_step(&registered), &device.held) {
                (Step::Done, _) | (_, None) => {
                    let changed_by_operator = device.changed_by_operator(&registered);
                    return Ok(Reconciled { device, attributes: registered.attributes, changed_by_operator });
                }
                (step, Some(held)) => self.go(thing, &held.operation_id, step).await?,
            }
        }
        Err(Error::new(
            ErrorName::Throttled,
            format!("the attributes of {thing} were changed again and again meanwhile"),
        ))
    }

    async fn go(&self, thing: &ThingName, operation: &OperationId, step: Step) -> Result<(), Error> {
        match step {
            Step::Done => Ok(()),
            Step::Keep(attributes) => {
                self.table.change(thing.as_str(), |device| device.keep(operation, &attributes)).await.map(|_| ())
            }
            Step::Mark => self.table.change(thing.as_str(), |device| device.mark(operation)).await.map(|_| ()),
            Step::Update { attributes, version } => self.update(thing, attributes, version).await,
        }
    }

    async fn read(&self, thing: &ThingName) -> Result<Registered, Error> {
        let described = things::describe(&self.iot, thing.as_str()).await?.ok_or_else(|| things::unknown(thing))?;
        let is_ours = |(name, _): &(String, String)| ATTRIBUTES.contains(&name.as_str());
        let attributes = described.attributes.into_iter().filter(is_ours).collect();
        Ok(Registered { version: described.version, attributes })
    }

    /// Changes attributes unless the thing has been changed meanwhile.
    async fn update(&self, thing: &ThingName, attributes: Values, version: i64) -> Result<(), Error> {
        let named = attributes.into_iter().map(|(name, value)| Ok((WrittenAttribute::named(&name)?, value)));
        things::write(&self.iot, thing, named.collect::<Result<Vec<_>, Error>>()?, version).await.map(|_| ())
    }
}
