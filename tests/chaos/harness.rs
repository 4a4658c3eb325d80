//! Makes up cases, runs many of them at the same time, and says what became of each.

use crate::disturbance::{self, Disturbance};
use aws_sdk_sfn::types::{ExecutionListItem, ExecutionStatus};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{FutureExt, StreamExt, stream};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tests::{Cloud, Proxy, saw, statuses};

/// How many cases a slice has, how many run at the same time, and with which seed.
const QUICK_CASES: usize = 8;
const AT_ONCE: usize = 80;
/// In a run of so many cases the account's rate is used up once, in the midst of the first ones.
const LONG_RUN: usize = 100;
const ACCOUNT_THROTTLED_AFTER: Duration = Duration::from_secs(20);
/// All workflows share the account.
static ACCOUNT_IS_THROTTLED: AtomicBool = AtomicBool::new(false);
const SEED: u64 = 7;
/// What has not ended by then is stuck. In the long run, a job of which nobody gives a sign of life is sent four times and waited for
/// as often, after an account has been out of calls and beside an API that is out.
pub(crate) const LIMIT: Duration = Duration::from_mins(40);
/// How long after the last case a dead letter may come.
const LETTERS_LIMIT: Duration = Duration::from_mins(4);
const POLL: Duration = Duration::from_secs(2);

/// A workflow under test.
pub(crate) trait Workflow: Sync {
    /// Its name, short enough to be part of a thing's name.
    const NAME: &'static str;
    /// The queues that its messages pass.
    const QUEUES: &'static [&'static str];
    /// What a case is made of.
    type Plan: Display + Send + Sync;

    /// The cloud that it runs on.
    fn cloud(&self) -> &Cloud;

    /// Makes up a case.
    fn plan(random: &mut StdRng, number: usize) -> Self::Plan;

    /// Carries it out, and looks at what came of it.
    fn run(&self, case: &Case, plan: &Self::Plan) -> impl Future<Output = Verdict> + Send;

    /// What is done to its calls.
    fn disturbances(plan: &Self::Plan) -> &[Disturbance];

    /// The dead letters about a case that are as they should be, by the name of the error.
    fn dead_letters(_plan: &Self::Plan) -> Vec<&'static str> {
        Vec::new()
    }

    /// What can only be told of all cases together: the failed ones.
    fn audit(&self, _cases: &[(Case, Self::Plan)]) -> impl Future<Output = BTreeMap<usize, Failure>> + Send {
        std::future::ready(BTreeMap::new())
    }
}

/// One case.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Its number.
    pub(crate) number: usize,
    /// A name that is part of its subject's and of no other's.
    pub(crate) name: String,
}

/// How a case failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Something waits past its deadline.
    Stuck(String),
    /// It ended otherwise than it should have, or something happened twice.
    Wrong(String),
    /// A message has had no effect.
    Lost(String),
}

impl Failure {
    /// What was waited for is the effect of a message.
    pub(crate) fn lost(self) -> Self {
        match self {
            Self::Stuck(text) => Self::Lost(text),
            other => other,
        }
    }
}

/// How a case ended.
pub(crate) type Verdict = Result<(), Failure>;

/// Asks every other second until there is an answer.
pub(crate) async fn within<T, F: Future<Output = Option<T>>>(
    limit: Duration,
    what: &str,
    ask: impl FnMut() -> F,
) -> Result<T, Failure> {
    tests::look(limit, POLL, what, ask).await.map_err(Failure::Stuck)
}

/// The same, for as long as a workflow may take.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    ask: impl FnMut() -> F,
) -> Result<T, Failure> {
    within(LIMIT, what, ask).await
}

/// `Wrong`, unless both are the same.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, expected: &T) -> Verdict {
    if found == expected { Ok(()) } else { Err(Failure::Wrong(format!("{what}: {found:?}, expected {expected:?}"))) }
}

/// The executions of a state machine, listed at most every other second, whoever asks.
pub(crate) struct Executions {
    machine: String,
    listed: tokio::sync::Mutex<Option<(Instant, Arc<Vec<ExecutionListItem>>)>>,
    described: Mutex<HashMap<String, Ended>>,
}

/// An execution that has ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) status: ExecutionStatus,
    pub(crate) input: Value,
    /// Null if it failed.
    pub(crate) output: Value,
    /// The error's name; empty if it succeeded.
    pub(crate) error: String,
}

impl Executions {
    /// Of the state machine that the stack's output names.
    pub(crate) fn of(cloud: &Cloud, output: &str) -> Self {
        let machine = cloud.output(output).to_owned();
        Self { machine, listed: tokio::sync::Mutex::default(), described: Mutex::default() }
    }

    async fn all(&self, cloud: &Cloud) -> Arc<Vec<ExecutionListItem>> {
        let mut listed = self.listed.lock().await;
        if let Some((_, executions)) = listed.as_ref().filter(|(time, _)| time.elapsed() < POLL) {
            return executions.clone();
        }
        let list = cloud.step_functions.list_executions().state_machine_arn(&self.machine);
        let all = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.expect("executions");
        let all = Arc::new(all);
        *listed = Some((Instant::now(), all.clone()));
        all
    }

    /// Those whose name has this text in it, in the order of their start, if all of them have ended.
    pub(crate) async fn ended(&self, cloud: &Cloud, text: &str) -> Option<Vec<Ended>> {
        let all = self.all(cloud).await;
        let mut own: Vec<&ExecutionListItem> = all.iter().filter(|one| one.name.contains(text)).collect();
        own.sort_by_key(|one| one.start_date);
        saw(format!("executions of {text}: {}", statuses(own.iter().copied())));
        let mut ended = Vec::new();
        for one in own {
            ended.push(self.describe(cloud, one).await?);
        }
        Some(ended)
    }

    async fn describe(&self, cloud: &Cloud, one: &ExecutionListItem) -> Option<Ended> {
        if one.status == ExecutionStatus::Running {
            return None;
        }
        if let Some(known) = self.described.lock().expect("no panic").get(&one.name) {
            return Some(known.clone());
        }
        let describe = cloud.step_functions.describe_execution().execution_arn(&one.execution_arn);
        let found = describe.send().await.expect("the execution");
        let json = |text: Option<String>| serde_json::from_str(&text.unwrap_or_default()).unwrap_or_default();
        let ended = Ended {
            status: found.status,
            input: json(found.input),
            output: json(found.output),
            error: found.error.unwrap_or_default(),
        };
        self.described.lock().expect("no panic").insert(one.name.clone(), ended.clone());
        Some(ended)
    }
}

/// What the environment asks for.
struct Run {
    seed: u64,
    cases: Vec<usize>,
    report: Option<PathBuf>,
}

impl Run {
    fn from_environment() -> Self {
        let number = |name: &str| {
            std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: {text:?}")))
        };
        let count =
            number("FLEETFLOW_CHAOS_CASES").map_or(QUICK_CASES, |count| usize::try_from(count).expect("a count"));
        let only = number("FLEETFLOW_CHAOS_CASE").map(|case| usize::try_from(case).expect("a number"));
        Self {
            seed: number("FLEETFLOW_SEED").unwrap_or(SEED),
            cases: only.map_or_else(|| (0..count).collect(), |case| vec![case]),
            report: std::env::var_os("FLEETFLOW_CHAOS_REPORTS").map(PathBuf::from),
        }
    }

    /// The same case for the same seed, whichever others run.
    fn random(&self, workflow: &str, number: usize) -> StdRng {
        let mut hash = DefaultHasher::new();
        (self.seed, workflow, number).hash(&mut hash);
        StdRng::seed_from_u64(hash.finish())
    }
}

/// What became of the cases of a workflow, as `cargo xtask test --chaos` reads it.
#[derive(Serialize)]
struct Report {
    workflow: &'static str,
    seed: u64,
    cases: usize,
    /// In how many of them a call was disturbed.
    disturbed: usize,
    survived: usize,
    stuck: usize,
    wrong: usize,
    lost: usize,
    seconds: u64,
    log: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    case: usize,
    plan: String,
    disturbed: Vec<String>,
    /// `survived`, or how it failed.
    outcome: String,
}

/// Runs all cases; panics with those that failed.
pub(crate) async fn prove<W: Workflow>(workflow: W) {
    let run = Run::from_environment();
    println!("{}: seed {}, {} cases", W::NAME, run.seed, run.cases.len());
    let begin = Instant::now();
    let id = uuid::Uuid::new_v4().simple().to_string();
    let cases: Vec<(Case, W::Plan)> = run
        .cases
        .iter()
        .map(|number| {
            let case = Case { number: *number, name: format!("{}-{}-{number:04}", W::NAME, &id[..4]) };
            (case, W::plan(&mut run.random(W::NAME, *number), *number))
        })
        .collect();
    if cases.len() >= LONG_RUN && !ACCOUNT_IS_THROTTLED.swap(true, Ordering::SeqCst) {
        tokio::spawn(async {
            tokio::time::sleep(ACCOUNT_THROTTLED_AFTER).await;
            Proxy::from_environment().disturb(&[Disturbance::of_the_account()]).await;
        });
    }
    let mut failures = BTreeMap::new();
    let mut ended = 0;
    let mut verdicts =
        stream::iter(&cases).map(|(case, plan)| verdict(&workflow, case, plan)).buffer_unordered(AT_ONCE);
    while let Some((number, verdict)) = verdicts.next().await {
        ended += 1;
        if let Err(failure) = verdict {
            println!("{} case {number}: {failure:?}", W::NAME);
            failures.insert(number, failure);
        }
        if ended % 25 == 0 {
            println!("{}: {ended} of {} cases after {} s", W::NAME, cases.len(), begin.elapsed().as_secs());
        }
    }
    drop(verdicts);
    drain(&workflow).await;
    for (number, failure) in workflow.audit(&cases).await.into_iter().chain(lost::<W>(&workflow, &cases).await) {
        failures.entry(number).or_insert(failure);
    }
    let disturbed = Proxy::from_environment().disturbed().await;
    let report = report::<W>(&run, &cases, &failures, &disturbed, begin.elapsed());
    say_what_was_never_disturbed::<W>(&cases, &disturbed);
    show(&report);
    if let Some(folder) = &run.report {
        std::fs::create_dir_all(folder).expect("a folder");
        let file = folder.join(format!("{}.json", W::NAME));
        std::fs::write(file, serde_json::to_vec_pretty(&report).expect("JSON")).expect("the report is written");
    }
    assert!(failures.is_empty(), "{} of {} cases failed; seed {}", failures.len(), cases.len(), run.seed);
}

async fn verdict<W: Workflow>(workflow: &W, case: &Case, plan: &W::Plan) -> (usize, Verdict) {
    let run = AssertUnwindSafe(tokio::time::timeout(2 * LIMIT, workflow.run(case, plan))).catch_unwind().await;
    let verdict = match run {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(_)) => Err(Failure::Stuck("the case has not ended".into())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let text = text.unwrap_or("a panic").to_owned();
            Err(if text.contains("in vain") { Failure::Stuck(text) } else { Failure::Wrong(text) })
        }
    };
    (case.number, verdict)
}

/// Waits until no message is under way any more: what a queue gives up only then is among the dead letters, and what comes
/// twice may still do its harm.
async fn drain<W: Workflow>(workflow: &W) {
    let drained = eventually("its queues are empty", || async {
        for queue in W::QUEUES {
            if !workflow.cloud().is_drained(queue).await {
                return None;
            }
        }
        Some(())
    });
    drained.await.unwrap_or_else(|failure| panic!("{}: {failure:?}", W::NAME));
}

/// The calls at which functions should have been killed or refused, and at which nothing has happened: the cases were made
/// up so that they never came to that call, or not so often.
fn say_what_was_never_disturbed<W: Workflow>(cases: &[(Case, W::Plan)], disturbed: &HashMap<String, Vec<String>>) {
    let mut reached: BTreeMap<String, bool> = BTreeMap::new();
    for (case, plan) in cases {
        for (function, operation) in W::disturbances(plan).iter().filter_map(Disturbance::point) {
            let is_it = |call: &String| {
                call.ends_with(&format!(" {operation}")) && function.is_none_or(|function| call.contains(function))
            };
            let is_reached = disturbed.get(&case.name).is_some_and(|calls| calls.iter().any(is_it));
            *reached.entry(disturbance::name((function, operation))).or_default() |= is_reached;
        }
    }
    let never: Vec<&str> = reached.iter().filter(|(_, is)| !**is).map(|(point, _)| point.as_str()).collect();
    if !never.is_empty() {
        println!("{}: never disturbed: {}", W::NAME, never.join(", "));
    }
}

/// The cases of which a message is among the dead letters that should not be there, or is not there and should: what was delivered
/// anew comes late.
async fn lost<W: Workflow>(workflow: &W, cases: &[(Case, W::Plan)]) -> BTreeMap<usize, Failure> {
    let begin = Instant::now();
    loop {
        read_dead_letters(workflow.cloud()).await;
        let lost = without_their_letters::<W>(cases);
        if lost.is_empty() || begin.elapsed() > LETTERS_LIMIT {
            return lost;
        }
        tokio::time::sleep(POLL).await;
    }
}

fn without_their_letters<W: Workflow>(cases: &[(Case, W::Plan)]) -> BTreeMap<usize, Failure> {
    let letters = DEAD_LETTERS.lock().expect("no panic");
    let mut lost = BTreeMap::new();
    for (case, plan) in cases {
        let about = letters.values().filter(|(text, _)| text.contains(&case.name));
        let mut found: Vec<&str> = about.map(|(_, error)| error.as_str()).collect();
        let mut expected = W::dead_letters(plan);
        found.sort_unstable();
        expected.sort_unstable();
        // A function that is killed once it has sent a letter sends it again when it is given the message again.
        let count = |letters: &[&str], error: &str| letters.iter().filter(|letter| **letter == error).count();
        let all = expected.iter().all(|error| count(&found, error) >= count(&expected, error));
        if !all || found.iter().any(|error| !expected.contains(error)) {
            lost.insert(case.number, Failure::Lost(format!("dead letters {found:?}, expected {expected:?}")));
        }
    }
    lost
}

/// All dead letters that were ever read, by their ids: what they say, payloads decoded, and the name of their error (none if the
/// queue gave them up). Workflows that are tried at the same time hide them from each other in the queue.
static DEAD_LETTERS: Mutex<BTreeMap<String, (String, String)>> = Mutex::new(BTreeMap::new());

async fn read_dead_letters(cloud: &Cloud) {
    let mut empty = 0;
    while empty < 2 {
        let receive = cloud.sqs.receive_message().queue_url(cloud.output("DeadLetterQueueUrl"));
        let receive = receive.max_number_of_messages(10).visibility_timeout(60).wait_time_seconds(1);
        let messages = receive.message_attribute_names("All").send().await.expect("the queue").messages;
        let messages = messages.unwrap_or_default();
        empty = if messages.is_empty() { empty + 1 } else { 0 };
        for message in messages {
            let body = message.body.unwrap_or_default();
            let payload = serde_json::from_str::<Value>(&body).ok().and_then(|body| {
                let payload = BASE64_STANDARD.decode(body["payload"].as_str()?).ok()?;
                Some(String::from_utf8_lossy(&payload).into_owned())
            });
            let error = message.message_attributes.and_then(|mut all| all.remove("errorType")?.string_value);
            let text = format!("{body} {}", payload.unwrap_or_default());
            let letter = (text, error.unwrap_or_else(|| "given up".into()));
            DEAD_LETTERS.lock().expect("no panic").insert(message.message_id.unwrap_or_default(), letter);
        }
    }
}

fn report<W: Workflow>(
    run: &Run,
    cases: &[(Case, W::Plan)],
    failures: &BTreeMap<usize, Failure>,
    disturbed: &HashMap<String, Vec<String>>,
    time: Duration,
) -> Report {
    let calls = |case: &Case| disturbed.get(&case.name).cloned().unwrap_or_default();
    let count = |is: fn(&Failure) -> bool| failures.values().filter(|failure| is(failure)).count();
    let line = |(case, plan): &(Case, W::Plan)| Line {
        case: case.number,
        plan: plan.to_string(),
        disturbed: calls(case),
        outcome: failures.get(&case.number).map_or_else(|| "survived".into(), |failure| format!("{failure:?}")),
    };
    Report {
        workflow: W::NAME,
        seed: run.seed,
        cases: cases.len(),
        disturbed: cases.iter().filter(|(case, _)| !calls(case).is_empty()).count(),
        survived: cases.len() - failures.len(),
        stuck: count(|failure| matches!(failure, Failure::Stuck(_))),
        wrong: count(|failure| matches!(failure, Failure::Wrong(_))),
        lost: count(|failure| matches!(failure, Failure::Lost(_))),
        seconds: time.as_secs(),
        log: cases.iter().map(line).collect(),
    }
}

fn show(report: &Report) {
    for line in report.log.iter().filter(|line| line.outcome != "survived") {
        println!("case {}: {}\n  disturbed: {:?}\n  {}", line.case, line.plan, line.disturbed, line.outcome);
    }
    let Report { workflow, seed, cases, disturbed, survived, stuck, wrong, lost, seconds, .. } = report;
    println!(
        "{workflow}: {cases} cases ({disturbed} with disturbed calls), {survived} survived, {stuck} stuck, {wrong} wrong, \
         {lost} lost; seed {seed}, {seconds} s"
    );
}
