//! The simulator as a program: see `device-simulator --help`.

mod cli;

use clap::Parser;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    cli::Cli::parse().run().await
}
