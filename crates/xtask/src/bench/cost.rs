//! What each workflow takes of AWS, and what that costs: counted while it really runs on the local cloud, on the happy path and
//! on the most expensive way to fail.

mod meter;
mod paths;
pub(super) mod worst_day;

use std::collections::BTreeMap;
use std::fs;
use std::time::SystemTime;

use anyhow::{Context, Result};

use super::Findings;
use super::stack::Stack;
use crate::costs::{Amounts, COUNTS, Counts, Measured, Path, Prices, Workflow, scaled};
use crate::project::Project;

/// What an upgrade may take.
const MOST_TRANSITIONS: f64 = 11.0;
const MOST_USD: f64 = 330.0;
/// What a push of settings may take.
const MOST_PUSH_TRANSITIONS: f64 = 4.0;
const MILLION: f64 = 1_000_000.0;
/// What only an alarm of that kind has in the template.
const ANOMALY_ALARM: &str = "ANOMALY_DETECTION_BAND(";

/// Runs every workflow, and writes down what was counted.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let prices = Prices::read(&project.root)?;
    let (workflows, monthly) = paths::run(project, &prices)?;
    let today = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let counts = Counts { date: today.chars().take(10).collect(), monthly, workflows };
    write(project, &counts)?;
    findings(&counts, &prices)
}

fn write(project: &Project, counts: &Counts) -> Result<()> {
    let text = format!(
        "# What each workflow takes of AWS: counted by `cargo xtask bench cost`, which writes this file, and read by `cargo xtask \
         forecast`.\n# Amounts are what AWS charges for (docs/prices.toml), calls what quotas bound (docs/quotas.toml), all for one.\n{}",
        toml::to_string(counts)?
    );
    fs::write(project.root.join(COUNTS), text).with_context(|| format!("{COUNTS} cannot be written"))
}

/// What of the stack costs by the month.
fn monthly(stack: &Stack) -> Result<Amounts> {
    // A stream is read for nothing.
    let queues = "length(EventSourceMappings[?contains(EventSourceArn, ':sqs:')])";
    let mappings: f64 = stack.aws(&["lambda", "list-event-source-mappings", "--query", queues])?;
    let alarms: f64 = stack.aws(&["cloudwatch", "describe-alarms", "--query", "length(MetricAlarms)"])?;
    // The local cloud has none of these.
    let template = fs::read_to_string(stack.project.root.join("template.yaml")).context("template.yaml")?;
    let in_template = |text| number(template.matches(text).count());
    let (anomalies, dashboards) = (in_template(ANOMALY_ALARM), in_template("Type: AWS::CloudWatch::Dashboard"));
    let items =
        [("queue-mappings", mappings), ("alarms", alarms), ("anomaly-alarms", anomalies), ("dashboards", dashboards)];
    Ok(items.map(|(item, number)| (item.to_owned(), number)).into())
}

/// A small number.
fn number(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

fn findings(counts: &Counts, prices: &Prices) -> Result<Findings> {
    let mut rows = Vec::new();
    for (name, measured) in &counts.workflows {
        for (which, path) in [("happy", &measured.happy), ("worst", &measured.worst)] {
            rows.push(row(&format!("{name}, {which}"), path, prices)?);
        }
    }
    Ok(Findings {
        about: about(counts, prices)?,
        columns: [
            "for one",
            "transitions",
            "Lambda",
            "Lambda ms",
            "DynamoDB W",
            "DynamoDB R",
            "messages",
            "rules + actions",
            "SQS",
            "SNS",
            "registry + index",
            "S3 + metrics",
            "log KB",
            "USD a million",
            "with Jobs fee",
        ]
        .map(String::from)
        .into(),
        rows,
    })
}

fn row(name: &str, path: &Path, prices: &Prices) -> Result<Vec<String>> {
    // An empty sum is -0.
    let amount = |items: &[&str]| 0.0 + items.iter().filter_map(|item| path.amounts.get(*item)).sum::<f64>();
    let number =
        |items: &[&str]| format!("{:.2}", amount(items)).trim_end_matches('0').trim_end_matches('.').to_owned();
    let [with, without] = prices.totals(&scaled(&path.amounts, MILLION))?;
    Ok(vec![
        name.to_owned(),
        number(&["state-transitions"]),
        number(&["lambda-requests"]),
        format!("{:.0}", path.calls.get("lambda.Seconds").copied().unwrap_or_default() * 1000.0),
        number(&["dynamodb-write-units"]),
        number(&["dynamodb-read-units"]),
        number(&["iot-messages"]),
        number(&["rule-triggers", "rule-actions"]),
        number(&["sqs-requests"]),
        number(&["sns-publishes"]),
        number(&["registry-operations", "index-updates"]),
        number(&["s3-reads", "s3-writes", "metric-requests"]),
        format!("{:.1}", amount(&["log-gigabytes"]) * 1_048_576.0),
        format!("{without:.2}"),
        format!("{with:.2}"),
    ])
}

fn about(counts: &Counts, prices: &Prices) -> Result<String> {
    let happy = |workflow: Workflow| Ok::<&Path, anyhow::Error>(&counts.of(workflow)?.happy);
    let transitions = |path: &Path| path.amounts.get("state-transitions").copied().unwrap_or_default();
    let (firmware, config) = (happy(Workflow::Firmware)?, happy(Workflow::Config)?);
    let [_, usd] = prices.totals(&scaled(&firmware.amounts, MILLION))?;
    let verdict = |is: bool| if is { "met" } else { "missed" };
    let paths = |(name, Measured { unit, happy, worst }): (&String, &Measured)| {
        let (count, worst_count) = (happy.measured, worst.measured);
        format!("- {name}, for a {unit}: {} ({count}); worst: {} ({worst_count})", happy.about, worst.about)
    };
    Ok(format!(
        "What AWS would charge for, counted while each workflow ran on the local cloud and divided by the number in brackets:\n\n\
         {}\n\n\
         Targets: a firmware upgrade takes {:.1} transitions (at most {MOST_TRANSITIONS}: {}) and {usd:.2} USD a million without the \
         Jobs fee (at most {MOST_USD}: {}), a push of settings {:.1} transitions (at most {MOST_PUSH_TRANSITIONS}: {}). Prices of {} \
         of {} ({}).\n\n\
         State transitions are those of the executions' histories, retries included. Lambda: the milliseconds of each invocation, at \
         the memory of the template, in an emulator on a shared machine, cold starts included. DynamoDB's units come from its \
         answers, which in the emulator are right for writes (each KB begun), and count each read as of 4 KB at most. Messages are \
         metered as AWS does it (each 5 KB of a publish, to and from devices; CONNECT, SUBSCRIBE and PUBACK of a device), rules by \
         messages on their topics. SQS: a request for each message sent, and for each batch received and deleted. Logs have about \
         560 bytes of Lambda's own for an invocation; X-Ray traces one in twenty.\n\n\
         Not counted: idle polling and alarms ({:.2} USD a month for the stack as it is), connection time, storage, custom metrics \
         (0.30 USD a month each), the transfer of images, and what a failed workflow logs.",
        counts.workflows.iter().map(paths).collect::<Vec<_>>().join("\n"),
        transitions(firmware),
        verdict(transitions(firmware) <= MOST_TRANSITIONS),
        verdict(usd <= MOST_USD),
        transitions(config),
        verdict(transitions(config) <= MOST_PUSH_TRANSITIONS),
        prices.region,
        prices.date,
        crate::costs::PRICES,
        prices.monthly(counts)?,
    ))
}

/// The most expensive of them.
fn worst(prices: &Prices, paths: Vec<Path>) -> Result<Path> {
    let by_usd = paths.into_iter().map(|path| Ok((prices.totals(&path.amounts)?[1], path)));
    let by_usd = by_usd.collect::<Result<Vec<_>>>()?;
    let most = by_usd.into_iter().max_by(|(one, _), (other, _)| one.total_cmp(other));
    Ok(most.context("nothing was measured")?.1)
}

/// The workflows by their names.
type Workflows = BTreeMap<String, Measured>;
