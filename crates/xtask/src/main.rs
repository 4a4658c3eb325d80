//! The local cloud and every developer command: `cargo xtask up`, `down`, `demo`, `test` and `bench`.

mod bench;
mod cloud;
mod console;
mod costs;
mod demo;
mod deploy;
mod forecast;
mod functions;
mod process;
mod program;
mod project;
mod python;
mod run;
mod settings_api;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::process::Interrupted;
use crate::project::Project;

/// The local cloud and every developer command.
///
/// The local cloud needs no AWS account and no Docker: a Rust toolchain and Python 3.11 or newer are enough. All that
/// it writes is below `.fleetflow/` and `target/` of this checkout.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the local cloud, deploy the template to it and stay until Ctrl-C.
    Up(cloud::UpOptions),
    /// Stop every local cloud of this checkout that still runs.
    Down,
    /// Show a workflow with a fleet of simulated devices from end to end, and what became of each.
    Demo(demo::DemoOptions),
    /// Measure: figures on the terminal, as JSON in target/bench/, and in docs/benchmarks.md.
    Bench(bench::BenchOptions),
    /// Tell what a workflow for many devices will cost, how long it takes, and which quota of AWS binds first.
    Forecast(forecast::ForecastOptions),
    /// Check and test everything: format, lints, definitions, unit tests, end-to-end tests.
    Test(test::TestOptions),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = Project::open().and_then(|project| match cli.command {
        Command::Up(options) => cloud::up(&project, &options),
        Command::Down => run::down(&project),
        Command::Demo(options) => demo::demo(&project, &options),
        Command::Bench(options) => bench::bench(&project, &options),
        Command::Forecast(options) => forecast::forecast(&project, &options),
        Command::Test(options) => test::test(&project, &options),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("{error}; everything that was started has been stopped.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
