//! Telemetry: one sensor a case, in a building of its own.

use crate::disturbance::{Disturbance, Point};
use crate::harness::{Case, Failure, LIMIT, Verdict, Workflow, eventually, same};
use aws_proxy::rules::Rule;
use aws_sdk_cloudwatch::primitives::DateTime;
use aws_sdk_cloudwatch::types::{Dimension, Statistic};
use aws_sdk_dynamodb::types::AttributeValue;
use device_simulator::DeviceSpec;
use device_simulator::provision::{DevicePolicy, ProtocolMix, ProvisionOptions};
use flate2::read::GzDecoder;
use protocol::telemetry::{Reading, ReadingIdentity, Remediation, readings_topic, remediations_topic};
use protocol::{Building, ProtocolName, Publication};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rumqttc::QoS;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::Read;
use std::time::{Duration, Instant};
use tests::{Cloud, MqttDevice, Proxy, now, saw};

/// The calls about a sensor that have its name or its building's in them.
const POINTS: &[Point] = &[
    (Some("IngestTelemetry"), "dynamodb.PutItem"),
    (Some("IngestTelemetry"), "monitoring.PutMetricData"),
    (Some("IngestTelemetry"), "iot.DescribeThing"),
    (Some("IngestTelemetry"), "sqs.SendMessage"),
    (Some("Remediate"), "dynamodb.GetItem"),
    (Some("Remediate"), "dynamodb.PutItem"),
    (Some("Remediate"), "sqs.SendMessage"),
    (Some("Remediate"), "iotdata.Publish"),
    (Some("Remediate"), "monitoring.PutMetricData"),
    (Some("Remediate"), "sns.Publish"),
    (Some("CheckRemediation"), "dynamodb.GetItem"),
    (Some("CheckRemediation"), "dynamodb.PutItem"),
    (Some("CheckRemediation"), "sns.Publish"),
];
/// Calls about a batch of readings, whoever's they are: they have its name only.
const BATCH_POINTS: &[Point] = &[
    (Some("IngestTelemetry"), "s3.PutObject"),
    (Some("IngestTelemetry"), "s3.GetObject"),
    (Some("IngestTelemetry"), "dynamodb.GetItem"),
    (Some("IngestTelemetry"), "dynamodb.PutItem"),
];
/// How the history's objects begin, and a text of each that is the same in a path and in a body.
const BATCHES: &str = "year=";
const BATCH_TEXT: &str = "/month";

const SECOND: i64 = 1000;
const DAY: i64 = 24 * 3600 * SECOND;
/// In the band of 21 ± 3 °C, and out of it.
const GOOD: [f64; 4] = [19.5, 20.0, 21.0, 22.5];
const BAD: [f64; 3] = [14.0, 26.5, 30.0];
/// A check comes no later than this if the time for an effect is as in a stack that people use.
const PATIENT_SECONDS: u64 = 60;

/// What a sensor sends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Move {
    /// A reading with an id and the time of now.
    Measure(f64),
    /// A reading that it has kept for so many seconds.
    Kept(f64, i64),
    /// A reading without id and time: each time it is another one.
    Plain(f64),
    /// The reading of that place again.
    Again(usize),
    /// It connects anew, and sends again the last so many readings, not knowing whether they have come.
    Reconnect(usize),
    Malformed,
    NoNumber,
    OutOfRange,
    TooOld,
    Oversized,
    /// A reading of a sensor that it may not report for.
    Stranger,
}

/// What happens when its surroundings have left the band.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Drift {
    /// Nothing: they have not.
    None,
    /// What it does about it helps.
    Helps(f64),
    /// It reports on and on that nothing helps.
    Useless(f64),
    /// It falls silent when it has reported it.
    Silent(f64),
}

/// A case of a sensor.
pub(crate) struct Plan {
    moves: Vec<Move>,
    drift: Drift,
    disturbances: Vec<Disturbance>,
    of_batches: Vec<Disturbance>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, drift: {:?}", self.moves, self.drift)?;
        self.disturbances.iter().try_for_each(|disturbance| write!(f, "; {disturbance}"))?;
        self.of_batches.iter().try_for_each(|disturbance| write!(f, "; {disturbance} batch"))
    }
}

impl Plan {
    /// By turns: messages, a kill, refusals, a sensor that comes and goes, and all of it together.
    fn new(random: &mut StdRng, number: usize) -> Self {
        let mut plan = Self { moves: vec![], drift: Drift::None, disturbances: vec![], of_batches: vec![] };
        let kinds: &[fn(&mut StdRng, &[Move]) -> Move] = match number % 5 {
            0 => &[message],
            1 | 2 => &[honest],
            3 => &[honest, honest, reconnect],
            _ => &[message, reconnect],
        };
        match number % 5 {
            1 => plan.disturbances.push(Disturbance::kill_in_turn(random, POINTS, number / 5)),
            4 => plan.disturb(random, Disturbance::kill),
            _ => {}
        }
        if matches!(number % 5, 2 | 4) {
            plan.disturb(random, Disturbance::fail);
        }
        for _ in 0..random.random_range(2..=8) {
            let one = kinds.choose(random).unwrap()(random, &plan.moves);
            plan.moves.push(one);
        }
        let value = *BAD.choose(random).unwrap();
        plan.drift = match random.random_range(0..6) {
            0 | 1 => Drift::None,
            2 | 3 => Drift::Helps(value),
            4 => Drift::Useless(value),
            _ => Drift::Silent(value),
        };
        plan
    }

    fn disturb(&mut self, random: &mut StdRng, kind: fn(&mut StdRng, &[Point]) -> Disturbance) {
        if random.random_bool(0.7) {
            self.disturbances.push(kind(random, POINTS));
        } else {
            self.of_batches.push(kind(random, BATCH_POINTS));
        }
    }

    fn rules(&self, case: &Case) -> Vec<Rule> {
        let own = self.disturbances.iter().map(|one| one.rule(&case.name));
        let of_batches = self.of_batches.iter().map(|one| {
            let mut rule = one.rule(&case.name);
            BATCH_TEXT.clone_into(&mut rule.contains);
            // Nobody else's buckets and tables.
            rule.function = Some("IngestTelemetry".to_owned());
            rule
        });
        own.chain(of_batches).collect()
    }
}

fn good(random: &mut StdRng) -> f64 {
    *GOOD.choose(random).unwrap()
}

fn honest(random: &mut StdRng, before: &[Move]) -> Move {
    match random.random_range(0..10) {
        0 => Move::Plain(good(random)),
        1 => Move::Kept(good(random), random.random_range(1..600)),
        2 => again(random, before),
        3 => Move::Stranger,
        4 => Move::OutOfRange,
        _ => Move::Measure(good(random)),
    }
}

fn again(random: &mut StdRng, before: &[Move]) -> Move {
    if before.is_empty() { Move::Measure(good(random)) } else { Move::Again(random.random_range(0..before.len())) }
}

fn reconnect(random: &mut StdRng, _before: &[Move]) -> Move {
    Move::Reconnect(random.random_range(0..3))
}

fn message(random: &mut StdRng, before: &[Move]) -> Move {
    match random.random_range(0..12) {
        0 | 1 => Move::Measure(good(random)),
        2 => Move::Kept(good(random), random.random_range(1..3 * 3600)),
        3 | 4 => Move::Plain(good(random)),
        5 | 6 => again(random, before),
        7 => Move::Malformed,
        8 => *[Move::OutOfRange, Move::NoNumber].choose(random).unwrap(),
        9 => Move::TooOld,
        10 => Move::Oversized,
        _ => Move::Stranger,
    }
}

/// A row of a table.
type Row = BTreeMap<String, Value>;

/// The sensor of a case.
struct Sensor<'a> {
    case: &'a Case,
    building: Building,
    spec: DeviceSpec,
    client: MqttDevice,
    /// What it has sent, one message a move.
    sent: Vec<Publication>,
    /// The keys of its readings that have ids: time and id.
    known: BTreeSet<(i64, String)>,
    /// How many without.
    plain: usize,
    count: usize,
}

impl Sensor<'_> {
    fn name(&self) -> &str {
        self.spec.thing.as_str()
    }

    fn reading(&self, temperature: f64, identity: Option<ReadingIdentity>) -> Reading {
        Reading { device: self.spec.thing.clone().into(), temperature, humidity: 50.0, identity }
    }

    /// A reading of that time, of which it is known that it must be kept.
    fn measured(&mut self, temperature: f64, time: i64) -> Publication {
        self.count += 1;
        let id = format!("r-{}", self.count);
        self.known.insert((time, id.clone()));
        let identity = Some(ReadingIdentity { id: id.parse().unwrap(), time });
        self.reading(temperature, identity).encode(&self.building)
    }

    /// What is to be sent, if it is a message.
    fn message(&mut self, one: Move) -> Option<Publication> {
        let topic = readings_topic(&self.building);
        let body = |changes: Value| {
            let mut body =
                json!({"device": self.spec.thing, "temperature": 21.0, "humidity": 50.0, "action": "Monitor"});
            body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            json!({"body": body}).to_string().into_bytes()
        };
        let payload = match one {
            Move::Measure(temperature) => return Some(self.measured(temperature, now())),
            Move::Kept(temperature, seconds) => return Some(self.measured(temperature, now() - seconds * SECOND)),
            Move::Plain(temperature) => {
                self.plain += 1;
                return Some(self.reading(temperature, None).encode(&self.building));
            }
            Move::Again(place) => {
                let again = self.sent.get(place).filter(|sent| !sent.payload.is_empty())?.clone();
                self.plain += usize::from(is_plain(&again));
                return Some(again);
            }
            Move::Reconnect(_) => return None,
            Move::Malformed => b"nonsense".to_vec(),
            Move::NoNumber => body(json!({"temperature": "27.4"})),
            Move::OutOfRange => body(json!({"temperature": 999.0})),
            Move::TooOld => body(json!({"id": "late", "time": now() - 8 * DAY})),
            Move::Oversized => vec![b' '; protocol::MAX_PAYLOAD_BYTES + 1],
            Move::Stranger => body(json!({"device": format!("{}-stranger", self.case.name)})),
        };
        Some(Publication { topic, payload })
    }

    /// Whether it is a reading that is kept, with an id: once, however often it is sent.
    fn must_keep(&self, message: &Publication) -> bool {
        let identity = Reading::decode(&message.payload).ok().and_then(|reading| reading.identity);
        identity.is_some_and(|identity| self.known.contains(&(identity.time, identity.id.to_string())))
    }

    async fn connect(&mut self) {
        self.client = MqttDevice::connect(&self.spec, true).await;
        self.client.subscribe(remediations_topic(&self.building), QoS::AtLeastOnce).await;
    }
}

/// Whether a message is a reading that would be kept once more if it were sent again.
fn is_plain(message: &Publication) -> bool {
    Reading::decode(&message.payload).is_ok_and(|reading| {
        reading.identity.is_none()
            && Reading::TEMPERATURES.contains(&reading.temperature)
            && !reading.device.as_str().ends_with("-stranger")
    })
}

/// What is put aside of a message, if it is.
fn error_of(one: Move) -> Option<&'static str> {
    match one {
        Move::Malformed | Move::NoNumber => Some("MalformedMessage"),
        Move::OutOfRange | Move::TooOld => Some("ReadingOutOfRange"),
        Move::Oversized => Some("MessageTooLarge"),
        Move::Stranger => Some("SenderMismatch"),
        _ => None,
    }
}

/// What has come of a case, to be looked at when all have ended.
struct Traces {
    device: String,
    known: BTreeSet<(i64, String)>,
    plain: usize,
    /// How often the sensor was told.
    told: usize,
}

/// The pipeline on the deployed stack.
pub(crate) struct Telemetry {
    cloud: Cloud,
    proxy: Proxy,
    /// Hears what people are told.
    alarms: String,
    begin: i64,
    cool_down: i64,
    /// Whether a reading has the time to show an effect, whatever is being done to the cloud.
    is_patient: bool,
    traces: tokio::sync::Mutex<HashMap<usize, Traces>>,
}

impl Telemetry {
    pub(crate) async fn connect() -> Self {
        let cloud = Cloud::connect().await;
        let alarms = cloud.listen("AlarmTopicArn", &[]).await;
        let parameters = parameters(&cloud).await;
        let seconds = |name: &str| parameters[name].parse::<u64>().expect("seconds");
        Self {
            alarms,
            begin: now(),
            cool_down: SECOND * i64::try_from(seconds("TemperatureCoolDownSeconds")).expect("seconds"),
            is_patient: seconds("RemediationEffectSeconds") >= PATIENT_SECONDS,
            traces: tokio::sync::Mutex::default(),
            proxy: Proxy::from_environment(),
            cloud,
        }
    }

    async fn sensor<'a>(&self, case: &'a Case) -> Sensor<'a> {
        let building: Building = case.name.parse().unwrap();
        let change = |options: &mut ProvisionOptions| {
            options.policy = DevicePolicy::Existing(self.cloud.output("MonitoringDevicePolicyName").to_owned());
            options.attributes = [("building".to_owned(), building.to_string())].into();
        };
        let protocol = ProtocolMix::All(ProtocolName::Json);
        let spec = self.cloud.provision_with(&case.name, 1, protocol, change).await.1.remove(0);
        let mut client = MqttDevice::connect(&spec, true).await;
        client.subscribe(remediations_topic(&building), QoS::AtLeastOnce).await;
        Sensor { case, building, spec, client, sent: vec![], known: BTreeSet::new(), plain: 0, count: 0 }
    }

    async fn send(&self, sensor: &mut Sensor<'_>, one: Move) -> Verdict {
        if let Some(message) = sensor.message(one) {
            sensor.client.publish(message.clone()).await;
            sensor.sent.push(message);
            return Ok(());
        }
        if let Move::Reconnect(count) = one {
            // What it has sent is on the wire by then: a row of each.
            self.kept(sensor).await?;
            sensor.connect().await;
            let last: Vec<Publication> = sensor.sent.iter().rev().take(count).rev().cloned().collect();
            for message in last.into_iter().filter(|message| sensor.must_keep(message)) {
                sensor.client.publish(message).await;
            }
        }
        // Nothing was sent: the places of the others stay.
        sensor.sent.push(Publication { topic: readings_topic(&sensor.building), payload: vec![] });
        Ok(())
    }

    /// Every reading has its row, and there are no others.
    async fn kept(&self, sensor: &Sensor<'_>) -> Verdict {
        let count = sensor.known.len() + sensor.plain;
        let kept = eventually(&format!("all of {count} readings are kept"), || async {
            let rows = rows(&self.cloud, "MonitoringTableName", sensor.name()).await;
            (rows.len() >= count).then_some(rows)
        })
        .await;
        let rows = kept.map_err(Failure::lost)?;
        same("the readings", &keys(rows.values()).len(), &count)
    }

    /// What was done about the sensor.
    async fn remedies(&self, device: &str) -> Vec<Row> {
        let rows = rows(&self.cloud, "RemediationsTableName", device).await;
        let rows = rows.into_values().map(|row| row.as_object().unwrap().clone().into_iter().collect());
        rows.collect()
    }

    async fn escalated(&self, sensor: &Sensor<'_>) -> bool {
        self.remedies(sensor.name()).await.iter().any(|row| row["escalate"] != json!([]))
    }

    /// Has the surroundings leave the band; how often the sensor was told to act.
    async fn drift(&self, sensor: &mut Sensor<'_>, drift: Drift) -> Result<usize, Failure> {
        let (Drift::Helps(value) | Drift::Useless(value) | Drift::Silent(value)) = drift else { return Ok(0) };
        // Whatever it has sent before is older.
        self.kept(sensor).await?;
        let mut told = 0;
        let begin = Instant::now();
        let mut reports = 0;
        loop {
            let has_ended = match drift {
                Drift::Helps(_) => told > 0,
                _ => self.escalated(sensor).await,
            };
            if has_ended {
                break;
            }
            if begin.elapsed() > LIMIT {
                let (_, seen) = tests::noted(|| self.remedies(sensor.name())).await;
                let what = format!("{drift:?} ends, the sensor was told {told} times");
                return Err(Failure::Stuck(tests::in_vain(LIMIT, &what, &seen)));
            }
            // What helps must be given the time to, and who falls silent says it once.
            let is_due = match drift {
                Drift::Helps(_) => begin.elapsed() >= reports * Duration::from_secs(90),
                Drift::Useless(_) => true,
                _ => reports == 0,
            };
            if is_due {
                reports += 1;
                self.send(sensor, Move::Measure(value)).await?;
            }
            told += self.told_within(sensor, Duration::from_secs(3)).await?;
        }
        if let Drift::Helps(_) = drift {
            self.send(sensor, Move::Measure(21.5)).await?;
        }
        Ok(told)
    }

    /// How often the sensor is told to act in this time.
    async fn told_within(&self, sensor: &mut Sensor<'_>, time: Duration) -> Result<usize, Failure> {
        let end = Instant::now() + time;
        let mut told = 0;
        while let Ok(message) =
            tokio::time::timeout(end.saturating_duration_since(Instant::now()), sensor.client.message()).await
        {
            let told_of = Remediation::decode(&message.payload).map(|told| told.device.to_string());
            same("the sensor that is told", &told_of.unwrap_or_default().as_str(), &sensor.name())?;
            told += 1;
        }
        Ok(told)
    }

    /// What was done about the sensor is what had to be, and no more.
    async fn judge(&self, device: &str, plan: &Plan, told: usize, alarms: usize) -> Verdict {
        let remedies = self.remedies(device).await;
        let mut acts: Vec<i64> = remedies
            .iter()
            .filter(|row| row["actOn"] != json!([]))
            .map(|row| row["decidedAt"].as_i64().unwrap_or_default())
            .collect();
        acts.sort_unstable();
        let escalations = remedies.iter().filter(|row| row["escalate"] != json!([])).count();
        let reports = format!("{acts:?} and {escalations} times people, told {told} times, {alarms} alarms");
        let wrong = |what: &str| Err(Failure::Wrong(format!("{what}: {reports}")));
        let quickly = acts.windows(2).any(|pair| pair[1] - pair[0] < self.cool_down);
        match plan.drift {
            _ if quickly => return wrong("acted again before the cool-down was over"),
            Drift::None if !remedies.is_empty() || told > 0 => return wrong("acted without need"),
            Drift::None => {}
            Drift::Silent(_) if acts.len() != 1 => return wrong("not one action"),
            _ if acts.is_empty() || acts.len() > 6 => return wrong("the wrong number of actions"),
            Drift::Useless(_) | Drift::Silent(_) if escalations != 1 => return wrong("people not told once"),
            Drift::Helps(_) if escalations > usize::from(!self.is_patient) => return wrong("people told without need"),
            _ => {}
        }
        if (alarms == 0) != (escalations == 0) {
            return wrong("what people were told");
        }
        // A function that dies when it has told the sensor, and others' with it, tells it again.
        if told == 0 && !acts.is_empty() {
            return wrong("the sensor was not told");
        }
        Ok(())
    }

    /// What people were told since the test began, each message.
    async fn alarms(&self) -> Vec<String> {
        let mut alarms = Vec::new();
        let mut empty = 0;
        while empty < 3 {
            let receive = self.cloud.sqs.receive_message().queue_url(&self.alarms).max_number_of_messages(10);
            let messages =
                receive.visibility_timeout(15).wait_time_seconds(1).send().await.expect("the queue").messages;
            let messages = messages.unwrap_or_default();
            empty = if messages.is_empty() { empty + 1 } else { 0 };
            alarms.extend(messages.into_iter().filter_map(|message| message.body));
        }
        alarms
    }

    /// Every line of the history since the test began, by the sensor.
    async fn history(&self) -> HashMap<String, Vec<Value>> {
        let bucket = self.cloud.output("TelemetryBucketName");
        let list = self.cloud.s3.list_objects_v2().bucket(bucket).prefix(BATCHES).into_paginator().send();
        let pages = list.collect::<Result<Vec<_>, _>>().await.expect("the history");
        let objects = pages.into_iter().flat_map(|page| page.contents.unwrap_or_default());
        // Clocks agree, but S3 counts in seconds.
        let is_new = |object: &aws_sdk_s3::types::Object| {
            object.last_modified.is_none_or(|time| time.secs() * SECOND > self.begin - 10 * SECOND)
        };
        let mut history: HashMap<String, Vec<Value>> = HashMap::new();
        for key in objects.filter(is_new).filter_map(|object| object.key) {
            let object = self.cloud.s3.get_object().bucket(bucket).key(&key).send().await.expect("an object");
            let mut text = String::new();
            let bytes = object.body.collect().await.expect("an object").into_bytes();
            GzDecoder::new(&*bytes).read_to_string(&mut text).expect("lines");
            for line in text.lines() {
                let line: Value = serde_json::from_str(line).expect("JSON");
                history.entry(line["device"].as_str().unwrap_or_default().to_owned()).or_default().push(line);
            }
        }
        history
    }

    /// How many values of the sensor the metric has.
    async fn measured(&self, device: &str) -> f64 {
        let dimension = Dimension::builder().name("Device").value(device).build();
        let get = self.cloud.cloudwatch.get_metric_statistics().namespace("Device/Monitoring");
        let get = get.metric_name("Temperature").dimensions(dimension).period(3600);
        let get = get.statistics(Statistic::SampleCount).start_time(DateTime::from_millis(now() - DAY));
        let found = get.end_time(DateTime::from_millis(now() + DAY)).send().await.expect("the metric").datapoints;
        found.unwrap_or_default().iter().filter_map(|point| point.sample_count).sum()
    }

    /// What is kept of the sensor's readings, once each.
    async fn look_back(&self, plan: &Plan, traces: &Traces, history: &[Value], alarms: &[String]) -> Verdict {
        let rows = rows(&self.cloud, "MonitoringTableName", &traces.device).await;
        let kept = keys(rows.values());
        let count = traces.known.len() + traces.plain;
        same("the number of rows", &kept.len(), &count)?;
        let lost = traces.known.iter().filter(|(time, id)| !kept.contains(&(*time, id.clone()))).count();
        same("readings without a row", &lost, &0)?;
        same("lines of the history", &history.len(), &count)?;
        same("the history holds what the table does", &(keys(history.iter()) == kept), &true)?;
        let measured = self.measured(&traces.device).await;
        #[allow(clippy::cast_precision_loss)]
        same("each reading is in the metrics", &(measured >= count as f64), &true)?;
        let alarms = alarms.iter().filter(|alarm| alarm.contains(&traces.device)).count();
        self.judge(&traces.device, plan, traces.told, alarms).await
    }
}

/// The stack's parameters.
async fn parameters(cloud: &Cloud) -> HashMap<String, String> {
    let name = std::env::var("FLEETFLOW_STACK").expect("FLEETFLOW_STACK");
    let describe = aws_sdk_cloudformation::Client::new(&cloud.config).describe_stacks().stack_name(name);
    let stack = describe.send().await.expect("the stack").stacks.unwrap_or_default().remove(0);
    let parameters = stack.parameters.unwrap_or_default().into_iter();
    parameters.filter_map(|one| Some((one.parameter_key?, one.parameter_value?))).collect()
}

/// What tells rows and lines apart.
fn keys<'a>(lines: impl Iterator<Item = &'a Value>) -> BTreeSet<(i64, String)> {
    let key =
        |line: &Value| (line["time"].as_i64().unwrap_or_default(), line["id"].as_str().unwrap_or_default().to_owned());
    lines.map(key).collect()
}

/// The rows of a sensor in a table, by their sort key.
async fn rows(cloud: &Cloud, table: &str, device: &str) -> BTreeMap<String, Value> {
    let query = cloud.dynamodb.query().table_name(cloud.output(table)).consistent_read(true);
    let query = query.key_condition_expression("device = :device");
    let query = query.expression_attribute_values(":device", AttributeValue::S(device.to_owned()));
    let items = query.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.expect("the table");
    let items = items.into_iter().map(|item| serde_dynamo::from_item::<_, Value>(item).expect("JSON"));
    let rows: BTreeMap<_, _> =
        items.map(|item| (item["reading"].as_str().unwrap_or_default().to_owned(), item)).collect();
    saw(format!("{} rows of {device} in {table}: {rows:?}", rows.len()));
    rows
}

impl Workflow for Telemetry {
    const NAME: &'static str = "sensor";
    const QUEUES: &'static [&'static str] = &["TelemetryQueue", "RemediationChecksQueue"];
    type Plan = Plan;

    fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    fn plan(random: &mut StdRng, number: usize) -> Plan {
        Plan::new(random, number)
    }

    async fn run(&self, case: &Case, plan: &Plan) -> Verdict {
        let mut sensor = self.sensor(case).await;
        self.proxy.disturb(&plan.rules(case)).await;
        for one in &plan.moves {
            self.send(&mut sensor, *one).await?;
        }
        let mut told = self.drift(&mut sensor, plan.drift).await?;
        self.kept(&sensor).await?;
        // Far longer than the cool-down: nothing more is asked for.
        told += self.told_within(&mut sensor, Duration::from_secs(20)).await?;
        let device = sensor.name().to_owned();
        let traces = Traces { device, known: sensor.known, plain: sensor.plain, told };
        self.traces.lock().await.insert(case.number, traces);
        Ok(())
    }

    fn disturbances(plan: &Plan) -> &[Disturbance] {
        &plan.disturbances
    }

    fn dead_letters(plan: &Plan) -> Vec<&'static str> {
        let error = |one: &Move| match one {
            // What could not be read comes again as it was.
            Move::Again(place) => error_at(&plan.moves, *place),
            one => error_of(*one),
        };
        plan.moves.iter().filter_map(error).collect()
    }

    async fn audit(&self, cases: &[(Case, Plan)]) -> BTreeMap<usize, Failure> {
        let traces = self.traces.lock().await;
        let mut failures = BTreeMap::new();
        // What is still on its way must come: metrics of a batch that has died, or what people are told.
        for _ in 0..10 {
            let (history, alarms) = (self.history().await, self.alarms().await);
            failures.clear();
            for (case, plan) in cases {
                let Some(traces) = traces.get(&case.number) else { continue };
                let history = history.get(&traces.device).map_or(&[][..], Vec::as_slice);
                if let Err(failure) = self.look_back(plan, traces, history, &alarms).await {
                    failures.insert(case.number, failure);
                }
            }
            if failures.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        failures
    }
}

/// What is put aside of the message of that place.
fn error_at(moves: &[Move], place: usize) -> Option<&'static str> {
    match moves[place] {
        Move::Again(earlier) => error_at(moves, earlier),
        one => error_of(one),
    }
}
