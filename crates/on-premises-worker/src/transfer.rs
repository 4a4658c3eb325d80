//! Inputs and results that are too large for a message, at addresses that the cloud has signed.
//!
//! A signed address is a credential: none of them gets into a log or an error.

use mqtt_connection::with_causes;
use protocol::JsonText;
use reqwest::header::{CONTENT_LENGTH, HOST};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

const ATTEMPTS: u32 = 5;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer silence ends a download.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const UPLOAD_TIMEOUT: Duration = Duration::from_mins(10);

/// Why a transfer ended.
enum Broken {
    ForGood(String),
    ForNow(String),
}

impl From<reqwest::Error> for Broken {
    fn from(error: reqwest::Error) -> Self {
        Self::ForNow(with_causes(&error.without_url()))
    }
}

/// The HTTP client of the worker, and where alone it reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct Transfers {
    client: Client,
    storage: Option<Url>,
}

impl Transfers {
    /// A client that trusts the authorities of a PEM file beside those of the system, and talks to addresses under that of
    /// the storage alone. Fails with a sentence.
    pub(crate) fn new(ca: Option<&Path>, storage: Option<Url>) -> Result<Self, String> {
        let mut client = Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT);
        // S3 leads nobody elsewhere: a signed address is good for one host.
        client = client.redirect(Policy::none());
        if let Some(path) = ca {
            let unusable = |error: &dyn std::error::Error| format!("{} cannot be used: {error}", path.display());
            let pem = std::fs::read(path).map_err(|error| unusable(&error))?;
            let authorities = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| unusable(&error))?;
            client = client.tls_certs_merge(authorities);
        }
        client
            .build()
            .map(|client| Self { client, storage })
            .map_err(|error| format!("no HTTPS client: {}", with_causes(&error)))
    }

    /// An address that the cloud has given, if it is one of the storage. Fails with a sentence.
    fn checked(&self, address: &str) -> Result<Url, String> {
        let storage = self.storage.as_ref().ok_or(
            "worker.toml has no `storage`: what is too large for a message is not transferred without it".to_owned(),
        )?;
        let expected = || format!("the cloud's address is none under {storage}");
        let url = Url::parse(address).map_err(|_| expected())?;
        let has_user = !url.username().is_empty() || url.password().is_some();
        let is_under = url.origin() == storage.origin() && url.path().starts_with(storage.path());
        if is_under && !has_user { Ok(url) } else { Err(expected()) }
    }

    /// Reads an input of that many bytes. Fails with a sentence.
    pub(crate) async fn get(&self, address: &str, bytes: u64) -> Result<JsonText, String> {
        let url = self.checked(address)?;
        let mut retry = FIRST_RETRY;
        for attempt in 1.. {
            match self.try_to_get(&url, bytes).await {
                Ok(text) => return JsonText::parse(&text).map_err(|error| format!("the input is no JSON: {error}")),
                Err(Broken::ForNow(why)) if attempt < ATTEMPTS => {
                    tracing::warn!(attempt, "the input cannot be read: {why}");
                }
                Err(Broken::ForGood(why) | Broken::ForNow(why)) => return Err(why),
            }
            tokio::time::sleep(retry).await;
            retry *= 2;
        }
        unreachable!("the last attempt returns")
    }

    async fn try_to_get(&self, url: &Url, bytes: u64) -> Result<Vec<u8>, Broken> {
        let mut response = successful(self.client.get(url.clone()).send().await?)?;
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            text.extend_from_slice(&chunk);
            if text.len() as u64 > bytes {
                return Err(Broken::ForGood(format!("the input has more than the {bytes} bytes that were announced")));
            }
        }
        if (text.len() as u64) < bytes {
            return Err(Broken::ForNow(format!("the input has {} bytes, expected {bytes}", text.len())));
        }
        Ok(text)
    }

    /// Uploads a result, once. Fails with a sentence. What is there already is not replaced: an earlier attempt, whose answer
    /// was lost, has put it there.
    pub(crate) async fn put(
        &self,
        address: &str,
        headers: &BTreeMap<String, String>,
        bytes: Vec<u8>,
    ) -> Result<(), String> {
        let mut request = self.client.put(self.checked(address)?).timeout(UPLOAD_TIMEOUT);
        // The client says these itself.
        let own = [CONTENT_LENGTH, HOST];
        for (name, value) in
            headers.iter().filter(|(name, _)| !own.iter().any(|own| name.eq_ignore_ascii_case(own.as_str())))
        {
            request = request.header(name, value);
        }
        let sent = request.body(bytes).send().await.map_err(Broken::from);
        let uploaded = sent.and_then(|response| match response.status() {
            StatusCode::PRECONDITION_FAILED => Ok(response),
            _ => successful(response),
        });
        uploaded.map(drop).map_err(|(Broken::ForGood(why) | Broken::ForNow(why))| why)
    }
}

fn successful(response: Response) -> Result<Response, Broken> {
    let status = response.status();
    let why = format!("the server answered with status {}", status.as_u16());
    match status.as_u16() {
        200..=299 => Ok(response),
        408 | 429 | 500.. => Err(Broken::ForNow(why)),
        _ => Err(Broken::ForGood(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;

    /// A server that gives these answers, one a connection, and returns what it was asked.
    async fn server(answers: &'static [&'static str]) -> (String, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/object?signature=secret", listener.local_addr().unwrap());
        let task = tokio::spawn(async move {
            let mut requests = Vec::new();
            for answer in answers {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut request = String::new();
                while !request.ends_with("\r\n\r\n") {
                    stream.read_line(&mut request).await.unwrap();
                }
                let lower = request.to_lowercase();
                let length = lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                let mut body = vec![0; length.unwrap_or(0)];
                stream.read_exact(&mut body).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                requests.push(request + &String::from_utf8(body).unwrap());
            }
            requests
        });
        (url, task)
    }

    fn transfers(storage: &str) -> Transfers {
        mqtt_connection::install_crypto_provider();
        Transfers::new(None, Some(Url::parse(storage).unwrap())).unwrap()
    }

    const BUSY: &str = "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const FORBIDDEN: &str = "HTTP/1.1 403 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const OBJECT: &str = "HTTP/1.1 200 OK\r\ncontent-length: 7\r\nconnection: close\r\n\r\n{\"a\":1}";
    const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

    #[tokio::test]
    async fn an_input_is_read_over_hiccups() {
        let (url, _server) = server(&[BUSY, OBJECT]).await;
        assert_eq!(transfers(&url).get(&url, 7).await, Ok(json!({"a": 1}).into()));
    }

    #[tokio::test]
    async fn an_input_that_is_not_what_was_announced_is_none() {
        let (url, _server) = server(&[OBJECT]).await;
        assert!(transfers(&url).get(&url, 6).await.unwrap_err().contains("more than the 6 bytes"));
        let (url, _server) = server(&[FORBIDDEN]).await;
        let error = transfers(&url).get(&url, 7).await.unwrap_err();
        assert_eq!(error, "the server answered with status 403");
    }

    #[tokio::test]
    async fn a_signed_address_is_in_no_error() {
        let address = "http://127.0.0.1:1/x?signature=secret";
        for storage in ["http://127.0.0.1:1/", "https://bucket.s3.eu-west-1.amazonaws.com/"] {
            let error = transfers(storage).put(address, &BTreeMap::new(), vec![]).await;
            assert!(!error.unwrap_err().contains("secret"));
        }
    }

    #[test]
    fn only_addresses_of_the_storage_are_used() {
        let bucket = "https://bucket.s3.eu-west-1.amazonaws.com/";
        let is_used = |storage: &str, address: &str| transfers(storage).checked(address).is_ok();
        assert!(is_used(bucket, "https://bucket.s3.eu-west-1.amazonaws.com/tenant1/job/input.json?X-Amz-Signature=x"));
        assert!(is_used("http://127.0.0.1:4566/bucket/", "http://127.0.0.1:4566/bucket/a?b"));
        for foreign in [
            "http://bucket.s3.eu-west-1.amazonaws.com/a",
            "https://bucket.s3.eu-west-1.amazonaws.com:8443/a",
            "https://other.s3.eu-west-1.amazonaws.com/a",
            "https://bucket.s3.eu-west-1.amazonaws.com.example.com/a",
            "https://bucket.s3.eu-west-1.amazonaws.com@example.com/a",
            "https://me:secret@bucket.s3.eu-west-1.amazonaws.com/a",
            "file:///etc/passwd",
            "nothing",
        ] {
            assert!(!is_used(bucket, foreign), "{foreign}");
        }
        for foreign in ["http://127.0.0.1:4566/bucket/../other/a", "http://127.0.0.1:4566/bucket/%2e%2e/other/a"] {
            assert!(!is_used("http://127.0.0.1:4566/bucket/", foreign), "{foreign}");
        }
        let without = Transfers { storage: None, ..transfers(bucket) };
        assert!(without.checked(bucket).unwrap_err().contains("no `storage`"));
    }

    #[tokio::test]
    async fn a_redirect_leads_nowhere() {
        let (elsewhere, other) = server(&[OBJECT]).await;
        let answer =
            format!("HTTP/1.1 307 There\r\nlocation: {elsewhere}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        let answers: &'static [&'static str] = vec![&*answer.leak(), FORBIDDEN].leak();
        let (url, _server) = server(answers).await;
        assert_eq!(transfers(&url).get(&url, 7).await, Err("the server answered with status 307".to_owned()));
        assert!(transfers(&url).put(&url, &BTreeMap::new(), vec![]).await.is_err());
        assert!(!other.is_finished(), "nobody has asked there");
    }

    #[tokio::test]
    async fn a_result_that_is_there_already_is_not_put_again() {
        let (url, _server) = server(&["HTTP/1.1 412 There\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"]).await;
        assert_eq!(transfers(&url).put(&url, &BTreeMap::new(), vec![]).await, Ok(()));
    }

    #[tokio::test]
    async fn a_result_is_put_with_the_headers_that_were_signed() {
        let (url, server) = server(&[FORBIDDEN, EMPTY]).await;
        let headers = [("content-length", "2"), ("content-type", "application/json")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        assert!(transfers(&url).put(&url, &headers, b"57".to_vec()).await.is_err());
        transfers(&url).put(&url, &headers, b"57".to_vec()).await.unwrap();
        let requests = server.await.unwrap();
        assert!(requests[1].starts_with("PUT /object?signature=secret"), "{requests:?}");
        assert!(requests[1].contains("content-type: application/json") && requests[1].ends_with("57"), "{requests:?}");
        assert_eq!(requests[1].matches("content-length").count(), 1);
    }
}
