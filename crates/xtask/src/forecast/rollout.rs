//! How fast devices are told, as a job's rollout says.

use anyhow::{Result, ensure};
use clap::Args;

/// What the payload of create-job has as `rollout`.
#[derive(Args)]
pub(super) struct Rollout {
    /// The most devices a minute. One job tells 1,000 at most, unless AWS raises that.
    #[arg(long, value_name = "DEVICES", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(super) per_minute: u32,
    /// Begin with so many a minute (`exponentialRate.baseRatePerMinute`) …
    #[arg(long, value_name = "DEVICES", requires = "increment_factor", requires = "notified", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) base_per_minute: Option<u32>,
    /// … and multiply that by this factor (`incrementFactor`) …
    #[arg(long, value_name = "FACTOR", requires = "base_per_minute")]
    pub(super) increment_factor: Option<f64>,
    /// … each time that so many devices were told (`numberOfNotifiedThings`).
    #[arg(long, value_name = "DEVICES", requires = "base_per_minute", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) notified: Option<u32>,
}

/// How a rollout goes.
#[derive(Debug, PartialEq)]
pub(super) struct Pace {
    /// Until the last device is told.
    pub(super) minutes: f64,
    /// The most devices a minute.
    pub(super) peak: f64,
}

impl Rollout {
    /// The pace for a number of devices.
    pub(super) fn pace(&self, devices: f64) -> Result<Pace> {
        let most = f64::from(self.per_minute);
        let (Some(base), Some(factor), Some(step)) = (self.base_per_minute, self.increment_factor, self.notified)
        else {
            return Ok(Pace { minutes: devices / most, peak: most });
        };
        ensure!((1.1..=5.0).contains(&factor), "--increment-factor: got {factor}, expected 1.1 to 5");
        let (mut rate, step, mut left, mut minutes) = (f64::from(base).min(most), f64::from(step), devices, 0.0);
        while left > step && rate < most {
            minutes += step / rate;
            left -= step;
            rate = (rate * factor).min(most);
        }
        Ok(Pace { minutes: minutes + left / rate, peak: rate })
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "numbers of a few digits")]
mod tests {
    use super::*;

    fn rollout(per_minute: u32, base: Option<(u32, f64, u32)>) -> Rollout {
        Rollout {
            per_minute,
            base_per_minute: base.map(|(base, ..)| base),
            increment_factor: base.map(|(_, factor, _)| factor),
            notified: base.map(|(.., notified)| notified),
        }
    }

    #[test]
    fn a_constant_rate() {
        assert_eq!(rollout(1000, None).pace(50_000.0).unwrap(), Pace { minutes: 50.0, peak: 1000.0 });
    }

    #[test]
    fn a_rate_that_grows() {
        // 100 at 50 a minute, 100 at 100, 100 at 200, 100 at 400, 100 at 800, and the last 200 at 1,000.
        let pace = rollout(1000, Some((50, 2.0, 100))).pace(700.0).unwrap();
        assert!((pace.minutes - (2.0 + 1.0 + 0.5 + 0.25 + 0.125 + 0.2)).abs() < 1e-9);
        assert_eq!(pace.peak, 1000.0);
        // It never exceeds the most.
        assert_eq!(rollout(100, Some((50, 2.0, 100))).pace(1100.0).unwrap(), Pace { minutes: 12.0, peak: 100.0 });
        assert!(rollout(100, Some((50, 9.0, 100))).pace(1.0).unwrap_err().to_string().contains("1.1 to 5"));
    }
}
