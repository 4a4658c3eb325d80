//! Many devices in one process, and what they have come to.

use crate::device::{Device, DeviceSpec, Phase};
use crate::download;
use crate::faults::FaultTiming;
use ed25519_dalek::VerifyingKey;
use mqtt_connection::install_crypto_provider;
use mqtt_connection::{ConnectionSettings, Endpoint, Trust};
use protocol::settings::{self, SettingCommand, SettingValue, Settings};
use protocol::{ProtocolName, SettingName, ThingName};
use serde::Serialize;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::JoinHandle;

/// How many devices shake hands with the broker at the same time.
const HANDSHAKES: usize = 64;
/// How many updates an observer may fall behind before it misses some.
const UPDATES: usize = 4096;

/// Which updates of a device fail, whatever they are. What has failed so is counted in its storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailingUpdates {
    /// So many first ones.
    First(u32),
    /// All of them.
    Always,
}

impl FailingUpdates {
    /// Whether the next update fails, after so many that have.
    pub(crate) fn includes_next(self, failed: u32) -> bool {
        match self {
            Self::First(count) => failed < count,
            Self::Always => true,
        }
    }
}

impl std::str::FromStr for FailingUpdates {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "always" {
            return Ok(Self::Always);
        }
        text.parse().map(Self::First).map_err(|_| format!("{text:?}: expected a number of updates, or always"))
    }
}

/// The habits of a public device that is no device of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habits {
    /// Those of the public USP agent. It reports as its version what follows the last `/` of the image's address, query
    /// included; a path with `404` fails its download and one with `boot_error` its boot; after a failed boot it sends broken
    /// JSON, and after a failed download it still says that it has booted: version `404`.
    ReferenceAgent,
}

impl std::str::FromStr for Habits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reference-agent" => Ok(Self::ReferenceAgent),
            other => Err(format!("{other:?}: expected reference-agent")),
        }
    }
}

/// What all devices of a fleet have in common.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// The broker.
    pub endpoint: Endpoint,
    /// PEM file of the authority that the broker's certificate, and those of image servers, may come from; none:
    /// the system's.
    pub ca: Option<PathBuf>,
    /// The folder with one folder of state a device; none: beside its certificate.
    pub state: Option<PathBuf>,
    /// How many operations each device has to end before [`Fleet::outcomes`] returns.
    pub upgrades: usize,
    /// How long a step takes beside its real work.
    pub step_delay: Duration,
    /// How long after its first connection a device announces its first boot.
    pub first_boot_delay: Duration,
    /// How long after a setting has come a device answers it.
    pub answer_delay: Duration,
    /// What images must be signed with; none: signatures are not looked at.
    pub public_key: Option<VerifyingKey>,
    /// How strong the faults are.
    pub fault_timing: FaultTiming,
    /// Which updates fail in their transfer, and are reported; none: as the faults say.
    pub failing_updates: Option<FailingUpdates>,
    /// Whether devices say on `iot/device/data` how their updates have ended; those with failing updates always do.
    pub report_updates: bool,
    /// Whose habits the USP devices have; none: the simulator's own.
    pub habits: Option<Habits>,
}

impl FleetOptions {
    /// The defaults of the command line for a fleet.
    pub fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            ca: None,
            state: None,
            upgrades: 1,
            step_delay: Duration::from_secs(1),
            first_boot_delay: Duration::from_secs(30),
            answer_delay: Duration::from_secs(1),
            public_key: None,
            fault_timing: FaultTiming::default(),
            failing_updates: None,
            report_updates: false,
            habits: None,
        }
    }
}

/// How an operation ended, as its device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The device runs the new version and has said so.
    Succeeded,
    /// It does not.
    Failed,
    /// The cloud has cancelled it.
    Cancelled,
    /// Nothing came of it.
    None,
}

/// An operation that has ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EndedUpgrade {
    /// The device.
    pub thing: ThingName,
    /// Its protocol.
    pub protocol: ProtocolName,
    /// The version before.
    pub from: String,
    /// The version asked for; none if nothing was.
    pub to: Option<String>,
    /// From the command to the end, power cuts included.
    pub seconds: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless it succeeded.
    pub reason: Option<String>,
}

/// What an observer of a fleet is told.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceUpdate {
    /// A device does something else now.
    Phase {
        /// The device.
        thing: ThingName,
        /// What it does.
        phase: Phase,
    },
    /// An operation has ended.
    Ended(EndedUpgrade),
    /// A device has taken a setting over.
    Applied {
        /// The device.
        thing: ThingName,
        /// Which setting.
        name: SettingName,
        /// What it is set to now.
        value: SettingValue,
    },
}

/// A fleet cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(String);

impl StartError {
    #[expect(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
    pub(crate) fn new(reason: impl ToString) -> Self {
        Self(reason.to_string())
    }
}

/// What the devices of a fleet share.
pub(crate) struct Context {
    pub(crate) options: FleetOptions,
    pub(crate) http: reqwest::Client,
    things: Vec<ThingName>,
    board: Mutex<Board>,
    updates: broadcast::Sender<DeviceUpdate>,
    /// How many devices have not ended enough operations.
    waiting: watch::Sender<usize>,
    /// Whether any device has ever been connected.
    connected: watch::Sender<bool>,
}

#[derive(Default)]
struct Board {
    phases: Vec<Phase>,
    /// What each device runs.
    versions: Vec<String>,
    /// What each device is set to.
    settings: Vec<Settings>,
    /// How many settings each device has taken over.
    applied: Vec<usize>,
    ended: Vec<EndedUpgrade>,
    /// By device.
    ended_count: Vec<usize>,
    last_failure: Option<String>,
    last_warning: Option<Instant>,
}

impl Context {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_phase(&self, device: usize, phase: Phase) {
        if std::mem::replace(&mut self.board().phases[device], phase) == phase {
            return;
        }
        if phase == Phase::Idle {
            self.connected.send_replace(true);
        }
        // An error means that nobody observes.
        let _ = self.updates.send(DeviceUpdate::Phase { thing: self.things[device].clone(), phase });
    }

    pub(crate) fn set_version(&self, device: usize, version: String) {
        self.board().versions[device] = version;
    }

    pub(crate) fn set_settings(&self, device: usize, settings: Settings) {
        self.board().settings[device] = settings;
    }

    pub(crate) fn applied(&self, device: usize, command: &SettingCommand) {
        let SettingCommand { name, value, .. } = command;
        let mut board = self.board();
        board.settings[device].insert(name.clone(), value.clone());
        board.applied[device] += 1;
        drop(board);
        let thing = self.things[device].clone();
        let _ = self.updates.send(DeviceUpdate::Applied { thing, name: name.clone(), value: value.clone() });
    }

    pub(crate) fn all_ended(&self) -> Vec<EndedUpgrade> {
        self.board().ended.clone()
    }

    pub(crate) fn ended(&self, device: usize, ended: EndedUpgrade) {
        let reason = ended.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        tracing::info!("{}: {:?} after {:.1} s{reason}", ended.thing, ended.outcome, ended.seconds);
        let mut board = self.board();
        board.ended.push(ended.clone());
        board.ended_count[device] += 1;
        let is_done = board.ended_count[device] == self.options.upgrades;
        drop(board);
        let _ = self.updates.send(DeviceUpdate::Ended(ended));
        if is_done {
            self.waiting.send_modify(|waiting| *waiting -= 1);
        }
    }

    /// A device cannot go on: whatever is still expected of it has failed.
    pub(crate) fn broken(&self, device: usize, spec: &DeviceSpec, why: &str) {
        tracing::error!("{}: {why}", spec.thing);
        self.set_phase(device, Phase::Offline);
        let ended = EndedUpgrade {
            thing: spec.thing.clone(),
            protocol: spec.protocol,
            from: self.board().versions[device].clone(),
            to: None,
            seconds: 0.0,
            outcome: Outcome::Failed,
            reason: Some(why.to_owned()),
        };
        let missing = self.options.upgrades.saturating_sub(self.board().ended_count[device]);
        for _ in 0..missing.max(1) {
            self.ended(device, ended.clone());
        }
    }

    /// A fleet that loses its broker says so about once a second, not once a device.
    fn connection_failed(&self, why: &str) {
        let mut board = self.board();
        board.last_failure = Some(why.to_owned());
        if board.last_warning.is_none_or(|at| at.elapsed() > Duration::from_secs(1)) {
            board.last_warning = Some(Instant::now());
            tracing::warn!("no connection: {why}");
        } else {
            tracing::debug!("no connection: {why}");
        }
    }
}

/// Running devices. Dropping it takes the power from all of them.
pub struct Fleet {
    context: Arc<Context>,
    devices: Vec<Arc<Device>>,
    by_thing: HashMap<ThingName, usize>,
    tasks: Mutex<Vec<Option<JoinHandle<()>>>>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten() {
            task.abort();
        }
    }
}

impl Fleet {
    /// Switches all devices on. Fails if a certificate, a key or the trusted authority cannot be read, or a thing
    /// is named twice. Must be called on a Tokio runtime.
    pub fn start(options: FleetOptions, specs: Vec<DeviceSpec>) -> Result<Self, StartError> {
        install_crypto_provider();
        let trust = Trust::new(options.ca.as_deref()).map_err(StartError::new)?;
        let context = Arc::new(context(options, &specs)?);
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let mut devices: Vec<Arc<Device>> = Vec::with_capacity(specs.len());
        let mut by_thing = HashMap::new();
        for (index, spec) in specs.into_iter().enumerate() {
            if by_thing.insert(spec.thing.clone(), index).is_some() {
                return Err(StartError(format!("the thing {} is named twice", spec.thing)));
            }
            let connection = Arc::new(connection(&spec, &context, &trust, &handshakes)?);
            devices.push(Arc::new(device(index, spec, Arc::clone(&context), connection)));
        }
        let tasks = devices.iter().map(|device| Some(tokio::spawn(Arc::clone(device).run()))).collect();
        Ok(Self { context, devices, by_thing, tasks: Mutex::new(tasks) })
    }

    /// Every change from now on, in order. A receiver that falls behind by some thousand misses some.
    pub fn observe(&self) -> broadcast::Receiver<DeviceUpdate> {
        self.context.updates.subscribe()
    }

    /// How many devices are in each phase, in the order of [`Phase::ALL`].
    pub fn phases(&self) -> [usize; Phase::ALL.len()] {
        let board = self.context.board();
        Phase::ALL.map(|phase| board.phases.iter().filter(|other| **other == phase).count())
    }

    /// The version that a device runs, as its storage says.
    pub fn version(&self, thing: &ThingName) -> Option<String> {
        let index = *self.by_thing.get(thing)?;
        Some(self.context.board().versions[index].clone())
    }

    /// What a device is set to, as its storage says.
    pub fn settings(&self, thing: &ThingName) -> Settings {
        let index = self.by_thing.get(thing);
        index.map(|&index| self.context.board().settings[index].clone()).unwrap_or_default()
    }

    /// How many settings a device has taken over in this run; repeats of an operation do not count.
    pub fn applied(&self, thing: &ThingName) -> usize {
        self.by_thing.get(thing).map(|&index| self.context.board().applied[index]).unwrap_or_default()
    }

    /// How many settings all devices have taken over in this run.
    pub fn total_applied(&self) -> usize {
        self.context.board().applied.iter().sum()
    }

    /// What has ended so far, in that order.
    pub fn ended(&self) -> Vec<EndedUpgrade> {
        self.context.all_ended()
    }

    /// Waits until each device has ended as many operations as the options ask for.
    pub async fn outcomes(&self) -> Vec<EndedUpgrade> {
        // The sender is in the context, which is ours.
        let _ = self.context.waiting.subscribe().wait_for(|waiting| *waiting == 0).await;
        self.ended()
    }

    /// Waits until any device has been connected; after `patience` without one fails with what went wrong last.
    pub async fn connected(&self, patience: Duration) -> Result<(), StartError> {
        let mut connected = self.context.connected.subscribe();
        let result = tokio::time::timeout(patience, connected.wait_for(|connected| *connected)).await.map(|_| ());
        result.map_err(|_| {
            let why = self.context.board().last_failure.clone();
            let why = why.unwrap_or_else(|| format!("{} does not answer", self.context.options.endpoint));
            StartError(format!("no device could connect within {patience:?}; the last failure: {why}"))
        })
    }

    /// Cuts a device's power; true if it had any. Returns when nothing of it runs any more.
    pub async fn power_off(&self, thing: &ThingName) -> bool {
        let Some(&index) = self.by_thing.get(thing) else { return false };
        let Some(task) = self.tasks.lock().unwrap_or_else(PoisonError::into_inner)[index].take() else { return false };
        task.abort();
        // An error here is the abortion that was asked for.
        let _ = task.await;
        self.context.set_phase(index, Phase::Offline);
        true
    }

    /// Gives a device its power back; it goes on from what is on its disk. True if it had none.
    pub fn power_on(&self, thing: &ThingName) -> bool {
        let Some(&index) = self.by_thing.get(thing) else { return false };
        let task = &mut self.tasks.lock().unwrap_or_else(PoisonError::into_inner)[index];
        if task.is_some() {
            return false;
        }
        *task = Some(tokio::spawn(Arc::clone(&self.devices[index]).run()));
        true
    }

    /// Switches all devices off and returns what has ended.
    pub async fn stop(self) -> Vec<EndedUpgrade> {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks.iter().flatten() {
            task.abort();
        }
        for task in tasks.into_iter().flatten() {
            let _ = task.await;
        }
        self.ended()
    }
}

pub(crate) fn context(options: FleetOptions, specs: &[DeviceSpec]) -> Result<Context, StartError> {
    let ca = options.ca.as_ref().map(std::fs::read).transpose().map_err(StartError::new)?;
    let http = download::client(ca.as_deref()).map_err(StartError::new)?;
    let waiting = if options.upgrades == 0 { 0 } else { specs.len() };
    let board = Board {
        phases: vec![Phase::Offline; specs.len()],
        versions: specs.iter().map(|spec| spec.firmware_version.clone()).collect(),
        settings: vec![Settings::new(); specs.len()],
        applied: vec![0; specs.len()],
        ended_count: vec![0; specs.len()],
        ..Board::default()
    };
    Ok(Context {
        options,
        http,
        things: specs.iter().map(|spec| spec.thing.clone()).collect(),
        board: Mutex::new(board),
        updates: broadcast::Sender::new(UPDATES),
        waiting: watch::Sender::new(waiting),
        connected: watch::Sender::new(false),
    })
}

fn connection(
    spec: &DeviceSpec,
    context: &Arc<Context>,
    trust: &Trust,
    handshakes: &Arc<Semaphore>,
) -> Result<ConnectionSettings, StartError> {
    let endpoint = context.options.endpoint.clone();
    let [certificate, key] = ["certificate.pem", "private.key"].map(|name| spec.certificates.join(name));
    let tls = trust.of_client(&certificate, &key, endpoint.port).map_err(StartError::new)?;
    let context = Arc::clone(context);
    Ok(ConnectionSettings {
        client_id: spec.thing.to_string(),
        endpoint,
        tls,
        clean_session: false,
        filters: vec![spec.protocol.encoding().command_filter(&spec.thing), settings::request_topic(&spec.thing)],
        handshakes: Arc::clone(handshakes),
        on_failure: Box::new(move |why| context.connection_failed(why)),
    })
}

pub(crate) fn device(
    index: usize,
    spec: DeviceSpec,
    context: Arc<Context>,
    connection: Arc<ConnectionSettings>,
) -> Device {
    let folder = match &context.options.state {
        Some(parent) => parent.join(spec.thing.as_str()),
        None => spec.certificates.clone(),
    };
    Device {
        index,
        spec,
        context,
        connection,
        folder,
        held: Mutex::new(None),
        was_cut: AtomicBool::new(false),
        has_left: AtomicBool::new(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_updates_are_a_number_or_always() {
        assert_eq!("3".parse(), Ok(FailingUpdates::First(3)));
        assert_eq!("always".parse(), Ok(FailingUpdates::Always));
        for wrong in ["", "never", "-1", "1.5", "Always", "4294967296"] {
            let error = wrong.parse::<FailingUpdates>().unwrap_err();
            assert_eq!(error, format!("{wrong:?}: expected a number of updates, or always"));
        }
    }

    #[test]
    fn the_first_updates_fail_or_all_of_them() {
        let failing = |updates: FailingUpdates| [0, 1, 2, 1000].map(|failed| updates.includes_next(failed));
        assert_eq!(failing(FailingUpdates::First(2)), [true, true, false, false]);
        assert_eq!(failing(FailingUpdates::First(0)), [false; 4]);
        assert_eq!(failing(FailingUpdates::Always), [true; 4]);
    }
}
