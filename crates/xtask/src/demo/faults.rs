//! What the faults of simulated devices do to a workflow, and whether that is what happened.

use std::ops::RangeInclusive;

use anyhow::{Context, Result, bail};

/// The kinds of faults that a workflow knows.
pub(super) struct Faults {
    /// Those after which it fails.
    pub(super) failing: &'static [&'static str],
    /// Those after which it may fail.
    pub(super) may_fail: &'static [&'static str],
}

/// One `KIND=COUNT` of `--fail`.
pub(super) struct Fault<'a> {
    /// The kind without its step.
    pub(super) kind: &'a str,
    /// For how many devices; none for a percentage of them.
    count: Option<usize>,
}

/// Reads the value of `--fail`.
pub(super) fn parse(faults: Option<&str>) -> Result<Vec<Fault<'_>>> {
    let faults = faults.unwrap_or_default().split(',').map(str::trim);
    faults.filter(|fault| !fault.is_empty()).map(parse_one).collect()
}

fn parse_one(fault: &str) -> Result<Fault<'_>> {
    let (kind, amount) =
        fault.split_once('=').with_context(|| format!("`{fault}` of --fail is not KIND=COUNT, for example mute=3"))?;
    let kind = kind.split('@').next().unwrap_or(kind);
    let count = match amount.strip_suffix('%') {
        Some(_) => None,
        None => Some(amount.parse().with_context(|| {
            format!("`{amount}` in `{fault}` of --fail is neither a number of devices nor a percentage")
        })?),
    };
    Ok(Fault { kind, count })
}

impl Faults {
    /// How many devices must fail, and how many may, with these faults.
    pub(super) fn expected_failures(&self, faults: &[Fault<'_>], devices: u32) -> Result<RangeInclusive<usize>> {
        let devices = usize::try_from(devices)?;
        let (mut least, mut most) = (0, 0);
        for Fault { kind, count } in faults {
            if self.failing.contains(kind) {
                least += count.unwrap_or(0);
            }
            if self.failing.contains(kind) || self.may_fail.contains(kind) {
                most += count.unwrap_or(devices);
            }
        }
        if least > devices {
            bail!("--fail injects {least} faults into {devices} devices");
        }
        Ok(least..=most.min(devices))
    }
}

/// Succeeds if as many devices have failed as should; `what` says in what.
pub(super) fn verdict(failed: usize, expected: &RangeInclusive<usize>, what: &str) -> Result<()> {
    if expected.contains(&failed) {
        return Ok(());
    }
    let asked = if expected.start() == expected.end() {
        expected.start().to_string()
    } else {
        format!("{} to {}", expected.start(), expected.end())
    };
    bail!("{failed} devices {what}, but {asked} faults were asked for")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULTS: Faults = Faults { failing: &["boot", "download"], may_fail: &["power-cut"] };

    fn expected(faults: &str) -> Result<RangeInclusive<usize>> {
        FAULTS.expected_failures(&parse(Some(faults))?, 20)
    }

    #[test]
    fn without_faults_nothing_may_fail() {
        assert_eq!(FAULTS.expected_failures(&parse(None).unwrap(), 20).unwrap(), 0..=0);
        assert_eq!(expected("slow=3,offline=2").unwrap(), 0..=0);
    }

    #[test]
    fn faults_are_counted() {
        assert_eq!(expected("boot=3,download=2").unwrap(), 5..=5);
        assert_eq!(expected("boot=3,power-cut@transferred=2").unwrap(), 3..=5);
        assert_eq!(expected("boot=10%").unwrap(), 0..=20);
    }

    #[test]
    fn wrong_faults_are_named() {
        let error = |faults: &str| expected(faults).unwrap_err().to_string();
        assert!(error("boot").contains("`boot`"));
        assert!(error("boot=many").contains("`many`"));
        assert!(error("boot=21").contains("21 faults into 20 devices"));
    }

    #[test]
    fn the_verdict_compares_failures_with_faults() {
        assert!(verdict(1, &(1..=1), "were not upgraded").is_ok());
        let error = verdict(1, &(2..=5), "were not upgraded").unwrap_err().to_string();
        assert_eq!(error, "1 devices were not upgraded, but 2 to 5 faults were asked for");
    }
}
