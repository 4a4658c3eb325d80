//! Child processes that end with this one: each leads its own process group, is watched, and is stopped by its id.

use std::fmt;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// How long a process may take to end after SIGTERM before it is killed.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
const TAIL_LINES: usize = 25;

/// The user pressed Ctrl-C, or this process was asked to end.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// What a process is for, which decides what its end means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs until it is stopped: its end is a failure of whatever is under way.
    Service,
    /// Ends by itself.
    Task,
}

/// What the waiting thread and the watchers share about one process.
struct State {
    name: String,
    kind: Kind,
    log: Option<PathBuf>,
    status: OnceLock<ExitStatus>,
    stopping: AtomicBool,
}

impl State {
    fn check(&self) -> Result<()> {
        match self.status.get() {
            Some(status) if self.kind == Kind::Service && !self.stopping.load(Ordering::SeqCst) => {
                Err(self.ended(*status, "stopped unexpectedly"))
            }
            _ => Ok(()),
        }
    }

    fn ended(&self, status: ExitStatus, how: &str) -> anyhow::Error {
        let tail = self.log.as_deref().map(tail).unwrap_or_default();
        anyhow!("{} {how} ({}).{tail}", self.name, describe(status))
    }
}

/// The processes of this command, and the one place where it waits: for an end, a time or Ctrl-C.
pub(crate) struct Processes {
    wake: Sender<()>,
    events: Receiver<()>,
    interrupted: Arc<AtomicBool>,
    states: Mutex<Vec<Arc<State>>>,
}

impl Processes {
    /// Takes over Ctrl-C and SIGTERM; may be called once in a program.
    pub(crate) fn new() -> Result<Self> {
        let (wake, events) = channel();
        let interrupted = Arc::new(AtomicBool::new(false));
        let (flag, sender) = (Arc::clone(&interrupted), wake.clone());
        ctrlc::set_handler(move || {
            flag.store(true, Ordering::SeqCst);
            // Nobody waits any more once the program is ending by itself.
            let _ = sender.send(());
        })
        .context("Ctrl-C cannot be handled")?;
        Ok(Self { wake, events, interrupted, states: Mutex::default() })
    }

    /// Starts the process in its own group, without input; `log` is where its output goes, for messages about it.
    pub(crate) fn spawn(&self, name: &str, kind: Kind, command: &mut Command, log: Option<&Path>) -> Result<Process> {
        self.check()?;
        if let Some(log) = log {
            let file = fs::File::create(log).with_context(|| format!("the log {} cannot be written", log.display()))?;
            command.stdout(file.try_clone()?).stderr(file);
        }
        let program = command.get_program().display().to_string();
        let mut child = command
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .with_context(|| format!("{name} cannot be started: {program} did not run"))?;
        let state = Arc::new(State {
            name: name.to_owned(),
            kind,
            log: log.map(Path::to_owned),
            status: OnceLock::new(),
            stopping: AtomicBool::new(false),
        });
        self.states.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&state));
        let pid = Pid::from_raw(child.id().try_into().context("a process id does not fit its type")?);
        let (ended, end) = channel::<()>();
        let (wake, shared) = (self.wake.clone(), Arc::clone(&state));
        let waiter = std::thread::spawn(move || {
            // Waiting fails only for a child that was waited for already.
            let status = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0));
            // What it started itself (Lambda functions, compilers) is in its group and may have outlived it. At once,
            // for the system may give the id to another process later.
            let _ = killpg(pid, Signal::SIGKILL);
            let _ = shared.status.set(status);
            drop(ended);
            let _ = wake.send(());
        });
        Ok(Process { pid, state, end, waiter: Some(waiter) })
    }

    /// Fails when the user interrupted, or when a service has ended.
    pub(crate) fn check(&self) -> Result<()> {
        if self.interrupted.load(Ordering::SeqCst) {
            bail!(Interrupted);
        }
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.retain(|state| Arc::strong_count(state) > 1);
        states.iter().try_for_each(|state| state.check())
    }

    /// Waits until the process ends by itself; while it waits, Ctrl-C and the end of a service are failures.
    pub(crate) fn finish(&self, process: &Process) -> Result<ExitStatus> {
        loop {
            self.check()?;
            if let Some(status) = process.status() {
                return Ok(status);
            }
            self.pause(None);
        }
    }

    /// Waits for the given time, or for the end of any process if that comes first.
    fn pause(&self, time: Option<Duration>) {
        match time {
            Some(time) => _ = self.events.recv_timeout(time),
            None => _ = self.events.recv(),
        }
    }

    /// Asks again and again until there is an answer; gives up after `limit` with a sentence that names `what`.
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        interval: Duration,
        limit: Duration,
        mut ask: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            self.check()?;
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            if Instant::now() >= deadline {
                bail!("{what} did not happen within {} s", limit.as_secs());
            }
            self.pause(Some(interval));
        }
    }

    /// Waits until the user interrupts or a service ends, which is always an error.
    pub(crate) fn stay(&self) -> anyhow::Error {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            self.pause(None);
        }
    }

    /// Runs the command to its end with its output in `log`; a failure shows the end of that.
    pub(crate) fn run(&self, name: &str, command: &mut Command, log: &Path) -> Result<()> {
        let process = self.spawn(name, Kind::Task, command, Some(log))?;
        process.expect_success(self.finish(&process)?)
    }

    /// Runs the command to its end with its output where ours goes.
    pub(crate) fn show(&self, name: &str, command: &mut Command) -> Result<()> {
        let process = self.spawn(name, Kind::Task, command, None)?;
        process.expect_success(self.finish(&process)?)
    }

    /// Runs the command to its end and returns what it printed, which `log` keeps beside its messages.
    pub(crate) fn output(&self, name: &str, command: &mut Command, log: &Path) -> Result<String> {
        let answer = log.with_extension("out");
        let unwritable = || format!("{} cannot be written", log.display());
        command.stdout(fs::File::create(&answer).with_context(unwritable)?);
        command.stderr(fs::File::create(log).with_context(unwritable)?);
        let process = self.spawn(name, Kind::Task, command, None)?;
        let status = self.finish(&process)?;
        if !status.success() {
            bail!("{name} failed ({}).{}", describe(status), tail(log));
        }
        Ok(fs::read_to_string(&answer)?)
    }
}

/// A running child with its whole process group; dropping it stops them all.
pub(crate) struct Process {
    pid: Pid,
    state: Arc<State>,
    end: Receiver<()>,
    waiter: Option<JoinHandle<()>>,
}

impl Process {
    /// The process id, which is also the id of its group.
    pub(crate) fn id(&self) -> i32 {
        self.pid.as_raw()
    }

    /// How the process ended, if it has.
    pub(crate) fn status(&self) -> Option<ExitStatus> {
        self.state.status.get().copied()
    }

    /// Turns an unsuccessful end into a sentence with the end of the log.
    pub(crate) fn expect_success(&self, status: ExitStatus) -> Result<()> {
        if status.success() { Ok(()) } else { Err(self.state.ended(status, "failed")) }
    }

    /// A sentence about an end that came too early.
    pub(crate) fn ended_early(&self, status: ExitStatus) -> anyhow::Error {
        self.state.ended(status, "ended too early")
    }

    /// Asks the process to finish what it does, as Ctrl-C would, and waits for that up to `limit`.
    pub(crate) fn interrupt(&self, limit: Duration) {
        self.state.stopping.store(true, Ordering::SeqCst);
        if self.status().is_none() {
            let _ = kill(self.pid, Signal::SIGINT);
            let _ = self.ended_within(limit);
        }
    }

    /// Kills the process without a warning, as a power cut does.
    pub(crate) fn kill(&self) {
        self.state.stopping.store(true, Ordering::SeqCst);
        let _ = kill(self.pid, Signal::SIGKILL);
    }

    /// Lets the process outlive this program.
    pub(crate) fn leave(mut self) {
        self.state.stopping.store(true, Ordering::SeqCst);
        self.waiter = None;
    }

    fn ended_within(&self, limit: Duration) -> bool {
        // The sender is dropped, and so the channel disconnected, when the process has ended.
        self.end.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(waiter) = self.waiter.take() else { return };
        self.state.stopping.store(true, Ordering::SeqCst);
        if self.status().is_none() {
            let _ = killpg(self.pid, Signal::SIGTERM);
            if !self.ended_within(GRACE) {
                let _ = killpg(self.pid, Signal::SIGKILL);
            }
        }
        let _ = waiter.join();
    }
}

/// The end of a log, introduced by its path, for the tail of a message.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    // What a counter has overwritten is not worth telling.
    let shown = |line: &str| line.rsplit('\r').next().unwrap_or_default().replace("\u{1b}[K", "");
    let lines: Vec<String> = text.lines().map(shown).filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return format!(" Its log {} is empty.", log.display());
    }
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    format!(" The end of its log {}:\n    {}", log.display(), last.join("\n    "))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "no exit code".to_owned(),
    }
}

/// When the process started, in the system's own notation: with its id it names a process beyond doubt. `None` when
/// there is no such process.
pub(crate) fn started(id: i32) -> Option<String> {
    if Path::new("/proc/self/stat").exists() {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The second field is the name in brackets and may contain anything; the start time is field 22.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // A zombie has ended; its parent just did not ask yet.
        return (fields.first() != Some(&"Z")).then(|| fields.get(19).map(ToString::to_string))?;
    }
    let output = Command::new("ps").args(["-o", "lstart=", "-p", &id.to_string()]).output().ok()?;
    let time = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!time.is_empty()).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ctrl-C can be taken over once in a program, so all of it is one test.
    #[test]
    fn children_are_watched_and_stopped_with_their_children() {
        let processes = Processes::new().unwrap();
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };

        let folder = std::env::temp_dir().join(format!("xtask-process-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let log = folder.join("failure.log");
        let error = processes.run("The task", &mut shell("echo because; exit 3"), &log).unwrap_err().to_string();
        assert!(error.starts_with("The task failed (exit code 3).") && error.contains("because"), "{error}");

        // A grandchild must not survive, whether its parent is stopped or dies.
        for end in ["sleep 60", "exit 0"] {
            let ids = folder.join("ids");
            let script = format!("sleep 60 & echo $! > {0}.new; mv {0}.new {0}; {end}", ids.display());
            let process = processes.spawn("The parent", Kind::Task, &mut shell(&script), None).unwrap();
            let poll = Duration::from_millis(10);
            let grandchild: i32 = processes
                .wait_for("the grandchild's id", poll, GRACE, || Ok(fs::read_to_string(&ids).ok()))
                .unwrap()
                .trim()
                .parse()
                .unwrap();
            if end == "exit 0" {
                assert!(processes.finish(&process).unwrap().success());
            }
            drop(process);
            processes
                .wait_for("the grandchild's end", poll, GRACE, || Ok(started(grandchild).is_none().then_some(())))
                .unwrap();
            fs::remove_file(&ids).unwrap();
        }

        let service = processes.spawn("The service", Kind::Service, &mut shell("exit 1"), None).unwrap();
        let error = processes.stay().to_string();
        assert_eq!(error, "The service stopped unexpectedly (exit code 1).");
        drop(service);
        assert!(processes.check().is_ok());
        fs::remove_dir_all(folder).unwrap();
    }
}
