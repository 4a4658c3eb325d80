//! What the end-to-end tests share: the deployed stack, jobs on it, and a device that does exactly what a test says.

mod attempts;
mod cloud;
mod crash;
mod mqtt_device;
mod outage;
mod proxy;
mod pushes;
mod recoveries;
mod scripted_device;
mod workers;

pub use attempts::{Attempt, Credential, allows, credential};
pub use cloud::{Cloud, Ended, Image, kill_functions, meeting, names, with_faults};
pub use crash::{Crash, crashing};
pub use mqtt_device::MqttDevice;
pub use outage::{Outage, Refusal, refusing};
pub use proxy::Proxy;
pub use pushes::{Pushed, settings_api};
pub use recoveries::ORIGINAL;
pub use scripted_device::ScriptedDevice;
pub use workers::{PlainWorker, WorkerProcess, alone, await_job};

/// How long a test waits for something that must happen before it says that it did not.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_mins(5);

/// Floods and storms on one side, tests with deadlines of seconds on the other.
static MACHINE: tokio::sync::RwLock<()> = tokio::sync::RwLock::const_new(());

/// Waits until no other test of this process has the machine for itself.
pub async fn undisturbed() -> tokio::sync::RwLockReadGuard<'static, ()> {
    MACHINE.read().await
}

/// Waits until no other test of this process wants to be undisturbed.
pub async fn without_others() -> tokio::sync::RwLockWriteGuard<'static, ()> {
    MACHINE.write().await
}

/// Chooses numbers below a bound, the same ones for the same seed, which is printed.
pub fn seeded_choices() -> impl FnMut(u64) -> u64 {
    let seed: u64 = std::env::var("FLEETFLOW_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    println!("seed {seed} (set FLEETFLOW_SEED for another)");
    let mut random = seed;
    move |bound| {
        // A multiplicative congruential generator is random enough to choose among a few moves.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    }
}

/// Now, in Unix milliseconds.
pub fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_millis()).expect("before the end of time")
}

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
