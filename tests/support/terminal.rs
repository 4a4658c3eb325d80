//! Commands of a shell, as somebody types them.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A command line in a folder of the checkout, in a terminal that knows nothing yet of the local cloud.
pub fn terminal(folder: &Path, line: &str) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", line]).current_dir(folder).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["AWS_", "FLEETFLOW_", "CARGO_"].iter().any(|prefix| name.starts_with(prefix)) && name != "CARGO_HOME" {
            command.env_remove(name);
        }
    }
    command
}

/// A process with all its children, ended together.
pub struct ProcessGroup {
    leader: Child,
    /// If this program is killed, nobody else ends the group.
    guard: Child,
}

impl ProcessGroup {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        let leader = command.process_group(0).spawn().expect("a shell");
        let (this, group) = (std::process::id(), leader.id());
        let guard = format!("while kill -0 {this} && kill -0 {group}; do sleep 1; done; kill -TERM -- -{group}");
        let mut guarding = Command::new("bash");
        guarding.args(["-c", &guard]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let guard = guarding.process_group(0).spawn().expect("a shell");
        Self { leader, guard }
    }

    /// The process that has started the others.
    pub fn leader(&mut self) -> &mut Child {
        &mut self.leader
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        let _ = Command::new("kill").args(["-TERM", "--", &format!("-{}", self.leader.id())]).status();
        let _ = self.leader.wait();
    }
}
