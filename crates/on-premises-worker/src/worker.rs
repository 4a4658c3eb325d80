//! The worker at work: what the module `jobs` decides, done over MQTT, on disk and with programs.

use crate::clock::Clock;
use crate::config::Config;
use crate::jobs::{Action, Answer, Chance, Event, Jobs, Stored, message};
use crate::journal::{Entry, Journal};
use crate::transfer::Transfers;
use crate::{Failure, GRACE, Outcome, beginning, handlers};
use mqtt_connection::{Connection, ConnectionSettings, Delivery, Trust};
use protocol::on_premises::{JobMessage, Lease, Verdict, WorkerMessage, WorkerReply, jobs_topic, replies_topic};
use protocol::{HandlerName, JsonText, MAX_PAYLOAD_BYTES, Publication};
use rand::RngExt;
use rustls::ClientConfig;
use std::collections::{BTreeMap, HashMap};
use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::MissedTickBehavior;
use tokio::{select, time};
use tracing::Instrument;

/// Room in a message for what is not the result.
const SPARE_BYTES: usize = 1024;
/// How often old entries are looked for.
const PRUNING: Duration = Duration::from_hours(24);
/// How often it is looked whether the machine was suspended.
const WATCH: Duration = Duration::from_secs(1);
/// How long a job waits for a disk that takes nothing.
const DISK_RETRY: Duration = Duration::from_secs(10);
/// How long the last messages may take.
const FAREWELL: Duration = Duration::from_secs(5);
/// So many characters of a handle are logged: with all of them one could answer the job.
const SHOWN_CHARACTERS: usize = 12;

/// Why a worker could not run.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RunError(String);

/// The worker's TLS settings. Fails if a certificate or the key cannot be used, or if everybody can read the key.
pub fn tls(config: &Config) -> Result<Arc<ClientConfig>, RunError> {
    config.check_private_key().map_err(RunError)?;
    mqtt_connection::install_crypto_provider();
    let trust = Trust::new(config.ca.as_deref()).map_err(RunError)?;
    let settings = trust.of_client(&config.certificate, &config.private_key, config.endpoint.port);
    settings.map_err(|error| RunError(error.to_string()))
}

/// Runs jobs until SIGTERM or SIGINT, and then those that run already to their end.
pub async fn run(config: Config) -> Result<(), RunError> {
    let tls = tls(&config)?;
    let transfers = Transfers::new(config.ca.as_deref(), config.storage.clone()).map_err(RunError)?;
    let journal = Journal::open(&config.journal).map_err(|error| RunError(error.to_string()))?;
    config
        .make_working_folder()
        .map_err(|error| RunError(format!("no working folder in {}: {error}", config.journal.display())))?;
    if config.storage.is_none() {
        tracing::warn!(
            "no `storage` is configured: inputs and results that are too large for a message fail their jobs"
        );
    }
    for (handler, program) in &config.handlers {
        if let Err(why) = program.locate() {
            tracing::warn!(%handler, "jobs of this handler will fail: {why}");
        }
    }
    let signals = signals().map_err(|error| RunError(format!("signals cannot be received: {error}")))?;
    let (connection, inbox) = Connection::open(Arc::new(settings(&config, tls)));
    let (tenant, worker, endpoint) = (&config.tenant, &config.worker, &config.endpoint);
    tracing::info!(%tenant, %worker, %endpoint, client = config.client_id, "the worker begins");
    Worker::new(config, connection, transfers, journal).run(inbox, signals).await;
    tracing::info!("the worker has ended");
    Ok(())
}

fn settings(config: &Config, tls: Arc<ClientConfig>) -> ConnectionSettings {
    ConnectionSettings {
        client_id: config.client_id.clone(),
        endpoint: config.endpoint.clone(),
        tls,
        clean_session: false,
        filters: vec![jobs_topic(&config.tenant), replies_topic(&config.tenant, &config.worker)],
        handshakes: Arc::new(Semaphore::new(1)),
        on_failure: Box::new(|why| tracing::warn!("no connection: {why}")),
    }
}

/// Tells of each SIGTERM and SIGINT.
fn signals() -> io::Result<mpsc::UnboundedReceiver<()>> {
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            select! {
                _ = terminated.recv() => {}
                _ = interrupted.recv() => {}
            }
            if sender.send(()).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// What the worker's own tasks tell it.
enum Happening {
    /// A run is over.
    Ended {
        handle: String,
        outcome: Option<Outcome>,
    },
    Event(Event),
}

/// A job that runs.
struct Run {
    /// Stops the run, within the time that is sent.
    stop: Option<oneshot::Sender<Duration>>,
    handler: HandlerName,
    fence: u64,
    began: Instant,
}

struct Worker {
    config: Arc<Config>,
    clock: Clock,
    /// The wall clock.
    wall: Box<dyn Fn() -> SystemTime + Send + Sync>,
    jobs: Jobs,
    journal: Arc<Journal>,
    transfers: Transfers,
    connection: Arc<Connection>,
    is_connected: bool,
    runs: HashMap<String, Run>,
    happenings: mpsc::UnboundedSender<Happening>,
    inbox_of_tasks: mpsc::UnboundedReceiver<Happening>,
    messages: JoinSet<()>,
    /// Jobs that the disk did not take: the broker keeps them.
    unwritten: Vec<Delivery>,
    /// When the patience with what runs is at its end.
    drain_deadline: Option<Instant>,
}

impl Worker {
    fn new(config: Config, connection: Connection, transfers: Transfers, journal: Journal) -> Self {
        let (happenings, inbox_of_tasks) = mpsc::unbounded_channel();
        Self {
            jobs: Jobs::new(config.worker.clone(), config.concurrency, chance()),
            clock: Clock::new(now(), SystemTime::now()),
            wall: Box::new(SystemTime::now),
            config: Arc::new(config),
            journal: Arc::new(journal),
            transfers,
            connection: Arc::new(connection),
            is_connected: false,
            runs: HashMap::new(),
            happenings,
            inbox_of_tasks,
            messages: JoinSet::new(),
            unwritten: Vec::new(),
            drain_deadline: None,
        }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Delivery>, mut signals: mpsc::UnboundedReceiver<()>) {
        let mut online = self.connection.online();
        let mut pruning = time::interval(PRUNING);
        let mut disk = time::interval(DISK_RETRY);
        let mut watch = time::interval(WATCH);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Before the first job comes, so that one that is known is not taken for new.
        self.resume(&mut pruning).await;
        while !self.jobs.is_drained() {
            select! {
                Some(delivery) = inbox.recv() => self.take(delivery).await,
                Some(happening) = self.inbox_of_tasks.recv() => self.happened(happening).await,
                Ok(()) = online.changed() => self.connection_changed(&mut online).await,
                () = at(self.jobs.wakes_at().map(|time| self.clock.timer(time))) => self.on(Event::Tick).await,
                // Timers stand still while the machine is suspended: a lease may be over before one of them fires.
                _ = watch.tick() => self.on(Event::Tick).await,
                () = at(self.drain_deadline) => self.abort("the drain timeout is over").await,
                Some(()) = signals.recv() => self.told_to_end().await,
                _ = pruning.tick() => self.prune().await,
                _ = disk.tick(), if !self.unwritten.is_empty() => self.retry_unwritten().await,
            }
        }
        self.leave(online).await;
    }

    /// Takes up what an earlier process has left.
    async fn resume(&mut self, pruning: &mut time::Interval) {
        pruning.tick().await;
        self.prune().await;
        let entries = match self.on_disk(Journal::entries).await {
            Ok(entries) => entries,
            Err(error) => return tracing::error!("the journal cannot be read: {error}"),
        };
        for Entry { job, stored, .. } in entries {
            if stored.as_ref().is_some_and(|stored| stored.delivered) {
                continue;
            }
            tracing::info!(job = shown(&job.task_token), answered = stored.is_some(), "the job is taken up again");
            self.on(received(&job, stored)).await;
        }
    }

    async fn prune(&mut self) {
        let (age, kept) = (self.config.journal_age, self.jobs.handles());
        match self.on_disk(move |journal| journal.prune(age, &kept)).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "old jobs were removed from the journal"),
            Err(error) => tracing::error!("the journal cannot be pruned: {error}"),
        }
    }

    async fn connection_changed(&mut self, online: &mut watch::Receiver<bool>) {
        let online = *online.borrow_and_update();
        // Each attempt that fails says the same again.
        if std::mem::replace(&mut self.is_connected, online) == online {
            return;
        }
        tracing::info!(online, "the connection has changed");
        self.on(Event::Online(online)).await;
    }

    async fn told_to_end(&mut self) {
        if self.drain_deadline.is_some() {
            return self.abort("told to end at once").await;
        }
        let (running, timeout) = (self.runs.len(), humantime::format_duration(self.config.drain_timeout));
        tracing::info!(running, %timeout, "told to end: no new jobs, those that run may end");
        self.drain_deadline = Some(Instant::now() + self.config.drain_timeout);
        self.on(Event::Drain).await;
    }

    async fn abort(&mut self, why: &str) {
        tracing::warn!(running = self.runs.len(), "{why}: what runs is stopped and given back");
        // Only once.
        self.drain_deadline = Some(Instant::now() + Duration::from_hours(24));
        self.on(Event::Abort).await;
    }

    /// Says what is still to be said, and goodbye.
    async fn leave(mut self, mut online: watch::Receiver<bool>) {
        let flushed = time::timeout(FAREWELL, async { while self.messages.join_next().await.is_some() {} }).await;
        if flushed.is_err() {
            tracing::warn!("not all messages could be sent; answers are in the journal");
        }
        self.connection.leave(Duration::from_hours(1));
        // Without a connection there is nothing to wait for.
        let _ = time::timeout(Duration::from_secs(2), online.wait_for(|online| !online)).await;
    }

    async fn take(&mut self, delivery: Delivery) {
        if delivery.topic() == replies_topic(&self.config.tenant, &self.config.worker) {
            let reply = WorkerReply::decode(delivery.payload());
            delivery.acknowledge();
            return match reply {
                Ok(reply) => self.replied(reply).await,
                Err(error) => tracing::warn!("a reply cannot be read and is dropped: {error}"),
            };
        }
        if self.drain_deadline.is_some() {
            // The broker keeps it for the next process.
            return;
        }
        match JobMessage::decode(delivery.payload()) {
            Ok(job) => match self.receive(job).await {
                Ok(()) => delivery.acknowledge(),
                Err(error) => {
                    tracing::error!("a job cannot be written down and is not taken yet: {error}");
                    self.unwritten.push(delivery);
                }
            },
            Err(error) => {
                tracing::warn!("a job cannot be read and is dropped: {error}");
                delivery.acknowledge();
            }
        }
    }

    async fn retry_unwritten(&mut self) {
        for delivery in std::mem::take(&mut self.unwritten) {
            self.take(delivery).await;
        }
    }

    /// Writes a job down if it is new. Fails if the disk does.
    async fn receive(&mut self, job: JobMessage) -> io::Result<()> {
        let (handle, message) = (job.task_token.clone(), job.clone());
        if self.jobs.knows(&handle) {
            tracing::debug!(job = shown(&handle), "the job came again");
            return Ok(());
        }
        let known = self
            .on_disk(move |journal| match journal.get(&message.task_token)? {
                None => journal.put(&Entry::new(message)).map(|()| None),
                known => Ok(known),
            })
            .await?;
        let stored = known.and_then(|entry| entry.stored);
        tracing::info!(job = shown(&handle), answered = stored.is_some(), "a job came");
        self.on(received(&job, stored)).await;
        Ok(())
    }

    async fn replied(&mut self, reply: WorkerReply) {
        let handle = &reply.task_token;
        tracing::debug!(job = shown(handle), verdict = verdict(&reply.verdict), "the cloud says");
        if self.jobs.knows(handle) {
            return self.on(Event::Reply(reply)).await;
        }
        if reply.verdict != Verdict::Lost {
            return;
        }
        let handle = reply.task_token;
        let key = handle.clone();
        match self.on_disk(move |journal| journal.get(&key)).await {
            Ok(Some(Entry { stored: Some(stored), .. })) => self.on(Event::Disowned { handle, stored }).await,
            Ok(_) => {}
            Err(error) => tracing::error!(job = shown(&handle), "the journal cannot be read: {error}"),
        }
    }

    async fn happened(&mut self, happening: Happening) {
        let event = match happening {
            Happening::Event(event) => event,
            Happening::Ended { handle, outcome } => self.ended(handle, outcome).await,
        };
        self.on(event).await;
    }

    async fn ended(&mut self, handle: String, outcome: Option<Outcome>) -> Event {
        if let Some(run) = self.runs.remove(&handle) {
            let (job, handler, fence) = (shown(&handle), run.handler, run.fence);
            let seconds = run.began.elapsed().as_secs_f64();
            match &outcome {
                Some(Ok(_)) => tracing::info!(job, %handler, fence, seconds, outcome = "succeeded", "the run is over"),
                Some(Err(Failure { exception, cause })) => {
                    let cause = cause.as_deref();
                    tracing::warn!(job, %handler, fence, seconds, outcome = "failed", exception, cause, "the run is over");
                }
                None => tracing::warn!(job, %handler, fence, seconds, outcome = "stopped", "the run is over"),
            }
        }
        let answer = match outcome {
            Some(outcome) => Some(self.answer(&handle, outcome).await),
            None => None,
        };
        Event::Ended { handle, answer }
    }

    /// The outcome in a form that fits into a message; what does not fit is on disk.
    async fn answer(&self, handle: &str, outcome: Outcome) -> Answer {
        let value = match outcome {
            Ok(value) => value,
            Err(failure) => return failure.into(),
        };
        let bytes = value.get().as_bytes().to_owned();
        let answer = Answer::Value(value);
        let lease = Lease { worker: self.config.worker.clone(), fence: u64::MAX };
        let encoded = message(&answer, lease).encode(&self.config.tenant, handle);
        if encoded.payload.len() + SPARE_BYTES <= MAX_PAYLOAD_BYTES {
            return answer;
        }
        let (length, key) = (bytes.len() as u64, handle.to_owned());
        match self.on_disk(move |journal| journal.put_result(&key, &bytes)).await {
            Ok(()) => Answer::Large { bytes: length },
            Err(error) => {
                Failure::new("JournalFailed", format!("the result of {length} bytes cannot be kept: {error}")).into()
            }
        }
    }

    async fn on(&mut self, event: Event) {
        let now = self.clock.now(now(), (self.wall)());
        for action in self.jobs.handle(event, now) {
            self.act(action).await;
        }
        while self.messages.try_join_next().is_some() {}
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Send { handle, message } => self.send(&handle, &message),
            Action::Deliver { handle, number, message } => self.deliver(handle, number, &message),
            Action::Start { handle, fence, input_url } => self.start(handle, fence, input_url).await,
            Action::Stop { handle, why, grace } => {
                if let Some(run) = self.runs.get_mut(&handle) {
                    tracing::warn!(job = shown(&handle), handler = %run.handler, fence = run.fence, ?grace, "stopped: {why}");
                    // Nobody receives when the run is over.
                    let _ = run.stop.take().map(|stop| stop.send(grace));
                }
            }
            Action::Record { handle, stored } => {
                let key = handle.clone();
                if let Err(error) = self.on_disk(move |journal| journal.record(&key, stored)).await {
                    // The answer is better given than lost.
                    tracing::error!(job = shown(&handle), "the answer cannot be written down: {error}");
                }
            }
            Action::Put { handle, number, url, headers } => self.put(handle, number, url, headers),
            Action::Forget { handle } => {
                tracing::info!(job = shown(&handle), "the job is over");
                let key = handle.clone();
                if let Err(error) = self.on_disk(move |journal| journal.remove(&key)).await {
                    tracing::error!(job = shown(&handle), "the job cannot be removed from the journal: {error}");
                }
            }
        }
    }

    fn send(&mut self, handle: &str, message: &WorkerMessage) {
        tracing::debug!(job = shown(handle), message = kind(message), "sent");
        let publication = message.encode(&self.config.tenant, handle);
        self.publish(publication, None);
    }

    fn deliver(&mut self, handle: String, number: u64, message: &WorkerMessage) {
        tracing::info!(job = shown(&handle), answer = kind(message), "answered");
        let publication = message.encode(&self.config.tenant, &handle);
        self.publish(publication, Some(Event::Delivered { handle, number }));
    }

    /// Sends a message without waiting for it; the event comes once the broker has it.
    fn publish(&mut self, publication: Publication, then: Option<Event>) {
        let (connection, happenings) = (Arc::clone(&self.connection), self.happenings.clone());
        self.messages.spawn(async move {
            connection.publish(publication).await;
            if let Some(event) = then {
                // The worker has gone when nobody receives.
                let _ = happenings.send(Happening::Event(event));
            }
        });
    }

    async fn start(&mut self, handle: String, fence: u64, input_url: Option<String>) {
        let key = handle.clone();
        let job = match self.on_disk(move |journal| journal.get(&key)).await {
            Ok(Some(entry)) => entry.job,
            other => {
                let why = other.err().map_or_else(|| "it is not there".to_owned(), |error| error.to_string());
                let failure = Failure::new("JournalFailed", format!("the job cannot be read back: {why}"));
                // The worker itself receives.
                let _ = self.happenings.send(Happening::Ended { handle, outcome: Some(Err(failure)) });
                return;
            }
        };
        let handler = job.handler.clone().unwrap_or_else(|| self.config.default_handler.clone());
        tracing::info!(job = shown(&handle), %handler, fence, "started");
        let (stop, stopped) = oneshot::channel();
        self.runs.insert(handle.clone(), Run { stop: Some(stop), handler: handler.clone(), fence, began: now() });
        let task = Task {
            config: Arc::clone(&self.config),
            transfers: self.transfers.clone(),
            happenings: self.happenings.clone(),
            job,
            handler,
            input_url,
        };
        let span = tracing::info_span!("run", job = shown(&handle), handler = %task.handler, fence);
        let happenings = self.happenings.clone();
        tokio::spawn(async move {
            let run = tokio::spawn(task.run(stopped).instrument(span)).await;
            let outcome = run.unwrap_or_else(|error| Some(Err(Failure::new("WorkerFailed", error.to_string()))));
            // The worker has gone when nobody receives.
            let _ = happenings.send(Happening::Ended { handle, outcome });
        });
    }

    fn put(&self, handle: String, number: u64, url: String, headers: BTreeMap<String, String>) {
        let (journal, transfers) = (Arc::clone(&self.journal), self.transfers.clone());
        let happenings = self.happenings.clone();
        tokio::spawn(async move {
            let key = handle.clone();
            let result = match blocking(move || journal.result(&key)).await {
                Ok(bytes) => transfers.put(&url, &headers, bytes).await,
                Err(error) => Err(format!("it cannot be read back: {error}")),
            };
            if let Err(why) = &result {
                tracing::warn!(job = shown(&handle), "the result could not be uploaded: {why}");
            }
            // The worker has gone when nobody receives.
            let _ = happenings.send(Happening::Event(Event::Put { handle, number, result }));
        });
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Journal) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let journal = Arc::clone(&self.journal);
        blocking(move || work(&journal)).await
    }
}

/// One run of a job.
struct Task {
    config: Arc<Config>,
    transfers: Transfers,
    happenings: mpsc::UnboundedSender<Happening>,
    job: JobMessage,
    handler: HandlerName,
    input_url: Option<String>,
}

impl Task {
    async fn run(self, stopped: oneshot::Receiver<Duration>) -> Option<Outcome> {
        // The other end is dropped when the worker has gone.
        let mut stop = pin!(async { stopped.await.unwrap_or(GRACE) });
        let input = select! {
            input = self.input() => input,
            _ = &mut stop => return None,
        };
        let input = match input {
            Ok(input) => input,
            Err(cause) => return Some(Err(Failure::new("InputUnavailable", cause))),
        };
        let (happenings, handle) = (self.happenings, self.job.task_token);
        let on_progress = move |percent| {
            // The worker has gone when nobody receives.
            let _ = happenings.send(Happening::Event(Event::Progress { handle: handle.clone(), percent }));
        };
        handlers::handle(&self.config, &self.handler, &input, on_progress, stop).await
    }

    async fn input(&self) -> Result<JsonText, String> {
        match (self.job.input_bytes, &self.input_url) {
            (Some(bytes), Some(url)) if self.job.input.is_null() => self.transfers.get(url, bytes).await,
            (Some(_), None) if self.job.input.is_null() => {
                Err("the input is not in the message, and the cloud has not said where it is".to_owned())
            }
            _ => Ok(self.job.input.clone()),
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => time::sleep_until(instant.into()).await,
        None => pending().await,
    }
}

fn now() -> Instant {
    time::Instant::now().into_std()
}

fn chance() -> Chance {
    Chance {
        request: Box::new(|| uuid::Uuid::new_v4().to_string()),
        jitter: Box::new(|most| rand::rng().random_range(Duration::ZERO..=most)),
    }
}

fn received(job: &JobMessage, stored: Option<Stored>) -> Event {
    let needs_input = job.input_bytes.is_some() && job.input.is_null();
    Event::Received { handle: job.task_token.clone(), needs_input, stored }
}

/// The beginning of a handle: enough to find the job by.
fn shown(handle: &str) -> String {
    format!("{}…", beginning(handle, SHOWN_CHARACTERS))
}

fn kind(message: &WorkerMessage) -> &'static str {
    match message {
        WorkerMessage::Claim { .. } => "claim",
        WorkerMessage::Heartbeat { .. } => "heartbeat",
        WorkerMessage::Release(_) => "release",
        WorkerMessage::Upload { .. } => "upload",
        WorkerMessage::Succeeded { .. } => "succeeded",
        WorkerMessage::Failed { .. } => "failed",
    }
}

fn verdict(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Granted { .. } => "granted",
        Verdict::Held { .. } => "held",
        Verdict::Lost => "lost",
        Verdict::Over => "over",
        Verdict::Upload { .. } => "upload",
        Verdict::TooLarge { .. } => "too large",
    }
}

#[cfg(test)]
mod tests;
