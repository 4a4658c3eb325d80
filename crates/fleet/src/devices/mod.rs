//! How to talk to devices and to workers on premises: commands, what they say, presence, settings, jobs, the account's IoT
//! settings.

pub mod agents;
mod circuit_breaker;
pub mod configure_iot;
pub mod get_device_settings;
pub mod handle_device_response;
pub mod presence;
pub mod publish_to_device;
pub mod settings;
pub mod settings_api;
mod worker_job;
pub mod worker_jobs;
