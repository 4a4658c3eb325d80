//! The simulator's program from the outside.

use std::process::{Command, Output};

fn simulator(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_device-simulator")).args(args).output().expect("the program to start")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn help_is_no_failure() {
    for command in [&[][..], &["provision"], &["run"], &["settings-api"], &["cleanup"]] {
        let output = simulator(&[command, &["--help"]].concat());
        assert_eq!(output.status.code(), Some(0), "{command:?}: {}", stderr(&output));
    }
}

#[test]
fn a_bad_fault_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = folder.path().to_str().unwrap();
    let run = ["run", "--certificates", certificates, "--endpoint", "localhost", "--fail"];
    let output = simulator(&[&run[..], &["bot=3"]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("\"bot=3\": \"bot\" is no kind of fault"), "{}", stderr(&output));
}

#[test]
fn a_folder_without_devices_is_wrong_usage_and_a_missing_one_cannot_run() {
    let folder = tempfile::tempdir().unwrap();
    let empty = simulator(&["run", "--certificates", folder.path().to_str().unwrap(), "--endpoint", "localhost"]);
    assert_eq!(empty.status.code(), Some(2), "{}", stderr(&empty));
    assert!(stderr(&empty).contains("holds no device"));
    let missing = simulator(&["run", "--certificates", "/nonexistent", "--endpoint", "localhost"]);
    assert_eq!(missing.status.code(), Some(3), "{}", stderr(&missing));
    assert!(stderr(&missing).contains("/nonexistent"));
}

#[test]
fn a_bad_attribute_and_a_bad_count_of_failing_updates_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = folder.path().to_str().unwrap();
    let provision = ["provision", "--count", "1", "--certificates", certificates, "--attribute"];
    let run = ["run", "--certificates", certificates, "--endpoint", "localhost", "--failing-updates"];
    for (args, wrong, why) in [
        (&provision[..], "FW", "expected NAME=VALUE"),
        (&provision, "createdBy=me", "createdBy is set by the simulator itself"),
        (&provision, "a b=c", "\"a b\" is no attribute's name"),
        (&run, "some", "\"some\": expected a number of updates, or always"),
    ] {
        let output = simulator(&[args, &[wrong]].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
    }
}

#[test]
fn the_mode_of_updates_can_come_from_the_environment() {
    let folder = tempfile::tempdir().unwrap();
    for (reports, failing, is_read) in
        [("1", "always", true), ("false", "2", true), ("?", "2", false), ("1", "?", false)]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_device-simulator"));
        command.env("SIMULATOR_REPORT_UPDATES", reports).env("SIMULATOR_FAILING_UPDATES", failing);
        command.args(["run", "--endpoint", "localhost", "--certificates"]).arg(folder.path());
        let output = command.output().expect("the program to start");
        assert_eq!(stderr(&output).contains("holds no device"), is_read, "{}", stderr(&output));
    }
}
