//! What the end-to-end tests share: the deployed stack, jobs on it, and a device that does exactly what a test says.

mod cloud;
mod mqtt_device;
mod pushes;
mod scripted_device;

pub use cloud::{Cloud, Ended, Image, kill_functions, names, with_faults};
pub use mqtt_device::MqttDevice;
pub use pushes::{Pushed, settings_api};
pub use scripted_device::ScriptedDevice;

/// How long a test waits for something that must happen before it says that it did not.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_mins(5);

/// Asks again and again until there is an answer; panics with `what` when [`PATIENCE`] is at its end.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let begin = std::time::Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}
