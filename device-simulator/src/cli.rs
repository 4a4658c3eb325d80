//! The command line of the simulator.

mod monitor;

use anyhow::{Context, Result, bail};
use aws_config::BehaviorVersion;
use aws_config::retry::RetryConfig;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::builder::{BoolishValueParser, NonEmptyStringValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand};
use device_simulator::faults::{self, FaultKind, FaultSpec};
use device_simulator::progress::{Display, Verbosity, count};
use device_simulator::provision::{self, DevicePolicy, ProtocolMix, ProvisionOptions, Selection};
use device_simulator::settings_api::{ApiFaultKind, ApiFaultSpec, SettingsApi, SettingsApiOptions};
use device_simulator::{
    DeviceSpec, EndedUpgrade, Endpoint, FailingUpdates, Fault, FaultTiming, Fleet, FleetOptions, Habits, Outcome,
};
use ed25519_dalek::VerifyingKey;
use ed25519_dalek::pkcs8::DecodePublicKey;
use humantime::Duration;
use protocol::ThingName;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::select;

/// How long the first connection of a fleet may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);
/// How long a single device takes to answer a setting unless told otherwise: it is there to be watched.
const LONE_ANSWER_DELAY: std::time::Duration = std::time::Duration::from_secs(10);

/// Simulated devices: one or ten thousand, over real MQTT and TLS, with faults on request.
///
/// Durations are numbers with a unit: 500ms, 10s, 5m, 1h.
///
/// Exit status: 0 all done; 1 a device failed; 2 wrong usage; 3 it could not run (no connection, no credentials,
/// unreadable files).
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make things, keys, certificates and a policy in the registry. What exists is kept, but for --attribute.
    ///
    /// Credentials, Region and endpoint come from the usual AWS variables and profiles.
    Provision(Provision),
    /// Run devices until they have ended their upgrades, or until Ctrl-C.
    Run(Box<Run>),
    /// Run sensors that report their surroundings and act on remediations, until Ctrl-C.
    ///
    /// Temperature and humidity are waves over a base, base + velocity × sin(x/40) at the reading number x, and what remediations
    /// have changed. The certificates are those of `provision`.
    Monitor(monitor::Monitor),
    /// Serve users' settings as a third party does, for tests and demos, until Ctrl-C.
    SettingsApi(SettingsApiCommand),
    /// Remove what `provision` made: things, certificates, and its policy and group if nothing else uses them.
    ///
    /// Credentials, Region and endpoint come from the usual AWS variables and profiles.
    Cleanup(Cleanup),
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["count", "thing"]))]
struct Provision {
    /// How many devices; they are named PREFIX-0001 and so on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: Option<u32>,
    /// What the names of counted devices begin with
    #[arg(long, default_value = "sim", env = "SIMULATOR_PREFIX")]
    prefix: String,
    /// A device of this very name; can be repeated
    #[arg(long, value_name = "NAME")]
    thing: Vec<ThingName>,
    /// The folder for one folder a device: device.json, certificate.pem and private.key
    #[arg(long, value_name = "DIR", env = "SIMULATOR_CERTIFICATES")]
    certificates: PathBuf,
    /// An existing policy for the certificates [default: PREFIX-device, made if it is missing, in which each
    /// thing may use its own topics and nothing else]
    #[arg(long, value_name = "NAME", env = "SIMULATOR_POLICY")]
    policy: Option<String>,
    /// A thing group that the devices join, made if it is missing
    #[arg(long, value_name = "NAME", env = "SIMULATOR_THING_GROUP")]
    thing_group: Option<String>,
    /// An existing thing type for the things: AWS gives a thing without one three attributes at most, which are
    /// protocol, firmwareVersion and externalId
    #[arg(long, value_name = "NAME", env = "SIMULATOR_THING_TYPE")]
    thing_type: Option<String>,
    /// How the devices encode their messages: json, usp, or mixed for both by turns
    #[arg(long, default_value = "json", env = "SIMULATOR_PROTOCOL")]
    protocol: ProtocolMix,
    /// The version that the devices leave the factory with
    #[arg(long, value_name = "VERSION", default_value = "1.0.0", env = "SIMULATOR_FIRMWARE_VERSION")]
    firmware_version: String,
    /// What the things get as their attribute externalId, by which the settings API knows a device's user; {thing}
    /// stands for the thing's name
    #[arg(long, value_name = "TEMPLATE", default_value = "user-{thing}", value_parser = NonEmptyStringValueParser::new(),
          conflicts_with = "no_external_id")]
    external_id: String,
    /// Give the things no attribute externalId
    #[arg(long)]
    no_external_id: bool,
    /// Give the things no attribute protocol, as a device has none that registers itself
    #[arg(long)]
    no_protocol_attribute: bool,
    /// A further attribute of the things, those that exist included, such as FW=2.27; can be repeated. One without a
    /// value is taken away
    #[arg(long, value_name = "NAME=VALUE", value_parser = provision::attribute)]
    attribute: Vec<(String, String)>,
    /// Say nothing but warnings, errors and the result
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Args)]
struct Run {
    /// The folder that `provision` has written
    #[arg(long, value_name = "DIR", env = "SIMULATOR_CERTIFICATES")]
    certificates: PathBuf,
    /// The broker; port 8883 unless given, with ALPN on port 443
    #[arg(long, value_name = "HOST[:PORT]", env = "SIMULATOR_ENDPOINT")]
    endpoint: Endpoint,
    /// PEM file of the authority behind the broker's certificate, trusted for image servers too [default: the
    /// system's authorities]
    #[arg(long, value_name = "FILE", env = "SIMULATOR_CA")]
    ca: Option<PathBuf>,
    /// Run only the first N devices, by name
    #[arg(long, value_name = "N", conflicts_with = "thing",
          value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Run only this device; can be repeated
    #[arg(long, value_name = "NAME")]
    thing: Vec<ThingName>,
    /// The folder for the devices' slots and state [default: the folder of the certificates]
    #[arg(long, value_name = "DIR", env = "SIMULATOR_STATE")]
    state: Option<PathBuf>,
    /// End when each device has ended K operations [default: run until Ctrl-C]
    #[arg(long, value_name = "K", env = "SIMULATOR_UPGRADES", value_parser = clap::value_parser!(u32).range(1..))]
    upgrades: Option<u32>,
    /// End after this time at the latest; devices that are not done have failed then
    #[arg(long, value_name = "TIME", env = "SIMULATOR_DURATION")]
    duration: Option<Duration>,
    /// Write what has ended as a JSON array: thing, protocol, from, to, seconds, outcome (succeeded, failed,
    /// cancelled, none), reason
    #[arg(long, value_name = "FILE", env = "SIMULATOR_REPORT")]
    report: Option<PathBuf>,
    /// How long each step takes beside its real work
    #[arg(long, value_name = "TIME", default_value = "1s", env = "SIMULATOR_STEP_DELAY")]
    step_delay: Duration,
    /// How long after its very first connection a device announces its first boot
    #[arg(long, value_name = "TIME", default_value = "30s", env = "SIMULATOR_FIRST_BOOT_DELAY")]
    first_boot_delay: Duration,
    /// How long after a setting has come a device answers it [default: 10s when one device runs, else 1s]
    #[arg(long, value_name = "TIME", env = "SIMULATOR_ANSWER_DELAY")]
    answer_delay: Option<Duration>,
    /// Ed25519 public key, PEM or base64: images must be signed with it [default: signatures are not checked]
    #[arg(long, value_name = "FILE", env = "SIMULATOR_PUBLIC_KEY")]
    public_key: Option<PathBuf>,
    /// What chooses the devices and details of faults; printed at the start [default: random]
    #[arg(long, value_name = "NUMBER", env = "SIMULATOR_SEED")]
    seed: Option<u64>,
    /// Faults, separated by commas: KIND=COUNT or KIND=PERCENT%
    #[arg(long, value_name = "SPEC", value_delimiter = ',', env = "SIMULATOR_FAIL", long_help = fault_help())]
    fail: Vec<FaultSpec>,
    /// Bytes a second of the fault `slow`
    #[arg(long, value_name = "BYTES", default_value_t = FaultTiming::default().slow_rate, env = "SIMULATOR_SLOW_RATE",
          value_parser = clap::value_parser!(u64).range(1..))]
    slow_rate: u64,
    /// Let each device's first K updates fail in their transfer, or all of them, counted over restarts; implies
    /// --report-updates
    #[arg(long, value_name = "K|always", env = "SIMULATOR_FAILING_UPDATES")]
    failing_updates: Option<FailingUpdates>,
    /// Let the devices say on iot/device/data how each update has ended
    #[arg(long, env = "SIMULATOR_REPORT_UPDATES", value_parser = BoolishValueParser::new())]
    report_updates: bool,
    /// Let USP devices behave as a public device does: reference-agent reports what follows the last slash of the
    /// image's address as its version, query included, fails for a path with 404 or `boot_error`, sends broken JSON after a
    /// failed boot, and claims a boot into version 404 after a failed download
    #[arg(long, value_name = "DEVICE", env = "SIMULATOR_HABITS")]
    habits: Option<Habits>,
    /// How long the fault `delay` waits before each report, and longer than --answer-delay before each answer
    #[arg(long, value_name = "TIME", default_value = "5s", env = "SIMULATOR_DELAY")]
    delay: Duration,
    /// How long the faults `offline`, `power-cut` and `disconnect` keep a device away
    #[arg(long, value_name = "TIME", default_value = "10s", env = "SIMULATOR_OFFLINE_FOR")]
    offline_for: Duration,
    /// Say nothing but warnings, errors and the result
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Args)]
struct SettingsApiCommand {
    /// Where to listen; port 0 is any free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8081", env = "SETTINGS_API_LISTEN")]
    listen: SocketAddr,
    /// What requests must have in the header x-api-key [default: nothing]
    #[arg(long, value_name = "KEY", env = "SETTINGS_API_KEY", hide_env_values = true,
          value_parser = NonEmptyStringValueParser::new())]
    api_key: Option<String>,
    /// JSON object: external id -> object of settings; other ids are unknown [default: every id has a
    /// temperature of its own, 17.0 to 24.5]
    #[arg(long, value_name = "FILE", env = "SETTINGS_API_PROFILES")]
    profiles: Option<PathBuf>,
    /// Faults, separated by commas: KIND=COUNT or KIND=PERCENT%
    #[arg(long, value_name = "SPEC", value_delimiter = ',', env = "SETTINGS_API_FAIL", long_help = api_fault_help())]
    fail: Vec<ApiFaultSpec>,
    /// How long the fault `slow` takes
    #[arg(long, value_name = "TIME", default_value = "15s", env = "SETTINGS_API_SLOW_FOR")]
    slow_for: Duration,
    /// What chooses the requests that faults with a percentage hit; printed at the start [default: random]
    #[arg(long, value_name = "NUMBER", env = "SETTINGS_API_SEED")]
    seed: Option<u64>,
    /// Say nothing but warnings, errors and the result
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["prefix", "thing_group"]))]
struct Cleanup {
    /// Remove the devices named PREFIX-0001 and so on
    #[arg(long)]
    prefix: Option<String>,
    /// Remove the devices of this thing group
    #[arg(long, value_name = "NAME")]
    thing_group: Option<String>,
    /// Remove the devices' folders from here too
    #[arg(long, value_name = "DIR", env = "SIMULATOR_CERTIFICATES")]
    certificates: Option<PathBuf>,
    /// Say nothing but warnings, errors and the result
    #[arg(long, short)]
    quiet: bool,
}

fn help_lines(kinds: impl Iterator<Item = (&'static str, &'static str)>) -> String {
    kinds.map(|(name, help)| format!("  {name:<16}{help}")).collect::<Vec<_>>().join("\n")
}

fn api_fault_help() -> String {
    let kinds = help_lines(ApiFaultKind::ALL.into_iter().map(|(kind, help)| (kind.name(), help)));
    format!(
        "Faults, separated by commas. KIND=COUNT lets the first COUNT requests go wrong, those of the next kind after \
         those of the first; KIND=PERCENT% each request with that probability, chosen by --seed. Kinds:\n{kinds}"
    )
}

fn fault_help() -> String {
    let kinds = help_lines(FaultKind::ALL.into_iter().map(|(kind, help)| (kind.name(), help)));
    format!(
        "Faults, separated by commas. KIND=COUNT gives a fault to so many devices, different ones for each kind; \
         KIND=PERCENT% gives it to each device with that probability. --seed chooses them, and the start of the run \
         says which device has which. Kinds:\n{kinds}"
    )
}

/// Why a command ended without success.
enum Failure {
    Usage(String),
    CouldNotRun(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::CouldNotRun(error)
    }
}

impl Cli {
    /// Runs the command and says how it ended.
    pub(crate) async fn run(self) -> ExitCode {
        let result = match self.command {
            Command::Provision(command) => command.run().await,
            Command::Run(command) => command.run().await,
            Command::Monitor(command) => command.run().await,
            Command::SettingsApi(command) => command.run().await,
            Command::Cleanup(command) => command.run().await,
        };
        match result {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(1),
            Err(Failure::Usage(sentence)) => {
                eprintln!("error: {sentence}");
                ExitCode::from(2)
            }
            Err(Failure::CouldNotRun(error)) => {
                eprintln!("error: {error:#}");
                ExitCode::from(3)
            }
        }
    }
}

fn verbosity(quiet: bool) -> Verbosity {
    if quiet { Verbosity::Quiet } else { Verbosity::Normal }
}

async fn registry() -> aws_sdk_iot::Client {
    let http = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    // The registry throttles by the second, and a fleet is many seconds' work.
    let retries = RetryConfig::standard().with_max_attempts(10);
    let config = aws_config::defaults(BehaviorVersion::latest()).http_client(http).retry_config(retries).load().await;
    aws_sdk_iot::Client::new(&config)
}

impl Provision {
    async fn run(self) -> Result<bool, Failure> {
        let things = match self.count {
            Some(count) => {
                provision::numbered(&self.prefix, count as usize).map_err(|e| Failure::Usage(e.to_string()))?
            }
            None => self.thing,
        };
        let policy = match self.policy {
            Some(name) => DevicePolicy::Existing(name),
            None => DevicePolicy::Own(provision::own_policy_name(&self.prefix)),
        };
        let display = Display::start(verbosity(self.quiet), Some(things.len() as u64));
        let options = ProvisionOptions {
            things,
            protocols: self.protocol,
            firmware_version: self.firmware_version,
            external_id: (!self.no_external_id).then_some(self.external_id),
            protocol_attribute: !self.no_protocol_attribute,
            attributes: self.attribute.into_iter().collect(),
            certificates: self.certificates,
            policy,
            thing_group: self.thing_group,
            thing_type: self.thing_type,
        };
        let client = registry().await;
        let done = provision::provision(&client, options, |thing| {
            tracing::info!("{thing}: ready");
            display.advance();
        });
        let result = done.await.context("provisioning stopped; run it again to go on")?;
        display.finish();
        println!("{} devices provisioned, {} kept", result.created, result.kept);
        Ok(true)
    }
}

impl SettingsApiCommand {
    async fn run(self) -> Result<bool, Failure> {
        let display = Display::start(verbosity(self.quiet), None);
        let seed = self.seed.unwrap_or_else(rand::random);
        let profiles = self.profiles.as_deref().map(read_profiles).transpose()?;
        let api = SettingsApi::start(SettingsApiOptions {
            listen: self.listen,
            api_key: self.api_key,
            profiles,
            faults: self.fail,
            slow_for: *self.slow_for,
            seed,
        });
        let api = api.map_err(anyhow::Error::from)?;
        eprintln!("listening on {}, seed: {seed}", api.address());
        println!("SettingsApiUrl={}", api.url());
        interrupted().await?;
        display.finish();
        println!("{} requests", api.total_requests());
        Ok(true)
    }
}

impl Cleanup {
    async fn run(self) -> Result<bool, Failure> {
        let selection = match (self.prefix, self.thing_group) {
            (_, Some(group)) => Selection::ThingGroup(group),
            (prefix, None) => Selection::Prefix(prefix.unwrap_or_default()),
        };
        let display = Display::start(verbosity(self.quiet), None);
        let client = registry().await;
        let done = provision::cleanup(&client, &selection, self.certificates.as_deref(), |thing| {
            tracing::info!("{thing}: removed");
            display.advance();
        });
        let result = done.await.context("the cleanup stopped; run it again to go on")?;
        display.finish();
        println!(
            "removed: {} things, {} certificates, {} policies, {} thing groups, {} folders",
            result.things, result.certificates, result.policies, result.thing_groups, result.folders
        );
        Ok(true)
    }
}

impl Run {
    async fn run(self) -> Result<bool, Failure> {
        let seed = self.seed.unwrap_or_else(rand::random);
        let mut devices = selected(&self.certificates, &self.thing, self.count)?;
        let faults = faults::assign(&self.fail, devices.len(), seed).map_err(Failure::Usage)?;
        for (device, faults) in devices.iter_mut().zip(faults) {
            device.faults = faults;
        }
        announce(&devices, &self.endpoint, seed);
        let total = self.upgrades.map(|upgrades| u64::from(upgrades) * devices.len() as u64);
        let display = Display::start(verbosity(self.quiet), total);
        let options = self.fleet_options(devices.len())?;
        let fleet = Fleet::start(options, devices.clone()).context("the devices cannot start")?;
        let is_late = devices.iter().all(|device| device.faults.has(Fault::Offline));
        let patience = if is_late { PATIENCE + *self.offline_for } else { PATIENCE };
        fleet.connected(patience).await.context("the devices cannot run")?;
        let is_complete = self.wait(&fleet, &display).await?;
        display.finish();
        self.write_report(&devices, &fleet)?;
        let applied = fleet.total_applied();
        let ended = fleet.stop().await;
        if !is_complete {
            eprintln!("{} of {} devices are not done", self.unfinished(&devices, &ended), devices.len());
        }
        println!("{}", closing_line(devices.len(), &ended, applied));
        Ok(is_complete && count(&ended, Outcome::Failed) == 0)
    }

    /// How many devices have ended fewer operations than they should.
    fn unfinished(&self, devices: &[DeviceSpec], ended: &[EndedUpgrade]) -> usize {
        let mut counts: HashMap<&ThingName, u32> = HashMap::new();
        for ended in ended {
            *counts.entry(&ended.thing).or_default() += 1;
        }
        let wanted = self.upgrades.unwrap_or_default();
        devices.iter().filter(|device| counts.get(&device.thing).copied().unwrap_or_default() < wanted).count()
    }

    fn fleet_options(&self, devices: usize) -> Result<FleetOptions> {
        let defaults = FleetOptions::new(self.endpoint.clone());
        let answer_delay = if devices == 1 { LONE_ANSWER_DELAY } else { defaults.answer_delay };
        Ok(FleetOptions {
            ca: self.ca.clone(),
            state: self.state.clone(),
            upgrades: self.upgrades.unwrap_or_default() as usize,
            step_delay: *self.step_delay,
            first_boot_delay: *self.first_boot_delay,
            answer_delay: self.answer_delay.map_or(answer_delay, Into::into),
            failing_updates: self.failing_updates,
            report_updates: self.report_updates,
            habits: self.habits,
            public_key: self.public_key.as_deref().map(read_public_key).transpose()?,
            fault_timing: FaultTiming { slow_rate: self.slow_rate, delay: *self.delay, offline_for: *self.offline_for },
            ..defaults
        })
    }

    /// True unless devices were still at it when the time was up.
    async fn wait(&self, fleet: &Fleet, display: &Display) -> Result<bool> {
        let all_ended = async {
            match self.upgrades {
                Some(_) => drop(fleet.outcomes().await),
                None => std::future::pending().await,
            }
        };
        let time_is_up = async {
            match self.duration {
                Some(duration) => tokio::time::sleep(*duration).await,
                None => std::future::pending().await,
            }
        };
        select! {
            () = all_ended => Ok(true),
            () = time_is_up => Ok(self.upgrades.is_none()),
            result = interrupted() => result.map(|()| self.upgrades.is_none()),
            never = display.follow(fleet) => never,
        }
    }

    fn write_report(&self, devices: &[DeviceSpec], fleet: &Fleet) -> Result<()> {
        let Some(path) = &self.report else { return Ok(()) };
        let ended = fleet.ended();
        let heard: HashSet<_> = ended.iter().map(|ended| &ended.thing).collect();
        let silent = devices.iter().filter(|device| !heard.contains(&device.thing)).map(|device| EndedUpgrade {
            thing: device.thing.clone(),
            protocol: device.protocol,
            from: fleet.version(&device.thing).unwrap_or_default(),
            to: None,
            seconds: 0.0,
            outcome: Outcome::None,
            reason: None,
        });
        let mut all: Vec<_> = ended.iter().cloned().chain(silent).collect();
        all.sort_by(|a, b| a.thing.cmp(&b.thing));
        std::fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("the report {} cannot be written", path.display()))
    }
}

/// The devices in a folder: those of these names, or the first so many, or all.
fn selected(folder: &Path, things: &[ThingName], count: Option<u32>) -> Result<Vec<DeviceSpec>, Failure> {
    let mut devices = DeviceSpec::load_all(folder).context("run `device-simulator provision` first")?;
    let folder = folder.display();
    if !things.is_empty() {
        if let Some(thing) = things.iter().find(|thing| devices.iter().all(|device| device.thing != **thing)) {
            return Err(Failure::Usage(format!("{folder} holds no device {thing}")));
        }
        devices.retain(|device| things.contains(&device.thing));
    }
    let wanted = count.map_or(devices.len(), |count| count as usize);
    if wanted > devices.len() {
        return Err(Failure::Usage(format!("{folder} holds {} devices, fewer than {wanted}", devices.len())));
    }
    devices.truncate(wanted);
    if devices.is_empty() {
        return Err(Failure::Usage(format!("{folder} holds no device: run `device-simulator provision` first")));
    }
    Ok(devices)
}

fn announce(devices: &[DeviceSpec], endpoint: &Endpoint, seed: u64) {
    eprintln!("devices: {}, broker: {endpoint}, seed: {seed}", devices.len());
    for device in devices.iter().filter(|device| !device.faults.0.is_empty()) {
        eprintln!("{} ({}) has the fault {}", device.thing, device.protocol, device.faults);
    }
}

fn closing_line(devices: usize, ended: &[EndedUpgrade], applied: usize) -> String {
    let [succeeded, failed, cancelled] =
        [Outcome::Succeeded, Outcome::Failed, Outcome::Cancelled].map(|outcome| count(ended, outcome));
    format!(
        "{devices} devices: {succeeded} upgrades succeeded, {failed} failed, {cancelled} cancelled, \
         {applied} settings applied"
    )
}

async fn interrupted() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminated = signal(SignalKind::terminate())?;
    select! {
        result = tokio::signal::ctrl_c() => Ok(result?),
        _ = terminated.recv() => Ok(()),
    }
}

fn read_profiles(path: &Path) -> Result<HashMap<String, Value>> {
    let file = path.display();
    let bytes = std::fs::read(path).with_context(|| format!("the profiles {file} cannot be read"))?;
    let profiles: HashMap<String, Map<String, Value>> = serde_json::from_slice(&bytes).with_context(|| {
        format!("{file} holds no profiles: expected a JSON object of external ids, each an object of settings")
    })?;
    Ok(profiles.into_iter().map(|(id, settings)| (id, settings.into())).collect())
}

fn read_public_key(path: &Path) -> Result<VerifyingKey> {
    let text = std::fs::read_to_string(path).with_context(|| format!("the key {} cannot be read", path.display()))?;
    if let Ok(key) = VerifyingKey::from_public_key_pem(&text) {
        return Ok(key);
    }
    let bytes = BASE64_STANDARD.decode(text.trim()).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    match bytes.map(|bytes| VerifyingKey::from_bytes(&bytes)) {
        Some(Ok(key)) => Ok(key),
        _ => bail!("{} holds no Ed25519 public key: expected PEM, or 32 bytes in base64", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use ed25519_dalek::SigningKey;
    use ed25519_dalek::pkcs8::EncodePublicKey;
    use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_names_every_fault() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for (kind, line) in FaultKind::ALL {
            assert!(help.contains(kind.name()) && help.contains(&line[..20]), "{}", kind.name());
        }
    }

    #[test]
    fn the_help_of_the_settings_api_names_every_fault() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("settings-api").unwrap().render_long_help().to_string();
        for (kind, line) in ApiFaultKind::ALL {
            assert!(help.contains(kind.name()) && help.contains(line), "{}", kind.name());
        }
    }

    fn run(extra: &[&str]) -> Box<Run> {
        let args = ["device-simulator", "run", "--certificates", ".", "--endpoint", "localhost"];
        match Cli::try_parse_from(args.iter().chain(extra)).unwrap().command {
            Command::Run(run) => run,
            _ => unreachable!(),
        }
    }

    #[test]
    fn updates_fail_a_number_of_times_or_always() {
        let failing = |text: &str| run(&["--failing-updates", text]).failing_updates;
        assert_eq!(failing("3"), Some(FailingUpdates::First(3)));
        assert_eq!(failing("always"), Some(FailingUpdates::Always));
        assert_eq!(
            "never".parse::<FailingUpdates>(),
            Err("\"never\": expected a number of updates, or always".to_owned())
        );
    }

    #[test]
    fn updates_are_reported_if_asked_for() {
        assert!(!run(&[]).report_updates);
        let options = run(&["--report-updates"]).fleet_options(1).unwrap();
        assert_eq!((options.report_updates, options.failing_updates), (true, None));
    }

    #[test]
    fn further_attributes_can_be_repeated() {
        let args = ["device-simulator", "provision", "--count", "1", "--certificates", "."];
        let extra = ["--attribute", "FW=2.27", "--attribute", "model=wo:v8"];
        let Command::Provision(provision) = Cli::try_parse_from(args.iter().chain(&extra)).unwrap().command else {
            unreachable!()
        };
        let expected = [("FW", "2.27"), ("model", "wo:v8")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(provision.attribute, expected);
    }

    #[test]
    fn a_single_device_answers_settings_later_than_a_fleet_unless_told() {
        let delay = |extra: &[&str], devices| run(extra).fleet_options(devices).unwrap().answer_delay;
        assert_eq!(delay(&[], 1), LONE_ANSWER_DELAY);
        assert_eq!(delay(&[], 2), std::time::Duration::from_secs(1));
        assert_eq!(delay(&["--answer-delay", "3s"], 1), std::time::Duration::from_secs(3));
    }

    #[test]
    fn every_command_that_shows_something_can_be_quiet() {
        let certificates = ["--certificates", "."];
        let broker = ["--endpoint", "localhost"];
        let commands: [&[&str]; 4] =
            [&["provision", "--count", "1"], &["run"], &["monitor"], &["cleanup", "--thing-group", "fleet"]];
        for command in commands {
            let broker = if matches!(command[0], "run" | "monitor") { &broker[..] } else { &[] };
            let args = ["device-simulator"].iter().chain(command).chain(&certificates).chain(broker).chain(&["-q"]);
            assert!(Cli::try_parse_from(args).is_ok(), "{command:?}");
        }
    }

    #[test]
    fn profiles_are_objects_of_settings() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("profiles.json");
        std::fs::write(&file, r#"{"user-1": {"SET_TEMP": 21.5}}"#).unwrap();
        assert_eq!(read_profiles(&file).unwrap()["user-1"]["SET_TEMP"], 21.5);
        std::fs::write(&file, r#"{"user-1": 21.5}"#).unwrap();
        assert!(read_profiles(&file).unwrap_err().to_string().contains("expected a JSON object of external ids"));
    }

    #[test]
    fn a_public_key_is_read_from_pem_and_base64() {
        let key = SigningKey::from_bytes(&[3; 32]).verifying_key();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        for text in
            [key.to_public_key_pem(LineEnding::default()).unwrap(), BASE64_STANDARD.encode(key.as_bytes()) + "\n"]
        {
            std::fs::write(&file, text).unwrap();
            assert_eq!(read_public_key(&file).unwrap(), key);
        }
        std::fs::write(&file, "?").unwrap();
        assert!(read_public_key(&file).unwrap_err().to_string().contains("expected PEM, or 32 bytes in base64"));
    }
}
