//! Pushes of settings: their executions, and the third party that settings come from.

use crate::{Cloud, eventually, saw, statuses};
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sfn::types::{ExecutionListItem, ExecutionStatus};
use device_simulator::settings_api::{SettingsApi, SettingsApiOptions};
use fleet::devices::settings::Push;
use protocol::ThingName;
use protocol::settings::Settings;
use serde_json::{Value, json};
use std::sync::OnceLock;

/// How the execution of a push has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Pushed {
    /// Its name.
    pub name: String,
    /// Its ARN.
    pub arn: String,
    /// Its final status.
    pub status: ExecutionStatus,
    /// Its output; null if it failed.
    pub output: Value,
    /// The error's name and cause; empty if it succeeded.
    pub error: (String, String),
}

/// The settings API of this process, at the address that the stack was deployed with. Its key is the secret's.
pub fn settings_api() -> &'static SettingsApi {
    static API: OnceLock<(tokio::runtime::Runtime, SettingsApi)> = OnceLock::new();
    let start = || {
        let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name}: run with `cargo xtask test`"));
        let options = SettingsApiOptions {
            listen: variable("FLEETFLOW_SETTINGS_API").parse().expect("an address"),
            api_key: Some(variable("FLEETFLOW_SETTINGS_API_KEY")),
            ..SettingsApiOptions::default()
        };
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let api = runtime.block_on(async { SettingsApi::start(options) }).expect("the settings API");
        (runtime, api)
    };
    // A runtime cannot be entered out of another one's thread.
    &API.get_or_init(|| std::thread::spawn(start).join().expect("the settings API starts")).1
}

impl Cloud {
    /// What the settings API says of a thing's user from now on.
    pub fn wants(thing: &ThingName, settings: Value) {
        settings_api().set_profile(&format!("user-{thing}"), settings);
    }

    /// The executions of a thing's pushes, in the order of their start.
    pub async fn pushes(&self, thing: &ThingName) -> Vec<ExecutionListItem> {
        self.executions_of("ConfigPushArn", thing).await
    }

    /// The executions of a thing, in the order of their start; the state machine is that of an output.
    pub async fn executions_of(&self, state_machine: &str, thing: &ThingName) -> Vec<ExecutionListItem> {
        let list = self.step_functions.list_executions().state_machine_arn(self.output(state_machine));
        let executions = list.into_paginator().items().send().collect::<Result<Vec<_>, _>>().await.expect("executions");
        let prefix = format!("{thing}-");
        let mut own: Vec<_> = executions.into_iter().filter(|execution| execution.name.starts_with(&prefix)).collect();
        own.sort_by_key(|execution| execution.start_date);
        saw(format!("executions of {thing}: {}", statuses(&own)));
        own
    }

    /// Waits until so many pushes of the thing have ended, and tells how.
    pub async fn pushed(&self, thing: &ThingName, count: usize) -> Vec<Pushed> {
        let what = format!("{count} pushes to {thing} end");
        let executions = eventually(&what, || async {
            let executions = self.pushes(thing).await;
            let ended = executions.iter().filter(|execution| execution.status != ExecutionStatus::Running).count();
            (ended >= count && executions.len() == ended).then_some(executions)
        });
        let mut pushed = Vec::new();
        for execution in executions.await {
            pushed.push(self.describe(&execution.execution_arn).await);
        }
        pushed
    }

    /// Waits until an execution has ended, and tells how.
    pub async fn ended_push(&self, arn: &str) -> Pushed {
        eventually(&format!("{arn} ends"), || async {
            let pushed = self.describe(arn).await;
            (pushed.status != ExecutionStatus::Running).then_some(pushed)
        })
        .await
    }

    async fn describe(&self, arn: &str) -> Pushed {
        let described = self.step_functions.describe_execution().execution_arn(arn).send().await.expect("an execution");
        let output = described.output.as_deref().map(|output| serde_json::from_str(output).expect("JSON"));
        let pushed = Pushed {
            name: described.name.unwrap_or_default(),
            arn: arn.to_owned(),
            status: described.status,
            output: output.unwrap_or_default(),
            error: (described.error.unwrap_or_default(), described.cause.unwrap_or_default()),
        };
        saw(format!("{} {} {:?}", pushed.name, pushed.status, pushed.error));
        pushed
    }

    /// Starts a push by hand: its execution's ARN.
    pub async fn start_push(&self, thing: &ThingName, extra: Value) -> String {
        self.start_push_of(self.output("ConfigPushArn"), thing, extra).await
    }

    /// The same by another state machine.
    pub async fn start_push_of(&self, state_machine: &str, thing: &ThingName, extra: Value) -> String {
        let mut input = json!({"thingName": thing});
        if let (Value::Object(input), Value::Object(extra)) = (&mut input, extra) {
            input.extend(extra);
        }
        let start = self.step_functions.start_execution().state_machine_arn(state_machine);
        let name = format!("{thing}-by-hand-{}", uuid::Uuid::new_v4().simple());
        start.name(name).input(input.to_string()).send().await.expect("started").execution_arn
    }

    /// The thing's item in the table of settings: its push, and what it has confirmed of a setting.
    pub async fn push_of(&self, thing: &ThingName) -> Option<Push> {
        let push = self.settings_item(thing).await?.remove("push")?;
        Some(serde_dynamo::from_attribute_value(push).expect("a push"))
    }

    /// What the thing has confirmed last.
    pub async fn confirmed(&self, thing: &ThingName) -> Settings {
        let item = self.settings_item(thing).await.unwrap_or_default().into_iter();
        let confirmed = item.filter_map(|(name, value)| {
            let name = name.strip_prefix("confirmed:")?.parse().expect("a setting");
            Some((name, serde_dynamo::from_attribute_value(value).expect("a value")))
        });
        let confirmed = confirmed.collect();
        saw(format!("{thing} has confirmed {confirmed:?}"));
        confirmed
    }

    async fn settings_item(&self, thing: &ThingName) -> Option<std::collections::HashMap<String, AttributeValue>> {
        let get = self.dynamodb.get_item().table_name(self.output("SettingsTableName")).consistent_read(true);
        get.key("thing", AttributeValue::S(thing.to_string())).send().await.expect("the table").item
    }
}
