//! Firmware upgrades: one device and one job a case.

use crate::disturbance::{Disturbance, Point};
use crate::harness::{Case, Executions, Failure, Verdict, Workflow, eventually, same, within};
use aws_sdk_iot::types::JobExecutionStatus::{self, Canceled, Failed, Succeeded, TimedOut};
use aws_sdk_sfn::types::ExecutionStatus;
use device_simulator::provision::ProtocolMix;
use device_simulator::{CutPoint, DeviceSpec, Fault, FaultTiming, Faults, FleetOptions};
use protocol::{Command, DeviceFailure, OperationId, ProtocolName, Publication, ReplyTo, Step, StepOutcome, ThingName};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use tests::{Cloud, Ended, Image, Proxy, ScriptedDevice, saw};

const FROM: &str = "1.0.0";
const TO: &str = "2.0.0";
const STEPS: [Step; 4] =
    [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted];

/// The calls of an upgrade that are about its device.
const POINTS: &[Point] = &[
    (None, "iot.DescribeThing"),
    (None, "iot.UpdateThing"),
    (None, "sns.Publish"),
    (None, "lambda.Invoke"),
    (Some("StartWorkflow"), "states.StartExecution"),
    (Some("CreateJob"), "iot.PUT /jobs"),
    (Some("TrackPresence"), "dynamodb.GetItem"),
    (Some("TrackPresence"), "dynamodb.UpdateItem"),
    (Some("TrackPresence"), "states.SendTaskSuccess"),
    (Some("AwaitDevice"), "dynamodb.UpdateItem"),
    (Some("AwaitDevice"), "states.SendTaskSuccess"),
    (Some("PublishToDevice"), "dynamodb.UpdateItem"),
    (Some("PublishToDevice"), "iotdata.Publish"),
    (Some("PublishToDevice"), "states.SendTaskSuccess"),
    (Some("StoreTaskToken"), "dynamodb.UpdateItem"),
    (Some("StoreTaskToken"), "states.SendTaskSuccess"),
    (Some("HandleDeviceResponse"), "dynamodb.UpdateItem"),
    (Some("HandleDeviceResponse"), "states.SendTaskSuccess"),
    (Some("HandleDeviceResponse"), "states.SendTaskFailure"),
    (Some("HandleDeviceResponse"), "iotdata.Publish"),
    (Some("UpdateJob"), "iot-jobs-data.UpdateJobExecution"),
    (Some("StopWorkflow"), "dynamodb.UpdateItem"),
    (Some("StopWorkflow"), "states.SendTaskFailure"),
];

/// The faults of the device matrix, and how an upgrade ends with them.
const DEVICE_FAULTS: &[(Fault, JobExecutionStatus, &str)] = &[
    (Fault::Download, Failed, "TransferFailed"),
    (Fault::Checksum, Failed, "InstallFailed"),
    (Fault::Boot, Failed, "ActivationFailed"),
    (Fault::MalformedBoot, Failed, "ActivationFailed"),
    (Fault::Refuse, Failed, "DownloadRefused"),
    (Fault::WrongVersion, Failed, "VersionMismatch"),
    (Fault::Mute, TimedOut, "DeviceTimedOut"),
    (Fault::Slow, Succeeded, "Upgraded"),
    (Fault::Duplicate, Succeeded, "Upgraded"),
    (Fault::Delay, Succeeded, "Upgraded"),
    (Fault::Offline, Succeeded, "Upgraded"),
    (Fault::Reorder(Step::FirmwareTransferred), Succeeded, "Upgraded"),
    (Fault::PowerCut(CutPoint::Started), Succeeded, "Upgraded"),
    (Fault::PowerCut(CutPoint::Downloading), Succeeded, "Upgraded"),
    (Fault::PowerCut(CutPoint::Transferred), Succeeded, "Upgraded"),
    (Fault::PowerCut(CutPoint::Installed), Succeeded, "Upgraded"),
    (Fault::PowerCut(CutPoint::Activated), Succeeded, "Upgraded"),
];

/// What a scripted device does, in its order and without waiting for anything.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Move {
    /// Says that the step has succeeded.
    Report(Step),
    /// Says that it has failed.
    Fail(Step),
    /// Says that another operation's reboot has succeeded, with another version.
    WrongOperation,
    /// Another device says that this operation has failed.
    WrongDevice,
    /// Says something that nobody can read.
    Malformed,
    /// Says more than a message may hold.
    Oversized,
}

/// What a device does.
#[derive(Debug, Clone)]
enum Behaviour {
    /// The simulator's, with a fault or none.
    Simulated(Option<(Fault, JobExecutionStatus, &'static str)>),
    /// The simulator's; before the job comes the broker tells of older connections (with their version numbers, which may be equal,
    /// or begin anew), and the power goes and comes so often.
    Flapping { stale: Vec<(&'static str, i64)>, times: u32 },
    /// It says that so many steps have succeeded; then an operator cancels its job execution.
    Cancelled { after: usize },
    /// Just these messages; the last ones only when the workflow has ended.
    Scripted { moves: Vec<Move>, late: Vec<Step> },
}

/// A case of an upgrade.
pub(crate) struct Plan {
    protocol: ProtocolName,
    behaviour: Behaviour,
    disturbances: Vec<Disturbance>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {:?}", self.protocol, self.behaviour)?;
        self.disturbances.iter().try_for_each(|disturbance| write!(f, "; {disturbance}"))
    }
}

impl Plan {
    /// By turns from each matrix, and every sixth from all together.
    fn new(random: &mut StdRng, number: usize) -> Self {
        let protocol = *[ProtocolName::Json, ProtocolName::Usp].choose(random).unwrap();
        let (behaviour, disturbances) = match number % 6 {
            0 if (number / 6).is_multiple_of(5) => (Behaviour::Cancelled { after: random.random_range(0..3) }, vec![]),
            0 => (scripted(random), vec![]),
            1 => {
                let kill = Disturbance::kill_in_turn(random, POINTS, number / 6);
                (kill.point().map_or(Behaviour::Simulated(None), reaching), vec![kill])
            }
            2 => (Behaviour::Simulated(None), vec![Disturbance::fail(random, POINTS)]),
            3 => (flapping(random), vec![]),
            4 => (faulty(random), vec![]),
            _ => {
                let behaviour = match random.random_range(0..7) {
                    0 | 1 => scripted(random),
                    2 | 3 => flapping(random),
                    4 => Behaviour::Cancelled { after: random.random_range(0..3) },
                    _ => faulty(random),
                };
                (behaviour, vec![Disturbance::kill(random, POINTS), Disturbance::refuse(random, POINTS)])
            }
        };
        Self { protocol, behaviour, disturbances }
    }

    /// How the job execution must end.
    fn end(&self) -> Ended {
        match &self.behaviour {
            Behaviour::Simulated(Some((_, status, reason))) => Ended::new(status.clone(), reason),
            Behaviour::Simulated(None) | Behaviour::Flapping { .. } => Ended::new(Succeeded, "Upgraded"),
            Behaviour::Scripted { moves, .. } => end_of(moves),
            Behaviour::Cancelled { .. } => Ended::new(Canceled, ""),
        }
    }
}

/// What a device does when that call is made.
fn reaching((function, operation): Point) -> Behaviour {
    let with = |fault: Fault| DEVICE_FAULTS.iter().find(|(known, ..)| *known == fault).cloned();
    match (function, operation) {
        (Some("StopWorkflow"), _) => Behaviour::Cancelled { after: 1 },
        (Some("TrackPresence"), "states.SendTaskSuccess") => Behaviour::Simulated(with(Fault::Offline)),
        (_, "states.SendTaskFailure") => Behaviour::Simulated(with(Fault::Boot)),
        _ => Behaviour::Simulated(None),
    }
}

fn faulty(random: &mut StdRng) -> Behaviour {
    Behaviour::Simulated(DEVICE_FAULTS.choose(random).cloned())
}

fn flapping(random: &mut StdRng) -> Behaviour {
    let kinds = ["connected", "disconnected"];
    let stale = (0..random.random_range(0..4)).map(|_| (*kinds.choose(random).unwrap(), random.random_range(0..3)));
    let stale = stale.collect();
    Behaviour::Flapping { stale, times: random.random_range(0..4) }
}

fn scripted(random: &mut StdRng) -> Behaviour {
    let mut moves: Vec<Move> = STEPS.into_iter().map(Move::Report).collect();
    let mut late = Vec::new();
    let place = |random: &mut StdRng, moves: &Vec<Move>| random.random_range(0..=moves.len());
    for _ in 0..random.random_range(1..=3) {
        match random.random_range(0..8) {
            0 => {
                let step = *STEPS.choose(random).unwrap();
                moves.retain(|other| *other != Move::Report(step));
                late.push(step);
            }
            1 => {
                // What has failed goes no further, and has not been said to have succeeded: of two answers the first one to arrive counts.
                let at = random.random_range(0..moves.len());
                if let Move::Report(step) = moves[at] {
                    moves.truncate(at);
                    moves.retain(|other| *other != Move::Report(step));
                    moves.push(Move::Fail(step));
                }
            }
            2 => moves.shuffle(random),
            3 => moves.insert(place(random, &moves), Move::WrongOperation),
            4 => moves.insert(place(random, &moves), Move::WrongDevice),
            5 => moves.insert(place(random, &moves), Move::Malformed),
            6 => moves.insert(place(random, &moves), Move::Oversized),
            _ => {
                if let Some(again) = moves.choose(random).cloned() {
                    moves.insert(place(random, &moves), again);
                }
            }
        }
    }
    Behaviour::Scripted { moves, late }
}

/// A failure ends the operation, whatever else has been said; without one, each step must have been reported.
fn end_of(moves: &[Move]) -> Ended {
    let failed = moves.iter().find_map(|one| if let Move::Fail(step) = one { Some(*step) } else { None });
    match failed {
        Some(Step::DownloadStarted) => Ended::new(Failed, "DownloadRefused"),
        Some(Step::FirmwareTransferred) => Ended::new(Failed, "TransferFailed"),
        Some(Step::DownloadOperationDone) => Ended::new(Failed, "InstallFailed"),
        Some(_) => Ended::new(Failed, "ActivationFailed"),
        None if STEPS.into_iter().all(|step| moves.contains(&Move::Report(step))) => Ended::new(Succeeded, "Upgraded"),
        None => Ended::new(TimedOut, "DeviceTimedOut"),
    }
}

/// The workflow on the deployed stack.
pub(crate) struct FirmwareUpgrade {
    cloud: Cloud,
    proxy: Proxy,
    image: Image,
    executions: Executions,
}

impl FirmwareUpgrade {
    /// Reaches the stack, with an image in its bucket.
    pub(crate) async fn connect() -> Self {
        let cloud = Cloud::connect().await;
        let image = cloud.upload(TO, 100_000).await;
        let executions = Executions::of(&cloud, "FirmwareUpgradeArn");
        Self { cloud, proxy: Proxy::from_environment(), image, executions }
    }

    /// Creates the case's job, and asks again if that failed, as an operator does: the id makes it one job.
    async fn create_job(&self, case: &Case, target: &str) -> Result<String, Failure> {
        let payload = json!({
            "jobId": case.name, "firmwareVersion": TO, "upgradeTrigger": "chaos", "targetArn": target,
            "artifact": self.image.artifact,
        });
        let created = eventually("the job is created", || async { self.cloud.invoke_create_job(&payload).await.ok() });
        created.await.map(|_| case.name.clone())
    }

    /// The broker tells of connections before the last one: nothing may come of it.
    async fn tell_of_older_connections(&self, thing: &ThingName, stale: &[(&str, i64)]) {
        for (place, (kind, version)) in stale.iter().enumerate() {
            let topic = format!("$aws/events/presence/{kind}/{thing}");
            let event = json!({
                "clientId": thing, "timestamp": place + 1, "eventType": kind, "sessionIdentifier": format!("older-{place}"),
                "principalIdentifier": "p", "ipAddress": "127.0.0.1", "versionNumber": version,
            });
            self.cloud.deliver("PresenceQueue", &topic, &event).await;
        }
    }

    /// Runs a device of the simulator until its job execution has ended: the version that it runs then.
    async fn simulate(
        &self,
        case: &Case,
        spec: DeviceSpec,
        target: &str,
        behaviour: &Behaviour,
    ) -> Result<(String, Ended), Failure> {
        let thing = spec.thing.clone();
        let stale: &[(&str, i64)] = if let Behaviour::Flapping { stale, .. } = behaviour { stale } else { &[] };
        self.tell_of_older_connections(&thing, stale).await;
        let quick = |options: &mut FleetOptions| {
            options.fault_timing = FaultTiming { delay: Duration::from_secs(2), ..FaultTiming::default() };
        };
        let fleet = Cloud::run_with(vec![spec], 1, quick).await;
        let job = self.create_job(case, target).await?;
        if let Behaviour::Flapping { times, .. } = behaviour {
            for _ in 0..*times {
                fleet.power_off(&thing).await;
                fleet.power_on(&thing);
                // A minute at most: a device may be held up by what disturbs it.
                let connected = || async {
                    let phases = fleet.phases();
                    saw(format!("devices by their phase: {phases:?}"));
                    (phases[0] == 0).then_some(())
                };
                let _ = within(Duration::from_mins(1), "it connects", connected).await;
            }
        }
        let ended = self.ended(&job, &thing).await?;
        let version = fleet.version(&thing).unwrap_or_default();
        fleet.stop().await;
        Ok((version, ended))
    }

    /// Lets a device say what its script says: the version that it would run, and how its job execution has ended.
    async fn play(
        &self,
        case: &Case,
        spec: &DeviceSpec,
        target: &str,
        moves: &[Move],
        late: &[Step],
    ) -> Result<(String, Ended), Failure> {
        let mut device = ScriptedDevice::connect(spec).await;
        let job = self.create_job(case, target).await?;
        let (operation, reply_to) = device.download().await;
        let thing = device.thing.clone();
        for one in moves {
            self.play_one(&device, &operation, &reply_to, one).await;
        }
        let ended = self.ended(&job, &thing).await?;
        // What ends an upgrade otherwise than well is an answer to every step.
        let own = usize::from(ended.status != Succeeded);
        let said = |step| moves.iter().filter(|one| **one == Move::Report(step) || **one == Move::Fail(step)).count();
        let before = self.heard(&thing, &operation, |step| said(step) + own).await?;
        for step in late {
            device.succeed(&operation, &reply_to, *step, TO).await;
        }
        let after = |step| late.iter().filter(|other| **other == step).count();
        self.heard(&thing, &operation, |step| before[&step] + after(step)).await?;
        let rebooted = moves.contains(&Move::Report(Step::DeviceRebooted));
        Ok((if rebooted { TO } else { FROM }.to_owned(), ended))
    }

    /// Lets a device come so far, cancels its job execution, and waits until it is told to stop.
    async fn cancel(
        &self,
        case: &Case,
        spec: &DeviceSpec,
        target: &str,
        after: usize,
    ) -> Result<(String, Ended), Failure> {
        let mut device = ScriptedDevice::connect(spec).await;
        let job = self.create_job(case, target).await?;
        let (operation, reply_to) = device.download().await;
        for step in &STEPS[..after] {
            device.succeed(&operation, &reply_to, *step, TO).await;
        }
        let cancelled = eventually("the job execution is cancelled", || async {
            let cancel = self.cloud.iot.cancel_job_execution().job_id(&job).thing_name(spec.thing.as_str()).force(true);
            cancel.send().await.map_err(|error| saw(format!("{:?}", error.into_service_error()))).ok()
        });
        cancelled.await?;
        loop {
            // What has no answer is sent again.
            match device.command().await.command {
                Command::Download { .. } => {}
                Command::CancelDownload { operation_id } => {
                    same("the operation that is cancelled", &operation_id, &operation)?;
                    break;
                }
            }
        }
        Ok((FROM.to_owned(), self.ended(&job, &spec.thing).await?))
    }

    async fn play_one(&self, device: &ScriptedDevice, operation: &OperationId, reply_to: &ReplyTo, one: &Move) {
        let failure = || StepOutcome::Failed(DeviceFailure { code: "7000".into(), message: "chaos".into() });
        let sample = device.encoding().encode_boot(&device.thing, FROM, 0);
        match one {
            Move::Report(step) => device.succeed(operation, reply_to, *step, TO).await,
            Move::Fail(step) => device.answer(operation, reply_to, *step, failure()).await,
            Move::WrongOperation => {
                let wrong = "nobody-asked-1".parse().unwrap();
                device.succeed(&wrong, reply_to, Step::DeviceRebooted, "9.9.9").await;
            }
            Move::WrongDevice => {
                // What another device says is on its own topics: the broker lets it on no others.
                let topic = sample.topic.replace(device.thing.as_str(), "somebody-else");
                let response = protocol::Response {
                    operation_id: operation.clone(),
                    step: Step::FirmwareTransferred,
                    outcome: failure(),
                };
                let other: ThingName = "somebody-else".parse().unwrap();
                let message = device.encoding().encode_response(&other, &response, reply_to, 0).unwrap();
                let publish = self.cloud.mqtt.publish().topic(topic).qos(1);
                publish.payload(aws_sdk_iotdataplane::primitives::Blob::new(message.payload)).send().await.unwrap();
            }
            Move::Malformed => {
                let payload = format!("malformed {}", device.thing).into_bytes();
                device.publish(Publication { topic: sample.topic, payload }).await;
            }
            Move::Oversized => {
                let payload = vec![b'x'; protocol::MAX_PAYLOAD_BYTES + 1];
                device.publish(Publication { topic: sample.topic, payload }).await;
            }
        }
    }

    /// Every message has been heard: each step's item counts at least so many answers. How many it counts.
    async fn heard(
        &self,
        thing: &ThingName,
        operation: &OperationId,
        expected: impl Fn(Step) -> usize,
    ) -> Result<BTreeMap<Step, usize>, Failure> {
        let mut heard = BTreeMap::new();
        for step in STEPS {
            let expected = expected(step);
            let what = format!("{expected} answers to {} are heard", step.name());
            let arrivals = eventually(&what, || async {
                let meeting = tests::meeting(&self.cloud, thing, operation, step).await.unwrap_or_default();
                let arrivals = usize::try_from(meeting.arrivals).unwrap_or_default();
                (arrivals >= expected).then_some(arrivals)
            });
            heard.insert(step, arrivals.await.map_err(Failure::lost)?);
        }
        Ok(heard)
    }

    async fn ended(&self, job: &str, thing: &ThingName) -> Result<Ended, Failure> {
        let job_execution = eventually("the job execution ends", || async {
            let (status, mut details) = self.cloud.job_execution(job, thing).await?;
            let open = matches!(status, JobExecutionStatus::Queued | JobExecutionStatus::InProgress);
            (!open).then(|| Ended { status, reason: details.remove("reason").unwrap_or_default() })
        });
        job_execution.await
    }
}

impl Workflow for FirmwareUpgrade {
    const NAME: &'static str = "firmware";
    const QUEUES: &'static [&'static str] = &[
        "JobNotificationsQueue",
        "JobExecutionsQueue",
        "PresenceQueue",
        "DeviceResponsesQueue",
        "WorkflowReportsQueue",
    ];
    type Plan = Plan;

    fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    fn plan(random: &mut StdRng, number: usize) -> Plan {
        Plan::new(random, number)
    }

    async fn run(&self, case: &Case, plan: &Plan) -> Verdict {
        let (target, mut devices) = self.cloud.provision(&case.name, 1, ProtocolMix::All(plan.protocol)).await;
        let mut spec = devices.remove(0);
        let thing = spec.thing.clone();
        let rules: Vec<_> = plan.disturbances.iter().map(|one| one.rule(&case.name)).collect();
        self.proxy.disturb(&rules).await;
        let (runs, ended) = match &plan.behaviour {
            Behaviour::Scripted { moves, late } => self.play(case, &spec, &target, moves, late).await?,
            Behaviour::Cancelled { after } => self.cancel(case, &spec, &target, *after).await?,
            behaviour => {
                if let Behaviour::Simulated(Some((fault, _, _))) = behaviour {
                    spec.faults = Faults(vec![*fault]);
                }
                self.simulate(case, spec, &target, behaviour).await?
            }
        };
        same("the job execution", &ended, &plan.end())?;
        // Success only if the device runs the target version, and then the registry has it. A boot that came too late for success is
        // known as well, unless the download has failed on the device.
        let is_failed_download =
            ["DownloadRefused", "TransferFailed", "InstallFailed"].contains(&ended.reason.as_str());
        let is_late = ended.status != Succeeded && !is_failed_download;
        // A success is reported first.
        let recorded = tests::eventually("the version is recorded", || async {
            let recorded = self.cloud.attribute(&thing, "firmwareVersion").await.unwrap_or_default();
            (ended.status != Succeeded || recorded == TO).then_some(recorded)
        })
        .await;
        let version = if ended.status == Succeeded || (is_late && recorded == TO) { TO } else { FROM };
        same("the version in the registry", &recorded.as_str(), &version)?;
        if ended.status == Succeeded { same("the version on the device", &runs.as_str(), &TO) } else { Ok(()) }
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

    /// One execution a device and job, and its end is its job execution's.
    async fn audit(&self, cases: &[(Case, Plan)]) -> BTreeMap<usize, Failure> {
        let mut failures = BTreeMap::new();
        for (case, plan) in cases {
            let ended = match eventually("its executions end", || self.executions.ended(&self.cloud, &case.name)).await
            {
                Ok(ended) => ended,
                Err(failure) => {
                    failures.insert(case.number, failure);
                    continue;
                }
            };
            let found: Vec<_> = ended.into_iter().map(|one| one.status).collect();
            let succeeded = plan.end().status == Succeeded;
            let expected = if succeeded { ExecutionStatus::Succeeded } else { ExecutionStatus::Failed };
            if let Err(failure) = same("the executions", &found, &vec![expected]) {
                failures.insert(case.number, failure);
            }
        }
        failures
    }
}
