//! The deployed stack and what tests do with it.

use crate::{eventually, saw};
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_iot::types::JobExecutionStatus;
use aws_sdk_lambda::primitives::Blob;
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use device_simulator::provision::{DevicePolicy, ProtocolMix, ProvisionOptions, numbered, provision};
use device_simulator::{DeviceSpec, Endpoint, Faults, Fleet, FleetOptions};
use fleet::workflows::rendezvous::{Meeting, Operation};
use protocol::{OperationId, Step, ThingName};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Clients and names of the stack that `cargo xtask test` has deployed.
pub struct Cloud {
    /// What the clients are made from.
    pub config: SdkConfig,
    /// AWS IoT's registry and jobs.
    pub iot: aws_sdk_iot::Client,
    /// Publishes as the broker itself could.
    pub mqtt: aws_sdk_iotdataplane::Client,
    /// Invokes create-job.
    pub lambda: aws_sdk_lambda::Client,
    /// Shows executions.
    pub step_functions: aws_sdk_sfn::Client,
    /// Metrics and alarms.
    pub cloudwatch: aws_sdk_cloudwatch::Client,
    /// Tables.
    pub dynamodb: aws_sdk_dynamodb::Client,
    /// Queues.
    pub sqs: aws_sdk_sqs::Client,
    /// Topics.
    pub sns: aws_sdk_sns::Client,
    /// Images.
    pub s3: aws_sdk_s3::Client,
    /// The stack's name.
    stack: String,
    outputs: HashMap<String, String>,
}

/// How a job execution ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its final status.
    pub status: JobExecutionStatus,
    /// The reason that the workflow gave.
    pub reason: String,
}

impl Ended {
    /// Ended with that status and reason.
    pub fn new(status: JobExecutionStatus, reason: &str) -> Self {
        Self { status, reason: reason.to_owned() }
    }
}

/// An image in the firmware bucket.
pub struct Image {
    /// Its version.
    pub version: String,
    /// What create-job is told of it.
    pub artifact: Value,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run these tests with `cargo xtask test`"))
}

impl Cloud {
    /// Reaches the stack that the environment names.
    pub async fn connect() -> Self {
        Self::connect_to(&variable("FLEETFLOW_STACK")).await
    }

    /// Reaches the account's second stack, which shares the topics of devices.
    pub async fn connect_to_second() -> Self {
        Self::connect_to(&variable("FLEETFLOW_SECOND_STACK")).await
    }

    async fn connect_to(name: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let https = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
        let config = aws_config::defaults(BehaviorVersion::latest()).http_client(https).load().await;
        let cloudformation = aws_sdk_cloudformation::Client::new(&config);
        let stacks = cloudformation.describe_stacks().stack_name(name).send().await;
        let stack = stacks.expect("the stack").stacks.unwrap_or_default().remove(0);
        let outputs = stack.outputs.unwrap_or_default().into_iter();
        Self {
            iot: aws_sdk_iot::Client::new(&config),
            mqtt: aws_sdk_iotdataplane::Client::new(&config),
            lambda: aws_sdk_lambda::Client::new(&config),
            step_functions: aws_sdk_sfn::Client::new(&config),
            cloudwatch: aws_sdk_cloudwatch::Client::new(&config),
            dynamodb: aws_sdk_dynamodb::Client::new(&config),
            sqs: aws_sdk_sqs::Client::new(&config),
            sns: aws_sdk_sns::Client::new(&config),
            s3: aws_sdk_s3::Client::new(&config),
            stack: name.to_owned(),
            outputs: outputs.filter_map(|output| Some((output.output_key?, output.output_value?))).collect(),
            config,
        }
    }

    /// An output of the stack.
    pub fn output(&self, name: &str) -> &str {
        self.outputs.get(name).unwrap_or_else(|| panic!("the stack has no output {name}"))
    }

    /// A folder of this run's for a test's files.
    pub fn folder(name: &str) -> PathBuf {
        Path::new(&variable("FLEETFLOW_RUN")).join("tests").join(name)
    }

    /// The broker's address.
    pub fn endpoint() -> Endpoint {
        variable("FLEETFLOW_MQTT_ENDPOINT").parse().expect("FLEETFLOW_MQTT_ENDPOINT")
    }

    /// The broker's authority.
    pub fn ca() -> PathBuf {
        variable("FLEETFLOW_CA").into()
    }

    /// Puts a random image of that size into the firmware bucket.
    pub async fn upload(&self, version: &str, size: usize) -> Image {
        let bytes = random_bytes(size);
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let key = format!("firmware/{}/{version}", uuid::Uuid::new_v4().simple());
        let put = self.s3.put_object().bucket(self.output("FirmwareBucketName")).key(&key).body(bytes.into());
        put.send().await.expect("the image is uploaded");
        Image { version: version.to_owned(), artifact: json!({"key": key, "sha256": sha256, "size": size}) }
    }

    /// Registers `count` devices of a new name, in a group of that name: the group's ARN and the devices.
    pub async fn provision(&self, name: &str, count: usize, protocols: ProtocolMix) -> (String, Vec<DeviceSpec>) {
        self.provision_with(name, count, protocols, |_| ()).await
    }

    /// The same with a settings profile each: `user-` and the thing's name.
    pub async fn provision_with_profiles(&self, name: &str, count: usize) -> Vec<DeviceSpec> {
        let change = |options: &mut ProvisionOptions| options.external_id = Some("user-{thing}".into());
        self.provision_with(name, count, ProtocolMix::Mixed, change).await.1
    }

    /// The same with options of the test's own.
    pub async fn provision_with(
        &self,
        name: &str,
        count: usize,
        protocols: ProtocolMix,
        change: impl FnOnce(&mut ProvisionOptions),
    ) -> (String, Vec<DeviceSpec>) {
        let group = format!("{name}-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        let certificates = Self::folder(&group);
        let mut options = ProvisionOptions {
            things: numbered(&group, count).expect("names"),
            protocols,
            firmware_version: "1.0.0".into(),
            certificates: certificates.clone(),
            policy: DevicePolicy::Existing(self.output("DevicePolicyName").to_owned()),
            thing_group: Some(group.clone()),
            thing_type: Some(self.output("ThingTypeName").to_owned()),
            external_id: None,
            protocol_attribute: true,
            attributes: BTreeMap::new(),
        };
        change(&mut options);
        provision(&self.iot, options, |_| ()).await.expect("the devices are registered");
        let described = self.iot.describe_thing_group().thing_group_name(&group).send().await.expect("the group");
        (described.thing_group_arn.expect("its ARN"), DeviceSpec::load_all(&certificates).expect("the devices"))
    }

    /// Runs devices, each for so many upgrades, and waits until the first is connected.
    pub async fn run(devices: Vec<DeviceSpec>, upgrades: usize) -> Fleet {
        Self::run_with(devices, upgrades, |_| ()).await
    }

    /// The same with options of the test's own.
    pub async fn run_with(devices: Vec<DeviceSpec>, upgrades: usize, change: impl Fn(&mut FleetOptions)) -> Fleet {
        let mut options = FleetOptions::new(Self::endpoint());
        options.ca = Some(Self::ca());
        options.upgrades = upgrades;
        options.step_delay = Duration::from_millis(300);
        options.answer_delay = Duration::from_millis(300);
        change(&mut options);
        let fleet = Fleet::start(options, devices).expect("the devices start");
        fleet.connected(crate::PATIENCE).await.expect("the devices connect");
        fleet
    }

    /// Waits until every device of the fleet has a connection.
    pub async fn all_connected(fleet: &Fleet) {
        eventually("all devices are connected", || async {
            let phases = fleet.phases();
            saw(format!("devices by their phase: {phases:?}"));
            // The first phase is that without a connection.
            (phases[0] == 0).then_some(())
        })
        .await;
    }

    /// Invokes create-job: its output, or its error's type and message.
    pub async fn invoke_create_job(&self, payload: &Value) -> Result<Value, (String, String)> {
        self.invoke("CreateJobFunctionName", payload).await
    }

    /// Invokes the function that an output names: its output, or its error's type and message.
    pub async fn invoke(&self, function: &str, payload: &Value) -> Result<Value, (String, String)> {
        let invoke = self.lambda.invoke().function_name(self.output(function));
        let output = invoke.payload(Blob::new(payload.to_string())).send().await.expect("the function is invoked");
        let body: Value = serde_json::from_slice(output.payload().map_or(b"null", Blob::as_ref)).expect("JSON");
        saw(format!("{function} answers {body}"));
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        if output.function_error().is_some() { Err((text("errorType"), text("errorMessage"))) } else { Ok(body) }
    }

    /// Upgrades a target to an image, all devices at once and whatever fails; the job's id.
    pub async fn create_job(&self, target: &str, image: &Image, extra: Value) -> String {
        let mut payload = json!({
            "firmwareVersion": image.version, "upgradeTrigger": "test", "targetArn": target, "artifact": image.artifact,
            "rollout": {"maximumPerMinute": 1000}, "abort": {"percentage": 100, "minimumExecuted": 1000},
        });
        if let (Value::Object(payload), Value::Object(extra)) = (&mut payload, extra) {
            payload.extend(extra);
        }
        let output = self.invoke_create_job(&payload).await.expect("the job is created");
        output["jobId"].as_str().expect("a job id").to_owned()
    }

    /// A thing's job execution: its status and status details.
    pub async fn job_execution(
        &self,
        job: &str,
        thing: &ThingName,
    ) -> Option<(JobExecutionStatus, HashMap<String, String>)> {
        let describe = self.iot.describe_job_execution().job_id(job).thing_name(thing.as_str()).send().await;
        let described = describe.map_err(|error| saw(format!("{:?}", error.into_service_error()))).ok();
        let found = described.and_then(|described| {
            let execution = described.execution?;
            let details = execution.status_details.and_then(|details| details.details_map).unwrap_or_default();
            Some((execution.status?, details))
        });
        saw(match &found {
            Some((status, details)) => format!("{thing} in {job}: {status} {details:?}"),
            None => format!("no job execution of {thing} in {job}"),
        });
        found
    }

    /// Waits until a thing's job execution has that status.
    pub async fn await_status(&self, job: &str, thing: &ThingName, status: JobExecutionStatus) {
        let what = format!("{thing} in {job} becomes {status}");
        eventually(&what, || async { (self.job_execution(job, thing).await?.0 == status).then_some(()) }).await;
    }

    /// Waits until the job executions of all these things have ended.
    pub async fn ended(&self, job: &str, things: &[ThingName]) -> BTreeMap<ThingName, Ended> {
        let mut all = BTreeMap::new();
        for thing in things {
            let what = format!("{thing} ends {job}");
            let ended = eventually(&what, || async {
                let (status, mut details) = self.job_execution(job, thing).await?;
                let open = matches!(status, JobExecutionStatus::Queued | JobExecutionStatus::InProgress);
                let reason = details.remove("reason").unwrap_or_default();
                (!open).then_some(Ended { status, reason })
            });
            all.insert(thing.clone(), ended.await);
        }
        all
    }

    /// The executions of the firmware upgrade's state machine for a job: name and status.
    pub async fn executions(&self, job: &str) -> Vec<aws_sdk_sfn::types::ExecutionListItem> {
        let list = self.step_functions.list_executions().state_machine_arn(self.output("FirmwareUpgradeArn"));
        let executions = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.expect("executions");
        let executions = executions.into_iter().filter(|execution| execution.name.starts_with(job)).collect::<Vec<_>>();
        saw(format!("executions of {job}: {}", statuses(&executions)));
        executions
    }

    /// Waits until the job has as many executions as given and all of them have ended.
    pub async fn executions_ended(&self, job: &str, count: usize) -> Vec<aws_sdk_sfn::types::ExecutionListItem> {
        eventually(&format!("{count} executions of {job} end"), || async {
            let executions = self.executions(job).await;
            let running = |status| status == aws_sdk_sfn::types::ExecutionStatus::Running;
            let ended = executions.iter().filter(|execution| !running(execution.status.clone())).count();
            (ended >= count).then_some(executions)
        })
        .await
    }

    /// An attribute of a thing.
    pub async fn attribute(&self, thing: &ThingName, name: &str) -> Option<String> {
        let described = self.iot.describe_thing().thing_name(thing.as_str()).send().await.expect("the thing");
        saw(format!("the attributes of {thing} are {:?}", described.attributes));
        described.attributes?.remove(name)
    }

    /// The stack's queue of that logical name.
    pub async fn queue_url(&self, name: &str) -> String {
        let urls = self.sqs.list_queues().send().await.expect("queues").queue_urls.unwrap_or_default();
        let begins = format!("/{}-{name}", self.stack);
        urls.into_iter().find(|url| url.contains(&begins)).unwrap_or_else(|| panic!("no queue {begins}"))
    }

    /// Puts a message of the broker's own into a queue, as the topic rule does: only the broker may publish below `$aws/`.
    pub async fn deliver(&self, queue_name: &str, topic: &str, payload: &Value) {
        let body = json!({"topic": topic, "payload": BASE64_STANDARD.encode(payload.to_string())}).to_string();
        let send = self.sqs.send_message().queue_url(self.queue_url(queue_name).await).message_body(body);
        send.send().await.expect("sent");
    }

    /// A queue of the test's own that hears what is said on a topic, and may: its URL.
    pub async fn listen(&self, topic: &str, attributes: &[(&str, &str)]) -> String {
        let topic = self.output(topic);
        let name = format!("listener-{}", uuid::Uuid::new_v4().simple());
        let (of_topic, _) = topic.rsplit_once(':').expect("an ARN");
        let arn = format!("{}:{name}", of_topic.replacen(":sns:", ":sqs:", 1));
        let policy = json!({"Version": "2012-10-17", "Statement": [{
            "Effect": "Allow", "Principal": {"Service": "sns.amazonaws.com"}, "Action": "sqs:SendMessage",
            "Resource": arn, "Condition": {"ArnEquals": {"aws:SourceArn": topic}},
        }]});
        let create = self.sqs.create_queue().queue_name(name);
        let create = create.attributes(aws_sdk_sqs::types::QueueAttributeName::Policy, policy.to_string());
        let queue = create.send().await.expect("a queue").queue_url.expect("its URL");
        let mut subscribe = self.sns.subscribe().topic_arn(topic).protocol("sqs").endpoint(arn);
        for (name, value) in attributes {
            subscribe = subscribe.attributes(*name, *value);
        }
        subscribe.send().await.expect("subscribed");
        queue
    }

    /// Waits until everything in these queues has been handled.
    pub async fn drained(&self, queues: &[&str]) {
        for queue in queues {
            eventually(&format!("{queue} is empty"), || async { self.is_drained(queue).await.then_some(()) }).await;
        }
    }

    /// Whether everything in the queue has been handled.
    pub async fn is_drained(&self, name: &str) -> bool {
        use aws_sdk_sqs::types::QueueAttributeName::{
            ApproximateNumberOfMessages, ApproximateNumberOfMessagesNotVisible,
        };
        let get = self.sqs.get_queue_attributes().queue_url(self.queue_url(name).await);
        let get = get.attribute_names(ApproximateNumberOfMessages);
        let get = get.attribute_names(ApproximateNumberOfMessagesNotVisible);
        let attributes = get.send().await.expect("attributes").attributes.unwrap_or_default();
        saw(format!("{name}: {attributes:?}"));
        attributes.values().all(|count| count == "0")
    }

    /// How many dead letters hold this text. Others may be reading the queue too, so it is read for a while.
    pub async fn dead_letters(&self, text: &str) -> usize {
        let mut found = HashSet::new();
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            let receive = self.sqs.receive_message().queue_url(self.output("DeadLetterQueueUrl"));
            // Hidden for a moment, so that the next call brings others.
            let receive = receive.max_number_of_messages(10).visibility_timeout(1).wait_time_seconds(1);
            let messages = receive.send().await.expect("the dead-letter queue").messages.unwrap_or_default();
            let ours = messages.into_iter().filter(|message| message.body().unwrap_or_default().contains(text));
            found.extend(ours.filter_map(|message| message.message_id));
        }
        found.len()
    }

    /// Waits for the dead letter that holds this text: its error type. Others may be reading the queue too, so all of it is read
    /// again and again.
    pub async fn dead_letter(&self, text: &str) -> String {
        // By their ids: a look does not see what one shortly before it has received.
        let others = Mutex::new(BTreeMap::new());
        eventually(&format!("a dead letter with {text}"), || async {
            loop {
                let receive = self.sqs.receive_message().queue_url(self.output("DeadLetterQueueUrl"));
                // Hidden for a moment, so that the next call brings others.
                let receive = receive.max_number_of_messages(10).visibility_timeout(2).message_attribute_names("All");
                let messages = receive.send().await.expect("the dead-letter queue").messages.unwrap_or_default();
                if messages.is_empty() {
                    let others = others.lock().expect("no panic");
                    let beginnings: Vec<&String> = others.values().collect();
                    saw(format!("{} other dead letters so far: {beginnings:?}", others.len()));
                    return None;
                }
                for message in messages {
                    let body = message.body.unwrap_or_default();
                    if body.contains(text) {
                        saw(format!("a letter with the attributes {:?}: {body}", message.message_attributes));
                        return message.message_attributes?.remove("errorType")?.string_value;
                    }
                    let beginning: String = body.chars().take(100).collect();
                    others.lock().expect("no panic").insert(message.message_id, beginning);
                }
            }
        })
        .await
    }
}

/// Bytes that no other call returns.
pub fn random_bytes(size: usize) -> Vec<u8> {
    uuid::Uuid::new_v4().into_bytes().into_iter().cycle().take(size).collect()
}

/// A step's item in the rendezvous table.
pub async fn meeting(cloud: &Cloud, thing: &ThingName, operation: &OperationId, step: Step) -> Option<Meeting> {
    let text = |value: &str| aws_sdk_dynamodb::types::AttributeValue::S(value.to_owned());
    let get = cloud.dynamodb.get_item().table_name(cloud.output("RendezvousTableName")).consistent_read(true);
    let key = Operation::new(thing, operation).key();
    let output = get.key("operation", text(&key)).key("step", text(step.name())).send().await.expect("the table");
    let meeting = output.item.map(|item| serde_dynamo::from_item(item).expect("a meeting"));
    saw(match &meeting {
        Some(meeting) => format!("{step:?} of {operation} on {thing}: {meeting:?}"),
        None => format!("no meeting of {operation} on {thing} in {step:?}"),
    });
    meeting
}

/// Executions by their names, with their statuses.
pub fn statuses<'a>(executions: impl IntoIterator<Item = &'a aws_sdk_sfn::types::ExecutionListItem>) -> String {
    let all: Vec<_> = executions.into_iter().map(|one| format!("{} {}", one.name, one.status)).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

/// The names of devices.
pub fn names(devices: &[DeviceSpec]) -> Vec<ThingName> {
    devices.iter().map(|device| device.thing.clone()).collect()
}

/// Gives each device the faults of the same place in the list.
pub fn with_faults(devices: &mut [DeviceSpec], faults: impl IntoIterator<Item = Faults>) {
    for (device, faults) in devices.iter_mut().zip(faults) {
        device.faults = faults;
    }
}

/// Kills the running processes of a Lambda function of this run's cloud, as a failing host would; how many.
pub fn kill_functions(function: &str) -> usize {
    let run = variable("FLEETFLOW_RUN");
    let processes =
        std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let ours = processes.filter(|pid| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        let has = |name: &str, value: &str| {
            environment
                .split('\0')
                .any(|line| line.split_once('=').is_some_and(|(n, v)| n == name && v.contains(value)))
        };
        has("AWS_LAMBDA_FUNCTION_NAME", function) && has("TMPDIR", &run)
    });
    ours.filter(|pid| {
        std::process::Command::new("kill").args(["-9", pid]).status().is_ok_and(|status| status.success())
    })
    .count()
}
