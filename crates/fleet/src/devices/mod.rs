//! How to talk to devices: commands, presence, the account's IoT settings.

pub mod configure_iot;
pub mod presence;
pub mod publish_to_device;
