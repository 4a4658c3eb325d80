//! The worker's configuration file.

use mqtt_connection::Endpoint;
use protocol::{HandlerName, Tenant, WorkerName};
use reqwest::Url;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name of the handler that is always there.
pub(crate) const ADD: &str = "add";

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {} cannot be read: {error}", .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Something in it is wrong.
    #[error("{}: {why}", .path.display())]
    Invalid {
        /// In which file.
        path: PathBuf,
        /// What, and what was expected.
        why: String,
    },
}

/// All that a worker has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Whose jobs it runs.
    pub tenant: Tenant,
    /// Its name, which no other worker of the tenant has.
    pub worker: WorkerName,
    /// The broker.
    pub endpoint: Endpoint,
    /// Its certificate, PEM.
    pub certificate: PathBuf,
    /// The certificate's key, PEM.
    pub private_key: PathBuf,
    /// The authority behind the broker's certificate, if the operating system does not know it.
    pub ca: Option<PathBuf>,
    /// The address of the stack's bucket, under which inputs and results are that are too large for a message.
    pub storage: Option<Url>,
    /// Its MQTT client id.
    pub client_id: String,
    /// Where jobs are written down.
    pub journal: PathBuf,
    /// How long answers are kept.
    pub journal_age: Duration,
    /// How many jobs run at once.
    pub concurrency: usize,
    /// How long running jobs may go on once the worker is told to end.
    pub drain_timeout: Duration,
    /// What runs a job that names no handler.
    pub default_handler: HandlerName,
    /// Handlers that are programs.
    pub handlers: BTreeMap<HandlerName, Program>,
}

/// A program that handles jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// A path, or a bare name that is looked for in the folders of PATH.
    pub program: PathBuf,
    /// What it is started with.
    pub arguments: Vec<String>,
    /// How long it may run.
    pub timeout: Duration,
    /// How much it may write to stdout, in bytes.
    pub output_limit: usize,
    /// The names of variables that it gets from the worker's environment.
    pub environment: Vec<String>,
    /// Where it runs.
    pub folder: PathBuf,
}

impl Program {
    /// Fails with a sentence if the program would run beside the private key.
    fn check_folder(&self, handler: &HandlerName, private_key: &Path) -> Result<(), String> {
        if private_key.parent() != Some(&self.folder) {
            return Ok(());
        }
        Err(format!(
            "handlers.{handler}.folder: got {}, which holds the private key, expected another",
            self.folder.display()
        ))
    }

    /// The file that would run. Fails with a sentence if there is none.
    pub fn locate(&self) -> Result<PathBuf, String> {
        let shown = self.program.display();
        if self.program.components().count() > 1 {
            return if is_executable(&self.program) {
                Ok(self.program.clone())
            } else {
                Err(format!("{shown} is no executable file"))
            };
        }
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let mut candidates = std::env::split_paths(&folders).map(|folder| folder.join(&self.program));
        candidates
            .find(|candidate| is_executable(candidate))
            .ok_or_else(|| format!("{shown} is no executable file in a folder of PATH"))
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    tenant: Tenant,
    worker: Option<WorkerName>,
    #[serde(deserialize_with = "endpoint")]
    endpoint: Endpoint,
    certificate: PathBuf,
    private_key: PathBuf,
    ca: Option<PathBuf>,
    #[serde(default, deserialize_with = "storage")]
    storage: Option<Url>,
    client_id: Option<String>,
    #[serde(default = "default_journal")]
    journal: PathBuf,
    #[serde(default = "default_journal_days")]
    journal_days: u64,
    #[serde(default = "default_concurrency")]
    concurrency: u64,
    #[serde(default = "default_drain_timeout", deserialize_with = "duration")]
    drain_timeout: Duration,
    #[serde(default = "add")]
    default_handler: HandlerName,
    #[serde(default)]
    handlers: BTreeMap<HandlerName, ProgramTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProgramTable {
    program: PathBuf,
    #[serde(default)]
    arguments: Vec<String>,
    #[serde(default = "default_timeout", deserialize_with = "duration")]
    timeout: Duration,
    #[serde(default = "default_output_limit")]
    output_limit: u64,
    #[serde(default = "default_environment")]
    environment: Vec<String>,
    folder: Option<PathBuf>,
}

fn default_journal() -> PathBuf {
    "journal".into()
}

/// As long as the cloud knows a job.
fn default_journal_days() -> u64 {
    14
}

fn default_concurrency() -> u64 {
    4
}

fn default_drain_timeout() -> Duration {
    Duration::from_mins(5)
}

fn default_timeout() -> Duration {
    Duration::from_mins(10)
}

fn default_output_limit() -> u64 {
    1024 * 1024
}

fn default_environment() -> Vec<String> {
    vec!["PATH".to_owned(), "LANG".to_owned()]
}

fn add() -> HandlerName {
    ADD.parse().expect("a valid name")
}

fn endpoint<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Endpoint, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// Nobody on the way shall read or exchange what is transferred.
fn storage<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || serde::de::Error::custom(format!("{text:?} is no address of a bucket: expected https://BUCKET…/"));
    let mut url = Url::parse(&text).map_err(|_| wrong())?;
    let is_local = matches!(url.host_str(), Some("127.0.0.1" | "localhost"));
    let is_safe = url.scheme() == "https" || url.scheme() == "http" && is_local;
    if !is_safe || url.host_str().is_none() || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong());
    }
    if !url.path().ends_with('/') {
        // Else another bucket's name could begin with it.
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(Some(url))
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    match humantime::parse_duration(&text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => {
            let why = format!("{text:?} is no duration: expected numbers with units, such as 30s, 10m or 1h 30m");
            Err(serde::de::Error::custom(why))
        }
    }
}

impl Config {
    /// Reads a configuration; its relative paths are relative to its folder.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |error| ConfigError::Unreadable { path: path.to_owned(), error };
        let text = fs::read_to_string(path).map_err(unreadable)?;
        // Programs run elsewhere, so what is relative to here must not stay so.
        let folder = std::path::absolute(path).map_err(unreadable)?.parent().unwrap_or(Path::new("/")).to_owned();
        Self::parse(&text, &folder).map_err(|why| ConfigError::Invalid { path: path.to_owned(), why })
    }

    /// Reads the text of a configuration that is in that folder. Fails with what is wrong and what was expected.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        let file: ConfigFile = toml::from_str(text).map_err(|error| error.to_string())?;
        let worker = file.worker.map_or_else(name_of_this_host, Ok)?;
        let client_id = file.client_id.unwrap_or_else(|| format!("{}.{worker}", file.tenant));
        if client_id.is_empty() || client_id.len() > 128 || client_id.contains(char::is_control) {
            return Err(format!("client_id: got {client_id:?}, expected 1 to 128 characters"));
        }
        let (journal, private_key) = (folder.join(file.journal), folder.join(file.private_key));
        let handlers: BTreeMap<_, _> = file
            .handlers
            .into_iter()
            .map(|(name, table)| {
                let program = table.checked(&name, folder, &journal)?;
                program.check_folder(&name, &private_key)?;
                Ok((name, program))
            })
            .collect::<Result<_, String>>()?;
        let config = Self {
            tenant: file.tenant,
            worker,
            endpoint: file.endpoint,
            certificate: folder.join(file.certificate),
            private_key,
            ca: file.ca.map(|ca| folder.join(ca)),
            client_id,
            storage: file.storage,
            journal,
            journal_age: Duration::from_hours(24 * in_range("journal_days", file.journal_days, 1..=3650)?),
            concurrency: size("concurrency", file.concurrency, 1..=1000)?,
            drain_timeout: file.drain_timeout,
            default_handler: file.default_handler,
            handlers,
        };
        if !config.knows(&config.default_handler) {
            let known = config.known_handlers().join(", ");
            return Err(format!("default_handler: got \"{}\", expected one of {known}", config.default_handler));
        }
        Ok(config)
    }

    /// Fails with a sentence if the private key can be read by everybody or changed by others than its owner. A group may read
    /// it: that of a service whose files are root's.
    pub fn check_private_key(&self) -> Result<(), String> {
        let shown = self.private_key.display();
        let metadata = fs::metadata(&self.private_key).map_err(|error| format!("{shown} cannot be read: {error}"))?;
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o027 == 0 {
            return Ok(());
        }
        Err(format!(
            "{shown} has mode {mode:04o}: others than its owner and its group can read it, or change it; chmod 600 {shown}"
        ))
    }

    /// Makes the folder in which programs run that have no other one.
    pub fn make_working_folder(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(working_folder(&self.journal))
    }

    /// Whether there is a handler of that name.
    pub fn knows(&self, handler: &HandlerName) -> bool {
        handler.as_str() == ADD || self.handlers.contains_key(handler)
    }

    /// The names of all handlers.
    pub fn known_handlers(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.handlers.keys().map(HandlerName::as_str).chain([ADD]).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

impl ProgramTable {
    fn checked(self, handler: &HandlerName, folder: &Path, journal: &Path) -> Result<Program, String> {
        let field = |name: &str| format!("handlers.{handler}.{name}");
        if self.program.as_os_str().is_empty() {
            return Err(format!("{}: got \"\", expected a path or a name", field("program")));
        }
        if let Some(bad) = self.environment.iter().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
            return Err(format!("{}: got {bad:?}, expected names of variables", field("environment")));
        }
        // A bare name stays one: it is found through PATH.
        let is_bare = self.program.components().count() == 1 && !self.program.starts_with(".");
        Ok(Program {
            program: if is_bare { self.program } else { folder.join(self.program) },
            arguments: self.arguments,
            timeout: self.timeout,
            output_limit: size(&field("output_limit"), self.output_limit, 1..=1 << 30)?,
            environment: self.environment,
            folder: self.folder.map_or_else(|| working_folder(journal), |own| folder.join(own)),
        })
    }
}

/// Where programs run that have no folder of their own: apart from the keys, and where the worker may write.
fn working_folder(journal: &Path) -> PathBuf {
    journal.join("work")
}

fn in_range(field: &str, value: u64, range: RangeInclusive<u64>) -> Result<u64, String> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(format!("{field}: got {value}, expected {} to {}", range.start(), range.end()))
}

fn size(field: &str, value: u64, range: RangeInclusive<u64>) -> Result<usize, String> {
    let value = in_range(field, value, range)?;
    usize::try_from(value).map_err(|error| format!("{field}: {error}"))
}

/// This host's name as a worker's.
fn name_of_this_host() -> Result<WorkerName, String> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "_-".contains(c) { c } else { '-' };
    let name: String = host.chars().map(allowed).take(64).collect();
    name.parse().map_err(|_| format!("worker: it is missing, and the host's name {host:?} is no name for it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
tenant = "tenant1"
endpoint = "localhost"
certificate = "certificate.pem"
private_key = "/keys/private.key"
"#;

    fn parse(more: &str) -> Result<Config, String> {
        Config::parse(&format!("{LEAST}{more}"), Path::new("/etc/worker"))
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let config = parse("").unwrap();
        assert_eq!(config.client_id, format!("tenant1.{}", config.worker));
        assert_eq!(config.certificate, Path::new("/etc/worker/certificate.pem"));
        assert_eq!(config.private_key, Path::new("/keys/private.key"));
        assert_eq!(config.journal, Path::new("/etc/worker/journal"));
        assert_eq!(config.journal_age, Duration::from_hours(14 * 24));
        assert_eq!((config.concurrency, config.drain_timeout), (4, Duration::from_mins(5)));
        assert_eq!(config.known_handlers(), ["add"]);
        assert_eq!(parse("[handlers.add]\nprogram = 'my-add'").unwrap().known_handlers(), ["add"]);
    }

    #[test]
    fn programs_are_paths_or_bare_names() {
        let program = |text: &str| {
            let config = parse(&format!("[handlers.x]\nprogram = \"{text}\"")).unwrap();
            config.handlers.into_values().next().unwrap()
        };
        assert_eq!(program("bin/x").program, Path::new("/etc/worker/bin/x"));
        assert_eq!(program("./x").program, Path::new("/etc/worker/x"));
        assert_eq!(program("/opt/x").program, Path::new("/opt/x"));
        assert_eq!(program("sh").program, Path::new("sh"));
        assert!(program("sh").locate().unwrap().is_absolute());
        assert_eq!(program("/etc/passwd").locate(), Err("/etc/passwd is no executable file".to_owned()));
        assert!(program("no-such-program").locate().unwrap_err().contains("in a folder of PATH"));
        assert_eq!(program("sh").folder, Path::new("/etc/worker/journal/work"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value_and_what_was_expected() {
        for (more, parts) in [
            ("colour = 1", &["unknown field `colour`", "expected one of `tenant`"][..]),
            ("worker = 'a b'", &["worker = 'a b'", "\"a b\" is no worker name: expected 1 to 64 characters"]),
            ("concurrency = 0", &["concurrency: got 0, expected 1 to 1000"]),
            ("concurrency = 'four'", &["concurrency = 'four'", "expected u64"]),
            ("journal_days = 0", &["journal_days: got 0, expected 1 to 3650"]),
            ("drain_timeout = '5'", &["drain_timeout = '5'", "\"5\" is no duration: expected numbers with units"]),
            ("client_id = ''", &["client_id: got \"\", expected 1 to 128 characters"]),
            ("default_handler = 'x'", &["default_handler: got \"x\", expected one of add"]),
            ("[handlers.x]", &["missing field `program`"]),
            ("[handlers.'a b']\nprogram = 'x'", &["\"a b\" is no handler name"]),
            ("[handlers.x]\nprogram = 'x'\nuser = 'root'", &["unknown field `user`"]),
            ("[handlers.x]\nprogram = 'x'\ntimeout = '0s'", &["\"0s\" is no duration"]),
            ("[handlers.x]\nprogram = ''", &["handlers.x.program: got \"\", expected a path or a name"]),
            ("[handlers.x]\nprogram = 'x'\noutput_limit = 0", &["handlers.x.output_limit: got 0, expected 1 to"]),
            ("[handlers.x]\nprogram = 'x'\nenvironment = ['A=1']", &["handlers.x.environment: got \"A=1\""]),
            (
                "[handlers.x]\nprogram = 'x'\nfolder = '/keys/.'",
                &["handlers.x.folder: got /keys/., which holds the private"],
            ),
            ("storage = 'http://bucket.s3.amazonaws.com'", &["is no address of a bucket: expected https://BUCKET"]),
            ("storage = 'bucket'", &["\"bucket\" is no address of a bucket"]),
            ("storage = 'https://x/?a=b'", &["is no address of a bucket"]),
        ] {
            let error = parse(more).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{more}: {error}");
            }
        }
        assert!(Config::parse("tenant = 'tenant1'", Path::new("/")).unwrap_err().contains("missing field `endpoint`"));
        let scheme = LEAST.replace("localhost", "mqtts://localhost");
        assert!(Config::parse(&scheme, Path::new("/")).unwrap_err().contains("expected HOST or HOST:PORT"));
    }

    #[test]
    fn a_storage_ends_where_another_begins() {
        for (written, read) in [
            ("https://bucket.s3.eu-west-1.amazonaws.com", "https://bucket.s3.eu-west-1.amazonaws.com/"),
            ("http://127.0.0.1:4566/bucket", "http://127.0.0.1:4566/bucket/"),
        ] {
            let storage = parse(&format!("storage = '{written}'")).unwrap().storage.unwrap();
            assert_eq!(storage.as_str(), read);
        }
    }

    #[test]
    fn a_key_that_others_can_read_or_change_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let private_key = folder.path().join("private.key");
        let config = Config { private_key: private_key.clone(), ..parse("").unwrap() };
        assert!(config.check_private_key().unwrap_err().contains("cannot be read"));
        fs::write(&private_key, "").unwrap();
        for (mode, is_good) in [
            (0o600, true),
            (0o400, true),
            (0o640, true),
            (0o644, false),
            (0o660, false),
            (0o601, false),
            (0o604, false),
        ] {
            fs::set_permissions(&private_key, fs::Permissions::from_mode(mode)).unwrap();
            let checked = config.check_private_key();
            assert_eq!(checked.is_ok(), is_good, "{mode:o}: {checked:?}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::read(Path::new("/nonexistent/worker.toml")).unwrap_err();
        assert!(matches!(error, ConfigError::Unreadable { .. }));
        assert!(error.to_string().starts_with("the configuration /nonexistent/worker.toml cannot be read"));
    }

    #[test]
    fn the_example_is_valid() {
        let config = Config::parse(include_str!("../worker.example.toml"), Path::new("/etc/worker")).unwrap();
        assert_eq!(config.client_id, "tenant1.worker-1");
        assert_eq!(config.known_handlers(), ["add", "report"]);
        assert!(config.storage.is_some_and(|storage| storage.as_str().ends_with(".amazonaws.com/")));
    }
}
