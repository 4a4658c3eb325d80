//! The third party that knows what its users want: an HTTPS API of settings profiles.

use super::circuit_breaker::CircuitBreaker;
use crate::aws::now_millis;
use crate::error::aws;
use crate::queue::json;
use crate::{Error, ErrorName};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::Value;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};
use ureq::http::{Response, StatusCode, header::RETRY_AFTER};

/// What stands for the external id in the API's address.
const PLACEHOLDER: &str = "{externalId}";
/// Characters that need no escape in a path (RFC 3986, 2.3).
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// How long a profile may take whatever the API does, with its key, every request and the waits between them: so much less than
/// the function's own limit that a table and Step Functions can be told.
pub const TIME_BUDGET: Duration = Duration::from_secs(10);
/// How long one request may take, from the look-up of the host's name to the last byte of the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A request that has less than this left is not made.
const SHORTEST_REQUEST: Duration = Duration::from_secs(1);
/// How often a profile is asked for; the state machine tries again later, and with longer waits.
const ATTEMPTS: u32 = 3;
/// The longest first wait; the next one may be twice as long. How long it is of that, is chance, so that those who failed together
/// do not come back together (<https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/>).
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait that an API can ask for; what is longer makes no difference.
const LONGEST_WAIT: Duration = Duration::from_hours(1);
/// A profile has no more bytes than this.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// An API of settings profiles.
#[derive(Debug)]
pub(crate) struct SettingsApi {
    url: String,
    key: Option<ApiKey>,
    http: ureq::Agent,
    health: std::sync::Mutex<CircuitBreaker>,
    budget: Duration,
}

/// The API's answer. Whatever else it holds is its own matter.
#[derive(Deserialize)]
struct Profile {
    settings: Value,
}

/// Why a request brought no profile.
pub(super) enum Refusal {
    /// The key is no good, or not any more.
    Key(StatusCode),
    /// Trying again is no use.
    Final(Error),
    /// The API is well, and asks for patience.
    Busy(String, Option<Duration>),
    /// Trying again may help, after the wait that the API asks for.
    Transient(String, Option<Duration>),
}

impl SettingsApi {
    /// The API at an address that holds `{externalId}`; the secret's ARN names its key.
    pub(crate) fn new(config: &aws_config::SdkConfig, url: String, secret: Option<String>) -> Result<Self, String> {
        let local = ["http://127.0.0.1:", "http://localhost:"].iter().any(|prefix| url.starts_with(prefix));
        // A thing's attribute shall not choose who is asked, and gets the key.
        let host = url.split("://").nth(1).and_then(|rest| rest.split(['/', '?']).next()).unwrap_or_default();
        let is_bound_to_host =
            url.contains(PLACEHOLDER) && !host.contains(PLACEHOLDER) && !host.contains('@') && !url.contains('#');
        if !is_bound_to_host || !(local || url.starts_with("https://")) {
            let expected = format!("an https address that holds {PLACEHOLDER} behind its host");
            return Err(format!("SETTINGS_API_URL: got {url}, expected {expected}"));
        }
        let http = ureq::Agent::config_builder()
            // A redirection could take the key elsewhere.
            .max_redirects(0)
            .http_status_as_error(false)
            .build()
            .new_agent();
        let key = secret.map(|secret| ApiKey::new(config, secret));
        Ok(Self { url, key, http, health: std::sync::Mutex::default(), budget: TIME_BUDGET })
    }

    /// The settings of a profile, as the API has them.
    pub(crate) async fn settings(&self, external_id: &str) -> Result<Value, Error> {
        // In a path these are no names.
        if [".", ".."].contains(&external_id) {
            return Err(Error::invalid("externalId", external_id, "the name of a profile"));
        }
        let url = self.url.replace(PLACEHOLDER, &utf8_percent_encode(external_id, ESCAPED).to_string());
        let deadline = Instant::now() + self.budget;
        let (mut attempt, mut renewed) = (1, false);
        loop {
            let (why, wait) = match self.request(&url, external_id, renewed, deadline).await {
                Ok(settings) => return Ok(settings),
                Err(Refusal::Final(error)) => return Err(error),
                // The key may have been rotated since this process read it: it is read once more.
                Err(Refusal::Key(_)) if self.key.is_some() && !renewed => {
                    renewed = true;
                    continue;
                }
                Err(Refusal::Key(status)) => {
                    let message = format!("the settings API answered {status}: check the secret with its key");
                    return Err(Error::new(ErrorName::SettingsApiRefused, message));
                }
                Err(Refusal::Busy(why, asked) | Refusal::Transient(why, asked)) => (why, wait(attempt, asked)),
            };
            if attempt == ATTEMPTS || Instant::now() + wait + SHORTEST_REQUEST > deadline {
                let message = format!("{why}, in {attempt} attempts; the next would be in {} s", wait.as_secs_f32());
                return Err(Error::new(ErrorName::SettingsApiUnavailable, message));
            }
            tracing::warn!(external_id, attempt, why, wait_ms = wait.as_millis(), "the settings API is asked again");
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// Asks once, unless the API is left alone.
    async fn request(&self, url: &str, external_id: &str, renew: bool, by: Instant) -> Result<Value, Refusal> {
        let key = self.key(renew, by).await.map_err(Refusal::Final)?;
        if !self.health(|health| health.allows(now_millis())) {
            let message = "the settings API has failed again and again, and is left alone for half a minute";
            return Err(Refusal::Final(Error::new(ErrorName::SettingsApiUnavailable, message)));
        }
        let answer = self.call(url, external_id, key, by.min(Instant::now() + REQUEST_TIMEOUT)).await;
        // Who refuses is there, and so is who asks for patience.
        self.health(|health| match answer {
            Err(Refusal::Transient(..)) => health.failed(now_millis()),
            _ => health.answered(),
        });
        answer
    }

    /// On a thread of its own: the library's limit holds for each read of a TLS stream anew, so that one byte now and then would
    /// prolong it (`RustlsTransport` of ureq 3.5), and this thread could not end what blocks it.
    async fn call(&self, url: &str, external_id: &str, key: Option<String>, by: Instant) -> Result<Value, Refusal> {
        // The library gives up a little earlier, so that a connection is closed when the next request is made.
        let limit = by.saturating_duration_since(Instant::now()).mul_f32(0.9);
        let mut request = self.http.get(url).config().timeout_global(Some(limit)).build();
        request = request.header("accept", "application/json");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        let external_id = external_id.to_owned();
        let calling = spawn_blocking(move || {
            let answer = request.call().map_err(|error| Refusal::Transient(format!("the settings API: {error}"), None));
            read(answer?, &external_id)
        });
        let failed = |why: &dyn std::fmt::Display| Err(Refusal::Transient(format!("the settings API: {why}"), None));
        match timeout_at(by, calling).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => failed(&error),
            Err(_) => failed(&format!("no whole answer within {} s", limit.as_secs_f32())),
        }
    }

    async fn key(&self, renew: bool, by: Instant) -> Result<Option<String>, Error> {
        let Some(key) = &self.key else { return Ok(None) };
        let late = || Error::new(ErrorName::ServiceUnavailable, "secretsmanager:GetSecretValue: no answer in time");
        timeout_at(by - SHORTEST_REQUEST, key.value(renew)).await.unwrap_or_else(|_| Err(late())).map(Some)
    }

    fn health<T>(&self, of: impl FnOnce(&mut CircuitBreaker) -> T) -> T {
        of(&mut self.health.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How long to wait after an attempt: what the API asks for, and a chance share of a time that doubles.
fn wait(attempt: u32, asked: Option<Duration>) -> Duration {
    let longest = FIRST_WAIT * 2_u32.pow(attempt - 1);
    asked.unwrap_or_default() + longest.mul_f32(fastrand::f32())
}

/// The settings in an answer about a profile.
pub(super) fn read(mut response: Response<ureq::Body>, external_id: &str) -> Result<Value, Refusal> {
    let status = response.status();
    let refuse = |name, message| Err(Refusal::Final(Error::new(name, message)));
    match status {
        StatusCode::OK => {}
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(Refusal::Key(status)),
        StatusCode::NOT_FOUND => {
            let message = format!("the settings API knows no profile {external_id:?}");
            return refuse(ErrorName::ProfileNotFound, message);
        }
        StatusCode::TOO_MANY_REQUESTS => {
            return Err(Refusal::Busy(format!("the settings API answered {status}"), retry_after(&response)));
        }
        _ if status.is_server_error() => {
            return Err(Refusal::Transient(format!("the settings API answered {status}"), retry_after(&response)));
        }
        _ => return refuse(ErrorName::SettingsApiRefused, format!("the settings API answered {status}")),
    }
    let body = match response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec() {
        Ok(body) => body,
        Err(ureq::Error::BodyExceedsLimit(limit)) => {
            let message = format!("the settings API's answer: got more than {limit} bytes, expected fewer");
            return refuse(ErrorName::InvalidSettings, message);
        }
        Err(error) => return Err(Refusal::Transient(format!("the settings API's answer: {error}"), None)),
    };
    match json::<Profile>("the settings API's answer", &body) {
        Ok(profile) => Ok(profile.settings),
        Err(error) => refuse(ErrorName::InvalidSettings, error.message),
    }
}

/// How long the API asks to wait: seconds or a date (RFC 9110, 10.2.3).
fn retry_after<B>(response: &Response<B>) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    let wait = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wait.min(LONGEST_WAIT))
}

/// The API's key, read from Secrets Manager when it is first needed and then kept.
#[derive(Debug)]
struct ApiKey {
    secrets: aws_sdk_secretsmanager::Client,
    arn: String,
    value: Mutex<Option<String>>,
}

impl ApiKey {
    fn new(config: &aws_config::SdkConfig, arn: String) -> Self {
        Self { secrets: aws_sdk_secretsmanager::Client::new(config), arn, value: Mutex::new(None) }
    }

    async fn value(&self, renew: bool) -> Result<String, Error> {
        let mut known = self.value.lock().await;
        if let Some(value) = known.as_ref().filter(|_| !renew) {
            return Ok(value.clone());
        }
        let get = self.secrets.get_secret_value().secret_id(&self.arn).send().await;
        let secret = get.map_err(|error| aws("secretsmanager:GetSecretValue", &error))?.secret_string;
        let Some(value) = secret.filter(|value| value.chars().all(|c| c.is_ascii_graphic()) && !value.is_empty())
        else {
            let message = format!("the secret {}: expected the API's key as plain text", self.arn);
            return Err(Error::new(ErrorName::SettingsApiRefused, message));
        };
        *known = Some(value.clone());
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[test]
    fn the_api_says_in_seconds_or_by_a_date_how_long_to_wait() {
        let wait = |value: &str| retry_after(&Response::builder().header(RETRY_AFTER, value).body(()).unwrap());
        assert_eq!(wait("7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("18446744073709551615"), Some(LONGEST_WAIT));
        assert_eq!(wait("soon"), None);
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_mins(10));
        assert!(wait(&later).unwrap() > Duration::from_mins(9));
        assert_eq!(retry_after(&Response::new(())), None);
    }

    #[tokio::test]
    async fn an_external_id_leads_nowhere_else() {
        let config = aws_config::SdkConfig::builder().build();
        let api = SettingsApi::new(&config, "http://127.0.0.1:1/{externalId}".to_owned(), None).unwrap();
        for id in [".", ".."] {
            let error = api.settings(id).await.unwrap_err();
            assert_eq!((error.name, error.message.split(':').next()), (ErrorName::InvalidInput, Some("externalId")));
        }
    }

    #[test]
    fn waits_are_of_any_length_up_to_twice_the_last_one_and_never_shorter_than_the_api_asks_for() {
        for (attempt, longest) in [(1, FIRST_WAIT), (2, 2 * FIRST_WAIT)] {
            let waits: Vec<Duration> = (0..1000).map(|_| wait(attempt, None)).collect();
            assert!(waits.iter().all(|wait| *wait <= longest));
            assert!(waits.iter().any(|wait| *wait < longest / 4) && waits.iter().any(|wait| *wait > longest / 2));
            let asked = Duration::from_secs(3);
            assert!((0..1000).all(|_| (asked..=asked + longest).contains(&wait(attempt, Some(asked)))));
        }
    }

    /// A server that accepts every connection and sends `beginning`, then a byte now and then, until it is dropped.
    struct Trickling {
        address: std::net::SocketAddr,
        connections: Arc<AtomicUsize>,
        ends: Arc<AtomicBool>,
    }

    impl Trickling {
        fn start(beginning: &'static [u8]) -> Self {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let (connections, ends) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
            let trickling = Self { address: listener.local_addr().unwrap(), connections, ends };
            let (connections, ends) = (Arc::clone(&trickling.connections), Arc::clone(&trickling.ends));
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    connections.fetch_add(1, Ordering::SeqCst);
                    let ends = Arc::clone(&ends);
                    std::thread::spawn(move || {
                        let mut sent = stream.write_all(beginning);
                        while sent.is_ok() && !ends.load(Ordering::SeqCst) {
                            std::thread::sleep(Duration::from_millis(20));
                            sent = stream.write_all(b" ");
                        }
                    });
                }
            });
            trickling
        }
    }

    impl Drop for Trickling {
        fn drop(&mut self) {
            self.ends.store(true, Ordering::SeqCst);
        }
    }

    /// The answer of a web server without an end, and the first handshake message of TLS (RFC 8446, 5.1).
    const TRICKLES: [(&str, &[u8]); 2] = [
        ("http", b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n"),
        ("https", b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"),
    ];

    fn asking(scheme: &str, server: &Trickling, budget: Duration) -> SettingsApi {
        let url = format!("{scheme}://localhost:{}/{{externalId}}", server.address.port());
        let config = aws_config::SdkConfig::builder().build();
        SettingsApi { budget, ..SettingsApi::new(&config, url, None).unwrap() }
    }

    #[tokio::test]
    async fn a_call_ends_within_its_budget_whatever_comes_byte_by_byte() {
        let budget = SHORTEST_REQUEST + Duration::from_millis(200);
        for (scheme, beginning) in TRICKLES {
            let server = Trickling::start(beginning);
            let api = asking(scheme, &server, budget);
            let settings = tokio::time::timeout(10 * budget, api.settings("user-1"));
            let error = settings.await.expect("it ends").unwrap_err();
            assert_eq!(error.name, ErrorName::SettingsApiUnavailable, "{scheme}: {error}");
            assert!(server.connections.load(Ordering::SeqCst) > 0, "{scheme}: {error}");
        }
    }

    #[tokio::test]
    async fn an_api_that_never_answers_is_left_alone_after_a_while() {
        let server = Trickling::start(TRICKLES[0].1);
        let api = asking("http", &server, Duration::from_millis(50));
        for _ in 0..20 {
            assert_eq!(api.settings("user-1").await.unwrap_err().name, ErrorName::SettingsApiUnavailable);
        }
        assert_eq!(server.connections.load(Ordering::SeqCst), 5);
        let error = api.settings("user-1").await.unwrap_err();
        assert!(error.message.contains("left alone"), "{error}");
    }

    #[test]
    fn an_address_is_https_and_holds_the_external_id() {
        let config = aws_config::SdkConfig::builder().build();
        let api = |url: &str| SettingsApi::new(&config, url.to_owned(), None).map(|_| ());
        assert_eq!(api("https://api.example.com/{externalId}"), Ok(()));
        assert_eq!(api("http://127.0.0.1:8081/{externalId}"), Ok(()));
        for bad in [
            "http://api.example.com/{externalId}",
            "https://api.example.com/",
            "http://127.0.0.1.example/{externalId}",
            "https://{externalId}.example.com/{externalId}",
            "https://me@{externalId}?q",
            "http://localhost:80@example.com/{externalId}",
            "https://api.example.com#{externalId}",
        ] {
            assert!(api(bad).unwrap_err().contains(bad), "{bad}");
        }
    }
}
