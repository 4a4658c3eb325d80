//! What remedies reach: the sensor, people, and the tables in which all of it is noted.

use super::climate::{Climate, Metric, Reason, Remedy};
pub use super::climate::{Rule, Rules};
use super::metrics::Metrics;
use super::readings::{Sample, expiry};
use crate::aws::{number, publish, text};
use crate::error::{aws, unbuilt};
use crate::item_table::ItemTable;
use crate::queue::DeadLetters;
use crate::{Error, config};
use protocol::SensorId;
use protocol::telemetry::Remediation;
use serde::{Deserialize, Serialize};

/// A reading or a remedy that is older than this, in milliseconds, says nothing about now.
pub(crate) const OLDEST: i64 = 10 * 60_000;
/// The longest delay of a message in a queue, in seconds
/// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html>).
pub(crate) const LONGEST_DELAY: i64 = 900;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    pub(crate) rules: Rules,
    places: Places,
    pub(crate) climates: ItemTable<Climate>,
    dynamodb: aws_sdk_dynamodb::Client,
    sqs: aws_sdk_sqs::Client,
    mqtt: aws_sdk_iotdataplane::Client,
    sns: aws_sdk_sns::Client,
    metrics: Metrics,
    pub(crate) dead_letters: DeadLetters,
}

/// Where things are noted, and said.
#[derive(Debug, Clone)]
pub struct Places {
    /// The table of what is being done about each sensor.
    pub climates_table: String,
    /// The table of what was done.
    pub remediations_table: String,
    /// How long that is kept, in days.
    pub reading_days: u32,
    /// The queue of checks that are due later.
    pub checks_queue_url: String,
    /// Where people are told.
    pub alarm_topic_arn: String,
    /// Where rows go that nobody can read.
    pub dead_letter_queue_url: String,
}

impl Places {
    /// Those that the environment names.
    pub fn from_environment() -> Result<Self, String> {
        Ok(Self {
            climates_table: config::required("CLIMATES_TABLE")?,
            remediations_table: config::required("REMEDIATIONS_TABLE")?,
            reading_days: config::number("READING_DAYS")?,
            checks_queue_url: config::required("REMEDIATION_CHECKS_QUEUE_URL")?,
            alarm_topic_arn: config::required("ALARM_TOPIC_ARN")?,
            dead_letter_queue_url: config::required("DEAD_LETTER_QUEUE_URL")?,
        })
    }
}

impl Adapters {
    /// Follows readings by these rules.
    pub fn new(aws: &aws_config::SdkConfig, mqtt: aws_sdk_iotdataplane::Client, places: Places, rules: Rules) -> Self {
        Self {
            rules,
            climates: ItemTable::new(aws, places.climates_table.clone()),
            dynamodb: aws_sdk_dynamodb::Client::new(aws),
            sqs: aws_sdk_sqs::Client::new(aws),
            mqtt,
            sns: aws_sdk_sns::Client::new(aws),
            metrics: Metrics::new(aws),
            dead_letters: DeadLetters::new(aws, places.dead_letter_queue_url.clone()),
            places,
        }
    }

    /// Has a check come when a reading has had twice the time to show an effect.
    async fn ask_for_check_of(&self, remedy: &Remedy) -> Result<(), Error> {
        let effect_after = self.rules.temperature.effect_after.max(self.rules.humidity.effect_after) / 1000;
        let check = Check { device: remedy.sample.device.clone(), remedy: remedy.id.clone() };
        self.ask_for_check(&check, (2 * effect_after).min(LONGEST_DELAY)).await
    }

    /// Has a check come in so many seconds.
    pub(crate) async fn ask_for_check(&self, check: &Check, delay: i64) -> Result<(), Error> {
        let body = serde_json::to_string(check).map_err(unbuilt)?;
        let message = self.sqs.send_message().queue_url(&self.places.checks_queue_url).message_body(body);
        let sent = message.delay_seconds(i32::try_from(delay).map_err(unbuilt)?).send().await;
        sent.map(|_| ()).map_err(|error| aws("sqs:SendMessage", &error))
    }
}

impl Rules {
    /// Those that the environment names.
    pub fn from_environment() -> Result<Self, String> {
        Ok(Self { temperature: rule("TEMPERATURE")?, humidity: rule("HUMIDITY")? })
    }
}

/// The rule of a metric: six variables that begin with its name.
fn rule(metric: &str) -> Result<Rule, String> {
    let seconds = |name: &str| Ok::<_, String>(i64::from(config::number(name)?) * 1000);
    let rule = Rule {
        target: config::decimal(&format!("{metric}_TARGET"))?,
        band: config::decimal(&format!("{metric}_BAND"))?,
        hysteresis: config::decimal(&format!("{metric}_HYSTERESIS"))?,
        cool_down: seconds(&format!("{metric}_COOL_DOWN_SECONDS"))?,
        actions_an_hour: config::number(&format!("{metric}_ACTIONS_AN_HOUR"))? as usize,
        effect_after: seconds("REMEDIATION_EFFECT_SECONDS")?,
    };
    if rule.hysteresis > rule.band {
        let Rule { hysteresis, band, .. } = rule;
        return Err(format!("{metric}_HYSTERESIS is {hysteresis}: expected at most {metric}_BAND, which is {band}"));
    }
    Ok(rule)
}

/// Asks for a look at a remedy's effect, once it is due.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Check {
    pub(crate) device: SensorId,
    pub(crate) remedy: String,
}

/// Does what is decided about a sensor and not done yet. `now` is in Unix milliseconds.
pub(crate) async fn settle(adapters: &Adapters, device: &str, pending: &[Remedy], now: i64) -> Result<(), Error> {
    for remedy in pending {
        let is_late = remedy.decided_at < now - OLDEST;
        apply(adapters, remedy, is_late).await?;
        adapters.climates.change(device, |climate| climate.done(remedy, (!is_late).then_some(now))).await?;
    }
    Ok(())
}

/// Records a remedy, then tells people, and the sensor unless it is too late for that.
async fn apply(adapters: &Adapters, remedy: &Remedy, is_late: bool) -> Result<(), Error> {
    // What is not done is not recorded as done.
    let done = if is_late { Remedy { act_on: vec![], ..remedy.clone() } } else { remedy.clone() };
    record(adapters, &done).await?;
    let Remedy { sample, act_on, escalate, .. } = remedy;
    let device = sample.device.as_str();
    // People first: they may be told twice, if the sensor then cannot be told.
    if !escalate.is_empty() {
        tracing::warn!(outcome = "ESCALATED", device, ?escalate);
        escalate_to_people(adapters, sample, escalate).await?;
    }
    if is_late && !act_on.is_empty() {
        tracing::warn!(outcome = "EXPIRED", device, metrics = ?act_on);
    } else if !act_on.is_empty() {
        let Rules { temperature, humidity } = &adapters.rules;
        let remediation =
            Remediation { device: sample.device.clone(), temperature: temperature.target, humidity: humidity.target };
        adapters.ask_for_check_of(remedy).await?;
        publish(&adapters.mqtt, remediation.encode(&sample.building)).await?;
        let Sample { temperature, humidity, .. } = sample;
        tracing::info!(outcome = "REMEDIATED", device, temperature, humidity, metrics = ?act_on);
        // A mark in a picture is not worth telling the sensor twice.
        if let Err(error) = adapters.metrics.mark(device, sample.time).await {
            tracing::warn!(device, error = error.name.as_str(), message = error.message);
        }
    }
    Ok(())
}

async fn record(adapters: &Adapters, remedy: &Remedy) -> Result<(), Error> {
    let fields = serde_dynamo::to_item(remedy).map_err(unbuilt)?;
    let sample = &remedy.sample;
    let put = adapters
        .dynamodb
        .put_item()
        .table_name(&adapters.places.remediations_table)
        .set_item(Some(fields))
        .item("device", text(sample.device.as_str()))
        .item("reading", text(&remedy.id))
        .item("expiresAt", number(expiry(sample.received_at, adapters.places.reading_days)));
    put.send().await.map(|_| ()).map_err(|error| aws("dynamodb:PutItem", &error))
}

async fn escalate_to_people(adapters: &Adapters, sample: &Sample, escalate: &[(Metric, Reason)]) -> Result<(), Error> {
    let Sample { device, building, .. } = sample;
    let findings: Vec<String> =
        escalate.iter().map(|escalation| finding(&adapters.rules, sample, *escalation)).collect();
    let message = format!(
        "At {device} (building {building}) {}. Nothing more is tried until it is back; you are told of this sensor once an hour at most.",
        findings.join(", and ")
    );
    let publish = adapters.sns.publish().topic_arn(&adapters.places.alarm_topic_arn);
    let publish = publish.subject("Remediation has not helped").message(message);
    publish.send().await.map(|_| ()).map_err(|error| aws("sns:Publish", &error))
}

/// What is wrong with a metric, for people.
fn finding(rules: &Rules, sample: &Sample, (metric, reason): (Metric, Reason)) -> String {
    let Sample { temperature, humidity, .. } = sample;
    let (name, value, rule) = match metric {
        Metric::Temperature => ("temperature", format!("{temperature} °C"), &rules.temperature),
        Metric::Humidity => ("humidity", format!("{humidity} %"), &rules.humidity),
    };
    let why = match reason {
        Reason::NoEffect => format!("no effect within {} s of the last remediation", rule.effect_after / 1000),
        Reason::NoReading => "no reading has come that could show an effect of the last remediation".to_owned(),
        Reason::TooManyActions => format!("{} remediations within an hour", rule.actions_an_hour),
    };
    format!("the {name} is {value}, expected {} ± {}: {why}", rule.target, rule.band)
}
