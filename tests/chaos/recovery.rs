//! Recoveries of failed updates: one thing a case, which reports failures and successes.

use crate::disturbance::{Disturbance, Point};
use crate::harness::{Case, Executions, Failure, Verdict, Workflow, eventually, same};
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
const ATTEMPTS: u32 = 10;

const IMPOSTORS: usize = 8;

/// The calls of a recovery that are about its thing.
const POINTS: &[Point] = &[
    (None, "lambda.Invoke"),
    (None, "iot.AddThingToThingGroup"),
    (None, "sns.Publish"),
    (Some("StartWorkflow"), "states.StartExecution"),
    (Some("RetryCounter"), "dynamodb.UpdateItem"),
    (Some("RetryCounter"), "iot.DescribeThing"),
    (Some("RetryCounter"), "dynamodb.GetItem"),
    (Some("RetryCounter"), "dynamodb.PutItem"),
    (Some("RetryCounter"), "sqs.SendMessage"),
    (Some("RestoreAttributes"), "dynamodb.GetItem"),
    (Some("RestoreAttributes"), "dynamodb.PutItem"),
    (Some("RestoreAttributes"), "iot.DescribeThing"),
    (Some("RestoreAttributes"), "iot.UpdateThing"),
    (Some("RestoreAttributes"), "iot.RemoveThingFromThingGroup"),
    (Some("RecordSuccess"), "dynamodb.UpdateItem"),
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
            2 => vec![Disturbance::fail(random, POINTS)],
            _ => vec![Disturbance::kill(random, POINTS), Disturbance::refuse(random, POINTS)],
        };
        let point = disturbances.first().filter(|_| number % 4 == 1).and_then(Disturbance::point);
        let mut events = point.map_or_else(Vec::new, reaching);
        events.extend((0..random.random_range(1..=4)).map(|_| event(random)));
        Self { events, disturbances }
    }
}

/// What must happen so that that call is made.
fn reaching(point: Point) -> Vec<Event> {
    let failures = |count| Event::Failures { count, repeats: 0 };
    match point {
        (Some("RecordSuccess"), _) => vec![failures(3), Event::Success { times: 1 }],
        (_, "iot.RemoveThingFromThingGroup") => vec![failures(10), failures(10), Event::Release],
        (None, "iot.AddThingToThingGroup" | "sns.Publish") => vec![failures(10), failures(10)],
        (Some("RetryCounter"), operation) if operation != "sqs.SendMessage" => vec![failures(1)],
        _ => vec![failures(10)],
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
    /// How many recoveries there were then.
    recoveries: usize,
    quarantined: bool,
}

impl History {
    fn forget(&mut self, recoveries: usize) {
        self.forgotten = self.failures;
        self.recoveries = recoveries;
        self.quarantined = false;
    }
}

/// The workflow on the deployed stack.
pub(crate) struct Recovery {
    cloud: Cloud,
    proxy: Proxy,
    executions: Executions,
    /// Devices that speak for others, by turns: of one alone not so much is heard.
    impostors: Vec<MqttDevice>,
}

impl Recovery {
    pub(crate) async fn connect() -> Self {
        let cloud = Cloud::connect().await;
        let executions = Executions::of(&cloud, "FailedUpdateRecoveryArn");
        let (_, devices) = cloud.provision("impostor", IMPOSTORS, ProtocolMix::Mixed).await;
        let mut impostors = Vec::new();
        for device in &devices {
            impostors.push(MqttDevice::connect(device, true).await);
        }
        Self { cloud, proxy: Proxy::from_environment(), executions, impostors }
    }

    async fn happen(&self, case: &Case, thing: &ThingName, event: Event, history: &mut History) -> Verdict {
        match event {
            Event::Failures { count, repeats } => {
                let begin = now();
                let times = (0..count).chain((0..repeats).map(|repeat| repeat % count)).rev();
                self.cloud.fail(thing, times.map(|time| begin + i64::from(time))).await;
                history.failures += usize::try_from(count).unwrap_or_default();
                self.look_at_failures(case, thing, history).await
            }
            Event::Success { times } => {
                let begin = now();
                for _ in 0..times {
                    self.cloud.report(thing, UpdateStatus::Succeeded, begin).await;
                }
                if history.quarantined {
                    return Ok(());
                }
                history.forget(self.executions.ended(&self.cloud, &case.name).await.map_or(0, |ended| ended.len()));
                eventually("the history is forgotten", || async {
                    let device = self.cloud.recovery(thing).await;
                    (device.phase == Phase::Active && device.attempts == 0 && device.cycles == 0).then_some(())
                })
                .await
            }
            Event::Malformed => {
                let too_long = "x".repeat(801);
                let timestamp = now().to_string();
                self.say(&json!({"_id_": thing, "timestamp": timestamp, "status": "failed", "model": too_long})).await;
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
                self.impostors[case.number % IMPOSTORS].publish(report.encode()).await;
                Ok(())
            }
            Event::Release => {
                let payload = json!({"action": "release", "thingName": thing});
                let released =
                    eventually("it is released", || async { self.cloud.restore_attributes(&payload).await.ok() })
                        .await?;
                let was_known = history.failures > history.forgotten;
                history.forget(self.executions.ended(&self.cloud, &case.name).await.map_or(0, |ended| ended.len()));
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

    /// Each failure has been counted once, or ignored while the thing was held; each decision has had one execution.
    async fn look_at_failures(&self, case: &Case, thing: &ThingName, history: &mut History) -> Verdict {
        let failures = history.failures - history.forgotten;
        let counted = eventually(&format!("{failures} failures are counted"), || async {
            let device = self.cloud.recovery(thing).await;
            let counted = (device.cycles * ATTEMPTS + device.attempts) as usize;
            let ignored = device.ignored as usize;
            assert!(counted + ignored <= failures, "{counted} counted and {ignored} ignored of {failures}");
            (counted + ignored == failures).then_some(counted)
        })
        .await?;
        // Only a thing that is held ignores failures, and none is before its tenth.
        same("ignored without need", &(counted < failures && counted < ATTEMPTS as usize), &false)?;
        let expected = ["RESTORED", "QUARANTINED"].into_iter().take(counted / ATTEMPTS as usize);
        let expected: Vec<&str> = expected.collect();
        history.quarantined = expected.len() == 2;
        let ended = eventually(&format!("{} recoveries end", expected.len()), || async {
            let ended = self.executions.ended(&self.cloud, &case.name).await?;
            (ended.len() >= history.recoveries + expected.len()).then_some(ended)
        })
        .await?;
        same("the number of recoveries", &ended.len(), &(history.recoveries + expected.len()))?;
        let failed: Vec<_> = ended.iter().filter(|one| one.status != ExecutionStatus::Succeeded).collect();
        same("the recoveries that failed", &failed.len(), &0)?;
        let outcomes: Vec<&str> =
            ended[history.recoveries..].iter().filter_map(|one| one.output["outcome"].as_str()).collect();
        same("how the recoveries ended", &outcomes, &expected)
    }
}

impl Workflow for Recovery {
    const NAME: &'static str = "recovery";
    const QUEUES: &'static [&'static str] = &["FailedUpdatesQueue", "RecoveriesQueue", "SucceededUpdatesQueue"];
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

    /// Operators are told once of each quarantine, however late a failure was said again.
    async fn audit(&self, cases: &[(Case, Plan)]) -> BTreeMap<usize, Failure> {
        let told = self.told().await;
        let mut failures = BTreeMap::new();
        for (case, _) in cases {
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
            if let Err(failure) = same("the messages to the operators", &messages, &quarantines) {
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
