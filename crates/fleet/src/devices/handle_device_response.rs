//! What a device or a worker says: decoded, then brought to the step that it answers, or told to whoever listens.

use super::agents::Agents;
use super::settings::SettingsTable;
use super::worker_jobs::WorkerJobs;
use crate::allowance::{Allowances, Unasked};
use crate::aws::now_millis;
use crate::device_registry::{DeviceRegistry, Said};
use crate::error::unbuilt;
use crate::queue::MqttMessage;
use crate::tasks::Outcome;
use crate::workflows::rendezvous::{Answer, Arrival, Operation, Rendezvous};
use crate::{Error, ErrorName, aws, error};
use protocol::events::{DeviceBooted, EventType};
use protocol::on_premises::tenant_of_answer;
use protocol::settings::{SettingResponse, thing_of_response};
use protocol::{
    Agent, DeviceEvent, DeviceFailure, OperationId, ProtocolName, Received, Report, Response, Step, StepOutcome,
    ThingName, protocol_of_topic,
};

/// What the handler reaches.
#[derive(Debug)]
pub struct Adapters {
    /// Whether what devices say unasked is this stack's to hear and to acknowledge, and not another one's of the account.
    pub owns_device_topics: bool,
    /// Where answers go.
    pub rendezvous: Rendezvous,
    /// What USP agents call themselves.
    pub agents: Agents,
    /// Where answers about settings go.
    pub settings: SettingsTable,
    /// Where the versions and protocols of devices are kept.
    pub registry: DeviceRegistry,
    /// How much is heard of what a device says unasked.
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
    let device = Device { adapters, thing, protocol, message: &message, agent: received.agent.clone() };
    device.hear(&received).await?;
    match received.acknowledgement {
        Some(acknowledgement) if adapters.owns_device_topics => aws::publish(&adapters.mqtt, acknowledgement).await,
        _ => Ok(()),
    }
}

/// A device, and the message by which it says something.
struct Device<'a> {
    adapters: &'a Adapters,
    thing: ThingName,
    protocol: ProtocolName,
    message: &'a MqttMessage,
    /// Who it says it is.
    agent: Option<Agent>,
}

impl Device<'_> {
    async fn hear(&self, received: &Received) -> Result<(), Error> {
        match &received.report {
            Report::Response(response @ Response { step: Step::DeviceRebooted, outcome, .. })
                if !matches!(outcome, StepOutcome::InProgress { .. }) =>
            {
                self.answered_boot(response, received).await
            }
            Report::Response(response) => apply(self.adapters, &self.thing, response.clone()).await.map(drop),
            Report::Event(DeviceEvent::Booted { cause, .. }) => self.unasked_boot(cause.clone(), received).await,
            Report::Event(DeviceEvent::Introduced { name }) => {
                tracing::info!(thing = self.thing.as_str(), event = name, agent = ?self.agent);
                self.record(Unasked::Introduction, received.runs.clone()).await.map(drop)
            }
            Report::Event(DeviceEvent::Other { name }) => {
                tracing::info!(thing = self.thing.as_str(), event = name, outcome = "IGNORED");
                match self.agent {
                    Some(_) => self.record(Unasked::Introduction, None).await.map(drop),
                    None => Ok(()),
                }
            }
        }
    }

    /// A boot that names an operation. If there is no such one, somebody else has made the device boot.
    async fn answered_boot(&self, response: &Response, received: &Received) -> Result<(), Error> {
        let operation = Operation::new(&self.thing, &response.operation_id);
        if received.lacks_version {
            if self.adapters.rendezvous.has_begun(&operation).await? {
                // What it answers to the question is the answer of the step.
                self.record(Unasked::Boot, None).await?;
                return self.ask_version(Some(&response.operation_id)).await;
            }
        } else {
            let Some(arrival) = apply(self.adapters, &self.thing, response.clone()).await? else { return Ok(()) };
            if arrival.outcome != Outcome::Rejected {
                let runs = received.runs.clone().filter(|version| arrival.is_news(version));
                return self.record(Unasked::Boot, runs).await.map(drop);
            }
        }
        // Another stack's operation, or one that is long over: what its device says of itself is not to be believed after a
        // download has failed, and only that stack knows whether it has.
        if response.operation_id.names_a_job_execution() {
            return Ok(());
        }
        self.unasked_boot(response.operation_id.to_string(), received).await
    }

    async fn unasked_boot(&self, cause: String, received: &Received) -> Result<(), Error> {
        if !self.record(Unasked::Boot, received.runs.clone()).await? || !self.adapters.owns_device_topics {
            return Ok(());
        }
        if received.lacks_version {
            self.ask_version(None).await?;
        }
        publish_boot(self.adapters, &self.thing, cause, received.runs.clone()).await
    }

    /// Records what a device has said of itself, unless it has said such things too often; whether it was heard.
    async fn record(&self, kind: Unasked, runs: Option<String>) -> Result<bool, Error> {
        let Self { adapters, thing, protocol, message, agent } = self;
        let received_at = message.received_at().unwrap_or_else(|_| now_millis());
        let is_heard = adapters.allowances.allows(thing.as_str(), kind, message.said(), received_at).await?;
        if is_heard {
            if let Some(agent) = agent {
                adapters.agents.note(thing, agent).await?;
            }
            let said = Said { runs, speaks: Some(*protocol), instead_of: None };
            adapters.registry.record(thing, &said).await?;
        }
        Ok(is_heard)
    }

    async fn ask_version(&self, operation: Option<&OperationId>) -> Result<(), Error> {
        let (encoding, agent) = (self.protocol.encoding(), self.agent.as_ref());
        let question = encoding.encode_version_question(&self.thing, agent, operation, now_millis());
        match question.filter(|_| self.adapters.owns_device_topics || operation.is_some()) {
            Some(question) => aws::publish(&self.adapters.mqtt, question).await,
            None => Ok(()),
        }
    }
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
