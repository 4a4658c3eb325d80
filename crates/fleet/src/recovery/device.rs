//! The rules: what a device's failures and successes come to, and what its thing's attributes shall be. No I/O.

use protocol::OperationId;
use protocol::recovery::{Decision, Failure};
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
/// The version of attributes that are not of this parking; things begin with 1.
const UNREAD: i64 = 0;
/// How long an item is kept after a success or a release, in seconds: longer than any queue keeps a message.
const KEEP_SECONDS: i64 = 30 * 24 * 3600;
/// How long failures of a device that is not held are remembered: some day it is gone for good.
const KEEP_FAILURES_SECONDS: i64 = 365 * 24 * 3600;

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
pub(super) enum Release {
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
    /// When the item may go, in Unix seconds; none while the device is held, for its attributes are only here.
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
pub enum Success {
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

impl Held {
    /// Whether the thing's attributes have been changed.
    pub fn is_marked(&self) -> bool {
        self.marked
    }
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
        let counted = self.count(failure, limits, cycle);
        self.expires_at = (self.phase == Phase::Active).then_some(failure.received_at / 1000 + KEEP_FAILURES_SECONDS);
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
                backup: self
                    .held
                    .take()
                    .and_then(|last| last.backup)
                    .map(|last| Registered { version: UNREAD, ..last }),
                marked: false,
                ended: None,
            });
        }
        Counted { decision, attempt: self.attempts, cycle }
    }

    /// Takes in a success that the broker got at that time. Failures that came after it still count.
    pub fn succeed(&mut self, received_at: i64, now_seconds: i64) -> Success {
        if received_at <= self.cleared_at || self.history.first().is_some_and(|first| first.received_at > received_at) {
            return Success::Stale;
        }
        if self.phase == Phase::Quarantined {
            return Success::Quarantined;
        }
        self.history.retain(|known| known.received_at > received_at);
        self.let_go(Release::Succeeded);
        self.attempts = u32::try_from(self.history.len()).unwrap_or(u32::MAX);
        self.forget(received_at, now_seconds);
        Success::Cleared
    }

    /// Ends a parking because its time is over; false if it has ended otherwise, or is another one.
    pub fn restore(&mut self, operation: &OperationId) -> bool {
        let ours = self.held.as_ref().filter(|held| held.operation_id == *operation);
        if let Some(since) = ours.map(|held| held.since).filter(|_| self.phase == Phase::Parked) {
            self.expires_at = Some(since / 1000 + KEEP_FAILURES_SECONDS);
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
        let keep = if self.history.is_empty() { KEEP_SECONDS } else { KEEP_FAILURES_SECONDS };
        self.expires_at = Some(now_seconds + keep);
    }

    /// Whether the device is held in that phase for that failure.
    pub fn is_held(&self, phase: Phase, operation: &OperationId) -> bool {
        self.phase == phase && self.held.as_ref().is_some_and(|held| held.operation_id == *operation)
    }

    /// What is to be done next, so that the registry says what this item says. The registry must have been read before
    /// the item. Each step may be the last before a crash: whoever asks again goes on from there.
    pub(super) fn next_step(&self, now: &Registered) -> Step {
        let Some(held) = &self.held else { return Step::Done };
        match (self.phase.marker(), &held.backup) {
            (Some(_), _) if held.marked => Step::Done,
            // Even attributes that are as they shall be are written: whoever is about to bring back those of the last
            // parking holds a version that must not be the thing's any more.
            (Some(marker), Some(backup)) if backup.version == now.version => {
                let attributes = ATTRIBUTES.map(|name| (name.to_owned(), marker.to_owned())).into();
                Step::Update { attributes, version: now.version }
            }
            (Some(marker), Some(backup)) if backup.version != UNREAD && now.is_marked(marker) => Step::Mark,
            (Some(_), _) => Step::Keep(now.clone()),
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
        let Some(held) = self.held_open(operation) else { return };
        // Another may have kept newer ones meanwhile, and changed them.
        if held.backup.as_ref().is_none_or(|last| last.version < attributes.version) {
            held.backup = Some(attributes.without_markers(held.backup.as_ref()));
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
    fn is_marked(&self, marker: &str) -> bool {
        ATTRIBUTES.into_iter().all(|name| self.attributes.get(name).is_some_and(|value| value == marker))
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { attempts: 10, cycles: 2 };

    fn failure(at: i64) -> Failure {
        Failure {
            thing_name: "gateway-1".parse().unwrap(),
            operation_id: format!("gateway-1-{at}").parse().unwrap(),
            timestamp: at,
            received_at: at,
            model: None,
            firmware: None,
        }
    }

    /// A device that has failed at these times.
    fn failed(times: std::ops::RangeInclusive<i64>) -> Device {
        let mut device = Device::default();
        times.for_each(|at| _ = device.fail(&failure(at), LIMITS));
        device
    }

    #[test]
    fn the_tenth_failure_parks_and_that_of_the_second_cycle_quarantines() {
        let mut device = Device::default();
        for cycle in 1..=2 {
            for attempt in 1..=10 {
                let at = i64::from(cycle * 100 + attempt);
                let decision = match (attempt, cycle) {
                    (10, 1) => Decision::Park,
                    (10, 2) => Decision::Quarantine,
                    _ => Decision::Retry,
                };
                let expected = Counted { decision, attempt, cycle };
                assert_eq!(device.fail(&failure(at), LIMITS), expected);
                // Said again at once: the same answer, and nothing counts twice.
                let before = device.clone();
                assert_eq!(device.fail(&failure(at), LIMITS), expected);
                assert_eq!(device, before);
            }
            assert_eq!(device.restore(&failure(i64::from(cycle * 100 + 10)).operation_id), cycle == 1);
        }
        assert_eq!((device.phase, device.cycles, device.attempts), (Phase::Quarantined, 1, 10));
        for at in 300..350 {
            assert_eq!(device.fail(&failure(at), LIMITS).decision, Decision::Ignored);
        }
        assert_eq!((device.ignored, device.history.len(), device.attempts), (50, HISTORY, 10));
        // The deciding failure's answer is known even when it is out of the history.
        assert_eq!(device.fail(&failure(210), LIMITS).decision, Decision::Quarantine);
        assert_eq!(device.fail(&failure(110), LIMITS).decision, Decision::Ignored);
    }

    #[test]
    fn an_item_expires_unless_its_device_is_held() {
        let mut device = failed(1..=9);
        let some_day = Some(KEEP_FAILURES_SECONDS);
        assert_eq!(device.expires_at, some_day);
        (10..=12).for_each(|at| _ = device.fail(&failure(at), LIMITS));
        assert_eq!((device.phase, device.expires_at), (Phase::Parked, None));
        assert!(device.restore(&failure(10).operation_id));
        assert_eq!((device.phase, device.expires_at), (Phase::Active, some_day));
        (13..=30).for_each(|at| _ = device.fail(&failure(at), LIMITS));
        assert_eq!((device.phase, device.expires_at), (Phase::Quarantined, None));
    }

    #[test]
    fn failures_while_parked_change_nothing_but_their_number() {
        let mut device = failed(1..=10);
        let held = device.held.clone();
        for at in 11..=15 {
            assert_eq!(device.fail(&failure(at), LIMITS).decision, Decision::Ignored);
        }
        assert_eq!((device.phase, device.ignored, &device.held), (Phase::Parked, 5, &held));
    }

    #[test]
    fn a_success_clears_what_was_before_it() {
        let mut device = failed(1..=10);
        assert_eq!(device.succeed(20, 0), Success::Cleared);
        assert_eq!((device.phase, device.attempts, device.cycles, device.ignored), (Phase::Active, 0, 0, 0));
        assert_eq!(device.expires_at, Some(KEEP_SECONDS));
        let before = device.clone();
        assert_eq!(device.succeed(20, 5), Success::Stale, "said twice");
        assert_eq!(device.fail(&failure(15), LIMITS).decision, Decision::Ignored, "late");
        assert_eq!(device, before);
        assert!(!device.restore(&failure(10).operation_id), "the parking has ended otherwise");
        assert_eq!(device.fail(&failure(21), LIMITS).attempt, 1);
        assert_eq!(device.expires_at, Some(KEEP_FAILURES_SECONDS));
    }

    #[test]
    fn a_success_between_failures_leaves_the_later_ones() {
        let mut device = failed(1..=10);
        assert_eq!(device.succeed(8, 0), Success::Cleared);
        assert_eq!((device.phase, device.attempts, device.expires_at), (Phase::Active, 2, Some(KEEP_FAILURES_SECONDS)));
        let mut device = failed(5..=7);
        assert_eq!(device.succeed(4, 0), Success::Stale);
        assert_eq!(device.attempts, 3);
    }

    #[test]
    fn only_an_operator_ends_a_quarantine() {
        let mut device = failed(1..=10);
        assert!(device.restore(&failure(10).operation_id));
        (11..=20).for_each(|at| _ = device.fail(&failure(at), LIMITS));
        assert_eq!(device.phase, Phase::Quarantined);
        assert_eq!(device.succeed(30, 0), Success::Quarantined);
        assert!(!device.restore(&failure(20).operation_id));
        assert!(device.release(40_000));
        assert_eq!((device.phase, device.attempts, device.cycles), (Phase::Active, 0, 0));
        assert_eq!(device.expires_at, Some(40 + KEEP_SECONDS));
        assert!(!device.release(50_000), "nothing to release any more");
        assert_eq!(device.fail(&failure(60_000), LIMITS), Counted { decision: Decision::Retry, attempt: 1, cycle: 1 });
    }

    #[test]
    fn failures_in_any_order_count_the_same() {
        let mut device = Device::default();
        for at in [5, 3, 9, 1, 7, 2, 8, 4, 6] {
            assert_eq!(device.fail(&failure(at), LIMITS).decision, Decision::Retry);
        }
        assert_eq!(device.fail(&failure(10), LIMITS).decision, Decision::Park);
    }
}
