//! Virtual environments with pinned requirements, made on first use.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::console::Step;
use crate::project::Project;

/// The oldest Python for which the pinned packages exist.
const OLDEST: (u32, u32) = (3, 11);
/// Written last: an environment without it was interrupted while it was made.
const COMPLETE: &str = "complete";
const LOCK_INTERVAL: Duration = Duration::from_millis(500);
const LOCK_LIMIT: Duration = Duration::from_mins(30);

/// A complete virtual environment.
pub(crate) struct Venv {
    pub(crate) folder: PathBuf,
}

impl Venv {
    /// The path of one of its programs.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }

    /// `PATH` with the environment's programs first.
    pub(crate) fn path(&self) -> OsString {
        let rest = env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.folder.join("bin")).chain(env::split_paths(&rest));
        // Only a folder with a colon in its name cannot be joined; then the programs are still called by full path.
        env::join_paths(folders).unwrap_or(rest)
    }
}

/// The two environments: their pins contradict each other.
pub(crate) struct Venvs {
    /// Runs the local cloud.
    pub(crate) cloud: Venv,
    /// Holds `sam`, `cargo-lambda` and `aws`.
    pub(crate) build: Venv,
}

impl Venvs {
    /// Finds both environments, or makes them.
    pub(crate) fn ready(project: &Project) -> Result<Self> {
        let python = version(project)?;
        Ok(Self { cloud: ready(project, "cloud", &python)?, build: ready(project, "build", &python)? })
    }
}

/// The environment of the template's static checks, which the tests alone need.
pub(crate) fn checks(project: &Project) -> Result<Venv> {
    ready(project, "checks", &version(project)?)
}

fn version(project: &Project) -> Result<String> {
    let needed = format!("Python {}.{} or newer is needed for the local cloud", OLDEST.0, OLDEST.1);
    let program = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2], sys.prefix)";
    let output = project
        .command("python3")
        .args(["-c", program])
        .output()
        .with_context(|| format!("{needed}, but there is no `python3` in PATH"))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!(
            "{needed} with its modules venv and ensurepip (Debian and Ubuntu: apt install python3-venv), but \
             `python3` said: {reason}"
        );
    }
    let found = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match parse_version(&found) {
        Some(version) if version >= OLDEST => Ok(found),
        _ => bail!("{needed}, but `python3` is {found}"),
    }
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_whitespace().next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn ready(project: &Project, name: &str, python: &str) -> Result<Venv> {
    let requirements = project.root.join(format!("local/requirements-{name}.txt"));
    let text =
        fs::read_to_string(&requirements).with_context(|| format!("{} cannot be read", requirements.display()))?;
    let venvs = project.state().join("venv");
    fs::create_dir_all(&venvs).with_context(|| format!("{} cannot be created", venvs.display()))?;
    // The scripts of an environment contain its path, and its packages belong to one Python: a checkout that was moved
    // or another Python needs another environment.
    let folder = venvs.join(format!("{name}-{}", hash(&[&text, python, &venvs.to_string_lossy()])));
    let venv = Venv { folder };
    let complete = venv.folder.join(COMPLETE);
    if complete.exists() {
        return Ok(venv);
    }
    let _lock = lock(project, &venvs.join(format!("{name}.lock")))?;
    if !complete.exists() {
        make(project, name, &venv, &requirements)?;
        fs::write(complete, "")?;
    }
    Ok(venv)
}

fn hash(parts: &[&str]) -> String {
    let mut digest = format!("{:x}", Sha256::digest(parts.join("\0")));
    digest.truncate(12);
    digest
}

/// The lock is released when the file is closed, also when this program is killed.
fn lock(project: &Project, path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
    project.processes.wait_for(
        "another command's making of the same environment",
        LOCK_INTERVAL,
        LOCK_LIMIT,
        || match file.try_lock() {
            Ok(()) => Ok(Some(())),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).context(format!("{} cannot be locked", path.display())),
        },
    )?;
    Ok(file)
}

fn make(project: &Project, name: &str, venv: &Venv, requirements: &Path) -> Result<()> {
    let step = Step::start(format!("Python environment for {name} (once, about a minute)"));
    if venv.folder.exists() {
        fs::remove_dir_all(&venv.folder)
            .with_context(|| format!("the unfinished {} cannot be removed", venv.folder.display()))?;
    }
    let log = venv.folder.with_extension("log");
    let mut create = project.command("python3");
    create.args(["-m", "venv"]).arg(&venv.folder);
    project.processes.run("python3 -m venv", &mut create, &log)?;
    let mut install = project.tool(venv, "python");
    install.args(["-m", "pip", "install", "--no-input", "--requirement"]).arg(requirements);
    project.processes.run(&format!("pip install of local/requirements-{name}.txt"), &mut install, &log)?;
    step.done();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert_eq!(parse_version("3.11 /usr"), Some((3, 11)));
        assert!(parse_version("3.9 /usr") < Some(OLDEST));
        assert!(parse_version("4.0 /usr") > Some(OLDEST));
        assert_eq!(parse_version("three"), None);
    }

    #[test]
    fn every_part_changes_the_hash() {
        assert_eq!(hash(&["a", "b"]), hash(&["a", "b"]));
        assert_ne!(hash(&["a", "b"]), hash(&["a", "c"]));
        assert_ne!(hash(&["ab", ""]), hash(&["a", "b"]));
    }
}
