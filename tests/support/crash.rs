//! A handler's process that dies before or after one of its calls to AWS.

use aws_config::SdkConfig;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::retry::RetryConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// When the process dies; its later calls do not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// Before its call of that number, from 1, has any effect.
    Before(usize),
    /// After that call has had its effect.
    After(usize),
}

/// A configuration whose clients die so, and a counter of their calls.
pub fn crashing(config: &SdkConfig, crash: Crash) -> (SdkConfig, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let inner = config.http_client().expect("an HTTP client");
    let client = Crashing { inner, crash, calls: calls.clone() };
    let config = config.to_builder().http_client(SharedHttpClient::new(client));
    (config.retry_config(RetryConfig::disabled()).build(), calls)
}

#[derive(Debug)]
struct Crashing {
    inner: SharedHttpClient,
    crash: Crash,
    calls: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Connector {
    inner: SharedHttpConnector,
    crash: Crash,
    calls: Arc<AtomicUsize>,
}

impl HttpClient for Crashing {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let inner = self.inner.http_connector(settings, components);
        SharedHttpConnector::new(Connector { inner, crash: self.crash, calls: self.calls.clone() })
    }
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let death = || ConnectorError::other("the process has died".into(), None);
        let (Crash::Before(first) | Crash::After(first)) = self.crash;
        if call > first || self.crash == Crash::Before(call) {
            return HttpConnectorFuture::ready(Err(death()));
        }
        let response = self.inner.call(request);
        let is_last = self.crash == Crash::After(call);
        HttpConnectorFuture::new(async move {
            let response = response.await?;
            if is_last { Err(death()) } else { Ok(response) }
        })
    }
}
