//! Refusals as the AWS APIs word them, each in its protocol.

use crate::calls::Operation;
use axum::body::Body;
use axum::http::{HeaderMap, Response, StatusCode};

/// Why a call is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Throttled,
    Unavailable,
}

/// The code and HTTP status of a refusal; throttling is named otherwise by many services
/// (<https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html>).
fn code(refusal: Refusal, operation: &Operation) -> (&'static str, StatusCode) {
    match (refusal, operation.service.as_str()) {
        (Refusal::Throttled, "dynamodb" | "states" | "secretsmanager") => {
            ("ThrottlingException", StatusCode::BAD_REQUEST)
        }
        (Refusal::Throttled, "sqs") => ("RequestThrottled", StatusCode::FORBIDDEN),
        (Refusal::Throttled, "lambda") => ("TooManyRequestsException", StatusCode::TOO_MANY_REQUESTS),
        (Refusal::Throttled, "s3") => ("SlowDown", StatusCode::SERVICE_UNAVAILABLE),
        (Refusal::Throttled, "sns" | "monitoring") => ("Throttling", StatusCode::BAD_REQUEST),
        (Refusal::Throttled, _) => ("ThrottlingException", StatusCode::TOO_MANY_REQUESTS),
        (Refusal::Unavailable, "dynamodb") => ("InternalServerError", StatusCode::INTERNAL_SERVER_ERROR),
        (Refusal::Unavailable, "iot" | "iotdata" | "iotdevicegateway") => {
            ("InternalFailureException", StatusCode::INTERNAL_SERVER_ERROR)
        }
        (Refusal::Unavailable, "lambda") => ("ServiceException", StatusCode::INTERNAL_SERVER_ERROR),
        (Refusal::Unavailable, "s3") => ("InternalError", StatusCode::INTERNAL_SERVER_ERROR),
        (Refusal::Unavailable, _) => ("ServiceUnavailable", StatusCode::SERVICE_UNAVAILABLE),
    }
}

/// The answer to a call that is refused.
pub(crate) fn response(refusal: Refusal, operation: &Operation, request: &HeaderMap) -> Response<Body> {
    let (code, status) = code(refusal, operation);
    let kind = request.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (kind, body): (&str, Vec<u8>) = if kind.starts_with("application/cbor") {
        ("application/cbor", cbor(code))
    } else if operation.service == "s3" {
        ("application/xml", format!("<Error><Code>{code}</Code><Message>refused</Message></Error>").into())
    } else if kind.starts_with("application/x-www-form-urlencoded") {
        let error = format!("<Error><Type>Sender</Type><Code>{code}</Code><Message>refused</Message></Error>");
        let body = format!("<ErrorResponse>{error}<RequestId>0</RequestId></ErrorResponse>");
        ("text/xml", body.into())
    } else {
        let kind = if kind.is_empty() { "application/json" } else { kind };
        (kind, format!(r#"{{"__type":"{code}","message":"refused"}}"#).into())
    };
    let mut response = Response::builder()
        .status(status)
        .header("content-type", kind)
        .header("x-amzn-errortype", code)
        .header("x-amzn-requestid", "refused-by-a-rule");
    if let Some(protocol) = request.get("smithy-protocol") {
        response = response.header("smithy-protocol", protocol);
    }
    response.body(Body::from(body)).unwrap_or_else(|_| Response::new(Body::empty()))
}

/// A map of one text (RFC 8949, section 3.1).
fn cbor(code: &str) -> Vec<u8> {
    let text = |text: &str| {
        let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
        [&[0x78, length], text.as_bytes()].concat()
    };
    [vec![0xa1], text("__type"), text(code)].concat()
}
