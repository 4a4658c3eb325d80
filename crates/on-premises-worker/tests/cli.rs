//! The worker's program from the outside.

use std::fs;
use std::io::Write;
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
    assert!(stderr(&start).contains("certificate.pem"), "{}", stderr(&start));
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
    // The order of the fields depends on the libraries that are built with it.
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
fn the_log_can_be_json() {
    let folder = tempfile::tempdir().unwrap();
    let script = "[handlers.talk]\nprogram = 'sh'\narguments = ['-c', 'echo hello >&2; echo 1']";
    let file = config(folder.path(), script);
    let output = run_with_input(&["job", "--config", &file, "talk", "--log-format", "json"], "1");
    let log = stderr(&output);
    let line: serde_json::Value = serde_json::from_str(log.lines().next().expect("a line")).expect("JSON");
    assert_eq!(line["line"], "hello", "{log}");
}
