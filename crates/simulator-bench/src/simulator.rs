//! The simulator's process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::certificates::{Folder, HOST};

/// What it says when all devices are subscribed, and how often that is looked for; it looks itself five times a second.
const CONNECTED: &str = "devices are connected";
const INTERVAL: Duration = Duration::from_millis(20);

/// The running simulator; dropping it stops it.
pub(crate) struct Simulator {
    child: Child,
    log: PathBuf,
}

impl Drop for Simulator {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

impl Simulator {
    /// Starts so many devices, which say nothing by themselves and answer at once.
    pub(crate) fn start(program: &Path, folder: &Folder, port: u16, devices: usize) -> Result<Self> {
        let path = folder.log(devices);
        let log = File::create(&path)?;
        let mut command = Command::new(program);
        command
            .args(["run", "--quiet", "--first-boot-delay", "1day", "--answer-delay", "0s"])
            .args(["--endpoint", &format!("{HOST}:{port}"), "--count", &devices.to_string()])
            .arg("--certificates")
            .arg(folder.devices())
            .arg("--state")
            .arg(folder.state(devices))
            .arg("--ca")
            .arg(folder.ca())
            .env("RUST_LOG", "warn,device_simulator::progress=info")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
        Ok(Self { child, log: path })
    }

    /// Waits until all devices are connected.
    pub(crate) fn connected(&mut self, patience: Duration) -> Result<()> {
        let begin = Instant::now();
        let log = self.log.display();
        while !fs::read_to_string(&self.log)?.contains(CONNECTED) {
            if let Some(status) = self.child.try_wait()? {
                bail!("the simulator has ended ({status}): {log}");
            }
            ensure!(begin.elapsed() < patience, "not all are connected after {patience:?}: {log}");
            thread::sleep(INTERVAL);
        }
        Ok(())
    }

    /// A line of what the system says of the process's memory, in KiB.
    pub(crate) fn memory(&self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {name}"))?.trim().trim_end_matches(" kB").parse()?)
    }
}
