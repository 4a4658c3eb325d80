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
