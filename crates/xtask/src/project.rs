//! This checkout: where things are, and the environment in which its tools run.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::console::say;
use crate::process::Processes;
use crate::python::Venv;

/// The Region that the local cloud plays.
pub(crate) const REGION: &str = "eu-west-1";
/// The account that the local cloud plays; its root key pair is this id and `test`.
pub(crate) const ACCOUNT: &str = "000000000000";

const LOCK_INTERVAL: Duration = Duration::from_millis(500);
const LOCK_LIMIT: Duration = Duration::from_hours(1);

/// The checkout, and the processes that were started for it.
pub(crate) struct Project {
    pub(crate) root: PathBuf,
    pub(crate) processes: Processes,
}

impl Project {
    /// Finds the checkout that this program was built from.
    pub(crate) fn open() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .context("the folder of xtask is not two levels below the workspace's root")?;
        Ok(Self { root: root.to_owned(), processes: Processes::new()? })
    }

    /// The folder of everything that is made here and may be deleted at any time.
    pub(crate) fn state(&self) -> PathBuf {
        self.root.join(".fleetflow")
    }

    /// Keeps other commands of this checkout from building at the same time, until what it returns is dropped.
    pub(crate) fn lock_builds(&self) -> Result<File> {
        self.lock("build", "builds")
    }

    /// The same for builds by cargo-lambda, which writes scripts and copies where another one may run them.
    pub(crate) fn lock_releases(&self) -> Result<File> {
        self.lock("release", "builds functions as they are released")
    }

    /// Waits until no other command of this checkout has the lock of that name, and says so if one has. The lock is released
    /// when the file is closed, also when this program is killed.
    pub(crate) fn lock(&self, name: &str, what: &str) -> Result<File> {
        let path = self.state().join(format!("{name}.lock"));
        std::fs::create_dir_all(self.state())?;
        let file = File::create(&path).with_context(|| format!("{} cannot be written", path.display()))?;
        let mut waiting = false;
        self.processes.wait_for("the end of another command's work", LOCK_INTERVAL, LOCK_LIMIT, || {
            match file.try_lock() {
                Ok(()) => Ok(Some(())),
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut waiting, true) {
                        say(&format!("Another command of this checkout {what}; this one waits until that is done."));
                    }
                    Ok(None)
                }
                Err(TryLockError::Error(error)) => Err(error).context(format!("{} cannot be locked", path.display())),
            }
        })?;
        Ok(file)
    }

    /// A command in the root of the checkout that reads no settings of the user's AWS tools and writes only below
    /// `.fleetflow/` and the target folder. It builds what a shell would build: what Cargo tells this program of its own
    /// package would have others compiled anew.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.current_dir(&self.root);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let foreign = ["AWS_", "SAM_CLI", "PYTHON", "CARGO_PKG_", "CARGO_MANIFEST_"];
            if foreign.iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        for (name, folder) in [
            ("XDG_CACHE_HOME", "cache"),
            ("PIP_CACHE_DIR", "cache/pip"),
            ("UV_CACHE_DIR", "cache/uv"),
            ("ZIG_GLOBAL_CACHE_DIR", "cache/zig"),
            ("ZIG_LOCAL_CACHE_DIR", "cache/zig"),
            ("CARGO_ZIGBUILD_CACHE_DIR", "cache/zigbuild"),
            ("__SAM_CLI_APP_DIR", "cache/sam"),
            ("AWS_CONFIG_FILE", "cache/aws-config"),
            ("AWS_SHARED_CREDENTIALS_FILE", "cache/aws-credentials"),
        ] {
            command.env(name, self.state().join(folder));
        }
        for (name, value) in [
            ("SAM_CLI_TELEMETRY", "0"),
            ("SAM_CLI_CHECK_FOR_UPDATES", "0"),
            ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
            ("PYTHONUNBUFFERED", "1"),
            ("AWS_PAGER", ""),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            // The local cloud is never behind a proxy.
            ("NO_PROXY", "127.0.0.1,localhost"),
            ("no_proxy", "127.0.0.1,localhost"),
        ] {
            command.env(name, value);
        }
        command
    }

    /// A program of a virtual environment, which also finds that environment's other programs.
    pub(crate) fn tool(&self, venv: &Venv, program: &str) -> Command {
        let mut command = self.command(venv.program(program));
        command.env("PATH", venv.path()).env("VIRTUAL_ENV", &venv.folder);
        command
    }

    /// The command as a user would type it: without the folders that this checkout knows.
    pub(crate) fn line(&self, command: &Command) -> String {
        let program = Path::new(command.get_program()).file_name().unwrap_or_default();
        let root = format!("{}/", self.root.display());
        std::iter::once(program)
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().replace(&root, ""))
            .map(|word| if word.contains([' ', '"', '{']) { format!("'{word}'") } else { word })
            .collect::<Vec<_>>()
            .join(" ")
    }
}
