//! A device of the firmware upgrade that says only what a test tells it to say, over its own connection.

use crate::{Cloud, MqttDevice};
use device_simulator::DeviceSpec;
use device_simulator::provision::ProtocolMix;
use protocol::{
    Command, DeviceProtocol, OperationId, ProtocolName, Publication, ReceivedCommand, ReplyTo, Response, Step,
    StepOutcome, ThingName,
};
use rumqttc::QoS;
use serde_json::Value;

/// A connected device.
pub struct ScriptedDevice {
    /// Its name.
    pub thing: ThingName,
    protocol: ProtocolName,
    device: MqttDevice,
}

impl ScriptedDevice {
    /// Connects with the device's certificate and subscribes to its commands.
    pub async fn connect(device: &DeviceSpec) -> Self {
        let mut connected = MqttDevice::connect(device, false).await;
        connected.subscribe(device.protocol.encoding().command_filter(&device.thing), QoS::AtLeastOnce).await;
        Self { thing: device.thing.clone(), protocol: device.protocol, device: connected }
    }

    /// A device alone in its group, connected, and a job of that group to version 2.0.0, whose payload has these fields besides.
    pub async fn with_job(cloud: &Cloud, name: &str, protocol: ProtocolName, more: Value) -> (Self, String) {
        let (group, devices) = cloud.provision(name, 1, ProtocolMix::All(protocol)).await;
        let image = cloud.upload("2.0.0", 1000).await;
        let device = Self::connect(&devices[0]).await;
        (device, cloud.create_job(&group, &image, more).await)
    }

    /// The next command.
    pub async fn command(&mut self) -> ReceivedCommand {
        loop {
            let message = self.device.message().await;
            if let Ok(Some(command)) = self.protocol.encoding().decode_command(&message.topic, &message.payload) {
                return command;
            }
        }
    }

    /// The next command, which must be a download: its operation, and where to answer.
    pub async fn download(&mut self) -> (OperationId, ReplyTo) {
        let received = self.command().await;
        let Command::Download { operation_id, .. } = received.command else { panic!("{:?}", received.command) };
        (operation_id, received.reply_to)
    }

    /// Says that a step has succeeded, after a reboot with this version.
    pub async fn succeed(&self, operation: &OperationId, reply_to: &ReplyTo, step: Step, version: &str) {
        let firmware_version = (step == Step::DeviceRebooted).then(|| version.to_owned());
        self.answer(operation, reply_to, step, StepOutcome::Succeeded { firmware_version }).await;
    }

    /// Says how a step has ended.
    pub async fn answer(&self, operation: &OperationId, reply_to: &ReplyTo, step: Step, outcome: StepOutcome) {
        let response = Response { operation_id: operation.clone(), step, outcome };
        let message = self.encoding().encode_response(&self.thing, &response, reply_to, 0);
        self.publish(message.expect("the protocol has a word for it")).await;
    }

    /// Publishes whatever it is.
    pub async fn publish(&self, message: Publication) {
        self.device.publish(message).await;
    }

    /// The protocol that it speaks.
    pub fn protocol(&self) -> ProtocolName {
        self.protocol
    }

    /// How it encodes its messages.
    pub fn encoding(&self) -> &'static dyn DeviceProtocol {
        self.protocol.encoding()
    }
}
