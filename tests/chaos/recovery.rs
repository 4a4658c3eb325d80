//! Recoveries of failed updates: one thing a case, which reports failures and successes.

use crate::disturbance::{Disturbance, Point};
use crate::harness::{Case, Ended, Executions, Failure, Verdict, Workflow, eventually, same};
use aws_sdk_iotdataplane::primitives::Blob;
use aws_sdk_sfn::types::ExecutionStatus;
use device_simulator::provision::ProtocolMix;
use fleet::recovery::Phase;
use protocol::ThingName;
use protocol::recovery::{UPDATE_REPORTS_TOPIC, UpdateReport, UpdateStatus};
use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use tests::{Cloud, MqttDevice, ORIGINAL, Proxy, now};

/// How many failures a cycle has in the tests' stack.
const ATTEMPTS: u64 = 10;

/// The calls of a recovery that are about its thing.
const POINTS: &[Point] = &[
    (None, "lambda.Invoke"),
    (None, "iot.AddThingToThingGroup"),
    (None, "sns.Publish"),
    (Some("StartWorkflow"), "iot.DescribeThing"),
    (Some("StartWorkflow"), "states.StartExecution"),
    (Some("RetryCounter"), "dynamodb.GetItem"),
    (Some("RetryCounter"), "dynamodb.PutItem"),
    (Some("RestoreAttributes"), "dynamodb.GetItem"),
    (Some("RestoreAttributes"), "dynamodb.PutItem"),
    (Some("RestoreAttributes"), "iot.DescribeThing"),
    (Some("RestoreAttributes"), "iot.UpdateThing"),
    (Some("RestoreAttributes"), "iot.RemoveThingFromThingGroup"),
    (Some("RecordSuccess"), "iot.DescribeThing"),
    (Some("RecordSuccess"), "dynamodb.GetItem"),
    (Some("RecordSuccess"), "dynamodb.PutItem"),
];

/// What happens to a thing, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// So many failures, all at once, and some of them said again.
    Failures { count: u32, repeats: u32 },
    /// An update succeeds; said as often.
    Success { times: u32 },
    /// Something that nobody can read.
    Malformed,
    /// A failure in a message that is too large.
    Oversized,
    /// A failure that another device reports.
    WrongDevice,
    /// An operator releases it, which also forgets what was counted.
    Release,
}

/// A case of a recovery.
pub(crate) struct Plan {
    events: Vec<Event>,
    disturbances: Vec<Disturbance>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.events)?;
        self.disturbances.iter().try_for_each(|disturbance| write!(f, "; {disturbance}"))
    }
}

impl Plan {
    fn new(random: &mut StdRng, number: usize) -> Self {
        let disturbances = match number % 4 {
            0 => vec![],
            1 => vec![Disturbance::kill_in_turn(random, POINTS, number / 4)],
            2 => vec![Disturbance::refuse(random, POINTS)],
            _ => vec![Disturbance::kill(random, POINTS), Disturbance::refuse(random, POINTS)],
        };
        let point = disturbances.first().filter(|_| number % 4 == 1).and_then(Disturbance::point);
        let mut events = point.map_or_else(Vec::new, reaching);
        events.extend((0..random.random_range(1..=4)).map(|_| event(random)));
        Self { events, disturbances }
    }

    /// How many failures there are in all.
    fn failures(&self) -> usize {
        let count = |event: &Event| if let Event::Failures { count, .. } = event { *count as usize } else { 0 };
        self.events.iter().map(count).sum()
    }
}

/// What must happen so that that call is made.
fn reaching(point: Point) -> Vec<Event> {
    let failures = |count| Event::Failures { count, repeats: 0 };
    match point {
        (Some("RecordSuccess"), _) => vec![failures(3), Event::Success { times: 1 }],
        (_, "iot.RemoveThingFromThingGroup") => vec![failures(10), failures(10), Event::Release],
        (Some("RestoreAttributes"), _) => vec![failures(10)],
        _ => vec![failures(1)],
    }
}

fn event(random: &mut StdRng) -> Event {
    match random.random_range(0..11) {
        0..=5 => Event::Failures { count: random.random_range(1..=12), repeats: random.random_range(0..4) },
        6 => Event::Success { times: random.random_range(1..=2) },
        7 => Event::Malformed,
        8 => Event::WrongDevice,
        9 => Event::Oversized,
        _ => Event::Release,
    }
}

/// What has been asked of the workflow since the thing's history began anew.
#[derive(Default)]
struct History {
    /// How many failures there are in all.
    failures: usize,
    /// How many of them there were when the history began.
    forgotten: usize,
    quarantined: bool,
}

/// The workflow on the deployed stack.
pub(crate) struct Recovery {
    cloud: Cloud,
    proxy: Proxy,
    executions: Executions,
    /// A device that speaks for others.
    impostor: MqttDevice,
}

impl Recovery {
    pub(crate) async fn connect() -> Self {
        let cloud = Cloud::connect().await;
        let executions = Executions::of(&cloud, "FailedUpdateRecoveryArn");
        let (_, devices) = cloud.provision("impostor", 1, ProtocolMix::Mixed).await;
        let impostor = MqttDevice::connect(&devices[0], true).await;
        Self { cloud, proxy: Proxy::from_environment(), executions, impostor }
    }

    async fn happen(&self, case: &Case, thing: &ThingName, event: Event, history: &mut History) -> Verdict {
        match event {
            Event::Failures { count, repeats } => {
                let begin = now();
                let times = (0..count).chain((0..repeats).map(|repeat| repeat % count)).rev();
                self.cloud.fail(thing, times.map(|time| begin + i64::from(time))).await;
                history.failures += usize::try_from(count).unwrap_or_default();
                self.look_at_failures(case, history).await
            }
            Event::Success { times } => {
                let begin = now();
                for _ in 0..times {
                    self.cloud.report(thing, UpdateStatus::Succeeded, begin).await;
                }
                if history.quarantined {
                    return Ok(());
                }
                history.forgotten = history.failures;
                eventually("the history is forgotten", || async {
                    let device = self.cloud.recovery(thing).await;
                    (device.phase == Phase::Active && device.attempts == 0 && device.cycles == 0).then_some(())
                })
                .await
            }
            Event::Malformed => {
                self.say(&json!({"_id_": thing, "timestamp": "x", "status": "failed"})).await;
                Ok(())
            }
            Event::Oversized => {
                let padding = "x".repeat(protocol::MAX_PAYLOAD_BYTES);
                let timestamp = now().to_string();
                self.say(&json!({"_id_": thing, "timestamp": timestamp, "status": "failed", "x": padding})).await;
                Ok(())
            }
            Event::WrongDevice => {
                let (timestamp, status) = (now(), UpdateStatus::Failed);
                let thing_name = thing.clone();
                let report = UpdateReport { thing_name, timestamp, status, model: None, firmware: None };
                self.impostor.publish(report.encode()).await;
                Ok(())
            }
            Event::Release => {
                let payload = json!({"action": "release", "thingName": thing});
                let released =
                    eventually("it is released", || async { self.cloud.restore_attributes(&payload).await.ok() })
                        .await?;
                let was_known = history.failures > history.forgotten;
                history.forgotten = history.failures;
                history.quarantined = false;
                // Asked twice, when the first answer was lost, there is nothing left to do.
                let outcome = released["outcome"].as_str().unwrap_or_default();
                let right = outcome == "NOTHING_TO_RELEASE" || (was_known && outcome == "RELEASED");
                same("the release", &right, &true)
            }
        }
    }

    async fn say(&self, report: &Value) {
        let publish = self.cloud.mqtt.publish().topic(UPDATE_REPORTS_TOPIC).qos(1);
        publish.payload(Blob::new(report.to_string().into_bytes())).send().await.expect("published");
    }

    /// Each failure has been counted once, in its turn, or ignored while the thing was held.
    async fn look_at_failures(&self, case: &Case, history: &mut History) -> Verdict {
        let ended = eventually(&format!("{} recoveries end", history.failures), || async {
            let ended = self.executions.ended(&self.cloud, &case.name).await?;
            (ended.len() >= history.failures).then_some(ended)
        })
        .await?;
        same("the number of recoveries", &ended.len(), &history.failures)?;
        let failed: Vec<_> = ended.iter().filter(|one| one.status != ExecutionStatus::Succeeded).collect();
        same("the recoveries that failed", &failed.len(), &0)?;
        let mut current: Vec<&Ended> = ended.iter().collect();
        current.sort_by_key(|one| one.input["timestamp"].as_i64());
        let current = &current[history.forgotten..];
        let mut counted: Vec<(u64, &str)> = current.iter().filter_map(|one| place(&one.output)).collect();
        counted.sort_unstable();
        let quarantine = 2 * ATTEMPTS;
        let expected: Vec<(u64, &str)> = (1..=counted.len() as u64)
            .map(|place| match place {
                ATTEMPTS => (place, "RESTORED"),
                _ if place == quarantine => (place, "QUARANTINED"),
                _ => (place, "RETRY"),
            })
            .collect();
        same("the failures that count", &counted, &expected)?;
        history.quarantined = counted.len() as u64 == quarantine;
        let outcomes = |outcome: &str| current.iter().filter(|one| one.output["outcome"] == outcome).count();
        same("the others", &outcomes("IGNORED"), &(current.len() - counted.len()))?;
        // Only a thing that is held ignores failures, and none is before its tenth.
        let may_ignore = counted.len() as u64 >= ATTEMPTS;
        same("ignored without need", &(outcomes("IGNORED") > 0 && !may_ignore), &false)
    }
}

/// Which failure it is of all that count, and what came of it; none if it does not count.
fn place(output: &Value) -> Option<(u64, &str)> {
    let attempt = output["attempt"].as_u64().filter(|attempt| *attempt > 0)?;
    let cycle = output["cycle"].as_u64()?;
    Some(((cycle - 1) * ATTEMPTS + attempt, output["outcome"].as_str()?))
}

impl Workflow for Recovery {
    const NAME: &'static str = "recovery";
    const QUEUES: &'static [&'static str] = &["FailedUpdatesQueue", "SucceededUpdatesQueue"];
    type Plan = Plan;

    fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    fn plan(random: &mut StdRng, number: usize) -> Plan {
        Plan::new(random, number)
    }

    async fn run(&self, case: &Case, plan: &Plan) -> Verdict {
        let thing = self.cloud.thing(&case.name).await;
        let rules: Vec<_> = plan.disturbances.iter().map(|one| one.rule(&case.name)).collect();
        self.proxy.disturb(&rules).await;
        let mut history = History::default();
        for event in &plan.events {
            self.happen(case, &thing, *event, &mut history).await?;
        }
        let markers = ["failedtoupdate"; 2];
        let [(_, firmware), (_, model)] = ORIGINAL;
        let expected = if history.quarantined { markers } else { [firmware, model] };
        let attributes = self.cloud.attributes(&thing).await;
        let found = ["FW", "model"].map(|name| attributes.get(name).map(String::as_str).unwrap_or_default());
        same("the attributes", &found, &expected)?;
        same("the place among the given up", &self.cloud.is_in_failed_group(&thing).await, &history.quarantined)
    }

    fn disturbances(plan: &Plan) -> &[Disturbance] {
        &plan.disturbances
    }

    fn dead_letters(plan: &Plan) -> Vec<&'static str> {
        let error = |event: &Event| match event {
            Event::Malformed => Some("MalformedMessage"),
            Event::Oversized => Some("MessageTooLarge"),
            Event::WrongDevice => Some("SenderMismatch"),
            _ => None,
        };
        plan.events.iter().filter_map(error).collect()
    }

    /// Operators are told once of each quarantine, and each failure has one execution, however late it was said again.
    async fn audit(&self, cases: &[(Case, Plan)]) -> BTreeMap<usize, Failure> {
        let told = self.told().await;
        let mut failures = BTreeMap::new();
        for (case, plan) in cases {
            let ended = match eventually("its recoveries end", || self.executions.ended(&self.cloud, &case.name)).await
            {
                Ok(ended) => ended,
                Err(failure) => {
                    failures.insert(case.number, failure);
                    continue;
                }
            };
            let quarantines = ended.iter().filter(|one| one.output["outcome"] == "QUARANTINED").count();
            let messages = told.iter().filter(|thing| thing.starts_with(&case.name)).count();
            let once = same("the recoveries", &ended.len(), &plan.failures());
            if let Err(failure) = once.and(same("the messages to the operators", &messages, &quarantines)) {
                failures.insert(case.number, failure);
            }
        }
        failures
    }
}

impl Recovery {
    /// The things that operators were told of, as often as they were.
    async fn told(&self) -> Vec<String> {
        let queue = self.cloud.output("RecoveryNotificationsQueueUrl");
        let mut told = Vec::new();
        let mut empty = 0;
        while empty < 3 {
            let receive = self.cloud.sqs.receive_message().queue_url(queue).max_number_of_messages(10);
            let received = receive.wait_time_seconds(1).send().await.expect("the queue");
            let messages = received.messages.unwrap_or_default();
            empty = if messages.is_empty() { empty + 1 } else { 0 };
            for message in messages {
                let body: Value = serde_json::from_str(message.body().unwrap_or_default()).unwrap_or_default();
                told.push(body["thingName"].as_str().unwrap_or_default().to_owned());
                let delete = self.cloud.sqs.delete_message().queue_url(queue);
                delete.receipt_handle(message.receipt_handle.unwrap_or_default()).send().await.expect("deleted");
            }
        }
        told
    }
}
