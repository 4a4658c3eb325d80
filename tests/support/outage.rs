//! AWS services that refuse, or do not answer, for a while.

use aws_config::SdkConfig;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_runtime_api::http::StatusCode;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::retry::RetryConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How a service refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It says that it is asked too often.
    Throttled,
    /// Its connections break.
    Down,
}

/// A service that refuses some calls.
#[derive(Debug, Clone, Copy)]
pub struct Outage {
    /// As it is called in signatures, such as `dynamodb`.
    pub service: &'static str,
    /// How it refuses.
    pub refusal: Refusal,
    /// How many calls it answers before.
    pub after: usize,
    /// How many calls it refuses then.
    pub calls: usize,
}

/// A configuration whose clients meet an outage.
pub fn refusing(config: &SdkConfig, outage: Outage) -> SdkConfig {
    let inner = config.http_client().expect("an HTTP client");
    let client = Refusing { inner, outage, calls: Arc::default() };
    let retry = RetryConfig::standard().with_initial_backoff(Duration::from_millis(5));
    config.to_builder().http_client(SharedHttpClient::new(client)).retry_config(retry).build()
}

#[derive(Debug)]
struct Refusing {
    inner: SharedHttpClient,
    outage: Outage,
    calls: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Connector {
    inner: SharedHttpConnector,
    outage: Outage,
    calls: Arc<AtomicUsize>,
}

impl HttpClient for Refusing {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let inner = self.inner.http_connector(settings, components);
        SharedHttpConnector::new(Connector { inner, outage: self.outage, calls: Arc::clone(&self.calls) })
    }
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let scope = request.headers().get("authorization").unwrap_or_default();
        let is_meant = scope.contains(&format!("/{}/aws4_request", self.outage.service));
        let Outage { after, calls, .. } = self.outage;
        if !is_meant || !(after..after + calls).contains(&self.calls.fetch_add(1, Ordering::SeqCst)) {
            return self.inner.call(request);
        }
        HttpConnectorFuture::ready(match self.outage.refusal {
            Refusal::Down => Err(ConnectorError::io("the connection is reset".into())),
            Refusal::Throttled => Ok(throttled(self.outage.service)),
        })
    }
}

/// As each service says it: in JSON, XML and CBOR.
fn throttled(service: &str) -> HttpResponse {
    let (status, body): (_, &[u8]) = match service {
        "dynamodb" => (400, br#"{"__type":"ThrottlingException","message":"slow down"}"#),
        "s3" => (503, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"),
        _ => (400, b"\xa1\x66__type\x73ThrottlingException"),
    };
    let mut response = HttpResponse::new(StatusCode::try_from(status).expect("a status"), SdkBody::from(body));
    response.headers_mut().insert("smithy-protocol", "rpc-v2-cbor");
    response
}
