//! A deployed stack to measure, and what figures are made of times.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cloud::{Cloud, FixedPorts};
use crate::deploy::{self, Outputs};
use crate::process::Kind;
use crate::project::Project;

/// A local cloud with the stack.
pub(super) struct Stack<'a> {
    pub(super) project: &'a Project,
    pub(super) cloud: Cloud,
    pub(super) outputs: Outputs,
}

impl<'a> Stack<'a> {
    /// Starts a local cloud and deploys to it.
    pub(super) fn deployed(project: &'a Project, parameters: &[(&str, &str)]) -> Result<Self> {
        let cloud = Cloud::start(project, FixedPorts::default(), false)?;
        let outputs = deploy::deploy_released(project, &cloud, &deploy::parameters(parameters))?;
        Ok(Self { project, cloud, outputs })
    }

    /// What the AWS CLI answers.
    pub(super) fn aws<T: for<'de> Deserialize<'de>>(&self, arguments: &[&str]) -> Result<T> {
        let mut command = self.cloud.tool(self.project, "aws");
        command.args(arguments).args(["--output", "json"]);
        let name = format!("`aws {}`", arguments[..2].join(" "));
        let answer = self.project.processes.output(&name, &mut command, &self.cloud.run.log(arguments[1]))?;
        serde_json::from_str(&answer).with_context(|| format!("{name} printed something else than was expected"))
    }

    /// The full name of the function with this name in the template.
    pub(super) fn function(&self, name: &str) -> Result<String> {
        let names: Vec<String> = self.aws(&["lambda", "list-functions", "--query", "Functions[].FunctionName"])?;
        let part = format!("-{name}");
        names.into_iter().find(|function| function.contains(&part)).with_context(|| format!("no function {name}"))
    }

    /// The URL of the queue with this name in the template.
    pub(super) fn queue(&self, name: &str) -> Result<String> {
        let urls: Vec<String> = self.aws(&["sqs", "list-queues", "--query", "QueueUrls[]"])?;
        let part = format!("-{name}-");
        urls.into_iter().find(|url| url.contains(&part)).with_context(|| format!("no queue {name}"))
    }

    /// Puts an image of so many bytes into the stack's bucket; what a job's payload has as `artifact`.
    pub(super) fn upload(&self, bytes: usize) -> Result<Value> {
        let file = self.cloud.run.file("firmware.bin");
        std::fs::write(&file, vec![7; bytes])?;
        let key = "firmware/2.0.0";
        let target = format!("s3://{}/{key}", self.outputs.get("FirmwareBucketName")?);
        let mut command = self.cloud.tool(self.project, "aws");
        command.args(["s3", "cp", "--no-progress"]).arg(&file).arg(target);
        self.project.processes.run("`aws s3 cp`", &mut command, &self.cloud.run.log("upload"))?;
        Ok(json!({"key": key, "size": bytes}))
    }

    /// Runs a script of `local/` whose messages go to the terminal; what it prints as JSON.
    pub(super) fn measure<T: for<'de> Deserialize<'de>>(&self, script: &str, command: &mut Command) -> Result<T> {
        let answer = self.cloud.run.file(&format!("{script}.json"));
        command.stdout(std::fs::File::create(&answer)?).stderr(Stdio::inherit());
        let process = self.project.processes.spawn(script, Kind::Task, command, None)?;
        let status = self.project.processes.finish(&process)?;
        if !status.success() {
            bail!("{script} has failed ({status})");
        }
        read(&answer)
    }
}

/// A JSON file.
pub(super) fn read<T: for<'de> Deserialize<'de>>(file: &Path) -> Result<T> {
    let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))?;
    serde_json::from_value(value).with_context(|| format!("{} has another shape than expected", file.display()))
}

/// The value that so many percent of the sorted numbers do not exceed.
pub(super) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// The exponent of growth: the slope of the line through the logarithms of the points (least squares).
pub(super) fn exponent(points: &[(f64, f64)]) -> f64 {
    let logarithms: Vec<_> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| logarithms.iter().map(of).sum::<f64>() / count(logarithms.len());
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let above: f64 = logarithms.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    above / logarithms.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

/// A count among measured numbers.
#[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond millions")]
pub(super) fn count(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "whole numbers")]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 95, 99, 100].map(|percent| percentile(&hundred, percent)), [50.0, 95.0, 99.0, 100.0]);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 50), 2.0);
        assert_eq!(percentile(&[], 50), 0.0);
    }

    #[test]
    fn the_exponent_of_a_line_is_one_and_of_a_square_two() {
        let grown = |power: i32| [1.0_f64, 10.0, 50.0].map(|x| (x, 3.0 * x.powi(power)));
        assert!((exponent(&grown(1)) - 1.0).abs() < 1e-9);
        assert!((exponent(&grown(2)) - 2.0).abs() < 1e-9);
    }
}
