//! Failed updates and their recovery: reports, executions, and what is known of a device.

use crate::{Cloud, PATIENCE, Pushed, eventually, in_vain, saw};
use aws_sdk_iot::types::AttributePayload;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_sfn::types::ExecutionStatus;
use fleet::recovery::{Device, RecoveryTable};
use protocol::ThingName;
use protocol::recovery::{UpdateReport, UpdateStatus};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The attributes that a thing has in these tests, beside others.
pub const ORIGINAL: [(&str, &str); 2] = [("FW", "2.27"), ("model", "wo:v8")];

impl Cloud {
    /// A thing in the registry, without a device behind it.
    pub async fn thing(&self, name: &str) -> ThingName {
        let thing = format!("{name}-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        let attributes = ORIGINAL.into_iter().fold(AttributePayload::builder(), |all, (name, value)| {
            all.attributes(name, value).attributes("site", "north")
        });
        let create = self.iot.create_thing().thing_name(&thing).thing_type_name(self.output("ThingTypeName"));
        create.attribute_payload(attributes.build()).send().await.expect("a thing");
        thing.parse().expect("a name")
    }

    /// A thing's attributes.
    pub async fn attributes(&self, thing: &ThingName) -> BTreeMap<String, String> {
        let described = self.iot.describe_thing().thing_name(thing.as_str()).send().await.expect("the thing");
        let attributes = described.attributes.unwrap_or_default().into_iter().collect();
        saw(format!("the attributes of {thing} are {attributes:?}"));
        attributes
    }

    /// An operator changes an attribute.
    pub async fn set_attribute(&self, thing: &ThingName, name: &str, value: &str) {
        let attributes = AttributePayload::builder().attributes(name, value).merge(true).build();
        let update = self.iot.update_thing().thing_name(thing.as_str()).attribute_payload(attributes);
        update.send().await.expect("the attribute is changed");
    }

    /// Reports on an update of a thing, as an operator who tries the workflow does.
    pub async fn report(&self, thing: &ThingName, status: UpdateStatus, timestamp: i64) {
        let text = |value: &str| Some(value.to_owned());
        let [(_, firmware), (_, model)] = ORIGINAL;
        let report =
            UpdateReport { thing_name: thing.clone(), timestamp, status, model: text(model), firmware: text(firmware) };
        let message = report.encode();
        let publish = self.mqtt.publish().topic(message.topic).payload(Blob::new(message.payload)).qos(1);
        publish.send().await.expect("published");
    }

    /// Reports failures at these times (Unix milliseconds, as the device has them), all at once.
    pub async fn fail(&self, thing: &ThingName, timestamps: impl IntoIterator<Item = i64>) {
        let reports = timestamps.into_iter().map(|timestamp| self.report(thing, UpdateStatus::Failed, timestamp));
        futures_util::future::join_all(reports).await;
    }

    /// The table of devices that could not update themselves.
    pub fn recovery_table(&self) -> RecoveryTable {
        RecoveryTable::new(&self.config, self.output("RecoveryTableName").to_owned())
    }

    /// What is known of a device.
    pub async fn recovery(&self, thing: &ThingName) -> Device {
        let device = self.recovery_table().get(thing.as_str()).await.expect("the item");
        saw(format!("{thing}: {device:?}"));
        device
    }

    /// Waits until that is so of what is known of a device.
    pub async fn await_recovery(&self, thing: &ThingName, what: &str, is: impl Fn(&Device) -> bool) -> Device {
        eventually(&format!("{thing}: {what}"), || async {
            let device = self.recovery(thing).await;
            is(&device).then_some(device)
        })
        .await
    }

    /// Waits until so many recoveries of the thing have ended, and no other runs; all of them, by the order of their start.
    pub async fn recovered(&self, thing: &ThingName, count: usize) -> Vec<Pushed> {
        let what = format!("{count} recoveries of {thing} end");
        let executions = eventually(&what, || async {
            let executions = self.executions_of("FailedUpdateRecoveryArn", thing).await;
            let ended = executions.iter().filter(|execution| execution.status != ExecutionStatus::Running).count();
            assert!(executions.len() <= count, "{count} were expected: {executions:?}");
            (ended == count).then_some(executions)
        });
        let mut recovered = Vec::new();
        for execution in executions.await {
            recovered.push(self.ended_push(&execution.execution_arn).await);
        }
        recovered
    }

    /// Invokes restore-attributes, as an operator does: its answer, or its error's type and message.
    pub async fn restore_attributes(&self, payload: &Value) -> Result<Value, (String, String)> {
        self.invoke("RestoreAttributesFunctionName", payload).await
    }

    /// Whether the thing is in the group of quarantined devices.
    pub async fn is_in_failed_group(&self, thing: &ThingName) -> bool {
        let groups = self.iot.list_thing_groups_for_thing().thing_name(thing.as_str()).send().await.expect("groups");
        let group = self.output("FailedThingGroupName");
        groups.thing_groups.unwrap_or_default().iter().any(|known| known.group_name() == Some(group))
    }

    /// Takes the messages about these things out of the operators' queue, once there are so many; then there is no further one.
    pub async fn quarantines(&self, things: &[ThingName], count: usize) -> Vec<Value> {
        let (mut found, mut others) = (Vec::new(), BTreeSet::new());
        let mut quiet = 0;
        let begin = std::time::Instant::now();
        // FIFO: a message that is hidden by another test's call hides its thing's further ones, and no other's.
        while found.len() < count || quiet < 3 {
            let what = || format!("{count} messages about {things:?}, and no further one");
            let seen = || format!("{}: {found:?}; messages about others: {others:?}", found.len());
            assert!(begin.elapsed() < PATIENCE, "{}", in_vain(PATIENCE, &what(), &seen()));
            let receive = self.sqs.receive_message().queue_url(self.output("RecoveryNotificationsQueueUrl"));
            let receive = receive.max_number_of_messages(10).visibility_timeout(1).wait_time_seconds(1);
            let messages = receive.send().await.expect("the queue").messages.unwrap_or_default();
            let before = found.len();
            for message in messages {
                // What a test of permissions has sent is no message of ours.
                let Ok(body) = serde_json::from_str::<Value>(message.body().unwrap_or_default()) else { continue };
                if things.iter().any(|thing| body["thingName"] == thing.as_str()) {
                    let delete = self.sqs.delete_message().queue_url(self.output("RecoveryNotificationsQueueUrl"));
                    delete.receipt_handle(message.receipt_handle.unwrap_or_default()).send().await.expect("deleted");
                    found.push(body);
                } else {
                    others.insert(body["thingName"].to_string());
                }
            }
            quiet = if found.len() == before { quiet + 1 } else { 0 };
        }
        found
    }
}
