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
mod terminal;
mod usp_agent;
mod workers;

use std::cell::RefCell;
use std::time::{Duration, Instant};

pub use attempts::{Attempt, Connection, Credential, allows, credential};
pub use cloud::{Cloud, Ended, Image, kill_functions, meeting, names, random_bytes, statuses, with_faults};
pub use crash::{Crash, crashing};
pub use mqtt_device::MqttDevice;
pub use outage::{Outage, Refusal, refusing};
pub use proxy::Proxy;
pub use pushes::{Pushed, settings_api};
pub use recoveries::ORIGINAL;
pub use scripted_device::ScriptedDevice;
pub use terminal::{ProcessGroup, terminal};
pub use usp_agent::{UspAgent, UspMessage};
pub use workers::{PlainWorker, WorkerProcess, alone, await_job};

/// How long a test waits for something that must happen before it says that it did not.
pub const PATIENCE: Duration = Duration::from_mins(10);

/// What is told of a look that was in vain, in bytes.
const MAX_SENTENCE: usize = 4000;

tokio::task_local! {
    /// What the look that is under way has seen.
    static SEEN: RefCell<Vec<String>>;
}

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

/// Notes what a look at the cloud has seen; a wait that ends in vain tells it. Outside of a wait it does nothing.
pub fn saw(what: impl Into<String>) {
    let _ = SEEN.try_with(|seen| seen.borrow_mut().push(what.into()));
}

/// Asks once: the answer, and what was seen.
pub async fn noted<T, F: Future<Output = T>>(ask: impl FnOnce() -> F) -> (T, String) {
    SEEN.scope(RefCell::default(), async { (ask().await, SEEN.with(RefCell::take).join("; ")) }).await
}

/// What a wait says at its time-out.
pub fn in_vain(limit: Duration, what: &str, seen: &str) -> String {
    let mut sentence = format!("waited {limit:?} in vain: {what}; the last look saw: {seen}");
    sentence.truncate(sentence.floor_char_boundary(MAX_SENTENCE));
    sentence
}

/// Asks again and again until there is an answer; at the time-out says what the last look saw. So each look that has no
/// answer yet must note something.
pub async fn look<T, F: Future<Output = Option<T>>>(
    limit: Duration,
    interval: Duration,
    what: &str,
    mut ask: impl FnMut() -> F,
) -> Result<T, String> {
    let begin = Instant::now();
    loop {
        let (answer, seen) = noted(&mut ask).await;
        if let Some(answer) = answer {
            return Ok(answer);
        }
        assert!(!seen.is_empty(), "{what}: a look notes nothing of what it sees (tests::saw)");
        if begin.elapsed() >= limit {
            return Err(in_vain(limit, what, &seen));
        }
        tokio::time::sleep(interval).await;
    }
}

/// Asks again and again until there is an answer; panics with what the last look saw when [`PATIENCE`] is at its end.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, ask: impl FnMut() -> F) -> T {
    let answer = look(PATIENCE, Duration::from_millis(500), what, ask).await;
    answer.unwrap_or_else(|sentence| panic!("{sentence}"))
}
