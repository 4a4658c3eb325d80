//! `cargo xtask bench`: figures that anyone can measure again. Each benchmark prints a table, writes it as JSON to
//! `target/bench/`, and replaces its section of `docs/benchmarks.md`.

mod cost;
mod fleet;
mod lambda;
mod runtime_api;
mod simulator;
mod stack;
mod start;
mod storm;

use std::fs;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::project::Project;

const SUMMARY: &str = "docs/benchmarks.md";

/// What `bench` takes.
#[derive(Args)]
pub(crate) struct BenchOptions {
    /// What to measure [default: everything].
    #[arg(value_enum)]
    names: Vec<Benchmark>,
    /// Leave docs/benchmarks.md as it is.
    #[arg(long)]
    no_summary: bool,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Benchmark {
    /// Start and invocation of each Lambda function's binary, its memory and its size.
    Lambda,
    /// What a function's start costs, as it is and built or run otherwise. Builds it three times.
    Start,
    /// What each workflow takes of AWS for a device, and what that costs; `forecast` reads it from docs/counts.toml.
    Cost,
    /// The worst that one device, one sensor and one worker can cause in a day, in USD.
    WorstDay,
    /// Memory of the simulator for each device, time to connect and messages a second, with up to 10,000 devices.
    Simulator,
    /// Upgrades a second and their latency with 50, 200 and 1,000 devices in one job.
    Fleet,
    /// Connect events of 5,000 devices within ten seconds: what is started, twice or never, and after how long.
    Storm,
}

impl Benchmark {
    fn name(self) -> &'static str {
        match self {
            Self::Lambda => "lambda",
            Self::Start => "start",
            Self::Cost => "cost",
            Self::WorstDay => "worst-day",
            Self::Simulator => "simulator",
            Self::Fleet => "fleet",
            Self::Storm => "storm",
        }
    }
}

/// What a benchmark has found.
#[derive(Serialize)]
struct Findings {
    /// What was measured, and how.
    about: String,
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// Where and when something was measured.
#[derive(Serialize)]
struct Setting {
    date: String,
    processor: String,
    cores: usize,
    system: String,
    rust: String,
    commit: String,
}

/// Measures, and shows what was found.
pub(crate) fn bench(project: &Project, options: &BenchOptions) -> Result<()> {
    let names = if options.names.is_empty() { Benchmark::value_variants() } else { &options.names };
    for benchmark in names {
        let findings = match benchmark {
            Benchmark::Lambda => lambda::measure(project)?,
            Benchmark::Start => start::measure(project)?,
            Benchmark::Cost => cost::measure(project)?,
            Benchmark::WorstDay => cost::worst_day::measure(project)?,
            Benchmark::Simulator => simulator::measure(project)?,
            Benchmark::Fleet => fleet::measure(project)?,
            Benchmark::Storm => storm::measure(project)?,
        };
        println!("\n{}\n\n{}", findings.about, findings.text());
        let setting = Setting::now(project);
        let folder = project.root.join("target/bench");
        fs::create_dir_all(&folder)?;
        let file = folder.join(format!("{}.json", benchmark.name()));
        let json = serde_json::json!({"setting": setting, "findings": findings});
        fs::write(&file, serde_json::to_vec_pretty(&json)?)
            .with_context(|| format!("{} cannot be written", file.display()))?;
        if !options.no_summary {
            let path = project.root.join(SUMMARY);
            let summary = fs::read_to_string(&path).with_context(|| format!("{SUMMARY} cannot be read"))?;
            fs::write(&path, replace_section(&summary, benchmark.name(), &findings.section(&setting))?)?;
        }
    }
    Ok(())
}

impl Setting {
    fn now(project: &Project) -> Self {
        let said = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).current_dir(&project.root).output();
            output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
        };
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let today = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        Self {
            date: today.chars().take(10).collect(),
            processor: processor.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            system: said("uname", &["-srm"]),
            rust: said("rustc", &["--version"]),
            commit: said("git", &["rev-parse", "--short", "HEAD"]),
        }
    }

    fn line(&self) -> String {
        let Self { date, processor, cores, system, rust, commit } = self;
        format!("{date}, {cores} cores of {processor}, {system}, {rust}, after commit {commit}")
    }
}

impl Findings {
    /// A table for the terminal.
    fn text(&self) -> String {
        let all = || std::iter::once(&self.columns).chain(&self.rows);
        let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate().map(|(index, (cell, width))| match index {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            cells.collect::<Vec<_>>().join("  ")
        };
        all().map(line).collect::<Vec<_>>().join("\n")
    }

    /// A section for the summary.
    fn section(&self, setting: &Setting) -> String {
        let row = |cells: &[String]| format!("| {} |", cells.join(" | "));
        let rule = format!("| --- |{}", " ---: |".repeat(self.columns.len() - 1));
        let rows: Vec<String> = self.rows.iter().map(|cells| row(cells)).collect();
        format!("{}\n\n{}\n\n{}\n{rule}\n{}\n", self.about, setting.line(), row(&self.columns), rows.join("\n"))
    }
}

/// The summary with another section between the marks of that name.
fn replace_section(summary: &str, name: &str, section: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
    let (before, rest) = summary.split_once(&begin).with_context(|| format!("{SUMMARY} has no mark {begin:?}"))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("{SUMMARY} has no mark {end:?}"))?;
    Ok(format!("{before}{begin}\n{section}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let summary = "# A\n<!-- begin lambda -->\nold\n<!-- end lambda -->\nB\n";
        let replaced = replace_section(summary, "lambda", "new").expect("replaced");
        assert_eq!(replaced, "# A\n<!-- begin lambda -->\n\nnew\n<!-- end lambda -->\nB\n");
        assert_eq!(replace_section(&replaced, "lambda", "new").expect("again"), replaced);
        assert!(replace_section(summary, "cost", "new").is_err());
    }

    #[test]
    fn a_table_lines_up() {
        let text = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        let rows = vec![text(&["create-job", "7"]), text(&["a", "12.5"])];
        let findings = Findings { about: String::new(), columns: text(&["function", "ms"]), rows };
        assert_eq!(findings.text(), "function      ms\ncreate-job     7\na           12.5");
    }
}
