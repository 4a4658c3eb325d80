//! Jobs on premises: one job a case. Those of one tenant are for workers that are spoken by hand, and all listen through one
//! client; those of the other are for two processes of the real worker.

use crate::disturbance::{Disturbance, Point};
use crate::harness::{Case, Ended, Executions, Failure, LIMIT, Verdict, Workflow, eventually, same};
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sfn::types::ExecutionStatus;
use protocol::on_premises::{
    JobMessage, Lease, Verdict as Answer, WorkerMessage, WorkerReply, WorkerResult, answers_topic,
};
use protocol::{Publication, Tenant, WorkerName};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rumqttc::QoS;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tests::{Cloud, MqttDevice, PlainWorker, Proxy, WorkerProcess, saw};

/// Whose workers are spoken by hand, and whose are real.
const BY_HAND: &str = "tenant1";
const REAL: &str = "tenant2";

/// The calls of a job that have its execution's name in them: as a key, in a path, or in what a worker has said. A sign of life
/// is sent with a token only, and a token says nothing of its job; a dead letter is an encoded payload.
const POINTS: &[Point] = &[
    (None, "lambda.Invoke"),
    (Some("StartWorkflow"), "states.StartExecution"),
    (Some("PublishToDevice"), "dynamodb.GetItem"),
    (Some("PublishToDevice"), "dynamodb.PutItem"),
    (Some("PublishToDevice"), "s3.PutObject"),
    (Some("PublishToDevice"), "iotdata.Publish"),
    (Some("PublishToDevice"), "states.SendTaskSuccess"),
    (Some("HandleDeviceResponse"), "dynamodb.GetItem"),
    (Some("HandleDeviceResponse"), "dynamodb.PutItem"),
    (Some("HandleDeviceResponse"), "s3.PutObject"),
    (Some("HandleDeviceResponse"), "s3.HeadObject"),
    (Some("HandleDeviceResponse"), "s3.GetObject"),
    (Some("HandleDeviceResponse"), "iotdata.Publish"),
    (Some("HandleDeviceResponse"), "states.SendTaskSuccess"),
    (Some("HandleDeviceResponse"), "states.SendTaskFailure"),
];

/// Sizes of inputs: the largest does not fit into a message.
const INPUTS: [usize; 5] = [0, 0, 0, 100_000, 140_000];
/// Sizes of results: the larger ones do not fit into an output beside the largest input.
const RESULTS: [usize; 4] = [0, 0, 0, 125_000];
/// Results that fit into no message: the second fits into an output.
const UPLOADED: [usize; 2] = [300_000, 200_000];
/// What a state's data may hold, and what else is in it (see `worker_jobs.rs`).
const ROOM: usize = 256 * 1024 - 2048;

/// Exceptions, and what an execution fails with because of them.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("KeyError", "KeyError"),
    ("", "UnnamedException"),
    ("Throttled", "Worker.Throttled"),
    ("States.Timeout", "Worker.States.Timeout"),
];

/// What a plain worker says of its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// Its result.
    Result,
    /// Another result.
    OtherResult,
    /// An exception.
    Exception(usize),
    /// A sign of life.
    Heartbeat,
    /// A sign of life in a form that is none.
    WrongHeartbeat,
    /// That it could not read the job.
    NoHandle,
    /// Something that nobody can read.
    Malformed,
    /// More than a message may hold.
    Oversized,
    /// A result for what never was a job.
    UnknownHandle,
    /// A result for the job, by somebody who does not know its secret.
    WrongSecret,
    /// A result for the job, as another tenant.
    WrongTenant,
    /// A result under a lease that was never given.
    WrongLease,
}

/// Who else wants the job of a worker with a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rival {
    Nobody,
    /// The first one falls silent, and speaks when another has taken over.
    TakesOver,
    /// The first one gives the job back.
    IsGivenIt,
}

/// What the real worker is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Add,
    /// One of the terms is missing.
    AddNothing,
    /// The terms are not of the same kind.
    AddOther,
    Unknown,
    /// Runs until it is told to end. Meanwhile the worker that runs it is killed so often, and comes back.
    Patient {
        kills: u32,
    },
}

#[derive(Debug, Clone)]
enum Behaviour {
    /// A plain worker says this; the last ones only when the execution has ended. Its answers it says again with each delivery.
    Plain {
        moves: Vec<Move>,
        late: Vec<Move>,
    },
    /// A plain worker shows signs of life for ever, and has a result when the execution has ended.
    Alive,
    /// Workers with leases.
    Leased {
        rival: Rival,
        renewals: u32,
        uploads: bool,
        twice: bool,
    },
    Real(Task),
    /// An input that no worker ever gets.
    Refused(&'static str),
}

#[derive(Debug, Clone, Copy)]
enum Start {
    ByHand,
    /// The schedule says so often that it is time.
    BySchedule {
        times: u32,
    },
}

/// A case of a job.
pub(crate) struct Plan {
    start: Start,
    input_bytes: usize,
    result_bytes: usize,
    behaviour: Behaviour,
    disturbances: Vec<Disturbance>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, input_bytes, result_bytes, behaviour, disturbances } = self;
        write!(f, "{start:?}, {input_bytes} bytes in, {result_bytes} out, {behaviour:?}")?;
        disturbances.iter().try_for_each(|disturbance| write!(f, "; {disturbance}"))
    }
}

impl Plan {
    /// By turns: messages, a kill, refusals, leases, the real worker, and all of it together.
    fn new(random: &mut StdRng, number: usize) -> Self {
        let (behaviour, disturbances) = match number % 6 {
            0 => (scripted(random), vec![]),
            1 => {
                let kill = Disturbance::kill_in_turn(random, POINTS, number / 6);
                (kill.point().and_then(reaching).unwrap_or_else(|| honest(random)), vec![kill])
            }
            2 => (honest(random), vec![Disturbance::fail(random, POINTS)]),
            3 => (leased(random), vec![]),
            4 => (real(random), vec![]),
            _ => {
                let behaviour = match random.random_range(0..4) {
                    0 | 1 => scripted(random),
                    2 => leased(random),
                    _ => real(random),
                };
                (behaviour, vec![Disturbance::kill(random, POINTS), Disturbance::refuse(random, POINTS)])
            }
        };
        let start = if random.random_bool(0.25) {
            Start::BySchedule { times: random.random_range(1..=3) }
        } else {
            Start::ByHand
        };
        let (mut input_bytes, mut result_bytes) = (*INPUTS.choose(random).unwrap(), *RESULTS.choose(random).unwrap());
        match behaviour {
            Behaviour::Real(_) | Behaviour::Refused(_) => (input_bytes, result_bytes) = (0, 0),
            Behaviour::Leased { uploads: true, .. } => result_bytes = *UPLOADED.choose(random).unwrap(),
            _ => {}
        }
        if number % 6 == 1 {
            // The call at which the function is killed must come.
            match disturbances[0].point() {
                Some((Some("PublishToDevice"), "s3.PutObject")) => input_bytes = 140_000,
                Some((_, "s3.PutObject")) => (input_bytes, result_bytes) = (140_000, 125_000),
                Some((_, "s3.GetObject")) => (input_bytes, result_bytes) = (0, 200_000),
                _ => {}
            }
        }
        Self { start, input_bytes, result_bytes, behaviour, disturbances }
    }

    /// What the job works on, besides whose it is.
    fn input(&self, case: &Case) -> Value {
        let name = &case.name;
        match self.behaviour {
            Behaviour::Real(Task::Add) => json!({"a": name, "b": "!"}),
            Behaviour::Real(Task::AddNothing) => json!({"a": name}),
            Behaviour::Real(Task::AddOther) => json!({"a": name, "b": 1}),
            _ => json!({"case": name, "padding": "x".repeat(self.input_bytes)}),
        }
    }

    /// What the execution is started with.
    fn order(&self, case: &Case) -> Value {
        let mut order = self.input(case);
        match self.behaviour {
            Behaviour::Real(task) => {
                order["tenant"] = REAL.into();
                match task {
                    Task::Unknown => order["handler"] = "nobody".into(),
                    Task::Patient { .. } => order["handler"] = "patient".into(),
                    _ => {}
                }
            }
            Behaviour::Refused("size") => order["padding"] = "x".repeat(246_000).into(),
            Behaviour::Refused(field) => order[field] = "no/name".into(),
            _ => order["tenant"] = BY_HAND.into(),
        }
        order
    }

    fn result(&self, case: &Case, value: &str) -> Value {
        json!({"case": case.name, "value": value, "padding": "y".repeat(self.result_bytes)})
    }

    /// What the execution may end with: one of these results or errors.
    fn ends(&self, case: &Case) -> Vec<Result<Value, String>> {
        let one = |end: Result<Value, &str>| vec![end.map_err(str::to_owned)];
        match &self.behaviour {
            Behaviour::Plain { moves, .. } => {
                let ends: Vec<_> = moves.iter().filter_map(|one| self.end_of(case, *one)).collect();
                if ends.is_empty() { one(Err("WorkerTimedOut")) } else { ends }
            }
            Behaviour::Alive => one(Err("WorkerTimedOut")),
            Behaviour::Leased { .. } => one(Ok(self.result(case, "right"))),
            Behaviour::Real(Task::Add) => one(Ok(format!("{}!", case.name).into())),
            Behaviour::Real(Task::AddNothing) => one(Err("KeyError")),
            Behaviour::Real(Task::AddOther) => one(Err("TypeError")),
            Behaviour::Real(Task::Unknown) => one(Err("UnknownHandler")),
            Behaviour::Real(Task::Patient { .. }) => one(Ok(json!({"done": case.name}))),
            Behaviour::Refused(_) => one(Err("InvalidInput")),
        }
    }

    /// What a move ends the execution with, if it does.
    fn end_of(&self, case: &Case, one: Move) -> Option<Result<Value, String>> {
        match one {
            Move::Result => Some(Ok(self.result(case, "right"))),
            Move::OtherResult => Some(Ok(self.result(case, "other"))),
            Move::Exception(index) => Some(Err(EXCEPTIONS[index].1.to_owned())),
            _ => None,
        }
    }
}

fn is_answer(one: Move) -> bool {
    matches!(one, Move::Result | Move::OtherResult | Move::Exception(_))
}

fn exception(random: &mut StdRng) -> Move {
    Move::Exception(random.random_range(0..EXCEPTIONS.len()))
}

fn honest(random: &mut StdRng) -> Behaviour {
    match random.random_range(0..6) {
        0 | 1 => Behaviour::Plain { moves: vec![Move::Result], late: vec![] },
        2 => Behaviour::Plain { moves: vec![exception(random)], late: vec![] },
        3 => Behaviour::Leased { rival: Rival::Nobody, renewals: 0, uploads: false, twice: false },
        4 => Behaviour::Leased { rival: Rival::Nobody, renewals: 1, uploads: true, twice: false },
        _ => Behaviour::Real(Task::Add),
    }
}

/// What workers do when that call is made, where that is not all the same.
fn reaching((_, operation): Point) -> Option<Behaviour> {
    let plain = |one| Behaviour::Plain { moves: vec![one], late: vec![] };
    Some(match operation {
        "s3.PutObject" => plain(Move::Result),
        "states.SendTaskFailure" => plain(Move::Exception(0)),
        "s3.HeadObject" | "s3.GetObject" => {
            Behaviour::Leased { rival: Rival::Nobody, renewals: 0, uploads: true, twice: false }
        }
        _ => return None,
    })
}

fn scripted(random: &mut StdRng) -> Behaviour {
    match random.random_range(0..12) {
        0 => return Behaviour::Alive,
        1 => return Behaviour::Refused(["tenant", "handler", "size"].choose(random).unwrap()),
        _ => {}
    }
    let mut moves = vec![if random.random_bool(0.7) { Move::Result } else { exception(random) }];
    let mut late = Vec::new();
    for _ in 0..random.random_range(1..=3) {
        let place = random.random_range(0..=moves.len());
        let other = match random.random_range(0..14) {
            0 | 1 => {
                late.append(&mut moves);
                continue;
            }
            2 | 3 => match moves.choose(random) {
                Some(again) => *again,
                None => continue,
            },
            4 => Move::OtherResult,
            5 => exception(random),
            6 => *[Move::Heartbeat, Move::WrongHeartbeat].choose(random).unwrap(),
            7 => Move::NoHandle,
            8 => Move::Malformed,
            9 => Move::Oversized,
            10 => Move::UnknownHandle,
            11 => Move::WrongSecret,
            12 => Move::WrongTenant,
            _ => Move::WrongLease,
        };
        moves.insert(place, other);
    }
    Behaviour::Plain { moves, late }
}

fn leased(random: &mut StdRng) -> Behaviour {
    Behaviour::Leased {
        rival: *[Rival::Nobody, Rival::TakesOver, Rival::IsGivenIt].choose(random).unwrap(),
        renewals: random.random_range(0..3),
        uploads: random.random_bool(0.3),
        twice: random.random(),
    }
}

fn real(random: &mut StdRng) -> Behaviour {
    let tasks = [Task::Add, Task::AddNothing, Task::AddOther, Task::Unknown];
    Behaviour::Real(if random.random_bool(0.4) {
        *tasks.choose(random).unwrap()
    } else {
        Task::Patient { kills: random.random_range(0..3) }
    })
}

/// What has come for a case.
#[derive(Default)]
struct Post {
    /// Each delivery of its job.
    jobs: Vec<JobMessage>,
    /// The answers to its workers.
    replies: Vec<(String, WorkerReply)>,
}

/// What has come for all cases, by their names.
type Letters = Arc<Mutex<HashMap<String, Post>>>;

/// Sorts what comes on the topics of workers, for as long as the test runs.
async fn sort(mut worker: PlainWorker, letters: Letters) {
    loop {
        // It waits for a limited time, and there may be nothing for long.
        let next = tokio::time::timeout(Duration::from_mins(1), worker.client.message());
        let Ok(message) = next.await else { continue };
        let job = JobMessage::decode(&message.payload).ok();
        let reply = WorkerReply::decode(&message.payload).ok();
        let token = job.as_ref().map(|job| &job.task_token).or(reply.as_ref().map(|reply| &reply.task_token));
        let Some(token) = token.cloned() else { continue };
        let mut letters = letters.lock().unwrap();
        let Some((_, post)) = letters.iter_mut().find(|(case, _)| token.contains(case.as_str())) else { continue };
        post.jobs.extend(job);
        let to = message.topic.rsplit('/').next().unwrap_or_default().to_owned();
        post.replies.extend(reply.map(|reply| (to, reply)));
    }
}

/// The workflow on the deployed stack.
pub(crate) struct OnPremises {
    cloud: Cloud,
    proxy: Proxy,
    executions: Executions,
    letters: Letters,
    listener: tokio::task::JoinHandle<()>,
    /// Speaks for all workers of the first tenant.
    voice: MqttDevice,
    /// Says what the broker refuses: it ends the connection, and what else is under way on it is lost.
    intruder: MqttDevice,
    tenant: Tenant,
    /// The real workers of the other tenant.
    workers: tokio::sync::Mutex<[WorkerProcess; 2]>,
    /// One case at a time kills: a job that runs all the while must not be hit again and again.
    killer: tokio::sync::Mutex<()>,
}

impl Drop for OnPremises {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn value(input: &protocol::JsonText) -> Value {
    serde_json::from_str(input.get()).expect("JSON")
}

/// A client with the rights of a tenant's worker.
async fn speaker(cloud: &Cloud, tenant: &Tenant) -> MqttDevice {
    let folder = cloud.worker_credentials(tenant).await;
    let id = folder.file_name().and_then(|name| name.to_str()).unwrap();
    // What is under way when the connection breaks is sent again in a session that goes on.
    MqttDevice::connect_as(id.parse().unwrap(), &format!("{tenant}.{id}"), &folder, false).await
}

/// A program that says that it has begun, and waits until it is told to end.
const PATIENT: &str = "name=$(sed 's/.*\"case\":\"\\([^\"]*\\)\".*/\\1/'); echo begun >> \"begun-$name\"; \
     until test -e \"go-$name\"; do sleep 0.5; done; printf '{\"done\":\"%s\"}' \"$name\"";

impl OnPremises {
    pub(crate) async fn connect() -> Self {
        let cloud = Cloud::connect().await;
        let executions = Executions::of(&cloud, "OnPremisesJobArn");
        let tenant: Tenant = BY_HAND.parse().unwrap();
        let mut worker = PlainWorker::connect(&cloud, BY_HAND).await;
        worker.client.subscribe(format!("{BY_HAND}/to/worker/+"), QoS::AtLeastOnce).await;
        let (voice, intruder) = (speaker(&cloud, &tenant).await, speaker(&cloud, &tenant).await);
        let letters = Letters::default();
        let listener = tokio::spawn(sort(worker, letters.clone()));
        let arguments = json!(["-c", PATIENT]);
        let patient =
            format!("[handlers.patient]\nprogram = \"/bin/sh\"\narguments = {arguments}\nenvironment = [\"PATH\"]\n");
        let workers = [
            WorkerProcess::start(&cloud, REAL, "chaos-1", &patient).await,
            WorkerProcess::start(&cloud, REAL, "chaos-2", &patient).await,
        ];
        let (workers, killer) = (tokio::sync::Mutex::new(workers), tokio::sync::Mutex::default());
        Self {
            cloud,
            proxy: Proxy::from_environment(),
            executions,
            letters,
            listener,
            voice,
            intruder,
            tenant,
            workers,
            killer,
        }
    }

    async fn start(&self, case: &Case, plan: &Plan) {
        let order = plan.order(case);
        match plan.start {
            Start::ByHand => {
                let start = self.cloud.step_functions.start_execution();
                let start = start.state_machine_arn(self.cloud.output("OnPremisesJobArn")).name(&case.name);
                start.input(order.to_string()).send().await.expect("started");
            }
            Start::BySchedule { times } => {
                let body = json!({"scheduledTime": case.name, "input": order}).to_string();
                let queue = self.cloud.queue_url("JobSchedulesQueue").await;
                for _ in 0..times {
                    self.cloud.sqs.send_message().queue_url(&queue).message_body(&body).send().await.expect("sent");
                }
            }
        }
    }

    /// What has come for the case.
    fn post<T>(&self, case: &Case, look: impl FnOnce(&mut Post) -> T) -> T {
        let mut letters = self.letters.lock().unwrap();
        let post = letters.entry(case.name.clone()).or_default();
        saw(format!("{} deliveries of the job, the replies {:?}", post.jobs.len(), post.replies));
        look(post)
    }

    /// Its first delivery.
    async fn job(&self, case: &Case) -> Result<JobMessage, Failure> {
        eventually("a worker gets the job", || async { self.post(case, |post| post.jobs.first().cloned()) }).await
    }

    /// How its execution has ended, if it has.
    async fn end(&self, case: &Case) -> Option<Ended> {
        self.executions.ended(&self.cloud, &case.name).await?.into_iter().next()
    }

    /// Waits a moment for its end, unless it has been waited for long.
    async fn pause(&self, case: &Case, begin: Instant) -> Verdict {
        if begin.elapsed() > LIMIT {
            let look = || async {
                self.post(case, |_| ());
                self.end(case).await
            };
            let (_, seen) = tests::noted(look).await;
            return Err(Failure::Stuck(tests::in_vain(LIMIT, "the execution ends", &seen)));
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok(())
    }

    async fn publish(&self, topic: String, payload: Vec<u8>) {
        self.voice.send(Publication { topic, payload }).await;
    }

    async fn say(&self, case: &Case, plan: &Plan, job: &JobMessage, one: Move) {
        let handle = job.task_token.as_str();
        let operation = handle.rsplit_once('.').map_or(handle, |(operation, _)| operation);
        let wrong = || plan.result(case, "wrong");
        let payload = match one {
            Move::Result => json!({"result": plan.result(case, "right"), "TaskToken": handle}),
            Move::OtherResult => json!({"result": plan.result(case, "other"), "TaskToken": handle}),
            Move::Exception(index) => {
                let why = format!("in {}", case.name);
                json!({"result": null, "TaskToken": handle, "exception": EXCEPTIONS[index].0, "cause": why})
            }
            Move::Heartbeat => json!({"TaskToken": handle, "heartbeat": true, "progress": 50}),
            Move::WrongHeartbeat => json!({"TaskToken": handle, "heartbeat": "yes", "case": case.name}),
            Move::NoHandle => {
                let exception = format!("JSONDecodeError in {}", case.name);
                json!({"result": null, "TaskToken": null, "exception": exception})
            }
            Move::Malformed => json!(["nonsense", case.name]),
            Move::Oversized => json!([case.name, "x".repeat(protocol::MAX_PAYLOAD_BYTES)]),
            Move::UnknownHandle => json!({"result": wrong(), "TaskToken": format!("no-{}.0", case.name)}),
            Move::WrongSecret => json!({"result": wrong(), "TaskToken": format!("{operation}.0")}),
            Move::WrongTenant => json!({"result": wrong(), "TaskToken": handle}),
            Move::WrongLease => json!({"result": wrong(), "TaskToken": handle, "worker": case.name, "fence": 1}),
        };
        let other = || REAL.parse().unwrap();
        let (voice, tenant) =
            if one == Move::WrongTenant { (&self.intruder, other()) } else { (&self.voice, self.tenant.clone()) };
        let payload = payload.to_string().into_bytes();
        voice.send(Publication { topic: answers_topic(&tenant), payload }).await;
    }

    async fn plain(&self, case: &Case, plan: &Plan, moves: &[Move], late: &[Move]) -> Result<Ended, Failure> {
        let begin = Instant::now();
        let job = self.job(case).await?;
        for one in moves {
            self.say(case, plan, &job, *one).await;
        }
        let mut deliveries = 1;
        let ended = loop {
            if let Some(ended) = self.end(case).await {
                break ended;
            }
            self.pause(case, begin).await?;
            let known = self.post(case, |post| post.jobs.len());
            if known > deliveries {
                deliveries = known;
                for one in moves.iter().filter(|one| is_answer(**one)) {
                    self.say(case, plan, &job, *one).await;
                }
            }
        };
        for one in late {
            self.say(case, plan, &job, *one).await;
        }
        if late.iter().copied().any(is_answer) {
            self.heard(&job).await?;
        }
        Ok(ended)
    }

    /// Shows signs of life, more often than it must.
    async fn alive(&self, case: &Case, plan: &Plan) -> Result<Ended, Failure> {
        let begin = Instant::now();
        let job = self.job(case).await?;
        let ended = loop {
            if let Some(ended) = self.end(case).await {
                break ended;
            }
            self.say(case, plan, &job, Move::Heartbeat).await;
            for _ in 0..3 {
                self.pause(case, begin).await?;
            }
        };
        self.say(case, plan, &job, Move::Result).await;
        self.heard(&job).await?;
        Ok(ended)
    }

    /// The answer that is kept of a job: its kind, and what was said.
    async fn kept(&self, tenant: &str, token: &str) -> Value {
        let operation = token.rsplit_once('.').map_or(token, |(operation, _)| operation);
        let key = AttributeValue::S(format!("{tenant}#{operation}"));
        let get = self.cloud.dynamodb.get_item().table_name(self.cloud.output("WorkerJobsTableName"));
        let item = get.key("job", key).consistent_read(true).send().await.expect("the table").item;
        let item: Value = item.map(|item| serde_dynamo::from_item(item).expect("a job")).unwrap_or_default();
        saw(format!("the job {operation} of {tenant}: {:.1000}", item.to_string()));
        item["answer"].clone()
    }

    /// An answer has been heard, even if nobody waits for it any more.
    async fn heard(&self, job: &JobMessage) -> Verdict {
        let heard = eventually("the answer is kept", || async {
            (!self.kept(BY_HAND, &job.task_token).await.is_null()).then_some(())
        });
        heard.await.map_err(Failure::lost)
    }

    /// Says something that is answered, again if no answer comes, and waits for the answer.
    async fn ask(
        &self,
        case: &Case,
        job: &JobMessage,
        worker: &WorkerName,
        message: impl Fn(String) -> WorkerMessage,
    ) -> Result<Answer, Failure> {
        let request = uuid::Uuid::new_v4().simple().to_string();
        let message = message(request.clone()).encode(&self.tenant, &job.task_token);
        let mut said = None;
        eventually("a worker is answered", || {
            let is_due = said.is_none_or(|time: Instant| time.elapsed() > Duration::from_secs(30));
            if is_due {
                said = Some(Instant::now());
            }
            let (request, message) = (&request, &message);
            async move {
                if is_due {
                    self.publish(message.topic.clone(), message.payload.clone()).await;
                }
                self.post(case, |post| {
                    let ours = |(to, reply): &&(String, WorkerReply)| {
                        to == worker.as_str() && reply.request.as_ref() == Some(request)
                    };
                    post.replies.iter().find(ours).map(|(_, reply)| reply.verdict.clone())
                })
            }
        })
        .await
    }

    /// Claims the job until it is granted, with the input if that is elsewhere; none if the job is over.
    async fn claim(
        &self,
        case: &Case,
        job: &JobMessage,
        worker: &WorkerName,
    ) -> Result<Option<(Lease, Option<String>)>, Failure> {
        loop {
            let claim = |request| WorkerMessage::Claim { worker: worker.clone(), request };
            match self.ask(case, job, worker, claim).await? {
                Answer::Granted { fence, input_url, .. } => {
                    return Ok(Some((Lease { worker: worker.clone(), fence }, input_url)));
                }
                Answer::Held { retry_milliseconds } => {
                    tokio::time::sleep(Duration::from_millis(retry_milliseconds)).await;
                }
                Answer::Over => return Ok(None),
                other => return Err(Failure::Wrong(format!("a claim is answered by {other:?}"))),
            }
        }
    }

    /// Says the result under a lease, uploaded if that is the plan.
    async fn succeed(&self, case: &Case, plan: &Plan, job: &JobMessage, lease: &Lease, value: &str) -> Verdict {
        let result = plan.result(case, value);
        let result = if matches!(plan.behaviour, Behaviour::Leased { uploads: true, .. }) {
            let text = result.to_string();
            let bytes = text.len() as u64;
            let upload = |request| WorkerMessage::Upload { lease: lease.clone(), request, bytes };
            let Answer::Upload { url, headers } = self.ask(case, job, &lease.worker, upload).await? else {
                // The lease is lost, or the job is over.
                return Ok(());
            };
            let http = reqwest::Client::new();
            eventually("the result is uploaded", || async {
                let put = headers.iter().fold(http.put(&url), |put, (name, value)| put.header(name, value));
                let put = put.body(text.clone()).send().await.and_then(reqwest::Response::error_for_status);
                put.map_err(|error| saw(format!("{error:?}"))).ok()
            })
            .await?;
            WorkerResult::Object { bytes }
        } else {
            WorkerResult::Value(result.into())
        };
        let message = WorkerMessage::Succeeded { result, lease: Some(lease.clone()) };
        let Publication { topic, payload } = message.encode(&self.tenant, &job.task_token);
        self.publish(topic, payload).await;
        Ok(())
    }

    /// How often a worker was told that it has lost its lease.
    fn lost(&self, case: &Case, worker: &WorkerName) -> usize {
        let is_lost = |(to, reply): &&(String, WorkerReply)| to == worker.as_str() && reply.verdict == Answer::Lost;
        self.post(case, |post| post.replies.iter().filter(is_lost).count())
    }

    async fn leased(
        &self,
        case: &Case,
        plan: &Plan,
        rival: Rival,
        renewals: u32,
        twice: bool,
    ) -> Result<Ended, Failure> {
        let begin = Instant::now();
        let job = self.job(case).await?;
        let [first, second]: [WorkerName; 2] = ["a", "b"].map(|name| format!("{}-{name}", case.name).parse().unwrap());
        let over = || Failure::Wrong("the job is over before it is done".into());
        let (mut lease, input) = self.claim(case, &job, &first).await?.ok_or_else(over)?;
        if let Some(url) = input {
            let http = reqwest::Client::new();
            let input = eventually("the input is read", || async {
                let got = http.get(&url).send().await.and_then(reqwest::Response::error_for_status);
                let got = got.map_err(|error| saw(format!("{error:?}"))).ok()?;
                got.bytes().await.map_err(|error| saw(format!("{error:?}"))).ok()
            })
            .await?;
            let input: Value = serde_json::from_slice(&input).unwrap_or_default();
            same("the stored input is the job's", &(input == plan.input(case)), &true)?;
        } else {
            same("the input is the job's", &(value(&job.input) == plan.input(case)), &true)?;
        }
        for _ in 0..renewals {
            let renew =
                |request| WorkerMessage::Heartbeat { progress: Some(50), lease: Some((lease.clone(), request)) };
            match self.ask(case, &job, &first, renew).await? {
                Answer::Granted { fence, .. } => same("the renewed lease", &fence, &lease.fence)?,
                other => return Err(Failure::Wrong(format!("a renewal is answered by {other:?}"))),
            }
        }
        if rival != Rival::Nobody {
            if rival == Rival::IsGivenIt {
                let release = WorkerMessage::Release(lease.clone()).encode(&self.tenant, &job.task_token);
                self.publish(release.topic, release.payload).await;
            }
            let (taken, _) = self.claim(case, &job, &second).await?.ok_or_else(over)?;
            same("the new lease has a larger number", &(taken.fence > lease.fence), &true)?;
            // What the first one says does not count any more, and it is told so.
            self.succeed(case, plan, &job, &lease, "stale").await?;
            eventually("the first one is told", || async { (self.lost(case, &first) > 0).then_some(()) }).await?;
            lease = taken;
        }
        for _ in 0..=u32::from(twice) {
            self.succeed(case, plan, &job, &lease, "right").await?;
        }
        let worker = lease.worker.clone();
        let (mut lost, mut deliveries) = (0, self.post(case, |post| post.jobs.len()));
        loop {
            if let Some(ended) = self.end(case).await {
                return Ok(ended);
            }
            self.pause(case, begin).await?;
            // A claim that was delivered again may have taken the lease away: it is asked for anew, as a worker does.
            let known = (self.lost(case, &worker), self.post(case, |post| post.jobs.len()));
            if known.0 > lost
                && let Some((taken, _)) = self.claim(case, &job, &worker).await?
            {
                lease = taken;
            }
            if known != (lost, deliveries) {
                (lost, deliveries) = known;
                self.succeed(case, plan, &job, &lease, "right").await?;
            }
        }
    }

    /// Has the real workers do it.
    async fn real(&self, case: &Case, plan: &Plan, task: Task) -> Result<Ended, Failure> {
        let Task::Patient { kills } = task else {
            self.start(case, plan).await;
            return eventually("the execution ends", || self.end(case)).await;
        };
        let _turn = if kills > 0 { Some(self.killer.lock().await) } else { None };
        self.start(case, plan).await;
        let file = |kind: &str| format!("{kind}-{}", case.name);
        for _ in 0..kills {
            let begun = eventually("a worker has begun", || async {
                let workers = self.workers.lock().await;
                for worker in workers.iter() {
                    saw(worker.last_words());
                }
                workers.iter().position(|worker| std::fs::remove_file(worker.work(&file("begun"))).is_ok())
            });
            let begun = begun.await?;
            let mut workers = self.workers.lock().await;
            workers[begun].kill();
            workers[begun].restart();
        }
        for worker in self.workers.lock().await.iter() {
            std::fs::write(worker.work(&file("go")), "").expect("written");
        }
        eventually("the execution ends", || self.end(case)).await
    }

    /// How it has ended: the result, from wherever it is, or the error.
    async fn outcome(&self, case: &Case, plan: &Plan, ended: &Ended) -> Result<Result<Value, String>, Failure> {
        if ended.status != ExecutionStatus::Succeeded {
            return Ok(Err(ended.error.clone()));
        }
        let mut output = ended.output.clone();
        let mut result = output.as_object_mut().and_then(|output| output.remove("lambdaOutput")).unwrap_or_default();
        same("the output beside the result is the input", &(output == ended.input), &true)?;
        let Some(uri) = result["resultS3Uri"].as_str() else { return Ok(Ok(result["result"].take())) };
        let (bucket, key) = uri.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).expect("an address in S3");
        let object = self.cloud.s3.get_object().bucket(bucket).key(key).send().await.expect("the result");
        let bytes = object.body.collect().await.expect("the result").into_bytes();
        same("the size of the stored result", &result["resultBytes"], &json!(bytes.len()))?;
        let room = ROOM.saturating_sub(plan.input(case).to_string().len());
        same("only what does not fit into the output is stored", &(bytes.len() > room), &true)?;
        Ok(Ok(serde_json::from_slice(&bytes).expect("JSON")))
    }

    /// What has come to workers, and what is kept of what they have said.
    async fn look_back(&self, case: &Case, plan: &Plan) -> Verdict {
        let ended = eventually("its executions end", || self.executions.ended(&self.cloud, &case.name)).await?;
        same("the number of executions", &ended.len(), &1)?;
        if matches!(plan.behaviour, Behaviour::Real(_)) {
            return Ok(());
        }
        let tokens: Vec<String> = self.post(case, |post| post.jobs.iter().map(|job| job.task_token.clone()).collect());
        let Some(token) = tokens.first() else {
            return same("it is no job", &matches!(plan.behaviour, Behaviour::Refused(_)), &true);
        };
        same("each delivery is of the same job", &tokens.iter().all(|other| other == token), &true)?;
        let is_silent = plan.ends(case) == [Err("WorkerTimedOut".to_owned())];
        if is_silent && plan.disturbances.is_empty() && !has_signs_of_life(plan) {
            same("how often the job was sent", &tokens.len(), &4)?;
        }
        // The first answer stays. One that came late is kept, and has no effect.
        let kept = self.kept(BY_HAND, token).await;
        let expected = match (&ended[0].status, &plan.behaviour) {
            (ExecutionStatus::Succeeded, _) | (_, Behaviour::Alive) => vec!["succeeded", "stored"],
            (_, Behaviour::Plain { late, .. }) if is_silent && !late.iter().copied().any(is_answer) => vec![],
            (_, Behaviour::Plain { .. }) if is_silent => vec!["succeeded", "stored", "failed"],
            _ => vec!["failed"],
        };
        let outcome = kept["outcome"].as_str();
        match outcome {
            Some(outcome) if expected.contains(&outcome) => Ok(()),
            None if expected.is_empty() => Ok(()),
            _ => Err(Failure::Wrong(format!("what is kept is {outcome:?}, expected one of {expected:?}"))),
        }
    }
}

fn has_signs_of_life(plan: &Plan) -> bool {
    match &plan.behaviour {
        Behaviour::Plain { moves, .. } => moves.contains(&Move::Heartbeat),
        _ => true,
    }
}

/// The beginning of what may be long.
fn brief(end: &Result<Value, String>) -> String {
    format!("{end:?}").chars().take(120).collect()
}

impl Workflow for OnPremises {
    const NAME: &'static str = "worker";
    const QUEUES: &'static [&'static str] = &["JobSchedulesQueue", "Tenant1AnswersQueue", "Tenant2AnswersQueue"];
    type Plan = Plan;

    fn cloud(&self) -> &Cloud {
        &self.cloud
    }

    fn plan(random: &mut StdRng, number: usize) -> Plan {
        Plan::new(random, number)
    }

    async fn run(&self, case: &Case, plan: &Plan) -> Verdict {
        let rules: Vec<_> = plan.disturbances.iter().map(|one| one.rule(&case.name)).collect();
        self.proxy.disturb(&rules).await;
        // Whoever listens knows of it.
        self.post(case, |_| ());
        if !matches!(plan.behaviour, Behaviour::Real(_)) {
            self.start(case, plan).await;
        }
        let ended = match &plan.behaviour {
            Behaviour::Plain { moves, late } => self.plain(case, plan, moves, late).await?,
            Behaviour::Alive => self.alive(case, plan).await?,
            Behaviour::Leased { rival, renewals, twice, .. } => {
                self.leased(case, plan, *rival, *renewals, *twice).await?
            }
            Behaviour::Real(task) => self.real(case, plan, *task).await?,
            Behaviour::Refused(_) => eventually("the execution ends", || self.end(case)).await?,
        };
        let outcome = self.outcome(case, plan, &ended).await?;
        let ends = plan.ends(case);
        if ends.contains(&outcome) {
            return Ok(());
        }
        let ends: Vec<String> = ends.iter().map(brief).collect();
        Err(Failure::Wrong(format!("it ended with {}, expected one of {ends:?}", brief(&outcome))))
    }

    fn disturbances(plan: &Plan) -> &[Disturbance] {
        &plan.disturbances
    }

    fn dead_letters(plan: &Plan) -> Vec<&'static str> {
        let Behaviour::Plain { moves, late } = &plan.behaviour else { return Vec::new() };
        let error = |one: &Move| match one {
            Move::WrongHeartbeat | Move::NoHandle | Move::Malformed => Some("MalformedMessage"),
            Move::Oversized => Some("MessageTooLarge"),
            _ => None,
        };
        moves.iter().chain(late).filter_map(error).collect()
    }

    async fn audit(&self, cases: &[(Case, Plan)]) -> BTreeMap<usize, Failure> {
        let mut failures = BTreeMap::new();
        for (case, plan) in cases {
            if let Err(failure) = self.look_back(case, plan).await {
                failures.insert(case.number, failure);
            }
        }
        failures
    }
}
