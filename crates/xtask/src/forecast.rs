//! `cargo xtask forecast`: what a workflow for many devices costs, how long it takes and which quota of AWS binds first, before it
//! is started. It counts with what `bench cost` has measured, and needs neither a cloud nor an account, unless it shall ask for
//! the size of a thing group.

mod quotas;
mod rollout;

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;

use crate::costs::{Amounts, COUNTS, Counts, Measured, PRICES, Prices, Workflow};
use crate::project::Project;
use quotas::{Demand, QUOTAS, Quotas};
use rollout::Rollout;

const MINUTES_AN_HOUR: f64 = 60.0;

/// What `forecast` takes.
#[derive(Args)]
pub(crate) struct ForecastOptions {
    /// The workflow.
    #[arg(value_enum, default_value_t = Workflow::Firmware)]
    workflow: Workflow,
    /// For how many devices (readings for telemetry, jobs for on-premises).
    #[arg(long, required_unless_present = "thing_group", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    devices: Option<u64>,
    /// For the things of this group, dynamic or static, with its child groups: their number is asked of the AWS CLI, in
    /// whatever account, Region or local cloud it is set to.
    #[arg(long, conflicts_with = "devices", value_name = "NAME")]
    thing_group: Option<String>,
    #[command(flatten)]
    rollout: Rollout,
    /// Percentage of devices that fail, in the most expensive way.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0, value_parser = percentage)]
    failure_rate: f64,
    /// The Region, for its quotas; prices are those of docs/prices.toml.
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Minutes that one device takes, from when it is told to its end.
    #[arg(long, value_name = "MINUTES", default_value_t = 15.0, value_parser = minutes)]
    device_minutes: f64,
    /// Size of the image that each device downloads, in megabytes; left out, its transfer is not counted.
    #[arg(long, value_name = "MB", value_parser = minutes)]
    image: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn percentage(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').parse() {
        Ok(number) if (0.0..=100.0).contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is no percentage from 0 to 100")),
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.0..=1_000_000.0).contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is no number from 0 to 1000000")),
    }
}

/// A forecast, and the shape of `--json`: fields are added, never renamed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Forecast {
    workflow: &'static str,
    unit: String,
    devices: u64,
    region: String,
    failure_percent: f64,
    usd: Usd,
    /// USD by the month for the deployed stack, whether or not anything runs.
    monthly_usd: f64,
    hours: Hours,
    /// The quota that binds first.
    binds_first: Demand,
    /// All that are touched, the tightest first.
    quotas: Vec<Demand>,
    notes: Vec<String>,
    measured: Dates,
}

/// USD if all succeed, with the failures that were asked for, and if all fail.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Usd {
    best: Cost,
    expected: Cost,
    worst: Cost,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Cost {
    total: f64,
    without_jobs_fee: f64,
    by_service: Amounts,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Hours {
    /// Until the last device is told.
    rollout: f64,
    /// Until the last device is done, if none is offline.
    done: f64,
    /// The most devices a minute.
    peak_per_minute: f64,
}

/// When what the forecast rests on was measured or read.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Dates {
    counts: String,
    prices: String,
    quotas: String,
}

/// The three files.
struct Files {
    counts: Counts,
    prices: Prices,
    quotas: Quotas,
}

/// Prints the forecast.
pub(crate) fn forecast(project: &Project, options: &ForecastOptions) -> Result<()> {
    let root = &project.root;
    let files = Files { counts: Counts::read(root)?, prices: Prices::read(root)?, quotas: Quotas::read(root)? };
    let devices = match (&options.devices, &options.thing_group) {
        (Some(devices), _) => *devices,
        (None, Some(group)) => group_size(group, &options.region)?,
        (None, None) => bail!("tell how many devices: --devices or --thing-group"),
    };
    let forecast = files.forecast(options, devices)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&forecast)?);
    } else {
        println!("{}", forecast.text());
    }
    Ok(())
}

/// How many things a group has, as the user's own AWS CLI says.
fn group_size(group: &str, region: &str) -> Result<u64> {
    let mut list = Command::new("aws");
    list.args(["iot", "list-things-in-thing-group", "--thing-group-name", group, "--recursive"]);
    list.args(["--query", "length(things)", "--output", "json"]);
    // A local cloud has a Region of its own.
    if std::env::var_os("AWS_ENDPOINT_URL").is_none() {
        list.args(["--region", region]);
    }
    let answer = list.output().context("the AWS CLI (`aws`) cannot be started: install it, or give --devices")?;
    ensure!(
        answer.status.success(),
        "the size of the thing group {group} is unknown: {}",
        String::from_utf8_lossy(&answer.stderr).trim()
    );
    let size = String::from_utf8_lossy(&answer.stdout).trim().parse();
    let size = size.with_context(|| {
        format!("`aws iot list-things-in-thing-group --thing-group-name {group}` printed no number")
    })?;
    ensure!(size > 0, "the thing group {group} has no things");
    Ok(size)
}

#[expect(clippy::cast_precision_loss, reason = "devices are counted by millions")]
fn number(count: u64) -> f64 {
    count as f64
}

impl Files {
    fn forecast(&self, options: &ForecastOptions, devices: u64) -> Result<Forecast> {
        let measured = self.counts.of(options.workflow)?;
        let (count, failing) = (number(devices), options.failure_rate / 100.0);
        let cost = |failing: f64| self.cost(measured, count, failing, options.image);
        let pace = options.rollout.pace(count)?;
        let calls = measured.expected(1.0, failing, |path| &path.calls);
        let demands = self.quotas.demands(&calls, count, &pace, &options.region);
        let binds_first = demands.first().context("the workflow calls nothing that a quota bounds")?.clone();
        // What AWS does not take at once it takes later.
        let rollout = pace.minutes / binds_first.headroom.min(1.0) / MINUTES_AN_HOUR;
        Ok(Forecast {
            workflow: options.workflow.key(),
            unit: measured.unit.clone(),
            devices,
            region: options.region.clone(),
            failure_percent: options.failure_rate,
            usd: Usd { best: cost(0.0)?, expected: cost(failing)?, worst: cost(1.0)? },
            monthly_usd: self.prices.monthly(&self.counts)?,
            hours: Hours {
                rollout,
                done: rollout + options.device_minutes / MINUTES_AN_HOUR,
                peak_per_minute: pace.peak,
            },
            notes: notes(options, measured, &binds_first),
            binds_first,
            quotas: demands,
            measured: Dates {
                counts: self.counts.date.clone(),
                prices: self.prices.date.clone(),
                quotas: self.quotas.date.clone(),
            },
        })
    }

    fn cost(&self, measured: &Measured, count: f64, failing: f64, image: Option<f64>) -> Result<Cost> {
        let mut amounts = measured.expected(count, failing, |path| &path.amounts);
        if let Some(megabytes) = image {
            amounts.insert("gigabytes-out".to_owned(), count * megabytes / 1000.0);
        }
        let [total, without_jobs_fee] = self.prices.totals(&amounts)?;
        Ok(Cost { total, without_jobs_fee, by_service: self.prices.by_service(&amounts)? })
    }
}

fn notes(options: &ForecastOptions, measured: &Measured, binds_first: &Demand) -> Vec<String> {
    let mut notes =
        vec![format!("A failure is the most expensive one: a {} that {}.", measured.unit, measured.worst.about)];
    if binds_first.headroom < 1.0 {
        notes.push(format!(
            "AWS takes {:.0} % of this rollout at its peak: have the quota raised, or roll out slower. The hours are those with the \
             quota as it is.",
            binds_first.headroom * 100.0
        ));
    }
    if options.workflow == Workflow::Firmware && options.image.is_none() {
        notes.push("The transfer of the image is not counted; --image counts it.".to_owned());
    }
    notes.push(
        "Devices that are offline take as long as the job lets them; each retry of a job costs as much again."
            .to_owned(),
    );
    notes
}

impl Forecast {
    fn text(&self) -> String {
        let Self { workflow, devices, unit, region, failure_percent, hours, .. } = self;
        let plural = if *devices == 1 { "" } else { "s" };
        let mut lines = vec![
            format!("{workflow}: {devices} {unit}{plural}, at most {:.0} a minute, {region}", hours.peak_per_minute),
            String::new(),
        ];
        let Usd { best, expected, worst } = &self.usd;
        let mut columns = vec![("none fails".to_owned(), best), ("all fail".to_owned(), worst)];
        if *failure_percent > 0.0 {
            columns.insert(1, (format!("{failure_percent} % fail"), expected));
        }
        let titles: String = columns.iter().map(|(title, _)| format!("{title:>14}")).collect();
        lines.push(format!("{:<24}{titles}", "USD"));
        let line = |name: &str, of: &dyn Fn(&Cost) -> f64| {
            let amounts: String = columns.iter().map(|(_, cost)| format!("{:>14.2}", of(cost))).collect();
            format!("{name:<24}{amounts}")
        };
        let services: std::collections::BTreeSet<&String> =
            columns.iter().flat_map(|(_, cost)| cost.by_service.keys()).collect();
        for service in services {
            lines.push(line(service, &|cost| cost.by_service.get(service).copied().unwrap_or_default()));
        }
        lines.push(line("in all", &|cost| cost.total));
        lines.push(line("without the Jobs fee", &|cost| cost.without_jobs_fee));
        lines.push(format!("and {:.2} a month for the stack itself", self.monthly_usd));
        lines.push(String::new());
        lines.push(format!("{:.1} hours until the last is told, {:.1} until it is done", hours.rollout, hours.done));
        let next = self.quotas.get(1).map(|next| format!(", then {}", next.quota)).unwrap_or_default();
        lines.push(format!("binds first: {}{next}\n", self.binds_first.quota));
        lines.push(format!("{:<70}{:>10}{:>10}{:>10}", "quota", "needed", "allowed", "headroom"));
        lines.extend(self.quotas.iter().map(Demand::line));
        lines.push(String::new());
        lines.extend(self.notes.iter().cloned());
        let Dates { counts, prices, quotas } = &self.measured;
        lines.push(format!(
            "Counted {counts} ({COUNTS}); prices of {prices} ({PRICES}), quotas of {quotas} ({QUOTAS})."
        ));
        lines.join("\n")
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "numbers of a few digits")]
mod tests {
    use super::*;
    use clap::{Parser, Subcommand};
    use std::path::Path;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Forecasting,
    }

    #[derive(Subcommand)]
    enum Forecasting {
        Forecast(ForecastOptions),
    }

    fn options(line: &str) -> Result<ForecastOptions, clap::Error> {
        let words = ["xtask", "forecast"].into_iter().chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|Cli { command: Forecasting::Forecast(options) }| options)
    }

    /// 10 transitions and a job execution of a device that succeeds, 14 of one that fails.
    fn files() -> Files {
        let path = |transitions: u32| {
            format!(
                "about = \"a\"\nmeasured = 1\namounts = {{ state-transitions = {transitions}.0, job-executions = 1.0 }}\n\
                 calls = {{ \"states.Transition\" = {transitions}.0, \"states.StartExecution\" = 1.0, \"iot.UpdateThing\" = 1.0 }}\n"
            )
        };
        let workflow = "workflows.firmware-upgrade";
        let counts = format!(
            "date = \"2026-01-01\"\n[monthly]\nalarms = 10.0\n[{workflow}]\nunit = \"device\"\n[{workflow}.happy]\n{}[{workflow}.worst]\n{}",
            path(10),
            path(14)
        );
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        Files {
            counts: toml::from_str(&counts).expect("counts"),
            prices: Prices::read(&root).expect("prices"),
            quotas: Quotas::read(&root).expect("quotas"),
        }
    }

    fn forecast(line: &str) -> Forecast {
        let options = options(line).expect("options");
        files().forecast(&options, options.devices.expect("devices")).expect("a forecast")
    }

    #[test]
    fn a_forecast_by_hand() {
        let forecast = forecast("--devices 1000000 --failure-rate 10");
        // 10 million transitions at 25 a million; 250,000 executions at 0.003 and 750,000 at 0.0015.
        assert_eq!(forecast.usd.best.without_jobs_fee, 250.0);
        assert_eq!(forecast.usd.best.total, 250.0 + 1875.0);
        assert!((forecast.usd.expected.without_jobs_fee - (225.0 + 35.0)).abs() < 1e-6);
        assert_eq!(forecast.usd.worst.without_jobs_fee, 350.0);
        assert_eq!(forecast.monthly_usd, 1.0);
        // A million at 1,000 a minute, and a quarter of an hour for the last.
        assert!((forecast.hours.rollout - 1000.0 / 60.0).abs() < 1e-9);
        assert!((forecast.hours.done - 1000.0 / 60.0 - 0.25).abs() < 1e-9);
    }

    #[test]
    fn a_column_for_each_question() {
        let titles = |line: &str| forecast(line).text().lines().nth(2).expect("titles").split_whitespace().count();
        assert_eq!(titles("--devices 1"), "USD none fails all fail".split(' ').count());
        assert_eq!(titles("--devices 1 --failure-rate 2.5"), "USD none fails 2.5 % fail all fail".split(' ').count());
    }

    #[test]
    fn more_devices_cost_more_and_take_longer() {
        let of = |devices: u64| {
            let forecast = forecast(&format!("--devices {devices} --failure-rate 5"));
            [forecast.usd.best.total, forecast.usd.expected.total, forecast.usd.worst.total, forecast.hours.done]
        };
        let numbers = [1, 10, 1000, 250_000, 250_001, 10_000_000].map(of);
        assert!(numbers.windows(2).all(|pair| pair[0].iter().zip(pair[1]).all(|(less, more)| *less < more)));
        let [best, expected, worst, _] = numbers[3];
        assert!(best < expected && expected < worst);
    }

    #[test]
    fn what_is_allowed_depends_on_rollout_and_region() {
        let starts = |line: &str| {
            let demands = forecast(line).quotas;
            demands
                .into_iter()
                .find(|demand| demand.quota == "Step Functions: StartExecution")
                .expect("the quota")
                .allowed
        };
        let slow = starts("--devices 100000 --per-minute 600");
        assert!(starts("--devices 1000 --per-minute 60000") > slow, "a small fleet fits into the bucket");
        assert!(starts("--devices 100000 --per-minute 600 --region eu-central-1") < slow);
    }

    #[test]
    fn a_rollout_beyond_a_quota_takes_longer() {
        let forecast = forecast("--devices 600000 --per-minute 60000");
        // 1,000 updates of things a second, where AWS takes 100.
        assert_eq!(forecast.binds_first.quota, "IoT registry: UpdateThing");
        assert!((forecast.binds_first.headroom - 0.1).abs() < 1e-9);
        assert!((forecast.hours.rollout - 100.0 / 60.0).abs() < 1e-9);
        assert!(forecast.text().contains("AWS takes 10 % of this rollout"));
    }

    #[test]
    fn an_image_is_counted_if_its_size_is_known() {
        let usd = |line: &str| forecast(line).usd.best.total;
        assert!((usd("--devices 1000 --image 10") - usd("--devices 1000") - 0.9).abs() < 1e-9);
    }

    #[test]
    fn wrong_options_are_named() {
        let error = |line: &str| options(line).err().expect("an error").to_string();
        assert!(error("").contains("--devices"));
        assert!(error("--devices 0").contains('0'));
        assert!(error("--devices 1 --thing-group a").contains("cannot be used with"));
        assert!(error("--devices 1 --failure-rate 101").contains("`101` is no percentage from 0 to 100"));
        assert!(error("moon --devices 1").contains("moon"));
    }

    #[test]
    fn the_shape_of_the_json_is_stable() {
        let forecast = serde_json::to_value(forecast("--devices 1000")).expect("JSON");
        let keys = |value: &serde_json::Value| {
            // Their order depends on a feature of serde_json that other packages switch on.
            let keys: std::collections::BTreeSet<&str> =
                value.as_object().expect("an object").keys().map(String::as_str).collect();
            keys.into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            keys(&forecast),
            "bindsFirst devices failurePercent hours measured monthlyUsd notes quotas region unit usd workflow"
        );
        assert_eq!(keys(&forecast["usd"]["best"]), "byService total withoutJobsFee");
        assert_eq!(keys(&forecast["hours"]), "done peakPerMinute rollout");
        assert_eq!(keys(&forecast["bindsFirst"]), "adjustable allowed headroom needed quota unit");
    }
}
