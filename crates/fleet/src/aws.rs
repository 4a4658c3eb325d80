//! AWS configuration and values, once for every binary.

use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};

/// The authorities that sign the certificates of AWS services (<https://www.amazontrust.com/repository/>).
const AMAZON_ROOTS: &[u8] = include_bytes!("amazon-roots.pem");

/// The configuration of a Lambda function: Region, credentials and endpoints from its environment.
pub async fn load() -> SdkConfig {
    let https = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(tls()).build_https();
    // Boxed, for it is large, and part of every function's first step.
    Box::pin(aws_config::defaults(BehaviorVersion::latest()).http_client(https).load()).await
}

/// Whose certificates are believed. The system's authorities, of whom there are hundreds, took most of a function's start to read;
/// they are read where others than Amazon sign: `SSL_CERT_FILE` says so, or the Region is of a partition apart.
fn tls() -> TlsContext {
    let region = crate::config::optional("AWS_REGION").unwrap_or_default();
    let is_apart = region.starts_with("cn-") || region.starts_with("eusc-") || region.contains("-iso");
    let roots = if is_apart || crate::config::optional("SSL_CERT_FILE").is_some() {
        TrustStore::default()
    } else {
        TrustStore::empty().with_pem_certificate(AMAZON_ROOTS)
    };
    // It fails for s2n-tls only.
    TlsContext::builder().with_trust_store(roots).build().unwrap_or_default()
}

/// A text as DynamoDB has it.
pub(crate) fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

/// A whole number as DynamoDB has it.
pub(crate) fn number(value: i64) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

/// Now, in Unix seconds, as DynamoDB's time to live has it.
pub(crate) fn now_seconds() -> i64 {
    now_millis() / 1000
}

/// Now, in Unix milliseconds, as devices and the broker have it.
pub fn now_millis() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_epoch.map_or(0, |elapsed| i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX))
}
