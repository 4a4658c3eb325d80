use super::*;
use crate::jobs::Stored;
use protocol::on_premises::WorkerResult;
use serde_json::{Value, json};
use std::path::Path;
use tokio::task::JoinHandle;

/// A worker without a broker: the test takes its messages and brings it replies.
struct Bench {
    connection: Arc<Connection>,
    happenings: mpsc::UnboundedSender<Happening>,
    signals: mpsc::UnboundedSender<()>,
    worker: JoinHandle<()>,
    _inbox: mpsc::UnboundedSender<Delivery>,
}

const SLOW: &str = "[handlers.slow]\nprogram = 'sh'\narguments = ['-c', 'touch started; exec sleep 1000']\n";
const LARGE: &str = "[handlers.large]\nprogram = 'sh'\narguments = ['-c', 'printf \\\"; yes | tr -d \"\\n\" | \
                     head -c 200000; printf \\\"']\n";

fn config(folder: &Path) -> Config {
    let text = format!(
        "tenant = 'tenant1'\nworker = 'w'\nendpoint = '127.0.0.1:1'\ncertificate = 'c'\nprivate_key = 'k'\n{SLOW}{LARGE}"
    );
    Config::parse(&text, folder).unwrap()
}

fn lease(fence: u64) -> Lease {
    Lease { worker: "w".parse().unwrap(), fence }
}

fn job(handle: &str, handler: Option<&str>, input: Value) -> JobMessage {
    JobMessage {
        input: input.into(),
        task_token: handle.into(),
        handler: handler.map(|name| name.parse().unwrap()),
        input_bytes: None,
    }
}

impl Bench {
    fn start(folder: &Path) -> Self {
        Self::start_with(folder, |_| {})
    }

    fn start_with(folder: &Path, prepare: impl FnOnce(&mut Worker)) -> Self {
        mqtt_connection::install_crypto_provider();
        let config = config(folder);
        // Nobody listens there, and the certificate is never shown.
        let tls = ClientConfig::builder().with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
        let (connection, _) = Connection::open(Arc::new(settings(&config, Arc::new(tls))));
        let journal = Journal::open(&config.journal).unwrap();
        config.make_working_folder().unwrap();
        let mut worker = Worker::new(config, connection, Transfers::new(None, None).unwrap(), journal);
        prepare(&mut worker);
        let (connection, happenings) = (Arc::clone(&worker.connection), worker.happenings.clone());
        happenings.send(Happening::Event(Event::Online(true))).unwrap_or_else(|_| panic!("the worker is gone"));
        let (signals, told) = mpsc::unbounded_channel();
        let (inbox_sender, inbox) = mpsc::unbounded_channel();
        let worker = tokio::spawn(worker.run(inbox, told));
        Self { connection, happenings, signals, worker, _inbox: inbox_sender }
    }

    fn tell(&self, event: Event) {
        self.happenings.send(Happening::Event(event)).unwrap_or_else(|_| panic!("the worker is gone"));
    }

    fn reply(&self, handle: &str, request: Option<String>, verdict: Verdict) {
        self.tell(Event::Reply(WorkerReply { task_token: handle.into(), request, verdict }));
    }

    async fn said(&self) -> (String, WorkerMessage) {
        let next = time::timeout(Duration::from_secs(30), self.connection.acknowledge_next()).await;
        WorkerMessage::decode(&next.expect("a message").payload).unwrap()
    }

    /// Grants the claim that comes next; returns its job.
    async fn grant(&self, fence: u64) -> String {
        match self.said().await {
            (handle, WorkerMessage::Claim { request, .. }) => {
                let verdict = Verdict::Granted { fence, lease_milliseconds: 600_000, input_url: None };
                self.reply(&handle, Some(request), verdict);
                handle
            }
            other => panic!("no claim: {other:?}"),
        }
    }

    async fn end(self) {
        self.signals.send(()).unwrap();
        self.worker.await.unwrap();
    }
}

/// What an earlier process has left in the folder.
fn leave_behind(folder: &Path, entries: Vec<Entry>) {
    let journal = Journal::open(&config(folder).journal).unwrap();
    for entry in entries {
        journal.put(&entry).unwrap();
    }
}

fn entry(folder: &Path, handle: &str) -> Option<Entry> {
    Journal::open(&config(folder).journal).unwrap().get(handle).unwrap()
}

#[tokio::test]
async fn a_job_from_the_journal_is_claimed_run_answered_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    leave_behind(folder.path(), vec![Entry::new(job("t", None, json!({"a": 15, "b": 42})))]);
    let bench = Bench::start(folder.path());
    assert_eq!(bench.grant(1).await, "t");
    let result = WorkerResult::Value(json!(57).into());
    let succeeded = WorkerMessage::Succeeded { result, lease: Some(lease(1)) };
    assert_eq!(bench.said().await, ("t".to_owned(), succeeded.clone()));
    bench.end().await;
    let stored = entry(folder.path(), "t").unwrap().stored.unwrap();
    assert_eq!(stored, Stored { delivered: true, ..Stored::new(Answer::Value(json!(57).into()), 1) });

    // Nothing is left to do for it, but what was not delivered is sent again.
    leave_behind(
        folder.path(),
        vec![Entry { stored: Some(Stored { delivered: false, ..stored }), ..entry(folder.path(), "t").unwrap() }],
    );
    let bench = Bench::start(folder.path());
    assert_eq!(bench.said().await.1, succeeded);
    bench.end().await;
    let bench = Bench::start(folder.path());
    bench.end().await;
}

#[tokio::test]
async fn a_handler_that_does_not_exist_is_named() {
    let folder = tempfile::tempdir().unwrap();
    leave_behind(folder.path(), vec![Entry::new(job("t", Some("none"), Value::Null))]);
    let bench = Bench::start(folder.path());
    bench.grant(1).await;
    match bench.said().await.1 {
        WorkerMessage::Failed { exception, cause, lease: Some(_) } => {
            assert_eq!(exception, "UnknownHandler");
            assert!(cause.unwrap().ends_with("it has add, large, slow"));
        }
        other => panic!("{other:?}"),
    }
    bench.end().await;
}

#[tokio::test]
async fn a_second_signal_stops_what_runs_and_gives_it_back() {
    let folder = tempfile::tempdir().unwrap();
    leave_behind(folder.path(), vec![Entry::new(job("t", Some("slow"), Value::Null))]);
    let bench = Bench::start(folder.path());
    bench.grant(1).await;
    while !folder.path().join("journal/work/started").exists() {
        time::sleep(Duration::from_millis(5)).await;
    }
    bench.signals.send(()).unwrap();
    bench.signals.send(()).unwrap();
    assert_eq!(bench.said().await.1, WorkerMessage::Release(lease(1)));
    bench.worker.await.unwrap();
    assert_eq!(entry(folder.path(), "t").unwrap().stored, None, "the next process takes it up");
}

/// The lease is an hour long, and the machine sleeps for two.
#[tokio::test]
async fn a_machine_that_was_suspended_has_lost_its_lease() {
    let folder = tempfile::tempdir().unwrap();
    leave_behind(folder.path(), vec![Entry::new(job("t", Some("slow"), Value::Null))]);
    let wall = Arc::new(std::sync::Mutex::new(SystemTime::now()));
    let shown = Arc::clone(&wall);
    let bench = Bench::start_with(folder.path(), move |worker| {
        worker.clock = Clock::new(now(), *shown.lock().unwrap());
        worker.wall = Box::new(move || *shown.lock().unwrap());
    });
    bench.grant(1).await;
    while !folder.path().join("journal/work/started").exists() {
        time::sleep(Duration::from_millis(5)).await;
    }
    *wall.lock().unwrap() += Duration::from_hours(2);
    // Nothing has happened on the network, and no timer of the lease has fired: its program is killed, and claimed anew.
    assert!(matches!(bench.said().await.1, WorkerMessage::Claim { .. }));
    bench.end().await;
}

#[tokio::test]
async fn a_job_that_is_over_is_stopped_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let other = Entry::new(job("u", Some("add"), json!({"a": "x", "b": "y"})));
    leave_behind(folder.path(), vec![Entry::new(job("t", Some("slow"), Value::Null)), other]);
    let bench = Bench::start(folder.path());
    for fence in 1..=2 {
        bench.grant(fence).await;
    }
    assert_eq!(bench.said().await.0, "u");
    bench.reply("t", None, Verdict::Over);
    bench.end().await;
    assert_eq!(entry(folder.path(), "t"), None);
}

#[tokio::test]
async fn a_large_result_is_kept_on_disk_and_its_place_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    leave_behind(folder.path(), vec![Entry::new(job("t", Some("large"), Value::Null))]);
    let bench = Bench::start(folder.path());
    bench.grant(1).await;
    let (handle, message) = bench.said().await;
    let WorkerMessage::Upload { bytes, request, .. } = message else { panic!("{message:?}") };
    assert_eq!(bytes, 200_002);
    bench.reply(&handle, Some(request), Verdict::TooLarge { limit: 100 });
    let (_, message) = bench.said().await;
    assert!(
        matches!(&message, WorkerMessage::Failed { exception, .. } if exception == "ResultTooLarge"),
        "{message:?}"
    );
    bench.end().await;
    let journal = Journal::open(&config(folder.path()).journal).unwrap();
    assert_eq!(journal.result("t").unwrap().len(), 200_002);
}

#[test]
fn a_handle_is_not_logged_as_a_whole() {
    assert_eq!(shown("0123456789abcdefgh"), "0123456789ab…");
    assert_eq!(shown("ä".repeat(20).as_str()), format!("{}…", "ä".repeat(6)));
}
