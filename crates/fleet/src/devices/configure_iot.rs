//! The account's IoT settings that this stack needs and CloudFormation has no resource for: a custom resource.

use crate::error::{aws, code, unbuilt};
use crate::{Error, ErrorName};
use aws_sdk_iot::types::{
    Configuration, EventType, IndexStatus, ThingConnectivityIndexingMode, ThingGroupIndexingConfiguration,
    ThingGroupIndexingMode, ThingIndexingConfiguration, ThingIndexingMode,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The index of things (<https://docs.aws.amazon.com/iot/latest/developerguide/managing-index.html>).
const INDEX: &str = "AWS_Things";
/// How long the index may take to be built before the deployment goes on without it: less than the function's time limit.
const PATIENCE: Duration = Duration::from_mins(10);
/// How often it is looked at meanwhile.
const LOOKS_EVERY: Duration = Duration::from_secs(5);
/// How long an answer to CloudFormation may be, in bytes
/// (<https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/crpg-ref-responses.html>).
const MAX_ANSWER_BYTES: usize = 4096;

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

/// What the template reads as attributes of the resource.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Attributes {
    #[serde(flatten)]
    endpoints: Endpoints,
    /// How far the index of things is, such as `ACTIVE`.
    index_status: String,
}

/// The account's own addresses.
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
    let result = if input.request_type == "Delete" { Ok(Attributes::default()) } else { configure(iot).await };
    let reason = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let answer = json!({
        "Status": if result.is_ok() { "SUCCESS" } else { "FAILED" },
        "PhysicalResourceId": "fleetflow-iot-settings",
        "StackId": input.stack_id,
        "RequestId": input.request_id,
        "LogicalResourceId": input.logical_resource_id,
        "Data": result.as_ref().ok(),
    });
    answer_cloudformation(&input.response_url, &with_reason(answer, &reason))?;
    result.map(|_| ())
}

/// The answer with as much of the reason as CloudFormation takes.
fn with_reason(mut answer: Value, reason: &str) -> String {
    let mut end = reason.len();
    loop {
        answer["Reason"] = reason[..end].into();
        let text = answer.to_string();
        if text.len() <= MAX_ANSWER_BYTES || end == 0 {
            return text;
        }
        // By and by, for a character may be six in JSON.
        end = reason.floor_char_boundary(end * 7 / 8);
    }
}

fn answer_cloudformation(url: &str, answer: &str) -> Result<(), Error> {
    // The address is signed for a request without a content type.
    ureq::put(url)
        .header("content-type", "")
        .send(answer)
        .map(|_| ())
        .map_err(|error| Error::new(ErrorName::ServiceUnavailable, format!("CloudFormation's ResponseURL: {error}")))
}

async fn configure(iot: &aws_sdk_iot::Client) -> Result<Attributes, Error> {
    send_events(iot).await?;
    index_things(iot).await?;
    Ok(Attributes { endpoints: endpoints(iot).await?, index_status: built_index(iot).await? })
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

/// Has events of job executions sent, unless they are. A request changes only those events that it names.
async fn send_events(iot: &aws_sdk_iot::Client) -> Result<(), Error> {
    let known = iot.describe_event_configurations().send().await;
    let known = known.map_err(|error| aws("iot:DescribeEventConfigurations", &error))?.event_configurations;
    if known.is_some_and(|known| known.get(&EventType::JobExecution).is_some_and(|known| known.enabled)) {
        return Ok(());
    }
    let enabled = Configuration::builder().enabled(true).build();
    let update = iot.update_event_configurations().event_configurations(EventType::JobExecution, enabled);
    update.send().await.map_err(|error| aws("iot:UpdateEventConfigurations", &error))?;
    Ok(())
}

/// Has things, their connectivity and groups indexed, unless they are: a change builds the index anew. A request replaces the
/// whole configuration that it names, of things or of groups, so what others in the account have in it is sent back.
async fn index_things(iot: &aws_sdk_iot::Client) -> Result<(), Error> {
    let known = iot.get_indexing_configuration().send().await;
    let known = known.map_err(|error| aws("iot:GetIndexingConfiguration", &error))?;
    let things = changed_things(known.thing_indexing_configuration)?;
    let groups = changed_groups(known.thing_group_indexing_configuration)?;
    if things.is_none() && groups.is_none() {
        return Ok(());
    }
    iot.update_indexing_configuration()
        .set_thing_indexing_configuration(things)
        .set_thing_group_indexing_configuration(groups)
        .send()
        .await
        .map_err(|error| aws("iot:UpdateIndexingConfiguration", &error))?;
    Ok(())
}

/// The configuration of things as this stack needs it, if it is another now.
fn changed_things(known: Option<ThingIndexingConfiguration>) -> Result<Option<ThingIndexingConfiguration>, Error> {
    let off = ThingIndexingConfiguration::builder().thing_indexing_mode(ThingIndexingMode::Off);
    let mut things = known.map_or_else(|| off.build().map_err(unbuilt), Ok)?;
    let status = Some(ThingConnectivityIndexingMode::Status);
    if things.thing_indexing_mode != ThingIndexingMode::Off && things.thing_connectivity_indexing_mode == status {
        return Ok(None);
    }
    if things.thing_indexing_mode == ThingIndexingMode::Off {
        things.thing_indexing_mode = ThingIndexingMode::Registry;
    }
    things.thing_connectivity_indexing_mode = status;
    // AWS tells these fields; they are not to be set.
    things.managed_fields = None;
    Ok(Some(things))
}

/// The configuration of groups as this stack needs it, if it is another now.
fn changed_groups(
    known: Option<ThingGroupIndexingConfiguration>,
) -> Result<Option<ThingGroupIndexingConfiguration>, Error> {
    let off = ThingGroupIndexingConfiguration::builder().thing_group_indexing_mode(ThingGroupIndexingMode::Off);
    let mut groups = known.map_or_else(|| off.build().map_err(unbuilt), Ok)?;
    if groups.thing_group_indexing_mode == ThingGroupIndexingMode::On {
        return Ok(None);
    }
    groups.thing_group_indexing_mode = ThingGroupIndexingMode::On;
    groups.managed_fields = None;
    Ok(Some(groups))
}

/// Waits until the index is built; how far it is then. Until it is `ACTIVE`, dynamic groups are empty, and devices that were
/// connected before the stack was there count as offline.
async fn built_index(iot: &aws_sdk_iot::Client) -> Result<String, Error> {
    let end = Instant::now() + PATIENCE;
    loop {
        let status = match iot.describe_index().index_name(INDEX).send().await {
            Ok(index) => index.index_status,
            // It has only just been switched on.
            Err(error) if code(&error) == Some("ResourceNotFoundException") => None,
            Err(error) => return Err(aws("iot:DescribeIndex", &error)),
        };
        let status = status.unwrap_or(IndexStatus::Building);
        if status == IndexStatus::Active {
            return Ok(status.as_str().to_owned());
        }
        if Instant::now() >= end {
            tracing::warn!(outcome = "INDEX_NOT_READY", index = INDEX, status = status.as_str());
            return Ok(status.as_str().to_owned());
        }
        sleep(LOOKS_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_iot::operation::describe_endpoint::{DescribeEndpointError, DescribeEndpointOutput};
    use aws_sdk_iot::operation::describe_event_configurations::DescribeEventConfigurationsOutput;
    use aws_sdk_iot::operation::describe_index::{DescribeIndexError, DescribeIndexOutput};
    use aws_sdk_iot::operation::get_indexing_configuration::GetIndexingConfigurationOutput;
    use aws_sdk_iot::operation::update_event_configurations::UpdateEventConfigurationsOutput;
    use aws_sdk_iot::operation::update_indexing_configuration::UpdateIndexingConfigurationOutput;
    use aws_sdk_iot::types::error::{InvalidRequestException, ResourceNotFoundException, ThrottlingException};
    use aws_sdk_iot::types::{Field, IndexingFilter};
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

    fn indexing(things: ThingIndexingConfiguration, groups: ThingGroupIndexingConfiguration) -> Rule {
        mock!(aws_sdk_iot::Client::get_indexing_configuration).then_output(move || {
            let known = GetIndexingConfigurationOutput::builder().thing_indexing_configuration(things.clone());
            known.thing_group_indexing_configuration(groups.clone()).build()
        })
    }

    fn of_things(mode: ThingIndexingMode, connectivity: ThingConnectivityIndexingMode) -> ThingIndexingConfiguration {
        let filter = IndexingFilter::builder().named_shadow_names("theirs").build();
        ThingIndexingConfiguration::builder()
            .thing_indexing_mode(mode)
            .thing_connectivity_indexing_mode(connectivity)
            .custom_fields(Field::builder().name("attributes.theirs").build())
            .managed_fields(Field::builder().name("thingName").build())
            .filter(filter)
            .build()
            .unwrap()
    }

    fn of_groups(mode: ThingGroupIndexingMode) -> ThingGroupIndexingConfiguration {
        let theirs = Field::builder().name("attributes.theirs").build();
        let groups = ThingGroupIndexingConfiguration::builder().thing_group_indexing_mode(mode);
        groups.custom_fields(theirs).managed_fields(Field::builder().name("name").build()).build().unwrap()
    }

    #[tokio::test]
    async fn what_others_have_indexed_stays() {
        let known = indexing(
            of_things(ThingIndexingMode::RegistryAndShadow, ThingConnectivityIndexingMode::Off),
            of_groups(ThingGroupIndexingMode::Off),
        );
        let mut things = of_things(ThingIndexingMode::RegistryAndShadow, ThingConnectivityIndexingMode::Status);
        let mut groups = of_groups(ThingGroupIndexingMode::On);
        (things.managed_fields, groups.managed_fields) = (None, None);
        let updated = mock!(aws_sdk_iot::Client::update_indexing_configuration)
            .match_requests(move |request| {
                request.thing_indexing_configuration() == Some(&things)
                    && request.thing_group_indexing_configuration() == Some(&groups)
            })
            .then_output(|| UpdateIndexingConfigurationOutput::builder().build());
        let iot = mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&known, &updated]);
        index_things(&iot).await.unwrap();
        assert_eq!(updated.num_calls(), 1);
        // Of things alone, in an account that has nothing indexed.
        let fresh = ThingIndexingConfiguration::builder().thing_indexing_mode(ThingIndexingMode::Off).build().unwrap();
        let changed = changed_things(Some(fresh)).unwrap().unwrap();
        assert_eq!(changed.thing_indexing_mode, ThingIndexingMode::Registry);
        assert_eq!(changed_things(None).unwrap(), Some(changed));
        assert_eq!(changed_groups(Some(of_groups(ThingGroupIndexingMode::On))), Ok(None));
    }

    #[tokio::test]
    async fn nothing_is_sent_when_nothing_changes() {
        let known = indexing(
            of_things(ThingIndexingMode::Registry, ThingConnectivityIndexingMode::Status),
            of_groups(ThingGroupIndexingMode::On),
        );
        let events = |is_on: bool| {
            mock!(aws_sdk_iot::Client::describe_event_configurations).then_output(move || {
                let job = Configuration::builder().enabled(is_on).build();
                DescribeEventConfigurationsOutput::builder()
                    .event_configurations(EventType::JobExecution, job)
                    .event_configurations(EventType::Thing, Configuration::builder().enabled(true).build())
                    .build()
            })
        };
        // Another call would have no answer.
        let iot = mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&known, &events(true)]);
        index_things(&iot).await.unwrap();
        send_events(&iot).await.unwrap();
        let updated = mock!(aws_sdk_iot::Client::update_event_configurations)
            .match_requests(|request| request.event_configurations().is_some_and(|sent| sent.len() == 1))
            .then_output(|| UpdateEventConfigurationsOutput::builder().build());
        let iot = mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&events(false), &updated]);
        send_events(&iot).await.unwrap();
        assert_eq!(updated.num_calls(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_index_is_waited_for_and_a_slow_one_is_told_of() {
        let is = |status: IndexStatus| {
            mock!(aws_sdk_iot::Client::describe_index)
                .match_requests(|request| request.index_name() == Some("AWS_Things"))
                .then_output(move || DescribeIndexOutput::builder().index_status(status.clone()).build())
        };
        let missing = mock!(aws_sdk_iot::Client::describe_index).then_error(|| {
            let meta = aws_sdk_iot::error::ErrorMetadata::builder().code("ResourceNotFoundException").build();
            DescribeIndexError::ResourceNotFoundException(ResourceNotFoundException::builder().meta(meta).build())
        });
        let (building, active) = (is(IndexStatus::Building), is(IndexStatus::Active));
        let iot = mock_client!(aws_sdk_iot, RuleMode::Sequential, [&missing, &building, &active]);
        assert_eq!(built_index(&iot).await.unwrap(), "ACTIVE");
        let slow = is(IndexStatus::Rebuilding);
        let iot = mock_client!(aws_sdk_iot, RuleMode::MatchAny, [&slow]);
        let began = Instant::now();
        assert_eq!(built_index(&iot).await.unwrap(), "REBUILDING");
        assert!(began.elapsed() >= PATIENCE && slow.num_calls() > 100, "{}", slow.num_calls());
    }

    #[test]
    fn an_answer_is_as_long_as_cloudformation_takes() {
        for reason in ["x".repeat(9000), "\u{1}".repeat(8192), "\u{e4}\"".repeat(4000), "short".to_owned()] {
            let text = with_reason(json!({"StackId": "s".repeat(200), "Data": {"DataEndpoint": "a"}}), &reason);
            assert!(text.len() <= MAX_ANSWER_BYTES, "{}", text.len());
            let answer: Value = serde_json::from_str(&text).unwrap();
            let told = answer["Reason"].as_str().unwrap();
            assert!(reason.starts_with(told) && told.len() > 4, "{told}");
            assert!(told == reason || text.len() > MAX_ANSWER_BYTES * 3 / 4, "{}", text.len());
        }
        let attributes = Attributes { index_status: "ACTIVE".into(), ..Attributes::default() };
        let expected = json!({"DataEndpoint": "", "JobsEndpoint": "", "IndexStatus": "ACTIVE"});
        assert_eq!(serde_json::to_value(attributes).unwrap(), expected);
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
