//! When a sensor's surroundings are to be brought back: what is known of a sensor, and the rule of a metric. No I/O.

use super::readings::Sample;
use serde::{Deserialize, Serialize};

/// In milliseconds.
const HOUR: i64 = 3_600_000;

/// The rule of a metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Where the value shall be, in the metric's unit.
    pub target: f64,
    /// How far off it may be before something is done.
    pub band: f64,
    /// How much nearer than that it must come before that is over.
    pub hysteresis: f64,
    /// How long after an action there is no other, in milliseconds.
    pub cool_down: i64,
    /// So many actions an hour at most.
    pub actions_an_hour: usize,
    /// How long after an action a reading must have come nearer to the target, in milliseconds.
    pub effect_after: i64,
}

/// The rules of both metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// In degrees Celsius.
    pub temperature: Rule,
    /// In percent.
    pub humidity: Rule,
}

/// What is being done about a metric of a sensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Phase {
    /// Nothing.
    #[default]
    Calm,
    /// It is brought back.
    Correcting,
    /// People have been told, for nothing has helped; it has not come back since.
    Escalated,
}

/// What is known of a metric of a sensor.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Control {
    #[serde(default)]
    phase: Phase,
    /// When the sensor was told in the last hour, in Unix milliseconds.
    #[serde(default)]
    actions: Vec<i64>,
    /// The first action whose effect has not been seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unproved: Option<Unproved>,
    /// Why people are to be told, if they have not been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    untold: Option<Reason>,
}

/// An action, and how far off the value was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Unproved {
    time: i64,
    off: f64,
    /// The remedy.
    remedy: String,
}

/// What a reading asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Nothing,
    Act,
    Escalate(Reason),
}

/// Why people are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Reason {
    /// An action had no effect.
    NoEffect,
    /// After an action there was no reading that could show its effect.
    NoReading,
    /// There were as many actions in the hour as there may be.
    TooManyActions,
}

/// A metric's value that the broker got then, looked at now: a backlog is looked at all at once. Both in Unix milliseconds.
#[derive(Debug, Clone, Copy)]
struct Observation {
    value: f64,
    received_at: i64,
    now: i64,
}

impl Control {
    fn decide(&mut self, rule: &Rule, observation: Observation, remedy: &str) -> Decision {
        let Observation { value, received_at, now } = observation;
        let off = (value - rule.target).abs();
        self.actions.retain(|time| *time > now - HOUR);
        let is_back = match self.phase {
            Phase::Calm => off <= rule.band,
            Phase::Correcting | Phase::Escalated => off <= rule.band - rule.hysteresis,
        };
        if is_back {
            self.phase = Phase::Calm;
            self.unproved = None;
            self.untold = None;
            return Decision::Nothing;
        }
        if self.phase == Phase::Escalated {
            return Decision::Nothing;
        }
        self.phase = Phase::Correcting;
        if let Some(unproved) = self.unproved.take_if(|unproved| received_at >= unproved.time + rule.effect_after)
            && off >= unproved.off
        {
            return self.escalate(Reason::NoEffect);
        }
        if self.actions.last().is_some_and(|last| now < last + rule.cool_down) {
            return Decision::Nothing;
        }
        if self.actions.len() >= rule.actions_an_hour {
            return self.escalate(Reason::TooManyActions);
        }
        self.actions.push(now);
        self.unproved.get_or_insert_with(|| Unproved { time: now, off, remedy: remedy.to_owned() });
        Decision::Act
    }

    fn escalate(&mut self, reason: Reason) -> Decision {
        self.phase = Phase::Escalated;
        self.unproved = None;
        self.untold = Some(reason);
        Decision::Escalate(reason)
    }

    /// The sensor was told later than was decided, or not at all: what was counted from the decision counts from then.
    fn told(&mut self, decided_at: i64, told_at: Option<i64>) {
        self.actions.retain(|time| *time != decided_at);
        self.actions.extend(told_at);
        match (&mut self.unproved, told_at) {
            (Some(unproved), Some(told_at)) if unproved.time == decided_at => unproved.time = told_at,
            (Some(unproved), None) if unproved.time == decided_at => self.unproved = None,
            _ => {}
        }
    }

    /// If nothing has shown the effect of that remedy by now, people are to be told.
    fn check(&mut self, remedy: &str) {
        if self.unproved.take_if(|unproved| unproved.remedy == remedy).is_some() {
            self.escalate(Reason::NoReading);
        }
    }
}

/// What is to be done because of a reading, or of the lack of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Remedy {
    /// Tells it from the sensor's others: the reading's sort key, or one made of it.
    pub(crate) id: String,
    /// When it was decided, in Unix milliseconds.
    pub(crate) decided_at: i64,
    /// The reading.
    pub(crate) sample: Sample,
    /// The metrics for which the sensor is told to act; none if it is not.
    pub(crate) act_on: Vec<Metric>,
    /// The metrics that people are told of.
    pub(crate) escalate: Vec<(Metric, Reason)>,
}

/// What a sensor measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Metric {
    /// In degrees Celsius.
    Temperature,
    /// In percent.
    Humidity,
}

/// What is known of a sensor: its item in the table.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Climate {
    #[serde(default)]
    revision: u64,
    /// The newest reading: older ones, and the same again, change nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    newest: Option<Sample>,
    #[serde(default)]
    temperature: Control,
    #[serde(default)]
    humidity: Control,
    /// When people were last told, in Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    told_at: Option<i64>,
    /// What has been decided, and is not done yet.
    #[serde(default)]
    pending: Vec<Remedy>,
    /// When all of this may be forgotten, in Unix seconds.
    #[serde(default)]
    expires_at: i64,
}

impl crate::item_table::Item for Climate {
    const KEY: &'static str = "device";

    fn revision(&mut self) -> &mut u64 {
        &mut self.revision
    }
}

impl Climate {
    /// Follows a sensor's next reading. `now` is in Unix milliseconds.
    pub(crate) fn follow(&mut self, rules: &Rules, sample: &Sample, now: i64) {
        let id = sample.sort_key();
        if self.newest.as_ref().is_some_and(|newest| id <= newest.sort_key()) {
            return;
        }
        self.newest = Some(sample.clone());
        // An hour's actions count.
        self.expires_at = now / 1000 + 86_400;
        let observation = |value| Observation { value, received_at: sample.received_at, now };
        let decisions = [
            (Metric::Temperature, self.temperature.decide(&rules.temperature, observation(sample.temperature), &id)),
            (Metric::Humidity, self.humidity.decide(&rules.humidity, observation(sample.humidity), &id)),
        ];
        let act_on = decisions.into_iter().filter(|(_, decision)| *decision == Decision::Act);
        let act_on = act_on.map(|(metric, _)| metric).collect();
        let escalate = self.escalations(now);
        self.decided(Remedy { id, decided_at: now, sample: sample.clone(), act_on, escalate });
    }

    /// What people are told now. They are told of a sensor once an hour: what comes to be in between waits, and is forgotten if it
    /// passes. A sensor that is at the edge of its band would call them with each reading.
    fn escalations(&mut self, now: i64) -> Vec<(Metric, Reason)> {
        if self.told_at.is_some_and(|told_at| now < told_at + HOUR) {
            return Vec::new();
        }
        let controls = [(Metric::Temperature, &mut self.temperature), (Metric::Humidity, &mut self.humidity)];
        let untold = controls.into_iter().filter_map(|(metric, control)| Some((metric, control.untold.take()?)));
        let untold: Vec<_> = untold.collect();
        if !untold.is_empty() {
            self.told_at = Some(now);
        }
        untold
    }

    /// Sees whether the effect of a remedy has been seen meanwhile; if not, the sensor has been silent for too long. `now` is in
    /// Unix milliseconds.
    pub(crate) fn check(&mut self, remedy: &str, now: i64) {
        let Some(sample) = self.newest.clone() else { return };
        for control in [&mut self.temperature, &mut self.humidity] {
            control.check(remedy);
        }
        let escalate = self.escalations(now);
        self.decided(Remedy { id: format!("{remedy}#check"), decided_at: now, sample, act_on: vec![], escalate });
    }

    fn decided(&mut self, remedy: Remedy) {
        if !remedy.act_on.is_empty() || !remedy.escalate.is_empty() {
            self.pending.push(remedy);
        }
    }

    /// Whether people are still to be told of something, when an hour has passed since they last were.
    pub(crate) fn is_untold(&self) -> bool {
        [&self.temperature, &self.humidity].iter().any(|control| control.untold.is_some())
    }

    /// What is not done yet, the oldest first.
    pub(crate) fn pending(&self) -> &[Remedy] {
        &self.pending
    }

    /// Notes that a remedy is done, and when the sensor was told, if it was.
    pub(crate) fn done(&mut self, remedy: &Remedy, told_at: Option<i64>) {
        self.pending.retain(|one| one.id != remedy.id);
        for metric in &remedy.act_on {
            match metric {
                Metric::Temperature => self.temperature.told(remedy.decided_at, told_at),
                Metric::Humidity => self.humidity.told(remedy.decided_at, told_at),
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) const MINUTE: i64 = 60_000;

    /// 21 ± 3, over at ± 2; five minutes between actions, three an hour, an effect after four minutes.
    fn rule() -> Rule {
        Rule {
            target: 21.0,
            band: 3.0,
            hysteresis: 1.0,
            cool_down: 5 * MINUTE,
            actions_an_hour: 3,
            effect_after: 4 * MINUTE,
        }
    }

    /// Decides on values, each so many minutes after midnight.
    fn decide(values: &[(i64, f64)]) -> Vec<Decision> {
        let mut control = Control::default();
        let observation = |minute, value| Observation { value, received_at: minute * MINUTE, now: minute * MINUTE };
        values.iter().map(|(minute, value)| control.decide(&rule(), observation(minute, *value), "remedy")).collect()
    }

    use Decision::{Act, Escalate, Nothing};

    #[test]
    fn nothing_is_done_within_the_band_on_either_side() {
        assert_eq!(decide(&[(0, 21.0), (1, 24.0), (2, 18.0)]), [Nothing; 3]);
        assert_eq!(decide(&[(0, 24.1)]), [Act]);
        assert_eq!(decide(&[(0, 17.9)]), [Act]);
    }

    #[test]
    fn what_is_begun_goes_on_until_the_value_is_well_within_the_band() {
        // At 23.5 a calm sensor would be left alone.
        assert_eq!(decide(&[(0, 25.0), (5, 23.5), (10, 23.0), (15, 23.5)]), [Act, Act, Nothing, Nothing]);
    }

    #[test]
    fn actions_keep_their_distance() {
        assert_eq!(decide(&[(0, 26.0), (1, 25.9), (4, 25.0), (5, 24.9)]), [Act, Nothing, Nothing, Act]);
    }

    #[test]
    fn an_action_without_an_effect_is_told_of_once_and_not_repeated() {
        let stuck = [(0, 26.0), (3, 26.0), (4, 26.0), (10, 27.0), (20, 25.0)];
        assert_eq!(decide(&stuck), [Act, Nothing, Escalate(Reason::NoEffect), Nothing, Nothing]);
        // Once it is back, it is dealt with again.
        let back = [(0, 26.0), (4, 26.0), (10, 22.0), (20, 25.0)];
        assert_eq!(decide(&back), [Act, Escalate(Reason::NoEffect), Nothing, Act]);
    }

    #[test]
    fn an_effect_must_show_after_each_action() {
        let values = [(0, 27.0), (4, 26.0), (5, 26.0), (9, 26.5)];
        assert_eq!(decide(&values), [Act, Nothing, Act, Escalate(Reason::NoEffect)]);
    }

    #[test]
    fn too_many_actions_in_an_hour_are_told_of() {
        let slow = [(0, 27.0), (5, 26.8), (10, 26.6), (15, 26.4), (75, 26.2)];
        assert_eq!(decide(&slow), [Act, Act, Act, Escalate(Reason::TooManyActions), Nothing]);
        let in_time = [(0, 27.0), (5, 26.8), (10, 26.6), (60, 26.4)];
        assert_eq!(decide(&in_time), [Act, Act, Act, Act]);
    }

    pub(crate) fn sample(minute: i64, id: &str, temperature: f64, humidity: f64) -> Sample {
        Sample {
            device: "sensor-1".parse().unwrap(),
            time: minute * MINUTE,
            id: id.parse().unwrap(),
            temperature,
            humidity,
            building: "1".parse().unwrap(),
            received_at: minute * MINUTE,
        }
    }

    pub(crate) fn rules() -> Rules {
        Rules { temperature: rule(), humidity: Rule { target: 50.0, band: 10.0, hysteresis: 2.0, ..rule() } }
    }

    #[test]
    fn one_message_serves_both_metrics() {
        let mut climate = Climate::default();
        climate.follow(&rules(), &sample(1, "a", 26.0, 70.0), MINUTE);
        assert_eq!(climate.pending().len(), 1);
        assert_eq!(climate.pending()[0].act_on, [Metric::Temperature, Metric::Humidity]);
        let remedy = climate.pending()[0].clone();
        climate.done(&remedy, Some(MINUTE));
        assert_eq!(climate.pending(), []);
    }

    #[test]
    fn a_reading_that_comes_again_or_late_changes_nothing() {
        let mut climate = Climate::default();
        climate.follow(&rules(), &sample(10, "a", 26.0, 50.0), 10 * MINUTE);
        let known = climate.clone();
        climate.follow(&rules(), &sample(10, "a", 26.0, 50.0), 11 * MINUTE);
        climate.follow(&rules(), &sample(9, "b", 99.0, 50.0), 11 * MINUTE);
        assert_eq!(climate, known);
        climate.follow(&rules(), &sample(15, "c", 25.0, 50.0), 15 * MINUTE);
        assert_eq!(climate.pending().len(), 2);
    }

    #[test]
    fn a_backlog_asks_for_one_action_and_proves_nothing() {
        let mut climate = Climate::default();
        for minute in 0..10 {
            climate.follow(&rules(), &sample(minute, "a", 26.0, 50.0), 10 * MINUTE);
        }
        assert_eq!(climate.pending().len(), 1);
        assert_eq!(climate.pending()[0].escalate, []);
        // What came since the action does prove something.
        climate.follow(&rules(), &sample(14, "a", 26.0, 50.0), 14 * MINUTE);
        assert_eq!(climate.pending()[1].escalate, [(Metric::Temperature, Reason::NoEffect)]);
    }

    #[test]
    fn a_sensor_that_was_told_late_has_its_time_and_one_that_was_not_told_is_not_blamed() {
        let mut climate = Climate::default();
        climate.follow(&rules(), &sample(0, "a", 26.0, 50.0), 0);
        let remedy = climate.pending()[0].clone();
        let mut late = climate.clone();
        late.done(&remedy, Some(5 * MINUTE));
        late.follow(&rules(), &sample(6, "b", 26.0, 50.0), 6 * MINUTE);
        assert_eq!(late.pending(), [], "the cool-down and the effect count from the fifth minute");
        climate.done(&remedy, None);
        climate.follow(&rules(), &sample(12, "b", 26.0, 50.0), 12 * MINUTE);
        assert_eq!(climate.pending()[0].act_on, [Metric::Temperature]);
    }

    #[test]
    fn people_are_told_of_a_sensor_that_falls_silent_after_a_remediation() {
        let mut climate = Climate::default();
        climate.follow(&rules(), &sample(0, "a", 26.0, 50.0), 0);
        let remedy = climate.pending()[0].clone();
        climate.done(&remedy, Some(0));
        let mut heard = climate.clone();
        climate.check(&remedy.id, 8 * MINUTE);
        assert_eq!(climate.pending()[0].escalate, [(Metric::Temperature, Reason::NoReading)]);
        let overdue = climate.pending()[0].clone();
        climate.done(&overdue, None);
        climate.check(&remedy.id, 9 * MINUTE);
        assert_eq!(climate.pending(), [], "once");
        // Within the hour of the last word it is kept for later, whether a reading comes or not.
        let mut told = heard.clone();
        told.told_at = Some(0);
        told.check(&remedy.id, 8 * MINUTE);
        assert!(told.pending().is_empty() && told.is_untold());
        told.check(&remedy.id, 60 * MINUTE);
        assert_eq!(told.pending()[0].escalate, [(Metric::Temperature, Reason::NoReading)]);
        assert!(!told.is_untold());
        // One whose effect has been seen is left alone.
        heard.follow(&rules(), &sample(4, "b", 25.0, 50.0), 4 * MINUTE);
        heard.check(&remedy.id, 8 * MINUTE);
        assert_eq!(heard.pending(), []);
    }

    /// A reading a second for two hours, each on the other side of the band's edge, of one metric and of the other.
    #[test]
    fn people_are_told_of_a_sensor_once_an_hour() {
        let mut climate = Climate::default();
        let mut told = Vec::new();
        for second in 0..7200 {
            let (temperature, humidity) = if second % 2 == 0 { (26.0, 50.0) } else { (21.0, 70.0) };
            let now = second * 1000;
            let sample = Sample { time: now, received_at: now, ..sample(0, "a", temperature, humidity) };
            climate.follow(&rules(), &sample, now);
            for remedy in climate.pending().to_vec() {
                told.extend((!remedy.escalate.is_empty()).then_some(second));
                climate.done(&remedy, Some(now));
            }
        }
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[1] - told[0] >= 3600, "{told:?}");
    }

    /// What comes to be within the hour is told of when the hour is over, if it still is.
    #[test]
    fn an_escalation_within_the_hour_of_another_waits_for_its_end() {
        let mut climate = Climate::default();
        let mut escalated = |minute, temperature, humidity| {
            climate.follow(&rules(), &sample(minute, "a", temperature, humidity), minute * MINUTE);
            let pending = climate.pending().to_vec();
            for remedy in &pending {
                climate.done(remedy, Some(minute * MINUTE));
            }
            pending.into_iter().flat_map(|remedy| remedy.escalate).collect::<Vec<_>>()
        };
        assert_eq!(escalated(0, 26.0, 50.0), []);
        assert_eq!(escalated(4, 26.0, 70.0), [(Metric::Temperature, Reason::NoEffect)]);
        assert_eq!(escalated(8, 26.0, 70.0), [], "told a moment ago");
        assert_eq!(escalated(63, 21.0, 70.0), []);
        assert_eq!(escalated(64, 21.0, 70.0), [(Metric::Humidity, Reason::NoEffect)]);
        assert_eq!(escalated(65, 21.0, 70.0), []);
    }

    #[test]
    fn an_item_is_what_it_was_when_it_is_read() {
        let mut climate = Climate::default();
        climate.follow(&rules(), &sample(10, "a", 26.0, 50.0), 10 * MINUTE);
        let item: serde_dynamo::Item = serde_dynamo::to_item(&climate).unwrap();
        assert_eq!(serde_dynamo::from_item::<_, Climate>(item).unwrap(), climate);
    }
}
