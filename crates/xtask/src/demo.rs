//! `cargo xtask demo`: a workflow over a fleet of simulated devices, from its start to the closing table.

mod config;
mod faults;
mod firmware;
mod on_premises;
mod recovery;
mod telemetry;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::cloud::{self, Cloud};
use crate::console::Step;
use crate::deploy::Outputs;
use crate::process::{Kind, Process};
use crate::project::Project;

const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// What `demo` takes.
#[derive(Args)]
pub(crate) struct DemoOptions {
    /// What to show.
    #[arg(value_enum, default_value_t = Workflow::Firmware)]
    workflow: Workflow,
    /// How many devices to simulate; `recovery` follows a single one.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    devices: u32,
    /// Faults of the simulated devices, such as `boot=3,mute=2`; `device-simulator run --help` lists them.
    #[arg(long, value_name = "KIND=COUNT,…")]
    fail: Option<String>,
    /// What the devices speak.
    #[arg(long, value_enum, default_value_t = Protocol::Mixed)]
    protocol: Protocol,
    /// Let the local cloud run on afterwards, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Give up when the workflows are not over after this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    time_limit: u64,
}

/// The workflows that can be shown.
#[derive(Clone, Copy, ValueEnum)]
enum Workflow {
    /// A job upgrades the fleet.
    Firmware,
    /// Devices that come online get the settings of their users.
    Config,
    /// A device that cannot update itself is parked, restored, quarantined and released.
    Recovery,
    /// Two workers of a tenant run jobs, and one takes over when the other is killed.
    OnPremises,
    /// Sensors drift out of their band and are brought back.
    Telemetry,
}

/// The protocols of the simulated devices.
#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    /// Half of them JSON, half of them USP.
    Mixed,
    Json,
    Usp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Json => "json",
            Self::Usp => "usp",
        }
    }
}

/// Runs the whole demonstration; succeeds when exactly the devices with a fault have failed.
pub(crate) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    match options.workflow {
        Workflow::Firmware => firmware::demo(project, options),
        Workflow::Config => config::demo(project, options),
        Workflow::Recovery => recovery::demo(project, options),
        Workflow::OnPremises => on_premises::demo(project, options),
        Workflow::Telemetry => telemetry::demo(project, options),
    }
}

/// The deployed stack, and the simulator of its devices.
struct Demo<'a> {
    project: &'a Project,
    cloud: &'a Cloud,
    outputs: Outputs,
    simulator: PathBuf,
    options: &'a DemoOptions,
}

impl Demo<'_> {
    fn devices(&self) -> PathBuf {
        self.cloud.run.file("devices")
    }

    /// A command of the simulator for its devices.
    fn simulate(&self, subcommand: &str) -> Command {
        let mut command = self.project.command(&self.simulator);
        command.envs(self.cloud.environment()).arg(subcommand).arg("--certificates").arg(self.devices());
        command
    }

    fn run(&self, name: &str, command: &mut Command) -> Result<String> {
        let line = self.project.line(command);
        let step = Step::plain(format!("$ {line}"));
        let words: Vec<&str> = line.split(' ').take(3).collect();
        let output =
            self.project.processes.output(&format!("`{}`", words.join(" ")), command, &self.cloud.run.log(name))?;
        step.done();
        Ok(output)
    }

    /// Registers the devices.
    fn provision(&self) -> Result<()> {
        // The group's name is the last part of its ARN.
        let group = self.outputs.get("ThingGroupArn")?.rsplit('/').next().unwrap_or_default();
        let mut command = self.simulate("provision");
        command
            .args(["--count", &self.options.devices.to_string(), "--prefix", "sim"])
            .args(["--policy", self.outputs.get("DevicePolicyName")?])
            .args(["--thing-group", group, "--thing-type", self.outputs.get("ThingTypeName")?])
            .args(["--protocol", self.options.protocol.name()]);
        self.run("provision", &mut command).map(drop)
    }

    /// The command that runs the devices, each workflow with options of its own.
    fn fleet_command(&self, options: [&str; 2]) -> Command {
        let mut command = self.simulate("run");
        command.args(["--endpoint", &self.cloud.mqtt]).args(options).arg("--ca").arg(&self.cloud.ca);
        command
    }

    /// Starts the devices.
    fn start_fleet(&self, command: &mut Command, log: Option<&Path>) -> Result<Process> {
        eprintln!("$ {}", self.project.line(command));
        let fleet = self.project.processes.spawn("The device simulator", Kind::Task, command, log)?;
        self.cloud.run.add("simulator", &fleet)?;
        Ok(fleet)
    }

    fn aws<T: for<'de> Deserialize<'de>>(&self, arguments: &[&str]) -> Result<T> {
        let mut command = self.cloud.tool(self.project, "aws");
        command.args(arguments).args(["--output", "json"]);
        self.answer(&format!("`aws {}`", arguments[..2].join(" ")), &mut command, arguments[1])
    }

    /// What a command prints as JSON.
    fn answer<T: for<'de> Deserialize<'de>>(&self, name: &str, command: &mut Command, log: &str) -> Result<T> {
        let answer = self.project.processes.output(name, command, &self.cloud.run.log(log))?;
        serde_json::from_str(&answer)
            .with_context(|| format!("{name} printed something else than was expected: {answer}"))
    }

    fn time_limit(&self) -> Duration {
        Duration::from_secs(self.options.time_limit)
    }

    /// Lets the local cloud run on, if that is wanted.
    fn keep(&self) -> Result<()> {
        if self.options.keep {
            println!("\nThe local cloud runs on at {}; Ctrl-C stops it.", self.cloud.endpoint);
            cloud::stay(self.project)?;
        }
        Ok(())
    }
}

/// How many there are of each status.
fn counts<'a>(statuses: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut counts = BTreeMap::<&str, usize>::new();
    for status in statuses {
        *counts.entry(status).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(status, count)| format!("{count} {status}")).collect();
    (!counts.is_empty()).then(|| counts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_counted() {
        assert_eq!(counts(["RUNNING", "FAILED", "RUNNING"].into_iter()).as_deref(), Some("1 FAILED, 2 RUNNING"));
        assert_eq!(counts([].into_iter()), None);
    }
}
