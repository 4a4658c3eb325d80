//! What can be done with a job: the built-in handler and the programs of the configuration.

use crate::add::add;
use crate::config::{ADD, Config};
use crate::{Failure, Outcome, program};
use protocol::{HandlerName, JsonText};
use std::time::Duration;

/// Runs a handler on an input; returns nothing if it was stopped, which it is when `stop` is ready: that says how long its
/// program may take to end before it is killed.
pub async fn handle(
    config: &Config,
    handler: &HandlerName,
    input: &JsonText,
    on_progress: impl Fn(u8) + Send + 'static,
    stop: impl Future<Output = Duration>,
) -> Option<Outcome> {
    if let Some(program) = config.handlers.get(handler) {
        return program::run(program, input, on_progress, stop).await;
    }
    if handler.as_str() == ADD {
        return Some(add(input));
    }
    let cause = format!("{handler} is no handler of this worker: it has {}", config.known_handlers().join(", "));
    Some(Err(Failure::new("UnknownHandler", cause)))
}
