//! A device that says only what a test tells it to say, over its own connection.

use crate::{Cloud, PATIENCE};
use device_simulator::DeviceSpec;
use protocol::{
    Command, DeviceProtocol, OperationId, ProtocolName, Publication, ReceivedCommand, ReplyTo, Response, Step,
    StepOutcome, ThingName,
};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS, Transport};
use tokio::sync::mpsc;

/// A connected device.
pub struct ScriptedDevice {
    /// Its name.
    pub thing: ThingName,
    protocol: ProtocolName,
    client: AsyncClient,
    commands: mpsc::UnboundedReceiver<ReceivedCommand>,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for ScriptedDevice {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl ScriptedDevice {
    /// Connects with the device's certificate and subscribes to its commands.
    pub async fn connect(device: &DeviceSpec) -> Self {
        let read = |path: std::path::PathBuf| {
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let identity =
            (read(device.certificates.join("certificate.pem")), read(device.certificates.join("private.key")));
        let endpoint = std::env::var("FLEETFLOW_MQTT_ENDPOINT").expect("FLEETFLOW_MQTT_ENDPOINT");
        let (host, port) = endpoint.split_once(':').expect("host:port");
        let mut options = MqttOptions::new(device.thing.as_str(), host, port.parse().expect("a port"));
        options.set_transport(Transport::tls(read(Cloud::ca()), Some(identity), None));
        options.set_clean_session(false);
        options.set_max_packet_size(256 * 1024, 256 * 1024);
        let (client, mut events) = AsyncClient::new(options, 64);
        client
            .subscribe(device.protocol.encoding().command_filter(&device.thing), QoS::AtLeastOnce)
            .await
            .expect("subscribe");
        let (received, commands) = mpsc::unbounded_channel();
        let (subscribed, ready) = tokio::sync::oneshot::channel();
        let protocol = device.protocol;
        let connection = tokio::spawn(async move {
            let mut subscribed = Some(subscribed);
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = subscribed.take().map(|subscribed| subscribed.send(()));
                    }
                    Ok(Event::Incoming(Packet::Publish(message))) => {
                        if let Ok(Some(command)) = protocol.encoding().decode_command(&message.topic, &message.payload)
                        {
                            let _ = received.send(command);
                        }
                    }
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(200)).await,
                }
            }
        });
        tokio::time::timeout(PATIENCE, ready).await.expect("the device connects in time").expect("the device connects");
        Self { thing: device.thing.clone(), protocol, client, commands, connection }
    }

    /// The next command.
    pub async fn command(&mut self) -> ReceivedCommand {
        let next = tokio::time::timeout(PATIENCE, self.commands.recv());
        next.await.unwrap_or_else(|_| panic!("{} waited in vain for a command", self.thing)).expect("connected")
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
        self.client.publish(message.topic, QoS::AtLeastOnce, false, message.payload).await.expect("publish");
    }

    /// How it encodes its messages.
    pub fn encoding(&self) -> &'static dyn DeviceProtocol {
        self.protocol.encoding()
    }
}
