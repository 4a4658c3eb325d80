//! What sensors measure: kept three times (row, history, metrics), watched, and acted on.

mod climate;
mod history;
pub mod ingest_telemetry;
mod metrics;
mod readings;
pub mod remediate;
mod senders;

pub use metrics::{METRICS, NAMESPACE};
