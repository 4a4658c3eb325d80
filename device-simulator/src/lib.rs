//! Simulated `IoT` devices: real MQTT over mutual TLS, real downloads, A/B slots on disk, and faults on request.
//!
//! [`Fleet`] runs devices inside a program (tests do), the binary of the same name runs them from a shell.
//! [`provision`] makes and removes their things, keys and certificates in the registry, and [`settings_api`] is a
//! third party's server with their users' settings. [`monitor`] has sensors instead of devices.

mod device;
mod download;
pub mod faults;
mod fleet;
pub mod monitor;
pub mod progress;
pub mod provision;
mod settings;
pub mod settings_api;
mod storage;

pub use device::{DeviceSpec, Phase, UnreadableFolder};
pub use faults::{CutPoint, Fault, FaultTiming, Faults};
pub use fleet::{DeviceUpdate, EndedUpgrade, FailingUpdates, Fleet, FleetOptions, Habits, Outcome, StartError};
pub use mqtt_connection::Endpoint;

/// Now, in Unix milliseconds.
pub(crate) fn now_milliseconds() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}
