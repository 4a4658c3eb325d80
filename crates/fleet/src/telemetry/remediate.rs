//! Follows new readings, and has sensors bring their surroundings back.
//!
//! What is decided is kept before it is done: a call that dies in between lets the next one do it. All of a sensor's readings in
//! a batch are followed with one read and one write, so that a flood of one sensor costs the others nothing.

use super::climate::{Climate, Metric, Reason, Remedy};
pub use super::climate::{Rule, Rules};
use super::metrics::Metrics;
use super::readings::Sample;
use crate::aws::{number, text};
use crate::error::{aws, unbuilt};
use crate::item_table::ItemTable;
use crate::queue::DeadLetters;
use crate::{Error, ErrorName, config};
pub use aws_lambda_events::event::dynamodb::Event;
use aws_lambda_events::event::dynamodb::EventRecord;
use aws_lambda_events::event::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use aws_sdk_iotdataplane::primitives::Blob;
use futures_util::{StreamExt, stream};
use protocol::telemetry::Remediation;
use std::collections::BTreeMap;

/// How many sensors are seen to at once.
const AT_ONCE: usize = 32;
/// A reading that is older than this, in milliseconds, says nothing about now.
const OLDEST: i64 = 10 * 60_000;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    rules: Rules,
    places: Places,
    climates: ItemTable<Climate>,
    dynamodb: aws_sdk_dynamodb::Client,
    mqtt: aws_sdk_iotdataplane::Client,
    sns: aws_sdk_sns::Client,
    metrics: Metrics,
    dead_letters: DeadLetters,
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
            alarm_topic_arn: config::required("ALARM_TOPIC_ARN")?,
            dead_letter_queue_url: config::required("DEAD_LETTER_QUEUE_URL")?,
        })
    }
}

impl Adapters {
    /// Follows readings by these rules.
    pub fn new(aws: &aws_config::SdkConfig, places: Places, rules: Rules) -> Self {
        Self {
            rules,
            climates: ItemTable::new(aws, places.climates_table.clone()),
            dynamodb: aws_sdk_dynamodb::Client::new(aws),
            mqtt: aws_sdk_iotdataplane::Client::new(aws),
            sns: aws_sdk_sns::Client::new(aws),
            metrics: Metrics::new(aws),
            dead_letters: DeadLetters::new(aws, places.dead_letter_queue_url.clone()),
            places,
        }
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

/// Follows the readings of a stream's batch; names the record from which on the stream shall deliver again.
/// `now` is in Unix milliseconds.
pub async fn handle(adapters: &Adapters, event: Event, now: i64) -> DynamoDbEventResponse {
    let mut sensors: BTreeMap<String, Vec<(usize, Sample)>> = BTreeMap::new();
    let mut failed = Vec::new();
    for (index, record) in event.records.iter().enumerate() {
        match read(record) {
            Ok(sample) => sensors.entry(sample.device.to_string()).or_default().push((index, sample)),
            Err(error) => failed.extend(bury(adapters, record, &error).await.err().map(|_| index)),
        }
    }
    let followed =
        sensors.values().map(async |readings| (readings[0].0, follow(adapters, readings, now - OLDEST).await));
    let mut followed = stream::iter(followed).buffer_unordered(AT_ONCE);
    while let Some((first, result)) = followed.next().await {
        if let Err(error) = result {
            tracing::warn!(outcome = "RETRY", error = error.name.as_str(), message = error.message);
            failed.push(first);
        }
    }
    let mut response = DynamoDbEventResponse::default();
    // The stream begins again at the first of them.
    let first = failed.into_iter().min().and_then(|index| event.records[index].change.sequence_number.clone());
    response.batch_item_failures.extend(first.map(|number| {
        let mut failure = DynamoDbBatchItemFailure::default();
        failure.item_identifier = Some(number);
        failure
    }));
    response
}

/// A row that no reading can be read from is no reason to stop.
fn read(record: &EventRecord) -> Result<Sample, Error> {
    serde_dynamo::from_item(record.change.new_image.clone())
        .map_err(|error| Error::new(ErrorName::MalformedMessage, format!("row of the table of readings: {error}")))
}

async fn bury(adapters: &Adapters, record: &EventRecord, error: &Error) -> Result<(), Error> {
    tracing::error!(outcome = "DEAD_LETTERED", error = error.name.as_str(), message = error.message);
    let body = serde_json::to_string(&record.change).map_err(unbuilt)?;
    adapters.dead_letters.send(body, record.event_source_arn.as_deref(), error).await
}

/// Follows a sensor's readings, the oldest first, but for those from before `oldest`.
async fn follow(adapters: &Adapters, readings: &[(usize, Sample)], oldest: i64) -> Result<(), Error> {
    let device = readings[0].1.device.as_str();
    let rule = |climate: &mut Climate| {
        for (_, sample) in readings.iter().filter(|(_, sample)| sample.time > oldest) {
            climate.follow(&adapters.rules, sample);
        }
    };
    let (climate, ()) = adapters.climates.change(device, rule).await?;
    for remedy in climate.pending() {
        if remedy.sample.time > oldest {
            apply(adapters, remedy).await?;
        }
        adapters.climates.change(device, |climate| climate.done(remedy)).await?;
    }
    Ok(())
}

/// Records a remedy, then tells the sensor and people.
async fn apply(adapters: &Adapters, remedy: &Remedy) -> Result<(), Error> {
    record(adapters, remedy).await?;
    let Remedy { sample, act_on, escalate } = remedy;
    let device = sample.device.as_str();
    // People first: they may be told twice, if the sensor then cannot be told.
    for (metric, reason) in escalate {
        tracing::warn!(outcome = "ESCALATED", device, ?metric, ?reason);
        escalate_to_people(adapters, sample, *metric, *reason).await?;
    }
    if !act_on.is_empty() {
        let Rules { temperature, humidity } = &adapters.rules;
        let remediation =
            Remediation { device: sample.device.clone(), temperature: temperature.target, humidity: humidity.target };
        let message = remediation.encode(&sample.building);
        let publish = adapters.mqtt.publish().topic(message.topic).qos(1).payload(Blob::new(message.payload));
        publish.send().await.map_err(|error| aws("iot:Publish", &error))?;
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
        .item("reading", text(sample.sort_key()))
        .item("expiresAt", number(sample.received_at / 1000 + i64::from(adapters.places.reading_days) * 86_400));
    put.send().await.map(|_| ()).map_err(|error| aws("dynamodb:PutItem", &error))
}

async fn escalate_to_people(adapters: &Adapters, sample: &Sample, metric: Metric, reason: Reason) -> Result<(), Error> {
    let Sample { device, building, temperature, humidity, .. } = sample;
    let (name, value, rule) = match metric {
        Metric::Temperature => ("temperature", format!("{temperature} °C"), &adapters.rules.temperature),
        Metric::Humidity => ("humidity", format!("{humidity} %"), &adapters.rules.humidity),
    };
    let why = match reason {
        Reason::NoEffect => format!("no effect within {} s of the last remediation", rule.effect_after / 1000),
        Reason::TooManyActions => format!("{} remediations within an hour", rule.actions_an_hour),
    };
    let message = format!(
        "The {name} at {device} (building {building}) is {value}, expected {} ± {}: {why}. Nothing more is tried until it is back.",
        rule.target, rule.band
    );
    let publish = adapters.sns.publish().topic_arn(&adapters.places.alarm_topic_arn);
    let publish = publish.subject(format!("Remediation of {name} has not helped")).message(message);
    publish.send().await.map(|_| ()).map_err(|error| aws("sns:Publish", &error))
}
