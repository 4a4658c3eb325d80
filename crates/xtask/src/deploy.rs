//! Deploys the template to the local cloud with the command that deploys it to AWS.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cloud::{Cloud, STACK};
use crate::console::{CARGO_PROGRESS, Step};
use crate::program::Programs;
use crate::project::Project;
use crate::python::Venvs;

/// The parameters of the `local` environment in samconfig.toml.
const LOCAL_PARAMETERS: [&str; 2] = ["MaximumConcurrency=5", "AnomalyAlarms=false"];

/// A second stack in the same account.
pub(crate) const SECOND_STACK: &str = "fleetflow-2";

/// What a second stack needs to be told.
const SECOND_PARAMETERS: &[(&str, &str)] = &[("DeviceTopics", "shared"), ("FailedGroupName", "FailedToUpdateToo")];

/// The outputs of the deployed stack.
pub(crate) struct Outputs(BTreeMap<String, String>);

impl Outputs {
    /// The value of an output that the template must have.
    pub(crate) fn get(&self, name: &str) -> Result<&str> {
        self.0.get(name).map(String::as_str).with_context(|| format!("the stack {STACK} has no output {name}"))
    }
}

/// A table of parameters as [`deploy`] takes it.
pub(crate) fn parameters(table: &[(&str, &str)]) -> Vec<(String, String)> {
    table.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Deploys the stack with functions as they are built for development, and hands its state machines to the interpreter that runs
/// them.
pub(crate) fn deploy(
    project: &Project,
    cloud: &Cloud,
    programs: &Programs,
    parameters: &[(String, String)],
) -> Result<Outputs> {
    deploy_with(project, cloud, programs, None, parameters)
}

/// The same, with the functions that `sam build` has built into a folder instead of their debug builds.
pub(crate) fn deploy_with(
    project: &Project,
    cloud: &Cloud,
    programs: &Programs,
    built: Option<&Path>,
    parameters: &[(String, String)],
) -> Result<Outputs> {
    let folder = cloud.run.file("build");
    let mut package = project.tool(&cloud.venvs.build, "python");
    package.arg(project.root.join("local/package_functions.py")).arg(programs.folder()?).arg(&folder).args(built);
    {
        let _lock = project.lock_builds()?;
        let step = Step::start("Package the functions");
        project.processes.run("The packaging of the functions", &mut package, &cloud.run.log("package"))?;
        step.done();
    }
    deploy_template(project, cloud, STACK, &folder, parameters)
}

/// Deploys what [`deploy`] has packaged once more, as a second stack that leaves the topics of devices to the first.
pub(crate) fn deploy_second(project: &Project, cloud: &Cloud, parameters: &[(String, String)]) -> Result<Outputs> {
    let parameters = [parameters, &self::parameters(SECOND_PARAMETERS)].concat();
    deploy_template(project, cloud, SECOND_STACK, &cloud.run.file("build"), &parameters)
}

/// Builds and deploys with the commands that do it for AWS: functions as they are released.
pub(crate) fn deploy_released(project: &Project, cloud: &Cloud, parameters: &[(String, String)]) -> Result<Outputs> {
    let folder = cloud.run.file("build");
    {
        let _lock = project.lock_releases()?;
        // One build of all functions; the build of each by `sam build` then finds it done. From the functions' own package, as
        // `sam build` does it: elsewhere Cargo would choose other features of the dependencies, and compile them all twice.
        let mut build = project.command("cargo");
        build.current_dir(project.root.join("crates/fleet")).env("PATH", cloud.venvs.build.path());
        build.args(["lambda", "build", "--release"]).envs(CARGO_PROGRESS);
        let log = cloud.run.log("lambda-build");
        let step = Step::compiling(format!("$ {}", project.line(&build)), &log);
        project.processes.run("`cargo lambda`", &mut build, &log)?;
        step.done();

        step_of(project, cloud, "sam-build", &mut sam_build(project, &cloud.venvs, &folder))?;
    }
    deploy_template(project, cloud, STACK, &folder, parameters)
}

/// `sam build` into a folder, as for AWS.
pub(crate) fn sam_build(project: &Project, venvs: &Venvs, folder: &Path) -> Command {
    let mut build = project.tool(&venvs.build, "sam");
    build.args(["build", "--config-env", "local", "--build-dir"]).arg(folder);
    build
}

fn deploy_template(
    project: &Project,
    cloud: &Cloud,
    stack: &str,
    folder: &Path,
    parameters: &[(String, String)],
) -> Result<Outputs> {
    let mut deploy = cloud.tool(project, "sam");
    // By default the settings are looked for beside the built template.
    deploy.arg("deploy").arg("--config-file").arg(project.root.join("samconfig.toml"));
    deploy.args(["--config-env", "local", "--template-file"]).arg(folder.join("template.yaml"));
    if stack != STACK {
        deploy.args(["--stack-name", stack]);
    }
    if !parameters.is_empty() {
        deploy.arg("--parameter-overrides").args(LOCAL_PARAMETERS);
        deploy.args(parameters.iter().map(|(name, value)| format!("{name}={value}")));
    }
    step_of(project, cloud, "sam-deploy", &mut deploy)?;

    let mut copy = cloud.script(project, "copy_state_machines.py");
    copy.args(["--stack", stack, "--to", &cloud.stepfunctions_endpoint]);
    step_of(project, cloud, "copy-state-machines", &mut copy)?;
    outputs(project, cloud, stack)
}

/// Runs one command with its line as the title and its output in a log.
fn step_of(project: &Project, cloud: &Cloud, name: &str, command: &mut Command) -> Result<()> {
    let line = project.line(command);
    let step = Step::start(format!("$ {line}"));
    let words: Vec<&str> = line.split(' ').take(2).collect();
    project.processes.run(&format!("`{}`", words.join(" ")), command, &cloud.run.log(name))?;
    step.done();
    Ok(())
}

fn outputs(project: &Project, cloud: &Cloud, stack: &str) -> Result<Outputs> {
    let mut describe = cloud.tool(project, "aws");
    describe.args(["cloudformation", "describe-stacks", "--stack-name", stack, "--output", "json"]);
    let answer =
        project.processes.output("`aws cloudformation describe-stacks`", &mut describe, &cloud.run.log("outputs"))?;
    let answer: Value =
        serde_json::from_str(&answer).context("`aws cloudformation describe-stacks` printed no JSON")?;
    let outputs = answer["Stacks"][0]["Outputs"].as_array().cloned().unwrap_or_default();
    let pair =
        |output: &Value| Some((output["OutputKey"].as_str()?.to_owned(), output["OutputValue"].as_str()?.to_owned()));
    Ok(Outputs(outputs.iter().filter_map(pair).collect()))
}
