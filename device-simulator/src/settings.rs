//! A device's part in a configuration push: it takes each setting over once, and answers as often as it is asked.

use crate::device::{Life, Task, other_operation};
use crate::storage::StorageError;
use crate::{Fault, now_milliseconds};
use protocol::settings::{SettingCommand, SettingOutcome, SettingResponse};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// What a device says when it does not want to.
const REQUEST_DENIED: &str = "7002";

/// Answers that wait for their time, by that time. A device that boots has forgotten them: the cloud asks again.
#[derive(Default)]
pub(crate) struct Answers(VecDeque<(Instant, SettingResponse)>);

impl Answers {
    /// Adds an answer, unless one to that operation waits already. Each `delay` must be the same.
    pub(crate) fn add(&mut self, answer: SettingResponse, delay: Duration) {
        if !self.0.iter().any(|(_, waiting)| waiting.operation_id == answer.operation_id) {
            self.0.push_back((Instant::now() + delay, answer));
        }
    }

    /// Waits for the next answer's time. Nothing is lost when the future is dropped.
    pub(crate) async fn due(&mut self) -> SettingResponse {
        if let Some((at, _)) = self.0.front() {
            sleep_until(*at).await;
        }
        match self.0.pop_front() {
            Some((_, answer)) => answer,
            None => std::future::pending().await,
        }
    }
}

impl Life<'_> {
    /// Takes a setting over, unless the same operation has set it before, and decides on the answer.
    pub(crate) fn receive_setting(&self, payload: &[u8]) -> Result<Task, StorageError> {
        let (thing, device) = (self.thing(), self.device);
        let command = match SettingCommand::decode(payload) {
            Ok(command) => command,
            Err(error) => {
                tracing::warn!("{thing} <- a message that is no setting: {error}");
                return Ok(Task::Nothing);
            }
        };
        let SettingCommand { operation_id, name, value } = &command;
        tracing::info!("{thing} <- {name} {value} ({operation_id})");
        if self.has(Fault::Mute) {
            return Ok(Task::Nothing);
        }
        if self.has(Fault::Refuse) {
            return Ok(answer(command, SettingOutcome::Fail { error: REQUEST_DENIED.into() }));
        }
        if self.storage.set(&command)? {
            device.context.applied(device.index, &command);
        } else {
            tracing::info!("{thing}: {operation_id} is a repeat and sets nothing");
        }
        let outcome = SettingOutcome::Success { value: Some(value.clone()) };
        Ok(answer(command, outcome))
    }

    /// How long after a setting has come it is answered.
    pub(crate) fn answer_delay(&self) -> Duration {
        let options = &self.device.context.options;
        let extra = if self.has(Fault::Delay) { options.fault_timing.delay } else { Duration::ZERO };
        options.answer_delay + extra
    }

    /// Sends an answer, with whatever the device's faults do to it.
    pub(crate) fn answer(&self, mut answer: SettingResponse) {
        let device = self.device;
        if self.has(Fault::Disconnect) && !device.has_left.swap(true, Ordering::Relaxed) {
            return self.connection.leave(device.context.options.fault_timing.offline_for);
        }
        if self.has(Fault::WrongOperation) {
            answer.operation_id = other_operation(&answer.operation_id);
        }
        let (thing, name, id) = (self.thing(), &answer.name, &answer.operation_id);
        let times = if self.has(Fault::Duplicate) { 2 } else { 1 };
        for _ in 0..times {
            match &answer.outcome {
                SettingOutcome::Success { value } => {
                    let value = value.as_ref().map(|value| format!(" {value}")).unwrap_or_default();
                    tracing::info!("{thing} -> {name} SUCCESS{value} ({id})");
                }
                SettingOutcome::Fail { error } => tracing::info!("{thing} -> {name} FAIL {error} ({id})"),
            }
            self.connection.post(answer.encode(thing, now_milliseconds()));
        }
    }
}

fn answer(command: SettingCommand, outcome: SettingOutcome) -> Task {
    Task::Answer(SettingResponse { operation_id: command.operation_id, name: command.name, outcome })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer_to(operation: &str) -> SettingResponse {
        SettingResponse {
            operation_id: operation.parse().unwrap(),
            name: "SET_TEMP".parse().unwrap(),
            outcome: SettingOutcome::Success { value: None },
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_operation_has_one_answer_under_way_and_can_be_answered_again_afterwards() {
        let delay = Duration::from_secs(10);
        let begin = Instant::now();
        let mut answers = Answers::default();
        for operation in ["p.SET_TEMP", "p.SET_MODE", "p.SET_TEMP"] {
            answers.add(answer_to(operation), delay);
        }
        assert_eq!(answers.due().await, answer_to("p.SET_TEMP"));
        assert!(begin.elapsed() >= delay);
        assert_eq!(answers.due().await, answer_to("p.SET_MODE"));
        assert!(tokio::time::timeout(delay, answers.due()).await.is_err());
        answers.add(answer_to("p.SET_TEMP"), delay);
        // A device that does something else in the meantime loses nothing.
        assert!(tokio::time::timeout(delay / 10, answers.due()).await.is_err());
        assert_eq!(answers.due().await, answer_to("p.SET_TEMP"));
        assert!(begin.elapsed() >= delay * 3);
    }
}
