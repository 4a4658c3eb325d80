//! The settings API of a run: the port that is kept for it, and the key that it asks for.

use std::fs;
use std::net::TcpListener;
use std::ops::Range;

use anyhow::{Context, Result};
use uuid::Uuid;

use crate::cloud::Cloud;
use crate::console::Step;
use crate::project::Project;

const SECRET: &str = "fleetflow-settings-api-key";
/// Below the ports that systems give to outgoing connections: what is free when it is chosen is free when it is used,
/// minutes later.
const PORTS: Range<u16> = 20_000..30_000;

/// Where the settings API of a run listens, once somebody starts it, and its key.
pub(crate) struct SettingsApi {
    /// Host and port.
    pub(crate) address: String,
    /// What requests must carry.
    pub(crate) key: String,
}

impl SettingsApi {
    /// Chooses a free port and a random key.
    pub(crate) fn reserve() -> Result<Self> {
        let key = Uuid::new_v4().simple().to_string();
        // Commands that run at the same time begin their search at different ports.
        let first = usize::try_from(std::process::id())? % PORTS.len();
        let address = PORTS
            .cycle()
            .skip(first)
            .take(PORTS.len())
            .map(|port| format!("127.0.0.1:{port}"))
            .find(|address| TcpListener::bind(address).is_ok())
            .with_context(|| format!("no port from {} to {} is free on 127.0.0.1", PORTS.start, PORTS.end - 1))?;
        Ok(Self { address, key })
    }

    /// The environment in which tests find it.
    pub(crate) fn environment(&self) -> [(&'static str, String); 2] {
        [("FLEETFLOW_SETTINGS_API", self.address.clone()), ("FLEETFLOW_SETTINGS_API_KEY", self.key.clone())]
    }

    /// Stores the key as a secret and returns the template's parameters that lead the stack to this API.
    pub(crate) fn parameters(&self, project: &Project, cloud: &Cloud) -> Result<Vec<(String, String)>> {
        let url = format!("http://{}/profiles/{{externalId}}/settings", self.address);
        let secret = self.create_secret(project, cloud)?;
        Ok(vec![("SettingsApiUrl".to_owned(), url), ("SettingsApiKeySecretArn".to_owned(), secret)])
    }

    /// Returns the secret's ARN.
    fn create_secret(&self, project: &Project, cloud: &Cloud) -> Result<String> {
        // From a file, so that the key is neither in the line that is shown nor in the system's list of processes.
        let file = cloud.run.file("tmp/settings-api-key");
        fs::write(&file, &self.key).with_context(|| format!("{} cannot be written", file.display()))?;
        let mut command = cloud.tool(project, "aws");
        command
            .args(["secretsmanager", "create-secret", "--name", SECRET])
            .args(["--secret-string", &format!("file://{}", file.display())])
            .args(["--query", "ARN", "--output", "text"]);
        let step = Step::start(format!("$ {}", project.line(&command)));
        let name = "`aws secretsmanager create-secret`";
        let answer = project.processes.output(name, &mut command, &cloud.run.log("create-secret"))?;
        step.done();
        Ok(answer.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserved_port_is_free_and_each_key_another() {
        let (one, other) = (SettingsApi::reserve().unwrap(), SettingsApi::reserve().unwrap());
        // A program that another test starts meanwhile holds a copy of the search's socket until it has begun.
        let is_free = || TcpListener::bind(&one.address).is_ok();
        assert!((0..1000).any(|_| is_free() || {
            std::thread::sleep(std::time::Duration::from_millis(10));
            false
        }));
        assert_eq!(one.key.len(), 32);
        assert_ne!(one.key, other.key);
    }
}
