//! A device's flash: two slots for images, a partial download and the state that says which is which.
//!
//! Every change is one atomic rename, so that a power cut between any two writes leaves the state either
//! before or after the change, and the running image untouched.

use protocol::settings::{SettingCommand, Settings};
use protocol::{DeviceFailure, Firmware, OperationId, ReplyTo, Step};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many operation ids a device remembers. Ids are never reused, so only repeats of recent ones can come.
const SEEN_OPERATIONS: usize = 256;

/// One of the two places that an image can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Slot {
    A,
    B,
}

impl Slot {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            Self::A => "slot-a.bin",
            Self::B => "slot-b.bin",
        }
    }
}

/// An image that is installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Installed {
    pub(crate) version: String,
    /// What the bootloader compares the slot with; the factory's image has none and is always good.
    pub(crate) sha256: Option<String>,
}

/// What a device has to do next in its operation; what comes before is done and acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum OperationPhase {
    /// Report that the download begins.
    Started,
    /// Download what is missing of the image.
    Downloading,
    /// Report that the image's address has expired, and wait for a fresh one.
    AddressExpired { failure: DeviceFailure },
    /// Report the transfer, check the image and install it.
    Transferred,
    /// Report the end of the download and choose the new slot.
    Installed,
    /// Boot the chosen slot and report its version.
    Activated,
    /// Report the failure.
    Failed { step: Step, failure: DeviceFailure },
}

/// An operation that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Operation {
    pub(crate) id: OperationId,
    pub(crate) firmware: Firmware,
    pub(crate) reply_to: ReplyTo,
    pub(crate) phase: OperationPhase,
    /// The slot that ran when it began: the one to fall back to.
    pub(crate) previous: Slot,
    /// The version in that slot.
    pub(crate) from: String,
    /// Unix milliseconds.
    pub(crate) started_at: i64,
    /// When its end is reported to have been, in Unix milliseconds, once that is settled.
    #[serde(default)]
    reported_at: Option<i64>,
}

/// All that a device remembers over a power cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    pub(crate) active: Slot,
    slot_a: Option<Installed>,
    slot_b: Option<Installed>,
    pub(crate) operation: Option<Operation>,
    seen: VecDeque<OperationId>,
    /// Whether the first boot has been announced.
    pub(crate) announced: bool,
    /// What the device is set to; devices of older versions have none.
    #[serde(default)]
    pub(crate) settings: Settings,
    /// How many updates have failed because they were to.
    #[serde(default)]
    pub(crate) failed_updates: u32,
    /// When the last update that was reported ended, as reported.
    #[serde(default)]
    last_report: i64,
}

impl State {
    fn factory(version: &str) -> Self {
        let image = Installed { version: version.to_owned(), sha256: None };
        Self {
            active: Slot::A,
            slot_a: Some(image),
            slot_b: None,
            operation: None,
            seen: VecDeque::new(),
            announced: false,
            settings: Settings::new(),
            failed_updates: 0,
            last_report: 0,
        }
    }

    pub(crate) fn installed(&self, slot: Slot) -> Option<&Installed> {
        match slot {
            Slot::A => self.slot_a.as_ref(),
            Slot::B => self.slot_b.as_ref(),
        }
    }

    fn installed_mut(&mut self, slot: Slot) -> &mut Option<Installed> {
        match slot {
            Slot::A => &mut self.slot_a,
            Slot::B => &mut self.slot_b,
        }
    }

    /// The version of the running image.
    pub(crate) fn version(&self) -> String {
        self.installed(self.active).map(|image| image.version.clone()).unwrap_or_default()
    }

    /// True for the running operation too, however many settings have come since it began.
    pub(crate) fn has_seen(&self, operation: &OperationId) -> bool {
        self.seen.contains(operation) || self.operation.as_ref().is_some_and(|running| running.id == *operation)
    }

    pub(crate) fn see(&mut self, operation: &OperationId) {
        if self.seen.len() == SEEN_OPERATIONS {
            self.seen.pop_front();
        }
        self.seen.push_back(operation.clone());
    }

    pub(crate) fn set_phase(&mut self, phase: OperationPhase) {
        if let Some(operation) = &mut self.operation {
            operation.phase = phase;
        }
    }
}

/// A device's storage failed: a disk error, or files that are not ours.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}")]
pub(crate) struct StorageError {
    action: &'static str,
    path: String,
    source: io::Error,
}

impl StorageError {
    pub(crate) fn new(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self { action, path, source }
    }
}

/// The storage of one device, one folder.
pub(crate) struct Storage {
    folder: PathBuf,
    disk: Disk,
    state: Mutex<State>,
}

impl Storage {
    /// Reads the folder, or makes a device fresh from the factory with `factory_version` in slot A.
    pub(crate) fn open(folder: &Path, factory_version: &str) -> Result<Self, StorageError> {
        Self::open_on(Disk::default(), folder, factory_version)
    }

    fn open_on(disk: Disk, folder: &Path, factory_version: &str) -> Result<Self, StorageError> {
        fs::create_dir_all(folder).map_err(StorageError::new("create", folder))?;
        let path = folder.join("state.json");
        let stored = match fs::read(&path) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(|error| {
                StorageError::new("read", &path)(io::Error::new(io::ErrorKind::InvalidData, error))
            })?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(StorageError::new("read", &path)(error)),
        };
        let is_new = stored.is_none();
        let state = stored.unwrap_or_else(|| State::factory(factory_version));
        let storage = Self { folder: folder.to_owned(), disk, state: Mutex::new(state) };
        if is_new {
            storage.update(|_| ())?;
        }
        Ok(storage)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the state.
    pub(crate) fn state(&self) -> State {
        self.lock().clone()
    }

    /// The operation that has not ended.
    pub(crate) fn operation(&self) -> Option<Operation> {
        self.lock().operation.clone()
    }

    /// Changes the state on disk and then in memory; neither if it fails.
    pub(crate) fn update(&self, change: impl FnOnce(&mut State)) -> Result<(), StorageError> {
        let mut current = self.lock();
        let mut next = current.clone();
        change(&mut next);
        let path = self.folder.join("state.json");
        let temporary = self.folder.join("state.json.new");
        let bytes = serde_json::to_vec_pretty(&next)
            .map_err(|error| StorageError::new("encode", &path)(io::Error::other(error)))?;
        self.disk.write(&temporary, &bytes).map_err(StorageError::new("write", &temporary))?;
        self.disk.rename(&temporary, &path).map_err(StorageError::new("replace", &path))?;
        *current = next;
        Ok(())
    }

    /// Takes a setting over; false if the device has done so before, in this operation.
    pub(crate) fn set(&self, command: &SettingCommand) -> Result<bool, StorageError> {
        if self.lock().has_seen(&command.operation_id) {
            return Ok(false);
        }
        self.update(|state| {
            state.see(&command.operation_id);
            state.settings.insert(command.name.clone(), command.value.clone());
        })?;
        Ok(true)
    }

    /// Where the download goes.
    pub(crate) fn partial(&self) -> PathBuf {
        self.folder.join("download.partial")
    }

    /// The image that a slot holds.
    pub(crate) fn image(&self, slot: Slot) -> PathBuf {
        self.folder.join(slot.file_name())
    }

    /// The downloaded image: a power cut may have come after it was moved into its slot.
    pub(crate) fn downloaded(&self) -> PathBuf {
        let partial = self.partial();
        if partial.exists() { partial } else { self.image(self.lock().active.other()) }
    }

    /// Begins an operation: the inactive slot and any older download make room for it.
    pub(crate) fn begin(
        &self,
        id: OperationId,
        firmware: Firmware,
        reply_to: ReplyTo,
        now: i64,
    ) -> Result<(), StorageError> {
        let inactive = self.lock().active.other();
        self.update(|state| *state.installed_mut(inactive) = None)?;
        self.remove(&self.partial())?;
        self.remove(&self.image(inactive))?;
        self.update(|state| {
            state.see(&id);
            let (previous, from) = (state.active, state.version());
            let phase = OperationPhase::Started;
            let (started_at, reported_at) = (now, None);
            state.operation =
                Some(Operation { id, firmware, reply_to, phase, previous, from, started_at, reported_at });
        })
    }

    /// Goes on with the download from a fresh address; false if nothing waits for one in that operation.
    pub(crate) fn renew(&self, id: &OperationId, url: &str) -> Result<bool, StorageError> {
        let waits = |operation: &Operation| {
            operation.id == *id && matches!(operation.phase, OperationPhase::AddressExpired { .. })
        };
        if !self.lock().operation.as_ref().is_some_and(waits) {
            return Ok(false);
        }
        self.update(|state| {
            if let Some(operation) = &mut state.operation {
                url.clone_into(&mut operation.firmware.url);
                operation.phase = OperationPhase::Downloading;
            }
        })?;
        Ok(true)
    }

    /// Moves the downloaded image into the inactive slot. `sha256` is what it was checked to be.
    pub(crate) fn install(&self, version: &str, sha256: String) -> Result<(), StorageError> {
        let slot = self.lock().active.other();
        let (from, to) = (self.partial(), self.image(slot));
        if from.exists() {
            self.disk.rename(&from, &to).map_err(StorageError::new("install", &to))?;
        }
        self.update(|state| {
            *state.installed_mut(slot) = Some(Installed { version: version.to_owned(), sha256: Some(sha256) });
            state.set_phase(OperationPhase::Installed);
        })
    }

    /// Makes the bootloader choose the new image.
    pub(crate) fn activate(&self) -> Result<(), StorageError> {
        self.update(|state| {
            state.active = state.active.other();
            state.set_phase(OperationPhase::Activated);
        })
    }

    /// Makes the bootloader choose the image from before the operation. Doing it twice is the same as once.
    pub(crate) fn roll_back(&self, phase: OperationPhase) -> Result<(), StorageError> {
        self.update(|state| {
            if let Some(operation) = &state.operation {
                state.active = operation.previous;
            }
            state.set_phase(phase);
        })
    }

    /// Fails the operation because it is to fail, and counts that.
    pub(crate) fn fail_on_purpose(&self, step: Step, failure: DeviceFailure) -> Result<(), StorageError> {
        // In one write: a power cut must not count one operation twice.
        self.update(|state| {
            state.set_phase(OperationPhase::Failed { step, failure });
            state.failed_updates += 1;
        })
    }

    /// When the operation's end is reported to have been: later than any before, whatever the clock says.
    pub(crate) fn report_time(&self, now: i64) -> Result<i64, StorageError> {
        // A report that a power cut repeats must not look like another failure.
        if let Some(settled) = self.operation().and_then(|operation| operation.reported_at) {
            return Ok(settled);
        }
        let time = now.max(self.lock().last_report + 1);
        self.update(|state| {
            state.last_report = time;
            if let Some(operation) = &mut state.operation {
                operation.reported_at = Some(time);
            }
        })?;
        Ok(time)
    }

    /// Ends the operation and drops what it has downloaded.
    pub(crate) fn end(&self) -> Result<(), StorageError> {
        self.update(|state| state.operation = None)?;
        self.remove(&self.partial())
    }

    fn remove(&self, path: &Path) -> Result<(), StorageError> {
        self.disk.remove(path).map_err(StorageError::new("remove", path))
    }
}

/// The writes that a power cut can come between.
#[derive(Debug, Default)]
struct Disk {
    /// How many writes succeed before the power is cut; none, as always outside tests: it never is.
    power_cut_after: Option<AtomicI32>,
}

impl Disk {
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.is_cut() {
            fs::write(path, &bytes[..bytes.len() / 2])?;
            return Err(io::Error::other("power cut"));
        }
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if self.is_cut() {
            return Err(io::Error::other("power cut"));
        }
        fs::rename(from, to)?;
        // The rename itself is on disk only when its folder is.
        to.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if self.is_cut() {
            return Err(io::Error::other("power cut"));
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn is_cut(&self) -> bool {
        self.power_cut_after.as_ref().is_some_and(|left| left.fetch_sub(1, Ordering::Relaxed) <= 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::settings::SettingValue;
    use serde_json::Number;

    const VERSION: &str = "2.0.0";

    fn firmware() -> Firmware {
        Firmware {
            version: VERSION.into(),
            url: "http://localhost/2.0.0".into(),
            sha256: None,
            size: None,
            signature: None,
        }
    }

    /// One upgrade as a device does it, from whatever phase the storage is in.
    fn upgrade(storage: &Storage) -> Result<(), StorageError> {
        let operation: OperationId = "op-1".parse().unwrap();
        if storage.state().version() == VERSION && storage.operation().is_none() {
            return Ok(());
        }
        if storage.operation().is_none() {
            storage.begin(operation, firmware(), ReplyTo::default(), 0)?;
        }
        while let Some(operation) = storage.operation() {
            match operation.phase {
                OperationPhase::Started => storage.update(|state| state.set_phase(OperationPhase::Downloading))?,
                OperationPhase::Downloading => {
                    fs::write(storage.partial(), b"image").map_err(StorageError::new("write", &storage.partial()))?;
                    storage.update(|state| state.set_phase(OperationPhase::Transferred))?;
                }
                OperationPhase::Transferred => {
                    assert_eq!(fs::read(storage.downloaded()).unwrap(), b"image");
                    storage.install(VERSION, "digest".into())?;
                }
                OperationPhase::Installed => storage.activate()?,
                OperationPhase::Activated => storage.end()?,
                OperationPhase::AddressExpired { .. } | OperationPhase::Failed { .. } => unreachable!(),
            }
        }
        Ok(())
    }

    #[test]
    fn a_power_cut_at_any_write_bricks_nothing_and_the_upgrade_goes_on() {
        let mut cuts = 0;
        for writes in 0.. {
            let folder = tempfile::tempdir().unwrap();
            Storage::open(folder.path(), "1.0.0").unwrap();
            let disk = Disk { power_cut_after: Some(writes.into()) };
            let cut = Storage::open_on(disk, folder.path(), "1.0.0").and_then(|storage| upgrade(&storage)).is_err();

            let storage = Storage::open(folder.path(), "1.0.0").unwrap();
            let state = storage.state();
            let image = state.installed(state.active).expect("an image to boot");
            assert!(image.sha256.is_none() || storage.image(state.active).exists(), "cut after {writes} writes");
            upgrade(&storage).unwrap();
            assert_eq!(storage.state().version(), VERSION, "cut after {writes} writes");
            assert_eq!(fs::read(storage.image(Slot::B)).unwrap(), b"image");
            assert!(!storage.partial().exists());
            if !cut {
                break;
            }
            cuts += 1;
        }
        assert!(cuts > 12, "only {cuts} writes were cut");
    }

    #[test]
    fn a_new_device_survives_a_power_cut_at_its_first_write() {
        for writes in 0..2 {
            let folder = tempfile::tempdir().unwrap();
            let disk = Disk { power_cut_after: Some(writes.into()) };
            assert!(Storage::open_on(disk, folder.path(), "1.0.0").is_err());
            assert_eq!(Storage::open(folder.path(), "1.0.0").unwrap().state().version(), "1.0.0");
        }
    }

    #[test]
    fn rolling_back_twice_is_the_same_as_once() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(folder.path(), "1.0.0").unwrap();
        storage.begin("op-1".parse().unwrap(), firmware(), ReplyTo::default(), 0).unwrap();
        fs::write(storage.partial(), b"image").unwrap();
        storage.install(VERSION, "digest".into()).unwrap();
        storage.activate().unwrap();
        assert_eq!(storage.state().version(), VERSION);
        for _ in 0..2 {
            storage.roll_back(OperationPhase::Activated).unwrap();
            assert_eq!(storage.state().version(), "1.0.0");
        }
    }

    fn setting(operation: &str, value: f64) -> SettingCommand {
        let value = SettingValue::Number(Number::from_f64(value).unwrap());
        SettingCommand { operation_id: operation.parse().unwrap(), name: "SET_TEMP".parse().unwrap(), value }
    }

    #[test]
    fn a_setting_is_taken_over_once_an_operation_and_survives_power_cuts() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Storage::open(folder.path(), "1.0.0").unwrap();
        assert!(open().set(&setting("p1.SET_TEMP", 21.5)).unwrap());
        assert!(open().set(&setting("p2.SET_TEMP", 18.0)).unwrap());
        assert!(!open().set(&setting("p1.SET_TEMP", 21.5)).unwrap());
        let command = setting("p2.SET_TEMP", 18.0);
        assert_eq!(open().state().settings, Settings::from([(command.name, command.value)]));
    }

    #[test]
    fn a_power_cut_while_a_setting_is_stored_leaves_it_to_be_set_again() {
        for writes in 0..2 {
            let folder = tempfile::tempdir().unwrap();
            Storage::open(folder.path(), "1.0.0").unwrap();
            let disk = Disk { power_cut_after: Some(writes.into()) };
            let storage = Storage::open_on(disk, folder.path(), "1.0.0").unwrap();
            assert!(storage.set(&setting("p1.SET_TEMP", 21.5)).is_err());
            let storage = Storage::open(folder.path(), "1.0.0").unwrap();
            assert!(storage.state().settings.is_empty());
            assert!(storage.set(&setting("p1.SET_TEMP", 21.5)).unwrap());
        }
    }

    fn begin(storage: &Storage, operation: &str) {
        storage.begin(operation.parse().unwrap(), firmware(), ReplyTo::default(), 0).unwrap();
    }

    #[test]
    fn failures_on_purpose_are_counted_over_power_cuts() {
        let folder = tempfile::tempdir().unwrap();
        let failure = || DeviceFailure { code: "7000".into(), message: "404".into() };
        for count in 1..=3 {
            let storage = Storage::open(folder.path(), "1.0.0").unwrap();
            begin(&storage, &format!("op-{count}"));
            storage.fail_on_purpose(Step::FirmwareTransferred, failure()).unwrap();
            let state = Storage::open(folder.path(), "1.0.0").unwrap().state();
            assert_eq!(state.failed_updates, count);
            assert!(matches!(state.operation.unwrap().phase, OperationPhase::Failed { .. }));
            storage.end().unwrap();
        }
    }

    #[test]
    fn a_power_cut_counts_a_failure_with_its_operation_or_not_at_all() {
        for writes in 0..2 {
            let folder = tempfile::tempdir().unwrap();
            begin(&Storage::open(folder.path(), "1.0.0").unwrap(), "op-1");
            let disk = Disk { power_cut_after: Some(writes.into()) };
            let storage = Storage::open_on(disk, folder.path(), "1.0.0").unwrap();
            let failure = DeviceFailure { code: "7000".into(), message: "404".into() };
            assert!(storage.fail_on_purpose(Step::FirmwareTransferred, failure).is_err());
            let state = Storage::open(folder.path(), "1.0.0").unwrap().state();
            assert_eq!((state.failed_updates, state.operation.unwrap().phase), (0, OperationPhase::Started));
        }
    }

    #[test]
    fn reports_have_one_time_an_operation_and_later_ones_each() {
        let folder = tempfile::tempdir().unwrap();
        // The clock stands still, and then goes back.
        for (operation, now, expected) in [("op-1", 1000, 1000), ("op-2", 1000, 1001), ("op-3", 5, 1002)] {
            begin(&Storage::open(folder.path(), "1.0.0").unwrap(), operation);
            for later in [0, 9] {
                let storage = Storage::open(folder.path(), "1.0.0").unwrap();
                assert_eq!(storage.report_time(now + later).unwrap(), expected, "{operation}");
            }
            Storage::open(folder.path(), "1.0.0").unwrap().end().unwrap();
        }
    }

    #[test]
    fn an_operation_from_before_reports_is_still_read() {
        let folder = tempfile::tempdir().unwrap();
        begin(&Storage::open(folder.path(), "1.0.0").unwrap(), "op-1");
        let path = folder.path().join("state.json");
        let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (object, field) in [("", "failedUpdates"), ("", "lastReport"), ("/operation", "reportedAt")] {
            assert!(old.pointer_mut(object).unwrap().as_object_mut().unwrap().remove(field).is_some(), "{field}");
        }
        fs::write(&path, old.to_string()).unwrap();
        let storage = Storage::open(folder.path(), "1.0.0").unwrap();
        assert_eq!(storage.state().failed_updates, 0);
        assert_eq!(storage.report_time(7).unwrap(), 7);
    }

    #[test]
    fn a_state_from_before_settings_is_still_read() {
        let folder = tempfile::tempdir().unwrap();
        let old = r#"{"active": "a", "slotA": {"version": "1.4.0", "sha256": null}, "slotB": null, "operation": null,
                      "seen": ["op-1"], "announced": true}"#;
        fs::write(folder.path().join("state.json"), old).unwrap();
        let state = Storage::open(folder.path(), "1.0.0").unwrap().state();
        assert_eq!((state.version().as_str(), state.settings.len()), ("1.4.0", 0));
    }

    #[test]
    fn many_settings_do_not_make_a_device_forget_its_upgrade() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open(folder.path(), "1.0.0").unwrap();
        storage.begin("op-1".parse().unwrap(), firmware(), ReplyTo::default(), 0).unwrap();
        storage.update(|state| state.seen.clear()).unwrap();
        assert!(storage.state().has_seen(&"op-1".parse().unwrap()));
    }

    #[test]
    fn only_recent_operations_are_remembered() {
        let mut state = State::factory("1.0.0");
        for number in 0..=SEEN_OPERATIONS {
            state.see(&format!("op-{number}").parse().unwrap());
        }
        assert!(!state.has_seen(&"op-0".parse().unwrap()));
        assert!(state.has_seen(&"op-1".parse().unwrap()));
    }
}
