//! What can go wrong with a device on purpose, and which devices it goes wrong with.

use protocol::Step;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use std::{fmt, str::FromStr, time::Duration};

/// The moment in an upgrade at which a device loses its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutPoint {
    /// The command is stored, its acceptance is not reported.
    Started,
    /// A part of the image is on disk.
    Downloading,
    /// The whole image is there, its transfer is not reported.
    Transferred,
    /// The image is in its slot, the end of the download is not reported.
    Installed,
    /// The new slot is chosen, nothing has booted from it.
    Activated,
}

impl CutPoint {
    /// Every moment, in the order of an upgrade.
    pub const ALL: [Self; 5] = [Self::Started, Self::Downloading, Self::Transferred, Self::Installed, Self::Activated];

    /// As `--fail power-cut@…` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Downloading => "downloading",
            Self::Transferred => "transferred",
            Self::Installed => "installed",
            Self::Activated => "activated",
        }
    }
}

/// One fault of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The server seems to answer 404 to every download.
    Download,
    /// A byte of the downloaded image is flipped before it is checked.
    Checksum,
    /// The new image does not boot: the old one runs, and the device says so.
    Boot,
    /// The same, and the device says so in a message that can hardly be read.
    MalformedBoot,
    /// Commands and settings are refused.
    Refuse,
    /// Commands and settings are received and never answered; nothing comes of them.
    Mute,
    /// The download is throttled to [`FaultTiming::slow_rate`].
    Slow,
    /// The report of this step is never sent.
    Drop(Step),
    /// Every report and every answer to a setting is sent twice.
    Duplicate,
    /// The report of this step is held back until the next one is out.
    Reorder(Step),
    /// Every report and every answer to a setting waits for [`FaultTiming::delay`].
    Delay,
    /// The power is cut once at this moment and comes back after [`FaultTiming::offline_for`].
    PowerCut(CutPoint),
    /// The device connects only [`FaultTiming::offline_for`] after its start.
    Offline,
    /// The old image runs after the reboot, and the device claims success with its version.
    WrongVersion,
    /// Reports and answers to settings name an operation that nobody asked for.
    WrongOperation,
    /// The first setting is taken over, but when its answer is due the device closes its connection instead, for
    /// [`FaultTiming::offline_for`].
    Disconnect,
}

/// All faults of one device; none by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl Faults {
    /// Whether the device has that fault.
    pub fn has(&self, fault: Fault) -> bool {
        self.0.contains(&fault)
    }

    /// The moment of its power cut, if it has one.
    pub fn power_cut(&self) -> Option<CutPoint> {
        self.0.iter().find_map(|fault| if let Fault::PowerCut(point) = fault { Some(*point) } else { None })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drop(step) | Self::Reorder(step) => write!(f, "{}@{}", self.kind().name(), step.name()),
            Self::PowerCut(point) => write!(f, "{}@{}", self.kind().name(), point.name()),
            _ => f.write_str(self.kind().name()),
        }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(Fault::to_string).collect();
        f.write_str(&names.join(", "))
    }
}

/// How strong the faults that take time are.
#[derive(Debug, Clone, Copy)]
pub struct FaultTiming {
    /// Bytes a second of [`Fault::Slow`].
    pub slow_rate: u64,
    /// How long [`Fault::Delay`] waits before each report, and longer than others before each answer.
    pub delay: Duration,
    /// How long [`Fault::Offline`], [`Fault::PowerCut`] and [`Fault::Disconnect`] keep a device away.
    pub offline_for: Duration,
}

impl Default for FaultTiming {
    fn default() -> Self {
        Self { slow_rate: 64 * 1024, delay: Duration::from_secs(5), offline_for: Duration::from_secs(10) }
    }
}

/// A fault without its details: what `--fail` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// [`Fault::Download`]
    Download,
    /// [`Fault::Checksum`]
    Checksum,
    /// [`Fault::Boot`]
    Boot,
    /// [`Fault::MalformedBoot`]
    MalformedBoot,
    /// [`Fault::Refuse`]
    Refuse,
    /// [`Fault::Mute`]
    Mute,
    /// [`Fault::Slow`]
    Slow,
    /// [`Fault::Drop`]
    Drop,
    /// [`Fault::Duplicate`]
    Duplicate,
    /// [`Fault::Reorder`]
    Reorder,
    /// [`Fault::Delay`]
    Delay,
    /// [`Fault::PowerCut`]; at a moment chosen by the seed when none is given.
    PowerCut(Option<CutPoint>),
    /// [`Fault::Offline`]
    Offline,
    /// [`Fault::WrongVersion`]
    WrongVersion,
    /// [`Fault::WrongOperation`]
    WrongOperation,
    /// [`Fault::Disconnect`]
    Disconnect,
}

/// The reports of an upgrade.
const REPORTS: [Step; 4] =
    [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted];

impl FaultKind {
    /// Every kind with its line of help.
    pub const ALL: [(Self, &'static str); 16] = [
        (Self::Download, "behaves as if the server answered 404"),
        (Self::Checksum, "flips a byte of the image before checking it (needs a sha256 or signature in the command)"),
        (Self::Boot, "boots its old image and reports the failure"),
        (Self::MalformedBoot, "the same, reported in a message that can hardly be read"),
        (Self::Refuse, "refuses commands and settings (7002, Request denied)"),
        (Self::Mute, "receives commands and settings, does nothing and never answers"),
        (Self::Slow, "downloads no faster than --slow-rate"),
        (Self::Drop, "never sends one report of an upgrade"),
        (Self::Duplicate, "sends each report and each answer to a setting twice"),
        (Self::Reorder, "holds one report back and sends it after the next"),
        (Self::Delay, "waits for --delay before each report, and for --delay longer before each answer to a setting"),
        (
            Self::PowerCut(None),
            "loses power once in an upgrade, for --offline-for, and forgets answers to settings that it has not sent; \
            power-cut@STEP says when: started, downloading, transferred, installed, activated",
        ),
        (Self::Offline, "connects only --offline-for after the start"),
        (Self::WrongVersion, "boots its old image and reports that version with success"),
        (Self::WrongOperation, "reports, and answers settings, with another operation id"),
        (
            Self::Disconnect,
            "closes its connection once, for --offline-for, instead of answering a setting that it has taken over; \
            answers if it is asked again",
        ),
    ];

    /// As `--fail` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::Checksum => "checksum",
            Self::Boot => "boot",
            Self::MalformedBoot => "malformed-boot",
            Self::Refuse => "refuse",
            Self::Mute => "mute",
            Self::Slow => "slow",
            Self::Drop => "drop",
            Self::Duplicate => "duplicate",
            Self::Reorder => "reorder",
            Self::Delay => "delay",
            Self::PowerCut(_) => "power-cut",
            Self::Offline => "offline",
            Self::WrongVersion => "wrong-version",
            Self::WrongOperation => "wrong-operation",
            Self::Disconnect => "disconnect",
        }
    }

    /// The fault of one device; the generator chooses what the kind leaves open.
    fn fault(self, random: &mut StdRng) -> Fault {
        let mut any = |steps: &[Step]| steps.choose(random).copied().unwrap_or(Step::DownloadStarted);
        match self {
            Self::Download => Fault::Download,
            Self::Checksum => Fault::Checksum,
            Self::Boot => Fault::Boot,
            Self::MalformedBoot => Fault::MalformedBoot,
            Self::Refuse => Fault::Refuse,
            Self::Mute => Fault::Mute,
            Self::Slow => Fault::Slow,
            Self::Drop => Fault::Drop(any(&REPORTS)),
            Self::Duplicate => Fault::Duplicate,
            // Nothing follows the last report, so it cannot be overtaken.
            Self::Reorder => Fault::Reorder(any(&REPORTS[..3])),
            Self::Delay => Fault::Delay,
            Self::PowerCut(Some(point)) => Fault::PowerCut(point),
            Self::PowerCut(None) => Fault::PowerCut(CutPoint::ALL.choose(random).copied().unwrap_or(CutPoint::Started)),
            Self::Offline => Fault::Offline,
            Self::WrongVersion => Fault::WrongVersion,
            Self::WrongOperation => Fault::WrongOperation,
            Self::Disconnect => Fault::Disconnect,
        }
    }
}

impl Fault {
    fn kind(self) -> FaultKind {
        match self {
            Self::Download => FaultKind::Download,
            Self::Checksum => FaultKind::Checksum,
            Self::Boot => FaultKind::Boot,
            Self::MalformedBoot => FaultKind::MalformedBoot,
            Self::Refuse => FaultKind::Refuse,
            Self::Mute => FaultKind::Mute,
            Self::Slow => FaultKind::Slow,
            Self::Drop(_) => FaultKind::Drop,
            Self::Duplicate => FaultKind::Duplicate,
            Self::Reorder(_) => FaultKind::Reorder,
            Self::Delay => FaultKind::Delay,
            Self::PowerCut(point) => FaultKind::PowerCut(Some(point)),
            Self::Offline => FaultKind::Offline,
            Self::WrongVersion => FaultKind::WrongVersion,
            Self::WrongOperation => FaultKind::WrongOperation,
            Self::Disconnect => FaultKind::Disconnect,
        }
    }
}

/// How many devices, or requests, get a fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    /// Exactly so many.
    Count(usize),
    /// Each one with this probability, from 0 to 1.
    Probability(f64),
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(percent) = text.strip_suffix('%') {
            return match percent.parse::<f64>() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Self::Probability(percent / 100.0)),
                _ => Err(format!("{text:?} is no percentage: expected 0% to 100%")),
            };
        }
        text.parse().map(Self::Count).map_err(|_| format!("{text:?} is neither a count nor a percentage"))
    }
}

/// One `KIND=COUNT` or `KIND=PERCENT%` of `--fail`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultSpec {
    /// Which fault.
    pub kind: FaultKind,
    /// For how many.
    pub share: Share,
}

impl FromStr for FaultSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, share) = split_spec(text)?;
        Ok(Self { kind: parse_kind(text, kind)?, share })
    }
}

/// The kind, still to be read, and the share of `KIND=COUNT` or `KIND=PERCENT%`.
pub(crate) fn split_spec(text: &str) -> Result<(&str, Share), String> {
    let Some((kind, share)) = text.split_once('=') else {
        return Err(format!("{text:?} is no fault: expected KIND=COUNT or KIND=PERCENT%"));
    };
    Ok((kind, share.parse().map_err(|error| format!("{text:?}: {error}"))?))
}

fn parse_kind(text: &str, kind: &str) -> Result<FaultKind, String> {
    let (name, step) = kind.split_once('@').map_or((kind, None), |(name, step)| (name, Some(step)));
    let Some((kind, _)) = FaultKind::ALL.into_iter().find(|(kind, _)| kind.name() == name) else {
        let known: Vec<_> = FaultKind::ALL.iter().map(|(kind, _)| kind.name()).collect();
        return Err(format!("{text:?}: {name:?} is no kind of fault: expected one of {}", known.join(", ")));
    };
    match (kind, step) {
        (kind, None) => Ok(kind),
        (FaultKind::PowerCut(_), Some(step)) => {
            let Some(point) = CutPoint::ALL.into_iter().find(|point| point.name() == step) else {
                let known: Vec<_> = CutPoint::ALL.iter().map(|point| point.name()).collect();
                return Err(format!(
                    "{text:?}: {step:?} is no step of an upgrade: expected one of {}",
                    known.join(", ")
                ));
            };
            Ok(FaultKind::PowerCut(Some(point)))
        }
        (_, Some(_)) => Err(format!("{text:?}: only power-cut takes a step after @")),
    }
}

/// Gives faults to `devices` devices: the same seed gives the same faults to the same devices.
///
/// Counted faults go to different devices; fails if there are not enough of them.
pub fn assign(specs: &[FaultSpec], devices: usize, seed: u64) -> Result<Vec<Faults>, String> {
    let random = &mut StdRng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..devices).collect();
    order.shuffle(random);
    let mut free = order.into_iter();
    let mut faults = vec![Faults::default(); devices];
    for spec in specs {
        match spec.share {
            Share::Count(count) => {
                for _ in 0..count {
                    let Some(device) = free.next() else { return Err(too_many(specs, devices)) };
                    faults[device].0.push(spec.kind.fault(random));
                }
            }
            Share::Probability(probability) => {
                for device in &mut faults {
                    if random.random_bool(probability) {
                        device.0.push(spec.kind.fault(random));
                    }
                }
            }
        }
    }
    Ok(faults)
}

fn too_many(specs: &[FaultSpec], devices: usize) -> String {
    let wanted: usize = specs.iter().map(|spec| if let Share::Count(count) = spec.share { count } else { 0 }).sum();
    format!("the faults are for {wanted} different devices, but only {devices} run")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(text: &str) -> Vec<FaultSpec> {
        text.split(',').map(|spec| spec.parse().unwrap()).collect()
    }

    #[test]
    fn every_kind_is_parsed_and_shown_by_its_name() {
        for (kind, _) in FaultKind::ALL {
            let spec: FaultSpec = format!("{}=2", kind.name()).parse().unwrap();
            assert_eq!(spec, FaultSpec { kind, share: Share::Count(2) });
            let fault = kind.fault(&mut StdRng::seed_from_u64(1));
            assert!(fault.to_string().starts_with(kind.name()));
        }
        for point in CutPoint::ALL {
            let spec: FaultSpec = format!("power-cut@{}=10%", point.name()).parse().unwrap();
            assert_eq!(spec.kind, FaultKind::PowerCut(Some(point)));
            assert_eq!(spec.share, Share::Probability(0.1));
        }
    }

    #[test]
    fn a_bad_spec_is_named_with_what_was_expected() {
        for (spec, sentence) in [
            ("boot", "\"boot\" is no fault: expected KIND=COUNT or KIND=PERCENT%"),
            ("boot=x", "\"boot=x\": \"x\" is neither a count nor a percentage"),
            ("boot=101%", "\"boot=101%\": \"101%\" is no percentage: expected 0% to 100%"),
            ("boot@started=1", "\"boot@started=1\": only power-cut takes a step after @"),
        ] {
            assert_eq!(spec.parse::<FaultSpec>().unwrap_err(), sentence);
        }
        assert!("bot=1".parse::<FaultSpec>().unwrap_err().contains("expected one of download, checksum"));
        assert!("power-cut@x=1".parse::<FaultSpec>().unwrap_err().contains("expected one of started"));
    }

    #[test]
    fn the_same_seed_gives_the_same_devices_the_same_faults() {
        let specs = specs("boot=3,drop=2,power-cut=4,delay=30%");
        assert_eq!(assign(&specs, 50, 7), assign(&specs, 50, 7));
        assert_ne!(assign(&specs, 50, 7), assign(&specs, 50, 8));
    }

    #[test]
    fn counted_faults_are_disjoint_and_exact() {
        let faults = assign(&specs("boot=3,download=2,power-cut@installed=5"), 10, 1).unwrap();
        assert!(faults.iter().all(|faults| faults.0.len() == 1));
        assert_eq!(faults.iter().filter(|faults| faults.has(Fault::Boot)).count(), 3);
        let error = assign(&specs("boot=3,download=2"), 4, 1).unwrap_err();
        assert_eq!(error, "the faults are for 5 different devices, but only 4 run");
    }

    #[test]
    fn a_probability_is_each_devices_own() {
        assert!(assign(&specs("slow=100%"), 5, 1).unwrap().iter().all(|faults| faults.has(Fault::Slow)));
        assert!(assign(&specs("slow=0%"), 5, 1).unwrap().iter().all(|faults| faults.0.is_empty()));
    }
}
