//! The account's IoT settings that this stack needs and CloudFormation has no resource for: a custom resource.

use crate::error::aws;
use crate::{Error, ErrorName};
use aws_sdk_iot::types::{
    Configuration, EventType, ThingConnectivityIndexingMode, ThingGroupIndexingConfiguration, ThingGroupIndexingMode,
    ThingIndexingConfiguration, ThingIndexingMode,
};
use serde::Deserialize;
use serde_json::json;

/// What CloudFormation sends
/// (<https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/crpg-ref-requests.html>).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Input {
    /// `Create`, `Update` or `Delete`.
    pub request_type: String,
    /// Where the answer goes.
    #[serde(rename = "ResponseURL")]
    pub response_url: String,
    /// Repeated in the answer.
    pub stack_id: String,
    /// Repeated in the answer.
    pub request_id: String,
    /// Repeated in the answer.
    pub logical_resource_id: String,
}

/// Switches the settings on and answers CloudFormation, whatever comes of it: a stack must not hang. On `Delete`
/// they stay as they are, because others in the account may rely on them by now.
pub async fn handle(iot: &aws_sdk_iot::Client, input: Input) -> Result<(), Error> {
    let result = if input.request_type == "Delete" { Ok(()) } else { configure(iot).await };
    let reason = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let answer = json!({
        "Status": if result.is_ok() { "SUCCESS" } else { "FAILED" },
        "Reason": reason,
        "PhysicalResourceId": "fleetflow-iot-settings",
        "StackId": input.stack_id,
        "RequestId": input.request_id,
        "LogicalResourceId": input.logical_resource_id,
    });
    // The address is signed for a request without a content type.
    ureq::put(&input.response_url)
        .header("content-type", "")
        .send(answer.to_string())
        .map_err(|error| Error::new(ErrorName::ServiceUnavailable, format!("CloudFormation's ResponseURL: {error}")))?;
    result
}

async fn configure(iot: &aws_sdk_iot::Client) -> Result<(), Error> {
    let enabled = Configuration::builder().enabled(true).build();
    iot.update_event_configurations()
        .event_configurations(EventType::JobExecution, enabled)
        .send()
        .await
        .map_err(|error| aws("iot:UpdateEventConfigurations", &error))?;
    let known = iot.get_indexing_configuration().send().await;
    let known = known.map_err(|error| aws("iot:GetIndexingConfiguration", &error))?;
    let unbuilt = |error: aws_sdk_iot::error::BuildError| Error::new(ErrorName::ServiceError, error.to_string());
    // What others in the account have switched on stays on.
    let mut things = match known.thing_indexing_configuration {
        Some(known) if known.thing_indexing_mode != ThingIndexingMode::Off => known,
        _ => ThingIndexingConfiguration::builder()
            .thing_indexing_mode(ThingIndexingMode::Registry)
            .build()
            .map_err(unbuilt)?,
    };
    things.thing_connectivity_indexing_mode = Some(ThingConnectivityIndexingMode::Status);
    things.managed_fields = None;
    let groups =
        ThingGroupIndexingConfiguration::builder().thing_group_indexing_mode(ThingGroupIndexingMode::On).build();
    iot.update_indexing_configuration()
        .thing_indexing_configuration(things)
        .thing_group_indexing_configuration(groups.map_err(unbuilt)?)
        .send()
        .await
        .map_err(|error| aws("iot:UpdateIndexingConfiguration", &error))?;
    Ok(())
}
