//! What a device costs: the counts that `bench cost` has measured, and AWS's prices.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path as FilePath;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub(crate) const COUNTS: &str = "docs/counts.toml";
pub(crate) const PRICES: &str = "docs/prices.toml";
/// The item whose price is the Jobs fee, which is larger than all the rest.
pub(crate) const JOB_EXECUTIONS: &str = "job-executions";

/// Numbers by what is counted.
pub(crate) type Amounts = BTreeMap<String, f64>;

/// `docs/counts.toml`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Counts {
    /// When it was measured.
    pub(crate) date: String,
    /// What of the stack costs by the month.
    pub(crate) monthly: Amounts,
    pub(crate) workflows: BTreeMap<String, Measured>,
}

/// What a workflow takes of AWS.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Measured {
    /// What it is counted for: a device, a reading.
    pub(crate) unit: String,
    pub(crate) happy: Path,
    /// The most expensive failure of those that are measured.
    pub(crate) worst: Path,
}

/// One way through a workflow.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Path {
    pub(crate) about: String,
    /// How many were measured; what follows is of one.
    pub(crate) measured: usize,
    /// What AWS charges for, by the items of `docs/prices.toml`.
    pub(crate) amounts: Amounts,
    /// What quotas bound, by the calls of `docs/quotas.toml`.
    pub(crate) calls: Amounts,
}

/// The workflows as one names them on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workflow {
    /// A job upgrades devices.
    Firmware,
    /// Devices that come online get their settings.
    Config,
    /// Devices that cannot update themselves are taken care of.
    Recovery,
    /// Jobs of workers on premises.
    OnPremises,
    /// Readings of sensors; the worst is one that leads to a remediation, in vain.
    Telemetry,
}

impl Workflow {
    /// Its name in `docs/counts.toml`.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Firmware => "firmware-upgrade",
            Self::Config => "config-push",
            Self::Recovery => "failed-update-recovery",
            Self::OnPremises => "on-premises-job",
            Self::Telemetry => "telemetry",
        }
    }
}

/// `docs/prices.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Prices {
    pub(crate) date: String,
    pub(crate) region: String,
    price: Vec<Price>,
    monthly: Vec<Monthly>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Price {
    item: String,
    service: String,
    usd: f64,
    per: f64,
    above: Option<Above>,
    #[expect(dead_code, reason = "for readers of the file")]
    source: String,
    #[expect(dead_code, reason = "for readers of the file")]
    checked: bool,
}

/// Another price of what is above so many a month.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Above {
    number: f64,
    usd: f64,
    #[expect(dead_code, reason = "for readers of the file")]
    checked: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Monthly {
    item: String,
    #[expect(dead_code, reason = "for readers of the file")]
    service: String,
    usd: f64,
    #[expect(dead_code, reason = "for readers of the file")]
    source: String,
    #[expect(dead_code, reason = "for readers of the file")]
    checked: bool,
}

/// Reads a file of the checkout.
pub(crate) fn read<T: for<'de> Deserialize<'de>>(root: &FilePath, path: &str) -> Result<T> {
    let text = fs::read_to_string(root.join(path)).with_context(|| format!("{path} cannot be read"))?;
    toml::from_str(&text).with_context(|| format!("{path} has another shape than expected"))
}

impl Counts {
    /// What the bench has counted.
    pub(crate) fn read(root: &FilePath) -> Result<Self> {
        read(root, COUNTS).with_context(|| format!("no counts: `cargo xtask bench cost` measures and writes {COUNTS}"))
    }

    /// What was counted of a workflow.
    pub(crate) fn of(&self, workflow: Workflow) -> Result<&Measured> {
        self.workflows.get(workflow.key()).with_context(|| format!("{COUNTS} has no workflow {}", workflow.key()))
    }
}

impl Measured {
    /// What a number of devices takes, of which a share fails in the most expensive way.
    pub(crate) fn expected(&self, number: f64, failure_rate: f64, of: impl Fn(&Path) -> &Amounts) -> Amounts {
        let mut expected = scaled(of(&self.happy), number * (1.0 - failure_rate));
        for (item, amount) in scaled(of(&self.worst), number * failure_rate) {
            *expected.entry(item).or_default() += amount;
        }
        expected
    }
}

/// The same amounts for another number of devices.
pub(crate) fn scaled(amounts: &Amounts, factor: f64) -> Amounts {
    amounts.iter().map(|(item, amount)| (item.clone(), amount * factor)).collect()
}

impl Prices {
    pub(crate) fn read(root: &FilePath) -> Result<Self> {
        read(root, PRICES)
    }

    /// USD by service.
    pub(crate) fn by_service(&self, amounts: &Amounts) -> Result<Amounts> {
        let mut services = Amounts::new();
        for (item, amount) in amounts {
            let price = self.price.iter().find(|price| price.item == *item);
            let price = price.with_context(|| format!("{PRICES} has no price of {item}"))?;
            *services.entry(price.service.clone()).or_default() += price.of(*amount);
        }
        Ok(services)
    }

    /// USD in all, and without the Jobs fee.
    pub(crate) fn totals(&self, amounts: &Amounts) -> Result<[f64; 2]> {
        let mut others = amounts.clone();
        others.remove(JOB_EXECUTIONS);
        let total = |amounts| Ok::<f64, anyhow::Error>(self.by_service(amounts)?.values().sum());
        Ok([total(amounts)?, total(&others)?])
    }

    /// USD by the month for what is there all the time.
    pub(crate) fn monthly(&self, counts: &Counts) -> Result<f64> {
        let usd = |(item, number): (&String, &f64)| {
            let price = self.monthly.iter().find(|price| price.item == *item);
            Ok(price.with_context(|| format!("{PRICES} has no monthly price of {item}"))?.usd * number)
        };
        counts.monthly.iter().map(usd).sum()
    }
}

impl Price {
    fn of(&self, amount: f64) -> f64 {
        let (number, beyond) = self.above.as_ref().map_or((f64::INFINITY, 0.0), |above| (above.number, above.usd));
        (amount.min(number) * self.usd + (amount - number).max(0.0) * beyond) / self.per
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "prices of a few digits")]
mod tests {
    use super::*;

    const PRICE: &str = r#"
        date = "2026-01-01"
        region = "us-east-1"
        [[price]]
        item = "state-transitions"
        service = "Step Functions"
        usd = 25.0
        per = 1_000_000
        source = "a"
        checked = true
        [[price]]
        item = "job-executions"
        service = "IoT Jobs"
        usd = 0.003
        per = 1
        above = { number = 250_000, usd = 0.0015, checked = false }
        source = "b"
        checked = true
        [[monthly]]
        item = "alarms"
        service = "CloudWatch"
        usd = 0.1
        source = "c"
        checked = false
    "#;

    fn amounts(pairs: &[(&str, f64)]) -> Amounts {
        pairs.iter().map(|(item, amount)| ((*item).to_owned(), *amount)).collect()
    }

    #[test]
    fn prices_by_hand() {
        let prices: Prices = toml::from_str(PRICE).expect("prices");
        let million = amounts(&[("state-transitions", 10_000_000.0), ("job-executions", 1_000_000.0)]);
        // 10 × 25, and 250,000 × 0.003 + 750,000 × 0.0015.
        assert_eq!(prices.totals(&million).expect("totals"), [250.0 + 750.0 + 1125.0, 250.0]);
        assert_eq!(prices.by_service(&million).expect("services")["IoT Jobs"], 1875.0);
        let unknown = prices.totals(&amounts(&[("moons", 1.0)])).unwrap_err();
        assert_eq!(unknown.to_string(), "docs/prices.toml has no price of moons");
    }

    #[test]
    fn a_share_that_fails_takes_what_failures_take() {
        let path = |transitions: f64| Path {
            about: String::new(),
            measured: 1,
            amounts: amounts(&[("state-transitions", transitions)]),
            calls: Amounts::new(),
        };
        let measured = Measured { unit: "device".into(), happy: path(10.0), worst: path(14.0) };
        assert_eq!(measured.expected(100.0, 0.25, |path| &path.amounts)["state-transitions"], 750.0 + 350.0);
    }

    #[test]
    fn the_files_of_the_checkout_fit_together() {
        let root = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let (prices, counts) = (Prices::read(&root).expect("prices"), Counts::read(&root).expect("counts"));
        for workflow in Workflow::value_variants() {
            let measured = counts.of(*workflow).expect("measured");
            for path in [&measured.happy, &measured.worst] {
                prices.totals(&path.amounts).expect("a price of each item");
            }
        }
        assert!(prices.monthly(&counts).expect("a price of each item") > 0.0);
        let upgrade = counts.of(Workflow::Firmware).expect("measured");
        let usd = |path: &Path| prices.totals(&path.amounts).expect("totals")[1];
        assert!(usd(&upgrade.worst) > usd(&upgrade.happy), "the most expensive failure is not among those measured");
    }
}
