//! What a device or a worker says: decoded, then brought to the step that it answers, or told to whoever listens.

use super::settings::SettingsTable;
use super::worker_jobs::WorkerJobs;
use crate::allowance::{Allowances, Unasked};
use crate::aws::now_millis;
use crate::device_registry::{DeviceRegistry, Said};
use crate::error::unbuilt;
use crate::queue::MqttMessage;
use crate::workflows::rendezvous::{Answer, Arrival, Operation, Rendezvous};
use crate::{Error, ErrorName, aws, error};
use protocol::events::{DeviceBooted, EventType};
use protocol::on_premises::tenant_of_answer;
use protocol::settings::{SettingResponse, thing_of_response};
use protocol::{
    DeviceEvent, DeviceFailure, Received, Report, Response, Step, StepOutcome, ThingName, protocol_of_topic,
};

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Whether what devices say unasked is this stack's to hear and to acknowledge, and not another one's of the account.
    pub owns_device_topics: bool,
    /// Where answers go.
    pub rendezvous: Rendezvous,
    /// Where answers about settings go.
    pub settings: SettingsTable,
    /// Where the versions and protocols of devices are kept.
    pub registry: DeviceRegistry,
    /// How many boots of a device are heard.
    pub allowances: Allowances,
    /// Where unasked reports go.
    pub sns: aws_sdk_sns::Client,
    /// The topic of domain events.
    pub events_topic_arn: String,
    /// Carries the acknowledgements that devices ask for.
    pub mqtt: aws_sdk_iotdataplane::Client,
    /// Where answers of workers on premises go.
    pub worker_jobs: WorkerJobs,
}

/// Handles one queued message. Fails with `MalformedMessage` if it cannot be read.
pub async fn handle(adapters: &Adapters, body: &str) -> Result<(), Error> {
    let message = MqttMessage::parse(body)?;
    if let Some(thing) = thing_of_response(&message.topic) {
        return apply_setting(adapters, &thing, &SettingResponse::decode(&message.payload()?)?).await;
    }
    if let Some(tenant) = tenant_of_answer(&message.topic) {
        return adapters.worker_jobs.hear(&tenant, &message.payload()?).await;
    }
    let (protocol, thing) = protocol_of_topic(&message.topic, message.sender().unwrap_or("n/a"))?;
    let received = protocol.encoding().decode_report(&thing, &message.payload()?)?;
    let Received { report, runs, acknowledgement } = received;
    match report {
        Report::Response(response) => {
            let is_boot = response.step == Step::DeviceRebooted;
            let arrival = apply(adapters, &thing, response).await?;
            if let Some(arrival) = arrival.filter(|_| is_boot)
                && adapters.owns_device_topics
            {
                let runs = runs.filter(|version| arrival.is_news(version));
                hear_boot(adapters, &thing, &message, &Said { runs, speaks: Some(protocol), instead_of: None }).await?;
            }
        }
        Report::Event(DeviceEvent::Booted { cause, firmware_version }) if adapters.owns_device_topics => {
            let said = Said { runs, speaks: Some(protocol), instead_of: None };
            if hear_boot(adapters, &thing, &message, &said).await? {
                publish_boot(adapters, &thing, cause, firmware_version).await?;
            }
        }
        Report::Event(DeviceEvent::Other { name }) if adapters.owns_device_topics => {
            tracing::info!(thing = thing.as_str(), event = name, outcome = "IGNORED");
        }
        Report::Event(_) => {}
    }
    match acknowledgement {
        Some(acknowledgement) if adapters.owns_device_topics => aws::publish(&adapters.mqtt, acknowledgement).await,
        _ => Ok(()),
    }
}

/// Records what a device has said with its boot, unless it is one of too many; whether it was heard.
async fn hear_boot(adapters: &Adapters, thing: &ThingName, message: &MqttMessage, said: &Said) -> Result<bool, Error> {
    let received_at = message.received_at().unwrap_or_else(|_| now_millis());
    let is_heard = adapters.allowances.allows(thing.as_str(), Unasked::Boot, message.said(), received_at).await?;
    if is_heard {
        adapters.registry.record(thing, said).await?;
    }
    Ok(is_heard)
}

async fn apply_setting(adapters: &Adapters, thing: &ThingName, response: &SettingResponse) -> Result<(), Error> {
    let outcome = adapters.settings.answer(thing, response).await?;
    let (operation, setting) = (response.operation_id.as_str(), response.name.as_str());
    tracing::info!(thing = thing.as_str(), operation, setting, answer = ?response.outcome, ?outcome);
    Ok(())
}

/// Brings an answer to its step; none for a report of progress, which is no answer.
async fn apply(adapters: &Adapters, thing: &ThingName, response: Response) -> Result<Option<Arrival>, Error> {
    let operation = Operation::new(thing, &response.operation_id);
    let step = response.step;
    let arrival = match response.outcome {
        StepOutcome::InProgress { .. } => {
            let outcome = adapters.rendezvous.progress(&operation, step).await?;
            tracing::info!(operation = operation.key(), step = step.name(), ?outcome);
            return Ok(None);
        }
        StepOutcome::Succeeded { firmware_version } => {
            adapters.rendezvous.answer(&operation, step, &Answer::Succeeded { firmware_version }).await?
        }
        StepOutcome::Failed(failure) if failure.code == DeviceFailure::ADDRESS_EXPIRED => {
            let error = Error::new(ErrorName::AddressExpired, device_error(step, &failure).message);
            let outcome = adapters.rendezvous.interrupt(&operation, step, &error).await?;
            tracing::info!(operation = operation.key(), step = step.name(), error = error.name.as_str(), ?outcome);
            return Ok(None);
        }
        StepOutcome::Failed(failure) => {
            adapters.rendezvous.fail_step(&operation, step, &device_error(step, &failure)).await?
        }
    };
    tracing::info!(operation = operation.key(), step = step.name(), outcome = ?arrival.outcome);
    Ok(Some(arrival))
}

/// Our name for a device's failure: by the step that failed, whatever the device's own code.
fn device_error(step: Step, failure: &DeviceFailure) -> Error {
    let name = match step {
        Step::DeviceOnline | Step::DownloadStarted => ErrorName::DownloadRefused,
        Step::FirmwareTransferred => ErrorName::TransferFailed,
        Step::DownloadOperationDone => ErrorName::InstallFailed,
        Step::DeviceRebooted => ErrorName::ActivationFailed,
    };
    let detail = match (failure.code.as_str(), failure.message.as_str()) {
        ("", "") => "the device gave no reason".to_owned(),
        (code, "") => format!("device error {code}"),
        ("", message) => message.to_owned(),
        (code, message) => format!("device error {code}: {message}"),
    };
    Error::new(name, detail)
}

async fn publish_boot(
    adapters: &Adapters,
    thing: &ThingName,
    cause: String,
    firmware_version: Option<String>,
) -> Result<(), Error> {
    let booted =
        DeviceBooted { event_type: EventType::DeviceBooted, thing_name: thing.clone(), cause, firmware_version };
    let message = serde_json::to_string(&booted).map_err(unbuilt)?;
    let attribute = aws_sdk_sns::types::MessageAttributeValue::builder().data_type("String");
    let attribute = attribute.string_value("DEVICE_BOOTED").build();
    adapters
        .sns
        .publish()
        .topic_arn(&adapters.events_topic_arn)
        .message(message)
        .message_attributes("eventType", attribute.map_err(unbuilt)?)
        .send()
        .await
        .map_err(|error| error::aws("sns:Publish", &error))?;
    tracing::info!(thing = thing.as_str(), event = "DEVICE_BOOTED", outcome = "APPLIED");
    Ok(())
}
