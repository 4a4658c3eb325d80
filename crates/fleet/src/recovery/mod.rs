//! Recovery of failed updates: count a device's failures, hide it from its jobs for a while, give it up, take it back.

mod device;
pub mod record_success;
pub mod restore_attributes;
pub mod retry_counter;
#[cfg(test)]
mod model;
mod registry;
mod table;

pub use device::{Decision, Device, Held, Limits, Phase, Release};
pub use registry::{Reconciled, Registry};
pub use table::RecoveryTable;
