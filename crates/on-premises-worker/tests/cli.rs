//! The worker's program from the outside.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const LEAST: &str = "tenant = 'tenant1'\nworker = 'w'\nendpoint = 'localhost'\ncertificate = 'certificate.pem'\nprivate_key = 'private.key'\n";

fn worker(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_on-premises-worker"));
    command.args(args).env_remove("WORKER_CONFIG").env_remove("WORKER_LOG_FORMAT").env_remove("RUST_LOG");
    command
}

fn run(args: &[&str]) -> Output {
    worker(args).output().expect("the program to start")
}

fn run_with_input(args: &[&str], input: &str) -> Output {
    let mut command = worker(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program to start");
    // A program that fails before it reads closes the pipe.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    child.wait_with_output().expect("the program to end")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A program that is a line of shell, and runs `cat` unless it is told otherwise.
const CAT: &str = "[handlers.cat]\nprogram = 'cat'";

/// A configuration with these lines too.
fn config(folder: &Path, more: &str) -> String {
    let file = folder.join("worker.toml");
    fs::write(&file, format!("{LEAST}{more}")).expect("written");
    file.to_str().expect("a path in UTF-8").to_owned()
}

#[test]
fn help_is_no_failure() {
    for command in [&[][..], &["run"], &["check"], &["job"]] {
        let output = run(&[command, &["--help"]].concat());
        assert_eq!(output.status.code(), Some(0), "{command:?}: {}", stderr(&output));
    }
    assert_eq!(run(&[]).status.code(), Some(2));
}

#[test]
fn a_bad_configuration_is_wrong_usage_and_an_unreadable_one_cannot_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), "concurrency = 0");
    for command in ["run", "check"] {
        let output = run(&[command, "--config", &file]);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("concurrency: got 0, expected 1 to 1000"), "{}", stderr(&output));
    }
    let output = run(&["run", "--config", "/nonexistent/worker.toml"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert_eq!(run(&["check", "--config", "/nonexistent/worker.toml"]).status.code(), Some(2));
}

#[test]
fn missing_certificates_and_programs_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), "[handlers.report]\nprogram = '/nonexistent/report'");
    let check = run(&["check", "--config", &file]);
    assert_eq!(check.status.code(), Some(2));
    assert!(stderr(&check).contains("handlers.report.program: /nonexistent/report is no executable file"));
    assert!(stdout(&check).contains("handler add: built in"), "{}", stdout(&check));
    let start = run(&["run", "--config", &file]);
    assert_eq!(start.status.code(), Some(3));
    assert!(stderr(&start).contains("private.key cannot be read"), "{}", stderr(&start));
}

#[test]
fn a_handler_can_be_tried() {
    let folder = tempfile::tempdir().unwrap();
    let script = "[handlers.fail]\nprogram = 'sh'\narguments = ['-c', 'echo why >&2; exit 3']";
    let file = config(folder.path(), script);
    let job = |handler: &str, input: &str| run_with_input(&["job", "--config", &file, handler], input);
    let output = job("add", r#"{"a": 15, "b": 42}"#);
    assert_eq!((output.status.code(), stdout(&output).trim()), (Some(0), "57"), "{}", stderr(&output));
    let output = job("add", r#"{"a": 15}"#);
    assert_eq!(output.status.code(), Some(1));
    let answer = |output: &Output| serde_json::from_str::<serde_json::Value>(&stdout(output)).expect("JSON");
    assert_eq!(answer(&output), serde_json::json!({"exception": "KeyError", "cause": "'b'"}));
    let output = job("fail", "1");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(answer(&output), serde_json::json!({"exception": "ProgramFailed", "cause": "exit code 3: why"}));
    let output = job("other", "1");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("other is no handler: expected one of add, fail"), "{}", stderr(&output));
    assert_eq!(job("add", "nothing").status.code(), Some(2));
}

#[test]
fn numbers_come_back_as_they_went() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), CAT);
    let job = |handler: &str, input: &str| {
        let output = run_with_input(&["job", "--config", &file, handler], input);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output).trim().to_owned()
    };
    for (input, sum) in [
        // A public case: serde-rs/json #1336.
        (include_str!("../../../tests/fixtures/cases/worker-float-input.json").trim(), "117.63331139400017"),
        (r#"{"b":1,"a":123456789012345678901234567890}"#, "123456789012345678901234567891"),
        (r#"{"z":[1.0,1E400,0.10],"b":-9223372036854775808,"a":-1}"#, "-9223372036854775809"),
    ] {
        assert_eq!(job("cat", input), input);
        assert_eq!(job("add", input), sum);
    }
}

#[test]
fn a_key_that_everybody_can_read_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), "");
    let key = folder.path().join("private.key");
    fs::write(&key, "").unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    for (command, status) in [("check", 2), ("run", 3)] {
        let output = run(&[command, "--config", &file]);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert!(stderr(&output).contains("private.key has mode 0644"), "{}", stderr(&output));
    }
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let output = run(&["check", "--config", &file]);
    assert!(stderr(&output).contains("certificate.pem"), "the next thing that is missing: {}", stderr(&output));
}

#[test]
fn programs_do_not_run_beside_the_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(
        folder.path(),
        "[handlers.here]\nprogram = 'sh'\narguments = ['-c', 'printf \\\"; pwd | tr -d \"\\n\"; printf \\\"']",
    );
    let output = run_with_input(&["job", "--config", &file, "here"], "1");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stdout(&output).trim(), format!("\"{}\"", folder.path().join("journal/work").display()));
    let file = config(folder.path(), "[handlers.here]\nprogram = 'sh'\nfolder = '.'");
    let output = run(&["check", "--config", &file]);
    assert!(
        output.status.code() == Some(2) && stderr(&output).contains("holds the private key"),
        "{}",
        stderr(&output)
    );
}

/// The limits are of the service with all of its programs, and what uses too much ends alone.
#[test]
fn the_service_is_limited() {
    let unit = include_str!("../on-premises-worker.service");
    for line in ["MemoryMax=", "TasksMax=", "OOMPolicy=continue", "KillSignal=SIGTERM", "KillMode=mixed", "UMask=0077"]
    {
        assert!(unit.lines().any(|found| found.starts_with(line)), "{line}");
    }
}

#[test]
fn the_log_can_be_json() {
    let folder = tempfile::tempdir().unwrap();
    let script = "[handlers.talk]\nprogram = 'sh'\narguments = ['-c', 'echo hello >&2; echo 1']";
    let file = config(folder.path(), script);
    let output = run_with_input(&["job", "--config", &file, "talk", "--log-format", "json"], "1");
    let log = stderr(&output);
    let line: serde_json::Value = serde_json::from_str(log.lines().next().expect("a line")).expect("JSON");
    assert_eq!(line["line"], "hello", "{log}");
}
