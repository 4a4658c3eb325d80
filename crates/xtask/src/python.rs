//! Virtual environments with pinned requirements, made on first use: the first by pip, it holds uv, which fills the others.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::console::Step;
use crate::project::Project;

/// The oldest Python for which the pinned packages exist.
const OLDEST: (u32, u32) = (3, 11);
/// Written last: an environment without it was interrupted while it was made.
const COMPLETE: &str = "complete";
/// The environment of what fills the others.
const INSTALLER: &str = "installer";
/// The environment of the commands that also serve AWS.
const BUILD: &str = "build";

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
    /// Holds `sam`, `cargo-lambda` and `aws` (version 2).
    pub(crate) build: Venv,
}

impl Venvs {
    /// Finds both environments, or makes them.
    pub(crate) fn ready(project: &Project) -> Result<Self> {
        let python = version(project)?;
        Ok(Self { cloud: ready(project, "cloud", &python)?, build: ready(project, BUILD, &python)? })
    }
}

/// The environment of the template's static checks, which the tests alone need.
pub(crate) fn checks(project: &Project) -> Result<Venv> {
    ready(project, "checks", &version(project)?)
}

fn version(project: &Project) -> Result<String> {
    let needed = format!("Python {}.{} or newer is needed for the local cloud", OLDEST.0, OLDEST.1);
    let program = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2], sys.base_prefix)";
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
    let _lock = project.lock(&format!("venv/{name}"), &format!("makes the Python environment for {name}"))?;
    if !complete.exists() {
        if name == INSTALLER {
            make(project, name, &venv, &[], &mut [pip(project, &venv, &venv, &requirements)])?;
        } else {
            let installer = ready(project, INSTALLER, python)?;
            // Whoever has told pip where packages come from has not told uv.
            let ways = &mut [uv, pip].map(|way| way(project, &installer, &venv, &requirements));
            make(project, name, &venv, &["--without-pip"], ways)?;
        }
        if name == BUILD {
            install_aws_cli(project, &venv)?;
        }
        fs::write(complete, "")?;
    }
    Ok(venv)
}

fn hash(parts: &[&str]) -> String {
    let mut digest = format!("{:x}", Sha256::digest(parts.join("\0")));
    digest.truncate(12);
    digest
}

/// Makes the environment of that name, and fills it with the first of the commands that succeeds.
fn make(project: &Project, name: &str, venv: &Venv, options: &[&str], ways: &mut [Command]) -> Result<()> {
    let step = Step::start(format!("Python environment for {name} (once)"));
    if venv.folder.exists() {
        fs::remove_dir_all(&venv.folder)
            .with_context(|| format!("the unfinished {} cannot be removed", venv.folder.display()))?;
    }
    let log = venv.folder.with_extension("log");
    let mut create = project.command("python3");
    create.args(["-m", "venv"]).args(options).arg(&venv.folder);
    project.processes.run("python3 -m venv", &mut create, &log)?;
    let installation = format!("the installation of local/requirements-{name}.txt");
    let mut installed = Ok(());
    for way in ways {
        installed = project.processes.run(&installation, way, &log);
        if installed.is_ok() {
            break;
        }
        project.processes.check()?;
    }
    installed?;
    step.done();
    Ok(())
}

/// Takes the AWS CLI out of the package that holds it.
fn install_aws_cli(project: &Project, venv: &Venv) -> Result<()> {
    let mut install = project.tool(venv, "python");
    install.arg(project.root.join("local/install_aws_cli.py"));
    project.processes.run("the installation of the AWS CLI", &mut install, &venv.folder.with_extension("log"))
}

/// An installation by the pip of the installer's environment. The requirements are complete, so nothing else comes with them.
fn pip(project: &Project, installer: &Venv, venv: &Venv, requirements: &Path) -> Command {
    let mut install = project.tool(installer, "python");
    install.args(["-m", "pip", "--python"]).arg(venv.program("python"));
    install.args(["install", "--no-input", "--no-deps", "--requirement"]).arg(requirements);
    install
}

/// The same in seconds, where pip takes a minute.
fn uv(project: &Project, installer: &Venv, venv: &Venv, requirements: &Path) -> Command {
    let mut install = project.tool(installer, "uv");
    install.args(["pip", "install", "--no-deps", "--python"]).arg(venv.program("python"));
    install.arg("--requirement").arg(requirements);
    install
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
