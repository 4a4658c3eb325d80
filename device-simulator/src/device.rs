//! One device: what it does with a command, from the first boot to the next, over every reboot and power cut.

use crate::download::{self, Download, DownloadError, ImageFailure};
use crate::fleet::{Context, EndedUpgrade, Habits, Outcome};
use crate::now_milliseconds;
use crate::settings::Answers;
use crate::storage::{Operation, OperationPhase, Storage, StorageError};
use crate::{CutPoint, Fault, Faults};
use mqtt_connection::{Connection, ConnectionSettings, Delivery};
use percent_encoding::percent_decode_str;
use protocol::recovery::{UpdateReport, UpdateStatus};
use protocol::settings::{self, SettingResponse};
use protocol::{
    Command, DeviceFailure, DeviceProtocol, Firmware, OperationId, ProtocolName, Publication, ReplyTo, Response, Step,
    StepOutcome, ThingName, redacted,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::select;
use tokio::time::sleep;

/// The folder of a device cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path} is no folder of a device: {reason}")]
pub struct UnreadableFolder {
    path: String,
    reason: String,
}

impl UnreadableFolder {
    fn new(path: &Path, reason: &dyn std::fmt::Display) -> Self {
        Self { path: path.display().to_string(), reason: reason.to_string() }
    }
}

/// `device.json`: what a device is from the factory.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Identity {
    pub(crate) thing: ThingName,
    pub(crate) protocol: ProtocolName,
    pub(crate) firmware_version: String,
    /// The certificate's id in the registry, when provisioning has made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) certificate_id: Option<String>,
    /// Further attributes of the thing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) attributes: BTreeMap<String, String>,
}

impl Identity {
    pub(crate) const FILE: &str = "device.json";

    pub(crate) fn read(folder: &Path) -> Result<Self, UnreadableFolder> {
        let path = folder.join(Self::FILE);
        let bytes = std::fs::read(&path).map_err(|error| UnreadableFolder::new(&path, &error))?;
        serde_json::from_slice(&bytes).map_err(|error| UnreadableFolder::new(&path, &error))
    }
}

/// A device to run.
#[derive(Debug, Clone)]
pub struct DeviceSpec {
    /// Its name in the registry, which is its client id.
    pub thing: ThingName,
    /// How it encodes its messages.
    pub protocol: ProtocolName,
    /// The folder with its `certificate.pem` and `private.key`.
    pub certificates: PathBuf,
    /// The version that it left the factory with.
    pub firmware_version: String,
    /// The attributes that the thing was given, beside those of every device.
    pub attributes: BTreeMap<String, String>,
    /// What goes wrong with it.
    pub faults: Faults,
}

impl DeviceSpec {
    /// The device in a folder that `provision` has written.
    pub fn load(folder: &Path) -> Result<Self, UnreadableFolder> {
        let Identity { thing, protocol, firmware_version, attributes, .. } = Identity::read(folder)?;
        let (certificates, faults) = (folder.to_owned(), Faults::default());
        Ok(Self { thing, protocol, certificates, firmware_version, attributes, faults })
    }

    /// All devices below a folder, by name.
    pub fn load_all(parent: &Path) -> Result<Vec<Self>, UnreadableFolder> {
        let unreadable = |error: io::Error| UnreadableFolder::new(parent, &error);
        let mut devices = Vec::new();
        for entry in std::fs::read_dir(parent).map_err(unreadable)? {
            let folder = entry.map_err(unreadable)?.path();
            if folder.join(Identity::FILE).exists() {
                devices.push(Self::load(&folder)?);
            }
        }
        devices.sort_by(|a, b| a.thing.cmp(&b.thing));
        Ok(devices)
    }
}

/// What a device is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It has no connection, or no power.
    Offline,
    /// It is connected and has nothing to do.
    Idle,
    /// It has accepted a command.
    Started,
    /// The image is coming.
    Downloading,
    /// The image is there and being checked and installed.
    Transferred,
    /// The image is in its slot.
    Installed,
    /// It reboots, or has just booted.
    Rebooting,
}

impl Phase {
    /// Every phase, in the order of an upgrade.
    pub const ALL: [Self; 7] = [
        Self::Offline,
        Self::Idle,
        Self::Started,
        Self::Downloading,
        Self::Transferred,
        Self::Installed,
        Self::Rebooting,
    ];

    /// One lower-case word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::Idle => "idle",
            Self::Started => "started",
            Self::Downloading => "downloading",
            Self::Transferred => "installing",
            Self::Installed => "installed",
            Self::Rebooting => "rebooting",
        }
    }
}

/// What comes after a piece of work.
enum Next {
    /// Waiting for the next command.
    Idle,
    /// A boot.
    Reboot,
    /// Darkness for a while.
    PowerCut,
}

/// An operation under way; dropping it stops it where it is.
type Upgrade<'a> = Pin<Box<dyn Future<Output = Result<Next, StorageError>> + Send + 'a>>;

/// What a received command asks of the life that it came into.
pub(crate) enum Task {
    Nothing,
    Begin,
    Cancel,
    /// Say that, when its time has come.
    Answer(SettingResponse),
}

/// A device with what outlasts its reboots.
pub(crate) struct Device {
    /// Its place in the fleet.
    pub(crate) index: usize,
    pub(crate) spec: DeviceSpec,
    pub(crate) context: Arc<Context>,
    pub(crate) connection: Arc<ConnectionSettings>,
    /// Where its storage is.
    pub(crate) folder: PathBuf,
    /// The report that is held back to be overtaken.
    pub(crate) held: Mutex<Option<Publication>>,
    /// Whether its power has been cut on purpose: that happens once.
    pub(crate) was_cut: AtomicBool,
    /// Whether it has closed its connection on purpose: that happens once.
    pub(crate) has_left: AtomicBool,
}

impl Device {
    /// Runs the device until its storage fails or the future is dropped, which is a power cut too.
    pub(crate) async fn run(self: Arc<Self>) {
        let timing = self.context.options.fault_timing;
        self.take_held();
        if self.spec.faults.has(Fault::Offline) {
            tracing::info!("{}: offline for {:?}", self.spec.thing, timing.offline_for);
            sleep(timing.offline_for).await;
        }
        loop {
            match self.live().await {
                Ok(Next::PowerCut) => {
                    self.take_held();
                    self.context.set_phase(self.index, Phase::Offline);
                    tracing::info!("{}: power cut, back in {:?}", self.spec.thing, timing.offline_for);
                    sleep(timing.offline_for).await;
                }
                Ok(Next::Reboot | Next::Idle) => {
                    self.context.set_phase(self.index, Phase::Rebooting);
                    tracing::info!("{}: rebooting", self.spec.thing);
                    sleep(self.context.options.step_delay).await;
                }
                Err(error) => return self.context.broken(self.index, &self.spec, &error.to_string()),
            }
        }
    }

    /// From a boot to the next.
    async fn live(&self) -> Result<Next, StorageError> {
        let storage = Storage::open(&self.folder, &self.spec.firmware_version)?;
        self.context.set_version(self.index, storage.state().version());
        self.context.set_settings(self.index, storage.state().settings);
        let (connection, mut inbox) = Connection::open(Arc::clone(&self.connection));
        let life = Life { device: self, storage: &storage, connection: &connection };
        let mut online = connection.online();
        let mut upgrade: Option<Upgrade<'_>> = None;
        if storage.operation().is_some() {
            upgrade = Some(Box::pin(life.upgrade()));
        }
        let mut answers = Answers::default();
        let mut announced = storage.state().announced;
        let mut announcement = pin!(life.announce_first_boot());
        loop {
            select! {
                Some(delivery) = inbox.recv() => match life.receive(delivery)? {
                    Task::Nothing => {}
                    Task::Begin => upgrade = Some(Box::pin(life.upgrade())),
                    Task::Cancel => upgrade = None,
                    Task::Answer(answer) => answers.add(answer, life.answer_delay()),
                },
                answer = answers.due() => life.answer(answer),
                next = of_some(&mut upgrade) => match next? {
                    Next::Idle => upgrade = None,
                    next => return Ok(next),
                },
                result = &mut announcement, if !announced => {
                    result?;
                    announced = true;
                }
                Ok(()) = online.changed() => {}
            }
            if upgrade.is_none() {
                life.show_presence();
            }
        }
    }

    fn take_held(&self) -> Option<Publication> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the power is to be cut now.
    fn is_cut(&self, point: CutPoint) -> bool {
        self.spec.faults.power_cut() == Some(point) && !self.was_cut.swap(true, Ordering::Relaxed)
    }
}

/// The output of a future that may not be there; then there is never one.
async fn of_some<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// The time between two boots.
#[derive(Clone, Copy)]
pub(crate) struct Life<'a> {
    pub(crate) device: &'a Device,
    pub(crate) storage: &'a Storage,
    pub(crate) connection: &'a Connection,
}

impl Life<'_> {
    pub(crate) fn thing(&self) -> &ThingName {
        &self.device.spec.thing
    }

    fn encoding(&self) -> &'static dyn DeviceProtocol {
        self.device.spec.protocol.encoding()
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.device.spec.faults.has(fault)
    }

    /// Whether the device behaves as the public USP agent.
    fn is_reference_agent(&self) -> bool {
        let is_usp = self.device.spec.protocol == ProtocolName::Usp;
        is_usp && self.device.context.options.habits == Some(Habits::ReferenceAgent)
    }

    /// Whether the image's path makes the public USP agent fail.
    fn is_failed_by_path(&self, operation: &Operation, word: &str) -> bool {
        let path = reqwest::Url::parse(&operation.firmware.url).map(|url| url.path().to_owned()).unwrap_or_default();
        self.is_reference_agent() && percent_decode_str(&path).decode_utf8_lossy().contains(word)
    }

    fn show(&self, phase: Phase) {
        self.device.context.set_phase(self.device.index, phase);
    }

    fn show_presence(&self) {
        self.show(if *self.connection.online().borrow() { Phase::Idle } else { Phase::Offline });
    }

    async fn announce_first_boot(self) -> Result<(), StorageError> {
        // Fails only when the connection has ended, and then this future has too.
        let _ = self.connection.online().wait_for(|online| *online).await;
        sleep(self.device.context.options.first_boot_delay).await;
        let version = self.storage.state().version();
        tracing::info!("{} -> first boot, version {version}", self.thing());
        self.connection.publish(self.encoding().encode_boot(self.thing(), &version, now_milliseconds())).await;
        self.storage.update(|state| state.announced = true)
    }

    /// Takes a message in; it is acknowledged once everything to be remembered of it is on disk.
    fn receive(&self, delivery: Delivery) -> Result<Task, StorageError> {
        let (topic, payload) = (delivery.topic(), delivery.payload());
        let task = if topic == settings::request_topic(self.thing()) {
            self.receive_setting(payload)?
        } else {
            self.receive_command(topic, payload)?
        };
        delivery.acknowledge();
        Ok(task)
    }

    fn receive_command(&self, topic: &str, payload: &[u8]) -> Result<Task, StorageError> {
        match self.encoding().decode_command(topic, payload) {
            Ok(Some(received)) => match received.command {
                Command::Download { operation_id, firmware } => {
                    self.receive_download(operation_id, firmware, received.reply_to)
                }
                Command::CancelDownload { operation_id } => self.receive_cancel(&operation_id),
            },
            Ok(None) => Ok(Task::Nothing),
            Err(error) => {
                tracing::warn!("{} <- a message on {topic} that is no command: {error}", self.thing());
                Ok(Task::Nothing)
            }
        }
    }

    fn receive_download(&self, id: OperationId, firmware: Firmware, reply_to: ReplyTo) -> Result<Task, StorageError> {
        let thing = self.thing();
        tracing::info!("{thing} <- download {} ({id})", firmware.version);
        let state = self.storage.state();
        if self.storage.renew(&id, &firmware.url)? {
            tracing::info!("{thing}: {id} goes on with a fresh address");
            return Ok(Task::Begin);
        }
        if state.has_seen(&id) {
            tracing::info!("{thing}: {id} is a repeat and starts nothing");
            self.repeat_acceptance(state.operation.filter(|running| running.id == id));
            return Ok(Task::Nothing);
        }
        if self.has(Fault::Mute) {
            self.storage.update(|state| state.see(&id))?;
            let reason = Some("mute: commands are not answered".to_owned());
            let (from, to) = (state.version(), Some(firmware.version));
            self.device.context.ended(self.device.index, self.ended(from, to, 0, Outcome::None, reason));
            return Ok(Task::Nothing);
        }
        if let Some(running) = state.operation {
            self.refuse_second(id, &reply_to, &running);
            return Ok(Task::Nothing);
        }
        self.storage.begin(id, firmware, reply_to, now_milliseconds())?;
        if self.has(Fault::Refuse) {
            self.fail(Step::DownloadStarted, &ImageFailure::Denied("Request denied".into()))?;
        }
        Ok(Task::Begin)
    }

    /// The cloud asks again when it has not heard the first answer.
    fn repeat_acceptance(&self, running: Option<Operation>) {
        let Some(operation) = running else { return };
        let is_accepted = !matches!(operation.phase, OperationPhase::Started | OperationPhase::Failed { .. });
        // A repeat must not make up for a report that is lost or late on purpose.
        let step = Step::DownloadStarted;
        if is_accepted
            && !self.has(Fault::Drop(step))
            && !self.has(Fault::Reorder(step))
            && let Some(publication) = self.encode(&operation, step, succeeded(None))
        {
            // One answer is enough for a burst of repeats.
            self.connection.post_if_idle(publication);
        }
    }

    fn refuse_second(&self, operation_id: OperationId, reply_to: &ReplyTo, running: &Operation) {
        let failure = ImageFailure::Denied(format!("Request denied: operation {} is running", running.id));
        let outcome = StepOutcome::Failed(failure.report(self.device.spec.protocol));
        let response = Response { operation_id, step: Step::DownloadStarted, outcome };
        self.log_response(&response);
        self.post(self.encoding().encode_response(self.thing(), &response, reply_to, now_milliseconds()));
    }

    fn receive_cancel(&self, id: &OperationId) -> Result<Task, StorageError> {
        let thing = self.thing();
        tracing::info!("{thing} <- cancel ({id})");
        let Some(operation) = self.storage.operation().filter(|running| running.id == *id) else {
            // Its download command may still come, and must then start nothing.
            if !self.storage.state().has_seen(id) {
                self.storage.update(|state| state.see(id))?;
            }
            return Ok(Task::Nothing);
        };
        if !matches!(
            operation.phase,
            OperationPhase::Started
                | OperationPhase::Downloading
                | OperationPhase::AddressExpired { .. }
                | OperationPhase::Transferred
        ) {
            tracing::info!("{thing}: {id} cannot be cancelled any more");
            return Ok(Task::Nothing);
        }
        self.end(&operation, Outcome::Cancelled, None)?;
        Ok(Task::Cancel)
    }

    /// Goes on with the operation on disk until it ends or the device has to boot.
    async fn upgrade(self) -> Result<Next, StorageError> {
        while let Some(operation) = self.storage.operation() {
            match self.step(&operation).await? {
                Next::Idle => {}
                next => return Ok(next),
            }
        }
        if let Some(held) = self.device.take_held() {
            self.connection.publish(held).await;
        }
        Ok(Next::Idle)
    }

    /// Does what the operation's phase asks for and sets the next one. Reports go out before that, so a power
    /// cut repeats a report rather than losing it.
    async fn step(&self, operation: &Operation) -> Result<Next, StorageError> {
        let device = self.device;
        match &operation.phase {
            OperationPhase::Started => {
                self.show(Phase::Started);
                if device.is_cut(CutPoint::Started) {
                    return Ok(Next::PowerCut);
                }
                self.report(operation, Step::DownloadStarted, succeeded(None)).await;
                self.storage.update(|state| state.set_phase(OperationPhase::Downloading))?;
            }
            OperationPhase::Downloading => {
                self.show(Phase::Downloading);
                return self.download(operation).await;
            }
            OperationPhase::AddressExpired { failure } => {
                self.report(operation, Step::FirmwareTransferred, StepOutcome::Failed(failure.clone())).await;
                // The same command with a fresh address, or a cancellation, ends this wait.
                std::future::pending::<()>().await;
            }
            OperationPhase::Transferred => {
                self.show(Phase::Transferred);
                if device.is_cut(CutPoint::Transferred) {
                    return Ok(Next::PowerCut);
                }
                self.report(operation, Step::FirmwareTransferred, succeeded(None)).await;
                sleep(device.context.options.step_delay).await;
                self.install(operation).await?;
            }
            OperationPhase::Installed => {
                self.show(Phase::Installed);
                if device.is_cut(CutPoint::Installed) {
                    return Ok(Next::PowerCut);
                }
                self.report(operation, Step::DownloadOperationDone, succeeded(None)).await;
                self.storage.activate()?;
                return Ok(if device.is_cut(CutPoint::Activated) { Next::PowerCut } else { Next::Reboot });
            }
            OperationPhase::Activated => {
                self.show(Phase::Rebooting);
                self.boot(operation).await?;
            }
            OperationPhase::Failed { step, failure } => {
                self.report(operation, *step, StepOutcome::Failed(failure.clone())).await;
                if *step == Step::FirmwareTransferred && self.is_reference_agent() {
                    self.report(operation, Step::DownloadOperationDone, StepOutcome::Failed(failure.clone())).await;
                    self.report(operation, Step::DeviceRebooted, succeeded(Some("404".to_owned()))).await;
                }
                self.report_update(operation, UpdateStatus::Failed).await?;
                self.end(operation, Outcome::Failed, Some(reason(*step, failure)))?;
            }
        }
        Ok(Next::Idle)
    }

    async fn download(&self, operation: &Operation) -> Result<Next, StorageError> {
        if self.shall_fail() {
            let failure = ImageFailure::Status(404).report(self.device.spec.protocol);
            self.storage.fail_on_purpose(Step::FirmwareTransferred, failure)?;
            return Ok(Next::Idle);
        }
        let context = &self.device.context;
        let download = Download {
            client: &context.http,
            firmware: &operation.firmware,
            partial: &self.storage.partial(),
            public_key: context.options.public_key,
            rate: self.has(Fault::Slow).then_some(context.options.fault_timing.slow_rate),
        };
        let mut pace = Pace::new();
        let fetched = if self.has(Fault::Download) || self.is_failed_by_path(operation, "404") {
            Err(DownloadError::Image(ImageFailure::Status(404)))
        } else {
            download
                .fetch(|have, total| {
                    if self.device.is_cut(CutPoint::Downloading) {
                        return ControlFlow::Break(());
                    }
                    if let Some(progress) = pace.due(have, total) {
                        self.report_progress(operation, progress);
                    }
                    ControlFlow::Continue(())
                })
                .await
        };
        match fetched {
            Ok(()) => {
                sleep(context.options.step_delay).await;
                self.storage.update(|state| state.set_phase(OperationPhase::Transferred))?;
            }
            Err(DownloadError::Stopped) => return Ok(Next::PowerCut),
            Err(DownloadError::Image(failure @ ImageFailure::AddressExpired(_))) if self.can_wait_for_address() => {
                let failure = failure.report(self.device.spec.protocol);
                self.storage.update(|state| state.set_phase(OperationPhase::AddressExpired { failure }))?;
            }
            Err(DownloadError::Image(failure)) => self.fail(Step::FirmwareTransferred, &failure)?,
            Err(DownloadError::Disk(path, error)) => return Err(StorageError::new("write", &path)(error)),
        }
        Ok(Next::Idle)
    }

    async fn install(&self, operation: &Operation) -> Result<(), StorageError> {
        let image = self.storage.downloaded();
        if self.has(Fault::Checksum) {
            flip_first_byte(&image).map_err(StorageError::new("damage", &image))?;
        }
        match self.verify(image, operation.firmware.clone()).await? {
            Ok(sha256) => self.storage.install(&operation.firmware.version, sha256),
            Err(failure) => self.fail(Step::DownloadOperationDone, &failure),
        }
    }

    /// Reads the whole image, so not on the thread that all devices share.
    async fn verify(&self, image: PathBuf, firmware: Firmware) -> Result<Result<String, ImageFailure>, StorageError> {
        let key = self.device.context.options.public_key;
        let path = image.clone();
        tokio::task::spawn_blocking(move || download::verify(&image, &firmware, key.as_ref()))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(StorageError::new("read", &path))
    }

    /// The first boot after an upgrade: a bootloader goes back to the old image when the new one is no good.
    async fn boot(&self, operation: &Operation) -> Result<(), StorageError> {
        if self.has(Fault::WrongVersion) {
            self.storage.roll_back(OperationPhase::Activated)?;
            let version = self.storage.state().version();
            self.report(operation, Step::DeviceRebooted, succeeded(Some(version.clone()))).await;
            self.report_update(operation, UpdateStatus::Failed).await?;
            let reason = format!("wrong-version: {version} was reported after the reboot");
            return self.end(operation, Outcome::Failed, Some(reason));
        }
        let is_failed = self.has(Fault::Boot) || self.has(Fault::MalformedBoot);
        if is_failed || self.is_failed_by_path(operation, "boot_error") || !self.is_bootable().await? {
            let failure = ImageFailure::NotBooted.report(self.device.spec.protocol);
            return self.storage.roll_back(OperationPhase::Failed { step: Step::DeviceRebooted, failure });
        }
        let last_segment = operation.firmware.url.rsplit('/').next().filter(|_| self.is_reference_agent());
        let version = last_segment.map_or_else(|| self.storage.state().version(), str::to_owned);
        self.report(operation, Step::DeviceRebooted, succeeded(Some(version))).await;
        self.report_update(operation, UpdateStatus::Succeeded).await?;
        self.end(operation, Outcome::Succeeded, None)
    }

    /// Whether the active slot still holds what was installed.
    async fn is_bootable(&self) -> Result<bool, StorageError> {
        let state = self.storage.state();
        let Some(image) = state.installed(state.active).cloned() else { return Ok(false) };
        let path = self.storage.image(state.active);
        if image.sha256.is_none() {
            return Ok(true);
        }
        let expected = image.sha256.clone();
        let digest = tokio::task::spawn_blocking(move || download::digest(&path)).await;
        Ok(matches!(digest, Ok(Ok(actual)) if Some(&actual) == expected.as_ref()))
    }

    /// USP has no word for it: there the operation is over when its download has failed.
    fn can_wait_for_address(&self) -> bool {
        self.device.spec.protocol == ProtocolName::Json
    }

    /// Sets the phase in which the failure is reported.
    fn fail(&self, step: Step, failure: &ImageFailure) -> Result<(), StorageError> {
        let failure = failure.report(self.device.spec.protocol);
        self.storage.update(|state| state.set_phase(OperationPhase::Failed { step, failure }))
    }

    /// Whether this update is one of those that are to fail.
    fn shall_fail(&self) -> bool {
        let failing = self.device.context.options.failing_updates;
        failing.is_some_and(|failing| failing.includes_next(self.storage.state().failed_updates))
    }

    /// Says on the topic of all devices how the update has ended; the same again after a power cut.
    async fn report_update(&self, operation: &Operation, status: UpdateStatus) -> Result<(), StorageError> {
        let options = &self.device.context.options;
        if options.report_updates || options.failing_updates.is_some() {
            let timestamp = self.storage.report_time(now_milliseconds())?;
            let report = update_report(&self.device.spec, self.storage.state().version(), timestamp, status);
            tracing::info!("{} -> update {status:?} ({})", self.thing(), operation.id);
            self.connection.publish(report.encode()).await;
        }
        Ok(())
    }

    fn end(&self, operation: &Operation, outcome: Outcome, reason: Option<String>) -> Result<(), StorageError> {
        self.storage.end()?;
        self.device.context.set_version(self.device.index, self.storage.state().version());
        let milliseconds = now_milliseconds() - operation.started_at;
        let (from, to) = (operation.from.clone(), Some(operation.firmware.version.clone()));
        self.device.context.ended(self.device.index, self.ended(from, to, milliseconds, outcome, reason));
        Ok(())
    }

    fn ended(
        &self,
        from: String,
        to: Option<String>,
        milliseconds: i64,
        outcome: Outcome,
        reason: Option<String>,
    ) -> EndedUpgrade {
        let seconds = f64::from(u32::try_from(milliseconds).unwrap_or_default()) / 1000.0;
        EndedUpgrade {
            thing: self.thing().clone(),
            protocol: self.device.spec.protocol,
            from,
            to,
            seconds,
            outcome,
            reason,
        }
    }

    fn report_progress(&self, operation: &Operation, outcome: StepOutcome) {
        if let Some(publication) = self.encode(operation, Step::FirmwareTransferred, outcome) {
            self.connection.post_if_idle(publication);
        }
    }

    /// Sends a report, with whatever the device's faults do to it; returns when the broker has it.
    async fn report(&self, operation: &Operation, step: Step, outcome: StepOutcome) {
        if self.has(Fault::Delay) {
            sleep(self.device.context.options.fault_timing.delay).await;
        }
        if self.has(Fault::Drop(step)) {
            tracing::info!("{}: the report of {} is lost", self.thing(), step.name());
            return;
        }
        let Some(publication) = self.encode(operation, step, outcome) else { return };
        if self.has(Fault::Reorder(step)) {
            tracing::info!("{}: the report of {} is held back", self.thing(), step.name());
            *self.device.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(publication);
            return;
        }
        if self.has(Fault::Duplicate) {
            self.connection.publish(publication.clone()).await;
        }
        self.connection.publish(publication).await;
        if let Some(held) = self.device.take_held() {
            self.connection.publish(held).await;
        }
    }

    fn post(&self, publication: Option<Publication>) {
        if let Some(publication) = publication {
            self.connection.post(publication);
        }
    }

    /// The message for a response; none where the protocol has no word for it.
    fn encode(&self, operation: &Operation, step: Step, outcome: StepOutcome) -> Option<Publication> {
        let (thing, now) = (self.thing(), now_milliseconds());
        let mut reply_to = operation.reply_to.clone();
        let mut operation_id = operation.id.clone();
        if self.has(Fault::WrongOperation) {
            operation_id = other_operation(&operation_id);
            reply_to.message_id = operation_id.to_string();
        }
        let response = Response { operation_id, step, outcome };
        let is_failed = matches!(response.outcome, StepOutcome::Failed(_));
        let is_malformed = self.has(Fault::MalformedBoot) || (self.is_reference_agent() && is_failed);
        let publication = if step == Step::DeviceRebooted && is_malformed {
            self.encoding().encode_malformed_boot_failure(thing, &response.operation_id, &reply_to, now)
        } else {
            self.encoding().encode_response(thing, &response, &reply_to, now)?
        };
        self.log_response(&response);
        Some(publication)
    }

    fn log_response(&self, response: &Response) {
        let (thing, step, id) = (self.thing(), response.step.name(), &response.operation_id);
        match &response.outcome {
            StepOutcome::Succeeded { firmware_version: Some(version) } => {
                tracing::info!("{thing} -> {step} SUCCESS {} ({id})", redacted(version));
            }
            StepOutcome::Succeeded { .. } => tracing::info!("{thing} -> {step} SUCCESS ({id})"),
            StepOutcome::InProgress { progress } => {
                tracing::info!("{thing} -> {step} IN_PROGRESS {} % ({id})", progress.unwrap_or_default());
            }
            StepOutcome::Failed(failure) => {
                tracing::info!("{thing} -> {step} FAIL {} {} ({id})", failure.code, failure.message);
            }
        }
    }
}

/// What a device says of itself: what the registry was told of it at first, or else what it runs.
fn update_report(spec: &DeviceSpec, running: String, timestamp: i64, status: UpdateStatus) -> UpdateReport {
    // An attribute without a value is none in the registry.
    let attribute = |name: &str| spec.attributes.get(name).filter(|value| !value.is_empty()).cloned();
    UpdateReport {
        thing_name: spec.thing.clone(),
        timestamp,
        status,
        model: attribute("model"),
        firmware: attribute("FW").or(Some(running)),
    }
}

fn succeeded(firmware_version: Option<String>) -> StepOutcome {
    StepOutcome::Succeeded { firmware_version }
}

fn reason(step: Step, failure: &DeviceFailure) -> String {
    format!("{}: {} {}", step.name(), failure.code, failure.message)
}

/// An operation that nobody has asked for.
pub(crate) fn other_operation(id: &OperationId) -> OperationId {
    let kept: String = id.as_str().chars().take(120).collect();
    format!("{kept}-other").parse().unwrap_or_else(|_| id.clone())
}

fn flip_first_byte(path: &Path) -> io::Result<()> {
    let mut bytes = std::fs::read(path)?;
    if let Some(first) = bytes.first_mut() {
        *first ^= 1;
    }
    std::fs::write(path, bytes)
}

/// How often a download tells its progress: at most each second, and then each ten per cent or ten seconds.
struct Pace {
    percent: u64,
    at: Instant,
}

impl Pace {
    fn new() -> Self {
        Self { percent: 0, at: Instant::now() }
    }

    /// What to tell, if anything: without a percentage where the length is not known.
    fn due(&mut self, have: u64, total: Option<u64>) -> Option<StepOutcome> {
        let percent = total.filter(|total| *total > 0).map(|total| (have.min(total) * 100) / total);
        let waited = self.at.elapsed();
        let has_moved = percent.is_some_and(|percent| percent >= self.percent + 10);
        if waited < Duration::from_secs(1) || !(has_moved || waited >= Duration::from_secs(10)) {
            return None;
        }
        *self = Self { percent: percent.unwrap_or_default(), at: Instant::now() };
        Some(StepOutcome::InProgress { progress: percent.and_then(|percent| u8::try_from(percent).ok()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet;
    use crate::fleet::{FailingUpdates, FleetOptions};
    use crate::storage::Slot;
    use mqtt_connection::install_crypto_provider;
    use protocol::recovery::UPDATE_REPORTS_TOPIC;
    use rustls::{ClientConfig, RootCertStore};
    use std::slice;
    use tokio::sync::Semaphore;

    const ATTRIBUTES: [(&str, &str); 2] = [("FW", "2.27"), ("model", "wo:v8")];

    fn spec(folder: &Path, attributes: &[(&str, &str)]) -> DeviceSpec {
        DeviceSpec {
            thing: "sim-0001".parse().unwrap(),
            protocol: ProtocolName::Json,
            certificates: folder.to_owned(),
            firmware_version: "1.0.0".into(),
            attributes: attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            faults: Faults::default(),
        }
    }

    /// A device whose broker is the test.
    fn device(spec: DeviceSpec, failing_updates: Option<FailingUpdates>, report_updates: bool) -> Device {
        install_crypto_provider();
        let endpoint: crate::Endpoint = "127.0.0.1:1".parse().unwrap();
        let options = FleetOptions {
            failing_updates,
            report_updates,
            upgrades: 0,
            step_delay: Duration::ZERO,
            ..FleetOptions::new(endpoint.clone())
        };
        let context = Arc::new(fleet::context(options, slice::from_ref(&spec)).unwrap());
        let tls = ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let connection = ConnectionSettings {
            client_id: spec.thing.to_string(),
            endpoint,
            tls: Arc::new(tls),
            clean_session: false,
            filters: vec![],
            handshakes: Arc::new(Semaphore::new(1)),
            on_failure: Box::new(|_| ()),
        };
        fleet::device(0, spec, context, Arc::new(connection))
    }

    fn firmware() -> Firmware {
        // Nobody listens on that port.
        let url = "http://127.0.0.1:1/2.0.0".to_owned();
        Firmware { version: "2.0.0".into(), url, sha256: None, size: None, signature: None }
    }

    /// Goes on with the operation on disk until it ends; everything that was sent.
    async fn upgrade(device: &Device, storage: &Storage) -> Vec<Publication> {
        let (connection, _inbox) = Connection::open(Arc::clone(&device.connection));
        let life = Life { device, storage, connection: &connection };
        let mut upgrade = pin!(life.upgrade());
        let mut sent = Vec::new();
        loop {
            select! {
                biased;
                next = &mut upgrade => {
                    assert!(matches!(next, Ok(Next::Idle)));
                    return sent;
                }
                publication = connection.acknowledge_next() => sent.push(publication),
            }
        }
    }

    /// Sends a device the command of an operation, as often as told; everything that it sent for it.
    async fn command(device: &Device, operation: &str, repeats: usize) -> Vec<Publication> {
        let storage = Storage::open(&device.folder, "1.0.0").unwrap();
        let (connection, _inbox) = Connection::open(Arc::clone(&device.connection));
        let life = Life { device, storage: &storage, connection: &connection };
        for repeat in 0..repeats {
            let task =
                life.receive_download(operation.parse().unwrap(), firmware(), ReplyTo::default()).expect("a disk");
            assert_eq!(matches!(task, Task::Begin), repeat == 0, "{operation}");
        }
        upgrade(device, &storage).await
    }

    fn reports(sent: &[Publication]) -> Vec<UpdateReport> {
        let reports = sent.iter().filter(|publication| publication.topic == UPDATE_REPORTS_TOPIC);
        reports.map(|report| UpdateReport::decode(&report.payload).unwrap()).collect()
    }

    fn ended(device: &Device) -> Vec<EndedUpgrade> {
        device.context.all_ended()
    }

    fn failed_on_purpose(folder: &Path) -> u32 {
        Storage::open(folder, "1.0.0").unwrap().state().failed_updates
    }

    // Paused, because a download is tried again for a while.
    #[tokio::test(start_paused = true)]
    async fn the_first_updates_fail_once_each_over_restarts_and_are_reported() {
        let folder = tempfile::tempdir().unwrap();
        let mut timestamps = Vec::new();
        // The third one is not meant to fail, and only does for want of a server.
        for (operation, counted) in [("op-1", 1), ("op-2", 2), ("op-3", 2)] {
            let device = device(spec(folder.path(), &ATTRIBUTES), Some(FailingUpdates::First(2)), false);
            let sent = command(&device, operation, 3).await;
            assert_eq!(failed_on_purpose(folder.path()), counted, "{operation}");
            let reports = reports(&sent);
            assert_eq!(reports.len(), 1, "{operation}: {sent:?}");
            assert_eq!(reports[0].status, UpdateStatus::Failed);
            assert_eq!((reports[0].firmware.as_deref(), reports[0].model.as_deref()), (Some("2.27"), Some("wo:v8")));
            assert_eq!(sent.last().unwrap().topic, UPDATE_REPORTS_TOPIC, "the workflow hears of it first");
            assert!(String::from_utf8_lossy(&sent[sent.len() - 2].payload).contains(operation));
            timestamps.push(reports[0].timestamp);
            let ended = ended(&device);
            assert_eq!(ended.iter().map(|ended| ended.outcome).collect::<Vec<_>>(), [Outcome::Failed]);
            let is_meant = ended[0].reason.as_ref().unwrap().contains("404");
            assert_eq!(is_meant, operation != "op-3", "{ended:?}");
        }
        assert!(timestamps.is_sorted_by(|a, b| a < b), "{timestamps:?}");
    }

    #[tokio::test]
    async fn a_report_that_a_power_cut_repeats_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let device = device(spec(folder.path(), &[]), Some(FailingUpdates::Always), false);
        let storage = Storage::open(folder.path(), "1.0.0").unwrap();
        storage.begin("op-1".parse().unwrap(), firmware(), ReplyTo::default(), 0).unwrap();
        let time = storage.report_time(1_711_320_208_793).unwrap();
        let sent = upgrade(&device, &Storage::open(folder.path(), "1.0.0").unwrap()).await;
        assert_eq!(reports(&sent).iter().map(|report| report.timestamp).collect::<Vec<_>>(), [time]);
    }

    /// A device that has just booted what it was upgraded to.
    fn upgraded(folder: &Path) -> Storage {
        let storage = Storage::open(folder, "1.0.0").unwrap();
        storage.begin("op-1".parse().unwrap(), firmware(), ReplyTo::default(), 0).unwrap();
        std::fs::write(storage.partial(), b"image").unwrap();
        let sha256 = download::digest(&storage.partial()).unwrap();
        storage.install("2.0.0", sha256).unwrap();
        storage.activate().unwrap();
        assert_eq!(storage.state().active, Slot::B);
        storage
    }

    #[tokio::test]
    async fn an_update_that_succeeds_is_reported_with_the_new_version_if_asked_for() {
        for report_updates in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let device = device(spec(folder.path(), &[]), None, report_updates);
            let reports = reports(&upgrade(&device, &upgraded(folder.path())).await);
            assert_eq!(reports.len(), usize::from(report_updates));
            for report in reports {
                assert_eq!((report.status, report.model), (UpdateStatus::Succeeded, None));
                assert_eq!(report.firmware.as_deref(), Some("2.0.0"));
            }
            assert_eq!(ended(&device)[0].outcome, Outcome::Succeeded);
        }
    }

    #[tokio::test]
    async fn a_device_whose_address_has_expired_goes_on_with_a_fresh_one() {
        let folder = tempfile::tempdir().unwrap();
        let device = device(spec(folder.path(), &[]), None, true);
        let storage = Storage::open(folder.path(), "1.0.0").unwrap();
        let id: OperationId = "op-1".parse().unwrap();
        storage.begin(id.clone(), firmware(), ReplyTo::default(), 0).unwrap();
        std::fs::write(storage.partial(), b"half of it").unwrap();
        let failure = ImageFailure::AddressExpired(403).report(ProtocolName::Json);
        assert_eq!(failure.code, DeviceFailure::ADDRESS_EXPIRED);
        storage.update(|state| state.set_phase(OperationPhase::AddressExpired { failure })).unwrap();
        let (connection, _inbox) = Connection::open(Arc::clone(&device.connection));
        let life = Life { device: &device, storage: &storage, connection: &connection };
        {
            let mut upgrade = pin!(life.upgrade());
            let reported = select! {
                biased;
                _ = &mut upgrade => panic!("the device waits"),
                publication = connection.acknowledge_next() => publication,
            };
            assert!(String::from_utf8_lossy(&reported.payload).contains("ADDRESS_EXPIRED"), "{reported:?}");
        }
        let fresh = Firmware { url: "http://127.0.0.1:1/fresh".to_owned(), ..firmware() };
        // Another operation's address is none of this one's.
        let other = life.receive_download("op-2".parse().unwrap(), fresh.clone(), ReplyTo::default());
        assert!(matches!(other, Ok(Task::Nothing)));
        let task = life.receive_download(id, fresh, ReplyTo::default());
        assert!(matches!(task, Ok(Task::Begin)));
        let operation = storage.operation().unwrap();
        assert_eq!(operation.phase, OperationPhase::Downloading);
        assert_eq!(operation.firmware.url, "http://127.0.0.1:1/fresh");
        assert_eq!(std::fs::read(storage.partial()).unwrap(), b"half of it", "it goes on where it was");
    }

    #[tokio::test]
    async fn a_cancelled_update_is_neither_reported_nor_counted() {
        let folder = tempfile::tempdir().unwrap();
        let device = device(spec(folder.path(), &[]), Some(FailingUpdates::First(1)), true);
        let storage = Storage::open(folder.path(), "1.0.0").unwrap();
        storage.begin("op-1".parse().unwrap(), firmware(), ReplyTo::default(), 0).unwrap();
        let (connection, _inbox) = Connection::open(Arc::clone(&device.connection));
        let life = Life { device: &device, storage: &storage, connection: &connection };
        assert!(matches!(life.receive_cancel(&"op-1".parse().unwrap()), Ok(Task::Cancel)));
        assert_eq!(upgrade(&device, &storage).await, []);
        assert_eq!(failed_on_purpose(folder.path()), 0);
        assert_eq!(ended(&device)[0].outcome, Outcome::Cancelled);
    }

    #[test]
    fn a_report_has_what_the_registry_was_told_or_what_runs() {
        let encoded = |attributes: &[(&str, &str)]| {
            let report = update_report(&spec(Path::new("."), attributes), "1.0.0".into(), 7, UpdateStatus::Failed);
            String::from_utf8(report.encode().payload).unwrap()
        };
        let start = r#"{"_id_":"sim-0001","timestamp":"7","status":"failed","#;
        assert_eq!(encoded(&ATTRIBUTES), format!(r#"{start}"model":"wo:v8","FW":"2.27"}}"#));
        for none in [&[][..], &[("FW", ""), ("model", "")], &[("other", "x")]] {
            assert_eq!(encoded(none), format!(r#"{start}"FW":"1.0.0"}}"#));
        }
    }

    #[test]
    fn device_json_from_before_attributes_is_still_read() {
        let folder = tempfile::tempdir().unwrap();
        let old = r#"{"thing": "sim-0001", "protocol": "json", "firmwareVersion": "1.0.0"}"#;
        std::fs::write(folder.path().join(Identity::FILE), old).unwrap();
        assert!(DeviceSpec::load(folder.path()).unwrap().attributes.is_empty());
    }

    #[test]
    fn progress_is_told_at_most_each_second_and_only_when_it_moves() {
        let told = |progress| Some(StepOutcome::InProgress { progress });
        let mut pace = Pace::new();
        assert_eq!(pace.due(50, Some(100)), None);
        pace.at -= Duration::from_secs(2);
        assert_eq!(pace.due(50, Some(100)), told(Some(50)));
        assert_eq!(pace.due(99, Some(100)), None);
        pace.at -= Duration::from_secs(2);
        assert_eq!(pace.due(55, Some(100)), None);
        pace.at -= Duration::from_secs(9);
        assert_eq!(pace.due(55, Some(100)), told(Some(55)));
        pace.at -= Duration::from_secs(11);
        assert_eq!(pace.due(55, None), told(None));
    }

    #[test]
    fn another_operation_is_a_valid_one() {
        for id in ["op-1", &"x".repeat(128)] {
            let id: OperationId = id.parse().unwrap();
            assert_ne!(other_operation(&id), id);
        }
    }
}
