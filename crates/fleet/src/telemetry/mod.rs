//! What sensors measure: kept three times (row, history, metrics), watched, and acted on.

pub mod check_remediation;
mod climate;
mod history;
pub mod ingest_telemetry;
mod metrics;
mod readings;
pub mod remediate;
mod remedies;
mod senders;

pub use metrics::{METRICS, NAMESPACE};
