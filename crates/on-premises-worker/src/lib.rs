//! A worker on a customer's premises: it connects out to the cloud, takes jobs, runs them as local programs and answers.
//!
//! The module `jobs` decides what happens to a job and does nothing itself, [`worker`] does it: over MQTT, on disk and
//! with programs.

mod add;
pub mod config;
pub mod handlers;
mod jobs;
mod journal;
mod program;
mod stderr;
mod transfer;
pub mod worker;

use serde_json::Value;

/// What comes of running a job.
pub type Outcome = Result<Value, Failure>;

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

/// Chooses the TLS implementation of this process. Every entry point calls it; only the first call counts.
pub fn install_crypto_provider() {
    // An error means that the program has chosen already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// An error and its causes in one line: the outermost of a library's errors often names none of what happened.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

/// The beginning of a text, of so many bytes at most.
pub(crate) fn beginning(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
