//! A worker on a customer's premises: it connects out to the cloud, takes jobs, runs them as local programs and answers.
//!
//! The module `jobs` decides what happens to a job and does nothing itself, [`worker`] does it: over MQTT, on disk and
//! with programs.

mod add;
mod clock;
pub mod config;
pub mod handlers;
mod jobs;
mod journal;
mod program;
mod stderr;
mod transfer;
pub mod worker;

use protocol::JsonText;
use std::time::Duration;

/// What comes of running a job.
pub type Outcome = Result<JsonText, Failure>;

/// How long a program that is told to end (SIGTERM) may take before it is killed (SIGKILL), if its lease lasts as long.
pub const GRACE: Duration = Duration::from_secs(5);

/// How a job has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A name that state machines can catch, such as `KeyError`.
    pub exception: String,
    /// In detail.
    pub cause: Option<String>,
}

impl Failure {
    pub(crate) fn new(exception: &str, cause: impl Into<String>) -> Self {
        Self { exception: exception.to_owned(), cause: Some(cause.into()) }
    }
}

/// The beginning of a text, of so many bytes at most.
pub(crate) fn beginning(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
