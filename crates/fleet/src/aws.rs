//! AWS configuration and values, once for every binary.

use crate::{Error, config, error};
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_iotdataplane::primitives::Blob;
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use protocol::Publication;
use std::time::Duration;

/// The authorities that sign the certificates of AWS services (<https://www.amazontrust.com/repository/>).
const AMAZON_ROOTS: &[u8] = include_bytes!("amazon-roots.pem");

/// How long a call may take in all: less than a function may run.
pub const CALL_LIMIT: Duration = Duration::from_secs(8);
/// How long each of its attempts may.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// The configuration of a Lambda function: Region, credentials and endpoints from its environment.
pub async fn load() -> SdkConfig {
    let https = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(tls()).build_https();
    let defaults = aws_config::defaults(BehaviorVersion::latest()).http_client(https);
    let limits = TimeoutConfig::builder().connect_timeout(CONNECT_LIMIT).operation_timeout(CALL_LIMIT);
    // Boxed, for it is large, and part of every function's first step.
    Box::pin(defaults.timeout_config(limits.operation_attempt_timeout(ATTEMPT_LIMIT).build()).load()).await
}

/// Whose certificates are believed. The system's authorities, of whom there are hundreds, took most of a function's start to read;
/// they are read where others than Amazon sign: `SSL_CERT_FILE` says so, or the Region is of a partition apart.
fn tls() -> TlsContext {
    let region = config::optional("AWS_REGION").unwrap_or_default();
    let is_apart = region.starts_with("cn-") || region.starts_with("eusc-") || region.contains("-iso");
    let roots = if is_apart || config::optional("SSL_CERT_FILE").is_some() {
        TrustStore::default()
    } else {
        TrustStore::empty().with_pem_certificate(AMAZON_ROOTS)
    };
    // It fails for s2n-tls only.
    TlsContext::builder().with_trust_store(roots).build().unwrap_or_default()
}

/// A client of the account's broker. Fails with a sentence if the function does not know its address.
pub fn iot_data_client(aws: &SdkConfig) -> Result<aws_sdk_iotdataplane::Client, String> {
    Ok(aws_sdk_iotdataplane::Client::new(&at(aws, &config::required("IOT_DATA_ENDPOINT")?)))
}

/// A client of the account's job executions. AWS refuses such calls where the SDK would send them: "Invalid endpoint. Use
/// describe-endpoint API" (<https://github.com/aws/aws-sdk-js-v3/issues/5533>).
pub fn jobs_data_client(aws: &SdkConfig) -> Result<aws_sdk_iotjobsdataplane::Client, String> {
    Ok(aws_sdk_iotjobsdataplane::Client::new(&at(aws, &config::required("IOT_JOBS_ENDPOINT")?)))
}

/// The configuration for calls to a host of the account's own, unless the environment names another endpoint: that of the local
/// cloud. The form for one service, such as `AWS_ENDPOINT_URL_IOT_DATA_PLANE`, wins over any other that is kept here.
fn at(aws: &SdkConfig, host: &str) -> SdkConfig {
    match aws.endpoint_url() {
        Some(_) => aws.clone(),
        None => aws.to_builder().endpoint_url(format!("https://{host}")).build(),
    }
}

/// Publishes a message for devices, workers or sensors.
pub(crate) async fn publish(mqtt: &aws_sdk_iotdataplane::Client, message: Publication) -> Result<(), Error> {
    let publish = mqtt.publish().topic(message.topic).qos(1).payload(Blob::new(message.payload));
    publish.send().await.map(|_| ()).map_err(|error| error::aws("iot:Publish", &error))
}

/// The configuration of a test whose calls that client answers.
#[cfg(test)]
pub(crate) fn of_test(http: impl aws_sdk_dynamodb::config::HttpClient + 'static) -> SdkConfig {
    use aws_sdk_iotdataplane::config::{Credentials, SharedCredentialsProvider};
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(aws_config::Region::from_static("eu-west-1"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::for_tests()))
        .http_client(http)
        .build()
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

#[cfg(test)]
mod tests {
    use super::*;
    use aws_smithy_http_client::test_util::capture_request;

    /// Where calls to the account's own host go, of job executions and of the broker.
    async fn hosts(endpoint: Option<&str>) -> [String; 2] {
        let called = async |data: bool| {
            let (http, requests) = capture_request(None);
            let mut aws = of_test(http).to_builder();
            aws.set_endpoint_url(endpoint.map(str::to_owned));
            let aws = aws.build();
            let aws = at(&aws, "a1b2-ats.iot.eu-west-1.amazonaws.com");
            if data {
                let _ = aws_sdk_iotdataplane::Client::new(&aws).publish().topic("t").send().await;
            } else {
                let jobs = aws_sdk_iotjobsdataplane::Client::new(&aws);
                let _ = jobs.describe_job_execution().thing_name("t").job_id("j").send().await;
            }
            let uri = requests.expect_request().uri().to_owned();
            uri.split_once("/t").map_or(uri.clone(), |(host, _)| host.to_owned())
        };
        [called(false).await, called(true).await]
    }

    #[tokio::test]
    async fn iot_is_called_at_the_account_s_own_address_unless_the_environment_says_otherwise() {
        assert_eq!(hosts(None).await, ["https://a1b2-ats.iot.eu-west-1.amazonaws.com"; 2]);
        assert_eq!(hosts(Some("http://127.0.0.1:4566")).await, ["http://127.0.0.1:4566"; 2]);
    }
}
