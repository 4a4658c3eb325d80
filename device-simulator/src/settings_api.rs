//! A third party's server with users' settings: `GET /profiles/{externalId}/settings`, with faults on request.

use crate::faults::{Share, split_spec};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

const KEY_HEADER: &str = "x-api-key";
/// Within which it is noticed that a client has gone.
const NOTICED: Duration = Duration::from_millis(300);
/// The seconds that a client is asked to wait when nobody has said how many.
const RETRY_SECONDS: u64 = 1;

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiFault {
    /// It is answered only after this time.
    Slow(Duration),
    /// It is one too many: 429.
    TooManyRequests {
        /// The value of the header `Retry-After`, in seconds.
        retry_after: u64,
    },
    /// It is answered with this status; 503 with `Retry-After: 1`.
    Status(u16),
    /// It is answered with 200 and broken JSON.
    Malformed,
}

/// A fault without its details: what `settings-api --fail` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiFaultKind {
    /// [`ApiFault::Slow`]
    Slow,
    /// [`ApiFault::TooManyRequests`]
    TooManyRequests,
    /// [`ApiFault::Status`] 500
    ServerError,
    /// [`ApiFault::Malformed`]
    Malformed,
}

impl ApiFaultKind {
    /// Every kind with its line of help.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::Slow, "answers only after --slow-for"),
        (Self::TooManyRequests, "answers 429 with Retry-After: 1"),
        (Self::ServerError, "answers 500"),
        (Self::Malformed, "answers 200 with broken JSON"),
    ];

    /// As `--fail` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slow => "slow",
            Self::TooManyRequests => "429",
            Self::ServerError => "500",
            Self::Malformed => "malformed",
        }
    }

    fn fault(self, slow_for: Duration) -> ApiFault {
        match self {
            Self::Slow => ApiFault::Slow(slow_for),
            Self::TooManyRequests => ApiFault::TooManyRequests { retry_after: RETRY_SECONDS },
            Self::ServerError => ApiFault::Status(500),
            Self::Malformed => ApiFault::Malformed,
        }
    }
}

/// One `KIND=COUNT` or `KIND=PERCENT%` of `settings-api --fail`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ApiFaultSpec {
    /// Which fault.
    pub kind: ApiFaultKind,
    /// For the first so many requests, or for each one with a probability.
    pub share: Share,
}

impl FromStr for ApiFaultSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, share) = split_spec(text)?;
        let Some((kind, _)) = ApiFaultKind::ALL.into_iter().find(|(kind, _)| kind.name() == name) else {
            let known = ApiFaultKind::ALL.map(|(kind, _)| kind.name()).join(", ");
            return Err(format!("{text:?}: {name:?} is no kind of fault: expected one of {known}"));
        };
        Ok(Self { kind, share })
    }
}

/// How to serve. The default: any free port of this machine, no key, a profile for every id, no faults.
#[derive(Debug, Clone)]
pub struct SettingsApiOptions {
    /// Where; port 0 is any free one.
    pub listen: SocketAddr,
    /// What requests must have in the header `x-api-key`; none: nothing.
    pub api_key: Option<String>,
    /// The settings of each external id; none: every id has a temperature of its own.
    pub profiles: Option<HashMap<String, Value>>,
    /// What goes wrong with requests, whoever they are for. Counted faults come first, in this order.
    pub faults: Vec<ApiFaultSpec>,
    /// How long [`ApiFaultKind::Slow`] takes.
    pub slow_for: Duration,
    /// What decides which requests the faults with a probability hit.
    pub seed: u64,
}

impl Default for SettingsApiOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            api_key: None,
            profiles: None,
            faults: Vec::new(),
            slow_for: Duration::from_secs(15),
            seed: 0,
        }
    }
}

/// The server cannot listen where it should.
#[derive(Debug, thiserror::Error)]
#[error("the settings API cannot listen on {address}: {reason}")]
pub struct ListenError {
    address: SocketAddr,
    reason: io::Error,
}

/// A running server; it stops when it is dropped.
pub struct SettingsApi {
    address: SocketAddr,
    shared: Arc<Shared>,
    _stop: oneshot::Sender<()>,
}

impl SettingsApi {
    /// Listens from now on. Fails if the address is taken or not this machine's. Must be called on a Tokio runtime.
    pub fn start(options: SettingsApiOptions) -> Result<Self, ListenError> {
        let listen = options.listen;
        let (listener, address) = bind(listen).map_err(|reason| ListenError { address: listen, reason })?;
        let shared = Arc::new(Shared::new(options));
        let router = Router::new().route("/profiles/{external_id}/settings", get(answer));
        let router = router.with_state(Arc::clone(&shared));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = axum::serve(listener, router).with_graceful_shutdown(async {
            // The sender is never used: dropping it is the signal.
            let _ = stopped.await;
        });
        tokio::spawn(server.into_future());
        Ok(Self { address, shared, _stop: stop })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a profile, with `{externalId}` for the id.
    pub fn url(&self) -> String {
        format!("http://{}/profiles/{{externalId}}/settings", self.address)
    }

    /// Gives an external id these settings, whatever they are.
    pub fn set_profile(&self, external_id: &str, settings: Value) {
        self.shared.book().profiles.insert(external_id.to_owned(), Some(settings));
    }

    /// Makes an external id unknown.
    pub fn remove_profile(&self, external_id: &str) {
        self.shared.book().profiles.insert(external_id.to_owned(), None);
    }

    /// The settings of an external id, if it is known.
    pub fn profile(&self, external_id: &str) -> Option<Value> {
        self.shared.book().profile(external_id)
    }

    /// Lets requests for an external id go wrong, one fault each, after those that were asked for before.
    pub fn fail(&self, external_id: &str, faults: Vec<ApiFault>) {
        self.shared.book().faults.entry(external_id.to_owned()).or_default().extend(faults);
    }

    /// From now on requests for external ids that begin so are taken and never answered, until this is dropped.
    pub fn hang(&self, external_ids: &str) -> Hang<'_> {
        let mut book = self.shared.book();
        book.hanging = Some(external_ids.to_owned());
        book.most_at_once = 0;
        Hang(&self.shared)
    }

    /// How many requests have hung at once, at most, since it was last told to hang.
    pub fn most_at_once(&self) -> usize {
        self.shared.book().most_at_once
    }

    /// How many requests for an external id have come, whatever the answer.
    pub fn requests(&self, external_id: &str) -> usize {
        self.request_times(external_id).len()
    }

    /// When they came.
    pub fn request_times(&self, external_id: &str) -> Vec<Instant> {
        self.shared.book().requests.get(external_id).cloned().unwrap_or_default()
    }

    /// How many requests have come in all.
    pub fn total_requests(&self) -> usize {
        self.shared.book().requests.values().map(Vec::len).sum()
    }
}

fn bind(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((TcpListener::from_std(listener)?, address))
}

struct Shared {
    api_key: Option<String>,
    book: Mutex<Book>,
}

/// What is served, what is still to go wrong, and what has been asked.
struct Book {
    /// Whether ids that are not in `profiles` are known.
    knows_everyone: bool,
    /// None for ids that are unknown.
    profiles: HashMap<String, Option<Value>>,
    /// By external id.
    faults: HashMap<String, VecDeque<ApiFault>>,
    /// Those of the first requests.
    first_faults: VecDeque<ApiFault>,
    /// With the probability of each.
    random_faults: Vec<(ApiFault, f64)>,
    random: StdRng,
    /// By external id.
    requests: HashMap<String, Vec<Instant>>,
    /// What the external ids begin with that get no answer.
    hanging: Option<String>,
    /// How many requests hang.
    at_once: usize,
    most_at_once: usize,
}

/// A settings API that hangs; dropped, it has recovered.
#[must_use]
pub struct Hang<'a>(&'a Shared);

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        self.0.book().hanging = None;
    }
}

/// A request that hangs, until its client has gone.
struct Hanging(Arc<Shared>);

impl Hanging {
    async fn wait(self) -> Response {
        self.0.book().at_once += 1;
        // Who asks again at once is not taken for two.
        tokio::time::sleep(NOTICED).await;
        {
            let mut book = self.0.book();
            book.most_at_once = book.most_at_once.max(book.at_once);
        }
        std::future::pending().await
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.0.book().at_once -= 1;
    }
}

impl Shared {
    fn new(options: SettingsApiOptions) -> Self {
        let mut book = Book {
            knows_everyone: options.profiles.is_none(),
            profiles: options.profiles.unwrap_or_default().into_iter().map(|(id, all)| (id, Some(all))).collect(),
            faults: HashMap::new(),
            first_faults: VecDeque::new(),
            random_faults: Vec::new(),
            random: StdRng::seed_from_u64(options.seed),
            requests: HashMap::new(),
            hanging: None,
            at_once: 0,
            most_at_once: 0,
        };
        for spec in options.faults {
            let fault = spec.kind.fault(options.slow_for);
            match spec.share {
                Share::Count(count) => book.first_faults.extend(std::iter::repeat_n(fault, count)),
                Share::Probability(probability) => book.random_faults.push((fault, probability)),
            }
        }
        Self { api_key: options.api_key, book: Mutex::new(book) }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accepts(&self, headers: &HeaderMap) -> bool {
        self.api_key.as_ref().is_none_or(|key| headers.get(KEY_HEADER).is_some_and(|given| given == key))
    }
}

impl Book {
    fn profile(&self, external_id: &str) -> Option<Value> {
        match self.profiles.get(external_id) {
            Some(profile) => profile.clone(),
            None => self.knows_everyone.then(|| own_temperature(external_id)),
        }
    }

    /// What goes wrong with the next request for an id.
    fn next_fault(&mut self, external_id: &str) -> Option<ApiFault> {
        let own = self.faults.get_mut(external_id).and_then(VecDeque::pop_front);
        own.or_else(|| self.first_faults.pop_front()).or_else(|| {
            let Self { random_faults, random, .. } = self;
            random_faults.iter().find(|(_, probability)| random.random_bool(*probability)).map(|(fault, _)| *fault)
        })
    }
}

/// Always the same for an id: from 17.0 to 24.5 in steps of a half.
fn own_temperature(external_id: &str) -> Value {
    let step = Sha256::digest(external_id)[0] % 16;
    json!({"SET_TEMP": 17.0 + f64::from(step) / 2.0})
}

async fn answer(State(shared): State<Arc<Shared>>, Path(id): Path<String>, headers: HeaderMap) -> Response {
    shared.book().requests.entry(id.clone()).or_default().push(Instant::now());
    if !shared.accepts(&headers) {
        return refusal(&id, StatusCode::UNAUTHORIZED, "the header x-api-key is missing or wrong");
    }
    if shared.book().hanging.as_ref().is_some_and(|ids| id.starts_with(ids)) {
        tracing::info!("{id}: no answer");
        return Hanging(shared).wait().await;
    }
    let fault = shared.book().next_fault(&id);
    match fault {
        Some(ApiFault::Slow(time)) => {
            // Before the sleep, which ends early with a client that does not wait.
            let answer = settings(&shared, &id, &format!(" after {time:?}"));
            tokio::time::sleep(time).await;
            answer
        }
        Some(ApiFault::TooManyRequests { retry_after }) => {
            let refusal = refusal(&id, StatusCode::TOO_MANY_REQUESTS, "too many requests");
            ([(RETRY_AFTER, retry_after.to_string())], refusal).into_response()
        }
        Some(ApiFault::Status(status)) => failure(&id, status),
        Some(ApiFault::Malformed) => {
            tracing::info!("{id}: 200, malformed");
            json_response(StatusCode::OK, r#"{"settings":{"SET_TEMP":"#.to_owned())
        }
        None => settings(&shared, &id, ""),
    }
}

fn settings(shared: &Shared, id: &str, when: &str) -> Response {
    let Some(profile) = shared.book().profile(id) else {
        return refusal(id, StatusCode::NOT_FOUND, "no such profile");
    };
    tracing::info!("{id}: 200 {profile}{when}");
    json_response(StatusCode::OK, json!({"settings": profile}).to_string())
}

fn failure(id: &str, status: u16) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let failure = refusal(id, status, "failed on request");
    if status == StatusCode::SERVICE_UNAVAILABLE {
        return ([(RETRY_AFTER, RETRY_SECONDS.to_string())], failure).into_response();
    }
    failure
}

fn refusal(id: &str, status: StatusCode, why: &str) -> Response {
    tracing::info!("{id}: {} {why}", status.as_u16());
    json_response(status, json!({"message": why}).to_string())
}

fn json_response(status: StatusCode, body: String) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Answer {
        status: u16,
        retry_after: Option<String>,
        body: String,
    }

    async fn ask_with_key(api: &SettingsApi, id: &str, key: Option<&str>) -> Answer {
        mqtt_connection::install_crypto_provider();
        let url = api.url().replace("{externalId}", id);
        let mut request = reqwest::Client::new().get(url);
        if let Some(key) = key {
            request = request.header(KEY_HEADER, key);
        }
        let response = request.send().await.unwrap();
        let retry_after = response.headers().get(RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
        Answer { status: response.status().as_u16(), retry_after, body: response.text().await.unwrap() }
    }

    async fn ask(api: &SettingsApi, id: &str) -> Answer {
        ask_with_key(api, id, None).await
    }

    fn start(change: impl FnOnce(&mut SettingsApiOptions)) -> SettingsApi {
        let mut options = SettingsApiOptions::default();
        change(&mut options);
        SettingsApi::start(options).unwrap()
    }

    #[tokio::test]
    async fn everyone_has_a_temperature_that_stays_the_same() {
        let api = start(|_| ());
        let answer = ask(&api, "user-1").await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.body, json!({"settings": api.profile("user-1")}).to_string());
        for number in 0..100 {
            let id = format!("user-{number}");
            let temperature = own_temperature(&id)["SET_TEMP"].as_f64().unwrap();
            assert!((17.0..=24.5).contains(&temperature) && (temperature * 2.0).fract() == 0.0, "{temperature}");
        }
        assert_eq!(own_temperature("user-1"), json!({"SET_TEMP": 20.0}));
    }

    #[tokio::test]
    async fn a_profile_can_be_anything_or_gone() {
        let api = start(|options| options.profiles = Some(HashMap::from([("a/b c".into(), json!({"SET_TEMP": 20}))])));
        assert_eq!(ask(&api, "a%2Fb%20c").await.body, r#"{"settings":{"SET_TEMP":20}}"#);
        assert_eq!(ask(&api, "user-2").await.status, 404);
        api.set_profile("user-2", json!({"SET_TEMP": 900, "SET_MODE": [1]}));
        let body: Value = serde_json::from_str(&ask(&api, "user-2").await.body).unwrap();
        assert_eq!(body, json!({"settings": {"SET_TEMP": 900, "SET_MODE": [1]}}));
        api.remove_profile("a/b c");
        assert_eq!(ask(&api, "a%2Fb%20c").await.status, 404);
        assert_eq!((api.requests("a/b c"), api.requests("user-2"), api.total_requests()), (2, 2, 4));
    }

    #[tokio::test]
    async fn a_key_is_asked_for_when_there_is_one() {
        let api = start(|options| options.api_key = Some("secret".into()));
        for (key, status) in [(None, 401), (Some("other"), 401), (Some("secret"), 200)] {
            assert_eq!(ask_with_key(&api, "user-1", key).await.status, status, "{key:?}");
        }
    }

    #[tokio::test]
    async fn faults_of_an_id_come_in_order_and_then_the_settings() {
        let api = start(|_| ());
        let slow = Duration::from_millis(200);
        api.fail("user-1", vec![ApiFault::TooManyRequests { retry_after: 3 }, ApiFault::Status(503)]);
        api.fail("user-1", vec![ApiFault::Malformed, ApiFault::Slow(slow)]);
        assert_eq!(ask(&api, "user-2").await.status, 200);
        let answer = ask(&api, "user-1").await;
        assert_eq!((answer.status, answer.retry_after.as_deref()), (429, Some("3")));
        let answer = ask(&api, "user-1").await;
        assert_eq!((answer.status, answer.retry_after.as_deref()), (503, Some("1")));
        let answer = ask(&api, "user-1").await;
        assert_eq!((answer.status, serde_json::from_str::<Value>(&answer.body).is_err()), (200, true));
        for at_least in [slow, Duration::ZERO] {
            let begin = std::time::Instant::now();
            let answer = ask(&api, "user-1").await;
            assert_eq!(answer.body, json!({"settings": api.profile("user-1")}).to_string());
            assert!(begin.elapsed() >= at_least);
        }
    }

    #[tokio::test]
    async fn it_hangs_until_it_is_told_to_recover_and_counts_who_waits() {
        let api = start(|_| ());
        let hang = api.hang("user-1");
        let counted = async {
            while api.most_at_once() < 2 {
                tokio::task::yield_now().await;
            }
            ask(&api, "user-2").await.status
        };
        tokio::select! {
            _ = ask(&api, "user-1") => panic!("it is answered"),
            _ = ask(&api, "user-1b") => panic!("it is answered"),
            status = counted => assert_eq!(status, 200),
        }
        // Who has given up hangs no more.
        while api.shared.book().at_once > 0 {
            tokio::task::yield_now().await;
        }
        drop(hang);
        assert_eq!((ask(&api, "user-1").await.status, api.most_at_once()), (200, 2));
    }

    #[tokio::test]
    async fn counted_faults_hit_the_first_requests_and_probable_ones_any() {
        let api = start(|options| options.faults = ["429=2", "500=1"].map(|spec| spec.parse().unwrap()).to_vec());
        let mut statuses = Vec::new();
        for id in ["a", "b", "c", "d"] {
            statuses.push(ask(&api, id).await.status);
        }
        assert_eq!(statuses, [429, 429, 500, 200]);
        let faults = || ["malformed=0%", "500=50%"].map(|spec| spec.parse().unwrap()).to_vec();
        let of_seed = |seed| {
            let options = SettingsApiOptions { faults: faults(), seed, ..SettingsApiOptions::default() };
            let shared = Shared::new(options);
            (0..64).map(|_| shared.book().next_fault("a")).collect::<Vec<_>>()
        };
        assert_eq!(of_seed(7), of_seed(7));
        assert_ne!(of_seed(7), of_seed(8));
        let hit = of_seed(7).iter().filter(|fault| **fault == Some(ApiFault::Status(500))).count();
        assert!((10..54).contains(&hit), "{hit}");
    }

    #[tokio::test]
    async fn a_dropped_server_answers_no_more() {
        let api = start(|_| ());
        let address = api.address();
        drop(api);
        // The port is free as soon as the server's task has ended.
        while std::net::TcpListener::bind(address).is_err() {
            tokio::task::yield_now().await;
        }
        let taken = std::net::TcpListener::bind(address).unwrap();
        let options = SettingsApiOptions { listen: address, ..SettingsApiOptions::default() };
        let error = SettingsApi::start(options).err().unwrap().to_string();
        assert!(error.starts_with(&format!("the settings API cannot listen on {address}: ")), "{error}");
        drop(taken);
    }

    #[test]
    fn every_kind_is_parsed_by_its_name_and_a_bad_one_is_named() {
        for (kind, _) in ApiFaultKind::ALL {
            let spec: ApiFaultSpec = format!("{}=25%", kind.name()).parse().unwrap();
            assert_eq!(spec, ApiFaultSpec { kind, share: Share::Probability(0.25) });
        }
        assert_eq!(
            "502=1".parse::<ApiFaultSpec>().unwrap_err(),
            "\"502=1\": \"502\" is no kind of fault: expected one of slow, 429, 500, malformed"
        );
        let error = "500=x".parse::<ApiFaultSpec>().unwrap_err();
        assert_eq!(error, "\"500=x\": \"x\" is neither a count nor a percentage");
    }
}
