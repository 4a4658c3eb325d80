//! The workspace's own programs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::console::Step;
use crate::project::Project;

/// Builds the program of a package of the same name.
pub(crate) fn built(project: &Project, package: &str) -> Result<PathBuf> {
    built_with(project, package, &["--package", package])
}

/// The same, with arguments that tell Cargo which package and how.
pub(crate) fn built_with(project: &Project, package: &str, arguments: &[&str]) -> Result<PathBuf> {
    let logs = project.state();
    fs::create_dir_all(&logs)?;
    let mut build = project.command("cargo");
    build.arg("build").args(arguments).args(["--message-format", "json-render-diagnostics"]);
    let step = Step::start(format!("$ {}", project.line(&build)));
    let log = logs.join(format!("{package}-build.log"));
    let messages = project.processes.output(&format!("The build of {package}"), &mut build, &log)?;
    step.done();
    // Cargo knows where its target folder is, whatever the settings.
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == package)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("Cargo has built no program named {package}"))
}
