//! The account's IoT settings that this stack needs and CloudFormation has no resource for: a custom resource.

use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_iot::types::{
    Configuration, EventType, ThingConnectivityIndexingMode, ThingGroupIndexingConfiguration, ThingGroupIndexingMode,
    ThingIndexingConfiguration, ThingIndexingMode,
};
use serde::{Deserialize, Serialize};
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

/// The account's own addresses, which the template reads as attributes of the resource.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Endpoints {
    /// The broker's.
    data_endpoint: String,
    /// That of job executions.
    jobs_endpoint: String,
}

/// Switches the settings on and answers CloudFormation, whatever comes of it: a stack must not hang. On `Delete`
/// they stay as they are, because others in the account may rely on them by now.
pub async fn handle(iot: &aws_sdk_iot::Client, input: Input) -> Result<(), Error> {
    let result = if input.request_type == "Delete" { Ok(Endpoints::default()) } else { configure(iot).await };
    let reason = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let answer = json!({
        "Status": if result.is_ok() { "SUCCESS" } else { "FAILED" },
        "Reason": reason,
        "PhysicalResourceId": "fleetflow-iot-settings",
        "StackId": input.stack_id,
        "RequestId": input.request_id,
        "LogicalResourceId": input.logical_resource_id,
        "Data": result.as_ref().ok(),
    });
    answer_cloudformation(&input.response_url, &answer.to_string())?;
    result.map(|_| ())
}

fn answer_cloudformation(url: &str, answer: &str) -> Result<(), Error> {
    // The address is signed for a request without a content type.
    ureq::put(url)
        .header("content-type", "")
        .send(answer)
        .map(|_| ())
        .map_err(|error| Error::new(ErrorName::ServiceUnavailable, format!("CloudFormation's ResponseURL: {error}")))
}

async fn configure(iot: &aws_sdk_iot::Client) -> Result<Endpoints, Error> {
    switch_on(iot).await?;
    endpoints(iot).await
}

/// Job executions had an address of their own, which the SDK's documents still ask for; AWS has begun to refuse to name it: "now
/// available through iot:Data-ATS endpoints" (seen 2026-09-19), as the guide has it for devices
/// (<https://docs.aws.amazon.com/iot/latest/developerguide/jobs-devices.html>).
async fn endpoints(iot: &aws_sdk_iot::Client) -> Result<Endpoints, Error> {
    let data_endpoint = endpoint(iot, "iot:Data-ATS").await?.ok_or_else(|| {
        Error::new(ErrorName::ServiceError, "iot:DescribeEndpoint names no address for iot:Data-ATS".to_owned())
    })?;
    let jobs_endpoint = endpoint(iot, "iot:Jobs").await?.unwrap_or_else(|| data_endpoint.clone());
    Ok(Endpoints { data_endpoint, jobs_endpoint })
}

/// The account's address of that kind, if it has one.
async fn endpoint(iot: &aws_sdk_iot::Client, kind: &str) -> Result<Option<String>, Error> {
    match iot.describe_endpoint().endpoint_type(kind).send().await {
        Ok(answer) => Ok(answer.endpoint_address.filter(|address| !address.is_empty())),
        Err(error) if code(&error) == Some("InvalidRequestException") => Ok(None),
        Err(error) => Err(aws("iot:DescribeEndpoint", &error)),
    }
}

async fn switch_on(iot: &aws_sdk_iot::Client) -> Result<(), Error> {
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
    use aws_sdk_iot::operation::describe_endpoint::{DescribeEndpointError, DescribeEndpointOutput};
    use aws_sdk_iot::types::error::{InvalidRequestException, ThrottlingException};
    use aws_smithy_mocks::{Rule, RuleMode, mock, mock_client};

    fn answered(kind: &'static str, address: &'static str) -> Rule {
        mock!(aws_sdk_iot::Client::describe_endpoint)
            .match_requests(move |request| request.endpoint_type() == Some(kind))
            .then_output(move || DescribeEndpointOutput::builder().endpoint_address(address).build())
    }

    fn refused(kind: &'static str, code: &'static str) -> Rule {
        let error = move || {
            let meta = aws_sdk_iot::error::ErrorMetadata::builder().code(code).build();
            match code {
                "ThrottlingException" => {
                    DescribeEndpointError::ThrottlingException(ThrottlingException::builder().meta(meta).build())
                }
                _ => DescribeEndpointError::InvalidRequestException(
                    InvalidRequestException::builder().meta(meta).build(),
                ),
            }
        };
        mock!(aws_sdk_iot::Client::describe_endpoint)
            .match_requests(move |request| request.endpoint_type() == Some(kind))
            .then_error(error)
    }

    #[tokio::test]
    async fn job_executions_are_at_the_broker_s_address_where_aws_names_no_other() {
        let data = "a1-ats.iot.eu-west-1.amazonaws.com";
        for (jobs, expected) in [
            (refused("iot:Jobs", "InvalidRequestException"), Ok(data)),
            (answered("iot:Jobs", ""), Ok(data)),
            (answered("iot:Jobs", "a1.jobs.iot.eu-west-1.amazonaws.com"), Ok("a1.jobs.iot.eu-west-1.amazonaws.com")),
            (refused("iot:Jobs", "ThrottlingException"), Err(ErrorName::Throttled)),
        ] {
            let iot = mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&answered("iot:Data-ATS", data), &jobs]);
            let found = endpoints(&iot).await.map(|found| (found.data_endpoint, found.jobs_endpoint));
            let expected = expected.map(|jobs| (data.to_owned(), jobs.to_owned()));
            assert_eq!(found.map_err(|error| error.name), expected);
        }
        let none = mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&refused("iot:Data-ATS", "InvalidRequestException")]);
        assert_eq!(endpoints(&none).await.unwrap_err().name, ErrorName::ServiceError);
    }

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
