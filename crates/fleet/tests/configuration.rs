//! A function whose environment lacks something says so to whoever invokes it, instead of ending before it has been asked.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tiny_http::{Header, Request, Response, Server};

/// Needs nothing but the Region.
const WITHOUT_VARIABLES: &str = "configure-iot";
const PATIENCE: Duration = Duration::from_mins(1);

/// A function's process, ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The next request to the Runtime API.
fn request(api: &Server, name: &str) -> Request {
    api.recv_timeout(PATIENCE).unwrap().unwrap_or_else(|| panic!("{name} has asked for nothing within {PATIENCE:?}"))
}

/// Starts a function with these variables and hands it an event.
fn start(api: &Server, name: &str, variables: &[(&str, &str)], event: &Value) -> Running {
    let program = Path::new(env!("CARGO_BIN_EXE_create-job")).with_file_name(name);
    let mut function = Command::new(program);
    function.env_clear().env("AWS_LAMBDA_RUNTIME_API", api.server_addr().to_string()).env("AWS_REGION", "eu-west-1");
    for (variable, value) in [("NAME", name), ("VERSION", "1"), ("MEMORY_SIZE", "256")] {
        function.env(format!("AWS_LAMBDA_FUNCTION_{variable}"), value);
    }
    let running = Running(function.envs(variables.iter().copied()).stdout(Stdio::null()).spawn().unwrap());
    let mut event = Response::from_string(event.to_string());
    for (header, value) in [
        ("Lambda-Runtime-Aws-Request-Id", "8476a536-e9f4-11e8-9739-2dfe598c3fcd"),
        ("Lambda-Runtime-Deadline-Ms", "4102444800000"),
        ("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:eu-west-1:000000000000:function:test"),
    ] {
        event.add_header(Header::from_bytes(header, value).unwrap());
    }
    request(api, name).respond(event).unwrap();
    running
}

/// What the function answers to an event: the last part of the path, and the body.
fn answer(name: &str) -> (String, Value) {
    let api = Server::http("127.0.0.1:0").unwrap();
    let _running = start(&api, name, &[], &json!({}));
    let mut answer = request(&api, name);
    let body = serde_json::from_reader(answer.as_reader()).unwrap();
    (answer.url().rsplit('/').next().unwrap().to_owned(), body)
}

#[test]
fn a_function_that_lacks_a_variable_says_so_to_its_caller() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let names: Vec<String> = files.map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    for name in names.iter().filter(|name| *name != WITHOUT_VARIABLES) {
        let (kind, body) = answer(name);
        let message = body["errorMessage"].as_str().unwrap_or_default();
        assert_eq!((kind.as_str(), &body["errorType"]), ("error", &Value::from("Misconfigured")), "{name}: {body}");
        assert!(message.contains("the environment variable ") && message.contains("is not set"), "{name}: {message}");
    }
    assert!(names.len() > 10);
}

/// AWS refuses updates of job executions at the SDK's default host; without the account's own, no job would ever end.
#[test]
fn job_executions_are_updated_where_the_account_has_them() {
    let event = json!({
        "eventType": "FIRMWARE_UPGRADE_SUCCESS", "jobId": "job-1", "thingName": "gateway-1", "executionNumber": 1,
        "operationId": "job-1-1", "firmwareVersion": "1.2.3",
    });
    let batch = json!({"Records": [{"messageId": "1", "body": event.to_string()}]});
    for (overrides, first_byte) in [
        // A TLS handshake (RFC 8446, 5.1) with the host, and plain requests to a local cloud.
        (None, 22),
        (Some("AWS_ENDPOINT_URL"), b'G'),
        (Some("AWS_ENDPOINT_URL_IOT_JOBS_DATA_PLANE"), b'G'),
    ] {
        let called = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = called.local_addr().unwrap().to_string();
        let url = format!("http://{host}");
        let endpoint = if overrides.is_some() { "localhost:1" } else { &host };
        let mut variables = vec![
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("DEAD_LETTER_QUEUE_URL", "http://localhost:1/queue"),
            ("JOB_NOTIFICATIONS_QUEUE_URL", "http://localhost:1/queue"),
            ("IOT_JOBS_ENDPOINT", endpoint),
        ];
        variables.extend(overrides.map(|name| (name, url.as_str())));
        let api = Server::http("127.0.0.1:0").unwrap();
        let _running = start(&api, "update-job", &variables, &batch);
        let (tell, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut first = [0];
            called.accept().unwrap().0.read_exact(&mut first).unwrap();
            tell.send(first[0])
        });
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(first_byte), "{overrides:?}");
    }
}
