//! Jobs on premises, end to end: the deployed template, the real Lambda binaries, real MQTT over TLS.
//!
//! `cargo xtask test` runs them; they need its local cloud.
#![allow(clippy::unwrap_used)]

use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sfn::types::ExecutionStatus::{Failed, Running, Succeeded};
use protocol::on_premises::{Lease, Verdict, WorkerMessage, WorkerReply, WorkerResult, answers_topic, replies_topic};
use protocol::{Tenant, WorkerName};
use rumqttc::QoS;
use serde_json::{Value, json};
use tests::{Cloud, PlainWorker, Pushed, WorkerProcess, await_job, eventually, saw, statuses};

fn error_of(ended: &Pushed) -> (&str, &str) {
    (&ended.error.0, &ended.error.1)
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_plain_worker_that_adds_and_echoes() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let mut worker = PlainWorker::connect(&cloud, "tenant1").await;
    // The contract's own example; the default tenant.
    let sum = cloud.start_job(&json!({"a": 15, "b": 42})).await;
    let job = worker.job().await;
    assert_eq!((job.input.get(), &job.handler), (r#"{"a":15,"b":42}"#, &None));
    let described = cloud.ended_push(&sum);
    for _ in 0..2 {
        worker.answer(&job, json!(57)).await;
    }
    let ended = described.await;
    assert_eq!(ended.status, Succeeded, "{ended:?}");
    assert_eq!(ended.output, json!({"a": 15, "b": 42, "lambdaOutput": {"result": 57}}));

    // What it is told of whom and what is not part of the input; a result may be anything, null included.
    for (handler, result) in [(Some("report"), json!(null)), (None, json!({"x": [1, "y", false]}))] {
        let mut input = json!({"tenant": "tenant1"});
        if let Some(handler) = handler {
            input["handler"] = handler.into();
        }
        let arn = cloud.start_job(&input).await;
        let job = worker.job().await;
        assert_eq!((job.input.get(), job.handler.as_ref().map(protocol::HandlerName::as_str)), ("{}", handler));
        worker.answer(&job, result.clone()).await;
        assert_eq!(await_job(&cloud, &arn).await.output["lambdaOutput"], json!({"result": result}));
    }

    // Exceptions fail the execution under their name.
    let long = "x".repeat(40_000);
    for (exception, cause, expected) in
        [("KeyError", "", "KeyError"), ("TypeError", long.as_str(), "TypeError"), ("Throttled", "", "Worker.Throttled")]
    {
        let arn = cloud.start_job(&json!({"a": 1})).await;
        let job = worker.job().await;
        let mut answer = json!({"result": null, "TaskToken": job.task_token, "exception": exception});
        if !cause.is_empty() {
            answer["cause"] = cause.into();
        }
        worker.say(&answer).await;
        let ended = await_job(&cloud, &arn).await;
        assert_eq!((ended.status, ended.error.0.as_str()), (Failed, expected));
        // Name and cause travel together, and are cut together.
        let room = 32_768 - json!({"exception": expected, "cause": ""}).to_string().len();
        assert_eq!(ended.error.1.len(), cause.len().min(room));
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_answer_that_cannot_be_read_fails_its_job_at_once() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let mut worker = PlainWorker::connect(&cloud, "tenant1").await;
    let deep = format!("{}{}", "[".repeat(65), "]".repeat(65));
    for (answer, exception, cause) in [
        (r#"{"result": NaN, "TaskToken": "HANDLE"}"#, "InvalidAnswer", "the worker's answer cannot be read: "),
        ("{'result': 57, 'TaskToken': 'HANDLE'}", "InvalidAnswer", "the worker's answer cannot be read: "),
        (&format!(r#"{{"result": {deep}, "TaskToken": "HANDLE"}}"#), "InvalidAnswer", "nested deeper"),
        (
            r#"{"result": null, "TaskToken": "HANDLE", "exception": {"type": "KeyError", "message": "b"}}"#,
            "KeyError",
            r#"{"type": "KeyError", "message": "b"}"#,
        ),
        (r#"{"TaskToken": "HANDLE", "exception": ["b"]}"#, "UnnamedException", r#"["b"]"#),
    ] {
        let arn = cloud.start_job(&json!({"a": 1})).await;
        let job = worker.job().await;
        worker.say_text(&answer.replace("HANDLE", &job.task_token)).await;
        let ended = await_job(&cloud, &arn).await;
        let (name, said) = error_of(&ended);
        assert!(name == exception && said.contains(cause), "{answer}: {name}: {said}");
    }
}

/// As text: what parses it here is not to be trusted either.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn numbers_come_back_as_they_went() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant2").await;
    let _worker = WorkerProcess::start(&cloud, "tenant2", "worker-1", &handler("echo", "cat", "")).await;
    for (more, results) in [
        (r#""a":117.63331139400017,"b":0"#, &["117.63331139400017"][..]),
        (r#""a":123456789012345678901234567890,"b":1"#, &["123456789012345678901234567891"]),
        (
            r#""handler":"echo","z":[117.63331139400017,0.1],"a":-9223372036854775809,"m":18446744073709551616"#,
            &["117.63331139400017", "0.1", "-9223372036854775809", "18446744073709551616"],
        ),
    ] {
        let arn = cloud.start_job_of(&format!(r#"{{"tenant":"tenant2",{more}}}"#)).await;
        let ended = await_job(&cloud, &arn).await;
        assert_eq!(ended.status, Succeeded, "{ended:?}");
        let describe = cloud.step_functions.describe_execution().execution_arn(&arn);
        let output = describe.send().await.unwrap().output.unwrap();
        let (_, result) = output.split_once("lambdaOutput").unwrap();
        let numbers: Vec<_> = result.split(|c: char| !(c.is_ascii_digit() || "-.eE+".contains(c))).collect();
        assert!(results.iter().all(|number| numbers.contains(number)), "{more}: {output}");
        let places: Vec<_> = ["\"z\"", "\"a\"", "\"m\""].iter().filter_map(|name| result.find(name)).collect();
        assert!(places.is_sorted(), "{output}");
    }
}

/// The address is good for an hour; the result that counts is read later, by the execution or by people.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_uploaded_result_cannot_be_exchanged() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let mut worker = Claimant::connect(&cloud, "tenant1", "uploader").await;
    let arn = cloud.start_job(&json!({"tenant": "tenant1"})).await;
    let job = worker.worker.job().await;
    let Verdict::Granted { fence, .. } = worker.claim(&job, "1").await else { panic!("not granted") };
    let good = format!("\"{}\"", "x".repeat(300_000));
    let (lease, bytes) = (worker.lease(fence), good.len() as u64);
    let upload = WorkerMessage::Upload { lease: lease.clone(), request: "2".into(), bytes };
    worker.worker.tell(&job, &upload).await;
    let Verdict::Upload { url, headers } = worker.reply().await else { panic!("no address") };
    assert_eq!(headers.get("if-none-match").map(String::as_str), Some("*"));
    let http = reqwest::Client::new();
    let put = async |text: &str, left_out: &str| {
        let mut put = http.put(&url).body(text.to_owned());
        for (name, value) in
            headers.iter().filter(|(name, _)| !["host", "content-length", left_out].contains(&name.as_str()))
        {
            put = put.header(name, value);
        }
        put.send().await.unwrap().status().as_u16()
    };
    assert_eq!(put(&good, "").await, 200);
    let result = WorkerResult::Object { bytes };
    worker.worker.tell(&job, &WorkerMessage::Succeeded { result, lease: Some(lease) }).await;
    let ended = await_job(&cloud, &arn).await;
    let bad = good.replace('x', "y");
    assert_eq!(put(&bad, "").await, 412);
    // The signature is of the condition as well.
    assert_eq!(put(&bad, "if-none-match").await, 403);
    let uri = ended.output["lambdaOutput"]["resultS3Uri"].as_str().unwrap_or_else(|| panic!("{ended:?}"));
    let (bucket, key) = uri.strip_prefix("s3://").unwrap().split_once('/').unwrap();
    let object = cloud.s3.get_object().bucket(bucket).key(key).send().await.unwrap().body.collect().await.unwrap();
    assert_eq!(object.into_bytes(), good.as_bytes());
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn answers_that_answer_nothing_change_nothing() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant2").await;
    let mut worker = PlainWorker::connect(&cloud, "tenant2").await;
    let arn = cloud.start_job(&json!({"tenant": "tenant2", "a": 1, "b": 2})).await;
    let job = worker.job().await;
    let (operation, secret) = job.task_token.rsplit_once('.').unwrap();
    let guess: String = secret.chars().rev().collect();
    // Unknown handles, and the right one on another tenant's topic.
    for handle in ["nothing", "a.b", &format!("{operation}.{guess}")] {
        worker.say(&json!({"result": 666, "TaskToken": handle})).await;
    }
    let other: Tenant = "tenant1".parse().unwrap();
    let answer = json!({"result": 666, "TaskToken": job.task_token}).to_string().into_bytes();
    // Its certificate does not let a worker speak there.
    let publish = cloud.mqtt.publish().topic(answers_topic(&other)).qos(1).payload(answer.into());
    publish.send().await.unwrap();
    // What cannot be read is kept.
    let mark = uuid::Uuid::new_v4().to_string();
    for payload in [
        json!({"result": null, "TaskToken": null, "exception": format!("JSONDecodeError {mark}")}),
        json!({"TaskToken": job.task_token, "mark": mark}),
        json!({"TaskToken": job.task_token, "heartbeat": "yes", "mark": mark}),
    ] {
        worker.say(&payload).await;
        let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, payload.to_string());
        assert_eq!(cloud.dead_letter(&text).await, "MalformedMessage", "{payload}");
    }
    // It is known that a worker of the tenant could not read its job, should one time out.
    let get = cloud.dynamodb.get_item().table_name(cloud.output("WorkerJobsTableName"));
    let get = get.key("job", AttributeValue::S("tenant2".into())).consistent_read(true);
    let unread = get.send().await.unwrap().item.unwrap();
    assert_eq!(unread["exception"].as_s().unwrap(), &format!("JSONDecodeError {mark}"));
    assert!(unread["answeredAt"].as_n().unwrap().parse::<i64>().unwrap() > 1_700_000_000_000);
    for queue in ["Tenant2AnswersQueue", "Tenant1AnswersQueue"] {
        eventually("all is handled", || async { cloud.is_drained(queue).await.then_some(()) }).await;
    }
    let describe = cloud.step_functions.describe_execution().execution_arn(&arn);
    assert_eq!(describe.send().await.unwrap().status, Running);
    worker.answer(&job, json!(3)).await;
    assert_eq!(await_job(&cloud, &arn).await.output["lambdaOutput"], json!({"result": 3}));

    // What no worker ever gets.
    for (input, cause) in [
        (json!({"tenant": "tenant9"}), "tenant: got tenant9, expected one of tenant1, "),
        (json!({"tenant": "a/b"}), "is no tenant"),
        (json!({"handler": "a b"}), "is no handler name"),
        (json!({"a": "x".repeat(246_000)}), "input: got 246008 bytes, expected at most 245760 bytes"),
    ] {
        let ended = await_job(&cloud, &cloud.start_job(&input).await).await;
        let (name, message) = error_of(&ended);
        assert!(name == "InvalidInput" && message.contains(cause), "{name}: {message}");
    }
}

/// The token of the state that waits for a job.
async fn waiting_token(cloud: &Cloud, tenant: &str, handle: &str) -> String {
    let (operation, _) = handle.rsplit_once('.').unwrap();
    let get = cloud.dynamodb.get_item().table_name(cloud.output("WorkerJobsTableName"));
    let get = get.key("job", AttributeValue::S(format!("{tenant}#{operation}"))).consistent_read(true);
    get.send().await.unwrap().item.unwrap()["taskToken"].as_s().unwrap().clone()
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_job_without_a_sign_of_life_is_sent_again() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant2").await;
    let mut worker = PlainWorker::connect(&cloud, "tenant2").await;
    let arn = cloud.start_job(&json!({"tenant": "tenant2", "a": 1, "b": 2})).await;
    let first = worker.job().await;
    let token = waiting_token(&cloud, "tenant2", &first.task_token).await;
    let again = worker.job().await;
    assert_eq!(first.task_token, again.task_token, "the same job");
    // The state's token, which no worker sees, is of an attempt.
    assert_ne!(waiting_token(&cloud, "tenant2", &again.task_token).await, token);
    let late = cloud.step_functions.send_task_success().task_token(token).output("3").send().await;
    late.expect_err("an attempt that has ended takes no answer");
    worker.answer(&first, json!(3)).await;
    assert_eq!(await_job(&cloud, &arn).await.output["lambdaOutput"], json!({"result": 3}));
}

/// A worker with leases, spoken by hand.
struct Claimant {
    worker: PlainWorker,
    name: WorkerName,
}

impl Claimant {
    async fn connect(cloud: &Cloud, tenant: &str, name: &str) -> Self {
        let mut worker = PlainWorker::connect(cloud, tenant).await;
        let name: WorkerName = name.parse().unwrap();
        worker.client.subscribe(replies_topic(&worker.tenant, &name), QoS::AtLeastOnce).await;
        Self { worker, name }
    }

    async fn reply(&mut self) -> Verdict {
        loop {
            let message = self.worker.client.message().await;
            if message.topic.ends_with(self.name.as_str()) {
                return WorkerReply::decode(&message.payload).unwrap().verdict;
            }
        }
    }

    async fn claim(&mut self, job: &protocol::on_premises::JobMessage, request: &str) -> Verdict {
        let claim = WorkerMessage::Claim { worker: self.name.clone(), request: request.to_owned() };
        self.worker.tell(job, &claim).await;
        self.reply().await
    }

    fn lease(&self, fence: u64) -> Lease {
        Lease { worker: self.name.clone(), fence }
    }

    async fn succeed(&self, job: &protocol::on_premises::JobMessage, fence: u64, result: Value) {
        let lease = Some(self.lease(fence));
        self.worker.tell(job, &WorkerMessage::Succeeded { result: PlainWorker::value(result), lease }).await;
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn one_of_two_workers_runs_a_job_and_the_other_takes_over() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let mut first = Claimant::connect(&cloud, "tenant1", "first").await;
    let mut second = Claimant::connect(&cloud, "tenant1", "second").await;
    let arn = cloud.start_job(&json!({"tenant": "tenant1", "a": 1, "b": 2})).await;
    let job = first.worker.job().await;
    assert_eq!(second.worker.job().await, job);
    let Verdict::Granted { fence: 1, lease_milliseconds: 15_000, input_url: None } = first.claim(&job, "1").await
    else {
        panic!("not granted")
    };
    // It dies; the other asks again when it is told to.
    let fence = loop {
        match second.claim(&job, "2").await {
            Verdict::Held { retry_milliseconds } => {
                tokio::time::sleep(std::time::Duration::from_millis(retry_milliseconds)).await;
            }
            Verdict::Granted { fence, .. } => break fence,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(fence, 2);
    // It was only slow: it is told, and what it says does not count.
    first.succeed(&job, 1, json!("stale")).await;
    assert_eq!(first.reply().await, Verdict::Lost);
    second.succeed(&job, 2, json!(3)).await;
    assert_eq!(await_job(&cloud, &arn).await.output["lambdaOutput"], json!({"result": 3}));
    assert_eq!(first.claim(&job, "3").await, Verdict::Over);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn signs_of_life_prolong_a_job_but_not_beyond_its_deadline() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let mut worker = PlainWorker::connect(&cloud, "tenant1").await;
    let arn = cloud.start_job(&json!({"tenant": "tenant1", "a": 1, "b": 2})).await;
    let job = worker.job().await;
    let begin = std::time::Instant::now();
    // More often than it must, until the execution has ended all the same.
    let ended = loop {
        worker.say(&json!({"TaskToken": job.task_token, "heartbeat": true, "progress": 50})).await;
        let described = cloud.step_functions.describe_execution().execution_arn(&arn).send().await.unwrap();
        if described.status != Running {
            break await_job(&cloud, &arn).await;
        }
        assert!(begin.elapsed() < tests::PATIENCE, "it runs for ever: {described:?}");
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    };
    assert_eq!(error_of(&ended), ("WorkerTimedOut", "the job took longer than it may"));
    // Too late for anything.
    let late = json!({"result": 3, "TaskToken": job.task_token});
    worker.say(&late).await;
    eventually("all is handled", || async { cloud.is_drained("Tenant1AnswersQueue").await.then_some(()) }).await;
    let text = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, late.to_string());
    assert_eq!(cloud.dead_letters(&text).await, 0);
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_schedule_starts_its_job_once() {
    let cloud = Cloud::connect().await;
    let time = format!("2026-11-24T03:00:00Z {}", uuid::Uuid::new_v4());
    // A tenant that does not exist: no worker is needed to see it end.
    let body = json!({"scheduledTime": time, "input": {"tenant": "nobody", "mark": time}}).to_string();
    let queue = cloud.queue_url("JobSchedulesQueue").await;
    for _ in 0..2 {
        cloud.sqs.send_message().queue_url(&queue).message_body(&body).send().await.unwrap();
    }
    eventually("both are handled", || async { cloud.is_drained("JobSchedulesQueue").await.then_some(()) }).await;
    let executions = eventually("the job is started", || async {
        let list = cloud.step_functions.list_executions().state_machine_arn(cloud.output("OnPremisesJobArn"));
        let all = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.unwrap();
        saw(format!("executions: {}", statuses(&all)));
        let mut ours = Vec::new();
        for one in all.into_iter().filter(|one| one.name.starts_with("scheduled-")) {
            let describe = cloud.step_functions.describe_execution().execution_arn(&one.execution_arn);
            let input = describe.send().await.unwrap().input.unwrap_or_default();
            ours.extend(input.contains(&time).then_some(one));
        }
        (!ours.is_empty()).then_some(ours)
    })
    .await;
    assert_eq!(executions.len(), 1, "{executions:?}");
}

/// A handler of `worker.toml` that is a line of shell.
fn handler(name: &str, script: &str, more: &str) -> String {
    let arguments = json!(["-c", script]);
    format!("[handlers.{name}]\nprogram = \"/bin/sh\"\narguments = {arguments}\nenvironment = [\"PATH\"]\n{more}\n")
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_worker_runs_programs_good_and_bad() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant2").await;
    let handlers = [
        handler("echo", "cat", "output_limit = 4194304"),
        handler("large", "printf '\"'; head -c 1048574 /dev/zero | tr '\\0' x; printf '\"'", "output_limit = 4194304"),
        handler("larger", "printf '\"'; head -c 3000000 /dev/zero | tr '\\0' x; printf '\"'", "output_limit = 4194304"),
        handler("medium", "printf '\"'; head -c 140000 /dev/zero | tr '\\0' x; printf '\"'", ""),
        handler("hang", "sleep 600", "timeout = \"2s\""),
        handler("flood", "yes", "output_limit = 1000"),
        handler("crash", "kill -SEGV $$", ""),
        handler("broken", "echo nonsense", ""),
        handler("refuse", "echo '{\"exception\": \"OutOfPaper\", \"cause\": \"tray 2\"}'; exit 7", ""),
    ]
    .concat();
    let mut worker = WorkerProcess::start(&cloud, "tenant2", "worker-1", &handlers).await;
    let input = |handler: &str, more: Value| {
        let mut input = json!({"tenant": "tenant2", "handler": handler});
        input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        input
    };
    // Too large for a message, small enough for the output of an execution together with its result.
    let text = "y".repeat(100_000);
    let big = "y".repeat(150_000);
    let cases = [
        ("add", json!({"a": 15, "b": 42}), Ok(json!(57))),
        ("add", json!({"a": "x", "b": "y"}), Ok(json!("xy"))),
        ("add", json!({"a": 15}), Err("KeyError")),
        ("add", json!({"a": 15, "b": "y"}), Err("TypeError")),
        ("echo", json!({"text": text}), Ok(json!({"text": text}))),
        // Too large for a message, but not for an output: nobody sees that it went another way.
        ("medium", json!({}), Ok(json!("x".repeat(140_000)))),
        ("hang", json!({}), Err("ProgramTimedOut")),
        ("flood", json!({}), Err("OutputTooLarge")),
        ("crash", json!({}), Err("ProgramFailed")),
        ("broken", json!({}), Err("InvalidOutput")),
        ("refuse", json!({}), Err("OutOfPaper")),
        ("nobody", json!({}), Err("UnknownHandler")),
        ("larger", json!({}), Err("ResultTooLarge")),
    ];
    let starts = cases.iter().map(|(name, more, _)| async { cloud.start_job(&input(name, more.clone())).await });
    let executions = futures_util::future::join_all(starts).await;
    let large = cloud.start_job(&input("large", json!({}))).await;
    let stored = cloud.start_job(&input("echo", json!({"text": big}))).await;
    for ((name, _, expected), arn) in cases.iter().zip(executions) {
        let ended = await_job(&cloud, &arn).await;
        match expected {
            Ok(result) => {
                assert_eq!(ended.output["lambdaOutput"], json!({"result": result}), "{name}: {:?}", ended.error);
            }
            Err(error) => assert_eq!(ended.error.0, *error, "{name}: {ended:?}"),
        }
    }
    // 1 MiB does not fit into an execution's output, nor does an input of 150,000 characters twice.
    for (arn, bytes) in [(large, 1_048_576), (stored, 150_011)] {
        let ended = await_job(&cloud, &arn).await;
        let output = &ended.output["lambdaOutput"];
        assert_eq!((&output["result"], &output["resultBytes"]), (&Value::Null, &json!(bytes)), "{:?}", ended.error);
        let uri = output["resultS3Uri"].as_str().unwrap();
        let (bucket, key) = uri.strip_prefix("s3://").unwrap().split_once('/').unwrap();
        let object = cloud.s3.get_object().bucket(bucket).key(key).send().await.unwrap().body.collect().await.unwrap();
        assert_eq!(object.into_bytes().len(), bytes);
    }
    assert_eq!(worker.drain().await.code(), Some(0));
}

/// Says that it has begun, and then waits for a sign.
const PATIENT: &str = "echo begun >> begun; while ! test -e go; do sleep 0.2; done; echo '{\"done\": true}'";

fn begun(worker: &WorkerProcess) -> usize {
    let count = std::fs::read_to_string(worker.work("begun")).unwrap_or_default().lines().count();
    saw(format!("begun {count} times; {}", worker.last_words()));
    count
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_worker_that_dies_is_replaced_by_the_other() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant2").await;
    let patient = handler("patient", PATIENT, "");
    let mut workers = [
        WorkerProcess::start(&cloud, "tenant2", "worker-1", &patient).await,
        WorkerProcess::start(&cloud, "tenant2", "worker-2", &patient).await,
    ];
    let arn = cloud.start_job(&json!({"tenant": "tenant2", "handler": "patient"})).await;
    let first =
        eventually("a worker runs the job", || async { workers.iter().position(|worker| begun(worker) > 0) }).await;
    workers[first].kill();
    let second = 1 - first;
    eventually("the other runs it", || async { (begun(&workers[second]) > 0).then_some(()) }).await;
    // The first one comes back, and does nothing.
    workers[first].restart();
    std::fs::write(workers[second].work("go"), "").unwrap();
    // Its program is still there: it ends as well.
    std::fs::write(workers[first].work("go"), "").unwrap();
    let ended = await_job(&cloud, &arn).await;
    assert_eq!(ended.output["lambdaOutput"], json!({"result": {"done": true}}), "{ended:?}");
    for worker in &mut workers {
        assert_eq!(worker.drain().await.code(), Some(0));
        assert_eq!(begun(worker), 1);
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_worker_drains_and_takes_up_what_came_while_it_was_away() {
    let cloud = Cloud::connect().await;
    let _alone = tests::alone("tenant1").await;
    let patient = handler("patient", PATIENT, "");
    let mut worker = WorkerProcess::start(&cloud, "tenant1", "worker-1", &patient).await;
    let running = cloud.start_job(&json!({"tenant": "tenant1", "handler": "patient"})).await;
    eventually("the worker runs the job", || async { (begun(&worker) > 0).then_some(()) }).await;
    let go = worker.work("go");
    let (status, ()) = tokio::join!(worker.drain(), async {
        std::fs::write(go, "").unwrap();
    });
    assert_eq!(status.code(), Some(0));
    assert_eq!(await_job(&cloud, &running).await.output["lambdaOutput"], json!({"result": {"done": true}}));
    // Nobody is there: it waits in the session, and is done once, however often it is sent.
    let waiting = cloud.start_job(&json!({"tenant": "tenant1", "a": [1], "b": [2]})).await;
    worker.restart();
    assert_eq!(await_job(&cloud, &waiting).await.output["lambdaOutput"], json!({"result": [1, 2]}));
    // Killed in the middle, it begins again what it was doing.
    std::fs::remove_file(worker.work("go")).unwrap();
    let killed = cloud.start_job(&json!({"tenant": "tenant1", "handler": "patient"})).await;
    eventually("the worker runs the job", || async { (begun(&worker) == 2).then_some(()) }).await;
    worker.kill();
    std::fs::write(worker.work("go"), "").unwrap();
    worker.restart();
    assert_eq!(await_job(&cloud, &killed).await.output["lambdaOutput"], json!({"result": {"done": true}}));
    assert_eq!(begun(&worker), 3);
}
