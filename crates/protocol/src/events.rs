//! Domain events: what the system tells anyone who subscribes to its SNS topic.

use crate::{JobId, OperationId, ThingName, optional_whole, whole};
use serde::{Deserialize, Serialize};

/// The kind of a domain event; also the message attribute `eventType` that subscriptions filter by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EventType {
    /// A workflow has begun to upgrade a device.
    FirmwareUpgradeStarted,
    /// The device runs the target version.
    FirmwareUpgradeSuccess,
    /// It does not, and the workflow has ended.
    FirmwareUpgradeFail,
    /// A device has booted unasked.
    DeviceBooted,
}

/// How a firmware upgrade goes, published by its state machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpgradeEvent {
    /// Started, succeeded or failed.
    pub event_type: EventType,
    /// The device.
    pub thing_name: ThingName,
    /// The job.
    pub job_id: JobId,
    /// Which of the job's executions on this thing.
    #[serde(deserialize_with = "whole")]
    pub execution_number: i64,
    /// When it was queued, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_whole")]
    pub queued_at: Option<i64>,
    /// The operation.
    pub operation_id: OperationId,
    /// The target version.
    pub firmware_version: String,
    /// The version that the registry had when the workflow began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_version: Option<String>,
    /// An error name of ours, or why nothing had to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The reason in detail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// The step that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

/// A device has booted and no operation waits for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceBooted {
    /// [`EventType::DeviceBooted`]
    pub event_type: EventType,
    /// The device.
    pub thing_name: ThingName,
    /// The device's reason, such as `FirstBoot`.
    pub cause: String,
    /// The version that it says it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware_version: Option<String>,
}
