//! What a device's user wants it to have, and what of that the device has not confirmed yet.

use super::settings::SettingsTable;
use super::settings_api::SettingsApi;
use crate::aws::now_millis;
use crate::error::unbuilt;
use crate::lambda::{MAX_INPUT_BYTES, decode};
use crate::queue::json;
use crate::tasks::{Outcome, Tasks};
use crate::{Error, ErrorName};
use jsonschema::Validator;
use protocol::ThingName;
use protocol::settings::{SettingValue, Settings};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// The settings that there are, with their limits.
const SCHEMA: &str = include_str!("../../settings.schema.json");

/// How much of a finding about a setting is told, and of all findings: Step Functions cuts the cause of an error that is
/// too long, in the middle of its JSON.
const MAX_FINDING_CHARACTERS: usize = 200;
const MAX_FINDINGS: usize = 10;

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    table: SettingsTable,
    /// None: the simulated profile.
    api: Option<SettingsApi>,
    schema: Schema,
    tasks: Tasks,
}

impl Adapters {
    /// The table and the API that the function's environment names.
    pub fn from_environment(config: &aws_config::SdkConfig) -> Result<Self, String> {
        let secret = crate::config::optional("SETTINGS_API_KEY_SECRET_ARN");
        let api = crate::config::optional("SETTINGS_API_URL").map(|url| SettingsApi::new(config, url, secret));
        Ok(Self {
            api: api.transpose()?,
            ..Self::without_api(SettingsTable::from_environment(config)?, Tasks::new(config))?
        })
    }

    /// That table and those tasks, and the simulated profile.
    pub fn without_api(table: SettingsTable, tasks: Tasks) -> Result<Self, String> {
        Ok(Self { table, api: None, schema: Schema::new()?, tasks })
    }
}

/// A state's request, as it comes out of the queue.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Request {
    /// The waiting state's token.
    task_token: String,
    /// Until when the state waits, in Unix milliseconds.
    #[serde(deserialize_with = "protocol::whole")]
    waits_until: i64,
    /// An [`Input`], read later: the state hears what is wrong with it.
    device: Box<RawValue>,
}

/// The device that a state asks about.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Input {
    thing_name: ThingName,
    /// The user's profile: the thing's attribute `externalId`, empty if it has none.
    external_id: String,
    /// When the session began, in Unix milliseconds.
    #[serde(deserialize_with = "protocol::whole")]
    connected_at: i64,
}

/// Where settings come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Source {
    /// The settings API.
    Api,
    /// The simulated profile: no API is configured.
    Simulated,
}

/// What a state machine is told.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Output {
    thing_name: ThingName,
    /// All that the user wants.
    settings: Settings,
    /// What of it the device has not confirmed.
    changed: Settings,
    /// Who said so.
    source: Source,
}

/// Answers a request. The state hears what is wrong with the device or with the settings API; a request that AWS has refused for now
/// stays in the queue. One that has waited longer than its state does costs no call of the API.
pub async fn handle(adapters: &Adapters, request: &str) -> Result<(), Error> {
    let Request { task_token, waits_until, device } = json("request for settings", request.as_bytes())?;
    if waits_until <= now_millis() {
        tracing::info!(device = device.get(), outcome = ?Outcome::Late, "its state waits no more");
        return Ok(());
    }
    let result = match settings_of(adapters, &device).await {
        Ok(output) => Ok(serde_json::to_value(output).map_err(unbuilt)?),
        Err(error) if error.name.is_transient() && error.name != ErrorName::SettingsApiUnavailable => {
            return Err(error);
        }
        Err(error) => {
            tracing::warn!(device = device.get(), error = error.name.as_str(), message = error.message);
            Err(error)
        }
    };
    let outcome = adapters.tasks.complete(&task_token, result).await?;
    tracing::info!(device = device.get(), ?outcome);
    Ok(())
}

/// Gets the profile's settings, checks them and compares them with what the device has confirmed.
async fn settings_of(adapters: &Adapters, device: &RawValue) -> Result<Output, Error> {
    let input: Input = decode(device.get(), MAX_INPUT_BYTES)?;
    if input.external_id.is_empty() {
        let message = format!("the thing {} has no attribute externalId", input.thing_name);
        return Err(Error::new(ErrorName::ExternalIdMissing, message));
    }
    let (source, settings) = match &adapters.api {
        Some(api) => (Source::Api, api.settings(&input.external_id).await?),
        None => (Source::Simulated, adapters.schema.simulated_profile()),
    };
    let settings = adapters.schema.check(&input.external_id, settings)?;
    // Last, so that what an older session was told is never sent after what a newer one was told.
    let confirmed = adapters.table.claim(&input.thing_name, input.connected_at).await?;
    let changed = changed(&settings, &confirmed);
    let thing = input.thing_name.as_str();
    tracing::info!(thing, external_id = input.external_id, ?source, settings = settings.len(), changed = changed.len());
    if source == Source::Simulated {
        tracing::warn!(
            "no settings API is configured (parameter SettingsApiUrl): every user has the same simulated profile"
        );
    }
    Ok(Output { thing_name: input.thing_name, settings, changed, source })
}

fn changed(settings: &Settings, confirmed: &Settings) -> Settings {
    let is_new = |(name, value): &(_, &SettingValue)| confirmed.get(*name).is_none_or(|has| !has.is_same(value));
    settings.iter().filter(is_new).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// `settings.schema.json`
#[derive(Debug)]
struct Schema {
    document: Value,
    validator: Validator,
}

impl Schema {
    fn new() -> Result<Self, String> {
        let document = serde_json::from_str(SCHEMA).map_err(|error| format!("settings.schema.json: {error}"))?;
        let validator =
            jsonschema::draft202012::new(&document).map_err(|error| format!("settings.schema.json: {error}"))?;
        Ok(Self { document, validator })
    }

    /// Every default that the schema gives.
    fn simulated_profile(&self) -> Value {
        let properties = self.document["properties"].as_object().into_iter().flatten();
        let defaults = properties.filter_map(|(name, property)| Some((name.clone(), property.get("default")?.clone())));
        Value::Object(defaults.collect())
    }

    /// Fails with every setting that is not allowed, its value and its limit.
    fn check(&self, external_id: &str, settings: Value) -> Result<Settings, Error> {
        let invalid = |why: String| {
            Err(Error::new(ErrorName::InvalidSettings, format!("the settings of the profile {external_id:?}: {why}")))
        };
        let findings: Vec<String> = self
            .validator
            .iter_errors(&settings)
            .map(|finding| {
                let place = finding.instance_path().to_string();
                let name = place.trim_start_matches('/');
                let text = if name.is_empty() { finding.to_string() } else { format!("{name}: {finding}") };
                if text.chars().count() <= MAX_FINDING_CHARACTERS {
                    return text;
                }
                text.chars().take(MAX_FINDING_CHARACTERS).chain(['…']).collect()
            })
            .take(MAX_FINDINGS)
            .collect();
        if !findings.is_empty() {
            return invalid(findings.join("; "));
        }
        if let Some((name, number)) = settings.as_object().into_iter().flatten().find(|(_, value)| is_rounded(value)) {
            return invalid(format!("{name}: {number} has more than 64 bits: the device would get another number"));
        }
        serde_json::from_value(settings).or_else(|error| invalid(error.to_string()))
    }
}

/// Whether a number is a whole one that had to be rounded when it was read.
fn is_rounded(value: &Value) -> bool {
    const BEYOND_64_BITS: f64 = 9_223_372_036_854_775_808.0;
    value.is_f64() && value.as_f64().is_some_and(|number| number.abs() >= BEYOND_64_BITS)
}

#[cfg(test)]
#[path = "../../../protocol/tests/damage/mod.rs"]
mod damage;

#[cfg(test)]
mod tests {
    use super::super::settings_api::{Refusal, read};
    use super::damage::{damaged, damages, within_memory};
    use super::*;
    use aws_sdk_dynamodb::error::ErrorMetadata;
    use aws_sdk_dynamodb::operation::update_item::{UpdateItemError, UpdateItemOutput};
    use aws_sdk_dynamodb::types::AttributeValue;
    use aws_sdk_sfn::operation::send_task_failure::SendTaskFailureOutput;
    use aws_sdk_sfn::operation::send_task_success::{SendTaskSuccessError, SendTaskSuccessOutput};
    use aws_smithy_mocks::{Rule, mock, mock_client};
    use proptest::prelude::*;
    use proptest::sample::Index;
    use serde_json::json;
    use ureq::{Body, http};

    fn settings(value: Value) -> Settings {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_schema_describes_settings_within_limits() {
        let schema = Schema::new().unwrap();
        for (name, property) in schema.document["properties"].as_object().unwrap() {
            name.parse::<protocol::SettingName>().unwrap();
            let has = |keyword: &str| property.get(keyword).is_some();
            let bounded = match property["type"].as_str().unwrap() {
                "number" | "integer" => has("minimum") && has("maximum"),
                "string" => has("maxLength") || has("enum"),
                other => other == "boolean",
            };
            assert!(bounded && has("description"), "{name} has limits and a description");
        }
        // The reference device knows this one.
        let simulated = schema.check("anyone", schema.simulated_profile()).unwrap();
        assert_eq!(simulated, settings(json!({"SET_TEMP": 21.5})));
    }

    #[test]
    fn what_is_not_allowed_is_named_with_its_value_and_limit() {
        let schema = Schema::new().unwrap();
        for (profile, why) in [
            (json!({"SET_TEMP": 900}), "SET_TEMP: 900 is greater than the maximum of 35"),
            (json!({"SET_TEMP": "warm"}), "SET_TEMP: \"warm\" is not of type \"number\""),
            (json!({"SET_TEMP": null}), "SET_TEMP: null is not of type \"number\""),
            (json!({"SET_COLOUR": "red"}), "Additional properties are not allowed ('SET_COLOUR' was unexpected)"),
            (json!([1]), "[1] is not of type \"object\""),
            (json!({}), "{} has less than 1 property"),
        ] {
            let error = schema.check("user-1", profile).unwrap_err();
            assert_eq!(error.name, ErrorName::InvalidSettings);
            assert_eq!(error.message, format!("the settings of the profile \"user-1\": {why}"));
        }
        let all = json!({"SET_TEMP": 19, "SET_MODE": "ECO", "SET_CHILD_LOCK": true, "SET_ROOM_NAME": "Bad"});
        assert_eq!(schema.check("user-1", all.clone()), Ok(settings(all)));
    }

    #[test]
    fn a_number_reaches_the_device_as_it_was_or_not_at_all() {
        let validator = jsonschema::draft202012::new(&json!({"type": "object"})).unwrap();
        let schema = Schema { document: Value::Null, validator };
        let check = |number: &str| {
            let profile = format!(r#"{{"SET_TEMP":{number}}}"#);
            schema.check("user-1", serde_json::from_str(&profile).unwrap())
        };
        for number in ["23.687050846691058", "24.469236594107727", "18446744073709551615", "-9223372036854775808"] {
            let settings = check(number).unwrap();
            assert_eq!(serde_json::to_string(&settings).unwrap(), format!(r#"{{"SET_TEMP":{number}}}"#));
        }
        for number in ["18446744073709551616", "-123456789012345678901234567890"] {
            let error = check(number).unwrap_err();
            assert!(error.name == ErrorName::InvalidSettings && error.message.contains("64 bits"), "{error}");
        }
    }

    #[test]
    fn a_long_value_is_cut_in_what_is_told_of_it() {
        let profile = json!({"SET_ROOM_NAME": "x".repeat(40_000)});
        let error = Schema::new().unwrap().check("user-1", profile).unwrap_err();
        assert!(error.message.chars().count() < 300 && error.message.ends_with('…'), "{}", error.message);
    }

    /// What is sent to Step Functions, and what the table is asked for, when a request is answered.
    async fn answered(request: Value, dynamodb: &[&Rule], sfn: &[&Rule]) -> Result<(), Error> {
        let table = SettingsTable::of(mock_client!(aws_sdk_dynamodb, dynamodb), "settings".into());
        let tasks = Tasks::of(mock_client!(aws_sdk_sfn, sfn));
        handle(&Adapters::without_api(table, tasks).unwrap(), &request.to_string()).await
    }

    fn request(external_id: &str, waits_until: i64) -> Value {
        let device = json!({"thingName": "gateway-1", "externalId": external_id, "connectedAt": 1.0});
        json!({"taskToken": "token", "waitsUntil": waits_until, "device": device})
    }

    fn claim() -> Rule {
        mock!(aws_sdk_dynamodb::Client::update_item)
            .match_requests(|request| request.update_expression().unwrap().contains("newestSession"))
            .then_output(|| {
                let confirmed = AttributeValue::N("20".into());
                UpdateItemOutput::builder().attributes("confirmed:SET_TEMP", confirmed).build()
            })
    }

    fn succeeds() -> Rule {
        mock!(aws_sdk_sfn::Client::send_task_success)
            .match_requests(|request| {
                let wanted = json!({"SET_TEMP": 21.5});
                let output =
                    json!({"thingName": "gateway-1", "settings": wanted, "changed": wanted, "source": "SIMULATED"});
                let sent: Value = serde_json::from_str(request.output().unwrap()).unwrap();
                request.task_token() == Some("token") && sent == output
            })
            .then_output(|| SendTaskSuccessOutput::builder().build())
    }

    fn fails(name: ErrorName) -> Rule {
        mock!(aws_sdk_sfn::Client::send_task_failure)
            .match_requests(move |request| {
                request.task_token() == Some("token") && request.error() == Some(name.as_str())
            })
            .then_output(|| SendTaskFailureOutput::builder().build())
    }

    #[tokio::test]
    async fn without_an_api_everybody_has_the_simulated_profile() {
        let (claim, succeeds) = (claim(), succeeds());
        answered(request("user-1", i64::MAX), &[&claim], &[&succeeds]).await.unwrap();
        assert_eq!((claim.num_calls(), succeeds.num_calls()), (1, 1));
    }

    #[tokio::test]
    async fn a_state_hears_what_is_wrong_with_its_device() {
        for (device, name) in [
            (request("", i64::MAX)["device"].clone(), ErrorName::ExternalIdMissing),
            (json!({"thingName": "gateway 1"}), ErrorName::InvalidInput),
        ] {
            let fails = fails(name);
            let request = json!({"taskToken": "token", "waitsUntil": i64::MAX, "device": device});
            answered(request, &[], &[&fails]).await.unwrap();
            assert_eq!(fails.num_calls(), 1, "{name}");
        }
    }

    #[tokio::test]
    async fn a_request_that_its_state_has_given_up_costs_no_call() {
        answered(request("user-1", now_millis()), &[], &[]).await.unwrap();
        let late = mock!(aws_sdk_sfn::Client::send_task_success)
            .then_error(|| SendTaskSuccessError::generic(ErrorMetadata::builder().code("TaskTimedOut").build()));
        answered(request("user-1", i64::MAX), &[&claim()], &[&late]).await.unwrap();
    }

    #[tokio::test]
    async fn what_aws_refuses_for_now_is_not_told_to_the_state() {
        let refused = mock!(aws_sdk_dynamodb::Client::update_item)
            .then_error(|| UpdateItemError::generic(ErrorMetadata::builder().code("AccessDeniedException").build()));
        let error = answered(request("user-1", i64::MAX), &[&refused], &[]).await.unwrap_err();
        assert_eq!(error.name, ErrorName::ServiceError);
    }

    #[tokio::test]
    async fn nobody_hears_of_a_request_that_has_no_token() {
        let error = answered(json!({"waitsUntil": i64::MAX, "device": {}}), &[], &[]).await.unwrap_err();
        assert_eq!(error.name, ErrorName::MalformedMessage);
    }

    #[test]
    fn only_what_the_device_has_not_confirmed_is_changed() {
        let wanted = settings(json!({"SET_TEMP": 21.5, "SET_MODE": "ECO"}));
        assert_eq!(changed(&wanted, &settings(json!({}))), wanted);
        assert_eq!(
            changed(&wanted, &settings(json!({"SET_TEMP": 21.5, "SET_MODE": "AUTO"}))),
            settings(json!({"SET_MODE": "ECO"}))
        );
        let confirmed = settings(json!({"SET_TEMP": 21.5, "SET_MODE": "ECO", "SET_CHILD_LOCK": true}));
        assert_eq!(changed(&wanted, &confirmed), Settings::new());
    }

    /// What a hostile answer of the settings API ends as; none if it is good, or asked for again.
    fn outcome(schema: &Schema, status: u16, body: Vec<u8>) -> Option<Error> {
        let answer = http::Response::builder().status(status).body(Body::builder().data(body)).unwrap();
        match read(answer, "user-1") {
            Ok(settings) => schema.check("user-1", settings).err(),
            Err(Refusal::Final(error)) => Some(error),
            Err(Refusal::Key(_) | Refusal::Busy(..) | Refusal::Transient(..)) => None,
        }
    }

    proptest! {
        #[test]
        fn no_answer_of_the_settings_api_makes_the_function_panic(
            status in prop_oneof![3 => Just(200), 1 => 100_u16..1000], which in any::<Index>(), damages in damages()
        ) {
            let answers = [r#"{"settings":{"SET_TEMP":21.5,"SET_MODE":"ECO"}}"#, r#"{"settings":{"SET_ROOM_NAME":"Bad"}}"#];
            let body = damaged(&answers.map(|answer| answer.as_bytes().to_vec()), which, &damages);
            let schema = Schema::new().unwrap();
            let error = within_memory("the settings API's answer", body.len(), || outcome(&schema, status, body));
            let known = [ErrorName::InvalidSettings, ErrorName::ProfileNotFound, ErrorName::SettingsApiRefused];
            prop_assert!(error.is_none_or(|error| known.contains(&error.name) && error.message.len() < 10_000));
        }
    }
}
