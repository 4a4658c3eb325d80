//! The deployed stack and what tests do with it.

use crate::eventually;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_iot::types::JobExecutionStatus;
use aws_sdk_lambda::primitives::Blob;
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};
use device_simulator::provision::{DevicePolicy, ProtocolMix, ProvisionOptions, numbered, provision};
use device_simulator::{DeviceSpec, Endpoint, Faults, Fleet, FleetOptions};
use protocol::ThingName;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// Tables.
    pub dynamodb: aws_sdk_dynamodb::Client,
    /// Queues.
    pub sqs: aws_sdk_sqs::Client,
    /// Topics.
    pub sns: aws_sdk_sns::Client,
    /// Images.
    pub s3: aws_sdk_s3::Client,
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
        let _ = rustls::crypto::ring::default_provider().install_default();
        let https = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
        let config = aws_config::defaults(BehaviorVersion::latest()).http_client(https).load().await;
        let cloudformation = aws_sdk_cloudformation::Client::new(&config);
        let stacks = cloudformation.describe_stacks().stack_name(variable("FLEETFLOW_STACK")).send().await;
        let stack = stacks.expect("the stack").stacks.unwrap_or_default().remove(0);
        let outputs = stack.outputs.unwrap_or_default().into_iter();
        Self {
            iot: aws_sdk_iot::Client::new(&config),
            mqtt: aws_sdk_iotdataplane::Client::new(&config),
            lambda: aws_sdk_lambda::Client::new(&config),
            step_functions: aws_sdk_sfn::Client::new(&config),
            dynamodb: aws_sdk_dynamodb::Client::new(&config),
            sqs: aws_sdk_sqs::Client::new(&config),
            sns: aws_sdk_sns::Client::new(&config),
            s3: aws_sdk_s3::Client::new(&config),
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
        let bytes: Vec<u8> = uuid::Uuid::new_v4().into_bytes().into_iter().cycle().take(size).collect();
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let key = format!("firmware/{}/{version}", uuid::Uuid::new_v4().simple());
        let put = self.s3.put_object().bucket(self.output("FirmwareBucketName")).key(&key).body(bytes.into());
        put.send().await.expect("the image is uploaded");
        Image { version: version.to_owned(), artifact: json!({"key": key, "sha256": sha256, "size": size}) }
    }

    /// Registers `count` devices of a new name, in a group of that name: the group's ARN and the devices.
    pub async fn provision(&self, name: &str, count: usize, protocols: ProtocolMix) -> (String, Vec<DeviceSpec>) {
        let group = format!("{name}-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        let certificates = Self::folder(&group);
        let options = ProvisionOptions {
            things: numbered(&group, count).expect("names"),
            protocols,
            firmware_version: "1.0.0".into(),
            certificates: certificates.clone(),
            policy: DevicePolicy::Existing(self.output("DevicePolicyName").to_owned()),
            thing_group: Some(group.clone()),
        };
        provision(&self.iot, options, |_| ()).await.expect("the devices are registered");
        let described = self.iot.describe_thing_group().thing_group_name(&group).send().await.expect("the group");
        (described.thing_group_arn.expect("its ARN"), DeviceSpec::load_all(&certificates).expect("the devices"))
    }

    /// Runs devices, each for so many upgrades, and waits until they are connected.
    pub async fn run(devices: Vec<DeviceSpec>, upgrades: usize) -> Fleet {
        let mut options = FleetOptions::new(Self::endpoint());
        options.ca = Some(Self::ca());
        options.upgrades = upgrades;
        options.step_delay = Duration::from_millis(300);
        let fleet = Fleet::start(options, devices).expect("the devices start");
        fleet.connected(crate::PATIENCE).await.expect("the devices connect");
        fleet
    }

    /// Invokes create-job: its output, or its error's type and message.
    pub async fn invoke_create_job(&self, payload: &Value) -> Result<Value, (String, String)> {
        let invoke = self.lambda.invoke().function_name(self.output("CreateJobFunctionName"));
        let output = invoke.payload(Blob::new(payload.to_string())).send().await.expect("create-job is invoked");
        let body: Value = serde_json::from_slice(output.payload().map_or(b"null", Blob::as_ref)).expect("JSON");
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        if output.function_error().is_some() { Err((text("errorType"), text("errorMessage"))) } else { Ok(body) }
    }

    /// Upgrades a target to an image; the job's id.
    pub async fn create_job(&self, target: &str, image: &Image, extra: Value) -> String {
        let mut payload = json!({
            "firmwareVersion": image.version, "upgradeTrigger": "test", "targetArn": target, "artifact": image.artifact,
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
        let describe = self.iot.describe_job_execution().job_id(job).thing_name(thing.as_str()).send().await.ok()?;
        let execution = describe.execution?;
        let details = execution.status_details.and_then(|details| details.details_map).unwrap_or_default();
        Some((execution.status?, details))
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
        executions.into_iter().filter(|execution| execution.name.starts_with(job)).collect()
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
        let thing = self.iot.describe_thing().thing_name(thing.as_str()).send().await.expect("the thing");
        thing.attributes?.remove(name)
    }

    /// Waits for the dead letter that holds this text: its error type.
    pub async fn dead_letter(&self, text: &str) -> String {
        eventually(&format!("a dead letter with {text}"), || async {
            let receive = self.sqs.receive_message().queue_url(self.output("DeadLetterQueueUrl"));
            let receive = receive.max_number_of_messages(10).visibility_timeout(0).message_attribute_names("All");
            let messages = receive.send().await.expect("the dead-letter queue").messages.unwrap_or_default();
            let message = messages.into_iter().find(|message| message.body().unwrap_or_default().contains(text))?;
            message.message_attributes?.remove("errorType")?.string_value
        })
        .await
    }
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
