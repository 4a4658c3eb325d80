//! Files against each other: names that must agree are compared, rules of the architecture are checked.

use aws_config::{BehaviorVersion, SdkConfig};
use fleet::ErrorName;
use fleet::devices::settings_api::TIME_BUDGET;
use fleet::error::FINAL_AWS_ERRORS;
use fleet::lambda::{batch, logged};
use fleet::queue::DeadLetters;
use fleet::recovery::restore_attributes::{Action, Outcome};
use fleet::telemetry::{METRICS, NAMESPACE, ingest_telemetry};
use fleet::things::WrittenAttribute;
use lambda_runtime::tracing::subscriber::{fmt, util::SubscriberInitExt};
use protocol::events::EventType;
use protocol::recovery::{Decision, UpdateStatus};
use protocol::telemetry::{readings_topic, remediations_topic};
use protocol::{Step, protocol_of_topic};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::future::ready;
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The template as JSON; `!Ref X` and the like become their values.
fn template() -> Value {
    fn untag(value: serde_yaml_ng::Value) -> serde_yaml_ng::Value {
        use serde_yaml_ng::Value;
        match value {
            Value::Tagged(tagged) => untag(tagged.value),
            Value::Sequence(items) => Value::Sequence(items.into_iter().map(untag).collect()),
            Value::Mapping(fields) => Value::Mapping(fields.into_iter().map(|(k, v)| (untag(k), untag(v))).collect()),
            other => other,
        }
    }
    let yaml = serde_yaml_ng::from_str(&read("template.yaml")).expect("template.yaml is YAML");
    serde_json::to_value(untag(yaml)).expect("and has JSON's shape")
}

/// The tenants of the template.
const TENANTS: [&str; 2] = ["tenant1", "tenant2"];

fn resources(kind: &str) -> BTreeMap<String, Value> {
    let template = template();
    let resources = template["Resources"].as_object().expect("Resources");
    resources.iter().filter(|(_, r)| r["Type"] == kind).map(|(name, r)| (name.clone(), r.clone())).collect()
}

fn state_machines() -> Vec<(String, Value)> {
    let folder = std::fs::read_dir(root().join("statemachine")).expect("statemachine/");
    let files = folder.map(|entry| entry.expect("a file").file_name().into_string().expect("a name"));
    files
        .map(|name| {
            let text = read(&format!("statemachine/{name}"));
            (name, serde_json::from_str(&text).expect("a state machine is JSON"))
        })
        .collect()
}

/// Every value below a field of that name.
fn all<'a>(value: &'a Value, field: &str, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                if name == field {
                    found.push(value);
                }
                all(value, field, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| all(item, field, found)),
        _ => {}
    }
}

/// Every text in it.
fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => fields.values().for_each(|value| texts(value, found)),
        Value::Array(items) => items.iter().for_each(|item| texts(item, found)),
        Value::String(text) => found.push(text),
        _ => {}
    }
}

#[test]
fn a_function_is_named_after_its_binary_and_its_binary_after_its_module() {
    let functions = resources("AWS::Serverless::Function");
    let from_template: BTreeSet<String> = functions
        .iter()
        .map(|(name, function)| {
            let binary = function["Metadata"]["BuildProperties"]["Binary"].as_str().expect("Binary").to_owned();
            let camel: String = binary.split('-').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
            assert_eq!(*name, format!("{camel}Function"));
            binary
        })
        .collect();
    let bins = std::fs::read_dir(root().join("crates/fleet/src/bin")).expect("bins");
    let from_folder: BTreeSet<String> = bins
        .map(|entry| entry.expect("a file").path().file_stem().expect("a name").to_str().expect("UTF-8").to_owned())
        .collect();
    assert_eq!(from_template, from_folder);
    for name in from_folder {
        let source = read(&format!("crates/fleet/src/bin/{name}.rs"));
        let camel: String = name.split('-').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        assert!(source.starts_with(&format!("//! `{camel}Function`")), "{name}");
        let module = name.replace('-', "_");
        // Two functions share the presence of devices.
        assert!(source.contains(&module) || source.contains("presence::"), "{name} runs its own module");
    }
}

/// A stack's name has up to 128 characters, and these names stand in it as they are.
#[test]
fn names_of_the_template_fit_whatever_the_stack_is_called() {
    let template = resources("AWS::IoT::JobTemplate").remove("FirmwareJobTemplate").expect("the job template");
    let id = &template["Properties"]["JobTemplateId"];
    let text = id[0].as_str().expect("a text with two variables");
    assert_eq!(id[1]["StackUuid"], serde_json::json!([2, ["/", "AWS::StackId"]]), "the UUID of the stack");
    let longest = text.replace("${StackUuid}", &"x".repeat(36)).replace("${JobTimeoutMinutes}", "10080");
    assert_eq!(protocol::fields::JOB_ID.check(&longest), Ok(()), "{longest}");
    for (name, group) in resources("AWS::Logs::LogGroup") {
        // https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_CreateLogGroup.html
        let text = group["Properties"]["LogGroupName"].as_str().unwrap_or_default();
        assert!(text.replace("${AWS::StackName}", &"x".repeat(128)).len() <= 512, "{name}");
    }
}

#[test]
fn contexts_meet_only_in_messages() {
    let contexts = ["jobs", "workflows", "devices", "recovery", "telemetry"];
    for context in contexts {
        for entry in std::fs::read_dir(root().join("crates/fleet/src").join(context)).expect("a context") {
            let path = entry.expect("a file").path();
            let source = std::fs::read_to_string(&path).expect("source");
            for other in contexts.into_iter().filter(|other| *other != context) {
                let allowed = context == "devices" && other == "workflows";
                let imports = source.lines().filter(|line| line.contains(&format!("crate::{other}")));
                for line in imports {
                    assert!(allowed && line.contains("workflows::rendezvous"), "{}: {line}", path.display());
                }
            }
        }
    }
    for device_side in ["device-simulator", "crates/on-premises-worker", "crates/mqtt-connection"] {
        assert!(!read(&format!("{device_side}/Cargo.toml")).contains("fleet"), "{device_side} does not link the cloud");
    }
    assert!(!read("crates/on-premises-worker/Cargo.toml").contains("aws-"), "the worker knows no AWS but the broker");
    assert!(!read("crates/protocol/Cargo.toml").contains("aws"), "messages know no AWS");
}

/// What other crates of the same build ask of `serde_json` is not there when one is built alone, as the worker's container does.
#[test]
fn who_passes_json_on_asks_for_exact_numbers_itself() {
    for package in ["crates/protocol", "crates/fleet", "crates/on-premises-worker"] {
        let manifest = read(&format!("{package}/Cargo.toml"));
        let line = manifest.lines().find(|line| line.starts_with("serde_json")).expect("serde_json");
        assert!(line.contains("float_roundtrip") && line.contains("raw_value"), "{package}: {line}");
    }
}

#[test]
fn state_machines_go_only_where_there_is_something_and_everywhere_there_is() {
    for (file, machine) in state_machines() {
        let states = machine["States"].as_object().expect("States");
        let mut reached = BTreeSet::from([machine["StartAt"].as_str().expect("StartAt")]);
        for (name, state) in states {
            let mut targets = Vec::new();
            all(state, "Next", &mut targets);
            all(state, "Default", &mut targets);
            for target in targets {
                let target = target.as_str().expect("a name");
                assert!(states.contains_key(target), "{file}: {name} goes to {target}, which does not exist");
                reached.insert(target);
            }
            let end = state.get("End").is_some() || matches!(state["Type"].as_str(), Some("Fail" | "Succeed"));
            assert!(end || state.get("Next").is_some() || state["Type"] == "Choice", "{file}: {name} goes nowhere");
        }
        let all: BTreeSet<&str> = states.keys().map(String::as_str).collect();
        assert_eq!(reached, all, "{file}: every state is reached");
        assert!(states.len() <= 15, "{file}: {} states are more than a reader keeps in mind", states.len());
        assert!(machine["Comment"].is_string() && machine["QueryLanguage"] == "JSONata");
        // Longer than a task tries again at most (waits of 511 + 31 * 300 s, attempts of a minute or two).
        assert!(machine["TimeoutSeconds"].as_u64().is_some_and(|seconds| seconds >= 6 * 3600), "{file}");
    }
}

/// In China and in `GovCloud`, ARNs begin otherwise
/// (<https://docs.aws.amazon.com/IAM/latest/UserGuide/reference-arns.html>).
#[test]
fn no_partition_is_written_down() {
    for (file, machine) in state_machines() {
        for (name, state) in machine["States"].as_object().expect("States").iter().filter(|(_, s)| s["Type"] == "Task")
        {
            let resource = state["Resource"].as_str().expect("a resource");
            assert!(resource.starts_with("arn:${Partition}:states:::"), "{file}: {name}: {resource}");
        }
    }
    for (name, machine) in resources("AWS::Serverless::StateMachine") {
        assert_eq!(machine["Properties"]["DefinitionSubstitutions"]["Partition"], "AWS::Partition", "{name}");
    }
    let files = state_machines().into_iter().map(|(file, _)| format!("statemachine/{file}"));
    for file in files.chain(["template.yaml".to_owned()]) {
        let text = read(&file);
        let found = text.lines().find(|line| line.contains("arn:aws"));
        assert_eq!(found, None, "{file}");
    }
}

#[test]
fn every_task_has_a_deadline_and_a_catch() {
    for (file, machine) in state_machines() {
        for (name, state) in machine["States"].as_object().expect("States") {
            if state["Type"] != "Task" {
                continue;
            }
            assert!(state.get("TimeoutSeconds").is_some(), "{file}: {name} has no deadline");
            let catches = state["Catch"].as_array().unwrap_or_else(|| panic!("{file}: {name} has no catch"));
            let last = catches.last().expect("a catcher");
            assert_eq!(last["ErrorEquals"], serde_json::json!(["States.ALL"]), "{file}: {name}");
        }
    }
}

/// One rule for all tasks: what cannot pass stops at once, everything else is tried again, whatever it is called. Only
/// time-outs have a rule of the state's own, and a third party that asks for patience.
#[test]
fn every_task_tries_again_what_it_does_not_know() {
    let is_final = |name: &ErrorName| !name.is_transient();
    let ours = ErrorName::ALL.into_iter().filter(is_final).map(ErrorName::as_str);
    let names: Vec<&str> = ours.chain(FINAL_AWS_ERRORS).collect();
    let first = serde_json::json!({"ErrorEquals": names, "MaxAttempts": 0});
    // An hour's outage ends nothing: half of 1 + 2 + … + 256 s and of 31 times 300 s are 82 minutes on average.
    let last = serde_json::json!({
        "ErrorEquals": ["States.ALL"],
        "IntervalSeconds": 1, "MaxAttempts": 40, "BackoffRate": 2, "MaxDelaySeconds": 300, "JitterStrategy": "FULL",
    });
    let own_rules = ["States.Timeout", "States.HeartbeatTimeout", "SettingsApiUnavailable"];
    for (file, machine) in state_machines() {
        for (name, state) in machine["States"].as_object().expect("States").iter().filter(|(_, s)| s["Type"] == "Task")
        {
            let retries = state["Retry"].as_array().unwrap_or_else(|| panic!("{file}: {name} has no retry"));
            assert_eq!(retries.first(), Some(&first), "{file}: {name} stops at what cannot pass");
            assert_eq!(retries.last(), Some(&last), "{file}: {name} tries everything else again");
            for rule in &retries[1..retries.len() - 1] {
                let mut names = Vec::new();
                texts(&rule["ErrorEquals"], &mut names);
                assert!(names.iter().all(|name| own_rules.contains(name)), "{file}: {name} has a rule for {names:?}");
            }
        }
    }
}

#[test]
fn state_machines_use_no_names_but_those_of_rust_and_aws() {
    let ours: BTreeSet<&str> = ErrorName::ALL.into_iter().map(ErrorName::as_str).collect();
    let of_aws = |name: &str| name.starts_with("States.") || FINAL_AWS_ERRORS.contains(&name);
    let steps: BTreeSet<&str> = Step::ALL.into_iter().map(Step::name).collect();
    for (file, machine) in state_machines() {
        let mut errors = Vec::new();
        all(&machine, "ErrorEquals", &mut errors);
        let mut names = Vec::new();
        for value in errors {
            texts(value, &mut names);
        }
        for name in names {
            assert!(ours.contains(name) || of_aws(name), "{file}: no such error: {name}");
        }
        let mut reasons = Vec::new();
        all(&machine, "reason", &mut reasons);
        for reason in reasons.iter().filter_map(|reason| reason.as_str()).filter(|reason| !reason.starts_with("{%")) {
            assert!(ours.contains(reason), "{file}: no such reason: {reason}");
        }
        // Steps that are waited for are those that devices report.
        for state in machine["States"].as_object().expect("States").values() {
            let awaited = &state["Arguments"]["Payload"]["step"];
            assert!(awaited.is_null() || steps.contains(awaited.as_str().expect("a step")), "{file}: {awaited}");
        }
        let mut kinds = Vec::new();
        all(&machine, "StringValue", &mut kinds);
        for kind in kinds {
            assert!(serde_json::from_value::<EventType>(kind.clone()).is_ok(), "{file}: no such event: {kind}");
        }
    }
    for subscription in resources("AWS::SNS::Subscription").values() {
        for kind in subscription["Properties"]["FilterPolicy"]["eventType"].as_array().into_iter().flatten() {
            assert!(serde_json::from_value::<EventType>(kind.clone()).is_ok(), "no such event: {kind}");
        }
    }
}

#[test]
fn the_recovery_asks_for_actions_and_decisions_that_there_are() {
    let file: Value = serde_json::from_str(&read("statemachine/failed-update-recovery.asl.json")).expect("JSON");
    let mut actions = Vec::new();
    all(&file, "action", &mut actions);
    assert_eq!(actions.len(), 4, "park, restore, and quarantine twice");
    for action in actions {
        assert!(serde_json::from_value::<Action>(action.clone()).is_ok(), "{action}");
    }
    for (state, value, names) in [
        ("ChooseAction", "$states.input.decision", vec![json(Decision::Park), json(Decision::Quarantine)]),
        ("IsQuarantined", "$outcome", vec![json(Outcome::Quarantined)]),
    ] {
        let choices = file["States"][state]["Choices"].as_array().expect("choices");
        let conditions: Vec<&str> = choices.iter().filter_map(|choice| choice["Condition"].as_str()).collect();
        let expected: Vec<String> = names.iter().map(|name| format!("{{% {value} = '{name}' %}}")).collect();
        assert_eq!(conditions, expected, "{state}");
    }
    // What hides a device is known to the code alone.
    for path in ["statemachine/failed-update-recovery.asl.json", "template.yaml"] {
        let text = read(path);
        assert!(!text.contains("moveOut") && !text.contains("failedtoupdate"), "{path}");
    }
}

fn json(name: impl serde::Serialize) -> String {
    serde_json::to_value(name).expect("JSON").as_str().expect("a name").to_owned()
}

/// All devices publish their reports on one topic: they must be things at least, and the cloud believes them only about
/// themselves.
#[test]
fn only_things_report_on_updates() {
    let policy = &resources("AWS::IoT::Policy")["DevicePolicy"]["Properties"]["PolicyDocument"];
    let statements = policy["Statement"].as_array().expect("statements");
    let names = |statement: &&Value| statement.to_string().contains("topic/iot/device/data");
    let ours: Vec<&Value> = statements.iter().filter(names).collect();
    assert_eq!(ours.len(), 1);
    assert_eq!(ours[0]["Action"], "iot:Publish");
    assert_eq!(ours[0]["Condition"]["Bool"]["iot:Connection.Thing.IsAttached"], "true");
}

/// A tenant's workers reach that tenant's topics under that tenant's client ids, and nothing else.
#[test]
fn a_worker_reaches_its_own_tenant_only() {
    use protocol::on_premises::{answers_topic, jobs_topic, replies_topic};
    let worker = "worker-1".parse().expect("a worker");
    for tenant in TENANTS.map(|name| name.parse::<protocol::Tenant>().expect("a tenant")) {
        let name = format!("{}WorkerPolicy", tenant.as_str().replacen('t', "T", 1));
        let policy = &resources("AWS::IoT::Policy")[&name]["Properties"]["PolicyDocument"];
        let mut found = BTreeSet::new();
        for statement in policy["Statement"].as_array().expect("statements") {
            let mut resources = Vec::new();
            texts(&statement["Resource"], &mut resources);
            for resource in resources {
                let name = resource.rsplit(':').next().expect("a name");
                found.insert(format!("{} {name}", statement["Action"].as_str().expect("an action")));
            }
        }
        let [jobs, replies] = [jobs_topic(&tenant), replies_topic(&tenant, &worker).replace("worker-1", "*")];
        let expected = [
            format!("iot:Connect client/{tenant}.*"),
            format!("iot:Subscribe topicfilter/{jobs}"),
            format!("iot:Subscribe topicfilter/{replies}"),
            format!("iot:Receive topic/{jobs}"),
            format!("iot:Receive topic/{replies}"),
            format!("iot:Publish topic/{}", answers_topic(&tenant)),
        ];
        assert_eq!(found, BTreeSet::from(expected), "{tenant}");
    }
    let names =
        read("template.yaml").lines().filter(|line| line.trim() == format!("TENANTS: {}", TENANTS.join(","))).count();
    assert_eq!(names, 2, "publish-to-device and handle-device-response know all tenants");
    assert!(protocol::Tenant::try_from("a.b".to_owned()).is_err(), "or a tenant could begin with another's client ids");
}

/// A sensor reaches the topics of its own building, and nothing else.
#[test]
fn a_sensor_reaches_its_own_building_only() {
    let policy = &resources("AWS::IoT::Policy")["MonitoringDevicePolicy"]["Properties"]["PolicyDocument"];
    let statements = policy["Statement"].as_array().expect("statements");
    let found: BTreeSet<String> = statements
        .iter()
        .map(|statement| {
            let resource = statement["Resource"].as_str().expect("one resource");
            let name = resource.strip_prefix("arn:${AWS::Partition}:iot:${AWS::Region}:${AWS::AccountId}:");
            format!("{} {}", statement["Action"].as_str().expect("an action"), name.expect("of this account"))
        })
        .collect();
    let own = |topic: String| topic.replace("BUILDING", "${!iot:Connection.Thing.Attributes[building]}");
    let building = "BUILDING".parse().expect("a building");
    let expected = [
        "iot:Connect client/${!iot:Connection.Thing.ThingName}".to_owned(),
        format!("iot:Publish topic/{}", own(readings_topic(&building))),
        format!("iot:Subscribe topicfilter/{}", own(remediations_topic(&building))),
        format!("iot:Receive topic/{}", own(remediations_topic(&building))),
    ];
    assert_eq!(found, BTreeSet::from(expected));
    assert_eq!(statements[0]["Condition"]["Bool"]["iot:Connection.Thing.IsAttached"], "true");
}

/// Only new rows are news, those that fail for good are put aside, and the function can be switched off.
#[test]
fn the_stream_of_readings_brings_new_ones_and_cannot_get_stuck() {
    let mapping = &resources("AWS::Lambda::EventSourceMapping")["RemediateMapping"]["Properties"];
    assert_eq!(mapping["FilterCriteria"]["Filters"], serde_json::json!([{"Pattern": "{\"eventName\":[\"INSERT\"]}"}]));
    assert_eq!(mapping["FunctionResponseTypes"], serde_json::json!(["ReportBatchItemFailures"]));
    assert_eq!(mapping["DestinationConfig"]["OnFailure"]["Destination"], "DeadLetterQueue.Arn");
    assert!(mapping["MaximumRetryAttempts"].is_u64() && mapping["BisectBatchOnFunctionError"] == true);
    assert_eq!(mapping["Enabled"], "RemediationEnabled");
}

/// A call that takes a batch of readings over must know that the other one has ended.
#[test]
fn a_batch_of_readings_is_taken_over_only_from_a_call_that_has_ended() {
    let template = template();
    let timeout = template["Globals"]["Function"]["Timeout"].as_i64().expect("Timeout");
    assert!(template["Resources"]["IngestTelemetryFunction"]["Properties"]["Timeout"].is_null(), "it has the default");
    assert!(timeout * 1000 < ingest_telemetry::LONGEST_CALL);
    let visibility = template["Resources"]["TelemetryQueue"]["Properties"]["VisibilityTimeout"].as_i64();
    let window = template["Parameters"]["TelemetryWindowSeconds"]["MaxValue"].as_i64();
    assert!(visibility.expect("VisibilityTimeout") >= 6 * timeout + window.expect("MaxValue"));
}

/// A call that hangs fails before its function is ended.
#[test]
fn no_call_takes_as_long_as_a_function_may_run() {
    let timeouts = resources("AWS::Serverless::Function");
    let own = timeouts.values().filter_map(|function| function["Properties"]["Timeout"].as_u64());
    let shortest = own.chain(template()["Globals"]["Function"]["Timeout"].as_u64()).min().expect("a time limit");
    assert!(fleet::aws::CALL_LIMIT.as_secs() < shortest);
}

/// However many devices come online and however the settings API is: no more than the mapping's concurrency wait for it, each for
/// its budget at most, and a request is good for as long as its state waits.
#[test]
fn what_the_settings_api_can_hold_up_is_bounded() {
    let mapping = &resources("AWS::Lambda::EventSourceMapping")["SettingsRequestsQueueMapping"]["Properties"];
    let bound = serde_json::json!({"MaximumConcurrency": "SettingsApiConcurrency"});
    assert_eq!((&mapping["BatchSize"], &mapping["ScalingConfig"]), (&serde_json::json!(1), &bound));
    let function = &resources("AWS::Serverless::Function")["GetDeviceSettingsFunction"]["Properties"];
    assert!(function.get("Events").is_none(), "nothing else invokes it");
    let timeout = function["Timeout"].as_u64().expect("Timeout");
    assert!(TIME_BUDGET.as_secs() + fleet::aws::CALL_LIMIT.as_secs() < timeout);
    let queue = &resources("AWS::SQS::Queue")["SettingsRequestsQueue"]["Properties"];
    assert_eq!(queue["VisibilityTimeout"], 6 * timeout);
    let machines = state_machines();
    let state = machines.iter().find_map(|(_, machine)| machine["States"].get("GetSettings")).expect("GetSettings");
    let wait = state["TimeoutSeconds"].as_u64().expect("TimeoutSeconds");
    assert_eq!(state["Arguments"]["MessageBody"]["waitsUntil"], format!("{{% $millis() + {wait}000 %}}"));
}

/// While AWS takes no answers for an hour, devices have answered all the same.
#[test]
fn the_waits_for_a_device_outlast_an_hour() {
    const HOUR: u64 = 3600;
    let template = template();
    let seconds = |parameter: &str, field: &str| template["Parameters"][parameter][field].as_u64().expect("a number");
    for parameter in ["TransferTimeoutSeconds", "InstallTimeoutSeconds", "RebootTimeoutSeconds"] {
        assert!(seconds(parameter, "Default") > HOUR, "{parameter}");
    }
    let machines = state_machines();
    for (name, parameter) in
        [("DispatchDownload", "AcknowledgeTimeoutSeconds"), ("PushSettings", "SettingTimeoutSeconds")]
    {
        let states = machines.iter().find_map(|(_, machine)| machine["States"].get(name));
        let state = states.expect("the state");
        let value = format!("${{{parameter}}}");
        let wait = format!(
            "{{% ($since := ($millis() - $toMillis($states.context.State.EnteredTime)) / 1000; \
             $since < {value} ? {value} : $since < 6 * {value} ? 5 * {value} : 25 * {value}) %}}"
        );
        assert_eq!(state["TimeoutSeconds"], wait);
        let retriers = state["Retry"].as_array().expect("retriers");
        let timed_out = retriers.iter().find(|retrier| retrier["ErrorEquals"][0] == "States.Timeout");
        assert_eq!(timed_out.expect("a retrier")["MaxAttempts"], 2, "{name} waits three times");
        assert!((1 + 5 + 25) * seconds(parameter, "Default") > HOUR, "{name}");
    }
    // A push has room for the longest of these beside what it waits for its settings: an hour, five times.
    let push = machines.iter().find(|(_, machine)| machine["States"].get("PushSettings").is_some()).expect("the push");
    let limit = push.1["TimeoutSeconds"].as_u64().expect("a limit");
    assert!(5 * HOUR + 31 * seconds("SettingTimeoutSeconds", "MaxValue") < limit);
}

/// A dashboard that CloudWatch cannot read is deployed all the same, and is empty.
#[test]
fn the_dashboard_is_json_and_shows_metrics_that_there_are() {
    let dashboard = &resources("AWS::CloudWatch::Dashboard")["TelemetryDashboard"]["Properties"]["DashboardBody"];
    let body: Value = serde_json::from_str(dashboard.as_str().expect("a text")).expect("JSON");
    let mut widgets = Vec::new();
    all(&body, "metrics", &mut widgets);
    let metrics = widgets.into_iter().flat_map(|metrics| metrics.as_array().expect("metrics"));
    // A shorter one repeats the metric before it.
    let whole = metrics.filter(|metric| metric.as_array().is_some_and(|parts| parts.len() > 3));
    let shown: BTreeSet<&str> = whole.filter_map(|metric| metric[1].as_str()).collect();
    assert_eq!(shown, BTreeSet::from(METRICS));
}

/// Six of each building, each with somebody who is told and a deliberate way with missing data.
#[test]
fn alarms_of_buildings_watch_metrics_that_there_are() {
    let mut found = BTreeMap::new();
    for (name, alarm) in resources("AWS::CloudWatch::Alarm") {
        let Some(rest) = name.strip_prefix("Building") else { continue };
        let alarm = &alarm["Properties"];
        let is_anomaly = name.ends_with("AnomalyAlarm");
        let metric = if is_anomaly { &alarm["Metrics"][0]["MetricStat"]["Metric"] } else { alarm };
        assert_eq!(metric["Namespace"], NAMESPACE, "{name}");
        assert!(METRICS.contains(&metric["MetricName"].as_str().expect("a name")), "{name}");
        assert!(rest[1..].starts_with(metric["MetricName"].as_str().expect("a name")), "{name}");
        assert_eq!(metric["Dimensions"][0], serde_json::json!({"Name": "Building", "Value": &rest[..1]}), "{name}");
        assert_eq!(alarm["TreatMissingData"], "missing", "{name}");
        for actions in ["AlarmActions", "OKActions"] {
            assert_eq!(alarm[actions][0], "AlarmTopic", "{name}");
        }
        *found.entry(rest[..1].to_owned()).or_insert(0) += 1;
    }
    assert_eq!(found, BTreeMap::from([("1".to_owned(), 6), ("2".to_owned(), 6)]));
}

#[test]
fn every_placeholder_of_a_state_machine_is_filled() {
    for machine in resources("AWS::Serverless::StateMachine").values() {
        let text = read(machine["Properties"]["DefinitionUri"].as_str().expect("DefinitionUri"));
        let given: BTreeSet<&str> = machine["Properties"]["DefinitionSubstitutions"]
            .as_object()
            .expect("substitutions")
            .keys()
            .map(String::as_str)
            .collect();
        let asked: BTreeSet<&str> =
            text.split("${").skip(1).map(|rest| rest.split_once('}').expect("a closed placeholder").0).collect();
        assert_eq!(given, asked);
    }
}

#[test]
fn rules_listen_where_devices_speak() {
    let mut heard = BTreeSet::new();
    for (name, rule) in resources("AWS::IoT::TopicRule") {
        let payload = &rule["Properties"]["TopicRulePayload"];
        let sql = payload["Sql"].as_str().expect("Sql");
        assert!(payload["ErrorAction"].is_object(), "{name}: what a rule cannot deliver goes to the dead-letter queue");
        let filter = sql.split('\'').nth(3).expect("a topic filter");
        if let Some(thing) = protocol::settings::thing_of_response(&filter.replacen('+', "gateway-1", 1)) {
            assert_eq!(thing.as_str(), "gateway-1", "{name}");
            heard.insert("settings".to_owned());
        }
        if filter == protocol::recovery::UPDATE_REPORTS_TOPIC {
            let status = sql.split('\'').nth(5).map(|status| serde_json::from_value::<UpdateStatus>(status.into()));
            let status = status.transpose().expect("a status of ours");
            assert_eq!(
                status.is_none(),
                sql.ends_with("WHERE isUndefined(status) AND isUndefined(timestamp)"),
                "{name}"
            );
            heard.insert(format!("{status:?}"));
        }
        if filter == "monitoring-device/+" {
            // Remediations are published beside the readings: they must not come back.
            assert!(sql.ends_with("WHERE regexp_matches(topic(2), '^building-')"), "{name}");
            let building = "1".parse().expect("a building");
            let topics = [readings_topic(&building), remediations_topic(&building)];
            let is_heard = topics.map(|topic| topic.split('/').nth(1).expect("two levels").starts_with("building-"));
            assert_eq!(is_heard, [true, false], "{name}");
            heard.insert("readings".to_owned());
        }
        if let Some(tenant) = protocol::on_premises::tenant_of_answer(filter) {
            assert_eq!(name.to_lowercase(), format!("{tenant}answersrule"));
            heard.insert(tenant.to_string());
        }
        if let Ok((protocol, thing)) = protocol_of_topic(&filter.replacen('+', "gateway-1", 1), "gateway-1") {
            assert_eq!(thing.as_str(), "gateway-1", "{name}");
            heard.insert(protocol.to_string());
        }
        if let Some(level) = filter.strip_suffix('#') {
            // Where the topic names no thing, the client does.
            assert!(sql.contains("clientid() AS clientId, principal() AS principal"), "{name}");
            for topic in ["agents/gateway-1/response", "agents/gateway-1/reply", "reply", "reply/reply-to=agents%2Fx"] {
                let (protocol, thing) =
                    protocol_of_topic(&format!("{level}{topic}"), "gateway-1").expect("one of ours");
                assert_eq!(thing.as_str(), "gateway-1", "{name}: {topic}");
                heard.insert(protocol.to_string());
            }
        }
    }
    assert_eq!(
        heard,
        BTreeSet::from(
            ["None", "Some(Failed)", "Some(Succeeded)", "json", "readings", "settings", "tenant1", "tenant2", "usp"]
                .map(str::to_owned)
        )
    );
}

/// The rules of all stacks of an account hear everything: what no topic tells apart is handled once.
#[test]
fn a_second_stack_leaves_what_topics_do_not_tell_apart_to_the_first() {
    let mut left = BTreeSet::new();
    for (name, rule) in resources("AWS::IoT::TopicRule") {
        if let Some(condition) = rule.get("Condition") {
            assert_eq!(condition, "OwnsDeviceTopics", "{name}");
            left.insert(name);
        }
    }
    let expected = [
        "FailedUpdatesRule",
        "SucceededUpdatesRule",
        "TelemetryRule",
        "Tenant1AnswersRule",
        "Tenant2AnswersRule",
        "UnreadUpdatesRule",
    ];
    assert_eq!(left, expected.map(str::to_owned).into());
    let asked =
        ["StartWorkflowFunction", "HandleDeviceResponseFunction", "PublishToDeviceFunction", "StoreTaskTokenFunction"];
    for function in asked {
        let variables = &resources("AWS::Serverless::Function")[function]["Properties"]["Environment"]["Variables"];
        assert_eq!(variables["DEVICE_TOPICS"], "DeviceTopics", "{function}");
    }
}

/// A stack that is updated asks its custom resource again only if a property of it changes: whoever adds an answer counts up.
#[test]
fn an_updated_stack_asks_for_what_is_new() {
    let settings = &resources("AWS::CloudFormation::CustomResource")["IotSettings"]["Properties"];
    let template = template();
    let mut found = Vec::new();
    texts(&template, &mut found);
    let answers: BTreeSet<_> = found.into_iter().filter_map(|text| text.strip_prefix("IotSettings.")).collect();
    assert_eq!(
        (settings["Revision"].as_i64(), answers),
        (Some(2), BTreeSet::from(["DataEndpoint", "IndexStatus", "JobsEndpoint"]))
    );
}

/// In a stack that is updated as well: a command is answered on a topic that is heard and that devices may use.
#[test]
fn no_command_is_sent_before_its_answer_is_heard() {
    let publisher = &resources("AWS::Serverless::Function")["PublishToDeviceFunction"];
    assert_eq!(publisher["DependsOn"], serde_json::json!(["DevicePolicy", "UspResponsesRule"]));
}

#[test]
fn every_message_from_outside_goes_through_a_queue_with_a_dead_letter_queue() {
    for (name, queue) in resources("AWS::SQS::Queue") {
        assert_eq!(queue["Properties"]["SqsManagedSseEnabled"], true, "{name} is encrypted");
        // People read the one of quarantines.
        if name == "QuarantineQueue" {
            let alarm = &resources("AWS::CloudWatch::Alarm")["QuarantineAlarm"]["Properties"];
            assert_eq!(alarm["Dimensions"][0]["Value"], "QuarantineQueue.QueueName");
            let subscription = &resources("AWS::SNS::Subscription")["QuarantineSubscription"]["Properties"];
            assert_eq!(subscription["Endpoint"], "QuarantineQueue.Arn");
            assert_eq!(subscription["TopicArn"], "QuarantineTopic");
        } else if name != "DeadLetterQueue" {
            let target = &queue["Properties"]["RedrivePolicy"]["deadLetterTargetArn"];
            assert_eq!(target, "DeadLetterQueue.Arn", "{name}");
            // Throttling counts as receiving; a message comes back once a minute or less, and more than an hour of it loses none.
            let timeout = queue["Properties"]["VisibilityTimeout"].as_u64().expect("a time-out");
            let receives = queue["Properties"]["RedrivePolicy"]["maxReceiveCount"].as_u64().expect("a count");
            let kept = queue["Properties"]["MessageRetentionPeriod"].as_u64().expect("a time");
            assert!(receives == 100 && receives * timeout >= 90 * 60 && receives * timeout < kept, "{name}");
            let mapping = &resources("AWS::Lambda::EventSourceMapping")[&format!("{name}Mapping")]["Properties"];
            assert_eq!(mapping["FunctionResponseTypes"], serde_json::json!(["ReportBatchItemFailures"]), "{name}");
            assert!(resources("AWS::CloudWatch::Alarm").contains_key(&format!("{name}AgeAlarm")), "{name}");
        }
    }
    for (name, rule) in resources("AWS::IoT::TopicRule") {
        let actions = rule["Properties"]["TopicRulePayload"]["Actions"].as_array().expect("actions").clone();
        assert!(actions.iter().all(|action| action.get("Sqs").is_some()), "{name}");
    }
}

/// A deployment that fails leaves nothing behind that its repetition would stumble over
/// (<https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/aws-attribute-deletionpolicy.html>).
#[test]
fn what_outlives_the_stack_does_not_outlive_its_failed_creation() {
    let template = template();
    let kept: Vec<_> = template["Resources"]
        .as_object()
        .expect("resources")
        .iter()
        .filter(|(_, resource)| resource["UpdateReplacePolicy"] == "Retain")
        .inspect(|(name, resource)| assert_eq!(resource["DeletionPolicy"], "RetainExceptOnCreate", "{name}"))
        .collect();
    let mut policies = Vec::new();
    all(&template["Resources"], "DeletionPolicy", &mut policies);
    assert_eq!(policies.iter().filter(|policy| **policy != "Delete").count(), kept.len());
    assert!(kept.len() >= 8);
}

/// A query that only says what a thing is not finds every other thing of the account.
#[test]
fn the_group_of_the_readme_holds_devices_of_the_stack_only() {
    let readme = read("README.md");
    let queries: Vec<_> = readme.lines().filter(|line| line.contains("NOT attributes.")).collect();
    assert!(!queries.is_empty());
    for query in queries {
        assert!(query.contains("\"thingTypeName:$(output ThingTypeName) AND "), "{query}");
    }
    let sensors = readme.lines().find(|line| line.contains("output MonitoringDevicePolicyName)\" --thing-type"));
    assert!(
        sensors.is_some_and(|line| line.ends_with("\"$(output SensorTypeName)\"")),
        "sensors have a type of their own"
    );
}

/// AWS counts without spaces (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html#security-limits>).
#[test]
fn policies_of_devices_are_as_long_as_aws_takes() {
    for (name, policy) in resources("AWS::IoT::Policy") {
        let document = policy["Properties"]["PolicyDocument"].to_string();
        let longest = document
            .replace("${AWS::Partition}", "aws-us-gov")
            .replace("${AWS::Region}", "ap-southeast-1")
            .replace("${AWS::AccountId}", "000000000000")
            .replace("${!", "${");
        assert!(longest.len() <= 2048, "{name}: {}", longest.len());
    }
}

#[test]
fn roles_allow_named_actions_on_named_resources() {
    let template = template();
    let mut actions = Vec::new();
    all(&template["Resources"], "Action", &mut actions);
    let mut names = Vec::new();
    for action in actions {
        texts(action, &mut names);
    }
    for action in &names {
        // Of the bucket's policy: it denies.
        assert!(!action.contains('*') || *action == "s3:*", "{action}");
        // Look-ups are by full key, so their cost does not grow with the fleet.
        assert!(!["dynamodb:Scan", "iot:SearchIndex"].contains(action), "{action}");
    }
    // But for the attempts at one job on one thing, under one partition key: an event does not say which of them it is about.
    assert_eq!(names.iter().filter(|action| **action == "dynamodb:Query").count(), 1);
    assert!(allowed("StopWorkflowFunction").contains("dynamodb:Query on RendezvousTable.Arn"));
    let everything = read("template.yaml").lines().filter(|line| line.trim() == "Resource: \"*\"").count();
    assert_eq!(
        everything, 8,
        "only log delivery (of four state machines), the account's IoT settings and metrics (three times) know no resources"
    );
}

/// The statements of a role's own policies and of those that are attached to it, as `action on resource`.
fn allowed(function: &str) -> BTreeSet<String> {
    let text = |value: &Value| {
        value
            .as_str()
            .unwrap_or_default()
            .replace("arn:${AWS::Partition}:", "")
            .replace("${AWS::Region}:${AWS::AccountId}:", "")
    };
    let list = |value: &Value| if let Value::Array(items) = value { items.clone() } else { vec![value.clone()] };
    let mut found = BTreeSet::new();
    let mut add = |statement: &Value| {
        for action in list(&statement["Action"]) {
            for resource in list(&statement["Resource"]) {
                found.insert(format!("{} on {}", text(&action), text(&resource)));
            }
        }
    };
    for policy in
        resources("AWS::Serverless::Function")[function]["Properties"]["Policies"].as_array().expect("policies")
    {
        match policy.get("Statement") {
            Some(statement) => add(statement),
            // A policy template of SAM's, named after what it is for.
            None => policy.as_object().expect("a template").iter().for_each(|(name, of)| {
                let of = of.as_object().expect("its parameter").values().next().map(text).unwrap_or_default();
                add(&serde_json::json!({"Action": name, "Resource": of}));
            }),
        }
    }
    for policy in resources("AWS::IAM::Policy").values() {
        let policy = &policy["Properties"];
        if list(&policy["Roles"]).contains(&Value::String(format!("{function}Role"))) {
            list(&policy["PolicyDocument"]["Statement"]).iter().for_each(&mut add);
        }
    }
    found
}

/// AWS refuses calls of job executions at the host that the SDK would choose: each function that talks to the broker or to job
/// executions is told the account's own address, and asks for its client where that is heeded.
#[test]
fn who_calls_the_data_planes_of_iot_is_told_where_they_are() {
    let mut told = BTreeSet::new();
    for (name, function) in resources("AWS::Serverless::Function") {
        let actions = allowed(&name);
        let variables = &function["Properties"]["Environment"]["Variables"];
        for (prefix, variable, attribute) in [
            ("iot:Publish ", "IOT_DATA_ENDPOINT", "IotSettings.DataEndpoint"),
            ("iotjobsdata:", "IOT_JOBS_ENDPOINT", "IotSettings.JobsEndpoint"),
        ] {
            if actions.iter().any(|action| action.starts_with(prefix)) {
                assert_eq!(variables[variable], attribute, "{name}");
                told.insert(variable);
            }
        }
    }
    assert_eq!(told, BTreeSet::from(["IOT_DATA_ENDPOINT", "IOT_JOBS_ENDPOINT"]));
    let asks = |action: &&String| action.starts_with("iot:DescribeEndpoint ");
    assert_eq!(allowed("ConfigureIotFunction").iter().filter(asks).count(), 1);
    for (path, source) in sources().into_iter().filter(|(path, _)| !path.ends_with("src/aws.rs")) {
        for client in ["aws_sdk_iotdataplane::Client::new", "aws_sdk_iotjobsdataplane::Client::new"] {
            assert!(!source.contains(client), "{}: {client}", path.display());
        }
    }
}

/// Whoever writes an item says when it may go.
#[test]
fn no_table_keeps_its_items_for_ever() {
    for (name, table) in resources("AWS::DynamoDB::Table") {
        let expected = serde_json::json!({"AttributeName": "expiresAt", "Enabled": true});
        assert_eq!(table["Properties"]["TimeToLiveSpecification"], expected, "{name}");
    }
}

/// Every client that must not connect has an event, each time that it tries
/// (<https://docs.aws.amazon.com/iot/latest/developerguide/life-cycle-events.html>).
#[test]
fn refused_connections_are_not_sent_on() {
    let rule = &resources("AWS::IoT::TopicRule")["PresenceRule"]["Properties"]["TopicRulePayload"];
    let sql = rule["Sql"].as_str().unwrap_or_default();
    assert!(sql.ends_with(" WHERE eventType = 'connected' OR eventType = 'disconnected'"), "{sql}");
}

/// Beside each function but those of the firmware upgrade alone stands what its code calls.
#[test]
fn a_role_allows_what_its_function_calls_and_nothing_else() {
    let cases: [(&str, &[&str]); 11] = [
        (
            "IngestTelemetryFunction",
            &[
                "SQSPollerPolicy on TelemetryQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "cloudwatch:PutMetricData on *",
                "dynamodb:GetItem on TelemetryBatchesTable.Arn",
                "dynamodb:PutItem on MonitoringTable.Arn",
                "dynamodb:PutItem on TelemetryBatchesTable.Arn",
                "dynamodb:UpdateItem on MonitoringTable.Arn",
                "iot:DescribeThing on iot:thing/*",
                "s3:GetObject on ${TelemetryBucket.Arn}/*",
                "s3:ListBucket on TelemetryBucket.Arn",
                "s3:PutObject on ${TelemetryBucket.Arn}/*",
            ],
        ),
        (
            "CheckRemediationFunction",
            &[
                "SNSPublishMessagePolicy on AlarmTopic.TopicName",
                "SQSPollerPolicy on RemediationChecksQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "SQSSendMessagePolicy on RemediationChecksQueue.QueueName",
                "cloudwatch:PutMetricData on *",
                "dynamodb:GetItem on ClimatesTable.Arn",
                "dynamodb:PutItem on ClimatesTable.Arn",
                "dynamodb:PutItem on RemediationsTable.Arn",
                "iot:Publish on iot:topic/monitoring-device/remediation-*",
            ],
        ),
        (
            "RemediateFunction",
            &[
                "SNSPublishMessagePolicy on AlarmTopic.TopicName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "SQSSendMessagePolicy on RemediationChecksQueue.QueueName",
                "cloudwatch:PutMetricData on *",
                "dynamodb:DescribeStream on MonitoringTable.StreamArn",
                "dynamodb:GetItem on ClimatesTable.Arn",
                "dynamodb:GetRecords on MonitoringTable.StreamArn",
                "dynamodb:GetShardIterator on MonitoringTable.StreamArn",
                "dynamodb:ListStreams on ${MonitoringTable.Arn}/stream/*",
                "dynamodb:PutItem on ClimatesTable.Arn",
                "dynamodb:PutItem on RemediationsTable.Arn",
                "iot:Publish on iot:topic/monitoring-device/remediation-*",
            ],
        ),
        (
            "GetDeviceSettingsFunction",
            &[
                "SQSPollerPolicy on SettingsRequestsQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "dynamodb:UpdateItem on SettingsTable.Arn",
                "kms:Decrypt on SettingsApiKmsKeyArn",
                "secretsmanager:GetSecretValue on SettingsApiKeySecretArn",
                "states:SendTaskFailure on ConfigPush",
                "states:SendTaskSuccess on ConfigPush",
            ],
        ),
        (
            "StartWorkflowFunction",
            &[
                "SQSPollerPolicy on JobNotificationsQueue.QueueName",
                "SQSPollerPolicy on JobSchedulesQueue.QueueName",
                "SQSPollerPolicy on RecoveriesQueue.QueueName",
                "SQSPollerPolicy on SessionsQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "dynamodb:UpdateItem on AllowancesTable.Arn",
                "dynamodb:PutItem on RendezvousTable.Arn",
                "iot:DescribeThing on iot:thing/*",
                "iotjobsdata:DescribeJobExecution on iot:thing/*",
                "states:StartExecution on ConfigPush",
                "states:StartExecution on FailedUpdateRecovery",
                "states:StartExecution on FirmwareUpgrade",
                "states:StartExecution on OnPremisesJob",
            ],
        ),
        (
            "RetryCounterFunction",
            &[
                "SQSPollerPolicy on FailedUpdatesQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "SQSSendMessagePolicy on RecoveriesQueue.QueueName",
                "SQSSendMessagePolicy on SucceededUpdatesQueue.QueueName",
                "dynamodb:GetItem on RecoveryTable.Arn",
                "dynamodb:PutItem on RecoveryTable.Arn",
                "dynamodb:UpdateItem on AllowancesTable.Arn",
                "iot:DescribeThing on iot:thing/*",
            ],
        ),
        (
            "RestoreAttributesFunction",
            &[
                "dynamodb:GetItem on RecoveryTable.Arn",
                "dynamodb:PutItem on RecoveryTable.Arn",
                "iot:DescribeThing on iot:thing/*",
                "iot:RemoveThingFromThingGroup on FailedGroup.Arn",
                "iot:RemoveThingFromThingGroup on iot:thing/*",
                "iot:UpdateThing on iot:thing/*",
            ],
        ),
        (
            "RecordSuccessFunction",
            &[
                "SQSPollerPolicy on SucceededUpdatesQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "dynamodb:UpdateItem on AllowancesTable.Arn",
                "dynamodb:GetItem on RecoveryTable.Arn",
                "dynamodb:PutItem on RecoveryTable.Arn",
                "iot:DescribeThing on iot:thing/*",
                "iot:UpdateThing on iot:thing/*",
            ],
        ),
        (
            "TrackPresenceFunction",
            &[
                "SQSPollerPolicy on PresenceQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "SQSSendMessagePolicy on SessionsQueue.QueueName",
                "dynamodb:GetItem on ConnectionsTable.Arn",
                "dynamodb:UpdateItem on ConnectionsTable.Arn",
                "dynamodb:UpdateItem on RendezvousTable.Arn",
                "states:SendTaskFailure on FirmwareUpgrade",
                "states:SendTaskSuccess on FirmwareUpgrade",
            ],
        ),
        (
            "HandleDeviceResponseFunction",
            &[
                "SNSPublishMessagePolicy on EventsTopic.TopicName",
                "SQSPollerPolicy on DeviceResponsesQueue.QueueName",
                "SQSSendMessagePolicy on DeadLetterQueue.QueueName",
                "dynamodb:GetItem on RendezvousTable.Arn",
                "dynamodb:GetItem on WorkerJobsTable.Arn",
                "dynamodb:PutItem on WorkerJobsTable.Arn",
                "dynamodb:UpdateItem on AllowancesTable.Arn",
                "dynamodb:UpdateItem on RendezvousTable.Arn",
                "dynamodb:UpdateItem on SettingsTable.Arn",
                "iot:DescribeThing on iot:thing/*",
                "iot:Publish on iot:topic/*/to/worker/*",
                "iot:Publish on iot:topic/agents/*/usp/request/*",
                "iot:UpdateThing on iot:thing/*",
                "s3:GetObject on ${JobDataBucket.Arn}/*",
                "s3:ListBucket on JobDataBucket.Arn",
                "s3:PutObject on ${JobDataBucket.Arn}/*",
                "sqs:ChangeMessageVisibility on Tenant1AnswersQueue.Arn",
                "sqs:ChangeMessageVisibility on Tenant2AnswersQueue.Arn",
                "sqs:DeleteMessage on Tenant1AnswersQueue.Arn",
                "sqs:DeleteMessage on Tenant2AnswersQueue.Arn",
                "sqs:GetQueueAttributes on Tenant1AnswersQueue.Arn",
                "sqs:GetQueueAttributes on Tenant2AnswersQueue.Arn",
                "sqs:ReceiveMessage on Tenant1AnswersQueue.Arn",
                "sqs:ReceiveMessage on Tenant2AnswersQueue.Arn",
                "states:SendTaskFailure on ConfigPush",
                "states:SendTaskFailure on FirmwareUpgrade",
                "states:SendTaskFailure on OnPremisesJob",
                "states:SendTaskHeartbeat on FirmwareUpgrade",
                "states:SendTaskHeartbeat on OnPremisesJob",
                "states:SendTaskSuccess on ConfigPush",
                "states:SendTaskSuccess on FirmwareUpgrade",
                "states:SendTaskSuccess on OnPremisesJob",
            ],
        ),
        (
            "PublishToDeviceFunction",
            &[
                "dynamodb:GetItem on RendezvousTable.Arn",
                "dynamodb:GetItem on WorkerJobsTable.Arn",
                "dynamodb:PutItem on WorkerJobsTable.Arn",
                "dynamodb:UpdateItem on RendezvousTable.Arn",
                "dynamodb:UpdateItem on SettingsTable.Arn",
                "iot:DescribeThing on iot:thing/*",
                "iot:Publish on iot:topic/*/to/worker",
                "iot:Publish on iot:topic/agents/*/usp/request/*",
                "iot:Publish on iot:topic/devices/*/config_req",
                "iot:Publish on iot:topic/devices/*/firmware_req",
                "iot:UpdateThing on iot:thing/*",
                "s3:GetObject on ${FirmwareBucket.Arn}/*",
                "s3:GetObject on ${JobDataBucket.Arn}/*",
                "s3:GetObjectVersion on ${FirmwareBucket.Arn}/*",
                "s3:ListBucket on JobDataBucket.Arn",
                "s3:PutObject on ${JobDataBucket.Arn}/*",
                "states:SendTaskFailure on ConfigPush",
                "states:SendTaskFailure on FirmwareUpgrade",
                "states:SendTaskFailure on OnPremisesJob",
                "states:SendTaskSuccess on ConfigPush",
                "states:SendTaskSuccess on FirmwareUpgrade",
                "states:SendTaskSuccess on OnPremisesJob",
            ],
        ),
    ];
    for (function, expected) in cases {
        let expected: BTreeSet<String> = expected.iter().map(|action| (*action).to_owned()).collect();
        assert_eq!(allowed(function), expected, "{function}");
    }
}

/// What is tried again, and passes only once somebody has fixed it.
const WAITS_FOR_AN_OPERATOR: [ErrorName; 2] = [ErrorName::ServiceError, ErrorName::Misconfigured];

/// The fields and values of a filter pattern such as `{ ($.a.b = "x") || ($.a.b = "y") }`, the fields as JSON pointers.
fn terms(pattern: &str) -> Vec<(String, &str)> {
    let inside = pattern.strip_prefix("{ ").and_then(|rest| rest.strip_suffix(" }")).expect("a JSON pattern");
    let terms = inside.split(" || ").map(|term| {
        let term = term.strip_prefix("($").and_then(|rest| rest.strip_suffix(')')).expect("a term in brackets");
        let (field, value) = term.split_once(" = ").expect("a comparison");
        (field.replace('.', "/"), value.trim_matches('"'))
    });
    terms.collect()
}

/// What a function logs on AWS of a call that fails so, and of a queue's message that does, as far as the queue delivers it again.
async fn log_of(name: ErrorName) -> Vec<Value> {
    let mut log = tempfile::tempfile().expect("a file");
    {
        // As `init_default_subscriber` of the runtime does it where AWS_LAMBDA_LOG_FORMAT is JSON.
        let subscriber = fmt()
            .with_target(false)
            .without_time()
            .with_writer(Arc::new(log.try_clone().expect("the file")))
            .json()
            .finish();
        let _guard = subscriber.set_default();
        let error = fleet::Error::new(name, "iot:UpdateThing: AccessDeniedException");
        let _ = logged::<()>(ready(Err(error.clone()))).await;
        if name.is_transient() {
            let config = SdkConfig::builder().behavior_version(BehaviorVersion::latest()).build();
            let dead_letters = DeadLetters::new(&config, String::new());
            let event = serde_json::json!({"Records": [{"messageId": "1", "body": "{}"}]});
            let event = serde_json::from_value(event).expect("an event of a queue");
            batch(&dead_letters, |_| ready(vec![Err(error.clone())]), event).await;
        }
    }
    log.rewind().expect("the file's beginning");
    let lines = std::io::read_to_string(log).expect("text");
    lines.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

#[tokio::test]
async fn an_alarm_tells_of_what_waits_for_an_operator() {
    let terms_of = metric_filter("RefusedCalls");
    let terms = terms(&terms_of);
    for name in ErrorName::ALL {
        let lines = log_of(name).await;
        assert_eq!(lines.len(), 1 + usize::from(name.is_transient()), "{lines:?}");
        for line in lines {
            let found = terms.iter().any(|(field, value)| line.pointer(field).is_some_and(|text| text == value));
            assert_eq!(found, WAITS_FOR_AN_OPERATOR.contains(&name), "{line}");
        }
    }
}

/// As `fleet::allowance` logs the first message that is too much.
#[test]
fn an_alarm_tells_of_devices_that_say_too_much() {
    assert_eq!(terms(&metric_filter("RefusedDevices")), [("/fields/outcome".to_owned(), "REFUSED")]);
    let allowance = read("crates/fleet/src/allowance.rs");
    assert!(allowance.contains("tracing::warn!(\n            outcome = \"REFUSED\""));
}

/// The pattern of a metric that is filtered out of all logs of functions, and has an alarm.
fn metric_filter(name: &str) -> String {
    let mut groups = BTreeSet::from([template()["Globals"]["Function"]["LoggingConfig"]["LogGroup"].to_string()]);
    for (function, resource) in resources("AWS::Serverless::Function") {
        let logging = &resource["Properties"]["LoggingConfig"];
        if !logging.is_null() {
            assert_eq!(logging["LogFormat"], "JSON", "{function}");
            groups.insert(logging["LogGroup"].to_string());
        }
    }
    let alarm = &resources("AWS::CloudWatch::Alarm")[&format!("{name}Alarm")]["Properties"];
    assert_eq!((&alarm["Statistic"], &alarm["AlarmActions"][0]), (&"Sum".into(), &"AlarmTopic".into()));
    let (mut filtered, mut patterns) = (BTreeSet::new(), BTreeSet::new());
    for (_, filter) in resources("AWS::Logs::MetricFilter") {
        let metric = &filter["Properties"]["MetricTransformations"][0];
        if metric["MetricName"] == name {
            assert_eq!((&metric["MetricNamespace"], &metric["MetricValue"]), (&alarm["Namespace"], &"1".into()));
            assert_eq!(alarm["MetricName"], name);
            filtered.insert(filter["Properties"]["LogGroupName"].to_string());
            patterns.insert(filter["Properties"]["FilterPattern"].as_str().expect("a pattern").to_owned());
        }
    }
    assert_eq!((filtered, patterns.len()), (groups, 1), "{name}");
    patterns.pop_first().expect("a pattern")
}

/// The attributes from which follows what somebody may do: a sensor's topics, whom a thing may report for, whose settings a device
/// gets, whether it may be upgraded.
const AUTHORIZING: [&str; 4] = ["building", "sensors", "externalId", "upgradable"];

#[test]
fn no_function_writes_an_attribute_that_authorizes() {
    let template = read("template.yaml");
    let of_policies: BTreeSet<_> =
        template.split("Thing.Attributes[").skip(1).filter_map(|rest| rest.split(']').next()).collect();
    assert_eq!(of_policies, BTreeSet::from(["building"]), "all of them are in the list above");
    for attribute in WrittenAttribute::ALL {
        assert!(!AUTHORIZING.contains(&attribute.name()), "{attribute:?}");
    }
    for name in AUTHORIZING {
        assert!(WrittenAttribute::named(name).is_err(), "{name}");
    }
    // Whoever wrote attributes elsewhere could write any.
    for (path, source) in sources() {
        let program = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let writes = ["update_thing", "AttributePayload", "create_thing"].iter().any(|call| program.contains(call));
        assert_eq!(writes, path.ends_with("src/things.rs"), "{}", path.display());
    }
    for (name, machine) in state_machines() {
        assert!(!machine.to_string().to_lowercase().contains("iot:updatething"), "{name}");
    }
}

/// Every source file of the functions, by its path.
fn sources() -> Vec<(PathBuf, String)> {
    fn collect(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = std::fs::read_to_string(&path).expect("source");
                found.push((path, source));
            }
        }
    }
    let mut found = Vec::new();
    collect(&root().join("crates/fleet/src"), &mut found);
    found
}

/// Filters and people look for an error's name there.
#[test]
fn a_field_error_of_the_log_is_an_errors_name() {
    let mut seen = 0;
    for (path, source) in sources() {
        for line in source.split("tracing::").skip(1) {
            let line = line.split(");").next().unwrap_or_default();
            assert!(!line.contains("%error") && !line.contains("?error"), "{}: {line}", path.display());
            for field in line.split(" error = ").skip(1).chain(line.split("(error = ").skip(1)) {
                assert!(field.starts_with("error.name.as_str()"), "{}: {line}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 8, "{seen} lines of the log with an error were found");
}

#[test]
fn the_error_catalogue_has_every_name_and_no_other() {
    let catalogue = read("docs/errors.md");
    let rows = catalogue.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let ours: BTreeSet<&str> = ErrorName::ALL.into_iter().map(ErrorName::as_str).collect();
    assert_eq!(rows.collect::<BTreeSet<_>>(), ours);
}

/// With other features of what they share, the programs of the workspace would have the AWS SDKs compiled once more than its tests.
#[test]
fn programs_and_tests_are_built_with_the_same_features() {
    let packages = |edges: &str| {
        let mut tree = std::process::Command::new(env!("CARGO"));
        tree.current_dir(root()).args(["tree", "--workspace", "--prefix", "none", "--format", "{p} [{f}]"]);
        let output = tree.args(["--edges", edges]).output().expect("cargo tree");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines = String::from_utf8(output.stdout).expect("text");
        lines.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect::<BTreeSet<String>>()
    };
    let (programs, tests) = (packages("normal,build"), packages("normal,build,dev"));
    let others: Vec<_> = programs.difference(&tests).collect();
    assert!(others.is_empty(), "tests/Cargo.toml lacks a feature that only a dev-dependency has: {others:?}");
}
