//! What the start of a function costs, as it is built and run, and otherwise: what is read and how it is compiled.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::Findings;
use super::runtime_api::{Binary, as_mebibytes, median};
use crate::console::Step;
use crate::project::{ACCOUNT, Project};
use crate::python::Venvs;

const FUNCTION: &str = "create-job";
const STARTS: usize = 101;
/// What the function wants to know before it asks for an event.
const VARIABLES: [(&str, &str); 3] = [("ACCOUNT_ID", ACCOUNT), ("JOB_TEMPLATE", "bench"), ("FIRMWARE_BUCKET", "bench")];
/// Where systems keep all certificate authorities in one file, and beside it the folder with a file for each.
const AUTHORITIES: [(&str, &str); 2] = [
    ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs"),
    ("/etc/pki/tls/certs/ca-bundle.crt", "/etc/pki/tls/certs"),
];
/// What cannot be undercut: a program that does nothing but ask for an event.
const SMALLEST: &str = r#"
    use std::io::{Read, Write};
    fn main() {
        let api = std::env::var("AWS_LAMBDA_RUNTIME_API").expect("a Runtime API");
        let mut connection = std::net::TcpStream::connect(&api).expect("a connection");
        write!(connection, "GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nHost: {api}\r\n\r\n").expect("a question");
        let _ = connection.read(&mut [0]);
    }
"#;

/// One way to have the function, or something else in its place.
struct Variant {
    about: &'static str,
    binary: Binary,
    /// The processor's time for it, from nothing, dependencies included.
    build: Option<Duration>,
    starts: Vec<Start>,
}

struct Start {
    time: Duration,
    processor: Duration,
    memory: u64,
}

/// Builds the variants and starts them by turns.
pub(super) fn measure(project: &Project) -> Result<Findings> {
    let mut variants = variants(project)?;
    for _ in 0..STARTS {
        for variant in &mut variants {
            let start = start(project, &variant.binary);
            variant.starts.push(start.with_context(|| format!("{} does not start", variant.about))?);
        }
    }
    Ok(Findings {
        about: format!(
            "The start of {FUNCTION} until it asks for its first event, {STARTS} times by turns for each row: the median and the \
             quickest, the median of the processor's time, the most memory that it had by then; its size, stripped; the \
             processor's time to build it with all its dependencies."
        ),
        columns: ["", "start", "quickest", "processor", "memory", "size", "build"].map(String::from).into(),
        rows: variants.into_iter().map(Variant::row).collect::<Result<_>>()?,
    })
}

fn variants(project: &Project) -> Result<Vec<Variant>> {
    let build = |about, folder: &str, settings: &[(&str, &str)]| {
        let (path, time) = build(project, folder, settings)?;
        Ok::<Variant, anyhow::Error>(Variant::new(about, path, Some(time)))
    };
    let as_it_is = build("as it is", "as-it-is", &[])?;
    let optimised = build("`opt-level = 3`", "opt-level-3", &[("OPT_LEVEL", "3")])?;
    let linked = build("fat LTO, one codegen unit", "lto", &[("LTO", "fat"), ("CODEGEN_UNITS", "1")])?;
    let mut reading =
        Variant::new("reads all the system's certificate authorities", as_it_is.binary.path.clone(), None);
    let known = AUTHORITIES.into_iter().find(|(file, _)| Path::new(file).exists());
    let (file, folder) = known.context("the certificate authorities of this system are nowhere known")?;
    reading.binary.variables.extend([("SSL_CERT_FILE", file), ("SSL_CERT_DIR", folder)].map(owned));
    let smallest = Variant::new("a program that only asks", smallest(project)?, None);
    Ok(vec![as_it_is, reading, optimised, linked, smallest])
}

fn owned((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// Builds the function with those settings of the profile; its path, and the processor's time that it took the first time, from
/// nothing.
fn build(project: &Project, folder: &str, settings: &[(&str, &str)]) -> Result<(PathBuf, Duration)> {
    let venvs = Venvs::ready(project)?;
    let target = project.root.join("target/bench/start").join(folder);
    fs::create_dir_all(&target)?;
    let mut build = project.command("cargo");
    build.current_dir(project.root.join("crates/fleet")).args(["lambda", "build", "--release", "--bin", FUNCTION]);
    build.env("PATH", venvs.build.path()).env("CARGO_TARGET_DIR", &target);
    build.envs(settings.iter().map(|(name, value)| (format!("CARGO_PROFILE_RELEASE_{name}"), value)));
    let settings = settings.iter().map(|(name, value)| format!("{name}={value} ")).collect::<String>();
    let _lock = project.lock_releases()?;
    let step = Step::start(format!("$ {settings}{}", project.line(&build)));
    let before = time_of_children()?;
    project.processes.run("`cargo lambda build`", &mut build, &target.join("build.log"))?;
    let mut time = time_of_children()?.saturating_sub(before);
    step.done();
    let first = target.join("first-build-seconds");
    match fs::read_to_string(&first) {
        Ok(seconds) => time = Duration::from_secs(seconds.trim().parse()?),
        Err(_) => fs::write(&first, time.as_secs().to_string())?,
    }
    Ok((target.join("lambda").join(FUNCTION).join("bootstrap"), time))
}

/// The processor's time that ended children and theirs have had.
fn time_of_children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(microseconds.try_into()?))
}

fn smallest(project: &Project) -> Result<PathBuf> {
    let folder = project.root.join("target/bench/start");
    let (source, program) = (folder.join("smallest.rs"), folder.join("smallest"));
    fs::write(&source, SMALLEST)?;
    let mut compile = project.command("rustc");
    compile.args(["--edition", "2024", "-C", "opt-level=s", "-C", "strip=symbols", "-o"]).arg(&program).arg(&source);
    project.processes.run("`rustc`", &mut compile, &folder.join("smallest.log"))?;
    Ok(program)
}

fn start(project: &Project, binary: &Binary) -> Result<Start> {
    let mut running = binary.start(project)?;
    let _question = running.question()?;
    let time = running.began.elapsed();
    Ok(Start { time, processor: running.processor_time()?, memory: running.memory()? })
}

impl Variant {
    fn new(about: &'static str, path: PathBuf, build: Option<Duration>) -> Self {
        let variables = BTreeMap::from(VARIABLES.map(owned));
        Self { about, binary: Binary { name: FUNCTION.to_owned(), path, variables }, build, starts: Vec::new() }
    }

    fn row(self) -> Result<Vec<String>> {
        let milliseconds = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1000.0);
        let of = |what: fn(&Start) -> Duration| self.starts.iter().map(what).collect::<Vec<_>>();
        let memory = self.starts.iter().map(|start| start.memory).max().unwrap_or_default();
        Ok(vec![
            self.about.to_owned(),
            milliseconds(median(of(|start| start.time))),
            milliseconds(of(|start| start.time).into_iter().min().unwrap_or_default()),
            milliseconds(median(of(|start| start.processor))),
            format!("{:.1} MiB", as_mebibytes(memory)),
            format!("{:.1} MiB", as_mebibytes(fs::metadata(&self.binary.path)?.len())),
            self.build.map_or_else(|| "-".to_owned(), |time| format!("{} s", time.as_secs())),
        ])
    }
}
