//! The worst that one device, one sensor and one worker can cause in a day: each says what costs most, as often as AWS lets it.

use anyhow::Result;
use serde_json::{Value, json};

use super::super::Findings;
use super::paths::{Bench, failed_update, transitions};
use crate::costs::{Amounts, Prices, scaled};
use crate::program::Programs;
use crate::project::Project;

/// What AWS takes of one connection in a second
/// (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html#message-broker-limits>).
const MESSAGES_A_SECOND: f64 = 100.0;
const DAY_SECONDS: f64 = 86_400.0;
const HOURS: f64 = 24.0;
/// How many messages of a kind a device is heard with in an hour, where they are counted (`crates/fleet/src/allowance.rs`).
const HEARD_AN_HOUR: f64 = 100.0;
/// How many are said to see what is heard, and then to see what is not.
const FIRST: usize = 120;
const FURTHER: usize = 200;

/// Devices that do nothing else: who, what it says, and its message of that number.
type Flood = (&'static str, &'static str, fn(usize) -> Value);

const FLOODS: &[Flood] = &[
    ("device", "its update has failed, each time anew", |number| failed_update("flood-0001", number)),
    ("device", "its update has succeeded", |number| {
        let time = (1_711_320_208_793 + number).to_string();
        let payload = json!({"_id_": "flood-0002", "timestamp": time, "status": "succeeded"});
        json!({"topic": "iot/device/data", "payload": payload})
    }),
    ("device", "it has failed at what it was never asked", |number| {
        let payload = json!({
            "operationId": format!("never-{number}"), "name": "FIRMWARE_TRANSFERRED", "type": "RESP", "status": "FAIL",
            "error": {"code": "7", "message": "no"}, "timestamp": 1,
        });
        json!({"topic": "devices/flood-0003/firmware_resp", "payload": payload})
    }),
    ("device", "it has booted, each time another version", |number| {
        let payload = json!({
            "name": "DEVICE_REBOOTED", "type": "RESP", "status": "SUCCESS", "firmwareVersion": format!("1.0.{number}"), "timestamp": 1,
        });
        json!({"topic": "devices/flood-0004/firmware_resp", "payload": payload})
    }),
    ("device", "a setting that it was never sent", |number| {
        let payload = json!({
            "operationId": format!("never-{number}.SET_TEMP"), "name": "SET_TEMP", "type": "RESP", "status": "SUCCESS", "value": number,
            "timestamp": 1,
        });
        json!({"topic": "devices/flood-0005/config_resp", "payload": payload})
    }),
    ("sensor", "readings on either side of the band", |number| {
        let temperature = if number.is_multiple_of(2) { 40.0 } else { 21.0 };
        let body = json!({"device": "flood-0006", "temperature": temperature, "humidity": 50.0, "action": "Monitor"});
        json!({"topic": "monitoring-device/building-flood", "payload": {"body": body}})
    }),
    ("worker", "claims of jobs that there are not", |number| {
        let payload = json!({
            "TaskToken": format!("never-{number}.secret"), "action": "claim", "worker": "worker-1", "request": format!("r{number}"),
        });
        json!({"topic": "tenant1/to/lambda", "payload": payload})
    }),
];

/// Measures each.
pub(in super::super) fn measure(project: &Project) -> Result<Findings> {
    let prices = Prices::read(&project.root)?;
    let programs = Programs::built(project)?;
    let bench = Bench::of_development(project, &programs)?;
    bench.provision("flood", FLOODS.len(), "DevicePolicyName", "json", &["--attribute", "building=flood"])?;
    bench.settle()?;
    let rows = FLOODS.iter().map(|flood| row(&bench, &prices, flood)).collect::<Result<_>>()?;
    Ok(Findings {
        about: format!(
            "One client that says the same again and again, {MESSAGES_A_SECOND} times a second, which is what AWS takes of a connection. \
             What it costs when the first {FIRST} messages of an hour are handled (executions included), and what the {FURTHER} after \
             them; a day has {HEARD_AN_HOUR} of the first an hour, and else of the others. The programs are those of the development \
             profile, in an emulator: Lambda's milliseconds are longer than on AWS. Not counted: storage, custom metrics, connection \
             time, and the messages that people get. Prices of {} of {} ({}).",
            prices.region,
            prices.date,
            crate::costs::PRICES
        ),
        columns: [
            "who",
            "says",
            "USD a million, first",
            "USD a million, further",
            "executions",
            "DynamoDB W, further",
            "USD a day",
        ]
        .map(String::from)
        .into(),
        rows,
    })
}

fn row(bench: &Bench<'_>, prices: &Prices, (who, says, message): &Flood) -> Result<Vec<String>> {
    eprintln!("{who}: {says}");
    let (first, executions) = said(bench, *message, 0, FIRST)?;
    let (further, more) = said(bench, *message, FIRST, FURTHER)?;
    let usd = |amounts: &Amounts| Ok::<f64, anyhow::Error>(prices.totals(&scaled(amounts, 1_000_000.0))?[1]);
    let (of_first, of_further) = (usd(&first)?, usd(&further)?);
    let heard = HOURS * HEARD_AN_HOUR;
    let all = DAY_SECONDS * MESSAGES_A_SECOND;
    let a_day = (heard * of_first + (all - heard) * of_further) / 1_000_000.0;
    let writes = further.get("dynamodb-write-units").copied().unwrap_or_default();
    Ok(vec![
        (*who).to_owned(),
        (*says).to_owned(),
        format!("{of_first:.2}"),
        format!("{of_further:.2}"),
        (executions + more).to_string(),
        format!("{writes:.2}"),
        format!("{a_day:.2}"),
    ])
}

/// What each of so many messages takes, and how many executions they have started.
fn said(bench: &Bench<'_>, message: fn(usize) -> Value, from: usize, count: usize) -> Result<(Amounts, usize)> {
    let machine = bench.stack.outputs.get("FailedUpdateRecoveryArn")?;
    let known = bench.names(machine)?;
    let since = bench.meter.reset()?;
    bench.publish((from..from + count).map(message))?;
    bench.settle()?;
    let mut reading = bench.meter.read(since)?;
    let mut executions = bench.executions(machine)?;
    executions.retain(|execution| !known.contains(&execution.name));
    reading.executions(executions.len(), transitions(&executions));
    Ok((reading.path(String::new(), count).amounts, executions.len()))
}
