//! The cloud side: one library, one small binary a Lambda.
//!
//! Five contexts own their data and meet only in messages: [`jobs`] (who shall be updated), [`workflows`] (in
//! what order, how far), [`devices`] (how to talk to them), [`recovery`] (what becomes of those that fail), [`telemetry`] (what sensors
//! measure). They do not import each other, with one exception that is the point of the system: `devices` uses
//! `workflows::rendezvous`, where commands and answers meet.

pub mod allowance;
pub mod aws;
pub mod config;
pub mod device_registry;
pub mod devices;
pub mod error;
mod execution_name;
pub mod item_table;
pub mod job_executions;
pub mod jobs;
pub mod lambda;
pub mod queue;
pub mod recovery;
pub mod tasks;
pub mod telemetry;
pub mod things;
pub mod workflows;

pub use error::{Error, ErrorName};
