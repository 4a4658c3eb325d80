//! What a client of the broker may do with its certificate, tried out.

use crate::Cloud;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS, Transport};
use std::path::Path;
use std::time::Duration;

/// How long the broker has to end the connection of a client that does what it must not.
const GRACE: Duration = Duration::from_secs(20);

/// A certificate and its key, as PEM.
pub type Credential = (Vec<u8>, Vec<u8>);

/// What a client tries once it is connected.
#[derive(Debug, Clone)]
pub enum Attempt {
    /// Nothing more than to connect.
    Connect,
    /// To listen.
    Subscribe(String),
    /// To speak.
    Publish(String),
}

/// The certificate and the key in a folder.
pub fn credential(folder: &Path) -> Credential {
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    (read("certificate.pem"), read("private.key"))
}

/// Whether a client may do that.
pub async fn allows(credential: Option<&Credential>, client_id: &str, attempt: &Attempt) -> bool {
    let endpoint = Cloud::endpoint();
    let mut options = MqttOptions::new(client_id, endpoint.host.clone(), endpoint.port);
    let ca = std::fs::read(Cloud::ca()).expect("the broker's authority");
    options.set_transport(Transport::tls(ca, credential.cloned(), None));
    let (client, mut events) = AsyncClient::new(options, 8);
    let mut others = Vec::new();
    let outcome = async {
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => match attempt {
                    Attempt::Connect => return true,
                    Attempt::Subscribe(filter) => client.try_subscribe(filter, QoS::AtLeastOnce).expect("room"),
                    Attempt::Publish(topic) => {
                        client.try_publish(topic, QoS::AtLeastOnce, false, "{}").expect("room");
                    }
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
