//! Recovery of failed updates: count a device's failures, hide it from its jobs for a while, give it up, take it back.

mod device;
#[cfg(test)]
mod model;
pub mod record_success;
mod registry;
mod reports;
pub mod restore_attributes;
pub mod retry_counter;
mod table;

pub use device::{Device, Held, Limits, Phase};
pub use registry::{Reconciled, Registry};
pub use table::RecoveryTable;
