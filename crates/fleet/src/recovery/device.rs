//! The rules: what a device's failures and successes come to, and what its thing's attributes shall be. No I/O.

use protocol::OperationId;
use protocol::recovery::Failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The attributes that dynamic thing groups query, and that hide a device while it is held.
pub(super) const ATTRIBUTES: [&str; 2] = ["FW", "model"];
/// What the attributes of a parked device are.
const MOVE_OUT: &str = "moveOut";
/// What those of a quarantined one are.
const FAILED_TO_UPDATE: &str = "failedtoupdate";
/// How many failures are remembered.
const HISTORY: usize = 20;
/// How long an item is kept after a success or a release, in seconds: longer than any queue keeps a message.
const KEEP_SECONDS: i64 = 30 * 24 * 3600;

/// Values of [`ATTRIBUTES`]; one that the thing does not have is missing.
pub(super) type Values = BTreeMap<String, String>;

/// Whether a device is left to itself, hidden, or given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Phase {
    /// Its failures are counted.
    #[default]
    Active,
    /// It is out of its dynamic groups, until its time is over.
    Parked,
    /// It is out of them, until an operator releases it.
    Quarantined,
}

impl Phase {
    fn marker(self) -> Option<&'static str> {
        match self {
            Self::Active => None,
            Self::Parked => Some(MOVE_OUT),
            Self::Quarantined => Some(FAILED_TO_UPDATE),
        }
    }
}

/// What a failure comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Decision {
    /// The platform may try again.
    Retry,
    /// The cycle's retry budget is used up: the device rests.
    Park,
    /// All cycles are used up: people have to look.
    Quarantine,
    /// The device is held already, or the failure is older than its last success or release.
    Ignored,
}

/// The retry budget.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Failures in a cycle.
    pub attempts: u32,
    /// Cycles. The last one ends in quarantine.
    pub cycles: u32,
}

/// A failure that is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Remembered {
    timestamp: i64,
    received_at: i64,
    decision: Decision,
    attempt: u32,
    cycle: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    firmware: Option<String>,
}

/// The attributes as they were in the registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Registered {
    /// The thing's version when they were read.
    pub version: i64,
    /// The values.
    pub attributes: Values,
}

/// What ended a parking or a quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Release {
    /// The time was over.
    Restored,
    /// The device reported a success.
    Succeeded,
    /// An operator.
    Released,
}

/// A parking or quarantine: the one that is, or the last one that was.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    /// The failure that was one too many.
    pub operation_id: OperationId,
    /// When the broker got it, in Unix milliseconds.
    since: i64,
    decision: Decision,
    /// The attributes before; none until they are read.
    backup: Option<Registered>,
    /// Whether the attributes have been changed. What differs after that is an operator's work.
    marked: bool,
    /// What ended it; none while it lasts.
    ended: Option<Release>,
}

/// All that is known of a device's failures: one item a thing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// What is done about them.
    pub phase: Phase,
    /// Failures in this cycle.
    pub attempts: u32,
    /// Cycles that are over.
    pub cycles: u32,
    /// Failures that came while the device was held.
    pub ignored: u32,
    /// The last failures, oldest first.
    history: Vec<Remembered>,
    /// The parking or quarantine.
    pub held: Option<Held>,
    /// When the device last succeeded or was released, in Unix milliseconds: what is older does not count any more.
    cleared_at: i64,
    /// When the item may go, in Unix seconds; none while something is to be remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<i64>,
    /// Counts the item's writes.
    pub(super) revision: u64,
}

/// A failure that has been counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counted {
    /// What it comes to.
    pub decision: Decision,
    /// Which failure of its cycle it is; 0 if it does not count.
    pub attempt: u32,
    /// Which cycle, from 1.
    pub cycle: u32,
}

/// What a success comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Cleared {
    /// What was before is forgotten; a parked device is restored.
    Cleared,
    /// All that is known is newer: no effect.
    Stale,
    /// The device is quarantined: an operator decides.
    Quarantined,
}

/// The next thing to do so that the registry says what the item says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Keep these attributes, before they are changed.
    Keep(Registered),
    /// Change the thing's attributes, if it still has this version. An empty value removes one.
    Update { attributes: Values, version: i64 },
    /// Note that they have been changed.
    Mark,
    /// Nothing.
    Done,
}

fn is_marker(value: Option<&String>) -> bool {
    value.is_some_and(|value| value == MOVE_OUT || value == FAILED_TO_UPDATE)
}

impl Device {
    /// Counts a failure, once.
    pub fn fail(&mut self, failure: &Failure, limits: Limits) -> Counted {
        if let Some(known) = self.history.iter().find(|known| known.timestamp == failure.timestamp) {
            return Counted { decision: known.decision, attempt: known.attempt, cycle: known.cycle };
        }
        let cycle = self.cycles + 1;
        if let Some(held) = self.held.as_ref().filter(|held| held.operation_id == failure.operation_id) {
            return Counted { decision: held.decision, attempt: limits.attempts, cycle };
        }
        // What is older than all that is remembered may have been counted and forgotten.
        let forgotten = self.history.len() == HISTORY && failure.received_at < self.history[0].received_at;
        if failure.received_at <= self.cleared_at || forgotten {
            return Counted { decision: Decision::Ignored, attempt: 0, cycle };
        }
        self.expires_at = None;
        let counted = self.count(failure, limits, cycle);
        self.history.push(Remembered {
            timestamp: failure.timestamp,
            received_at: failure.received_at,
            decision: counted.decision,
            attempt: counted.attempt,
            cycle,
            model: failure.model.clone(),
            firmware: failure.firmware.clone(),
        });
        self.history.sort_by_key(|known| known.received_at);
        let surplus = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..surplus);
        counted
    }

    fn count(&mut self, failure: &Failure, limits: Limits, cycle: u32) -> Counted {
        if self.phase != Phase::Active {
            self.ignored += 1;
            return Counted { decision: Decision::Ignored, attempt: 0, cycle };
        }
        self.attempts += 1;
        let decision = match (self.attempts >= limits.attempts, cycle >= limits.cycles) {
            (false, _) => Decision::Retry,
            (true, false) => Decision::Park,
            (true, true) => Decision::Quarantine,
        };
        if decision != Decision::Retry {
            self.phase = if decision == Decision::Park { Phase::Parked } else { Phase::Quarantined };
            self.held = Some(Held {
                operation_id: failure.operation_id.clone(),
                since: failure.received_at,
                decision,
                // If the attributes of the last parking have not come back yet, they are still only here.
                backup: self.held.take().and_then(|last| last.backup),
                marked: false,
                ended: None,
            });
        }
        Counted { decision, attempt: self.attempts, cycle }
    }

    /// Takes in a success that the broker got at that time. Failures that came after it still count.
    pub fn succeed(&mut self, received_at: i64, now_seconds: i64) -> Cleared {
        if received_at <= self.cleared_at || self.history.first().is_some_and(|first| first.received_at > received_at) {
            return Cleared::Stale;
        }
        if self.phase == Phase::Quarantined {
            return Cleared::Quarantined;
        }
        self.history.retain(|known| known.received_at > received_at);
        self.let_go(Release::Succeeded);
        self.attempts = u32::try_from(self.history.len()).unwrap_or(u32::MAX);
        self.forget(received_at, now_seconds);
        Cleared::Cleared
    }

    /// Ends a parking because its time is over; false if it has ended otherwise, or is another one.
    pub fn restore(&mut self, operation: &OperationId) -> bool {
        let ours = self.held.as_ref().filter(|held| held.operation_id == *operation);
        if self.phase == Phase::Parked && ours.is_some() {
            self.let_go(Release::Restored);
            self.attempts = 0;
            self.cycles += 1;
            return true;
        }
        ours.is_some_and(|held| held.ended == Some(Release::Restored))
    }

    /// Ends whatever is, and forgets whatever was; false if there was nothing.
    pub fn release(&mut self, now_milliseconds: i64) -> bool {
        if self.phase == Phase::Active && self.attempts == 0 && self.cycles == 0 && self.history.is_empty() {
            return false;
        }
        self.history.clear();
        self.let_go(Release::Released);
        self.attempts = 0;
        self.forget(now_milliseconds, now_milliseconds / 1000);
        true
    }

    fn let_go(&mut self, release: Release) {
        if self.phase != Phase::Active {
            self.phase = Phase::Active;
            if let Some(held) = &mut self.held {
                held.ended = Some(release);
            }
        }
    }

    fn forget(&mut self, cleared_at: i64, now_seconds: i64) {
        self.cycles = 0;
        self.ignored = 0;
        self.cleared_at = self.cleared_at.max(cleared_at);
        self.expires_at = self.history.is_empty().then_some(now_seconds + KEEP_SECONDS);
    }

    /// Whether the device is held in that phase for that failure.
    pub fn is_held(&self, phase: Phase, operation: &OperationId) -> bool {
        self.phase == phase && self.held.as_ref().is_some_and(|held| held.operation_id == *operation)
    }

    /// What is to be done next, so that the registry says what this item says. Each step may be the last before a
    /// crash: whoever asks again goes on from there.
    pub(super) fn next_step(&self, now: &Registered) -> Step {
        let Some(held) = &self.held else { return Step::Done };
        match (self.phase.marker(), &held.backup) {
            (Some(_), _) if held.marked => Step::Done,
            (Some(marker), backup) => {
                let open: Values = ATTRIBUTES
                    .into_iter()
                    .filter(|name| now.attributes.get(*name).is_none_or(|value| value != marker))
                    .map(|name| (name.to_owned(), marker.to_owned()))
                    .collect();
                match backup {
                    Some(_) if open.is_empty() => Step::Mark,
                    Some(backup) if backup.version == now.version => {
                        Step::Update { attributes: open, version: now.version }
                    }
                    last => Step::Keep(now.without_markers(last.as_ref())),
                }
            }
            (None, None) => Step::Done,
            (None, Some(backup)) => {
                let marked = ATTRIBUTES.into_iter().filter(|name| is_marker(now.attributes.get(*name)));
                let value = |name| backup.attributes.get(name).cloned().unwrap_or_default();
                let attributes: Values = marked.map(|name| (name.to_owned(), value(name))).collect();
                if attributes.is_empty() { Step::Done } else { Step::Update { attributes, version: now.version } }
            }
        }
    }

    /// Keeps the attributes of the parking or quarantine that they were read for.
    pub(super) fn keep(&mut self, operation: &OperationId, attributes: &Registered) {
        if let Some(held) = self.held_open(operation) {
            held.backup = Some(attributes.clone());
        }
    }

    /// Notes that the attributes have been changed.
    pub(super) fn mark(&mut self, operation: &OperationId) {
        if let Some(held) = self.held_open(operation) {
            held.marked = true;
        }
    }

    fn held_open(&mut self, operation: &OperationId) -> Option<&mut Held> {
        self.held.as_mut().filter(|held| held.operation_id == *operation && held.ended.is_none() && !held.marked)
    }

    /// The attributes that somebody else has changed while the device was held, with their values now.
    pub(super) fn changed_by_operator(&self, now: &Registered) -> Values {
        let Some(backup) = self.held.as_ref().and_then(|held| held.backup.as_ref()) else { return Values::new() };
        let value = |of: &Registered, name: &str| of.attributes.get(name).cloned().unwrap_or_default();
        let changed = ATTRIBUTES.into_iter().filter(|name| value(now, name) != value(backup, name));
        changed.map(|name| (name.to_owned(), value(now, name))).collect()
    }
}

impl Registered {
    /// The attributes without those that hide a device: what these were before is known from the last time.
    fn without_markers(&self, last: Option<&Self>) -> Self {
        let value = |name: &str| match self.attributes.get(name) {
            marker if is_marker(marker) => last?.attributes.get(name).cloned(),
            value => value.cloned(),
        };
        let attributes = ATTRIBUTES.into_iter().filter_map(|name| Some((name.to_owned(), value(name)?)));
        Self { version: self.version, attributes: attributes.collect() }
    }
}
