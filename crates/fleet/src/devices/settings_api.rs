//! The third party that knows what its users want: an HTTPS API of settings profiles.

use crate::error::aws;
use crate::queue::json;
use crate::{Error, ErrorName};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::Value;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Mutex;
use ureq::http::{Response, StatusCode, header::RETRY_AFTER};

/// What stands for the external id in the API's address.
const PLACEHOLDER: &str = "{externalId}";
/// Characters that need no escape in a path (RFC 3986, 2.3).
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long all requests for one profile may take, waits included: less than the function's own limit.
const TIME_BUDGET: Duration = Duration::from_secs(18);
/// How often a profile is asked for; the state machine tries again later, and with longer waits.
const ATTEMPTS: u32 = 3;
/// The first wait when the API does not say how long; it doubles.
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
            .timeout_global(Some(REQUEST_TIMEOUT))
            // A redirection could take the key elsewhere.
            .max_redirects(0)
            .http_status_as_error(false)
            .build()
            .new_agent();
        Ok(Self { url, key: secret.map(|secret| ApiKey::new(config, secret)), http })
    }

    /// The settings of a profile, as the API has them.
    pub(crate) async fn settings(&self, external_id: &str) -> Result<Value, Error> {
        // In a path these are no names.
        if [".", ".."].contains(&external_id) {
            return Err(Error::invalid("externalId", external_id, "the name of a profile"));
        }
        let url = self.url.replace(PLACEHOLDER, &utf8_percent_encode(external_id, ESCAPED).to_string());
        let begin = Instant::now();
        let (mut attempt, mut renewed) = (1, false);
        loop {
            let (why, wait) = match self.request(&url, external_id, renewed).await {
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
                Err(Refusal::Transient(why, wait)) => (why, wait.unwrap_or(FIRST_WAIT * 2_u32.pow(attempt - 1))),
            };
            if attempt == ATTEMPTS || begin.elapsed() + wait + REQUEST_TIMEOUT > TIME_BUDGET {
                let message = format!("{why}, in {attempt} attempts; the next would be in {} s", wait.as_secs_f32());
                return Err(Error::new(ErrorName::SettingsApiUnavailable, message));
            }
            tracing::warn!(external_id, attempt, why, wait_ms = wait.as_millis(), "the settings API is asked again");
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    async fn request(&self, url: &str, external_id: &str, renew: bool) -> Result<Value, Refusal> {
        let mut request = self.http.get(url).header("accept", "application/json");
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key.value(renew).await.map_err(Refusal::Final)?);
        }
        let answer = request.call().map_err(|error| Refusal::Transient(format!("the settings API: {error}"), None));
        read(answer?, external_id)
    }
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
            return Err(Refusal::Transient(format!("the settings API answered {status}"), retry_after(&response)));
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
