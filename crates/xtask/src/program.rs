//! The workspace's own programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::console::{CARGO_PROGRESS, Step};
use crate::process::{Kind, tail};
use crate::project::Project;
use crate::python::Venvs;

/// Beside the functions: what plays devices and workers, and what is between the functions and the local cloud.
const OTHERS: [&str; 3] = ["aws-proxy", "device-simulator", "on-premises-worker"];

/// The functions and the programs around them, in Cargo's profile for development.
///
/// One call of Cargo builds them all, with the same selection of packages (all of them) as the tests: a different selection would
/// unify features differently, and the AWS SDKs would be compiled once more.
pub(crate) struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Builds them, and the Python environments meanwhile.
    pub(crate) fn built(project: &Project) -> Result<Self> {
        let mut names = functions(project)?;
        names.extend(OTHERS.map(str::to_owned));
        let mut arguments = vec!["--workspace".to_owned()];
        arguments.extend(names.iter().flat_map(|name| ["--bin".to_owned(), name.clone()]));
        let title = "Build the functions, the simulator and the worker (some minutes the first time)";
        let paths = build(project, title, &arguments, || Venvs::ready(project).map(drop))?;
        Ok(Self(paths))
    }

    /// A program's path.
    pub(crate) fn path(&self, name: &str) -> Result<&Path> {
        self.0.get(name).map(PathBuf::as_path).with_context(|| not_built(name))
    }

    /// The folder that the functions' programs are in.
    pub(crate) fn folder(&self) -> Result<&Path> {
        self.path(OTHERS[0])?.parent().context("a program is in no folder")
    }
}

/// The functions' programs are named after their sources.
fn functions(project: &Project) -> Result<Vec<String>> {
    let folder = project.root.join("crates/fleet/src/bin");
    let entries = fs::read_dir(&folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.path().file_stem().and_then(|name| name.to_str()).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Builds one program in Cargo's profile for releases, with arguments that say where it is.
pub(crate) fn released(project: &Project, name: &str, arguments: &[&str]) -> Result<PathBuf> {
    let mut all = vec!["--release".to_owned()];
    all.extend(arguments.iter().map(|&argument| argument.to_owned()));
    let mut paths = build(project, &format!("$ cargo build {}", all.join(" ")), &all, || Ok(()))?;
    paths.remove(name).with_context(|| not_built(name))
}

fn not_built(name: &str) -> String {
    format!("Cargo has built no program named {name}")
}

/// Runs `cargo build`, and something else meanwhile; the programs by their names.
fn build(
    project: &Project,
    title: &str,
    arguments: &[String],
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<BTreeMap<String, PathBuf>> {
    let _lock = project.lock_builds()?;
    let log = project.state().join("build.log");
    let messages = log.with_extension("json");
    let mut cargo = project.command("cargo");
    cargo.arg("build").args(arguments).args(["--message-format", "json-render-diagnostics"]).envs(CARGO_PROGRESS);
    cargo.stdout(fs::File::create(&messages)?).stderr(fs::File::create(&log)?);
    let step = Step::compiling(title, &log);
    let process = project.processes.spawn("`cargo build`", Kind::Task, &mut cargo, None)?;
    meanwhile()?;
    let status = project.processes.finish(&process)?;
    if !status.success() {
        bail!("`cargo build` failed.{}", tail(&log));
    }
    step.done();
    // Cargo knows where its target folder is, whatever the settings.
    let messages = fs::read_to_string(&messages)?;
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = |artifact: Value| {
        Some((artifact["target"]["name"].as_str()?.to_owned(), PathBuf::from(artifact["executable"].as_str()?)))
    };
    Ok(artifacts.filter_map(program).collect())
}
