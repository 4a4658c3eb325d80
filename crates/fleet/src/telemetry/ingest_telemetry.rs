//! Keeps a batch of readings: a row each, one object of the history, and the metrics.
//!
//! A row says which batch has taken its reading, and that batch's object in the history holds it, or it is not kept yet. So a
//! reading is in the table and in the history once, however often its message comes and wherever a call has died before: who
//! finds a row looks into the object. Metrics are added last, and the batch is finished then: only a call that dies between
//! these two lets another add them again.

use super::history::{History, batch_name};
use super::metrics::Metrics;
use super::readings::{Holder, Readings, Sample};
use super::senders::{self, Senders};
use crate::lambda::QueuedMessage;
use crate::queue::MqttMessage;
use crate::{Error, ErrorName, config};
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use protocol::telemetry::{Reading, building_of_readings};
use protocol::{DecodeError, ReadingId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant, SystemTime};

/// How many calls of a kind are under way at once.
const AT_ONCE: usize = 32;
/// After which a batch that is not finished has died, in milliseconds: longer than the function may run.
pub const LONGEST_CALL: i64 = 15_000;
/// How often it is tried to note that a batch is finished.
const FINISHES: usize = 3;
/// What a call needs, before the function's time limit ends it, to add metrics and to note that they are added.
const METRICS_NEED: Duration = Duration::from_secs(6);
/// What it needs to keep what it has taken. With less it takes nothing more, so that a slow call does a part of its batch.
const KEEPING_NEEDS: Duration = Duration::from_secs(7);
/// How old a reading may be that a sensor has kept, and how far its clock may be ahead, in milliseconds.
const OLDEST: i64 = 7 * 24 * 3_600_000;
const AHEAD: i64 = 5 * 60_000;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    senders: Senders,
    readings: Readings,
    history: History,
    metrics: Metrics,
}

/// Where readings are kept.
#[derive(Debug, Clone)]
pub struct Places {
    /// The table of readings.
    pub monitoring_table: String,
    /// The table of batches.
    pub batches_table: String,
    /// How long rows are kept, in days.
    pub reading_days: u32,
    /// The bucket of the history.
    pub bucket: String,
}

impl Places {
    /// Those that the environment names.
    pub fn from_environment() -> Result<Self, String> {
        Ok(Self {
            monitoring_table: config::required("MONITORING_TABLE")?,
            batches_table: config::required("TELEMETRY_BATCHES_TABLE")?,
            reading_days: config::number("READING_DAYS")?,
            bucket: config::required("TELEMETRY_BUCKET")?,
        })
    }
}

impl Adapters {
    /// Keeps readings in these places.
    pub fn new(aws: &aws_config::SdkConfig, places: Places) -> Self {
        let Places { monitoring_table, batches_table, reading_days, bucket } = places;
        Self {
            senders: Senders::new(aws),
            readings: Readings::new(aws, monitoring_table, batches_table, reading_days),
            history: History::new(aws, bucket),
            metrics: Metrics::new(aws),
        }
    }
}

/// What one call has done, for its log: the costs of the pipeline are counted by it.
#[derive(Debug, Default)]
struct Tally {
    stored: usize,
    duplicates: usize,
    objects: usize,
    metric_calls: usize,
}

/// A call of the function.
#[derive(Clone, Copy)]
struct Call {
    /// When it is ended.
    deadline: Instant,
    /// When it began, in Unix milliseconds.
    now: i64,
}

impl Call {
    /// Fails with a transient error if so much time is not left: another call goes on then.
    fn check_time(&self, needed: Duration) -> Result<(), Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left > needed {
            return Ok(());
        }
        let message = format!("{} ms before the time limit: the rest is left to the next call", left.as_millis());
        Err(Error::new(ErrorName::ServiceUnavailable, message))
    }
}

/// Keeps the readings of a batch of messages; says of each, in their order, how it went. `now` is in Unix milliseconds; at
/// `deadline` Lambda ends the call.
pub async fn handle(
    adapters: &Adapters,
    messages: &[QueuedMessage],
    now: i64,
    deadline: SystemTime,
) -> Vec<Result<(), Error>> {
    let left = deadline.duration_since(SystemTime::now()).unwrap_or_default();
    let call = Call { deadline: Instant::now() + left, now };
    let read = allowed(&adapters.senders, messages.iter().map(read).collect()).await;
    // What is in the batch twice is one reading.
    let samples: HashMap<_, _> = read.iter().flatten().map(|sample| (sample.key(), sample)).collect();
    // Boxed, for the compiler loses count of the calls below.
    let kept = match Box::pin(keep(adapters, samples.into_values().collect(), call)).await {
        Ok(kept) => kept,
        Err(error) => return read.into_iter().map(|one| one.and(Err(error.clone()))).collect(),
    };
    let outcome = |sample: Sample| kept.get(&sample.key()).cloned().unwrap_or(Ok(()));
    read.into_iter().map(|one| one.and_then(outcome)).collect()
}

/// A reading, and the thing that has reported it for another sensor, if it has.
type Reported = (Sample, Option<String>);

/// Reads a message.
fn read(message: &QueuedMessage) -> Result<Reported, Error> {
    let mqtt = MqttMessage::parse(&message.body)?;
    let building = building_of_readings(&mqtt.topic).ok_or_else(|| DecodeError::UnknownTopic(mqtt.topic.clone()))?;
    let Reading { device, temperature, humidity, identity } = Reading::decode(&mqtt.payload()?)?;
    let received_at = mqtt.received_at()?;
    let (id, time) = if let Some(identity) = identity {
        (identity.id, identity.time)
    } else {
        let id = mqtt.id.as_ref().unwrap_or(&message.id);
        (id.parse::<ReadingId>().map_err(crate::error::unbuilt)?, received_at)
    };
    within("body.temperature", temperature, &Reading::TEMPERATURES)?;
    within("body.humidity", humidity, &Reading::HUMIDITIES)?;
    within("body.time", time, &(received_at.saturating_sub(OLDEST)..=received_at.saturating_add(AHEAD)))?;
    let thing = mqtt.sender().filter(|thing| *thing != device.as_str()).map(str::to_owned);
    let [temperature, humidity] = [temperature, humidity].map(to_a_thousandth);
    Ok((Sample { device, time, id, temperature, humidity, building, received_at }, thing))
}

/// No sensor knows more, and neither DynamoDB nor CloudWatch takes every number that JSON has. Nothing is below zero that is zero.
fn to_a_thousandth(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0 + 0.0
}

/// Lets those readings pass that their senders may report.
async fn allowed(senders: &Senders, read: Vec<Result<Reported, Error>>) -> Vec<Result<Sample, Error>> {
    let things = read.iter().flatten().filter_map(|(_, thing)| thing.as_deref()).collect();
    let known = senders.sensors_of(things).await;
    let pass = |(sample, thing): Reported| match thing.and_then(|thing| known.get_key_value(&thing)) {
        None => Ok(sample),
        Some((_, Err(error))) => Err(error.clone()),
        Some((thing, Ok(sensors))) => senders::check(thing, sensors, &sample.device).map(|()| sample),
    };
    read.into_iter().map(|one| one.and_then(pass)).collect()
}

fn within<T: Copy + PartialOrd + std::fmt::Display>(
    field: &str,
    value: T,
    range: &RangeInclusive<T>,
) -> Result<(), Error> {
    if range.contains(&value) {
        return Ok(());
    }
    let message = format!("{field}: got {value}, expected {} to {}", range.start(), range.end());
    Err(Error::new(ErrorName::ReadingOutOfRange, message))
}

/// How it went with a reading, by its key. Those that are not named went well.
type Kept = HashMap<(String, String), Result<(), Error>>;

/// What others have taken, by whom.
type Held<'a> = BTreeMap<String, (Holder, Vec<&'a Sample>)>;

async fn keep(adapters: &Adapters, samples: Vec<&Sample>, call: Call) -> Result<Kept, Error> {
    let batch = Holder { batch: batch_name(call.now)?, taken_at: call.now };
    let mut kept = Kept::new();
    let mut tally = Tally::default();

    let (mut ours, held) = take(&adapters.readings, samples, &batch, call, &mut kept).await;
    let inherited =
        join_all(held.into_values().map(|(holder, samples)| inherit(adapters, holder, samples, &batch, call)));
    for inherited in inherited.await {
        ours.extend(inherited.ours);
        kept.extend(inherited.failed);
        tally.duplicates += inherited.duplicates;
        tally.metric_calls += inherited.metric_calls;
    }
    if !ours.is_empty() {
        match store(adapters, &batch.batch, &ours, call, &mut tally).await {
            Ok(()) => tally.stored = ours.len(),
            Err(error) => kept.extend(ours.into_iter().map(|sample| (sample.key(), Err(error.clone())))),
        }
    }
    let Tally { stored, duplicates, objects, metric_calls } = tally;
    tracing::info!(stored, duplicates, failed = kept.len(), objects, metric_calls, batch = batch.batch);
    Ok(kept)
}

/// Takes what nobody has taken; returns it, and what others have.
async fn take<'a>(
    readings: &Readings,
    samples: Vec<&'a Sample>,
    batch: &Holder,
    call: Call,
    kept: &mut Kept,
) -> (Vec<&'a Sample>, Held<'a>) {
    let take_one = async |sample| {
        call.check_time(KEEPING_NEEDS)?;
        readings.take(sample, batch).await
    };
    let taken = samples.into_iter().map(async |sample| (sample, take_one(sample).await));
    let taken: Vec<_> = stream::iter(taken).buffer_unordered(AT_ONCE).collect().await;
    let (mut ours, mut held) = (Vec::new(), Held::new());
    for (sample, holder) in taken {
        match holder {
            Ok(None) => ours.push(sample),
            // The SDK's own second try finds what its first has written.
            Ok(Some(holder)) if holder == *batch => ours.push(sample),
            Ok(Some(holder)) => held.entry(holder.batch.clone()).or_insert((holder, Vec::new())).1.push(sample),
            Err(error) => drop(kept.insert(sample.key(), Err(error))),
        }
    }
    (ours, held)
}

/// What became of readings that another batch has taken.
#[derive(Default)]
struct Inherited<'a> {
    ours: Vec<&'a Sample>,
    failed: Kept,
    duplicates: usize,
    metric_calls: usize,
}

/// Sees to readings that another batch has taken: those that its object does not hold are taken over.
async fn inherit<'a>(
    adapters: &Adapters,
    holder: Holder,
    samples: Vec<&'a Sample>,
    batch: &Holder,
    call: Call,
) -> Inherited<'a> {
    let mut inherited = Inherited::default();
    let rest = match settle(adapters, &holder, call, &mut inherited.metric_calls).await {
        Ok(Settled::All) => vec![],
        Ok(Settled::Only(kept)) => samples.iter().copied().filter(|sample| !kept.contains(&sample.key())).collect(),
        Err(error) => {
            inherited.failed = samples.into_iter().map(|sample| (sample.key(), Err(error.clone()))).collect();
            return inherited;
        }
    };
    inherited.duplicates = samples.len() - rest.len();
    let take_one = async |sample| {
        call.check_time(KEEPING_NEEDS)?;
        adapters.readings.take_over(sample, &holder, batch).await
    };
    let taken = rest.into_iter().map(async |sample| (sample, take_one(sample).await));
    let mut taken = stream::iter(taken).buffer_unordered(AT_ONCE);
    while let Some((sample, taken)) = taken.next().await {
        match taken {
            Ok(true) => inherited.ours.push(sample),
            Ok(false) => drop(inherited.failed.insert(sample.key(), Err(busy(&holder)))),
            Err(error) => drop(inherited.failed.insert(sample.key(), Err(error))),
        }
    }
    inherited
}

/// What another batch has kept.
enum Settled {
    /// All that it has taken.
    All,
    /// These.
    Only(HashSet<(String, String)>),
}

/// Looks at another batch, and adds its metrics if it has died before it could. Fails with a transient error if somebody may be
/// at it.
async fn settle(adapters: &Adapters, holder: &Holder, call: Call, metric_calls: &mut usize) -> Result<Settled, Error> {
    let Adapters { readings, history, metrics, .. } = adapters;
    let now = call.now;
    let is_finished = readings.is_finished(&holder.batch).await?;
    if !is_finished && now - holder.taken_at < LONGEST_CALL {
        return Err(busy(holder));
    }
    let Some(samples) = history.read(&holder.batch).await? else {
        // The history may be kept for a shorter time than the rows.
        return Ok(if is_finished { Settled::All } else { Settled::Only(HashSet::new()) });
    };
    if !is_finished {
        call.check_time(METRICS_NEED)?;
        if !readings.resume(&holder.batch, now, LONGEST_CALL).await? {
            return Err(busy(holder));
        }
        // That may have taken a while.
        call.check_time(METRICS_NEED)?;
        *metric_calls += metrics.add(samples.iter(), now).await?;
        finish(readings, &holder.batch, now).await;
    }
    Ok(Settled::Only(samples.iter().map(Sample::key).collect()))
}

fn busy(holder: &Holder) -> Error {
    let message = format!("another call is at the batch {}, which has taken the reading", holder.batch);
    Error::new(ErrorName::ServiceUnavailable, message)
}

/// Writes what a batch has taken into the history and the metrics.
async fn store(
    adapters: &Adapters,
    batch: &str,
    samples: &[&Sample],
    call: Call,
    tally: &mut Tally,
) -> Result<(), Error> {
    let now = call.now;
    adapters.history.write(batch, samples.iter().copied()).await?;
    tally.objects += 1;
    call.check_time(METRICS_NEED)?;
    tally.metric_calls += adapters.metrics.add(samples.iter().copied(), now).await?;
    finish(&adapters.readings, batch, now).await;
    Ok(())
}

/// Notes that a batch's metrics are added. Nothing is to be done again because that cannot be noted: the metrics would be added
/// again as well.
async fn finish(readings: &Readings, batch: &str, now: i64) {
    for _ in 0..FINISHES {
        let Err(error) = readings.finish(batch, now).await else { return };
        tracing::warn!(batch, error = error.name.as_str(), message = error.message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_smithy_http_client::test_util::infallible_client_fn;
    use std::sync::{Arc, Mutex};

    const NOW: i64 = 1_700_000_000_000;

    /// Which services a call with so much time left calls to take a reading, or to store one that it has taken; how that ends.
    async fn called(is_taken: bool, left: Duration) -> (Vec<String>, Result<(), Error>) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&calls);
        let http = infallible_client_fn(move |request: ureq::http::Request<_>| {
            let host = request.uri().host().unwrap_or_default().split('.').find(|part| *part != "x");
            noted.lock().unwrap().push(host.unwrap_or_default().to_owned());
            ureq::http::Response::builder().body("{}").unwrap()
        });
        let config = crate::aws::of_test(http);
        let places =
            Places { monitoring_table: "x".into(), batches_table: "x".into(), reading_days: 1, bucket: "x".into() };
        let adapters = Adapters::new(&config, places);
        let sample = Sample {
            device: "a".parse().unwrap(),
            time: NOW,
            id: "r".parse().unwrap(),
            temperature: 21.0,
            humidity: 50.0,
            building: "1".parse().unwrap(),
            received_at: NOW,
        };
        let call = Call { deadline: Instant::now() + left, now: NOW };
        let batch = Holder { batch: "batch".to_owned(), taken_at: NOW };
        let result = if is_taken {
            store(&adapters, &batch.batch, &[&sample], call, &mut Tally::default()).await
        } else {
            let mut failed = Kept::new();
            take(&adapters.readings, vec![&sample], &batch, call, &mut failed).await;
            failed.into_values().collect()
        };
        let calls = calls.lock().unwrap().clone();
        (calls, result)
    }

    #[tokio::test]
    async fn what_this_call_may_not_finish_is_left_to_another_one() {
        let enough = Duration::from_secs(10);
        assert_eq!(called(false, enough).await, (vec!["dynamodb".to_owned()], Ok(())));
        let all = ["s3", "monitoring", "dynamodb"].map(str::to_owned).to_vec();
        assert_eq!(called(true, enough).await, (all, Ok(())));

        let (calls, result) = called(false, KEEPING_NEEDS).await;
        assert_eq!((calls.len(), result.unwrap_err().name), (0, ErrorName::ServiceUnavailable));
        let (calls, result) = called(true, METRICS_NEED).await;
        assert_eq!((calls, result.unwrap_err().name), (vec!["s3".to_owned()], ErrorName::ServiceUnavailable));
    }
}
