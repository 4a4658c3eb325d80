//! What is called: the service and the operation of a request, and how often it was.

use axum::http::{HeaderMap, Method, Uri};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A request of an AWS API.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Operation {
    /// The service as signatures name it, such as `dynamodb`, `iot`, `iotdata`.
    pub service: String,
    /// The operation's name, such as `UpdateItem`; of an operation that is not known here, the method and the path's beginning.
    pub name: String,
}

/// The calls of one operation by one caller.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Count {
    /// How many.
    pub calls: u64,
    /// How many of them were refused, by the cloud or by a rule.
    pub refused: u64,
    /// `DynamoDB`'s read capacity units.
    pub read_units: f64,
    /// `DynamoDB`'s write capacity units.
    pub write_units: f64,
}

/// A line of what `/_proxy/calls` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Called {
    /// The Lambda function; none for others, such as a state machine's own tasks.
    pub function: Option<String>,
    /// What it called.
    #[serde(flatten)]
    pub operation: Operation,
    /// How often.
    #[serde(flatten)]
    pub count: Count,
}

impl Operation {
    /// What a request asks for.
    pub(crate) fn of(method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> Self {
        let service = service(headers).or_else(|| signed_for(uri)).unwrap_or("unknown");
        let name =
            target(headers).or_else(|| action(headers, body)).unwrap_or_else(|| rest(service, method, uri.path()));
        Self { service: service.to_owned(), name }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// The service in the signature's scope: `Credential=KEY/DATE/REGION/SERVICE/aws4_request`
/// (<https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>).
fn service(headers: &HeaderMap) -> Option<&str> {
    let (_, scope) = text(headers, "authorization")?.split_once("Credential=")?;
    scope.split(',').next()?.split('/').nth(3)
}

/// The same of a signed address: `X-Amz-Credential=KEY%2FDATE%2FREGION%2FSERVICE%2Faws4_request`.
fn signed_for(uri: &Uri) -> Option<&str> {
    let (_, scope) = uri.query()?.split_once("X-Amz-Credential=")?;
    scope.split('&').next()?.split("%2F").nth(3)
}

/// The JSON protocols name the operation in a header.
fn target(headers: &HeaderMap) -> Option<String> {
    text(headers, "x-amz-target")?.rsplit('.').next().map(str::to_owned)
}

/// The query protocol names it in the form.
fn action(headers: &HeaderMap, body: &[u8]) -> Option<String> {
    if !text(headers, "content-type")?.starts_with("application/x-www-form-urlencoded") {
        return None;
    }
    let form = std::str::from_utf8(body).ok()?;
    form.split('&').find_map(|field| field.strip_prefix("Action=")).map(str::to_owned)
}

/// The other protocols have it in method and path.
fn rest(service: &str, method: &Method, path: &str) -> String {
    if let Some((_, operation)) = path.rsplit_once("/operation/") {
        return operation.to_owned();
    }
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    let name = match (service, method.as_str(), first) {
        ("iotdata" | "iotdevicegateway", "POST", "topics") => "Publish",
        ("iot", "GET", "things") if path.contains("/jobs/") => "DescribeJobExecution",
        ("iot", "GET", "things") => "DescribeThing",
        ("iot", "POST", "things") if path.ends_with("/connectivity-data") => "GetThingConnectivityData",
        ("iot", "PUT", "thing-groups") if path.ends_with("/addThingToThingGroup") => "AddThingToThingGroup",
        ("iot", "PUT", "thing-groups") if path.ends_with("/removeThingFromThingGroup") => "RemoveThingFromThingGroup",
        ("iot", "PATCH", "things") => "UpdateThing",
        ("iot-jobs-data", "POST", "things") => "UpdateJobExecution",
        ("iot-jobs-data", "GET", "things") => "DescribeJobExecution",
        ("lambda", "POST", _) if path.ends_with("/invocations") => "Invoke",
        ("s3", "PUT", _) => "PutObject",
        ("s3", "GET", _) => "GetObject",
        ("s3", "HEAD", _) => "HeadObject",
        _ => return format!("{method} /{}", percent_decode_str(first).decode_utf8_lossy()),
    };
    name.to_owned()
}

/// The header by which the local cloud is asked what a call of `DynamoDB` costs. The request itself stays as its caller has signed it.
pub(crate) const ASK_FOR_CAPACITY: &str = "x-return-consumed-capacity";

/// The capacity units of an answer.
pub(crate) fn capacity(answer: &[u8]) -> f64 {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    let units = |consumed: &Value| consumed["CapacityUnits"].as_f64().unwrap_or_default();
    match &answer["ConsumedCapacity"] {
        Value::Array(tables) => tables.iter().map(units).sum(),
        consumed => units(consumed),
    }
}

/// Whether `DynamoDB` reads only.
pub(crate) fn reads(operation: &Operation) -> bool {
    matches!(operation.name.as_str(), "GetItem" | "BatchGetItem" | "Query" | "Scan" | "TransactGetItems")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn of(method: &Method, path: &'static str, headers: &[(&'static str, &'static str)], body: &str) -> String {
        let pairs = headers
            .iter()
            .map(|(name, value)| (axum::http::HeaderName::from_static(name), HeaderValue::from_static(value)));
        let Operation { service, name } =
            Operation::of(method, &Uri::from_static(path), &pairs.collect(), body.as_bytes());
        format!("{service}.{name}")
    }

    #[test]
    fn each_protocol_names_its_operation() {
        let scope = |service| match service {
            "dynamodb" => {
                ("authorization", "AWS4-HMAC-SHA256 Credential=0/20260101/eu-west-1/dynamodb/aws4_request, Sig")
            }
            "sns" => ("authorization", "AWS4-HMAC-SHA256 Credential=0/20260101/eu-west-1/sns/aws4_request, Sig"),
            "iot" => ("authorization", "AWS4-HMAC-SHA256 Credential=0/20260101/eu-west-1/iot/aws4_request, Sig"),
            _ => ("authorization", "AWS4-HMAC-SHA256 Credential=0/20260101/eu-west-1/monitoring/aws4_request, Sig"),
        };
        let target = ("x-amz-target", "DynamoDB_20120810.UpdateItem");
        let form = ("content-type", "application/x-www-form-urlencoded");
        assert_eq!(of(&Method::POST, "/", &[scope("dynamodb"), target], "{}"), "dynamodb.UpdateItem");
        assert_eq!(of(&Method::POST, "/", &[scope("sns"), form], "Action=Publish&TopicArn=a"), "sns.Publish");
        assert_eq!(of(&Method::GET, "/things/a", &[scope("iot")], ""), "iot.DescribeThing");
        assert_eq!(of(&Method::GET, "/jobs/a", &[scope("iot")], ""), "iot.GET /jobs");
        assert_eq!(of(&Method::GET, "/things/a/jobs/b", &[scope("iot")], ""), "iot.DescribeJobExecution");
        let path = "/thing-groups/addThingToThingGroup";
        assert_eq!(of(&Method::PUT, path, &[scope("iot")], ""), "iot.AddThingToThingGroup");
        let path = "/service/GraniteServiceVersion20100801/operation/PutMetricData";
        assert_eq!(of(&Method::POST, path, &[scope("monitoring")], ""), "monitoring.PutMetricData");
        let address = "/bucket/key?X-Amz-Credential=0%2F20260101%2Feu-west-1%2Fs3%2Faws4_request&X-Amz-Expires=60";
        assert_eq!(of(&Method::GET, address, &[], ""), "s3.GetObject");
        assert_eq!(of(&Method::GET, "/", &[], ""), "unknown.GET /");
    }

    #[test]
    fn capacity_is_read() {
        assert!((capacity(br#"{"ConsumedCapacity":{"CapacityUnits":2.5}}"#) - 2.5).abs() < f64::EPSILON);
        let two = br#"{"ConsumedCapacity":[{"CapacityUnits":1},{"CapacityUnits":2}]}"#;
        assert!((capacity(two) - 3.0).abs() < f64::EPSILON);
        assert!(capacity(b"no JSON").abs() < f64::EPSILON);
    }
}
