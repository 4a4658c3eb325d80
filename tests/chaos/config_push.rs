//! Configuration pushes: one device with a profile of its own a case.

use crate::disturbance::{Disturbance, Point};
use crate::harness::{Case, Ended, Executions, Failure, Verdict, Workflow, eventually, same};
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sfn::types::ExecutionStatus;
use device_simulator::{DeviceSpec, Fault, FaultTiming, Faults, FleetOptions};
use protocol::settings::{SettingCommand, SettingOutcome, Settings, response_topic};
use protocol::{Publication, SettingName, ThingName};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;
use tests::{Cloud, MqttDevice, Proxy, saw};

/// The calls of a push that are about its device.
const POINTS: &[Point] = &[
    (None, "lambda.Invoke"),
    (None, "sqs.SendMessage"),
    (Some("TrackPresence"), "dynamodb.GetItem"),
    (Some("TrackPresence"), "dynamodb.UpdateItem"),
    (Some("TrackPresence"), "sqs.SendMessage"),
    (Some("StartWorkflow"), "iot.DescribeThing"),
    (Some("StartWorkflow"), "states.StartExecution"),
    (Some("GetDeviceSettings"), "dynamodb.GetItem"),
    (Some("GetDeviceSettings"), "dynamodb.UpdateItem"),
    (Some("GetDeviceSettings"), "states.SendTaskSuccess"),
    (Some("PublishToDevice"), "dynamodb.UpdateItem"),
    (Some("PublishToDevice"), "iotdata.Publish"),
    (Some("HandleDeviceResponse"), "dynamodb.GetItem"),
    (Some("HandleDeviceResponse"), "dynamodb.UpdateItem"),
    (Some("HandleDeviceResponse"), "states.SendTaskSuccess"),
    (Some("HandleDeviceResponse"), "states.SendTaskFailure"),
];

/// The faults of the device matrix, and how each of its sessions' pushes ends; the last one's is the device's.
const DEVICE_FAULTS: &[(Fault, &[&str])] = &[
    (Fault::Refuse, &["SettingFailed"]),
    (Fault::Mute, &["DeviceTimedOut"]),
    (Fault::WrongOperation, &["DeviceTimedOut"]),
    (Fault::Duplicate, &["SUCCESS"]),
    (Fault::Delay, &["SUCCESS"]),
    (Fault::Offline, &["SUCCESS"]),
    (Fault::Disconnect, &["SUPERSEDED", "SUCCESS"]),
];

/// How the push of a session may end that a device leaves when it pleases.
const FLAPPING_ENDS: [&str; 4] = ["SUCCESS", "UNCHANGED", "SUPERSEDED", "DeviceTimedOut"];

/// What a scripted device says once it has its commands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Move {
    /// It has done what the command of that place says.
    Confirm(usize),
    /// It could not.
    Fail(usize),
    WrongOperation,
    /// Another device says that it could not.
    WrongDevice,
    Malformed,
    Oversized,
}

#[derive(Debug, Clone)]
enum Behaviour {
    /// The simulator's, with a fault or none.
    Simulated(Option<(Fault, &'static [&'static str])>),
    /// The simulator's; it goes and comes so often, and each of its connections is told of so many times more.
    Flapping { times: u32, repeats: u32 },
    /// Just these messages; the last ones only when the push has ended.
    Scripted { moves: Vec<Move>, late: Vec<usize> },
}

/// A case of a push.
pub(crate) struct Plan {
    settings: Value,
    behaviour: Behaviour,
    disturbances: Vec<Disturbance>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {:?}", self.settings, self.behaviour)?;
        self.disturbances.iter().try_for_each(|disturbance| write!(f, "; {disturbance}"))
    }
}

impl Plan {
    fn new(random: &mut StdRng, number: usize) -> Self {
        let all = [
            json!({"SET_TEMP": 20.5}),
            json!({"SET_TEMP": 18.5, "SET_MODE": "ECO"}),
            json!({"SET_TEMP": 22.5, "SET_MODE": "ECO", "SET_CHILD_LOCK": true}),
        ];
        let settings = all.choose(random).unwrap().clone();
        let count = settings.as_object().map_or(0, serde_json::Map::len);
        let honest = || Behaviour::Simulated(None);
        let (behaviour, disturbances) = match number % 6 {
            0 => (scripted(random, count), vec![]),
            1 => {
                let kill = Disturbance::kill_in_turn(random, POINTS, number / 6);
                let fails = kill.point().is_some_and(|(_, operation)| operation == "states.SendTaskFailure");
                (Behaviour::Simulated(fails.then_some(DEVICE_FAULTS[0])), vec![kill])
            }
            2 => (honest(), vec![Disturbance::fail(random, POINTS)]),
            3 => (flapping(random), vec![]),
            4 => (Behaviour::Simulated(DEVICE_FAULTS.choose(random).copied()), vec![]),
            _ => {
                let behaviour = if random.random() { scripted(random, count) } else { flapping(random) };
                (behaviour, vec![Disturbance::kill(random, POINTS), Disturbance::refuse(random, POINTS)])
            }
        };
        Self { settings, behaviour, disturbances }
    }

    fn wanted(&self) -> Settings {
        serde_json::from_value(self.settings.clone()).unwrap()
    }

    /// How the push of each session must end; none if that depends on how quick the next one is.
    fn ends(&self) -> Option<Vec<&'static str>> {
        match &self.behaviour {
            Behaviour::Simulated(fault) => Some(fault.map_or_else(|| vec!["SUCCESS"], |(_, ends)| ends.to_vec())),
            Behaviour::Flapping { .. } => None,
            Behaviour::Scripted { moves, .. } => Some(vec![end_of(moves, self.wanted().len())]),
        }
    }
}

fn flapping(random: &mut StdRng) -> Behaviour {
    Behaviour::Flapping { times: random.random_range(0..4), repeats: random.random_range(0..3) }
}

fn scripted(random: &mut StdRng, count: usize) -> Behaviour {
    let mut moves: Vec<Move> = (0..count).map(Move::Confirm).collect();
    let mut late = Vec::new();
    for _ in 0..random.random_range(1..=3) {
        let place = random.random_range(0..=moves.len());
        let setting = random.random_range(0..count);
        match random.random_range(0..8) {
            0 => {
                moves.retain(|other| *other != Move::Confirm(setting) && *other != Move::Fail(setting));
                late.push(setting);
            }
            1 => {
                for other in &mut moves {
                    if *other == Move::Confirm(setting) {
                        *other = Move::Fail(setting);
                    }
                }
            }
            2 => moves.reverse(),
            3 => moves.insert(place, Move::WrongOperation),
            4 => moves.insert(place, Move::WrongDevice),
            5 => moves.insert(place, Move::Malformed),
            6 => moves.insert(place, Move::Oversized),
            _ => {
                if let Some(again) = moves.choose(random).cloned() {
                    moves.insert(place, again);
                }
            }
        }
    }
    Behaviour::Scripted { moves, late }
}

/// Without an answer to each setting the device has timed out; with one to each, they must all be good.
fn end_of(moves: &[Move], count: usize) -> &'static str {
    let failed = |setting| moves.contains(&Move::Fail(setting));
    if (0..count).any(|setting| !failed(setting) && !moves.contains(&Move::Confirm(setting))) {
        "DeviceTimedOut"
    } else if (0..count).any(failed) {
        "SettingFailed"
    } else {
        "SUCCESS"
    }
}

/// The workflow on the deployed stack.
pub(crate) struct ConfigPush {
    cloud: Cloud,
    proxy: Proxy,
    executions: Executions,
}

impl ConfigPush {
    pub(crate) async fn connect() -> Self {
        let cloud = Cloud::connect().await;
        let executions = Executions::of(&cloud, "ConfigPushArn");
        Self { cloud, proxy: Proxy::from_environment(), executions }
    }

    /// Waits until all pushes have ended, with that of the session in which the device is now.
    async fn pushes(&self, case: &Case, thing: &ThingName) -> Result<Vec<Ended>, Failure> {
        eventually("the last session's push ends", || async {
            let now = self.presence(thing, true).await?;
            let ended = self.executions.ended(&self.cloud, &case.name).await?;
            let last = ended.last()?.input["connectedAt"].to_string();
            saw(format!("the last push is of the session since {last}"));
            (now.get("timestamp")?.as_n() == Ok(&last)).then_some(ended)
        })
        .await
    }

    /// What is known of the device, if it is on- or offline.
    async fn presence(&self, thing: &ThingName, connected: bool) -> Option<HashMap<String, AttributeValue>> {
        let get = self.cloud.dynamodb.get_item().table_name(self.cloud.output("ConnectionsTableName"));
        let got = get.key("thing", AttributeValue::S(thing.to_string())).send().await;
        let item = got.map_err(|error| saw(format!("{:?}", error.into_service_error()))).ok()?.item;
        saw(format!("the presence of {thing}: {item:?}"));
        let item = item?;
        (item.get("connected")?.as_bool() == Ok(&connected)).then_some(item)
    }

    async fn simulate(&self, case: &Case, spec: DeviceSpec, plan: &Plan) -> Verdict {
        let thing = spec.thing.clone();
        let quick = |options: &mut FleetOptions| {
            let (delay, offline_for) = (Duration::from_secs(2), Duration::from_secs(3));
            options.fault_timing = FaultTiming { delay, offline_for, ..FaultTiming::default() };
        };
        let fleet = Cloud::run_with(vec![spec], 0, quick).await;
        if let Behaviour::Flapping { times, repeats } = plan.behaviour {
            self.connected(&thing, true, repeats).await?;
            for _ in 0..times {
                fleet.power_off(&thing).await;
                self.connected(&thing, false, repeats).await?;
                fleet.power_on(&thing);
                self.connected(&thing, true, repeats).await?;
            }
        }
        let pushes = self.pushes(case, &thing).await?;
        let has = fleet.settings(&thing);
        fleet.stop().await;
        let last = end(pushes.last());
        if matches!(last, "SUCCESS" | "UNCHANGED") {
            same("the settings on the device", &has, &plan.wanted())?;
            same("the settings that are known", &self.cloud.confirmed(&thing).await, &plan.wanted())?;
        }
        if plan.ends().is_none() {
            same("the end of the last push", &matches!(last, "SUCCESS" | "UNCHANGED"), &true)?;
        }
        Ok(())
    }

    /// Waits until the device is known to be on- or offline; then the broker's word on it is repeated.
    async fn connected(&self, thing: &ThingName, connected: bool, repeats: u32) -> Verdict {
        let item = eventually("the presence is known", || self.presence(thing, connected)).await?;
        let kind = if connected { "connected" } else { "disconnected" };
        let topic = format!("$aws/events/presence/{kind}/{thing}");
        for _ in 0..repeats {
            self.cloud.deliver("PresenceQueue", &topic, &event(thing, kind, &item)).await;
        }
        Ok(())
    }

    async fn play(&self, case: &Case, spec: &DeviceSpec, moves: &[Move], late: &[usize], count: usize) -> Verdict {
        let mut device = MqttDevice::listening(spec).await;
        let mut commands: Vec<SettingCommand> = Vec::new();
        while commands.len() < count {
            let command = device.setting().await;
            // What has no answer is sent again.
            if !commands.contains(&command) {
                commands.push(command);
            }
        }
        commands.sort_by(|a, b| a.name.cmp(&b.name));
        for one in moves {
            self.play_one(&device, &commands, one).await;
        }
        self.pushes(case, &spec.thing).await?;
        for setting in late {
            device.confirm(&commands[*setting]).await;
        }
        // What has come late is known for the next session.
        let confirmed =
            moves.iter().filter_map(|one| if let Move::Confirm(setting) = one { Some(*setting) } else { None });
        let confirmed: Vec<usize> = confirmed.chain(late.iter().copied()).collect();
        let known = |setting: &usize| (commands[*setting].name.clone(), commands[*setting].value.clone());
        let failed = |setting: &usize| moves.contains(&Move::Fail(*setting));
        let expected: Settings = confirmed.iter().filter(|setting| !failed(setting)).map(known).collect();
        eventually(&format!("all of {expected:?} is known"), || async {
            let confirmed = self.cloud.confirmed(&device.thing).await;
            expected.iter().all(|(name, value)| confirmed.get(name) == Some(value)).then_some(())
        })
        .await
        .map_err(Failure::lost)
    }

    async fn play_one(&self, device: &MqttDevice, commands: &[SettingCommand], one: &Move) {
        let topic = response_topic(&device.thing);
        let fail = || SettingOutcome::Fail { error: "9".into() };
        let name: SettingName = "SET_TEMP".parse().unwrap();
        match one {
            Move::Confirm(setting) => device.confirm(&commands[*setting]).await,
            Move::Fail(setting) => {
                let command = &commands[*setting];
                device.answer(&command.operation_id, &command.name, fail()).await;
            }
            Move::WrongOperation => device.answer(&"nobody-asked.SET_TEMP".parse().unwrap(), &name, fail()).await,
            Move::WrongDevice => {
                let other: ThingName = "somebody-else".parse().unwrap();
                let response = protocol::settings::SettingResponse {
                    operation_id: commands[0].operation_id.clone(),
                    name: commands[0].name.clone(),
                    outcome: fail(),
                };
                let message = response.encode(&other, 0);
                let publish = self.cloud.mqtt.publish().topic(message.topic).qos(1);
                publish.payload(aws_sdk_iotdataplane::primitives::Blob::new(message.payload)).send().await.unwrap();
            }
            Move::Malformed => {
                let payload = format!(r#"{{"name":"SET_TEMP","operationId":"{}","status":"done"}}"#, device.thing);
                device.publish(Publication { topic, payload: payload.into_bytes() }).await;
            }
            Move::Oversized => {
                let payload = vec![b'x'; protocol::MAX_PAYLOAD_BYTES + 1];
                device.publish(Publication { topic, payload }).await;
            }
        }
    }
}

/// The status of what succeeded, the error of what failed.
fn end(push: Option<&Ended>) -> &str {
    match push {
        Some(push) if push.status == ExecutionStatus::Succeeded => push.output["status"].as_str().unwrap_or("?"),
        Some(push) => &push.error,
        None => "nothing",
    }
}

/// The broker's word on the connection that an item is about.
fn event(thing: &ThingName, kind: &str, item: &HashMap<String, AttributeValue>) -> Value {
    let text = |name: &str| item.get(name).and_then(|value| value.as_s().ok()).cloned().unwrap_or_default();
    let number =
        |name: &str| item.get(name).and_then(|value| value.as_n().ok()?.parse::<i64>().ok()).unwrap_or_default();
    json!({
        "clientId": thing, "timestamp": number("timestamp"), "eventType": kind,
        "sessionIdentifier": text("sessionIdentifier"), "principalIdentifier": "p", "ipAddress": "127.0.0.1",
        "versionNumber": number("versionNumber"),
    })
}

impl Workflow for ConfigPush {
    const NAME: &'static str = "config";
    const QUEUES: &'static [&'static str] =
        &["PresenceQueue", "SessionsQueue", "SettingsRequestsQueue", "DeviceResponsesQueue"];
    type Plan = Plan;

    fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    fn plan(random: &mut StdRng, number: usize) -> Plan {
        Plan::new(random, number)
    }

    async fn run(&self, case: &Case, plan: &Plan) -> Verdict {
        let mut spec = self.cloud.provision_with_profiles(&case.name, 1).await.remove(0);
        Cloud::wants(&spec.thing, plan.settings.clone());
        let rules: Vec<_> = plan.disturbances.iter().map(|one| one.rule(&case.name)).collect();
        self.proxy.disturb(&rules).await;
        match &plan.behaviour {
            Behaviour::Scripted { moves, late } => self.play(case, &spec, moves, late, plan.wanted().len()).await,
            behaviour => {
                if let Behaviour::Simulated(Some((fault, _))) = behaviour {
                    spec.faults = Faults(vec![*fault]);
                }
                self.simulate(case, spec, plan).await
            }
        }
    }

    fn disturbances(plan: &Plan) -> &[Disturbance] {
        &plan.disturbances
    }

    fn dead_letters(plan: &Plan) -> Vec<&'static str> {
        let Behaviour::Scripted { moves, .. } = &plan.behaviour else { return Vec::new() };
        let error = |one: &Move| match one {
            Move::Malformed => Some("MalformedMessage"),
            Move::Oversized => Some("MessageTooLarge"),
            _ => None,
        };
        moves.iter().filter_map(error).collect()
    }

    /// One push a session, and each as it must end. A connection of which the word comes when there is another one already (it was
    /// delivered again, its function had been killed) has none.
    async fn audit(&self, cases: &[(Case, Plan)]) -> BTreeMap<usize, Failure> {
        let mut failures = BTreeMap::new();
        for (case, plan) in cases {
            let pushes = match eventually("its pushes end", || self.executions.ended(&self.cloud, &case.name)).await {
                Ok(pushes) => pushes,
                Err(failure) => {
                    failures.insert(case.number, failure);
                    continue;
                }
            };
            let found: Vec<&str> = pushes.iter().map(|push| end(Some(push))).collect();
            let verdict = match (plan.ends(), &plan.behaviour) {
                (Some(ends), _) if ends.ends_with(&found) && !found.is_empty() => Ok(()),
                (Some(ends), _) => same("the pushes", &found, &ends),
                (None, Behaviour::Flapping { times, .. }) => {
                    let sessions = 1 + *times as usize;
                    let mut undefined = found.clone();
                    undefined.retain(|end| !FLAPPING_ENDS.contains(end));
                    same("the number of pushes", &found.len(), &found.len().clamp(1, sessions)).and(same(
                        "ends that no such session has",
                        &undefined,
                        &vec![],
                    ))
                }
                (None, _) => Ok(()),
            };
            let mut sessions: Vec<i64> = pushes.iter().filter_map(|push| push.input["connectedAt"].as_i64()).collect();
            sessions.sort_unstable();
            sessions.dedup();
            let verdict = verdict.and(same("the sessions that have a push", &sessions.len(), &pushes.len()));
            if let Err(failure) = verdict {
                failures.insert(case.number, failure);
            }
        }
        failures
    }
}
