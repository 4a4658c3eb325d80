//! The account's IoT settings that this stack needs and CloudFormation has no resource for: a custom resource.

use crate::error::{aws, unbuilt};
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
    answer_cloudformation(&input.response_url, &answer.to_string())?;
    result
}

fn answer_cloudformation(url: &str, answer: &str) -> Result<(), Error> {
    // The address is signed for a request without a content type.
    ureq::put(url)
        .header("content-type", "")
        .send(answer)
        .map(|_| ())
        .map_err(|error| Error::new(ErrorName::ServiceUnavailable, format!("CloudFormation's ResponseURL: {error}")))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The local cloud's address is plain HTTP; that of AWS is not, and without a TLS provider the client would panic.
    #[test]
    fn an_https_address_is_spoken_to_in_tls() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let mut first = [0];
            std::io::Read::read_exact(&mut listener.accept().unwrap().0, &mut first).unwrap();
            first[0]
        });
        let error = answer_cloudformation(&format!("https://127.0.0.1:{port}/"), "{}").unwrap_err();
        assert_eq!(error.name, ErrorName::ServiceUnavailable);
        // A handshake begins with a record of type 22 (RFC 8446, 5.1).
        assert_eq!(server.join().unwrap(), 22);
    }
}
