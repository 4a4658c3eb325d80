//! What AWS allows, and how much of it a rollout needs.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::rollout::Pace;
use crate::costs::{Amounts, read};

pub(super) const QUOTAS: &str = "docs/quotas.toml";
const SECONDS_A_MINUTE: f64 = 60.0;

/// `docs/quotas.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quotas {
    pub(super) date: String,
    large_regions: Vec<String>,
    quota: Vec<Quota>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Quota {
    name: String,
    calls: Vec<String>,
    #[serde(default = "a_second")]
    unit: String,
    us_east_1: f64,
    other: f64,
    burst_us_east_1: Option<f64>,
    burst_other: Option<f64>,
    adjustable: bool,
    #[expect(dead_code, reason = "for readers of the file")]
    source: String,
}

fn a_second() -> String {
    "a second".to_owned()
}

/// What a rollout needs of a quota.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Demand {
    pub(super) quota: String,
    /// At the peak of the rollout.
    pub(super) needed: f64,
    /// What AWS allows for as long as the rollout takes: a bucket that is full at first allows more for a while.
    pub(super) allowed: f64,
    pub(super) unit: String,
    /// How many times what is needed is allowed.
    pub(super) headroom: f64,
    pub(super) adjustable: bool,
}

impl Quotas {
    pub(super) fn read(root: &Path) -> Result<Self> {
        read(root, QUOTAS)
    }

    /// What is needed of each quota that the calls of a device touch, the tightest first.
    pub(super) fn demands(&self, calls: &Amounts, devices: f64, pace: &Pace, region: &str) -> Vec<Demand> {
        let large = self.large_regions.iter().any(|large| large == region);
        let demand = |quota: &Quota| quota.demand(calls, devices, pace, large);
        let mut demands: Vec<Demand> = self.quota.iter().filter_map(demand).collect();
        demands.sort_by(|one, other| one.headroom.total_cmp(&other.headroom));
        demands
    }
}

impl Quota {
    fn demand(&self, calls: &Amounts, devices: f64, pace: &Pace, large: bool) -> Option<Demand> {
        let (rate, burst) = if large { (self.us_east_1, self.burst_us_east_1) } else { (self.other, self.burst_other) };
        let of_a_device: f64 = self.calls.iter().filter_map(|call| calls.get(call)).sum();
        let needed = of_a_device * pace.peak / SECONDS_A_MINUTE;
        // At its peak all devices would be told within this time.
        let seconds = devices / pace.peak * SECONDS_A_MINUTE;
        let allowed = rate + burst.unwrap_or_default() / seconds;
        (needed > 0.0).then(|| Demand {
            quota: self.name.clone(),
            needed,
            allowed,
            unit: self.unit.clone(),
            headroom: allowed / needed,
            adjustable: self.adjustable,
        })
    }
}

impl Demand {
    pub(super) fn line(&self) -> String {
        let Self { quota, needed, allowed, headroom, adjustable, unit } = self;
        let unit = if unit == &a_second() { String::new() } else { format!(" ({unit})") };
        let fixed = if *adjustable { "" } else { ", fixed" };
        format!(
            "{:<70}{needed:>10.1}{allowed:>10.1}{:>10}",
            format!("{quota}{unit}{fixed}"),
            format!("{headroom:.1} ×")
        )
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "numbers of a few digits")]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn quotas() -> Quotas {
        Quotas::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).expect("quotas")
    }

    fn demands(devices: f64, per_minute: f64, region: &str) -> Vec<Demand> {
        let calls = [("states.StartExecution", 1.0), ("iot.UpdateThing", 1.0)];
        let calls: Amounts = calls.map(|(call, number)| (call.to_owned(), number)).into();
        quotas().demands(&calls, devices, &Pace { minutes: devices / per_minute, peak: per_minute }, region)
    }

    #[test]
    fn demands_by_hand() {
        // 50 devices a second for 20 seconds: a bucket of 1,300 adds 65 a second to the 300 that refill it.
        let [update, start] = demands(1000.0, 3000.0, "us-east-1").try_into().expect("two quotas");
        assert_eq!((start.needed, start.allowed, start.headroom), (50.0, 365.0, 7.3));
        assert_eq!((update.needed, update.allowed, update.headroom), (50.0, 100.0, 2.0));
        let elsewhere = demands(1000.0, 3000.0, "eu-central-1");
        assert_eq!((elsewhere[0].allowed, elsewhere[0].headroom), (50.0, 1.0));
    }

    #[test]
    fn each_quota_has_a_name_of_its_own() {
        let quotas = quotas();
        let names: BTreeSet<&str> = quotas.quota.iter().map(|quota| quota.name.as_str()).collect();
        assert_eq!(names.len(), quotas.quota.len());
        assert!(quotas.quota.iter().all(|quota| quota.us_east_1 > 0.0 && quota.other > 0.0));
    }
}
