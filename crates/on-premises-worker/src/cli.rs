//! The command line of the worker.

use clap::{Args, Parser, Subcommand, ValueEnum};
use on_premises_worker::config::{Config, ConfigError};
use on_premises_worker::{GRACE, handlers, worker};
use protocol::{HandlerName, JsonText};
use serde_json::json;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Runs jobs of the cloud as programs on this host. It only connects out.
///
/// Exit status: 0 all done, after SIGTERM too; 1 a job failed (`job`); 2 wrong usage or configuration; 3 it could not
/// run (unreadable files, a journal that another worker uses). What the broker refuses is logged and tried again.
///
/// The variable `RUST_LOG` chooses what is logged, such as `on_premises_worker=debug`; info is the default.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// The form of the log, on stderr
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text", env = "WORKER_LOG_FORMAT")]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One object a line
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run jobs until SIGTERM or Ctrl-C. What runs then may end, unless a second signal comes.
    Run(WithConfig),
    /// Read the configuration, certificates and programs, and say what would run.
    Check(WithConfig),
    /// Run a handler on the JSON from stdin, as for a job, and print its result, or its exception.
    Job {
        #[command(flatten)]
        config: WithConfig,
        /// What shall be done with the input
        handler: HandlerName,
    },
}

#[derive(Debug, Args)]
struct WithConfig {
    /// The configuration; its relative paths are relative to its folder
    #[arg(long, value_name = "FILE", env = "WORKER_CONFIG")]
    config: PathBuf,
}

/// Why a command ended without success.
enum Failure {
    Usage(String),
    CouldNotRun(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Unreadable { .. } => Self::CouldNotRun(error.to_string()),
            ConfigError::Invalid { .. } => Self::Usage(error.to_string()),
        }
    }
}

impl Cli {
    /// Runs the command and says how it ended.
    pub(crate) async fn run(self) -> ExitCode {
        log(self.log_format);
        let result = match self.command {
            Command::Run(command) => command.run().await,
            Command::Check(command) => command.check(),
            Command::Job { config, handler } => job(&config, &handler).await,
        };
        match result {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(1),
            Err(Failure::Usage(sentence)) => {
                eprintln!("error: {sentence}");
                ExitCode::from(2)
            }
            Err(Failure::CouldNotRun(sentence)) => {
                eprintln!("error: {sentence}");
                ExitCode::from(3)
            }
        }
    }
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

impl WithConfig {
    async fn run(self) -> Result<bool, Failure> {
        let config = Config::read(&self.config)?;
        worker::run(config).await.map_err(|error| Failure::CouldNotRun(error.to_string()))?;
        Ok(true)
    }

    fn check(self) -> Result<bool, Failure> {
        let config = Config::read(&self.config).map_err(|error| Failure::Usage(error.to_string()))?;
        let mut problems = Vec::new();
        if let Err(error) = worker::tls(&config) {
            problems.push(error.to_string());
        }
        println!("worker {} of {}, client id {}", config.worker, config.tenant, config.client_id);
        println!("broker {}, journal {}", config.endpoint, config.journal.display());
        match &config.storage {
            Some(storage) => println!("storage {storage}"),
            None => println!("no storage: inputs and results that are too large for a message fail their jobs"),
        }
        println!("up to {} jobs at once, by default with {}", config.concurrency, config.default_handler);
        for handler in config.known_handlers() {
            let program = config.handlers.iter().find(|(name, _)| name.as_str() == handler);
            let Some((name, program)) = program else {
                println!("handler {handler}: built in");
                continue;
            };
            match program.locate() {
                Ok(path) => println!("handler {handler}: {} {}", path.display(), program.arguments.join(" ")),
                Err(why) => problems.push(format!("handlers.{name}.program: {why}")),
            }
            // The one in the journal is made when it is needed.
            if !program.folder.is_dir() && !program.folder.starts_with(&config.journal) {
                problems.push(format!("handlers.{name}.folder: {} is no folder", program.folder.display()));
            }
        }
        if problems.is_empty() { Ok(true) } else { Err(Failure::Usage(problems.join("\nerror: "))) }
    }
}

async fn job(config: &WithConfig, handler: &HandlerName) -> Result<bool, Failure> {
    let config = Config::read(&config.config)?;
    if !config.knows(handler) {
        let known = config.known_handlers().join(", ");
        return Err(Failure::Usage(format!("{handler} is no handler: expected one of {known}")));
    }
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text).map_err(|error| Failure::CouldNotRun(format!("stdin: {error}")))?;
    let input = JsonText::parse(&text).map_err(|error| Failure::Usage(format!("stdin: expected JSON: {error}")))?;
    config
        .make_working_folder()
        .map_err(|error| Failure::CouldNotRun(format!("no working folder in {}: {error}", config.journal.display())))?;
    let on_progress = |percent| tracing::info!(percent, "progress");
    let mut terminated = signal(SignalKind::terminate()).map_err(|error| no_signals(&error))?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(|error| no_signals(&error))?;
    // The program has a process group of its own, so no signal from a terminal reaches it.
    let told_to_end = async {
        select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
        GRACE
    };
    match handlers::handle(&config, handler, &input, on_progress, told_to_end).await {
        Some(Ok(result)) => {
            println!("{result}");
            Ok(true)
        }
        Some(Err(failure)) => {
            println!("{}", json!({"exception": failure.exception, "cause": failure.cause}));
            Ok(false)
        }
        None => Err(Failure::CouldNotRun("interrupted".to_owned())),
    }
}

fn no_signals(error: &io::Error) -> Failure {
    Failure::CouldNotRun(format!("signals cannot be received: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_names_every_exit_status() {
        let help = Cli::command().render_long_help().to_string();
        for status in ["0 all done", "1 a job failed", "2 wrong usage", "3 it could not"] {
            assert!(help.contains(status), "{status}");
        }
    }
}
