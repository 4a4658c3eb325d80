//! Images and their addresses, and values that AWS does not take: what a job pins, says and refuses.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::{AttributePayload, JobExecutionStatus, JobStatus};
use base64::{Engine, prelude::BASE64_STANDARD};
use device_simulator::provision::ProtocolMix;
use protocol::{Command, DeviceFailure, Firmware, OperationId, ProtocolName, Publication, ReplyTo, Step, StepOutcome};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tests::{Cloud, Ended, Image, ScriptedDevice, eventually, names, random_bytes, saw};

const DEVICE_STEPS: [Step; 4] =
    [Step::DownloadStarted, Step::FirmwareTransferred, Step::DownloadOperationDone, Step::DeviceRebooted];

/// Puts an image under a key, with metadata.
async fn put(cloud: &Cloud, key: &str, bytes: &[u8], metadata: &[(&str, &str)]) {
    let mut put = cloud.s3.put_object().bucket(cloud.output("FirmwareBucketName")).key(key);
    for (name, value) in metadata {
        put = put.metadata(*name, *value);
    }
    put.body(bytes.to_vec().into()).send().await.expect("the image is uploaded");
}

fn new_key() -> String {
    format!("firmware/{}/2.0.0", uuid::Uuid::new_v4().simple())
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The next command, which must be a download.
async fn download(device: &mut ScriptedDevice) -> (OperationId, Firmware, ReplyTo) {
    let received = device.command().await;
    let Command::Download { operation_id, firmware } = received.command else { panic!("{:?}", received.command) };
    (operation_id, firmware, received.reply_to)
}

async fn fetched(firmware: &Firmware) -> Vec<u8> {
    let answer = reqwest::get(&firmware.url).await.and_then(reqwest::Response::error_for_status);
    answer.expect("the address is good").bytes().await.expect("all of it").to_vec()
}

/// What a job tells its devices of its image.
async fn artifact(cloud: &Cloud, job: &str) -> Value {
    let document = cloud.iot.get_job_document().job_id(job).send().await.unwrap().document.unwrap();
    serde_json::from_str::<Value>(&document).unwrap()["artifact"].take()
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn all_devices_of_a_job_get_the_same_image_however_long_it_takes() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("pinned", 2, ProtocolMix::Mixed).await;
    assert_ne!(devices[0].protocol, devices[1].protocol);
    let things = names(&devices);
    let (key, bytes) = (new_key(), random_bytes(5000));
    put(&cloud, &key, &bytes, &[]).await;
    let image = Image { version: "2.0.0".into(), artifact: json!({"key": key}) };
    let job = cloud.create_job(&group, &image, json!({})).await;
    for (device, thing) in devices.iter().zip(&things) {
        let mut device = ScriptedDevice::connect(device).await;
        let (operation, firmware, reply_to) = download(&mut device).await;
        assert_eq!(fetched(&firmware).await, bytes, "{thing}");
        // As long as addresses are that a function's role has signed.
        assert!((1300..=1800).contains(&firmware.url.len()), "{} bytes", firmware.url.len());
        if device.protocol() == ProtocolName::Json {
            assert_eq!((firmware.sha256, firmware.size), (Some(hex(&bytes)), Some(5000)));
        }
        // Between the first device and the second, somebody repairs the image.
        put(&cloud, &key, &random_bytes(6000), &[]).await;
        for step in DEVICE_STEPS {
            device.succeed(&operation, &reply_to, step, "2.0.0").await;
        }
        assert_eq!(
            cloud.ended(&job, std::slice::from_ref(thing)).await[thing],
            Ended::new(JobExecutionStatus::Succeeded, "Upgraded")
        );
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_checksum_of_an_image_is_found_or_refused_when_the_job_is_made() {
    let cloud = Cloud::connect().await;
    let (group, _) = cloud.provision("checksums", 1, ProtocolMix::Mixed).await;
    let bytes = random_bytes(4000);
    let printed = format!("{}  image.bin", hex(&bytes));
    let base64 = BASE64_STANDARD.encode(Sha256::digest(&bytes));
    let payload = |key: &str, extra: Value| {
        let mut artifact = json!({"key": key});
        artifact.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"firmwareVersion": "2.0.0", "upgradeTrigger": "test", "targetArn": group, "artifact": artifact})
    };
    let metadata: [&[(&str, &str)]; 3] = [&[("sha256", &printed)], &[("sha256", &base64)], &[]];
    for metadata in metadata {
        let key = new_key();
        put(&cloud, &key, &bytes, metadata).await;
        let job = cloud.invoke_create_job(&payload(&key, json!({}))).await.expect("the job is created");
        let artifact = artifact(&cloud, job["jobId"].as_str().unwrap()).await;
        assert_eq!((&artifact["sha256"], &artifact["size"]), (&json!(hex(&bytes)), &json!(4000)), "{metadata:?}");
        assert!(artifact["versionId"].is_string(), "{artifact}");
    }
    let key = new_key();
    put(&cloud, &key, &bytes, &[("sha256", "md5:0123")]).await;
    let (name, message) = cloud.invoke_create_job(&payload(&key, json!({}))).await.unwrap_err();
    assert_eq!(name, "InvalidInput");
    assert!(message.starts_with("the object's metadata sha256: got \"md5:0123\", expected a SHA-256"), "{message}");
    put(&cloud, &key, &bytes, &[("sha256", &printed)]).await;
    let other = json!({"sha256": "ab".repeat(32)});
    let (_, message) = cloud.invoke_create_job(&payload(&key, other)).await.unwrap_err();
    assert!(message.starts_with("artifact.sha256: got abab"), "{message}");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_version_that_no_attribute_can_hold_is_refused_before_any_image_is() {
    let cloud = Cloud::connect().await;
    let payload = json!({
        "firmwareVersion": "1.1.0-rc.1+build5", "upgradeTrigger": "manual",
        "targetArn": "arn:aws:iot:eu-west-1:000000000000:thing/usp-1",
    });
    let (name, message) = cloud.invoke_create_job(&payload).await.unwrap_err();
    assert_eq!(name, "InvalidInput");
    assert!(
        message.starts_with("firmwareVersion: got \"1.1.0-rc.1+build5\", expected a version that a thing's"),
        "{message}"
    );
}

/// The stand-in is as strict as AWS, or the other tests of this file show nothing.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn the_local_cloud_refuses_what_aws_refuses() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("strict-values", 1, ProtocolMix::Mixed).await;
    let thing = devices[0].thing.as_str();
    for value in ["1.0+build5", "two words", &"x".repeat(801)] {
        let attributes = AttributePayload::builder().attributes("FW", value).merge(true).build();
        let update = cloud.iot.update_thing().thing_name(thing).attribute_payload(attributes).send().await;
        assert!(update.unwrap_err().into_service_error().is_invalid_request_exception(), "{value}");
    }
    for topic in ["a/b/c/d/e/f/g/h/i", &"x".repeat(257)] {
        let published = cloud.mqtt.publish().topic(topic).payload(b"x".to_vec().into()).send().await;
        assert!(published.unwrap_err().into_service_error().is_invalid_request_exception(), "{topic}");
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_failure_in_whatever_characters_ends_its_job_execution() {
    let cloud = Cloud::connect().await;
    let (mut device, job) = ScriptedDevice::with_job(&cloud, "characters", ProtocolName::Json, json!({})).await;
    let thing = device.thing.clone();
    let (operation, ..) = download(&mut device).await;
    // A byte order mark, soft hyphens, a joiner inside an emoji.
    let answer = json!({
        "operationId": operation, "name": "DOWNLOAD_STARTED", "type": "RESP", "status": "FAIL",
        "error": {"code": "E7", "message": "\u{feff}no\u{ad}space\u{ad} on 👨\u{200d}🔧"},
    });
    let topic = format!("devices/{thing}/firmware_resp");
    device.publish(Publication { topic, payload: answer.to_string().into_bytes() }).await;
    cloud.await_status(&job, &thing, JobExecutionStatus::Failed).await;
    let (_, details) = cloud.job_execution(&job, &thing).await.unwrap();
    assert_eq!(details["reason"], "DownloadRefused");
    assert_eq!(details["cause"], "device error E7: nospace on 👨🔧");
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_job_that_says_nothing_else_begins_slowly_and_stops_itself() {
    let cloud = Cloud::connect().await;
    // Each of them fails at once.
    let options = |options: &mut device_simulator::provision::ProvisionOptions| {
        options.attributes.insert("upgradable".to_owned(), "false".to_owned());
    };
    let (group, devices) = cloud.provision_with("careful", 25, ProtocolMix::Mixed, options).await;
    let image = cloud.upload("2.0.0", 1000).await;
    let payload = json!({
        "firmwareVersion": "2.0.0", "upgradeTrigger": "test", "targetArn": group, "artifact": image.artifact,
    });
    let answer = cloud.invoke_create_job(&payload).await.expect("the job is created");
    let rate = json!({"baseRatePerMinute": 20, "incrementFactor": 2.0, "numberOfSucceededThings": 20});
    assert_eq!(answer["rollout"], json!({"maximumPerMinute": 1000, "exponentialRate": rate}));
    assert_eq!(answer["abort"], json!({"percentage": 10.0, "minimumExecuted": 20}));
    let job = answer["jobId"].as_str().unwrap();
    eventually("the job stops", || async {
        let described = cloud.iot.describe_job().job_id(job).send().await.unwrap().job.unwrap();
        saw(format!("the job is {:?}", described.status));
        (described.status == Some(JobStatus::Canceled)).then_some(())
    })
    .await;
    let mut told = 0;
    for thing in names(&devices) {
        told += usize::from(cloud.job_execution(job, &thing).await.is_some());
    }
    assert_eq!(told, 20, "the others are never told");
}

/// A job may take days, and the credentials that have signed an address hours.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_address_that_has_expired_is_signed_again() {
    let cloud = Cloud::connect().await;
    let (mut device, job) = ScriptedDevice::with_job(&cloud, "expired", ProtocolName::Json, json!({})).await;
    let thing = device.thing.clone();
    let (operation, first, reply_to) = download(&mut device).await;
    device.succeed(&operation, &reply_to, Step::DownloadStarted, "2.0.0").await;
    let expired =
        DeviceFailure { code: DeviceFailure::ADDRESS_EXPIRED.to_owned(), message: "status 403 at byte 500".to_owned() };
    device.answer(&operation, &reply_to, Step::FirmwareTransferred, StepOutcome::Failed(expired)).await;
    let (again, second, reply_to) = download(&mut device).await;
    assert_eq!(again, operation);
    assert_eq!((&second.sha256, second.size), (&first.sha256, first.size));
    assert_eq!(fetched(&second).await.len(), 1000);
    for step in DEVICE_STEPS {
        device.succeed(&operation, &reply_to, step, "2.0.0").await;
    }
    cloud.await_status(&job, &thing, JobExecutionStatus::Succeeded).await;
}
