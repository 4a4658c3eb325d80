//! A bare MQTT client with a device's certificate: it does what a test says and nothing else.

use crate::{Cloud, PATIENCE, in_vain};
use device_simulator::DeviceSpec;
use protocol::settings::{SettingCommand, SettingOutcome, SettingResponse, request_topic};
use protocol::{OperationId, Publication, SettingName, ThingName};
use rumqttc::{AsyncClient, Event, MqttOptions, NetworkOptions, Packet, Publish, QoS, Transport};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// What has come on a connection, and what has gone wrong with it: who waits in vain tells it.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    /// The last few, and the same again and again once.
    fn note(&self, what: String) {
        let mut seen = self.0.lock().expect("no panic");
        if seen.last() != Some(&what) {
            seen.push(what);
        }
        if seen.len() > 20 {
            seen.remove(0);
        }
    }

    /// What the connection's task tells within the time that tests have.
    async fn next<T>(&self, what: &str, from: &mut mpsc::UnboundedReceiver<T>) -> T {
        let next = tokio::time::timeout(PATIENCE, from.recv()).await;
        let seen = || self.0.lock().expect("no panic").join("; ");
        next.unwrap_or_else(|_| panic!("{}", in_vain(PATIENCE, what, &seen()))).expect("the connection's task runs")
    }
}

/// A connected device.
pub struct MqttDevice {
    /// Its name.
    pub thing: ThingName,
    client: AsyncClient,
    messages: mpsc::UnboundedReceiver<Publish>,
    subscriptions: mpsc::UnboundedReceiver<()>,
    acknowledged: tokio::sync::Mutex<mpsc::UnboundedReceiver<()>>,
    seen: Seen,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for MqttDevice {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl MqttDevice {
    /// Connects with the device's certificate, as a new session if it shall be clean.
    pub async fn connect(device: &DeviceSpec, clean_session: bool) -> Self {
        Self::connect_as(device.thing.clone(), device.thing.as_str(), &device.certificates, clean_session).await
    }

    /// Connects as that client, with the certificate in that folder.
    pub async fn connect_as(thing: ThingName, client_id: &str, folder: &std::path::Path, clean_session: bool) -> Self {
        Self::open(thing, client_id, folder, clean_session, false).await
    }

    /// The same as devices in the field do: with a user name that names their SDK and no password, and with ALPN.
    pub async fn of_the_field(
        thing: ThingName,
        client_id: &str,
        folder: &std::path::Path,
        clean_session: bool,
    ) -> Self {
        Self::open(thing, client_id, folder, clean_session, true).await
    }

    async fn open(
        thing: ThingName,
        client_id: &str,
        folder: &std::path::Path,
        clean_session: bool,
        is_of_the_field: bool,
    ) -> Self {
        let read = |path: std::path::PathBuf| {
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let identity = (read(folder.join("certificate.pem")), read(folder.join("private.key")));
        let endpoint = std::env::var("FLEETFLOW_MQTT_ENDPOINT").expect("FLEETFLOW_MQTT_ENDPOINT");
        let (host, port) = endpoint.split_once(':').expect("host:port");
        let mut options = MqttOptions::new(client_id, host, port.parse().expect("a port"));
        let alpn = is_of_the_field.then(|| vec![b"x-amzn-mqtt-ca".to_vec()]);
        options.set_transport(Transport::tls(read(Cloud::ca()), Some(identity), alpn));
        if is_of_the_field {
            options.set_credentials("?SDK=Python&Version=1.5.2", "");
        }
        options.set_clean_session(clean_session);
        options.set_max_packet_size(256 * 1024, 2 * 1024 * 1024);
        let (client, mut events) = AsyncClient::new(options, 64);
        // A busy machine takes its time.
        events.set_network_options(NetworkOptions::new().set_connection_timeout(60).clone());
        let (received, messages) = mpsc::unbounded_channel();
        let (subscribed, subscriptions) = mpsc::unbounded_channel();
        let (publication, acknowledged) = mpsc::unbounded_channel();
        let (connected, mut connections) = mpsc::unbounded_channel();
        let seen = Seen::default();
        let told = seen.clone();
        let connection = tokio::spawn(async move {
            loop {
                let event = events.poll().await;
                match &event {
                    // What keeps a connection alive says nothing of what is waited for.
                    Ok(Event::Outgoing(_) | Event::Incoming(Packet::PingResp)) => {}
                    Ok(Event::Incoming(packet)) => told.note(format!("{packet:?}")),
                    Err(error) => told.note(error.to_string()),
                }
                match event {
                    Ok(Event::Incoming(Packet::ConnAck(_))) => drop(connected.send(())),
                    Ok(Event::Incoming(Packet::SubAck(_))) => drop(subscribed.send(())),
                    Ok(Event::Incoming(Packet::PubAck(_))) => drop(publication.send(())),
                    Ok(Event::Incoming(Packet::Publish(message))) => drop(received.send(message)),
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                }
            }
        });
        seen.next(&format!("{client_id} connects"), &mut connections).await;
        Self { thing, client, messages, subscriptions, acknowledged: acknowledged.into(), seen, connection }
    }

    /// Subscribes and waits until the broker has confirmed it.
    pub async fn subscribe(&mut self, filter: String, qos: QoS) {
        self.client.subscribe(filter, qos).await.expect("subscribe");
        let what = format!("the subscription of {} is confirmed", self.thing);
        self.seen.next(&what, &mut self.subscriptions).await;
    }

    /// The next message.
    pub async fn message(&mut self) -> Publish {
        self.seen.next(&format!("{} gets a message", self.thing), &mut self.messages).await
    }

    /// Publishes whatever it is, and waits until the broker has it: the local one has then put it into the rules' queues.
    pub async fn publish(&self, message: Publication) {
        let mut acknowledged = self.acknowledged.lock().await;
        // What was sent without waiting.
        while acknowledged.try_recv().is_ok() {}
        self.send(message).await;
        self.seen.next(&format!("the broker takes what {} says", self.thing), &mut acknowledged).await;
    }

    /// Publishes whatever it is, and goes on: the broker may not take it.
    pub async fn send(&self, message: Publication) {
        self.client.publish(message.topic, QoS::AtLeastOnce, false, message.payload).await.expect("publish");
    }

    /// Connects in a new session and listens for settings, as a device of the field does: at `QoS` 0.
    pub async fn listening(device: &DeviceSpec) -> Self {
        let mut connected = Self::connect(device, true).await;
        connected.subscribe(request_topic(&device.thing), QoS::AtMostOnce).await;
        connected
    }

    /// The next command to set something.
    pub async fn setting(&mut self) -> SettingCommand {
        let message = self.message().await;
        SettingCommand::decode(&message.payload).expect("a command")
    }

    /// Every command to set something that comes within this time.
    pub async fn settings_within(&mut self, time: Duration) -> Vec<SettingCommand> {
        let end = Instant::now() + time;
        let mut commands = Vec::new();
        while let Ok(Some(message)) = tokio::time::timeout(end - Instant::now(), self.messages.recv()).await {
            commands.push(SettingCommand::decode(&message.payload).expect("a command"));
        }
        commands
    }

    /// Says what has become of a setting.
    pub async fn answer(&self, operation_id: &OperationId, name: &SettingName, outcome: SettingOutcome) {
        let response = SettingResponse { operation_id: operation_id.clone(), name: name.clone(), outcome };
        self.publish(response.encode(&self.thing, 0)).await;
    }

    /// Says that it has done what the command says.
    pub async fn confirm(&self, command: &SettingCommand) {
        let value = Some(command.value.clone());
        self.answer(&command.operation_id, &command.name, SettingOutcome::Success { value }).await;
    }
}
