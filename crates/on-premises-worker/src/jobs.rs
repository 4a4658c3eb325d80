//! What becomes of each job: which one runs, which lease it has, what is said about it. No I/O: events go in with the
//! time, actions come out.
//!
//! A job waits for a slot, is claimed, runs for as long as its lease is renewed, and is answered. The lease is counted
//! from when it was asked for, so it ends here before it ends in the cloud: no two workers run a job at the same time.

use crate::{Failure, GRACE};
use protocol::on_premises::{Lease, Verdict, WorkerMessage, WorkerReply, WorkerResult};
use protocol::{JsonText, WorkerName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take once the worker is to end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// So much later at most, so that workers that begin together do not stay together.
const JITTER: Duration = Duration::from_secs(2);
/// After so many claims without a reply another job has its turn.
const UNANSWERED_CLAIMS: u32 = 6;
/// The wait before a claim that follows a lease which was over before it could be used.
const BREATH: Duration = Duration::from_secs(1);
/// Heartbeats come no faster, however short a lease is.
const SHORTEST_HEARTBEAT: Duration = Duration::from_millis(200);
/// How often an upload is tried.
const UPLOAD_ATTEMPTS: u32 = 8;
const LONGEST_UPLOAD_PAUSE: Duration = Duration::from_mins(1);
/// Requests of a job whose replies may still come.
const REQUESTS: usize = 32;

/// An answer as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Answer {
    /// It fits into a message.
    Value(JsonText),
    /// It does not: it is uploaded.
    Large {
        /// How large it is.
        bytes: u64,
    },
    /// An exception.
    Failed {
        /// Its name.
        exception: String,
        /// In detail.
        cause: Option<String>,
    },
}

impl From<Failure> for Answer {
    fn from(failure: Failure) -> Self {
        Self::Failed { exception: failure.exception, cause: failure.cause }
    }
}

/// An answer and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stored {
    /// What came of the job.
    pub(crate) answer: Answer,
    /// The lease under which it is given.
    pub(crate) fence: u64,
    /// Whether a large result has been uploaded under that lease.
    pub(crate) uploaded: bool,
    /// Whether the broker has taken the answer.
    pub(crate) delivered: bool,
}

/// What has happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// A job came, or is taken up again after a restart.
    Received {
        handle: String,
        /// Whether the input is not in the message.
        needs_input: bool,
        /// The answer, if there is one already.
        stored: Option<Stored>,
    },
    /// The cloud does not take an answer that was given earlier.
    Disowned { handle: String, stored: Stored },
    /// The cloud has said something.
    Reply(WorkerReply),
    /// The connection is there, or gone.
    Online(bool),
    /// A program has said how far it is.
    Progress { handle: String, percent: u8 },
    /// A run is over; without an answer if it was stopped.
    Ended { handle: String, answer: Option<Answer> },
    /// The broker has taken an answer.
    Delivered { handle: String, number: u64 },
    /// An upload is over.
    Put { handle: String, number: u64, result: Result<(), String> },
    /// No new jobs, and those that run may end.
    Drain,
    /// Those that run may not even end.
    Abort,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, PartialEq)]
pub(crate) enum Action {
    /// Say this.
    Send { handle: String, message: WorkerMessage },
    /// Run the job.
    Start { handle: String, fence: u64, input_url: Option<String> },
    /// Stop the run; what has not ended after `grace` is killed.
    Stop { handle: String, why: &'static str, grace: Duration },
    /// Write the answer down before anything that follows.
    Record { handle: String, stored: Stored },
    /// Say this, and tell when the broker has taken it.
    Deliver { handle: String, number: u64, message: WorkerMessage },
    /// Upload the result.
    Put { handle: String, number: u64, url: String, headers: BTreeMap<String, String> },
    /// The job is over, and the journal needs it no more.
    Forget { handle: String },
}

/// Where chance comes from.
pub(crate) struct Chance {
    /// A new id for a request.
    pub(crate) request: Box<dyn FnMut() -> String + Send + Sync>,
    /// A time between nothing and this.
    pub(crate) jitter: Box<dyn FnMut(Duration) -> Duration + Send + Sync>,
}

/// All jobs that are not over.
pub(crate) struct Jobs {
    worker: WorkerName,
    slots: usize,
    chance: Chance,
    open: HashMap<String, Job>,
    /// Orders jobs and numbers deliveries and uploads.
    counter: u64,
    online: bool,
    draining: bool,
    aborted: bool,
}

struct Job {
    phase: Phase,
    /// Its place in the queue.
    turn: u64,
    needs_input: bool,
    /// The id of its claims.
    claim: String,
    /// Claims in a row that no reply came to.
    unanswered: u32,
    requests: VecDeque<Request>,
    lease: Option<Held>,
    /// Grants of leases that were lost or given back, and come late, are below this.
    least_fence: u64,
    progress: Option<u8>,
}

/// A request that was sent.
struct Request {
    id: String,
    /// When, the first time: nothing that the cloud counts begins earlier.
    sent: Instant,
    /// Of the lease that it was about; none for claims.
    fence: Option<u64>,
}

/// A lease of ours.
#[derive(Debug, Clone, Copy)]
struct Held {
    fence: u64,
    length: Duration,
    /// Until when nobody else can have it.
    deadline: Instant,
    heartbeat_at: Instant,
}

impl Held {
    fn new(fence: u64, length: Duration, deadline: Instant, now: Instant) -> Self {
        // A third of a fresh lease; at once if the lease is old already.
        let left = deadline.saturating_duration_since(now);
        Self { fence, length, deadline, heartbeat_at: now + left.saturating_sub(length * 2 / 3) }
    }

    /// When a program is told to end that has no newer lease, so that it is gone when this one is over.
    fn stops_at(&self) -> Option<Instant> {
        self.deadline.checked_sub(GRACE.min(self.length / 4))
    }

    fn is_used_up(&self, now: Instant) -> bool {
        self.stops_at().is_none_or(|at| at <= now)
    }
}

#[derive(Debug)]
enum Phase {
    /// For a slot, and for the time.
    Waiting { until: Instant },
    /// Has a slot.
    Claiming { again_at: Instant },
    /// Has a slot and a lease.
    Running,
    /// Has a slot until its program is gone.
    Stopping(After),
    /// Has an answer.
    Answering { stored: Stored, step: Step, failures: u32 },
}

/// What happens to a job whose program was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    ClaimAgain,
    Forget,
    Release,
}

/// How an answer is brought to the cloud.
#[derive(Debug)]
enum Step {
    /// The lease is another's, or nobody's.
    Claiming {
        again_at: Instant,
    },
    /// Asks where to put the result.
    Asking {
        request: String,
        again_at: Instant,
    },
    Putting {
        number: u64,
    },
    /// Before it asks again.
    Pausing {
        until: Instant,
    },
    Delivering {
        number: u64,
    },
}

impl Job {
    fn new(phase: Phase, turn: u64, needs_input: bool, claim: String) -> Self {
        let requests = VecDeque::new();
        Self { phase, turn, needs_input, claim, unanswered: 0, requests, lease: None, least_fence: 0, progress: None }
    }

    fn has_slot(&self) -> bool {
        matches!(self.phase, Phase::Claiming { .. } | Phase::Running | Phase::Stopping(_))
    }

    /// Remembers that a request is sent now, unless it is one that is said again.
    fn sends(&mut self, id: &str, fence: Option<u64>, now: Instant) {
        if self.request(Some(id)).is_none() {
            self.requests.truncate(REQUESTS - 1);
            self.requests.push_front(Request { id: id.to_owned(), sent: now, fence });
        }
    }

    fn request(&self, id: Option<&str>) -> Option<&Request> {
        self.requests.iter().find(|request| Some(request.id.as_str()) == id)
    }

    /// The largest fencing number that it has had.
    fn fence(&self) -> Option<u64> {
        let answered = match &self.phase {
            Phase::Answering { stored, .. } => Some(stored.fence),
            _ => None,
        };
        self.lease.map(|lease| lease.fence).max(answered)
    }

    /// When something is to be done about it next, if nothing happens before.
    fn wakes_at(&self, online: bool, draining: bool) -> Option<Instant> {
        let when_online = |at: Instant| online.then_some(at);
        let heartbeat = self.lease.and_then(|lease| when_online(lease.heartbeat_at));
        match &self.phase {
            Phase::Waiting { .. } | Phase::Stopping(_) => None,
            Phase::Claiming { again_at } => {
                if draining {
                    Some(*again_at)
                } else {
                    when_online(*again_at)
                }
            }
            Phase::Running => self.lease.and_then(|lease| lease.stops_at()).into_iter().chain(heartbeat).min(),
            Phase::Answering { step, .. } => match step {
                Step::Claiming { again_at } => when_online(*again_at),
                Step::Asking { again_at, .. } => when_online(*again_at).into_iter().chain(heartbeat).min(),
                Step::Pausing { until } => when_online(*until).into_iter().chain(heartbeat).min(),
                Step::Putting { .. } => heartbeat,
                Step::Delivering { .. } => None,
            },
        }
    }
}

impl Jobs {
    /// No jobs yet, of which so many may run at once.
    pub(crate) fn new(worker: WorkerName, slots: usize, chance: Chance) -> Self {
        let open = HashMap::new();
        Self { worker, slots, chance, open, counter: 0, online: false, draining: false, aborted: false }
    }

    /// Whether a job is not over.
    pub(crate) fn knows(&self, handle: &str) -> bool {
        self.open.contains_key(handle)
    }

    /// The handles of all jobs that are not over.
    pub(crate) fn handles(&self) -> Vec<String> {
        self.open.keys().cloned().collect()
    }

    /// Whether the worker can end: nothing runs, and no answer waits. After an abort answers stay in the journal.
    pub(crate) fn is_drained(&self) -> bool {
        let is_busy = |job: &Job| match job.phase {
            Phase::Waiting { .. } => false,
            Phase::Answering { .. } => !self.aborted,
            _ => true,
        };
        self.draining && !self.open.values().any(is_busy)
    }

    /// When [`Event::Tick`] is due, if nothing happens before.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        let due = self.open.values().filter_map(|job| job.wakes_at(self.online, self.draining)).min();
        let next_claim = if self.may_claim() {
            let waiting = self.open.values().filter_map(|job| match job.phase {
                Phase::Waiting { until } => Some(until),
                _ => None,
            });
            waiting.min()
        } else {
            None
        };
        due.into_iter().chain(next_claim).min()
    }

    /// Takes in what has happened; returns what is to be done, in this order.
    pub(crate) fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        // A lease that is over is over, whatever comes after it.
        self.end_leases(now, &mut actions);
        match event {
            Event::Received { handle, needs_input, stored } => {
                self.received(&handle, needs_input, stored, now, &mut actions);
            }
            Event::Disowned { handle, stored } => self.disowned(handle, stored, now),
            Event::Reply(reply) => self.reply(reply, now, &mut actions),
            Event::Online(online) => self.online = online,
            Event::Progress { handle, percent } => {
                if let Some(job) = self.open.get_mut(&handle) {
                    job.progress = Some(percent.min(100));
                }
            }
            Event::Ended { handle, answer } => self.ended(&handle, answer, now, &mut actions),
            Event::Delivered { handle, number } => self.delivered(handle, number, &mut actions),
            Event::Put { handle, number, result } => self.put(&handle, number, result, now, &mut actions),
            Event::Drain => self.drain(now),
            Event::Abort => self.abort(now, &mut actions),
            Event::Tick => {}
        }
        self.do_what_is_due(now, &mut actions);
        actions
    }

    fn next_number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn received(
        &mut self,
        handle: &str,
        needs_input: bool,
        stored: Option<Stored>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        if self.knows(handle) {
            return;
        }
        let (turn, claim) = (self.next_number(), (self.chance.request)());
        self.open.insert(handle.to_owned(), Job::new(Phase::Waiting { until: now }, turn, needs_input, claim));
        if let Some(stored) = stored {
            self.bring(handle, stored, 0, now, actions);
        }
    }

    fn disowned(&mut self, handle: String, stored: Stored, now: Instant) {
        if self.knows(&handle) {
            return;
        }
        let (turn, claim) = (self.next_number(), (self.chance.request)());
        let phase = Phase::Answering { stored, step: Step::Claiming { again_at: now }, failures: 0 };
        self.open.insert(handle, Job::new(phase, turn, false, claim));
    }

    fn reply(&mut self, reply: WorkerReply, now: Instant, actions: &mut Vec<Action>) {
        let WorkerReply { task_token: handle, request, verdict } = reply;
        if !self.knows(&handle) {
            return;
        }
        let request = request.as_deref();
        match verdict {
            Verdict::Granted { fence, lease_milliseconds, input_url } => {
                let length = Duration::from_millis(lease_milliseconds);
                self.granted(&handle, request, (fence, length), input_url, now, actions);
            }
            Verdict::Held { retry_milliseconds } => {
                self.held(&handle, request, Duration::from_millis(retry_milliseconds), now);
            }
            Verdict::Lost => self.lost(&handle, request, now, actions),
            Verdict::Over if request.is_none_or(|request| self.has_asked(&handle, request)) => {
                self.over(handle, now, actions);
            }
            // Of an earlier process, or of the job as it was before it came again.
            Verdict::Over => {}
            Verdict::Upload { url, headers } => self.upload(&handle, request, url, headers, actions),
            Verdict::TooLarge { limit } => self.too_large(&handle, request, limit, now, actions),
        }
    }

    fn granted(
        &mut self,
        handle: &str,
        request: Option<&str>,
        (fence, length): (u64, Duration),
        input_url: Option<String>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let has_slot = self.has_free_slot();
        let new_claim = (self.chance.request)();
        let Some(job) = self.open.get_mut(handle) else { return };
        if fence < job.least_fence.max(job.fence().unwrap_or_default()) {
            return;
        }
        // A request of an earlier process may be old, and somebody else at the job by now: a new claim is granted at once.
        let Some(deadline) = job.request(request).map(|request| request.sent + length) else { return };
        let lease = Held::new(fence, length, deadline, now);
        let runs_again = |job: &Job| matches!(job.phase, Phase::Waiting { .. } | Phase::Claiming { .. });
        if lease.is_used_up(now) {
            // Too late to be used. The same claim would be as late.
            let is_claim = job.claim_is(request);
            match (&job.phase, &mut job.lease) {
                (Phase::Claiming { .. }, _) if is_claim => {
                    job.claim = new_claim;
                    job.phase = Phase::Waiting { until: now + BREATH };
                }
                // An old claim has come to the cloud after all: the lease has another number, and no other end.
                (Phase::Running, Some(held)) => held.fence = held.fence.max(fence),
                _ => {}
            }
        } else if runs_again(job) && self.draining {
            job.phase = Phase::Waiting { until: now };
            actions.push(job.release(handle, &self.worker, fence));
        } else {
            match &mut job.phase {
                // Only a claim's reply says where the input is.
                Phase::Waiting { .. } | Phase::Claiming { .. } if job.needs_input && input_url.is_none() => {}
                Phase::Waiting { .. } if !has_slot => actions.push(job.release(handle, &self.worker, fence)),
                Phase::Waiting { .. } | Phase::Claiming { .. } => {
                    job.lease = Some(lease);
                    job.unanswered = 0;
                    job.phase = Phase::Running;
                    actions.push(Action::Start { handle: handle.to_owned(), fence, input_url });
                }
                Phase::Running => job.renew(lease),
                Phase::Stopping(_) => {}
                Phase::Answering { stored, step, .. } => {
                    let is_claim = matches!(step, Step::Claiming { .. });
                    if fence > stored.fence || is_claim {
                        let stored = Stored { fence, uploaded: false, delivered: false, ..stored.clone() };
                        job.lease = Some(lease);
                        actions.push(Action::Record { handle: handle.to_owned(), stored: stored.clone() });
                        self.bring(handle, stored, 0, now, actions);
                    } else {
                        job.renew(lease);
                    }
                }
            }
        }
    }

    fn held(&mut self, handle: &str, request: Option<&str>, retry: Duration, now: Instant) {
        let until = now + retry + (self.chance.jitter)(JITTER);
        let new_claim = (self.chance.request)();
        let Some(job) = self.open.get_mut(handle) else { return };
        if !job.claim_is(request) {
            return;
        }
        match &mut job.phase {
            Phase::Claiming { .. } | Phase::Waiting { .. } => job.phase = Phase::Waiting { until },
            Phase::Answering { step: Step::Claiming { again_at }, .. } => *again_at = until,
            _ => return,
        }
        // The next claim is another request: its lease is counted from when that is sent.
        job.claim = new_claim;
        job.unanswered = 0;
    }

    fn lost(&mut self, handle: &str, request: Option<&str>, now: Instant, actions: &mut Vec<Action>) {
        let new_claim = (self.chance.request)();
        let Some(job) = self.open.get_mut(handle) else { return };
        let is_of_a_claim = job.claim_is(request);
        // Replies to answers name no request.
        let is_of_our_lease = match job.request(request) {
            Some(request) => request.fence.is_some() && request.fence == job.fence(),
            None => matches!(job.phase, Phase::Answering { .. }),
        };
        if is_of_our_lease && let Some(fence) = job.fence() {
            job.least_fence = fence + 1;
        }
        match &mut job.phase {
            Phase::Running if is_of_our_lease => {
                job.claim = new_claim;
                // Somebody else may run it already, whatever our clock says.
                job.lease = None;
                job.stop(handle, After::ClaimAgain, "the cloud says that the lease is lost", now, actions);
            }
            Phase::Claiming { .. } if is_of_a_claim => {
                job.claim = new_claim;
                job.phase = Phase::Waiting { until: now + BREATH };
            }
            Phase::Answering { step, .. } if is_of_our_lease && !matches!(step, Step::Claiming { .. }) => {
                *step = Step::Claiming { again_at: now };
                job.claim = new_claim;
                job.lease = None;
            }
            _ => {}
        }
    }

    fn over(&mut self, handle: String, now: Instant, actions: &mut Vec<Action>) {
        let Some(job) = self.open.get_mut(&handle) else { return };
        match &mut job.phase {
            Phase::Running => job.stop(&handle, After::Forget, "the cloud says that the job is over", now, actions),
            Phase::Stopping(after) => *after = After::Forget,
            Phase::Waiting { .. } | Phase::Claiming { .. } => {
                self.open.remove(&handle);
                actions.push(Action::Forget { handle });
            }
            Phase::Answering { stored, .. } => {
                let stored = Stored { delivered: true, ..stored.clone() };
                self.open.remove(&handle);
                actions.push(Action::Record { handle, stored });
            }
        }
    }

    fn upload(
        &mut self,
        handle: &str,
        request: Option<&str>,
        url: String,
        headers: BTreeMap<String, String>,
        actions: &mut Vec<Action>,
    ) {
        let number = self.next_number();
        let Some(step) = self.asking_step(handle, request) else { return };
        *step = Step::Putting { number };
        actions.push(Action::Put { handle: handle.to_owned(), number, url, headers });
    }

    fn too_large(&mut self, handle: &str, request: Option<&str>, limit: u64, now: Instant, actions: &mut Vec<Action>) {
        if self.asking_step(handle, request).is_none() {
            return;
        }
        if let Some(Phase::Answering { stored: Stored { answer: Answer::Large { bytes }, fence, .. }, .. }) =
            self.open.get(handle).map(|job| &job.phase)
        {
            let cause = format!("the result has {bytes} bytes, at most {limit} are taken");
            let stored = Stored::new(Failure::new("ResultTooLarge", cause).into(), *fence);
            self.answer(handle, stored, now, actions);
        }
    }

    /// Whether the request is one of this process about the job as it is now.
    fn has_asked(&mut self, handle: &str, request: &str) -> bool {
        let is_asking = self.asking_step(handle, Some(request)).is_some();
        is_asking || self.open.get(handle).is_some_and(|job| job.request(Some(request)).is_some())
    }

    fn asking_step(&mut self, handle: &str, request: Option<&str>) -> Option<&mut Step> {
        match &mut self.open.get_mut(handle)?.phase {
            Phase::Answering { step, .. } => match step {
                Step::Asking { request: asked, .. } if Some(asked.as_str()) == request => Some(step),
                _ => None,
            },
            _ => None,
        }
    }

    fn ended(&mut self, handle: &str, answer: Option<Answer>, now: Instant, actions: &mut Vec<Action>) {
        let Some(job) = self.open.get_mut(handle) else { return };
        let fence = job.fence().unwrap_or_default();
        let after = match job.phase {
            Phase::Running => None,
            Phase::Stopping(after) => Some(after),
            _ => return,
        };
        match (after, answer) {
            (Some(After::Forget), _) => {
                self.open.remove(handle);
                actions.push(Action::Forget { handle: handle.to_owned() });
            }
            // It was done before it could be stopped, and what came of it is good: nobody needs to run the job again.
            (Some(After::ClaimAgain), Some(answer)) => {
                let stored = Stored::new(answer, fence);
                actions.push(Action::Record { handle: handle.to_owned(), stored: stored.clone() });
                job.lease = None;
                job.phase = Phase::Answering { stored, step: Step::Claiming { again_at: now }, failures: 0 };
            }
            (_, Some(answer)) => self.answer(handle, Stored::new(answer, fence), now, actions),
            (Some(After::Release), None) => {
                job.lease = None;
                job.phase = Phase::Waiting { until: now };
                actions.push(job.release(handle, &self.worker, fence));
            }
            (_, None) => {
                job.lease = None;
                job.progress = None;
                job.phase = Phase::Waiting { until: now };
            }
        }
    }

    /// Writes a new answer down and brings it.
    fn answer(&mut self, handle: &str, stored: Stored, now: Instant, actions: &mut Vec<Action>) {
        actions.push(Action::Record { handle: handle.to_owned(), stored: stored.clone() });
        self.bring(handle, stored, 0, now, actions);
    }

    /// Begins to bring an answer, under the lease that it names.
    fn bring(&mut self, handle: &str, stored: Stored, failures: u32, now: Instant, actions: &mut Vec<Action>) {
        let (number, request) = (self.next_number(), (self.chance.request)());
        let Some(job) = self.open.get_mut(handle) else { return };
        let lease = Lease { worker: self.worker.clone(), fence: stored.fence };
        let step = match &stored.answer {
            Answer::Large { .. } if !stored.uploaded => Step::Asking { request, again_at: now },
            answer => {
                let message = message(answer, lease);
                actions.push(Action::Deliver { handle: handle.to_owned(), number, message });
                Step::Delivering { number }
            }
        };
        job.phase = Phase::Answering { stored, step, failures };
    }

    fn delivered(&mut self, handle: String, number: u64, actions: &mut Vec<Action>) {
        let Some(Phase::Answering { stored, step: Step::Delivering { number: current }, .. }) =
            self.open.get(&handle).map(|job| &job.phase)
        else {
            return;
        };
        if *current == number {
            let stored = Stored { delivered: true, ..stored.clone() };
            self.open.remove(&handle);
            actions.push(Action::Record { handle, stored });
        }
    }

    fn put(&mut self, handle: &str, number: u64, result: Result<(), String>, now: Instant, actions: &mut Vec<Action>) {
        let pause = LONGEST_UPLOAD_PAUSE;
        let Some(Phase::Answering { stored, step, failures }) = self.open.get_mut(handle).map(|job| &mut job.phase)
        else {
            return;
        };
        if !matches!(step, Step::Putting { number: current } if *current == number) {
            return;
        }
        match result {
            Ok(()) => {
                let stored = Stored { uploaded: true, ..stored.clone() };
                self.answer(handle, stored, now, actions);
            }
            Err(why) if *failures + 1 >= UPLOAD_ATTEMPTS => {
                let cause = format!("the result could not be uploaded {UPLOAD_ATTEMPTS} times: {why}");
                let stored = Stored::new(Failure::new("UploadFailed", cause).into(), stored.fence);
                self.answer(handle, stored, now, actions);
            }
            Err(_) => {
                *step = Step::Pausing { until: now + pause.min(Duration::from_secs(1 << *failures)) };
                *failures += 1;
            }
        }
    }

    fn drain(&mut self, now: Instant) {
        self.draining = true;
        for job in self.open.values_mut() {
            if let Phase::Claiming { again_at } = &mut job.phase {
                *again_at = (*again_at).min(now + DRAIN_PATIENCE);
            }
        }
    }

    fn abort(&mut self, now: Instant, actions: &mut Vec<Action>) {
        (self.draining, self.aborted) = (true, true);
        for (handle, job) in &mut self.open {
            match &mut job.phase {
                Phase::Running => job.stop(handle, After::Release, "the worker ends", now, actions),
                Phase::Claiming { again_at } => job.phase = Phase::Waiting { until: *again_at },
                _ => {}
            }
        }
    }

    /// Stops what runs without a lease.
    fn end_leases(&mut self, now: Instant, actions: &mut Vec<Action>) {
        for (handle, job) in &mut self.open {
            let is_over = job.lease.is_some_and(|lease| lease.is_used_up(now));
            if is_over && matches!(job.phase, Phase::Running) {
                job.claim = (self.chance.request)();
                job.stop(handle, After::ClaimAgain, "the lease runs out", now, actions);
            }
        }
    }

    fn do_what_is_due(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let is_due = |job: &Job| job.wakes_at(self.online, self.draining).is_some_and(|at| at <= now);
        let due: Vec<_> = self.open.iter().filter(|(_, job)| is_due(job)).map(|(handle, _)| handle.clone()).collect();
        for handle in due {
            self.continue_job(&handle, now, actions);
            self.beat(&handle, now, actions);
        }
        while self.may_claim()
            && let Some(handle) = self.next_in_turn(now)
        {
            self.claim_first(&handle, now, actions);
        }
    }

    fn next_in_turn(&self, now: Instant) -> Option<String> {
        let may_begin = |job: &Job| matches!(job.phase, Phase::Waiting { until } if until <= now);
        let first = self.open.iter().filter(|(_, job)| may_begin(job)).min_by_key(|(_, job)| job.turn);
        first.map(|(handle, _)| handle.clone())
    }

    fn may_claim(&self) -> bool {
        self.online && !self.draining && self.has_free_slot()
    }

    fn has_free_slot(&self) -> bool {
        self.open.values().filter(|job| job.has_slot()).count() < self.slots
    }

    fn claim_first(&mut self, handle: &str, now: Instant, actions: &mut Vec<Action>) {
        let again_at = now + PATIENCE + (self.chance.jitter)(JITTER);
        let Some(job) = self.open.get_mut(handle) else { return };
        job.phase = Phase::Claiming { again_at };
        actions.push(claim(handle, &self.worker, job, now));
    }

    /// Says again what was not answered, and what is due.
    fn continue_job(&mut self, handle: &str, now: Instant, actions: &mut Vec<Action>) {
        let next_ask = now + PATIENCE + (self.chance.jitter)(JITTER);
        let (next_turn, new_request) = (self.next_number(), (self.chance.request)());
        let Some(job) = self.open.get_mut(handle) else { return };
        match &mut job.phase {
            Phase::Claiming { again_at } if *again_at <= now && self.draining => {
                job.phase = Phase::Waiting { until: now };
            }
            Phase::Claiming { again_at } if *again_at <= now && self.online => {
                job.unanswered += 1;
                if job.unanswered < UNANSWERED_CLAIMS {
                    *again_at = next_ask;
                    actions.push(claim(handle, &self.worker, job, now));
                } else {
                    job.unanswered = 0;
                    job.turn = next_turn;
                    job.phase = Phase::Waiting { until: now };
                }
            }
            Phase::Answering { step, stored, .. } if self.online => {
                let fence = stored.fence;
                match (step, &stored.answer) {
                    (Step::Claiming { again_at }, _) if *again_at <= now => {
                        *again_at = next_ask;
                        actions.push(claim(handle, &self.worker, job, now));
                    }
                    (step @ Step::Pausing { .. }, Answer::Large { bytes }) => {
                        if matches!(step, Step::Pausing { until } if *until <= now) {
                            let bytes = *bytes;
                            *step = Step::Asking { request: new_request.clone(), again_at: next_ask };
                            actions.push(ask(handle, &self.worker, job, (&new_request, fence, bytes), now));
                        }
                    }
                    (Step::Asking { request, again_at }, Answer::Large { bytes }) if *again_at <= now => {
                        let (request, bytes) = (request.clone(), *bytes);
                        *again_at = next_ask;
                        actions.push(ask(handle, &self.worker, job, (&request, fence, bytes), now));
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// Sends the heartbeat if it is due.
    fn beat(&mut self, handle: &str, now: Instant, actions: &mut Vec<Action>) {
        let request = (self.chance.request)();
        let Some(job) = self.open.get_mut(handle) else { return };
        let is_needed = match &job.phase {
            Phase::Running => true,
            Phase::Answering { step, .. } => {
                matches!(step, Step::Asking { .. } | Step::Putting { .. } | Step::Pausing { .. })
            }
            _ => false,
        };
        let Some(lease) = job.lease.as_mut().filter(|lease| lease.heartbeat_at <= now && is_needed && self.online)
        else {
            return;
        };
        lease.heartbeat_at = now + (lease.length / 3).max(SHORTEST_HEARTBEAT);
        let fence = lease.fence;
        job.sends(&request, Some(fence), now);
        let lease = Some((Lease { worker: self.worker.clone(), fence }, request));
        let message = WorkerMessage::Heartbeat { progress: job.progress, lease };
        actions.push(Action::Send { handle: handle.to_owned(), message });
    }
}

impl Job {
    fn claim_is(&self, request: Option<&str>) -> bool {
        request == Some(self.claim.as_str())
    }

    fn renew(&mut self, new: Held) {
        match &mut self.lease {
            Some(lease) if lease.fence == new.fence => {
                lease.deadline = lease.deadline.max(new.deadline);
                lease.length = new.length;
            }
            lease => *lease = Some(new),
        }
    }

    fn release(&mut self, handle: &str, worker: &WorkerName, fence: u64) -> Action {
        self.least_fence = fence + 1;
        let message = WorkerMessage::Release(Lease { worker: worker.clone(), fence });
        Action::Send { handle: handle.to_owned(), message }
    }

    /// Stops the run. Beyond the lease another worker may run the job, so nothing is left of it by then.
    fn stop(&mut self, handle: &str, after: After, why: &'static str, now: Instant, actions: &mut Vec<Action>) {
        self.phase = Phase::Stopping(after);
        let left = self.lease.map_or(Duration::ZERO, |lease| lease.deadline.saturating_duration_since(now));
        actions.push(Action::Stop { handle: handle.to_owned(), why, grace: left.min(GRACE) });
    }
}

fn claim(handle: &str, worker: &WorkerName, job: &mut Job, now: Instant) -> Action {
    let request = job.claim.clone();
    job.sends(&request, None, now);
    Action::Send { handle: handle.to_owned(), message: WorkerMessage::Claim { worker: worker.clone(), request } }
}

fn ask(
    handle: &str,
    worker: &WorkerName,
    job: &mut Job,
    (request, fence, bytes): (&str, u64, u64),
    now: Instant,
) -> Action {
    job.sends(request, Some(fence), now);
    let lease = Lease { worker: worker.clone(), fence };
    let message = WorkerMessage::Upload { lease, request: request.to_owned(), bytes };
    Action::Send { handle: handle.to_owned(), message }
}

/// The message that gives an answer.
pub(crate) fn message(answer: &Answer, lease: Lease) -> WorkerMessage {
    let lease = Some(lease);
    match answer.clone() {
        Answer::Value(value) => WorkerMessage::Succeeded { result: WorkerResult::Value(value), lease },
        Answer::Large { bytes } => WorkerMessage::Succeeded { result: WorkerResult::Object { bytes }, lease },
        Answer::Failed { exception, cause } => WorkerMessage::Failed { exception, cause, lease },
    }
}

#[cfg(test)]
mod tests;
