//! What a client of the broker may do with its certificate, tried out.

use crate::Cloud;
use rumqttc::{AsyncClient, Event, EventLoop, LastWill, MqttOptions, Packet, QoS, Transport};
use std::path::Path;
use std::time::Duration;

/// How long the broker has to end the connection of a client that does what it must not.
const GRACE: Duration = Duration::from_secs(20);

/// A certificate and its key, as PEM.
pub type Credential = (Vec<u8>, Vec<u8>);

/// What a client tries when it connects, or once it is connected.
#[derive(Debug, Clone)]
pub enum Attempt {
    /// Nothing more than to connect.
    Connect,
    /// To listen.
    Subscribe(String),
    /// To speak.
    Publish(String),
    /// To speak so that the broker keeps it for those who subscribe later.
    Retain(String),
    /// To leave a will, which the broker publishes once the connection is lost.
    Will(String),
    /// To leave a will that is retained.
    RetainedWill(String),
}

impl Attempt {
    fn will(&self) -> Option<LastWill> {
        let (topic, retain) = match self {
            Self::Will(topic) => (topic, false),
            Self::RetainedWill(topic) => (topic, true),
            _ => return None,
        };
        Some(LastWill::new(topic, "{}", QoS::AtLeastOnce, retain))
    }
}

/// The certificate and the key in a folder.
pub fn credential(folder: &Path) -> Credential {
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    (read("certificate.pem"), read("private.key"))
}

fn options(credential: Option<&Credential>, client_id: &str) -> MqttOptions {
    let endpoint = Cloud::endpoint();
    let mut options = MqttOptions::new(client_id, endpoint.host.clone(), endpoint.port);
    let ca = std::fs::read(Cloud::ca()).expect("the broker's authority");
    options.set_transport(Transport::tls(ca, credential.cloned(), None));
    options
}

/// A client that stays connected and says nothing.
pub struct Connection {
    // Dropped, it would end the connection.
    _client: AsyncClient,
    events: EventLoop,
}

impl Connection {
    /// Connects.
    pub async fn open(credential: &Credential, client_id: &str) -> Self {
        let (client, mut events) = AsyncClient::new(options(Some(credential), client_id), 8);
        while !matches!(events.poll().await.expect("a connection"), Event::Incoming(Packet::ConnAck(_))) {}
        Self { _client: client, events }
    }

    /// Waits until the broker has ended the connection.
    pub async fn ended(mut self) {
        let end = async { while self.events.poll().await.is_ok() {} };
        tokio::time::timeout(GRACE, end).await.expect("the broker ends the connection");
    }
}

/// Whether a client may do that.
pub async fn allows(credential: Option<&Credential>, client_id: &str, attempt: &Attempt) -> bool {
    let mut options = options(credential, client_id);
    if let Some(will) = attempt.will() {
        options.set_last_will(will);
    }
    let (client, mut events) = AsyncClient::new(options, 8);
    let mut others = Vec::new();
    let outcome = async {
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => match attempt {
                    Attempt::Connect | Attempt::Will(_) | Attempt::RetainedWill(_) => return true,
                    Attempt::Subscribe(filter) => client.try_subscribe(filter, QoS::AtLeastOnce).expect("room"),
                    Attempt::Publish(topic) => client.try_publish(topic, QoS::AtLeastOnce, false, "{}").expect("room"),
                    Attempt::Retain(topic) => client.try_publish(topic, QoS::AtLeastOnce, true, "{}").expect("room"),
                },
                Ok(Event::Incoming(Packet::SubAck(answer))) => {
                    return !answer.return_codes.contains(&rumqttc::SubscribeReasonCode::Failure);
                }
                Ok(Event::Incoming(Packet::PubAck(_))) => return true,
                Ok(other) => others.push(other),
                Err(_) => return false,
            }
        }
    };
    let outcome = tokio::time::timeout(GRACE, outcome).await;
    outcome.unwrap_or_else(|_| panic!("no word about {attempt:?}, only {others:?}"))
}
