//! `cargo xtask test`: everything that must pass, in the order of how quickly it tells.

mod chaos;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::cloud::{Cloud, FixedPorts, STACK};
use crate::console::Step;
use crate::deploy;
use crate::functions;
use crate::process::{Kind, Process};
use crate::program::Programs;
use crate::project::Project;
use crate::python::{self, Venvs};
use crate::settings_api::SettingsApi;

/// How long a step may take in the end-to-end tests: longer than a queue waits before it delivers again what a killed
/// function had begun (a minute).
const STEP_TIMEOUT_SECONDS: &str = "90";

/// Template parameters of the end-to-end tests: deadlines of seconds, where AWS gets minutes and hours. Three attempts (of which each
/// waits five times as long as the one before) take longer than a queue waits before it delivers again what a killed function had begun.
const TEST_PARAMETERS: &[(&str, &str)] = &[
    ("AcknowledgeTimeoutSeconds", "5"),
    ("TransferTimeoutSeconds", STEP_TIMEOUT_SECONDS),
    ("InstallTimeoutSeconds", STEP_TIMEOUT_SECONDS),
    ("RebootTimeoutSeconds", STEP_TIMEOUT_SECONDS),
    ("SettingTimeoutSeconds", "5"),
    ("ParkingSeconds", "45"),
    ("WorkerTimeoutSeconds", "75"),
    ("WorkerHeartbeatSeconds", "45"),
    ("WorkerLeaseSeconds", "15"),
    ("MaxResultBytes", "2097152"),
    ("SettlingSeconds", "20"),
    ("TelemetryWindowSeconds", "1"),
    ("TemperatureCoolDownSeconds", "12"),
    ("RemediationEffectSeconds", "6"),
];

/// End-to-end tests mostly wait: more at the same time than there are processors.
const END_TO_END_AT_ONCE: &str = "4";

/// What the names of tests with two stacks contain. Both stacks hear all devices, so these tests come last.
const SECOND_STACK_TESTS: &str = "second_stack";

/// A slice of made-up faults mostly waits: all workflows at the same time.
const ALL_WORKFLOWS: &str = "5";

/// What `test` takes.
#[derive(Args)]
pub(crate) struct TestOptions {
    /// Leave out the tests that need the local cloud.
    #[arg(long)]
    skip_end_to_end: bool,
    /// Run so many made-up cases of faults for each workflow, and nothing else; a report of each is in target/chaos/.
    #[arg(long, value_name = "CASES", conflicts_with = "skip_end_to_end")]
    chaos: Option<u32>,
    /// What the cases of faults are made up from [default: 7]
    #[arg(long)]
    seed: Option<u64>,
    /// With --chaos, run only the case of that number.
    #[arg(long, value_name = "NUMBER", requires = "chaos")]
    case: Option<u32>,
    /// Run only tests whose name contains this; the checks before the tests are left out.
    filter: Option<String>,
}

/// The steps that have passed, for the summary.
#[derive(Default)]
struct Passed(Vec<(String, Duration)>);

impl Passed {
    fn step(&mut self, title: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let step = Step::title(title);
        work()?;
        self.0.push((title.to_owned(), step.done()));
        Ok(())
    }

    fn command(&mut self, project: &Project, title: &str, mut command: Command) -> Result<()> {
        self.step(title, || {
            eprintln!("$ {}", project.line(&command));
            project.processes.show(title, &mut command)
        })
    }

    fn summary(&self) {
        eprintln!();
        for (title, time) in &self.0 {
            eprintln!("passed  {title}  {:.1} s", time.as_secs_f32());
        }
    }
}

/// Runs all steps and stops at the first that fails.
pub(crate) fn test(project: &Project, options: &TestOptions) -> Result<()> {
    let mut passed = Passed::default();
    let outcome = steps(project, options, &mut passed);
    passed.summary();
    outcome?;
    println!("{} passed, 0 failed", passed.0.len());
    Ok(())
}

fn steps(project: &Project, options: &TestOptions, passed: &mut Passed) -> Result<()> {
    if let Some(cases) = options.chaos {
        return chaos::chaos(project, options, cases, passed);
    }
    if options.filter.is_none() {
        passed.command(project, "Format", cargo(project, &["fmt", "--all", "--", "--check"]))?;
        let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        passed.command(project, "Lints", cargo(project, &clippy))?;
        definitions(project, passed)?;
    }
    let mut unit = cargo(project, &["test", "--workspace", "--tests"]);
    if let Some(filter) = &options.filter {
        unit.args(["--", filter]);
    }
    passed.command(project, "Unit tests", unit)?;
    if options.skip_end_to_end {
        return Ok(());
    }
    end_to_end(project, options, passed)
}

fn cargo(project: &Project, arguments: &[&str]) -> Command {
    let mut command = project.command("cargo");
    command.args(arguments);
    command
}

fn definitions(project: &Project, passed: &mut Passed) -> Result<()> {
    let venvs = Venvs::ready(project)?;
    let region = ("AWS_DEFAULT_REGION", crate::project::REGION);
    let mut validate = project.tool(&venvs.build, "sam");
    validate.args(["validate", "--lint"]).env(region.0, region.1);
    passed.command(project, "Template: sam validate", validate)?;
    let mut lint = project.tool(&venvs.build, "cfn-lint");
    lint.args(["--template", "template.yaml"]);
    passed.command(project, "Template: cfn-lint", lint)?;
    let checks = python::checks(project)?;
    let mut security = project.tool(&checks, "checkov");
    security.args(["--config-file", "local/checkov.yaml"]);
    passed.command(project, "Template: checkov", security)?;
    let mut policies = project.tool(&checks, "python");
    policies.arg("local/check_policies.py");
    passed.command(project, "Template: IAM policies", policies)?;
    let mut check = project.tool(&venvs.cloud, "python");
    check.arg("local/check_definitions.py");
    passed.command(project, "State machines", check)
}

fn end_to_end(project: &Project, options: &TestOptions, passed: &mut Passed) -> Result<()> {
    let stack = Stack::deployed(project, TEST_PARAMETERS, passed)?;
    let Stack { cloud, settings_api, .. } = &stack;
    let release = match options.filter {
        None => Some(Release::start(project, stack.cloud.run.file("release"))?),
        Some(_) => None,
    };
    // The same targets as in the step before: with others, features would unify otherwise and the SDK compile twice.
    let mut tests = cargo(project, &["test", "--workspace", "--tests", "--", "--ignored"]);
    tests.args(["--skip", chaos::NAMES, "--skip", SECOND_STACK_TESTS]);
    tests.args(["--test-threads", END_TO_END_AT_ONCE]);
    tests.args(&options.filter).envs(cloud.environment()).envs(settings_api.environment());
    tests.env("FLEETFLOW_STEP_TIMEOUT_SECONDS", STEP_TIMEOUT_SECONDS);
    tests.envs(options.seed.map(|seed| ("FLEETFLOW_SEED", seed.to_string())));
    passed.command(project, "End-to-end tests", tests)?;
    let slice = chaos::tests(project, options, cloud, settings_api, ALL_WORKFLOWS);
    passed.command(project, "Made-up faults", slice)?;
    if options.filter.as_ref().is_none_or(|filter| filter.contains(SECOND_STACK_TESTS)) {
        second_stack(project, &stack, passed)?;
    }
    if let Some(release) = release {
        passed.step("Release build, deployed and invoked", || release.check(project, &stack))?;
    }
    stack.stop(passed)
}

fn second_stack(project: &Project, stack: &Stack, passed: &mut Passed) -> Result<()> {
    passed.step("Second stack", || deploy::deploy_second(project, &stack.cloud, &stack.parameters).map(drop))?;
    let mut tests = cargo(project, &["test", "--workspace", "--tests", "--", "--ignored", SECOND_STACK_TESTS]);
    tests.envs(stack.cloud.environment()).env("FLEETFLOW_SECOND_STACK", deploy::SECOND_STACK);
    tests.env("FLEETFLOW_STEP_TIMEOUT_SECONDS", STEP_TIMEOUT_SECONDS);
    passed.command(project, "Tests with two stacks", tests)
}

/// A local cloud with its proxy and the deployed stack. The tests are its settings API.
struct Stack {
    cloud: Cloud,
    settings_api: SettingsApi,
    programs: Programs,
    parameters: Vec<(String, String)>,
}

impl Stack {
    fn deployed(project: &Project, parameters: &[(&str, &str)], passed: &mut Passed) -> Result<Self> {
        let mut stack = None;
        passed.step("Local cloud", || {
            let programs = Programs::built(project)?;
            let settings_api = SettingsApi::reserve()?;
            let cloud = Cloud::start_with_proxy(project, programs.path("aws-proxy")?, FixedPorts::default(), false)?;
            let mut parameters = deploy::parameters(parameters);
            parameters.extend(settings_api.parameters(project, &cloud)?);
            deploy::deploy(project, &cloud, &programs, &parameters)?;
            functions::write_environment(project, &cloud)?;
            stack = Some(Self { cloud, settings_api, programs, parameters });
            Ok(())
        })?;
        stack.context("the local cloud has not started")
    }

    fn stop(self, passed: &mut Passed) -> Result<()> {
        passed.step("Stop the local cloud", || {
            drop(self.cloud);
            Ok(())
        })
    }
}

/// `sam build` of a function as AWS gets it: a release build by cargo-lambda. It compiles for minutes, so it does that while the
/// end-to-end tests mostly wait, and lets them go first.
struct Release {
    build: Process,
    folder: PathBuf,
    /// Other commands build no functions for release until this one is.
    lock: File,
}

impl Release {
    const FUNCTION: &str = "CreateJobFunction";

    fn start(project: &Project, folder: PathBuf) -> Result<Self> {
        let lock = project.lock_releases()?;
        let sam = deploy::sam_build(project, &Venvs::ready(project)?, &folder);
        let mut command = project.command("nice");
        command.args(["-n", "19"]).arg(sam.get_program()).args(sam.get_args()).arg(Self::FUNCTION);
        command.envs(sam.get_envs().filter_map(|(name, value)| Some((name, value?))));
        eprintln!("$ {}", project.line(&sam));
        let build =
            project.processes.spawn("`sam build`", Kind::Task, &mut command, Some(&folder.with_extension("log")))?;
        Ok(Self { build, folder, lock })
    }

    /// How large the function's deployed code is, in bytes.
    fn code_size(project: &Project, stack: &Stack) -> Result<u64> {
        let functions = functions::list(project, &stack.cloud)?;
        let function =
            functions.iter().find(|function| function.name.starts_with(&format!("{STACK}-{}-", Self::FUNCTION)));
        Ok(function.with_context(|| format!("{} is not deployed", Self::FUNCTION))?.code_size)
    }

    /// Waits for the build, deploys the function in the place of its debug build, and invokes it.
    fn check(self, project: &Project, stack: &Stack) -> Result<()> {
        let step = Step::start("Wait for `sam build`");
        self.build.expect_success(project.processes.finish(&self.build)?)?;
        drop(self.lock);
        step.done();
        let before = Self::code_size(project, stack)?;
        deploy::deploy_with(project, &stack.cloud, &stack.programs, Some(&self.folder), &stack.parameters)?;
        ensure!(Self::code_size(project, stack)? != before, "the debug build of {} is still deployed", Self::FUNCTION);
        let event = r#"{"firmwareVersion": "2.0.0", "upgradeTrigger": "test", "targetArn": "nothing"}"#;
        let mut invoke = stack.cloud.tool(project, "sam");
        invoke.args(["remote", "invoke", Self::FUNCTION, "--stack-name", STACK, "--event", event]);
        let answer = stack.cloud.run.log("release-invoke");
        // It is an error of the function, which is how we know that it has read the payload.
        let process = project.processes.spawn("`sam remote invoke`", Kind::Task, &mut invoke, Some(&answer))?;
        project.processes.finish(&process)?;
        let answer = fs::read_to_string(&answer)?;
        ensure!(answer.contains("InvalidInput") && answer.contains("targetArn"), "the function answered: {answer}");
        Ok(())
    }
}
