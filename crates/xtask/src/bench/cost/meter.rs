//! What AWS would meter while something runs: from the proxy that counts calls, from what `local/metering.py` writes, and from
//! the executions' histories.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::costs::{Amounts, Path, scaled};

/// What a message holds (<https://aws.amazon.com/iot-core/pricing/>).
const MESSAGE_BYTES: u64 = 5 * 1024;
/// What CloudWatch adds to an event (<https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html>).
const LOG_EVENT_BYTES: u64 = 26;
/// About what Lambda itself writes of an invocation, as JSON: its start and its report.
const PLATFORM_LOG_BYTES: u64 = 560;
/// The most messages that one request takes from a queue, or deletes.
const REQUEST_MESSAGES: u64 = 10;
/// A job is created once for all its devices.
const ONCE: &str = "-CreateJobFunction";
/// The share of requests that X-Ray traces beyond the first a second.
const TRACED: f64 = 0.05;
const GIGABYTE: f64 = 1_073_741_824.0;

/// A line of what `local/metering.py` writes.
#[derive(Debug, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
enum Line {
    Publish { topic: String, bytes: u64, client: Option<String> },
    Deliver { topic: String, bytes: u64 },
    Packet { kind: String },
    Rule {},
    Action { kind: Option<String> },
    Send {},
    Receive { messages: u64 },
    Delete { messages: u64 },
    Invoke { function: String, memory: u32, milliseconds: f64 },
    Log { function: String, events: u64, bytes: u64 },
}

/// A line of what the proxy answers.
#[derive(Debug, Deserialize)]
struct Called {
    function: Option<String>,
    service: String,
    name: String,
    calls: u64,
    refused: u64,
    read_units: f64,
    write_units: f64,
}

/// Where the numbers come from.
pub(super) struct Meter {
    /// URL of the proxy.
    pub(super) proxy: String,
    /// The file of `local/metering.py`.
    pub(super) file: PathBuf,
}

/// What was counted since the last reset.
#[derive(Default)]
pub(super) struct Reading {
    amounts: Amounts,
    calls: Amounts,
}

impl Meter {
    /// Begins anew; where what comes now begins in the file.
    pub(super) fn reset(&self) -> Result<u64> {
        ureq::delete(format!("{}/_proxy/calls", self.proxy)).call().context("the proxy does not forget its calls")?;
        Ok(self.len())
    }

    /// How much was counted: unchanged when nothing happens any more.
    pub(super) fn len(&self) -> u64 {
        fs::metadata(&self.file).map_or(0, |file| file.len())
    }

    /// What was counted since the file had that length.
    pub(super) fn read(&self, since: u64) -> Result<Reading> {
        let text = fs::read_to_string(&self.file).context("what was metered cannot be read")?;
        let lines = text.get(usize::try_from(since)?..).unwrap_or_default().lines();
        let mut reading = Reading::default();
        for line in lines {
            reading.meter(&serde_json::from_str(line).with_context(|| format!("what was metered has a line {line}"))?);
        }
        let url = format!("{}/_proxy/calls", self.proxy);
        let called = ureq::get(url).call().and_then(|mut answer| answer.body_mut().read_to_string());
        let called: Vec<Called> = serde_json::from_str(&called.context("the proxy does not answer")?)?;
        for called in &called {
            reading.call(called);
        }
        Ok(reading)
    }
}

#[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond millions")]
fn number(count: u64) -> f64 {
    count as f64
}

impl Reading {
    fn amount(&mut self, item: &str, number: f64) {
        *self.amounts.entry(item.to_owned()).or_default() += number;
    }

    fn called(&mut self, call: &str, number: f64) {
        *self.calls.entry(call.to_owned()).or_default() += number;
    }

    fn meter(&mut self, line: &Line) {
        match line {
            // What AWS itself says is metered when somebody gets it.
            Line::Publish { topic, client: None, .. } if topic.starts_with("$aws/") => {
                // A device that comes or goes is an update of the fleet index.
                self.amount("index-updates", number(u64::from(topic.starts_with("$aws/events/presence/"))));
            }
            Line::Publish { topic, bytes, .. } => {
                self.amount("iot-messages", messages(topic, *bytes));
                self.called("iot.PublishIn", 1.0);
            }
            Line::Deliver { topic, bytes } => {
                self.amount("iot-messages", messages(topic, *bytes));
                self.called("iot.PublishOut", 1.0);
            }
            Line::Packet { kind } => {
                self.amount("iot-messages", 1.0);
                self.called("iot.Connect", number(u64::from(kind == "CONNECT")));
            }
            Line::Rule {} => {
                self.amount("rule-triggers", 1.0);
                self.called("iot.RuleEvaluation", 1.0);
            }
            Line::Action { kind } => {
                self.amount("rule-actions", 1.0);
                self.amount("sqs-requests", number(u64::from(kind.as_deref() == Some("sqs"))));
            }
            Line::Send {} => self.amount("sqs-requests", 1.0),
            Line::Receive { messages } => {
                self.amount("sqs-requests", number(messages.div_ceil(REQUEST_MESSAGES)));
                self.amount("traces", TRACED);
            }
            Line::Delete { messages } => self.amount("sqs-requests", number(messages.div_ceil(REQUEST_MESSAGES))),
            Line::Invoke { function, .. } | Line::Log { function, .. } if function.contains(ONCE) => {}
            Line::Invoke { memory, milliseconds, .. } => {
                let seconds = milliseconds.ceil() / 1000.0;
                self.amount("lambda-requests", 1.0);
                self.amount("lambda-gb-seconds", seconds * f64::from(*memory) / 1024.0);
                self.amount("log-gigabytes", number(PLATFORM_LOG_BYTES + 2 * LOG_EVENT_BYTES) / GIGABYTE);
                self.called("lambda.Seconds", seconds);
            }
            Line::Log { events, bytes, .. } => {
                self.amount("log-gigabytes", number(bytes + events * LOG_EVENT_BYTES) / GIGABYTE);
            }
        }
    }

    fn call(&mut self, called: &Called) {
        if called.function.as_ref().is_some_and(|function| function.contains(ONCE)) {
            return;
        }
        let calls = number(called.calls);
        self.called(&format!("{}.{}", called.service, called.name), calls);
        match (called.service.as_str(), called.name.as_str()) {
            ("dynamodb", _) => {
                // A write whose condition is not met costs a unit, which the answer does not say.
                let is_write = ["UpdateItem", "PutItem", "DeleteItem"].contains(&called.name.as_str());
                let refused = if is_write { number(called.refused) } else { 0.0 };
                self.amount("dynamodb-write-units", called.write_units + refused);
                self.amount("dynamodb-read-units", called.read_units);
                self.called("dynamodb.WriteUnits", called.write_units + refused);
            }
            ("sns", "Publish") => self.amount("sns-publishes", calls),
            ("sqs", _) => self.amount("sqs-requests", calls),
            ("monitoring", "PutMetricData") => self.amount("metric-requests", calls),
            ("s3", "PutObject") => self.amount("s3-writes", calls),
            ("s3", _) => self.amount("s3-reads", calls),
            ("iot", "DescribeThing") => self.amount("registry-operations", calls),
            ("iot", "UpdateThing" | "AddThingToThingGroup" | "RemoveThingFromThingGroup") => {
                self.amount("registry-operations", calls);
                // What a thing is, and where it belongs, is in the fleet index.
                self.amount("index-updates", calls);
            }
            _ => {}
        }
    }

    /// Adds what the histories of executions say.
    pub(super) fn executions(&mut self, executions: usize, transitions: u64) {
        self.amount("state-transitions", number(transitions));
        self.called("states.Transition", number(transitions));
        self.amount("traces", TRACED * number(executions as u64));
    }

    /// Adds executions of a job.
    pub(super) fn job_executions(&mut self, executions: usize) {
        self.amount("job-executions", number(executions as u64));
        self.called("job.Rollout", number(executions as u64));
    }

    /// The same for one of so many.
    pub(super) fn path(self, about: String, measured: usize) -> Path {
        let one = |amounts: &Amounts| {
            let mut amounts = scaled(amounts, 1.0 / number(measured as u64));
            amounts.retain(|_, amount| *amount > 0.0);
            amounts
        };
        Path { about, measured, amounts: one(&self.amounts), calls: one(&self.calls) }
    }
}

/// How many messages AWS makes of one.
fn messages(topic: &str, bytes: u64) -> f64 {
    number((bytes + topic.len() as u64).div_ceil(MESSAGE_BYTES).max(1))
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "whole numbers")]
mod tests {
    use super::*;

    fn reading(lines: &[&str]) -> Reading {
        let mut reading = Reading::default();
        for line in lines {
            reading.meter(&serde_json::from_str(line).expect("a line"));
        }
        reading
    }

    #[test]
    fn messages_are_metered_by_five_kilobytes() {
        let large = r#"{"what":"deliver","topic":"a","bytes":5120}"#;
        let small = r#"{"what":"publish","topic":"a","bytes":10,"client":"sim-0001"}"#;
        let acknowledged = r#"{"what":"packet","kind":"PUBACK","client":"sim-0001"}"#;
        assert_eq!(reading(&[large, small, acknowledged]).amounts["iot-messages"], 4.0);
    }

    #[test]
    fn what_aws_itself_says_is_metered_when_somebody_gets_it() {
        let reading =
            reading(&[r#"{"what":"publish","topic":"$aws/events/presence/connected/a","bytes":1,"client":null}"#]);
        assert_eq!(reading.amounts.get("iot-messages"), None);
        assert_eq!(reading.amounts["index-updates"], 1.0);
    }

    #[test]
    fn a_message_is_sent_received_and_deleted() {
        let action = r#"{"what":"action","rule":"a","kind":"sqs"}"#;
        let reading = reading(&[
            action,
            action,
            r#"{"what":"receive","queue":"q","messages":2}"#,
            r#"{"what":"delete","queue":"q","messages":2}"#,
            r#"{"what":"invoke","function":"f","memory":256,"milliseconds":7.2}"#,
            r#"{"what":"log","function":"f","events":1,"bytes":100}"#,
        ]);
        assert_eq!(reading.amounts["sqs-requests"], 4.0);
        assert_eq!(reading.amounts["lambda-gb-seconds"], 0.002);
        assert_eq!((reading.amounts["log-gigabytes"] * GIGABYTE).round(), 560.0 + 52.0 + 126.0);
    }

    #[test]
    fn refused_writes_cost_too() {
        let mut reading = Reading::default();
        reading.call(&Called {
            function: None,
            service: "dynamodb".into(),
            name: "UpdateItem".into(),
            calls: 5,
            refused: 2,
            read_units: 0.0,
            write_units: 3.0,
        });
        assert_eq!(reading.path(String::new(), 5).amounts["dynamodb-write-units"], 1.0);
    }
}
