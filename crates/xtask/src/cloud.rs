//! The local cloud: `MiniStack` and Step Functions on ports of their own, healthy before anything uses them.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::console::Step;
use crate::deploy::{self, Outputs};
use crate::functions;
use crate::process::{Interrupted, Kind, Process};
use crate::program::Programs;
use crate::project::{ACCOUNT, Project, REGION};
use crate::python::Venvs;
use crate::run::{Record, Run};
use crate::settings_api::SettingsApi;

/// The name of the stack; each run has a cloud of its own, so it need not be unique.
pub(crate) const STACK: &str = "fleetflow";
const HEALTH_INTERVAL: Duration = Duration::from_millis(100);
const HEALTH_LIMIT: Duration = Duration::from_mins(1);
const START_ATTEMPTS: usize = 3;

/// How programs, as opposed to people, want the AWS CLI: payloads as they are, times as numbers.
const AWS_CONFIG: &str = "[default]\ncli_binary_format = raw-in-base64-out\ncli_timestamp_format = wire\n";

/// What `up` takes.
#[derive(Args)]
pub(crate) struct UpOptions {
    /// Leave the cloud running in the background; `cargo xtask down` stops it.
    #[arg(long)]
    detach: bool,
    /// Have a proxy count the AWS calls of functions and state machines, and disturb them on request ($`FLEETFLOW_PROXY`:
    /// `/_proxy/calls`, `/_proxy/rules`).
    #[arg(long)]
    proxy: bool,
    /// A parameter of the template (may be repeated).
    #[arg(long = "parameter", value_name = "NAME=VALUE", value_parser = parameter)]
    parameters: Vec<(String, String)>,
    /// Take settings from an API on a port of this machine, which `env` then names, instead of the simulated profile.
    #[arg(long)]
    settings_api: bool,
    #[command(flatten)]
    ports: FixedPorts,
}

/// Ports that shall not be chosen freely.
#[derive(Args, Clone, Copy, Default)]
pub(crate) struct FixedPorts {
    /// Port of the AWS endpoint [default: a free one]
    #[arg(long)]
    port: Option<u16>,
    /// Port of the MQTT broker [default: a free one]
    #[arg(long)]
    mqtt_port: Option<u16>,
}

impl FixedPorts {
    fn any(self) -> bool {
        self.port.is_some() || self.mqtt_port.is_some()
    }
}

fn parameter(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}

/// Ports that were free when they were chosen.
struct Ports {
    gateway: u16,
    stepfunctions: u16,
    mqtt: u16,
    /// Where a proxy listens for what the functions and the state machines call, if there is one.
    proxies: Option<[u16; 2]>,
}

impl Ports {
    fn choose(fixed: FixedPorts, proxy: bool) -> Result<Self> {
        // All are held until all are chosen, so that they differ.
        let gateway = listen(fixed.port)?;
        let stepfunctions = listen(None)?;
        let mqtt = listen(fixed.mqtt_port)?;
        let proxies = [listen(None)?, listen(None)?];
        let port = |listener: &TcpListener| listener.local_addr().map(|address| address.port());
        Ok(Self {
            gateway: port(&gateway)?,
            stepfunctions: port(&stepfunctions)?,
            mqtt: port(&mqtt)?,
            proxies: if proxy { Some([port(&proxies[0])?, port(&proxies[1])?]) } else { None },
        })
    }

    /// Whether somebody else has taken one of them since.
    fn taken(&self) -> bool {
        let all = [self.gateway, self.stepfunctions, self.mqtt].into_iter().chain(self.proxies.into_iter().flatten());
        all.into_iter().any(|port| listen(Some(port)).is_err())
    }

    /// The ports of `MiniStack` and Step Functions as the functions and the state machines have them.
    fn called(&self) -> [u16; 2] {
        self.proxies.unwrap_or([self.gateway, self.stepfunctions])
    }
}

fn listen(port: Option<u16>) -> Result<TcpListener> {
    TcpListener::bind(("127.0.0.1", port.unwrap_or(0))).with_context(|| match port {
        Some(port) => format!(
            "port {port} on 127.0.0.1 cannot be used: end the program that listens there, or leave the port out to \
             have a free one chosen"
        ),
        None => "no free port was found on 127.0.0.1".to_owned(),
    })
}

/// A running local cloud; dropping it stops it.
pub(crate) struct Cloud {
    // Step Functions first: its tasks call MiniStack.
    stepfunctions: Process,
    ministack: Process,
    /// The proxy between them and what calls them, and its URL.
    proxy: Option<(Process, String)>,
    /// URL of everything but Step Functions.
    pub(crate) endpoint: String,
    /// URL of Step Functions.
    pub(crate) stepfunctions_endpoint: String,
    /// Host and port of the MQTT broker.
    pub(crate) mqtt: String,
    /// Certificate that signs the broker's.
    pub(crate) ca: PathBuf,
    /// The Python environments of the cloud and its tools.
    pub(crate) venvs: Venvs,
    /// The folder of this run; it closes after both processes have ended.
    pub(crate) run: OpenRun,
}

/// A run that is closed when it is dropped.
pub(crate) struct OpenRun(Run);

impl std::ops::Deref for OpenRun {
    type Target = Run;

    fn deref(&self) -> &Run {
        &self.0
    }
}

impl Drop for OpenRun {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Cloud {
    /// Starts both parts and waits until they answer.
    pub(crate) fn start(project: &Project, fixed: FixedPorts, detached: bool) -> Result<Self> {
        Self::launch(project, fixed, detached, None)
    }

    /// The same with a proxy that counts the calls of functions and state machines, and disturbs them on request.
    pub(crate) fn start_with_proxy(project: &Project, proxy: &Path, fixed: FixedPorts, detached: bool) -> Result<Self> {
        Self::launch(project, fixed, detached, Some(proxy))
    }

    fn launch(project: &Project, fixed: FixedPorts, detached: bool, proxy: Option<&Path>) -> Result<Self> {
        let venvs = Venvs::ready(project)?;
        let step = Step::start("Local cloud: MiniStack and Step Functions");
        let run = OpenRun(Run::create(project)?);
        let mut attempt = 1;
        let (ports, processes) = loop {
            let ports = Ports::choose(fixed, proxy.is_some())?;
            match start_processes(project, &venvs, &run, &ports, proxy) {
                Ok(processes) => break (ports, processes),
                // Between the choice of a port and its use another program may have taken it.
                Err(error)
                    if attempt < START_ATTEMPTS && !fixed.any() && !error.is::<Interrupted>() && ports.taken() =>
                {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        };
        let cloud = Self {
            stepfunctions: processes.stepfunctions,
            ministack: processes.ministack,
            proxy: processes.proxy.map(|proxy| (proxy, url(ports.called()[0]))),
            endpoint: url(ports.gateway),
            stepfunctions_endpoint: url(ports.stepfunctions),
            mqtt: format!("127.0.0.1:{}", ports.mqtt),
            ca: run.file("ca.pem"),
            venvs,
            run,
        };
        cloud.describe(detached)?;
        step.done();
        Ok(cloud)
    }

    /// Writes `ca.pem`, `cloud.json`, `aws-config` and `env`.
    fn describe(&self, detached: bool) -> Result<()> {
        let ca = get(&format!("{}/_ministack/iot/ca.pem", self.endpoint))
            .context("MiniStack does not hand out the certificate of its MQTT broker")?;
        fs::write(&self.ca, ca)?;
        let record = Record::new(&self.endpoint, &self.stepfunctions_endpoint, &self.mqtt, STACK, detached)?;
        let mut processes = vec![("ministack", &self.ministack), ("stepfunctions", &self.stepfunctions)];
        processes.extend(self.proxy.as_ref().map(|(proxy, _)| ("aws-proxy", proxy)));
        self.run.record(record, &processes)?;
        fs::write(self.run.file("aws-config"), AWS_CONFIG)?;
        let path = format!("export PATH='{}':\"$PATH\"\n", self.venvs.build.folder.join("bin").display());
        let tools = "export SAM_CLI_TELEMETRY=0 SAM_CLI_CHECK_FOR_UPDATES=0\n";
        fs::write(self.run.file("env"), format!("unset AWS_PROFILE AWS_SESSION_TOKEN\n{path}{tools}"))?;
        self.export(self.environment())?;
        // The simulator and the AWS CLI trust the broker, and the CLI needs no pager.
        let ca = self.ca.display().to_string();
        self.export([("SIMULATOR_CA", ca.clone()), ("AWS_CA_BUNDLE", ca), ("AWS_PAGER", String::new())])
    }

    /// Adds variables to `env`.
    fn export(&self, variables: impl IntoIterator<Item = (&'static str, String)>) -> Result<()> {
        let path = self.run.file("env");
        let write = || {
            let mut file = File::options().append(true).open(&path)?;
            variables.into_iter().try_for_each(|(name, value)| writeln!(file, "export {name}='{value}'"))
        };
        write().with_context(|| format!("{} cannot be written", path.display()))
    }

    /// The environment in which a program finds this cloud.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        let mut environment = credentials();
        environment.extend([
            ("AWS_ENDPOINT_URL", self.endpoint.clone()),
            ("AWS_ENDPOINT_URL_SFN", self.stepfunctions_endpoint.clone()),
            ("FLEETFLOW_MQTT_ENDPOINT", self.mqtt.clone()),
            ("FLEETFLOW_CA", self.ca.display().to_string()),
            ("FLEETFLOW_STACK", STACK.to_owned()),
            ("FLEETFLOW_RUN", self.run.folder.display().to_string()),
        ]);
        environment.extend(self.proxy.as_ref().map(|(_, url)| ("FLEETFLOW_PROXY", url.clone())));
        environment
    }

    /// A program of the build environment (`sam`, `aws`) that talks to this cloud.
    pub(crate) fn tool(&self, project: &Project, program: &str) -> Command {
        let mut command = project.tool(&self.venvs.build, program);
        command.envs(self.environment()).env("AWS_CONFIG_FILE", self.run.file("aws-config"));
        command
    }

    /// A Python script of `local/` that talks to this cloud.
    pub(crate) fn script(&self, project: &Project, name: &str) -> Command {
        let mut command = project.tool(&self.venvs.cloud, "python");
        command.envs(self.environment()).arg(project.root.join("local").join(name));
        command
    }

    /// Lets the cloud outlive this program.
    fn leave(self) {
        self.stepfunctions.leave();
        self.ministack.leave();
        if let Some((proxy, _)) = self.proxy {
            proxy.leave();
        }
        std::mem::forget(self.run);
    }
}

fn credentials() -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ACCESS_KEY_ID", ACCOUNT.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
        ("AWS_REGION", REGION.to_owned()),
        ("AWS_DEFAULT_REGION", REGION.to_owned()),
    ]
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// The processes of a running cloud.
struct CloudProcesses {
    stepfunctions: Process,
    ministack: Process,
    proxy: Option<Process>,
}

fn start_processes(
    project: &Project,
    venvs: &Venvs,
    run: &Run,
    ports: &Ports,
    proxy: Option<&Path>,
) -> Result<CloudProcesses> {
    let called = ports.called();
    let proxy = proxy.map(|program| {
        let mut command = project.command(program);
        for (front, behind) in called.into_iter().zip([ports.gateway, ports.stepfunctions]) {
            command.arg("--forward").arg(format!("{front}:{behind}"));
        }
        project.processes.spawn("The proxy", Kind::Service, &mut command, Some(&run.log("aws-proxy")))
    });
    let proxy = proxy.transpose()?;
    let log = run.log("ministack");
    let mut command = ministack(project, venvs, run, ports);
    let ministack = project.processes.spawn("MiniStack", Kind::Service, &mut command, Some(&log))?;
    let log = run.log("stepfunctions");
    let mut command = project.tool(&venvs.cloud, "python");
    command
        .arg(project.root.join("local/stepfunctions_local.py"))
        .arg(ports.stepfunctions.to_string())
        .envs(credentials())
        .env("MOTO_PORT", called[0].to_string())
        .env("GATEWAY_PORT", ports.gateway.to_string())
        .env("MOTO_ACCOUNT_ID", ACCOUNT)
        .env("TMPDIR", run.file("tmp"));
    let stepfunctions = project.processes.spawn("Step Functions", Kind::Service, &mut command, Some(&log))?;
    healthy(project, ports)?;
    Ok(CloudProcesses { stepfunctions, ministack, proxy })
}

/// The variable that bounds how many functions run at once, as AWS does it with an account.
const LAMBDA_CONCURRENCY: &str = "FLEETFLOW_LAMBDA_CONCURRENCY";

fn ministack(project: &Project, venvs: &Venvs, run: &Run, ports: &Ports) -> Command {
    let mut command = project.tool(&venvs.cloud, "python");
    command
        .arg(project.root.join("local/ministack_local.py"))
        .envs(credentials())
        .env("GATEWAY_PORT", ports.gateway.to_string())
        .env("BIND_HOST", "127.0.0.1")
        .env("IOT_MTLS_ENABLED", "1")
        .env("IOT_MTLS_PORT", ports.mqtt.to_string())
        .env("MINISTACK_REGION", REGION)
        // Policies are enforced, of IAM and of the broker.
        .env("AUTH", "true")
        // Lambda processes inherit these; without them they would call AWS itself.
        .env("AWS_ENDPOINT_URL", url(ports.called()[0]))
        .env("AWS_ENDPOINT_URL_SFN", url(ports.called()[1]))
        .env("AWS_LAMBDA_LOG_FORMAT", "JSON")
        // How many functions run at once in all; the emulator would take it from the machine's memory. 0: any number.
        .env("LAMBDA_ACCOUNT_CONCURRENCY", std::env::var(LAMBDA_CONCURRENCY).unwrap_or_else(|_| "0".to_owned()))
        // Each running function holds a thread, and its own calls need others.
        .env("MINISTACK_WORKER_THREADS", "256")
        .env("TMPDIR", run.file("tmp"))
        .env("STATE_DIR", run.file("tmp/state"))
        .env("S3_DATA_DIR", run.file("tmp/s3"))
        // Who counts calls counts what AWS meters besides: messages, rules, queues and invocations.
        .envs(ports.proxies.map(|_| ("METERING", run.log("metering"))));
    command
}

fn healthy(project: &Project, ports: &Ports) -> Result<()> {
    let endpoint = url(ports.gateway);
    project.processes.wait_for("the start of MiniStack", HEALTH_INTERVAL, HEALTH_LIMIT, || {
        let Some(health) = get(&format!("{endpoint}/_ministack/health")) else { return Ok(None) };
        let health: serde_json::Value = serde_json::from_str(&health).unwrap_or_default();
        match health["iot_mtls"].as_str() {
            Some("listening") => Ok(Some(())),
            Some("degraded" | "disabled") => {
                bail!("MiniStack's MQTT broker does not listen on port {}: is it taken?", ports.mqtt)
            }
            _ => Ok(None),
        }
    })?;
    let endpoint = url(ports.stepfunctions);
    project.processes.wait_for("the start of Step Functions", HEALTH_INTERVAL, HEALTH_LIMIT, || {
        Ok(get(&format!("{endpoint}/moto-api/")).map(drop))
    })
}

/// The body of a successful answer.
fn get(url: &str) -> Option<String> {
    ureq::get(url)
        .config()
        .timeout_global(Some(Duration::from_secs(5)))
        .build()
        .call()
        .ok()?
        .body_mut()
        .read_to_string()
        .ok()
}

/// Starts the cloud, deploys to it and stays, or leaves it running.
pub(crate) fn up(project: &Project, options: &UpOptions) -> Result<()> {
    let programs = Programs::built(project)?;
    let proxy = if options.proxy { Some(programs.path("aws-proxy")?) } else { None };
    let cloud = Cloud::launch(project, options.ports, options.detach, proxy)?;
    let settings_api = options.settings_api.then(SettingsApi::reserve).transpose()?;
    let mut parameters = options.parameters.clone();
    if let Some(api) = &settings_api {
        parameters.extend(api.parameters(project, &cloud)?);
        cloud.export(api.environment())?;
    }
    let outputs = deploy::deploy(project, &cloud, &programs, &parameters)?;
    functions::write_environment(project, &cloud)?;
    cloud.run.make_current()?;
    println!("{}", instructions(&cloud, &outputs)?);
    if let Some(api) = &settings_api {
        println!("{}", settings_api_instructions(api));
    }
    if options.detach {
        println!("\nIt runs in the background; `cargo xtask down` stops it.");
        cloud.leave();
        return Ok(());
    }
    println!("\nCtrl-C stops it.");
    stay(project)
}

/// Stays until Ctrl-C, which is then the wanted end.
pub(crate) fn stay(project: &Project) -> Result<()> {
    let reason = project.processes.stay();
    if reason.is::<Interrupted>() {
        eprintln!("\nStopping the local cloud.");
        return Ok(());
    }
    Err(reason)
}

fn instructions(cloud: &Cloud, outputs: &Outputs) -> Result<String> {
    let Cloud { endpoint, stepfunctions_endpoint, mqtt, ca, run, .. } = cloud;
    let (ca, folder) = (ca.display(), run.folder.display());
    let [policy, group, kind] = ["DevicePolicyName", "ThingGroupName", "ThingTypeName"].map(|name| outputs.get(name));
    let (policy, group, kind) = (policy?, group?, kind?);
    let (arn, bucket) = (outputs.get("ThingGroupArn")?, outputs.get("FirmwareBucketName")?);
    Ok(format!(
        "\nThe local cloud is up, with the stack {STACK}.
  AWS endpoint    {endpoint}
  Step Functions  {stepfunctions_endpoint}
  MQTT broker     {mqtt} (certificate authority: {ca})
  logs            {folder}/logs

In another terminal, make `aws`, `sam`, `cargo lambda` and the simulator find it:
  source .fleetflow/current/env
Devices of the stack's thing group, with its policy:
  cargo run --bin device-simulator -- provision --count 20 --prefix sim --certificates .fleetflow/current/devices \\
    --policy {policy} --thing-group {group} --thing-type {kind}
  cargo run --bin device-simulator -- run --certificates .fleetflow/current/devices --endpoint {mqtt} --ca {ca}
Update them:
  aws s3 cp FIRMWARE-FILE s3://{bucket}/firmware/2.0.0
  sam remote invoke CreateJobFunction --stack-name {STACK} --event '{{\"firmwareVersion\": \"2.0.0\", \
\"upgradeTrigger\": \"manual\", \"targetArn\": \"{arn}\"}}'
Work on a function, here create-job (the others are in crates/fleet/src/bin), in two terminals; upgrade.json is the event above:
  source .fleetflow/current/env && cargo lambda watch --env-file .fleetflow/current/functions.env
  source .fleetflow/current/env && cargo lambda invoke create-job --data-file upgrade.json"
    ))
}

fn settings_api_instructions(api: &SettingsApi) -> String {
    format!(
        "The settings API is expected on {}; the simulator has one:
  SETTINGS_API_KEY=$FLEETFLOW_SETTINGS_API_KEY cargo run --bin device-simulator -- settings-api \
--listen $FLEETFLOW_SETTINGS_API",
        api.address
    )
}
