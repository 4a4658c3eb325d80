//! Fetching an image over HTTP with resume, and checking that it is what was meant.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ed25519_dalek::{Signature, VerifyingKey};
use mqtt_connection::with_causes;
use protocol::{DeviceFailure, Firmware, ProtocolName, redacted};
use reqwest::header::{CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use reqwest::{Response, StatusCode};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often in a row a download may get no further before it is given up, and how often it may begin anew.
const ATTEMPTS: u32 = 6;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const BUFFER_BYTES: usize = 64 * 1024;
/// How much is read of what a server says when it refuses, in bytes.
const REFUSAL_BYTES: usize = 4096;

/// Why an image could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ImageFailure {
    /// The server's answer will not get better.
    Status(u16),
    /// The address is not good any more; a fresh one may be.
    AddressExpired(u16),
    /// The link or the server failed too often.
    Transfer(String),
    /// There is nothing under the address.
    Empty,
    SizeMismatch {
        expected: u64,
        actual: u64,
    },
    ChecksumMismatch {
        expected: String,
        actual: String,
    },
    SignatureMissing,
    SignatureInvalid,
    /// The new image does not boot.
    NotBooted,
    /// The device does not take the command.
    Denied(String),
}

impl ImageFailure {
    fn name(&self) -> String {
        match self {
            Self::Status(status) => format!("HttpStatus{status}"),
            Self::AddressExpired(_) => DeviceFailure::ADDRESS_EXPIRED.into(),
            Self::Transfer(_) => "TransferFailed".into(),
            Self::Empty => "EmptyImage".into(),
            Self::SizeMismatch { .. } => "SizeMismatch".into(),
            Self::ChecksumMismatch { .. } => "ChecksumMismatch".into(),
            Self::SignatureMissing => "SignatureMissing".into(),
            Self::SignatureInvalid => "SignatureInvalid".into(),
            Self::NotBooted => "BootFailed".into(),
            Self::Denied(_) => "7002".into(),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Status(status) => format!("the server answered the download with status {status}"),
            Self::AddressExpired(status) => format!("the image's address has expired: status {status}"),
            Self::Transfer(why) => format!("the download broke off {ATTEMPTS} times: {why}"),
            Self::Empty => "the image has no bytes".into(),
            Self::SizeMismatch { expected, actual } => format!("the image has {actual} bytes, expected {expected}"),
            Self::ChecksumMismatch { expected, actual } => {
                format!("the image's SHA-256 is {actual}, expected {expected}")
            }
            Self::SignatureMissing => "the command carries no signature, and this device takes none without".into(),
            Self::SignatureInvalid => "the signature does not fit the image and this device's public key".into(),
            Self::NotBooted => "the new image did not boot, the old one runs".into(),
            Self::Denied(why) => why.clone(),
        }
    }

    /// The failure in the words of a device of that protocol: USP agents (TR-369) know error numbers only.
    pub(crate) fn report(&self, protocol: ProtocolName) -> DeviceFailure {
        match (protocol, self) {
            (ProtocolName::Json, _) | (_, Self::Denied(_)) => {
                DeviceFailure { code: self.name(), message: self.message() }
            }
            // 7022 is a command failure, 7000 a failure without a number of its own.
            (ProtocolName::Usp, failure) => {
                let code =
                    if matches!(failure, Self::Status(_) | Self::AddressExpired(_) | Self::Transfer(_) | Self::Empty) {
                        "7022"
                    } else {
                        "7000"
                    };
                DeviceFailure { code: code.into(), message: format!("{}: {}", self.name(), self.message()) }
            }
        }
    }
}

/// What ended a download before the image was there.
#[derive(Debug)]
pub(crate) enum DownloadError {
    /// The image cannot be had.
    Image(ImageFailure),
    /// `on_progress` said so.
    Stopped,
    /// The partial file cannot be written.
    Disk(PathBuf, io::Error),
}

/// One try's end.
enum Broken {
    ForGood(DownloadError),
    ForNow(String),
    /// What has come so far is of no use.
    Anew(String),
}

impl From<reqwest::Error> for Broken {
    fn from(error: reqwest::Error) -> Self {
        // It quotes the address, which is good for whoever reads it.
        Self::ForNow(redacted(&with_causes(&error)))
    }
}

/// The HTTP client that all devices of a process share. `ca` is trusted beside the system's roots.
pub(crate) fn client(ca: Option<&[u8]>) -> reqwest::Result<reqwest::Client> {
    let roots = ca.map(reqwest::Certificate::from_pem_bundle).transpose()?.unwrap_or_default();
    reqwest::Client::builder()
        .tls_certs_merge(roots)
        // Devices have no proxy, whatever the shell that starts the simulator has.
        .no_proxy()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(Duration::from_secs(30))
        .build()
}

/// A download into a file that may hold the first part already.
pub(crate) struct Download<'a> {
    pub(crate) client: &'a reqwest::Client,
    pub(crate) firmware: &'a Firmware,
    pub(crate) partial: &'a Path,
    /// Whose images the device takes; any, if it has none.
    pub(crate) public_key: Option<VerifyingKey>,
    /// Bytes a second; none: as fast as it goes.
    pub(crate) rate: Option<u64>,
}

impl Download<'_> {
    /// Fetches what is missing; `on_progress` gets the bytes so far and in all, and can stop it.
    pub(crate) async fn fetch(
        &self,
        mut on_progress: impl FnMut(u64, Option<u64>) -> ControlFlow<()>,
    ) -> Result<(), DownloadError> {
        let (mut failures, mut beginnings, mut furthest) = (0, 0, self.length());
        let (mut is_resumed, mut are_pieces_checked) = (self.length() > 0, false);
        loop {
            let attempt = self.attempt(self.length(), &mut on_progress).await;
            let checked = match attempt {
                Ok(()) if is_resumed && !are_pieces_checked => {
                    are_pieces_checked = true;
                    self.check_pieces().await
                }
                other => other,
            };
            let why = match checked {
                Ok(()) => return Ok(()),
                Err(Broken::ForGood(error)) => return Err(error),
                Err(Broken::Anew(why)) => {
                    remove_if_there(self.partial).map_err(|error| DownloadError::Disk(self.partial.into(), error))?;
                    beginnings += 1;
                    why
                }
                Err(Broken::ForNow(why)) => why,
            };
            is_resumed = self.length() > 0;
            failures = if self.length() > furthest { 1 } else { failures + 1 };
            furthest = furthest.max(self.length());
            if failures.max(beginnings) >= ATTEMPTS {
                return Err(DownloadError::Image(ImageFailure::Transfer(why)));
            }
            tracing::debug!("{}: {why}, trying again", redacted(&self.firmware.url));
            tokio::time::sleep(FIRST_RETRY * 2_u32.pow(failures - 1)).await;
        }
    }

    fn length(&self) -> u64 {
        self.partial.metadata().map_or(0, |metadata| metadata.len())
    }

    async fn attempt(
        &self,
        have: u64,
        on_progress: &mut impl FnMut(u64, Option<u64>) -> ControlFlow<()>,
    ) -> Result<(), Broken> {
        if have > 0 && Some(have) == self.firmware.size {
            return Ok(());
        }
        let mut request = self.client.get(&self.firmware.url);
        // Without a strong validator nothing says that the rest is of the same file (RFC 9110, 13.1.5 and 14.2).
        let tag = std::fs::read_to_string(self.tag_file()).ok().filter(|_| have > 0);
        if let Some(tag) = &tag {
            request = request.header(RANGE, format!("bytes={have}-")).header(IF_RANGE, tag);
        }
        let response = request.send().await?;
        let range = ContentRange::of(&response);
        // Some servers do not know `If-Range`.
        let is_of_same = strong_tag(&response).is_none_or(|other| tag.as_deref() == Some(other));
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range.first == Some(have) && self.may_have(range.total) && is_of_same => {
                self.receive(response, have, range.total, on_progress).await
            }
            StatusCode::OK => {
                let total = response.content_length();
                match (self.firmware.size, total) {
                    (Some(expected), Some(actual)) if expected != actual => Err(size_mismatch(expected, actual)),
                    _ => self.receive(response, 0, total, on_progress).await,
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => match (self.firmware.size, range.total) {
                // A power cut came after the last byte.
                (None, total) if total == Some(have) => Ok(()),
                (Some(expected), Some(actual)) if expected != actual => Err(size_mismatch(expected, actual)),
                _ => Err(Broken::Anew("the server has another image than the one begun".into())),
            },
            StatusCode::PARTIAL_CONTENT => Err(Broken::Anew("the server sends another part than was asked for".into())),
            status if status.is_server_error() || matches!(status.as_u16(), 408 | 429) => {
                Err(Broken::ForNow(format!("the server answered with status {status}")))
            }
            status => {
                let is_expired = has_expired(response, have).await;
                let failure = if is_expired { ImageFailure::AddressExpired } else { ImageFailure::Status };
                Err(Broken::ForGood(DownloadError::Image(failure(status.as_u16()))))
            }
        }
    }

    /// Whether the image may be so long, as far as either is known.
    fn may_have(&self, total: Option<u64>) -> bool {
        self.firmware.size.is_none() || total.is_none() || total == self.firmware.size
    }

    async fn receive(
        &self,
        mut response: Response,
        offset: u64,
        total: Option<u64>,
        on_progress: &mut impl FnMut(u64, Option<u64>) -> ControlFlow<()>,
    ) -> Result<(), Broken> {
        let total = self.firmware.size.or(total);
        // Written in place and at once, not on another thread: a device that loses power writes nothing afterwards.
        let mut file =
            OpenOptions::new().create(true).append(true).open(self.partial).map_err(|error| self.disk(error))?;
        file.set_len(offset).map_err(|error| self.disk(error))?;
        if offset == 0 {
            self.remember_tag(&response)?;
        }
        let mut have = offset;
        while let Some(chunk) = response.chunk().await? {
            file.write_all(&chunk).map_err(|error| self.disk(error))?;
            have += chunk.len() as u64;
            if on_progress(have, total).is_break() {
                return Err(Broken::ForGood(DownloadError::Stopped));
            }
            if self.firmware.size.is_some_and(|size| have > size) {
                break;
            }
            if let Some(rate) = self.rate {
                tokio::time::sleep(Duration::from_micros(chunk.len() as u64 * 1_000_000 / rate.max(1))).await;
            }
        }
        file.sync_all().map_err(|error| self.disk(error))?;
        match total {
            // Of a body without a length the end of the connection looks like the end.
            Some(total) if have < total => Err(Broken::ForNow(format!("it ended after {have} of {total} bytes"))),
            _ if have == 0 => Err(Broken::ForGood(DownloadError::Image(ImageFailure::Empty))),
            _ => Ok(()),
        }
    }

    /// An image in pieces may be of two files after all: then it is fetched once more, in one.
    async fn check_pieces(&self) -> Result<(), Broken> {
        let (image, firmware, key) = (self.partial.to_owned(), self.firmware.clone(), self.public_key);
        let verified = tokio::task::spawn_blocking(move || verify(&image, &firmware, key.as_ref())).await;
        match verified.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|error| self.disk(error))? {
            Ok(_) | Err(ImageFailure::SignatureMissing) => Ok(()),
            Err(failure) => Err(Broken::Anew(format!("in pieces, {}", failure.message()))),
        }
    }

    fn tag_file(&self) -> PathBuf {
        self.partial.with_extension("etag")
    }

    /// Keeps what tells this file from another under the same address, over power cuts.
    fn remember_tag(&self, response: &Response) -> Result<(), Broken> {
        if let Some(tag) = strong_tag(response) {
            return std::fs::write(self.tag_file(), tag).map_err(|error| self.disk(error));
        }
        // There may be none from before.
        let _ = std::fs::remove_file(self.tag_file());
        Ok(())
    }

    fn disk(&self, error: io::Error) -> Broken {
        Broken::ForGood(DownloadError::Disk(self.partial.to_owned(), error))
    }
}

/// Whether a refusal says that a signed address is not good any more: its own time is over, or that of the credentials that signed
/// it (S3: `AccessDenied` with "Request has expired", 403, and `ExpiredToken`, 400;
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>). Other servers say it with a 403 in the middle.
async fn has_expired(mut response: Response, have: u64) -> bool {
    let status = response.status();
    if !matches!(status, StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN) {
        return false;
    }
    let mut words = Vec::new();
    while let (true, Ok(Some(chunk))) = (words.len() < REFUSAL_BYTES, response.chunk().await) {
        words.extend_from_slice(&chunk);
    }
    let words = String::from_utf8_lossy(&words).to_ascii_lowercase();
    words.contains("expired") || (status == StatusCode::FORBIDDEN && have > 0)
}

/// What tells a file from another under the same address. A weak tag does not say that every byte is the same.
fn strong_tag(response: &Response) -> Option<&str> {
    let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok());
    tag.filter(|tag| !tag.starts_with("W/"))
}

fn size_mismatch(expected: u64, actual: u64) -> Broken {
    Broken::ForGood(DownloadError::Image(ImageFailure::SizeMismatch { expected, actual }))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)
        .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Which part of how much a server sends: `bytes 10-99/100`, or `bytes */100` if it has no such part (RFC 9110, 14.4).
#[derive(Debug, Default)]
struct ContentRange {
    first: Option<u64>,
    total: Option<u64>,
}

impl ContentRange {
    fn of(response: &Response) -> Self {
        let header = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let Some((part, total)) = header.strip_prefix("bytes ").and_then(|range| range.split_once('/')) else {
            return Self::default();
        };
        Self { first: part.split('-').next().and_then(|first| first.parse().ok()), total: total.parse().ok() }
    }
}

/// Checks size, SHA-256 and signature as far as the command gives them; a device with a public key wants a
/// signature. Returns the SHA-256 in hexadecimal.
pub(crate) fn verify(
    image: &Path,
    firmware: &Firmware,
    public_key: Option<&VerifyingKey>,
) -> io::Result<Result<String, ImageFailure>> {
    let mut signature = match (public_key, &firmware.signature) {
        (None, _) => None,
        (Some(_), None) => return Ok(Err(ImageFailure::SignatureMissing)),
        (Some(key), Some(text)) => match stream_verifier(key, text) {
            Some(verifier) => Some(verifier),
            None => return Ok(Err(ImageFailure::SignatureInvalid)),
        },
    };
    let mut file = File::open(image)?;
    let (mut digest, mut actual, mut buffer) = (Sha256::new(), 0_u64, vec![0; BUFFER_BYTES]);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        actual += count as u64;
        digest.update(&buffer[..count]);
        if let Some(verifier) = &mut signature {
            verifier.update(&buffer[..count]);
        }
    }
    let sha256 = hexadecimal(&digest.finalize());
    if actual == 0 {
        return Ok(Err(ImageFailure::Empty));
    }
    if let Some(expected) = firmware.size.filter(|expected| *expected != actual) {
        return Ok(Err(ImageFailure::SizeMismatch { expected, actual }));
    }
    if let Some(expected) = firmware.sha256.as_ref().filter(|expected| !expected.eq_ignore_ascii_case(&sha256)) {
        return Ok(Err(ImageFailure::ChecksumMismatch { expected: expected.clone(), actual: sha256 }));
    }
    if signature.is_some_and(|verifier| verifier.finalize_and_verify().is_err()) {
        return Ok(Err(ImageFailure::SignatureInvalid));
    }
    Ok(Ok(sha256))
}

/// The SHA-256 of a file in hexadecimal.
pub(crate) fn digest(path: &Path) -> io::Result<String> {
    let mut digest = Sha256::new();
    io::copy(&mut File::open(path)?, &mut digest)?;
    Ok(hexadecimal(&digest.finalize()))
}

fn stream_verifier(key: &VerifyingKey, signature: &str) -> Option<ed25519_dalek::StreamVerifier> {
    let bytes = BASE64_STANDARD.decode(signature).ok()?;
    key.verify_stream(&Signature::from_slice(&bytes).ok()?).ok()
}

fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::{Signer, SigningKey};
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    const IMAGE: &[u8] = &[7; 100_000];

    /// What the server does with its next connections; the last one goes on for ever.
    #[derive(Clone, Copy)]
    enum Answer {
        /// The range asked for, or everything.
        Serve,
        /// An answer without the image.
        Refuse(&'static str, &'static str),
        /// Another image: it has another tag, so there is no rest of the one begun.
        Replaced,
        /// The image, without a tag or with such a one, until the connection breaks.
        Tagged(&'static str, usize),
        /// So much of it, without its length: the end looks like the end.
        Unmeasured(usize),
        /// The rest of an image of that length.
        Total(&'static str),
        /// Another length than the image has.
        Length(usize),
        /// The rest, of whatever file it is asked for.
        Rest(&'static str),
        /// The same, but the connection breaks after so many bytes.
        Break(usize),
        /// No ranges here.
        ServeAll,
        Status(u16),
    }

    struct Server {
        url: String,
        requests: Arc<Mutex<Vec<String>>>,
    }

    async fn serve(answers: Vec<Answer>) -> Server {
        mqtt_connection::install_crypto_provider();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/firmware/2.0.0", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            for number in 0.. {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(socket.read_u8().await.unwrap());
                }
                let request = String::from_utf8(request).unwrap().to_lowercase();
                socket.write_all(&answer(*answers.get(number).or(answers.last()).unwrap(), &request)).await.unwrap();
                seen.lock().unwrap().push(request);
            }
        });
        Server { url, requests }
    }

    fn answer(answer: Answer, request: &str) -> Vec<u8> {
        let answer = match answer {
            Answer::Refuse(status, body) => {
                let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}", body.len());
                return format!("{head}\r\n\r\n{body}").into_bytes();
            }
            Answer::Replaced => Answer::ServeAll,
            Answer::Tagged(tag, limit) => {
                let head =
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\n{tag}content-length: {}\r\n\r\n", IMAGE.len());
                return [head.as_bytes(), &IMAGE[..limit]].concat();
            }
            Answer::Unmeasured(limit) => {
                let head = "HTTP/1.1 200 OK\r\nconnection: close\r\netag: \"one\"\r\n\r\n";
                return [head.as_bytes(), &IMAGE[..limit]].concat();
            }
            Answer::Length(length) => {
                let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
                return [head.as_bytes(), &IMAGE[..length]].concat();
            }
            Answer::Total(total) => {
                let head = "HTTP/1.1 206 Partial\r\nconnection: close\r\ncontent-length: 70000\r\ncontent-range: bytes 30000-99999/";
                return [format!("{head}{total}\r\n\r\n").as_bytes(), &IMAGE[30_000..]].concat();
            }
            Answer::Rest(tag) => {
                let head = "HTTP/1.1 206 Partial\r\nconnection: close\r\ncontent-length: 70000\r\ncontent-range: bytes 30000-99999/*";
                return [format!("{head}\r\netag: {tag}\r\n\r\n").as_bytes(), &IMAGE[30_000..]].concat();
            }
            other => other,
        };
        let from: usize = request
            .split_once("range: bytes=")
            .map_or(0, |(_, range)| range.split('-').next().unwrap().parse().unwrap());
        let last = IMAGE.len() - 1;
        let (from, head, limit) = match answer {
            Answer::Status(status) => (IMAGE.len(), format!("HTTP/1.1 {status} No"), usize::MAX),
            Answer::Serve | Answer::Break(_) if from > last => {
                (IMAGE.len(), format!("HTTP/1.1 416 No\r\ncontent-range: bytes */{}", IMAGE.len()), usize::MAX)
            }
            Answer::Break(limit) if from == 0 => (0, "HTTP/1.1 200 OK".to_owned(), limit),
            Answer::Serve | Answer::Break(_) if from > 0 => {
                let limit = if let Answer::Break(limit) = answer { limit } else { usize::MAX };
                (from, format!("HTTP/1.1 206 Partial\r\ncontent-range: bytes {from}-{last}/{}", IMAGE.len()), limit)
            }
            _ => (0, "HTTP/1.1 200 OK".to_owned(), usize::MAX),
        };
        let body = &IMAGE[from..];
        let head = format!("{head}\r\netag: \"one\"\r\nconnection: close");
        let mut bytes = format!("{head}\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
        bytes.extend(&body[..limit.min(body.len())]);
        bytes
    }

    fn firmware(url: &str) -> Firmware {
        let sha256 = Some(hexadecimal(&Sha256::digest(IMAGE)));
        Firmware { version: "2.0.0".into(), url: url.into(), sha256, size: Some(IMAGE.len() as u64), signature: None }
    }

    struct Trial {
        folder: tempfile::TempDir,
        server: Server,
    }

    impl Trial {
        async fn new(answers: Vec<Answer>) -> Self {
            Self { folder: tempfile::tempdir().unwrap(), server: serve(answers).await }
        }

        fn partial(&self) -> PathBuf {
            self.folder.path().join("download.partial")
        }

        async fn fetch(&self, firmware: &Firmware) -> Result<(), DownloadError> {
            let client = client(None).unwrap();
            let download =
                Download { client: &client, firmware, partial: &self.partial(), public_key: None, rate: None };
            download.fetch(|_, _| ControlFlow::Continue(())).await
        }

        fn requests(&self) -> Vec<String> {
            self.server.requests.lock().unwrap().clone()
        }
    }

    #[tokio::test]
    async fn a_broken_download_is_resumed_where_it_broke() {
        let trial = Trial::new(vec![Answer::Break(30_000), Answer::Break(20_000), Answer::Serve]).await;
        let firmware = firmware(&trial.server.url);
        trial.fetch(&firmware).await.unwrap();
        assert!(verify(&trial.partial(), &firmware, None).unwrap().is_ok());
        let requests = trial.requests();
        assert_eq!(requests.len(), 3);
        assert!(requests[2].contains("range: bytes=50000-"), "{}", requests[2]);
    }

    #[tokio::test]
    async fn a_server_without_ranges_sends_everything_again() {
        let trial = Trial::new(vec![Answer::ServeAll]).await;
        let firmware = firmware(&trial.server.url);
        std::fs::write(trial.partial(), [1; 500]).unwrap();
        trial.fetch(&firmware).await.unwrap();
        assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
    }

    #[tokio::test]
    async fn a_complete_file_needs_no_more_bytes() {
        let trial = Trial::new(vec![Answer::Serve]).await;
        std::fs::write(trial.partial(), IMAGE).unwrap();
        let mut firmware = firmware(&trial.server.url);
        trial.fetch(&firmware).await.unwrap();
        assert!(trial.requests().is_empty());
        firmware.size = None;
        trial.fetch(&firmware).await.unwrap();
        assert_eq!(trial.requests().len(), 1);
        assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
    }

    #[tokio::test]
    async fn a_missing_image_is_given_up_at_once_and_an_overloaded_server_is_not() {
        let trial = Trial::new(vec![Answer::Status(503), Answer::Status(404)]).await;
        let error = trial.fetch(&firmware(&trial.server.url)).await.unwrap_err();
        assert!(matches!(error, DownloadError::Image(ImageFailure::Status(404))), "{error:?}");
        assert_eq!(trial.requests().len(), 2);
    }

    // Paused, because a download is tried again for a while.
    #[tokio::test(start_paused = true)]
    async fn an_error_does_not_repeat_what_the_address_keeps_secret() {
        let trial = Trial::new(vec![Answer::Serve]).await;
        // Nobody listens on that port.
        let error = trial.fetch(&firmware("http://127.0.0.1:1/2.0.0?X-Amz-Signature=SECRET")).await.unwrap_err();
        let DownloadError::Image(failure) = error else { panic!("{error:?}") };
        for protocol in ProtocolName::ALL {
            let message = failure.report(protocol).message;
            assert!(message.contains("http://127.0.0.1:1/2.0.0?…") && !message.contains("SECRET"), "{message}");
        }
    }

    #[tokio::test]
    async fn an_address_that_expires_is_told_from_one_that_was_never_good() {
        let of_s3 = "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>";
        let of_token = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";
        let denied = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>";
        for (answers, failure) in [
            (vec![Answer::Refuse("403 Forbidden", of_s3)], ImageFailure::AddressExpired(403)),
            (vec![Answer::Refuse("400 Bad Request", of_token)], ImageFailure::AddressExpired(400)),
            (vec![Answer::Refuse("403 Forbidden", denied)], ImageFailure::Status(403)),
            (vec![Answer::Break(30_000), Answer::Refuse("403 Forbidden", denied)], ImageFailure::AddressExpired(403)),
            (vec![Answer::Break(30_000), Answer::Refuse("400 Bad Request", denied)], ImageFailure::Status(400)),
        ] {
            let trial = Trial::new(answers).await;
            let error = trial.fetch(&firmware(&trial.server.url)).await.unwrap_err();
            assert!(matches!(&error, DownloadError::Image(found) if *found == failure), "{error:?} is no {failure:?}");
        }
    }

    #[tokio::test]
    async fn a_download_is_resumed_only_with_the_same_file() {
        let trial = Trial::new(vec![Answer::Break(30_000), Answer::Replaced]).await;
        let firmware = firmware(&trial.server.url);
        trial.fetch(&firmware).await.unwrap();
        assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
        let requests = trial.requests();
        let resumed = "range: bytes=30000-";
        assert!(requests[1].contains(resumed) && requests[1].contains("if-range: \"one\""), "{requests:?}");
        assert_eq!(requests.len(), 2, "the server sends the whole of another file at once");
    }

    #[tokio::test]
    async fn without_a_strong_validator_a_download_begins_anew() {
        for tag in ["", "etag: W/\"one\"\r\n", "last-modified: Tue, 01 Dec 2026 00:00:00 GMT\r\n"] {
            let trial = Trial::new(vec![Answer::Tagged(tag, 30_000), Answer::Serve]).await;
            let firmware = firmware(&trial.server.url);
            trial.fetch(&firmware).await.unwrap();
            assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
            let requests = trial.requests();
            assert!(requests.len() == 2 && !requests[1].contains("range:"), "{tag}: {requests:?}");
        }
    }

    #[tokio::test]
    async fn the_rest_must_be_of_an_image_as_long() {
        for (total, requests) in [("100000", 2), ("*", 2), ("100001", 3), ("99999", 3)] {
            let trial = Trial::new(vec![Answer::Break(30_000), Answer::Total(total), Answer::Serve]).await;
            trial.fetch(&firmware(&trial.server.url)).await.unwrap();
            assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
            assert_eq!(trial.requests().len(), requests, "{total}");
        }
    }

    #[tokio::test]
    async fn the_rest_of_another_file_is_not_taken_from_a_server_without_if_range() {
        for (tag, requests) in [("\"one\"", 2), ("W/\"one\"", 2), ("\"two\"", 3)] {
            let trial = Trial::new(vec![Answer::Break(30_000), Answer::Rest(tag), Answer::Serve]).await;
            let firmware = Firmware { sha256: None, ..firmware(&trial.server.url) };
            trial.fetch(&firmware).await.unwrap();
            assert_eq!(trial.requests().len(), requests, "{tag}");
        }
    }

    /// Each attempt comes as far as another one has before.
    #[tokio::test(start_paused = true)]
    async fn who_gets_no_further_gives_up() {
        let answers = [30_000, 20_000].map(|limit| Answer::Tagged("", limit)).into_iter().cycle().take(100).collect();
        let trial = Trial::new(answers).await;
        let error = trial.fetch(&firmware(&trial.server.url)).await.unwrap_err();
        assert!(matches!(error, DownloadError::Image(ImageFailure::Transfer(_))), "{error:?}");
        assert_eq!(trial.requests().len(), 6);
    }

    #[tokio::test]
    async fn a_range_that_nobody_asked_for_is_no_image() {
        let trial = Trial::new(vec![Answer::Refuse("416 No\r\ncontent-range: bytes */0", "")]).await;
        let error = trial.fetch(&Firmware { size: None, ..firmware(&trial.server.url) }).await.unwrap_err();
        assert!(matches!(error, DownloadError::Image(ImageFailure::Status(416))), "{error:?}");
    }

    #[tokio::test]
    async fn an_end_before_the_known_size_is_an_interruption() {
        for size in [0, 1, 30_000, 99_999] {
            let trial = Trial::new(vec![Answer::Unmeasured(size), Answer::Serve]).await;
            trial.fetch(&firmware(&trial.server.url)).await.unwrap();
            assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
            let requests = trial.requests();
            assert_eq!(requests[1].contains(&format!("range: bytes={size}-")), size > 0, "{requests:?}");
        }
        // Its size may be announced by the server alone.
        let trial = Trial::new(vec![Answer::Break(30_000), Answer::Serve]).await;
        trial.fetch(&Firmware { size: None, ..firmware(&trial.server.url) }).await.unwrap();
        assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
    }

    #[tokio::test]
    async fn another_size_and_nothing_at_all_are_no_image() {
        for (answer, size, expected) in [
            (Answer::Length(0), None, ImageFailure::Empty),
            (Answer::Unmeasured(0), None, ImageFailure::Empty),
            (Answer::Length(0), Some(100_000), ImageFailure::SizeMismatch { expected: 100_000, actual: 0 }),
            (Answer::Length(99_999), Some(100_000), ImageFailure::SizeMismatch { expected: 100_000, actual: 99_999 }),
        ] {
            let trial = Trial::new(vec![answer]).await;
            let firmware = Firmware { size, sha256: None, ..firmware(&trial.server.url) };
            let error = trial.fetch(&firmware).await.unwrap_err();
            assert!(matches!(&error, DownloadError::Image(failure) if *failure == expected), "{error:?}");
            assert_eq!(trial.requests().len(), 1);
        }
        let nothing = Firmware { size: None, sha256: None, ..firmware("http://localhost/2.0.0") };
        assert_eq!(checked(&[], &nothing, None), Err(ImageFailure::Empty));
    }

    /// What is on the flash may be of another image, whatever its tag says; but one that is wrong as a whole stays so.
    #[tokio::test]
    async fn a_mismatch_after_a_resumed_download_begins_anew_once() {
        for is_good in [true, false] {
            // The second time it breaks off too.
            let trial = Trial::new(vec![Answer::Serve, Answer::Break(30_000), Answer::Serve]).await;
            std::fs::write(trial.partial(), vec![1; 30_000]).unwrap();
            std::fs::write(trial.partial().with_extension("etag"), "\"one\"").unwrap();
            let good = firmware(&trial.server.url);
            let sha256 = if is_good { good.sha256.clone() } else { Some("0".repeat(64)) };
            let firmware = Firmware { sha256, ..good };
            trial.fetch(&firmware).await.unwrap();
            assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
            assert_eq!(verify(&trial.partial(), &firmware, None).unwrap().is_ok(), is_good);
            let requests = trial.requests();
            assert!(requests[0].contains("range: bytes=30000-") && !requests[1].contains("range:"), "{requests:?}");
            assert_eq!(requests.len(), 3, "{requests:?}");
        }
    }

    /// A server whose answers never fit is given up.
    #[tokio::test(start_paused = true)]
    async fn a_download_begins_anew_a_few_times_only() {
        let answers = [Answer::Break(30_000), Answer::Total("7")].into_iter().cycle().take(100).collect();
        let trial = Trial::new(answers).await;
        let error = trial.fetch(&firmware(&trial.server.url)).await.unwrap_err();
        assert!(matches!(error, DownloadError::Image(ImageFailure::Transfer(_))), "{error:?}");
    }

    #[tokio::test]
    async fn progress_can_stop_a_download_and_what_came_stays() {
        let trial = Trial::new(vec![Answer::Serve]).await;
        let firmware = firmware(&trial.server.url);
        let client = client(None).unwrap();
        let download =
            Download { client: &client, firmware: &firmware, partial: &trial.partial(), public_key: None, rate: None };
        let error = download.fetch(|_, _| ControlFlow::Break(())).await.unwrap_err();
        assert!(matches!(error, DownloadError::Stopped));
        assert!(download.length() > 0);
        trial.fetch(&firmware).await.unwrap();
        assert_eq!(std::fs::read(trial.partial()).unwrap(), IMAGE);
    }

    fn checked(image: &[u8], firmware: &Firmware, key: Option<&VerifyingKey>) -> Result<String, ImageFailure> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, image).unwrap();
        verify(&path, firmware, key).unwrap()
    }

    #[test]
    fn size_and_checksum_must_fit() {
        let mut firmware = firmware("http://localhost/2.0.0");
        let mut flipped = IMAGE.to_vec();
        flipped[0] ^= 1;
        assert!(matches!(checked(&flipped, &firmware, None), Err(ImageFailure::ChecksumMismatch { .. })));
        let short = checked(&IMAGE[1..], &firmware, None);
        assert_eq!(short, Err(ImageFailure::SizeMismatch { expected: 100_000, actual: 99_999 }));
        firmware.sha256 = firmware.sha256.map(|text| text.to_uppercase());
        assert!(checked(IMAGE, &firmware, None).is_ok());
    }

    #[test]
    fn a_device_with_a_key_takes_only_signed_images() {
        let key = SigningKey::from_bytes(&[3; 32]);
        let public = key.verifying_key();
        let mut firmware = firmware("http://localhost/2.0.0");
        assert_eq!(checked(IMAGE, &firmware, Some(&public)), Err(ImageFailure::SignatureMissing));
        firmware.signature = Some(BASE64_STANDARD.encode(key.sign(IMAGE).to_bytes()));
        assert!(checked(IMAGE, &firmware, Some(&public)).is_ok());
        let other = SigningKey::from_bytes(&[4; 32]).verifying_key();
        assert_eq!(checked(IMAGE, &firmware, Some(&other)), Err(ImageFailure::SignatureInvalid));
        firmware.signature = Some("?".into());
        assert_eq!(checked(IMAGE, &firmware, Some(&public)), Err(ImageFailure::SignatureInvalid));
    }

    #[test]
    fn usp_devices_report_numbers_and_json_devices_names() {
        let failure = ImageFailure::Status(404);
        assert_eq!(failure.report(ProtocolName::Json).code, "HttpStatus404");
        let usp = failure.report(ProtocolName::Usp);
        assert_eq!(usp.code, "7022");
        assert!(usp.message.starts_with("HttpStatus404: "));
    }
}
