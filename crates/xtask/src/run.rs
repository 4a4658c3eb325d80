//! Runs of the local cloud: one folder each, with a record by which `down` finds and stops what still runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::process::{GRACE, Process, started};
use crate::project::Project;

/// The record while the cloud runs.
const RECORD: &str = "cloud.json";
/// The same record afterwards.
const STOPPED: &str = "stopped.json";
/// What only a running cloud needs, and what is large: copies of the Lambda binaries, and of the checkout.
const TEMPORARY: [&str; 5] = ["tmp", "build", "build.toml", "release", "tests/watch/checkout"];
const RUNS_KEPT: usize = 10;
const POLL: Duration = Duration::from_millis(50);

/// A process, named beyond doubt: ids are given again, but not with the same start time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    started: String,
}

impl Identity {
    fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, started: started(pid)? })
    }

    fn lives(&self) -> bool {
        started(self.pid).as_ref() == Some(&self.started)
    }
}

/// `cloud.json`: where the parts of a running cloud are.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// URL of everything but Step Functions.
    pub(crate) endpoint: String,
    /// URL of Step Functions.
    pub(crate) stepfunctions: String,
    /// Host and port of the MQTT broker (TLS).
    pub(crate) mqtt: String,
    pub(crate) region: String,
    pub(crate) stack: String,
    /// Whether the cloud shall outlive the command that started it.
    pub(crate) detached: bool,
    /// The command that started it.
    owner: Identity,
    processes: BTreeMap<String, Identity>,
}

/// A run and its folder.
pub(crate) struct Run {
    pub(crate) folder: PathBuf,
}

impl Run {
    /// Makes a new folder, after cleaning up behind commands that were killed.
    pub(crate) fn create(project: &Project) -> Result<Self> {
        clean_up(project)?;
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
        let folder = runs(project).join(format!("{seconds}-{}", std::process::id()));
        for part in ["logs", "tmp"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).with_context(|| format!("{} cannot be created", part.display()))?;
        }
        Ok(Self { folder })
    }

    /// A file of the run.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A log of the run.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    /// `.fleetflow/current`, two levels above the run's folder.
    fn current(&self) -> Option<PathBuf> {
        Some(self.folder.ancestors().nth(2)?.join("current"))
    }

    /// Makes `.fleetflow/current` lead to this run.
    pub(crate) fn make_current(&self) -> Result<()> {
        let link = self.current().context("the run's folder is in no other")?;
        let fresh = link.with_file_name(format!("current-{}", std::process::id()));
        symlink(&self.folder, &fresh)
            .and_then(|()| fs::rename(&fresh, &link))
            .with_context(|| format!("the link {} cannot be made", link.display()))
    }

    /// Writes the record of a cloud that this process has started.
    pub(crate) fn record(&self, mut record: Record, processes: &[(&str, &Process)]) -> Result<()> {
        record.processes = processes
            .iter()
            .filter_map(|(name, process)| Some(((*name).to_owned(), Identity::of(process.id())?)))
            .collect();
        self.write(&record)
    }

    /// Adds a process to the record.
    pub(crate) fn add(&self, name: &str, process: &Process) -> Result<()> {
        let mut record = self.read().context("the record of the running cloud is missing")?;
        if let Some(identity) = Identity::of(process.id()) {
            record.processes.insert(name.to_owned(), identity);
        }
        self.write(&record)
    }

    fn write(&self, record: &Record) -> Result<()> {
        let (fresh, path) = (self.file("cloud.json.new"), self.file(RECORD));
        fs::write(&fresh, serde_json::to_string_pretty(record)?)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("{} cannot be written", path.display()))
    }

    fn read(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.file(RECORD)).ok()?).ok()
    }

    /// Marks the run as over and deletes what only a running cloud needs, and what leads there.
    pub(crate) fn close(&self) {
        if let Some(current) = self.current().filter(|link| fs::read_link(link).is_ok_and(|to| to == self.folder)) {
            let _ = fs::remove_file(current);
        }
        // Cleaning up is best effort: what cannot be deleted now is deleted with the whole folder later.
        let _ = fs::rename(self.file(RECORD), self.file(STOPPED));
        for part in TEMPORARY {
            let part = self.file(part);
            let _ = if part.is_dir() { fs::remove_dir_all(part) } else { fs::remove_file(part) };
        }
    }

    /// Stops whatever of the run is alive and returns its names.
    fn stop(&self, project: &Project, record: &Record) -> Result<Vec<String>> {
        let mut stopped = Vec::new();
        if !record.detached && record.owner.lives() {
            // The command itself knows best how to stop what it started.
            let _ = kill(Pid::from_raw(record.owner.pid), Signal::SIGTERM);
            stopped.push(format!("cargo xtask ({})", record.owner.pid));
            let _ = gone(project, &record.owner, GRACE * 3);
        }
        for (name, identity) in &record.processes {
            if identity.lives() {
                stop_group(project, identity);
                stopped.push(format!("{name} ({})", identity.pid));
            }
        }
        project.processes.check()?;
        self.close();
        Ok(stopped)
    }
}

impl Record {
    /// The record of a cloud that this process starts.
    pub(crate) fn new(endpoint: &str, stepfunctions: &str, mqtt: &str, stack: &str, detached: bool) -> Result<Self> {
        let owner = i32::try_from(std::process::id()).ok().and_then(Identity::of);
        Ok(Self {
            endpoint: endpoint.to_owned(),
            stepfunctions: stepfunctions.to_owned(),
            mqtt: mqtt.to_owned(),
            region: crate::project::REGION.to_owned(),
            stack: stack.to_owned(),
            detached,
            owner: owner.context("the start time of this process is unknown")?,
            processes: BTreeMap::new(),
        })
    }
}

fn stop_group(project: &Project, leader: &Identity) {
    let group = Pid::from_raw(leader.pid);
    let _ = killpg(group, Signal::SIGTERM);
    let _ = gone(project, leader, GRACE);
    // Its children have the same group and may be alive yet.
    let _ = killpg(group, Signal::SIGKILL);
    let _ = gone(project, leader, GRACE);
}

/// Waits for the end of a process that is not a child of this one.
fn gone(project: &Project, process: &Identity, limit: Duration) -> Result<()> {
    project.processes.wait_for("the end of a process", POLL, limit, || Ok((!process.lives()).then_some(())))
}

fn runs(project: &Project) -> PathBuf {
    project.state().join("runs")
}

/// All runs, the oldest first.
fn all(project: &Project) -> Vec<Run> {
    let entries = fs::read_dir(runs(project)).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders.into_iter().map(|folder| Run { folder }).collect()
}

/// Stops what commands that were killed have left behind, and deletes the oldest folders of runs that are over.
fn clean_up(project: &Project) -> Result<()> {
    for run in all(project) {
        match run.read() {
            Some(record) if !record.detached && !record.owner.lives() => {
                let stopped = run.stop(project, &record)?;
                report(&run.folder, &stopped);
            }
            _ => {}
        }
    }
    let over: Vec<Run> = all(project).into_iter().filter(|run| run.file(STOPPED).exists()).collect();
    for run in &over[..over.len().saturating_sub(RUNS_KEPT)] {
        // A folder that cannot be deleted now is tried again next time.
        let _ = fs::remove_dir_all(&run.folder);
    }
    Ok(())
}

fn report(folder: &Path, stopped: &[String]) {
    if !stopped.is_empty() {
        eprintln!("Stopped {}: {}", folder.display(), stopped.join(", "));
    }
}

/// Stops every recorded run that is alive.
pub(crate) fn down(project: &Project) -> Result<()> {
    let mut any = false;
    for run in all(project) {
        if let Some(record) = run.read() {
            let stopped = run.stop(project, &record)?;
            any |= !stopped.is_empty();
            report(&run.folder, &stopped);
        }
    }
    if !any {
        eprintln!("No local cloud of this checkout is running.");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_to_a_cloud_that_is_down() {
        let state = std::env::temp_dir().join(format!("xtask-run-{}", std::process::id()));
        let run = |name: &str| Run { folder: state.join("runs").join(name) };
        let (first, second) = (run("1"), run("2"));
        let current = state.join("current");
        for run in [&first, &second] {
            fs::create_dir_all(&run.folder).expect("a folder");
            run.make_current().expect("a link");
            assert_eq!(fs::read_link(&current).expect("a link"), run.folder);
        }
        first.close();
        assert!(fs::symlink_metadata(&current).is_ok(), "it leads to the other one");
        second.close();
        assert!(fs::symlink_metadata(&current).is_err());
        fs::remove_dir_all(state).expect("removed");
    }
}
