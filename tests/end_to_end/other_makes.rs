//! Devices of other makes: what their specifications let them say is heard or left alone, and none of it is a dead letter.
#![allow(clippy::unwrap_used)]

use aws_sdk_iot::types::JobExecutionStatus::Succeeded;
use device_simulator::provision::ProtocolMix;
use protocol::recovery::UPDATE_REPORTS_TOPIC;
use protocol::{ProtocolName, Publication, ThingName};
use rusp_lib::usp_builder::NotifyBuilder;
use serde_json::json;
use tests::{Cloud, Ended, MqttDevice, UspAgent, eventually, names, now, saw};

async fn await_version(cloud: &Cloud, thing: &ThingName, version: &str) {
    eventually(&format!("{thing} runs {version}"), || async {
        let attribute = cloud.attribute(thing, "firmwareVersion").await;
        saw(format!("the attribute is {attribute:?}"));
        (attribute.as_deref() == Some(version)).then_some(())
    })
    .await;
}

/// From its first connection to its upgrade. Its boot parameters are not set, so that it must be asked for its version, and it is
/// called otherwise than its thing.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn an_agent_of_another_make_is_upgraded() {
    let cloud = Cloud::connect().await;
    let (group, devices) = cloud.provision("other-make", 1, ProtocolMix::All(ProtocolName::Usp)).await;
    let things = names(&devices);
    let thing = &things[0];
    let image = cloud.upload("2.0.0", 10_000).await;
    let mut agent = UspAgent::connect(&devices[0], "os::012345-0A1B2C3D4E5F").await;
    let onboarding = NotifyBuilder::new(String::new()).with_send_resp(true).with_onboard_request(
        "012345".into(),
        "HomeGateway".into(),
        "0A1B2C3D4E5F".into(),
        "1.0,1.1,1.2,1.3".into(),
    );
    agent.notify("onboard-1", onboarding).await;
    let boot = |more: &[(&'static str, &'static str)]| {
        let cause = [("Cause", "LocalReboot"), ("ParameterMap", "{}")];
        UspAgent::event("Device.", "Boot!", &[&cause[..], more].concat())
    };
    for key in ["", "reboot from UI", "reboot-1"] {
        agent.notify(&format!("boot-{key}"), boot(&[("CommandKey", key), ("FirmwareUpdated", "false")])).await;
    }
    agent.tell_version("1.0.0").await;
    await_version(&cloud, thing, "1.0.0").await;

    let job = cloud.create_job(&group, &image, json!({})).await;
    let command = agent.hear(|message| message.operate().is_some()).await;
    let operate = command.operate().unwrap();
    assert_eq!(operate.command, r#"Device.DeviceInfo.FirmwareImage.[Status=="Available"].Download()"#);
    let key = operate.command_key.clone();
    agent.accept(&command).await;
    for (transfer, command, fault) in [
        ("Upload", "Device.DeviceInfo.VendorLogFile.1.Upload()", "7000"),
        ("Download", "Device.DeviceInfo.FirmwareImage.2.Download()", "0"),
    ] {
        let arguments = [("Command", command), ("CommandKey", &key), ("TransferType", transfer), ("FaultCode", fault)];
        agent.notify(transfer, UspAgent::event("Device.LocalAgent.", "TransferComplete!", &arguments)).await;
    }
    let completed = NotifyBuilder::new("subscription-2".into()).with_send_resp(true);
    let object = "Device.DeviceInfo.FirmwareImage.2.".into();
    let completed = completed.with_operation_complete_output_args(object, "Download()".into(), key.clone(), [].into());
    agent.notify("completed", completed).await;
    agent.disconnect().await;

    let mut agent = UspAgent::connect(&devices[0], "os::012345-0A1B2C3D4E5F").await;
    let arguments = [("CommandKey", key.as_str()), ("FirmwareUpdated", "1"), ("ParameterMap", "{}")];
    agent.notify("booted", UspAgent::event("Device.", "Boot!", &arguments)).await;
    agent.tell_version("2.0.0").await;
    assert_eq!(cloud.ended(&job, &things).await[thing], Ended::new(Succeeded, "Upgraded"));
    await_version(&cloud, thing, "2.0.0").await;
    cloud.drained(&["DeviceResponsesQueue"]).await;
    assert_eq!(cloud.dead_letters(thing.as_str()).await, 0);
}

/// What AWS IoT cannot read as JSON its rules do not pass on by a field's value, and what nobody can read is not lost either.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn reports_of_updates_are_counted_however_they_are_written() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("odd-report", 1, ProtocolMix::All(ProtocolName::Json)).await;
    let thing = devices[0].thing.clone();
    let device = MqttDevice::connect(&devices[0], true).await;
    let report = async |text: String| {
        device.publish(Publication { topic: UPDATE_REPORTS_TOPIC.to_owned(), payload: text.into_bytes() }).await;
    };
    let failed = |time: String| format!(r#"{{"_id_":"{thing}","timestamp":{time},"status":"failed","FW":2.10}}"#);
    let seconds = now() / 1000 - 100;
    report(format!("\u{feff}{}", failed(seconds.to_string()))).await;
    report(format!("{}\0", failed(format!("\"{}000\"", seconds + 1)))).await;
    report(failed(format!("{}000000", seconds + 2))).await;
    // The same once more, in another unit; and one of the year 2512.
    report(failed(format!("{}.0", seconds + 1))).await;
    report(failed("17104550400000".to_owned())).await;
    cloud.await_recovery(&thing, "four failures", |device| device.attempts == 4).await;
    report(format!("\u{feff}{{\"_id_\":\"{thing}\",\"timestamp\":{},\"status\":\"succeeded\"}}", now())).await;
    cloud.await_recovery(&thing, "no failure", |device| device.attempts == 0).await;
    cloud.drained(&["FailedUpdatesQueue", "SucceededUpdatesQueue"]).await;
    assert_eq!(cloud.dead_letters(thing.as_str()).await, 0);
    report("{\"status\": fail".to_owned()).await;
    assert_eq!(cloud.dead_letter(thing.as_str()).await, "MalformedMessage");
}
