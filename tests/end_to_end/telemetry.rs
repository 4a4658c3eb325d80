//! Telemetry and remediation, end to end: the deployed template, the real Lambda binaries, real MQTT over TLS.
//!
//! `cargo xtask test` runs them; they need its local cloud.
#![allow(clippy::unwrap_used)]
#![allow(clippy::float_cmp, reason = "what is kept is what was sent, to the last bit")]

use aws_config::SdkConfig;
use aws_sdk_cloudwatch::primitives::DateTime;
use aws_sdk_cloudwatch::types::{Datapoint, Dimension, Statistic};
use aws_sdk_dynamodb::types::AttributeValue;
use base64::{Engine, prelude::BASE64_STANDARD};
use device_simulator::DeviceSpec;
use device_simulator::monitor::{SensorEvent, SensorOptions, Sensors};
use device_simulator::provision::{DevicePolicy, ProtocolMix, ProvisionOptions};
use flate2::read::GzDecoder;
use fleet::ErrorName;
use fleet::lambda::QueuedMessage;
use fleet::telemetry::ingest_telemetry::{self, Adapters, Places};
use fleet::telemetry::remediate;
use protocol::telemetry::{Reading, ReadingIdentity, Remediation, readings_topic, remediations_topic};
use protocol::{Building, ProtocolName, Publication, SensorId};
use rumqttc::QoS;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tests::{Cloud, Crash, MqttDevice, Outage, Refusal, crashing, eventually, now, refusing, saw};
use tokio::sync::mpsc::UnboundedReceiver;

const MINUTE: i64 = 60_000;

fn random() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..8].to_owned()
}

/// A building of a test's own.
fn own_building() -> Building {
    format!("test-{}", random()).parse().unwrap()
}

/// Sensors of a new name, with further attributes.
async fn sensors(cloud: &Cloud, name: &str, count: usize, attributes: &[(&str, &str)]) -> Vec<DeviceSpec> {
    let change = |options: &mut ProvisionOptions| {
        options.policy = DevicePolicy::Existing(cloud.output("MonitoringDevicePolicyName").to_owned());
        options.attributes = attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    };
    cloud.provision_with(name, count, ProtocolMix::All(ProtocolName::Json), change).await.1
}

fn options(building: &Building) -> SensorOptions {
    SensorOptions {
        endpoint: Cloud::endpoint(),
        ca: Some(Cloud::ca()),
        building: building.clone(),
        velocity: 0.0,
        update_frequency: Duration::from_millis(500),
        remediation_factor: 1.0,
        min_temperature: 21.0,
        min_humidity: 50.0,
        readings: None,
        plain: false,
    }
}

fn named(things: &[DeviceSpec]) -> Vec<(DeviceSpec, SensorId)> {
    things.iter().map(|thing| (thing.clone(), thing.thing.clone().into())).collect()
}

fn reading(device: &str, identity: Option<(&str, i64)>, temperature: f64) -> Reading {
    let identity = identity.map(|(id, time)| ReadingIdentity { id: id.parse().unwrap(), time });
    Reading { device: device.parse().unwrap(), temperature, humidity: 50.0, identity }
}

/// The rows of a sensor in a table, by their sort key.
async fn rows(cloud: &Cloud, table: &str, device: &str) -> BTreeMap<String, Value> {
    let query = cloud.dynamodb.query().table_name(cloud.output(table)).consistent_read(true);
    let query = query.key_condition_expression("device = :device");
    let query = query.expression_attribute_values(":device", AttributeValue::S(device.to_owned()));
    let items = query.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    let items = items.into_iter().map(|item| serde_dynamo::from_item::<_, Value>(item).unwrap());
    let rows: BTreeMap<_, _> = items.map(|item| (item["reading"].as_str().unwrap().to_owned(), item)).collect();
    saw(format!("{} rows of {device} in {table}: {rows:?}", rows.len()));
    rows
}

async fn readings_of(cloud: &Cloud, device: &str) -> BTreeMap<String, Value> {
    rows(cloud, "MonitoringTableName", device).await
}

async fn remediations_of(cloud: &Cloud, device: &str) -> BTreeMap<String, Value> {
    rows(cloud, "RemediationsTableName", device).await
}

/// How many values a metric has, and their sum.
async fn metric(cloud: &Cloud, name: &str, dimension: &str, value: &str) -> (f64, f64) {
    let dimension = Dimension::builder().name(dimension).value(value).build();
    let get = cloud.cloudwatch.get_metric_statistics().namespace("Device/Monitoring").metric_name(name);
    let get = get.dimensions(dimension).period(3600).statistics(Statistic::SampleCount).statistics(Statistic::Sum);
    let get = get.start_time(DateTime::from_millis(now() - 24 * 60 * MINUTE));
    let points = get.end_time(DateTime::from_millis(now() + 60 * MINUTE)).send().await.unwrap().datapoints;
    let points = points.unwrap_or_default();
    let total = |of: fn(&Datapoint) -> Option<f64>| points.iter().filter_map(of).sum::<f64>();
    let (count, sum) = (total(|point| point.sample_count), total(|point| point.sum));
    saw(format!("{count} values of {name} for {value}, {sum} in all"));
    (count, sum)
}

/// Every line of a building in the history, and how many objects they are in.
async fn history(cloud: &Cloud, building: &Building) -> (Vec<Value>, usize) {
    let bucket = cloud.output("TelemetryBucketName");
    let list = cloud.s3.list_objects_v2().bucket(bucket).prefix("year=");
    let pages = list.into_paginator().send().collect::<Result<Vec<_>, _>>().await.unwrap();
    let keys = pages.into_iter().flat_map(|page| page.contents.unwrap_or_default()).filter_map(|object| object.key);
    let (mut lines, mut objects) = (Vec::new(), 0);
    for key in keys {
        let object = cloud.s3.get_object().bucket(bucket).key(&key).send().await.unwrap();
        let mut text = String::new();
        GzDecoder::new(&*object.body.collect().await.unwrap().to_vec()).read_to_string(&mut text).unwrap();
        let found = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let ours: Vec<Value> = found.filter(|line| line["building"] == building.as_str()).collect();
        objects += usize::from(!ours.is_empty());
        lines.extend(ours);
    }
    (lines, objects)
}

/// What tells the lines of the history apart.
fn key(line: &Value) -> (String, i64, String) {
    let text = |name: &str| line[name].as_str().unwrap().to_owned();
    (text("device"), line["time"].as_i64().unwrap(), text("id"))
}

async fn await_rows(cloud: &Cloud, device: &str, count: usize) -> BTreeMap<String, Value> {
    eventually(&format!("{count} rows of {device}"), || async {
        let rows = readings_of(cloud, device).await;
        (rows.len() >= count).then_some(rows)
    })
    .await
}

/// Waits until nothing is on its way any more.
async fn await_quiet(cloud: &Cloud) {
    eventually("all readings are handled", || async { cloud.is_drained("TelemetryQueue").await.then_some(()) }).await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn ten_thousand_readings_of_a_hundred_sensors_are_kept_once_each() {
    const SENSORS: u32 = 100;
    const READINGS: u32 = 100;
    let _others_wait = tests::without_others().await;
    let cloud = Cloud::connect().await;
    let building = own_building();
    let things = sensors(&cloud, "many", SENSORS as usize, &[("building", building.as_str())]).await;
    let options = SensorOptions {
        readings: Some(READINGS),
        velocity: 2.0,
        // Two hundred readings a second: a local cloud that is flooded lets calls run into their time limit.
        update_frequency: Duration::from_millis(500),
        ..options(&building)
    };
    let (mut running, mut events) = Sensors::start(&options, named(&things)).unwrap();
    running.finished().await;
    let mut sent: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    while let Ok(event) = events.try_recv() {
        if let SensorEvent::Measured { device, temperature, .. } = event {
            sent.entry(device.to_string()).or_default().push(temperature);
        }
    }
    assert_eq!(sent.values().map(Vec::len).sum::<usize>(), (SENSORS * READINGS) as usize);

    for (device, temperatures) in &sent {
        let rows = await_rows(&cloud, device, READINGS as usize).await;
        assert_eq!(rows.len(), READINGS as usize, "{device}");
        let mut kept: Vec<f64> = rows.values().map(|row| row["temperature"].as_f64().unwrap()).collect();
        let mut sent = temperatures.clone();
        kept.sort_by(f64::total_cmp);
        sent.sort_by(f64::total_cmp);
        assert_eq!(kept, sent, "{device}");
    }
    await_quiet(&cloud).await;
    let (lines, objects) = history(&cloud, &building).await;
    let distinct: BTreeSet<_> = lines.iter().map(key).collect();
    assert_eq!((lines.len(), distinct.len()), (10_000, 10_000));
    for (device, temperatures) in &sent {
        let (count, sum) = metric(&cloud, "Temperature", "Device", device).await;
        assert_eq!(count, f64::from(READINGS), "{device}");
        assert!((sum - temperatures.iter().sum::<f64>()).abs() < 1e-6, "{device}: {sum}");
    }
    assert_eq!(metric(&cloud, "Humidity", "Building", building.as_str()).await.0, 10_000.0);
    println!("10,000 readings: {objects} objects of the history, each one call of ingest-telemetry");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_same_millisecond_is_no_matter_and_the_same_message_is_kept_once() {
    let cloud = Cloud::connect().await;
    let building = own_building();
    let things = sensors(&cloud, "twice", 2, &[("building", building.as_str())]).await;
    let [one, other] = [things[0].thing.as_str(), things[1].thing.as_str()];
    let clients = [MqttDevice::connect(&things[0], true).await, MqttDevice::connect(&things[1], true).await];
    let time = now();
    for (client, device) in clients.iter().zip([one, other]) {
        for (id, temperature) in [("a", 20.0), ("b", 22.0), ("a", 20.0)] {
            client.publish(reading(device, Some((id, time)), temperature).encode(&building)).await;
        }
        // Of a sensor without ids each message is another one.
        client.publish(reading(device, None, 21.0).encode(&building)).await;
        client.publish(reading(device, None, 21.0).encode(&building)).await;
    }
    await_rows(&cloud, one, 4).await;
    await_rows(&cloud, other, 4).await;
    // Again, when all of that is long kept; and what comes behind it on the same connection.
    clients[0].publish(reading(one, Some(("a", time)), 20.0).encode(&building)).await;
    clients[0].publish(reading(one, Some(("c", time)), 16.0).encode(&building)).await;
    await_rows(&cloud, one, 5).await;
    await_quiet(&cloud).await;
    for (device, count, metrics) in [(one, 5, (5.0, 100.0)), (other, 4, (4.0, 84.0))] {
        assert_eq!(readings_of(&cloud, device).await.len(), count);
        assert_eq!(metric(&cloud, "Temperature", "Device", device).await, metrics);
    }
    assert_eq!(history(&cloud, &building).await.0.len(), 9);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_bad_reading_is_put_aside_with_its_reason_and_stops_no_other() {
    let cloud = Cloud::connect().await;
    let building = own_building();
    let [registered, stranger] = ["sensor", "stranger"].map(|name| format!("{name}-{}", random()));
    let attributes = [("building", building.as_str()), ("sensors", &format!("other,{registered}"))];
    let things = sensors(&cloud, "bad", 1, &attributes).await;
    let device = things[0].thing.as_str();
    let client = MqttDevice::connect(&things[0], true).await;
    let good = reading(device, None, 21.0).encode(&building);
    let with = |field: &str, value: &str| {
        let known = format!(r#""{field}":"#);
        let text = String::from_utf8(good.payload.clone()).unwrap();
        let (before, rest) = text.split_once(&known).unwrap();
        let after = &rest[rest.find([',', '}']).unwrap()..];
        format!("{before}{known}{value}{after}")
    };
    let missing = |field: &str| String::from_utf8(good.payload.clone()).unwrap().replace(field, "other");
    let late = reading(device, Some(("late", now() - 8 * 24 * 60 * MINUTE)), 21.0).encode(&building).payload;
    let cases = [
        (with("temperature", "NaN"), ErrorName::MalformedMessage),
        (with("temperature", r#""27.4""#), ErrorName::MalformedMessage),
        (with("temperature", "1e999"), ErrorName::MalformedMessage),
        (with("temperature", "999"), ErrorName::ReadingOutOfRange),
        (with("humidity", "-7"), ErrorName::ReadingOutOfRange),
        (with("humidity", "null"), ErrorName::MalformedMessage),
        (missing("humidity"), ErrorName::MalformedMessage),
        (missing("body"), ErrorName::MalformedMessage),
        (with("action", r#""Remediate""#), ErrorName::MalformedMessage),
        (String::from_utf8(late).unwrap(), ErrorName::ReadingOutOfRange),
        (format!("not JSON {}", random()), ErrorName::MalformedMessage),
        (with("action", r#""\u0001""#), ErrorName::MalformedMessage),
        (with("device", &format!(r#""{stranger}""#)), ErrorName::SenderMismatch),
    ];
    for (payload, _) in &cases {
        client.publish(Publication { topic: good.topic.clone(), payload: payload.clone().into_bytes() }).await;
        client.publish(good.clone()).await;
    }
    // A sensor that the thing is registered for.
    client.publish(reading(&registered, None, 21.0).encode(&building)).await;
    for (payload, name) in &cases {
        assert_eq!(cloud.dead_letter(&BASE64_STANDARD.encode(payload)).await, name.as_str(), "{payload}");
    }
    assert_eq!(await_rows(&cloud, device, cases.len()).await.len(), cases.len());
    assert_eq!(await_rows(&cloud, &registered, 1).await.len(), 1);
    assert_eq!(readings_of(&cloud, &stranger).await.len(), 0);
    // Numbers that JSON has and neither the table nor the metrics have.
    for tiny in ["1e-300", "-0.0"] {
        let payload = with("temperature", tiny).into_bytes();
        client.publish(Publication { topic: good.topic.clone(), payload }).await;
    }
    let rows = await_rows(&cloud, device, cases.len() + 2).await;
    let zeros = rows.values().filter(|row| row["temperature"].as_f64() == Some(0.0)).count();
    assert_eq!(zeros, 2);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_reading_that_is_far_too_large_is_put_aside() {
    let cloud = Cloud::connect().await;
    let building = own_building();
    let mark = random();
    // No broker or queue on AWS carries a megabyte; should more than a message may have come all the same, it comes so.
    for bytes in [129 * 1024, 700 * 1024] {
        let payload = format!("{mark}{bytes}{}", " ".repeat(bytes));
        let body = queued(&building, "sensor-1", payload.as_bytes(), now()).body;
        cloud.sqs.send_message().queue_url(cloud.output("TelemetryQueueUrl")).message_body(body).send().await.unwrap();
        let start = BASE64_STANDARD.encode(&payload.as_bytes()[..12]);
        assert_eq!(cloud.dead_letter(&start).await, ErrorName::MessageTooLarge.as_str());
    }
    // A client that sends a megabyte is cut off, or its message is put aside; whoever comes next is heard.
    let things = sensors(&cloud, "huge", 1, &[("building", building.as_str())]).await;
    let device = things[0].thing.as_str();
    let client = MqttDevice::connect(&things[0], true).await;
    let payload = vec![b' '; 1024 * 1024];
    client.publish(Publication { topic: readings_topic(&building), payload }).await;
    let client = MqttDevice::connect(&things[0], true).await;
    client.publish(reading(device, None, 21.0).encode(&building)).await;
    await_rows(&cloud, device, 1).await;
}

/// A message as the topic rule puts it into the queue, from a client without a certificate.
fn queued(building: &Building, id: &str, payload: &[u8], received_at: i64) -> QueuedMessage {
    let body = json!({
        "topic": readings_topic(building), "payload": BASE64_STANDARD.encode(payload), "clientId": "n/a",
        "principal": "AIDACKCEVSQ6C2EXAMPLE", "receivedAt": received_at,
    });
    QueuedMessage { id: id.to_owned(), body: body.to_string() }
}

/// Readings of two new sensors in a building of their own, whose keeping fails and is tried again.
struct Batch<'a> {
    cloud: &'a Cloud,
    building: Building,
    devices: [String; 2],
    messages: Vec<QueuedMessage>,
}

impl<'a> Batch<'a> {
    fn new(cloud: &'a Cloud) -> Self {
        let building = own_building();
        let devices = [format!("a-{}", random()), format!("b-{}", random())];
        let messages = [0, 0, 1].into_iter().enumerate().map(|(index, device)| {
            let id = format!("message-{index}");
            let payload = reading(&devices[device], None, 20.0).encode(&building).payload;
            queued(&building, &id, &payload, now())
        });
        Self { cloud, messages: messages.collect(), building, devices }
    }

    fn places(&self) -> Places {
        Places {
            monitoring_table: self.cloud.output("MonitoringTableName").to_owned(),
            batches_table: self.cloud.output("TelemetryBatchesTableName").to_owned(),
            reading_days: 20,
            bucket: self.cloud.output("TelemetryBucketName").to_owned(),
        }
    }

    /// Delivers what is open, and keeps open what fails for a while; panics if anything fails for good.
    async fn deliver(&self, config: &SdkConfig, open: &mut Vec<QueuedMessage>, now: i64) {
        let deadline = SystemTime::now() + Duration::from_mins(1);
        let outcomes = ingest_telemetry::handle(&Adapters::new(config, self.places()), open, now, deadline).await;
        let mut outcomes = outcomes.into_iter();
        open.retain(|_| match outcomes.next().unwrap() {
            Ok(()) => false,
            Err(error) => {
                assert!(error.name.is_transient(), "{error}");
                println!("tried again: {error}");
                saw(error.to_string());
                true
            }
        });
    }

    /// Delivers by twos and ones, a minute later each time, as the queue may, until all is kept.
    async fn deliver_again(&self, open: &mut Vec<QueuedMessage>) {
        let mut time = now();
        let mut seen = String::new();
        while !open.is_empty() {
            time += MINUTE;
            assert!(time < now() + 20 * MINUTE, "{} messages are never kept: {seen}", open.len());
            let mut rest = open.split_off(open.len().min(2));
            let deliver = async || {
                self.deliver(&self.cloud.config, open, time).await;
                self.deliver(&self.cloud.config, &mut rest, time).await;
            };
            ((), seen) = tests::noted(deliver).await;
            open.append(&mut rest);
        }
    }

    /// How often each reading is in the table, in the history and in the metrics.
    async fn kept(&self) -> (usize, usize, f64) {
        let mut rows = 0;
        let mut values = 0.0;
        for device in &self.devices {
            rows += readings_of(self.cloud, device).await.len();
            values += metric(self.cloud, "Temperature", "Device", device).await.0;
        }
        let (lines, _) = history(self.cloud, &self.building).await;
        let distinct: BTreeSet<_> = lines.iter().map(key).collect();
        assert_eq!(distinct.len(), lines.len(), "each line is another reading");
        (rows, lines.len(), values)
    }
}

/// Each service refuses in turn, for a moment or for a whole call; nothing is lost, nothing is kept twice.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn services_that_refuse_lose_no_reading() {
    let cloud = Cloud::connect().await;
    for service in ["dynamodb", "s3", "monitoring"] {
        for refusal in [Refusal::Throttled, Refusal::Down] {
            for (after, calls) in [(0, 1), (0, 2), (0, 4), (0, 100), (3, 100)] {
                let outage = Outage { service, refusal, after, calls };
                let batch = Batch::new(&cloud);
                let mut open = batch.messages.clone();
                batch.deliver(&refusing(&cloud.config, outage), &mut open, now()).await;
                if calls < 3 {
                    assert_eq!(open.len(), 0, "the SDK tries again by itself: {outage:?}");
                } else if after > 0 {
                    assert_eq!(
                        open.len(),
                        0,
                        "what is kept is not kept again because that cannot be noted: {outage:?}"
                    );
                } else if calls == 100 {
                    assert_eq!(open.len(), 3, "{outage:?}");
                }
                batch.deliver_again(&mut open).await;
                assert_eq!(batch.kept().await, (3, 3, 3.0), "{outage:?}");
            }
        }
    }
}

/// A call dies before or after each of its effects; its messages come again in other batches.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_call_that_dies_at_any_point_loses_no_reading() {
    let cloud = Cloud::connect().await;
    // Three rows, the object, the metrics, the note that they are added.
    let (config, calls) = crashing(&cloud.config, Crash::Before(usize::MAX));
    let whole = Batch::new(&cloud);
    whole.deliver(&config, &mut whole.messages.clone(), now()).await;
    let calls = calls.load(Ordering::SeqCst);
    assert_eq!(calls, 6);
    for call in 1..=calls {
        for crash in [Crash::Before(call), Crash::After(call)] {
            let batch = Batch::new(&cloud);
            // What the dead call would have said, the queue does not hear.
            batch.deliver(&crashing(&cloud.config, crash).0, &mut batch.messages.clone(), now()).await;
            batch.deliver_again(&mut batch.messages.clone()).await;
            let (rows, lines, values) = batch.kept().await;
            assert_eq!((rows, lines), (3, 3), "{crash:?}");
            // Between adding the metrics and the note of it lies the only time in which nobody knows what has happened.
            let is_unknown = matches!(crash, Crash::After(5) | Crash::Before(6));
            assert_eq!(values, if is_unknown { 6.0 } else { 3.0 }, "{crash:?}");
        }
    }
}

/// Two calls get the same readings at once, as a message that the broker delivers twice does.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn two_calls_at_once_keep_a_reading_once() {
    let cloud = Cloud::connect().await;
    for _ in 0..5 {
        let batch = Batch::new(&cloud);
        let (mut one, mut other) = (batch.messages.clone(), batch.messages.clone());
        tokio::join!(batch.deliver(&cloud.config, &mut one, now()), batch.deliver(&cloud.config, &mut other, now()));
        batch.deliver_again(&mut one).await;
        batch.deliver_again(&mut other).await;
        assert_eq!(batch.kept().await, (3, 3, 3.0));
    }
}

/// What the tests' stack has been deployed with: 21 ± 3 °C, over at ± 2, twelve seconds between remediations, an effect within
/// six, six an hour.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_sensor_is_brought_back_into_its_band_and_left_alone_then() {
    let _quiet = tests::undisturbed().await;
    let cloud = Cloud::connect().await;
    let building = own_building();
    let things = sensors(&cloud, "drift", 2, &[("building", building.as_str())]).await;
    let drifting = SensorOptions { min_temperature: 26.5, remediation_factor: 2.0, ..options(&building) };
    let (_calm_running, mut calm) = Sensors::start(&options(&building), named(&things[1..])).unwrap();
    let (_running, mut events) = Sensors::start(&drifting, named(&things[..1])).unwrap();
    let device = things[0].thing.as_str();
    // 26.5 is out of the band, 24.5 too, and 22.5 within it.
    let cooled = [remediated(&mut events).await, remediated(&mut events).await];
    assert_eq!(cooled, [(21.0, -2.0); 2]);
    measured(&mut events, |temperature| temperature < 23.0).await;
    eventually("the remediations are recorded", || async {
        let records = remediations_of(&cloud, device).await;
        (records.len() == 2).then_some(())
    })
    .await;
    for record in remediations_of(&cloud, device).await.values() {
        assert_eq!((&record["actOn"], &record["escalate"]), (&json!(["temperature"]), &json!([])));
    }
    eventually("the remediations are marked", || async {
        (metric(&cloud, "Remediations", "Device", device).await == (2.0, 2.0)).then_some(())
    })
    .await;
    // As many readings again, and nothing more is asked for; the other sensor has heard nothing that is for it.
    for _ in 0..20 {
        let event = events.recv().await.unwrap();
        assert!(matches!(event, SensorEvent::Measured { .. }), "{event:?}");
    }
    while let Ok(event) = calm.try_recv() {
        assert!(matches!(event, SensorEvent::Measured { .. }), "{event:?}");
    }
    let records = remediations_of(&cloud, device).await;
    let times: Vec<i64> = records.values().map(|record| record["decidedAt"].as_i64().unwrap()).collect();
    assert!(times[1] - times[0] >= 12_000, "the cool-down is kept: {times:?}");
}

/// The next remediation of a sensor: what it was told, and what it has done.
async fn remediated(events: &mut UnboundedReceiver<SensorEvent>) -> (f64, f64) {
    let pick = |event: &SensorEvent| match event {
        SensorEvent::Remediated { target, change, .. } => Some((*target, *change)),
        SensorEvent::Measured { .. } => None,
    };
    first(events, "the sensor is told to act", pick).await
}

/// Waits until the sensor measures such a temperature.
async fn measured(events: &mut UnboundedReceiver<SensorEvent>, is: impl Fn(f64) -> bool) {
    let pick = |event: &SensorEvent| match event {
        SensorEvent::Measured { temperature, .. } => is(*temperature).then_some(()),
        SensorEvent::Remediated { .. } => None,
    };
    first(events, "the sensor measures it", pick).await;
}

/// Waits for the first event of which something is picked; panics with the last one when there is none.
async fn first<T>(
    events: &mut UnboundedReceiver<SensorEvent>,
    what: &str,
    pick: impl Fn(&SensorEvent) -> Option<T>,
) -> T {
    let mut last = None;
    let next = async {
        loop {
            let event = events.recv().await.unwrap();
            if let Some(picked) = pick(&event) {
                return picked;
            }
            last = Some(event);
        }
    };
    let picked = tokio::time::timeout(tests::PATIENCE, next).await;
    picked.unwrap_or_else(|_| panic!("{}", tests::in_vain(tests::PATIENCE, what, &format!("{last:?}"))))
}

/// Waits for a message with these words.
async fn alarm(cloud: &Cloud, url: &str, words: &[&str]) -> String {
    // What one look has received, the next ones do not get.
    let heard = std::cell::RefCell::new(Vec::new());
    eventually(&format!("an alarm of {words:?}"), || async {
        let receive = cloud.sqs.receive_message().queue_url(url).max_number_of_messages(10);
        let messages = receive.send().await.unwrap().messages.unwrap_or_default();
        let bodies: Vec<String> = messages.into_iter().filter_map(|message| message.body).collect();
        heard.borrow_mut().extend(bodies.iter().map(|body| body.chars().take(500).collect::<String>()));
        saw(format!("{} messages so far: {:?}", heard.borrow().len(), heard.borrow()));
        bodies.into_iter().find(|body| words.iter().all(|word| body.contains(word)))
    })
    .await
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn people_are_told_once_when_nothing_helps() {
    let _quiet = tests::undisturbed().await;
    let cloud = Cloud::connect().await;
    let building = own_building();
    let alarms = cloud.listen("AlarmTopicArn", &[]).await;
    let things = sensors(&cloud, "stuck", 1, &[("building", building.as_str())]).await;
    let device = things[0].thing.as_str();
    let stuck = SensorOptions { min_temperature: 15.0, remediation_factor: 0.0, ..options(&building) };
    let (_running, mut events) = Sensors::start(&stuck, named(&things)).unwrap();
    remediated(&mut events).await;
    let message = alarm(&cloud, &alarms, &[device]).await;
    let message: Value = serde_json::from_str(&message).unwrap();
    let message = message["Message"].as_str().unwrap();
    assert!(message.contains("is 15 °C, expected 21 ± 3: no effect within 6 s of the last remediation"), "{message}");
    // Longer than the cool-down, and neither it nor they hear more.
    for _ in 0..30 {
        let event = events.recv().await.unwrap();
        assert!(matches!(event, SensorEvent::Measured { .. }), "{event:?}");
    }
    let records = remediations_of(&cloud, device).await;
    let escalated: Vec<&Value> = records.values().map(|record| &record["escalate"]).collect();
    assert_eq!(escalated, [&json!([]), &json!([["temperature", "NO_EFFECT"]])]);
}

/// A sensor that reports far too often costs another one no remediation, and gets no more than its own.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_flood_of_one_sensor_starves_no_other() {
    let _others_wait = tests::without_others().await;
    let cloud = Cloud::connect().await;
    let building = own_building();
    let things = sensors(&cloud, "flood", 2, &[("building", building.as_str())]).await;
    let flood = SensorOptions {
        min_temperature: 30.0,
        remediation_factor: 0.1,
        update_frequency: Duration::from_millis(5),
        readings: Some(1000),
        ..options(&building)
    };
    let (mut flooding, _events) = Sensors::start(&flood, named(&things[..1])).unwrap();
    let drifting = SensorOptions { min_temperature: 26.0, ..options(&building) };
    let (_running, mut events) = Sensors::start(&drifting, named(&things[1..])).unwrap();
    assert_eq!(remediated(&mut events).await, (21.0, -1.0));
    flooding.finished().await;
    await_rows(&cloud, things[0].thing.as_str(), 1000).await;
    let actions = remediations_of(&cloud, things[0].thing.as_str()).await;
    assert!((1..=7).contains(&actions.len()), "six an hour at most, and an escalation: {}", actions.len());
}

/// A client that knows nothing but the messages of the first sensors, in their order.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_plain_sensor_that_a_thing_reports_for_is_heard_and_told() {
    let cloud = Cloud::connect().await;
    let building = own_building();
    let device = format!("9{}", random());
    let things =
        sensors(&cloud, "monitoring", 1, &[("building", building.as_str()), ("sensors", device.as_str())]).await;
    let mut client = MqttDevice::connect(&things[0], true).await;
    client.subscribe(remediations_topic(&building), QoS::AtLeastOnce).await;
    let payload =
        format!(r#"{{"body":{{"device":"{device}","temperature":27.4,"humidity":60.4,"action":"Monitor"}}}}"#);
    client.publish(Publication { topic: readings_topic(&building), payload: payload.into_bytes() }).await;
    let message = client.message().await;
    assert_eq!(message.topic, format!("monitoring-device/remediation-{building}"));
    let told: Value = serde_json::from_slice(&message.payload).unwrap();
    let expected = json!({"body": {"device": device, "temperature": 21.0, "humidity": 50.0, "action": "Remediate"}});
    assert_eq!(told, expected);
    assert!(Remediation::decode(&message.payload).is_ok());
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_building_that_is_too_warm_raises_an_alarm() {
    let cloud = Cloud::connect().await;
    let alarms = cloud.listen("AlarmTopicArn", &[]).await;
    let building: Building = "2".parse().unwrap();
    let things = sensors(&cloud, "warm", 1, &[("building", building.as_str())]).await;
    let client = MqttDevice::connect(&things[0], true).await;
    for minute in 0..3 {
        let (id, time) = (format!("warm-{minute}"), now() - minute * MINUTE);
        client.publish(reading(things[0].thing.as_str(), Some((&id, time)), 60.0).encode(&building)).await;
    }
    alarm(&cloud, &alarms, &["Building2TemperatureMaximumAlarm", "ALARM"]).await;
}

/// A row that nobody can read is put aside, and those behind it are acted on.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_poison_row_stops_no_other() {
    let cloud = Cloud::connect().await;
    let building = own_building();
    let poisoned = format!("poison-{}", random());
    let text = |value: &str| AttributeValue::S(value.to_owned());
    let put = cloud.dynamodb.put_item().table_name(cloud.output("MonitoringTableName"));
    let put = put.item("device", text(&poisoned)).item("reading", text("0#0")).item("temperature", text("warm"));
    put.send().await.unwrap();
    let things = sensors(&cloud, "behind", 1, &[("building", building.as_str())]).await;
    let drifting = SensorOptions { min_temperature: 26.0, ..options(&building) };
    let (_running, mut events) = Sensors::start(&drifting, named(&things)).unwrap();
    remediated(&mut events).await;
    assert_eq!(cloud.dead_letter(&poisoned).await, ErrorName::MalformedMessage.as_str());
}

/// `remediate` dies before or after each of its calls, says so, and the stream delivers again. The sensor is told, once as a rule
/// and twice if the death came between telling it and noting that; what was done is noted once.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_remediation_survives_a_death_at_any_point() {
    let cloud = Cloud::connect().await;
    let (places, rules) = (remediate_places(&cloud).await, remediate_rules());
    let building = own_building();
    let things = sensors(&cloud, "listener", 1, &[("building", building.as_str())]).await;
    let mut listener = MqttDevice::connect(&things[0], true).await;
    listener.subscribe(remediations_topic(&building), QoS::AtLeastOnce).await;

    // Read, decide, note, ask for a check, tell, mark, read again, and note that it is done.
    for call in 1..=8 {
        for crash in [Crash::Before(call), Crash::After(call)] {
            let device = format!("dying-{}", random());
            let time = now();
            let event = stream_event(&[(&device, "1")], &building, time);
            for (config, failed) in [
                (crashing(&cloud.config, crash).0, Some("1")),
                (cloud.config.clone(), None),
                (cloud.config.clone(), None),
            ] {
                let mqtt = aws_sdk_iotdataplane::Client::new(&config);
                let adapters = remediate::Adapters::new(&config, mqtt, places.clone(), rules.clone());
                let response = remediate::handle(&adapters, event.clone(), time).await;
                let said: Vec<_> =
                    response.batch_item_failures.iter().map(|failure| failure.item_identifier.as_deref()).collect();
                assert_eq!(said, failed.map(Some).into_iter().collect::<Vec<_>>(), "{crash:?}");
            }
            let told = told_before(&mut listener, &device, &cloud, &building).await;
            // The publication is the fifth call.
            let is_unknown = matches!(crash, Crash::After(5..=7) | Crash::Before(6..=8));
            assert_eq!(told, if is_unknown { 2 } else { 1 }, "{crash:?}");
            assert_eq!(remediations_of(&cloud, &device).await.len(), 1, "{crash:?}");
        }
    }
}

/// What fails is said, by the first record that did; the sensors before and behind it are seen to.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_record_that_fails_is_delivered_again_and_the_others_are_done() {
    let cloud = Cloud::connect().await;
    let places = remediate::Places {
        // Where a row that nobody can read cannot be put aside.
        dead_letter_queue_url: format!("{}-gone", cloud.output("DeadLetterQueueUrl")),
        ..remediate_places(&cloud).await
    };
    let devices = ["first", "last"].map(|name| format!("{name}-{}", random()));
    let time = now();
    let event =
        stream_event(&[(&devices[0], "11"), ("not / a sensor", "12"), (&devices[1], "13")], &own_building(), time);
    let adapters = remediate::Adapters::new(&cloud.config, cloud.mqtt.clone(), places, remediate_rules());
    let response = remediate::handle(&adapters, event, time).await;
    let said: Vec<_> = response.batch_item_failures.iter().map(|failure| failure.item_identifier.as_deref()).collect();
    assert_eq!(said, [Some("12")]);
    for device in &devices {
        assert_eq!(remediations_of(&cloud, device).await.len(), 1, "{device}");
    }
}

/// A sensor that is told to act and is never heard again.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn people_are_told_of_a_sensor_that_falls_silent_after_a_remediation() {
    let _quiet = tests::undisturbed().await;
    let cloud = Cloud::connect().await;
    let building = own_building();
    let alarms = cloud.listen("AlarmTopicArn", &[]).await;
    let things = sensors(&cloud, "silent", 1, &[("building", building.as_str())]).await;
    let client = MqttDevice::connect(&things[0], true).await;
    let device = things[0].thing.as_str();
    client.publish(reading(device, None, 30.0).encode(&building)).await;
    let message = alarm(&cloud, &alarms, &[device]).await;
    assert!(message.contains("no reading has come that could show an effect of the last remediation"), "{message}");
    let records = remediations_of(&cloud, device).await;
    let escalated: Vec<&Value> = records.values().map(|record| &record["escalate"]).collect();
    assert_eq!(escalated, [&json!([]), &json!([["temperature", "NO_READING"]])]);
}

fn remediate_rules() -> remediate::Rules {
    let rule = remediate::Rule {
        target: 21.0,
        band: 3.0,
        hysteresis: 1.0,
        cool_down: MINUTE,
        actions_an_hour: 6,
        effect_after: MINUTE,
    };
    remediate::Rules { humidity: remediate::Rule { target: 50.0, ..rule.clone() }, temperature: rule }
}

async fn remediate_places(cloud: &Cloud) -> remediate::Places {
    remediate::Places {
        // Any table with that key will do, and the stack's function must not see these.
        climates_table: climates_table(cloud).await,
        remediations_table: cloud.output("RemediationsTableName").to_owned(),
        reading_days: 20,
        checks_queue_url: cloud.output("RemediationChecksQueueUrl").to_owned(),
        alarm_topic_arn: cloud.output("AlarmTopicArn").to_owned(),
        dead_letter_queue_url: cloud.output("DeadLetterQueueUrl").to_owned(),
    }
}

/// A table of the test's own, as that of the stack.
async fn climates_table(cloud: &Cloud) -> String {
    use aws_sdk_dynamodb::types::{AttributeDefinition, BillingMode, KeySchemaElement, KeyType, ScalarAttributeType};
    let name = format!("climates-{}", random());
    let attribute = AttributeDefinition::builder().attribute_name("device").attribute_type(ScalarAttributeType::S);
    let key = KeySchemaElement::builder().attribute_name("device").key_type(KeyType::Hash);
    let create = cloud.dynamodb.create_table().table_name(&name).billing_mode(BillingMode::PayPerRequest);
    let create = create.attribute_definitions(attribute.build().unwrap()).key_schema(key.build().unwrap());
    create.send().await.unwrap();
    name
}

/// New rows of devices, 27 °C each, as the stream of the table tells of them with these numbers.
fn stream_event(devices: &[(&str, &str)], building: &Building, time: i64) -> remediate::Event {
    let text = |value: &str| json!({ "S": value });
    let number = |value: &str| json!({ "N": value });
    let time = time.to_string();
    let records = devices.iter().map(|(device, sequence)| {
        json!({
            "eventID": sequence, "eventName": "INSERT", "awsRegion": "eu-west-1", "eventSource": "aws:dynamodb",
            "dynamodb": {
                "ApproximateCreationDateTime": 1, "SequenceNumber": sequence, "SizeBytes": 1,
                "StreamViewType": "NEW_IMAGE", "Keys": {"device": text(device), "reading": text("1")},
                "NewImage": {
                    "device": text(device), "id": text("r"), "building": text(building.as_str()),
                    "time": number(&time), "receivedAt": number(&time),
                    "temperature": number("27"), "humidity": number("50"),
                },
            },
        })
    });
    serde_json::from_value(json!({"Records": records.collect::<Vec<_>>()})).unwrap()
}

/// How often a sensor was told, before a last message that the test sends itself.
async fn told_before(listener: &mut MqttDevice, device: &str, cloud: &Cloud, building: &Building) -> usize {
    let end = Remediation { device: "end".parse().unwrap(), temperature: 0.0, humidity: 0.0 }.encode(building);
    let publish = cloud.mqtt.publish().topic(end.topic).qos(1).payload(end.payload.into());
    publish.send().await.unwrap();
    let mut told = 0;
    loop {
        let message = Remediation::decode(&listener.message().await.payload).unwrap();
        if message.device.as_str() == "end" {
            return told;
        }
        told += usize::from(message.device.as_str() == device);
    }
}
