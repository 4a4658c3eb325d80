//! The system's limit on open files: a connection is one.

use anyhow::{Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What a process has open beside its connections, generously.
const OTHER_FILES: u64 = 200;

/// Lets this process, and those that it starts, have so many connections. Fails if the system's administrator does not.
pub(crate) fn allow_connections(count: usize) -> Result<()> {
    let needed = u64::try_from(count)? + OTHER_FILES;
    let (now, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        most >= needed,
        "{count} devices need {needed} open files a process, and the system allows {most} (`ulimit -Hn`): have it raised"
    );
    if now < needed {
        setrlimit(Resource::RLIMIT_NOFILE, needed, most)?;
    }
    Ok(())
}
