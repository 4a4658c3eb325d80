//! The configuration push: a fleet comes online and gets its settings, and comes back and needs none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::faults::{self, Fault, Faults};
use super::{Demo, DemoOptions, POLL_INTERVAL, counts};
use crate::cloud::{Cloud, FixedPorts};
use crate::deploy::{self, Outputs};
use crate::process::{GRACE, Kind, Process};
use crate::program::Programs;
use crate::project::Project;
use crate::settings_api::SettingsApi;

/// Nobody wants to watch the deadlines of the field pass.
const PARAMETERS: &[(&str, &str)] = &[("SettingTimeoutSeconds", "5")];
const ANSWER_DELAY: &str = "1s";
const START_INTERVAL: Duration = Duration::from_millis(100);
const START_LIMIT: Duration = Duration::from_secs(10);
const FAULTS: Faults = Faults { failing: &["mute", "refuse", "wrong-operation"], may_fail: &[] };
/// Faults that a push survives.
const HARMLESS: [&str; 4] = ["duplicate", "delay", "offline", "disconnect"];
const RUNNING: &str = "RUNNING";
const UNCHANGED: &str = "UNCHANGED";

/// An execution of the state machine.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Execution {
    status: String,
    input: String,
    output: Option<String>,
    error: Option<String>,
    cause: Option<String>,
    start_date: f64,
    stop_date: Option<f64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    thing_name: String,
    connected_at: i64,
}

#[derive(Deserialize)]
struct Output {
    status: String,
    #[serde(default)]
    settings: BTreeMap<String, Value>,
    seconds: f64,
}

/// An execution that has ended.
struct Push {
    connected_at: i64,
    settings: BTreeMap<String, Value>,
    seconds: Option<f64>,
    succeeded: bool,
    outcome: String,
}

impl Push {
    /// The device, and what became of the push.
    fn of(execution: &Execution) -> Result<(String, Self)> {
        let Input { thing_name, connected_at } = read(&execution.input)?;
        let push = match &execution.output {
            Some(output) => {
                let Output { status, settings, seconds } = read(output)?;
                Self { connected_at, settings, seconds: Some(seconds), succeeded: true, outcome: status }
            }
            None => Self {
                connected_at,
                settings: BTreeMap::new(),
                seconds: execution.stop_date.map(|end| end - execution.start_date),
                succeeded: false,
                outcome: execution.failure(),
            },
        };
        Ok((thing_name, push))
    }

    /// The settings as the table shows them.
    fn settings(&self) -> String {
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let settings: Vec<_> = self.settings.iter().map(|(name, value)| format!("{name} {}", plain(value))).collect();
        if settings.is_empty() { "-".to_owned() } else { settings.join(", ") }
    }
}

impl Execution {
    /// Error name and cause.
    fn failure(&self) -> String {
        let error = self.error.as_deref().unwrap_or(&self.status);
        match self.cause.as_deref() {
            Some(cause) if !cause.is_empty() => format!("{error}: {cause}"),
            _ => error.to_owned(),
        }
    }
}

fn read<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T> {
    serde_json::from_str(text)
        .with_context(|| format!("an execution has another input or output than expected: {text}"))
}

/// The last push of each device.
type Pushes = BTreeMap<String, Push>;

/// The last session's push counts, whatever the order of the executions.
fn last_pushes(executions: &[Execution], since: i64) -> Result<Pushes> {
    let mut pushes = Pushes::new();
    for execution in executions {
        let (thing, push) = Push::of(execution)?;
        if push.connected_at >= since && pushes.get(&thing).is_none_or(|other| other.connected_at < push.connected_at) {
            pushes.insert(thing, push);
        }
    }
    Ok(pushes)
}

/// Runs the whole demonstration.
pub(super) fn demo(project: &Project, options: &DemoOptions) -> Result<()> {
    let faults = faults::parse(options.fail.as_deref())?;
    check(&faults)?;
    let expected = FAULTS.expected_failures(&faults, options.devices)?;
    let programs = Programs::built(project)?;
    let simulator = programs.path("device-simulator")?.to_owned();
    let cloud = Cloud::start(project, FixedPorts::default(), false)?;
    let api = SettingsApi::reserve()?;
    // It serves until the end of the demonstration.
    let _server = serve(project, &cloud, &simulator, &api)?;
    let outputs = deploy(project, &cloud, &programs, &api)?;
    let demo = Demo { project, cloud: &cloud, outputs, simulator, options };
    demo.provision()?;
    let pushes = demo.first_act()?;
    let failed = pushes.values().filter(|push| !push.succeeded).count();
    let verdict =
        faults::verdict(failed, &expected, "did not get their settings").and_then(|()| demo.second_act(&pushes));
    println!("Logs: {}", cloud.run.folder.join("logs").display());
    demo.keep()?;
    verdict
}

/// Refuses faults that have no effect here.
fn check(faults: &[Fault<'_>]) -> Result<()> {
    let known: Vec<&str> = FAULTS.failing.iter().chain(&HARMLESS).copied().collect();
    if let Some(other) = faults.iter().find(|fault| !known.contains(&fault.kind)) {
        bail!(
            "`{}` of --fail is no fault of a configuration push, but of a firmware upgrade if any: expected {}",
            other.kind,
            known.join(", ")
        );
    }
    Ok(())
}

/// Starts the settings API and waits until it answers.
fn serve(project: &Project, cloud: &Cloud, simulator: &Path, api: &SettingsApi) -> Result<Process> {
    let mut command = project.command(simulator);
    command.args(["settings-api", "--listen", &api.address]).env("SETTINGS_API_KEY", &api.key);
    eprintln!("$ {}", project.line(&command));
    let log = cloud.run.log("settings-api");
    let server = project.processes.spawn("The settings API", Kind::Service, &mut command, Some(&log))?;
    cloud.run.add("settings-api", &server)?;
    project.processes.wait_for("the start of the settings API", START_INTERVAL, START_LIMIT, || {
        Ok(TcpStream::connect(&api.address).ok().map(drop))
    })?;
    Ok(server)
}

fn deploy(project: &Project, cloud: &Cloud, programs: &Programs, api: &SettingsApi) -> Result<Outputs> {
    let mut parameters = api.parameters(project, cloud)?;
    parameters.extend(deploy::parameters(PARAMETERS));
    deploy::deploy(project, cloud, programs, &parameters)
}

impl Demo<'_> {
    /// The fleet comes online; each device gets its settings.
    fn first_act(&self) -> Result<Pushes> {
        let pushes = self.session("simulator", self.options.fail.as_deref(), &BTreeSet::new())?;
        self.print_pushes(&pushes)?;
        Ok(pushes)
    }

    /// The same devices come back, now without faults: whoever has its settings gets no command.
    fn second_act(&self, first: &Pushes) -> Result<()> {
        println!("\nThe same devices again, in new sessions:");
        let known = self.pushes()?.into_iter().map(|push| push.name).collect();
        let log = "simulator-again";
        let pushes = self.session(log, None, &known)?;
        let applied = applied(&self.cloud.run.log(log))?;
        let again = |succeeded| {
            let pushes = pushes
                .iter()
                .filter(move |(thing, _)| first.get(*thing).is_some_and(|push| push.succeeded == succeeded));
            pushes.map(|(_, push)| push).collect::<Vec<_>>()
        };
        let (had_settings, others) = (again(true), again(false));
        let unchanged = had_settings.iter().filter(|push| push.outcome == UNCHANGED).count();
        println!("\n{unchanged} of {} unchanged when they came back", had_settings.len());
        if !others.is_empty() {
            let healed = others.iter().filter(|push| push.succeeded).count();
            println!("{healed} of {} others have their settings now", others.len());
        }
        if let Some(push) = had_settings.iter().find(|push| push.outcome != UNCHANGED) {
            bail!("a device that had its settings was not {UNCHANGED} when it came back, but {}", push.outcome);
        }
        let due = others.iter().map(|push| push.settings.len()).sum::<usize>();
        if applied > due {
            bail!("the devices applied {applied} settings when they came back, but needed {due}");
        }
        Ok(())
    }

    /// Runs the fleet until each of its devices has had a push, and returns these.
    fn session(&self, log: &str, faults: Option<&str>, known: &BTreeSet<String>) -> Result<Pushes> {
        let since = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let mut command = self.fleet_command(["--answer-delay", ANSWER_DELAY]);
        if let Some(faults) = faults {
            command.args(["--fail", faults]);
        }
        let fleet = self.start_fleet(&mut command, Some(&self.cloud.run.log(log)))?;
        let pushes = self.follow_pushes(&fleet, known, since)?;
        fleet.interrupt(GRACE);
        Ok(pushes)
    }

    /// Waits until each device has a push that began after `since`, and none is under way. Executions that are known
    /// are of earlier sessions.
    fn follow_pushes(&self, fleet: &Process, known: &BTreeSet<String>, since: i64) -> Result<Pushes> {
        let devices = usize::try_from(self.options.devices)?;
        let mut shown = String::new();
        self.project.processes.wait_for("the end of all pushes", POLL_INTERVAL, self.time_limit(), || {
            let pushes: Vec<Listed> =
                self.pushes()?.into_iter().filter(|listed| !known.contains(&listed.name)).collect();
            let counts = counts(pushes.iter().map(|listed| listed.status.as_str()));
            let counts = counts.unwrap_or_else(|| "no executions yet".to_owned());
            if counts != shown {
                eprintln!("  {counts}");
                shown = counts;
            }
            if let Some(status) = fleet.status() {
                return Err(fleet.ended_early(status));
            }
            if pushes.len() < devices || pushes.iter().any(|listed| listed.status == RUNNING) {
                return Ok(None);
            }
            let executions = self.descriptions()?;
            // One may have begun since.
            if executions.iter().any(|execution| execution.status == RUNNING) {
                return Ok(None);
            }
            let pushes = last_pushes(&executions, since)?;
            Ok((pushes.len() >= devices).then_some(pushes))
        })
    }

    /// All executions, by name and status.
    fn pushes(&self) -> Result<Vec<Listed>> {
        #[derive(Deserialize)]
        struct Answer {
            executions: Vec<Listed>,
        }
        // The command follows the pages itself.
        let arguments = ["stepfunctions", "list-executions", "--state-machine-arn", self.outputs.get("ConfigPushArn")?];
        Ok(self.aws::<Answer>(&arguments)?.executions)
    }

    /// All executions, with input and output.
    fn descriptions(&self) -> Result<Vec<Execution>> {
        let mut command = self.cloud.script(self.project, "list_executions.py");
        command.args(["--state-machine", self.outputs.get("ConfigPushArn")?]);
        self.answer("`list_executions.py`", &mut command, "describe-executions")
    }

    /// Prints what became of each device.
    fn print_pushes(&self, pushes: &Pushes) -> Result<()> {
        let profiles = self.profiles()?;
        println!("\n{:<14} {:<18} {:<18} {:>8}  outcome", "device", "profile", "settings", "seconds");
        for (thing, push) in pushes {
            let profile = profiles.get(thing).map_or("-", String::as_str);
            let seconds = push.seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1}"));
            println!("{thing:<14} {profile:<18} {:<18} {seconds:>8}  {}", push.settings(), push.outcome);
        }
        let done = pushes.values().filter(|push| push.succeeded).count();
        println!("\n{done} of {} devices have their settings", pushes.len());
        Ok(())
    }

    /// Whose settings each device takes.
    fn profiles(&self) -> Result<BTreeMap<String, String>> {
        #[derive(Deserialize)]
        struct Answer {
            things: Vec<Thing>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Thing {
            thing_name: String,
            #[serde(default)]
            attributes: BTreeMap<String, String>,
        }
        let things = self.aws::<Answer>(&["iot", "list-things"])?.things.into_iter();
        Ok(things.filter_map(|mut thing| Some((thing.thing_name, thing.attributes.remove("externalId")?))).collect())
    }
}

/// An execution in the list of all.
#[derive(Deserialize)]
struct Listed {
    name: String,
    status: String,
}

/// How many settings the devices have applied, by the simulator's closing line.
fn applied(log: &Path) -> Result<usize> {
    let text = fs::read_to_string(log).with_context(|| format!("{} cannot be read", log.display()))?;
    let number = text.lines().rev().find_map(|line| {
        let (before, _) = line.split_once(" settings applied")?;
        before.rsplit(' ').next()?.parse().ok()
    });
    number.with_context(|| format!("{} does not say how many settings were applied", log.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn execution(connected_at: i64, end: &str) -> Execution {
        let input = format!(r#"{{"thingName":"sim-0001","connectedAt":{connected_at}}}"#);
        let mut execution: Value = serde_json::from_str(end).unwrap();
        execution["input"] = input.into();
        execution["startDate"] = 100.0.into();
        execution["stopDate"] = 102.5.into();
        serde_json::from_value(execution).unwrap()
    }

    const SUCCEEDED: &str = r#"{"status":"SUCCEEDED","output":
        "{\"thingName\":\"sim-0001\",\"status\":\"SUCCESS\",\"settings\":{\"MODE\":\"eco\",\"SET_TEMP\":21.5},\"seconds\":1.4}"}"#;
    const FAILED: &str = r#"{"status":"FAILED","error":"DeviceTimedOut","cause":"sim-0001 did not answer"}"#;

    #[test]
    fn a_push_shows_its_settings_or_its_error() {
        let (thing, push) = Push::of(&execution(1, SUCCEEDED)).unwrap();
        assert_eq!((thing.as_str(), push.outcome.as_str(), push.seconds), ("sim-0001", "SUCCESS", Some(1.4)));
        assert_eq!(push.settings(), "MODE eco, SET_TEMP 21.5");
        let (_, push) = Push::of(&execution(1, FAILED)).unwrap();
        assert_eq!(push.outcome, "DeviceTimedOut: sim-0001 did not answer");
        assert_eq!((push.succeeded, push.seconds, push.settings()), (false, Some(2.5), "-".to_owned()));
        let (_, push) = Push::of(&execution(1, r#"{"status":"TIMED_OUT"}"#)).unwrap();
        assert_eq!(push.outcome, "TIMED_OUT");
    }

    #[test]
    fn the_last_session_counts() {
        let executions = [execution(2, SUCCEEDED), execution(1, FAILED)];
        assert!(last_pushes(&executions, 0).unwrap()["sim-0001"].succeeded);
        assert!(last_pushes(&executions, 3).unwrap().is_empty());
    }

    #[test]
    fn faults_of_upgrades_are_refused() {
        let check = |faults| check(&faults::parse(Some(faults)).unwrap());
        assert!(check("mute=1,refuse=1,wrong-operation=1,duplicate=1,delay=1,offline=1,disconnect=10%").is_ok());
        let error = check("mute=1,boot=2").unwrap_err().to_string();
        assert!(
            error.starts_with("`boot` of --fail")
                && error.ends_with("expected mute, refuse, wrong-operation, duplicate, delay, offline, disconnect"),
            "{error}"
        );
    }

    #[test]
    fn applied_settings_are_read_from_the_closing_line() {
        let log = std::env::temp_dir().join(format!("xtask-applied-{}", std::process::id()));
        fs::write(
            &log,
            "sim-0001: ready\n5 devices: 0 upgrades succeeded, 0 failed, 0 cancelled, 12 settings applied\n",
        )
        .unwrap();
        assert_eq!(applied(&log).unwrap(), 12);
        fs::write(&log, "sim-0001: ready\n").unwrap();
        assert!(applied(&log).unwrap_err().to_string().ends_with("how many settings were applied"));
        fs::remove_file(log).unwrap();
    }
}
