//! The MQTT connection of a device or a worker: mutual TLS, a persistent session, and messages that count as sent only
//! once the broker has acknowledged them.

mod endpoint;
mod wire;

pub use endpoint::Endpoint;
use protocol::Publication;
use rand::RngExt;
use rumqttc::{Packet, PubAck, Publish, QoS, Subscribe, SubscribeFilter, SubscribeReasonCode};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::select;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use wire::Wire;

const KEEP_ALIVE: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The packet id of a connection's subscription.
const SUBSCRIPTION: u16 = 1;
/// Chooses the TLS implementation of this process. Every entry point calls it; only the first call counts.
pub fn install_crypto_provider() {
    // An error means that the program has chosen already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// An error and its causes in one line: the outermost of a library's errors often names none of what happened.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

/// A certificate or key that cannot be used, or the lack of one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(String);

/// The certificate authorities that a broker's certificate may come from.
#[derive(Debug, Clone)]
pub struct Trust(Arc<RootCertStore>);

impl Trust {
    /// The authorities in a PEM file, or those of the operating system. Fails with a sentence if there are none.
    pub fn new(ca: Option<&Path>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        let (certificates, origin) = match ca {
            Some(file) => (read_certificates(file).map_err(|error| error.0)?, file.display().to_string()),
            None => (rustls_native_certs::load_native_certs().certs, "the operating system's trust store".to_owned()),
        };
        roots.add_parsable_certificates(certificates);
        if roots.is_empty() {
            return Err(format!("{origin} holds no CA certificate: give a file with one"));
        }
        Ok(Self(Arc::new(roots)))
    }

    /// The TLS settings of a client with that certificate and key, both PEM files.
    pub fn of_client(&self, certificate: &Path, key: &Path, port: u16) -> Result<Arc<ClientConfig>, TlsError> {
        let certificates = read_certificates(certificate)?;
        let private_key = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, &error))?;
        let mut config = ClientConfig::builder()
            .with_root_certificates(Arc::clone(&self.0))
            .with_client_auth_cert(certificates, private_key)
            .map_err(|error| unreadable(key, &error))?;
        // A device that reboots has forgotten its TLS sessions, and thousands of them need not be kept.
        config.resumption = Resumption::disabled();
        if port == 443 {
            // https://docs.aws.amazon.com/iot/latest/developerguide/protocols.html
            config.alpn_protocols = vec![b"x-amzn-mqtt-ca".to_vec()];
        }
        Ok(Arc::new(config))
    }
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_file_iter(file).and_then(Iterator::collect).map_err(|error| unreadable(file, &error))
}

fn unreadable(file: &Path, error: &dyn std::fmt::Display) -> TlsError {
    TlsError(format!("{} cannot be used: {error}", file.display()))
}

/// What a client needs to connect, the same for its whole life.
pub struct ConnectionSettings {
    /// The client id: a device's is its thing's name.
    pub client_id: String,
    /// The broker.
    pub endpoint: Endpoint,
    /// How to trust the broker, and to be trusted.
    pub tls: Arc<ClientConfig>,
    /// Whether the broker forgets what it has for the client when the connection ends.
    pub clean_session: bool,
    /// What it subscribes to, at `QoS` 1.
    pub filters: Vec<String>,
    /// Bounds how many devices of the process shake hands at the same time.
    pub handshakes: Arc<Semaphore>,
    /// Told of every attempt that fails.
    pub on_failure: Box<dyn Fn(&str) + Send + Sync>,
}

/// A message from the broker that it keeps until [`Delivery::acknowledge`].
pub struct Delivery {
    publish: Box<Publish>,
    requests: Requests,
}

impl Delivery {
    /// Where it was published.
    pub fn topic(&self) -> &str {
        &self.publish.topic
    }

    /// What it holds.
    pub fn payload(&self) -> &[u8] {
        &self.publish.payload
    }

    /// Lets the broker forget the message. On a connection that is gone by now this does nothing, and the
    /// broker delivers again.
    pub fn acknowledge(self) {
        if self.publish.qos == QoS::AtLeastOnce {
            self.requests.send(Packet::PubAck(PubAck::new(self.publish.pkid)));
        }
    }
}

/// A connection that reconnects by itself until it is dropped, which cuts it without a goodbye.
pub struct Connection {
    outbox: Arc<Outbox>,
    online: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    /// Connects in the background; messages come out of the receiver.
    pub fn open(settings: Arc<ConnectionSettings>) -> (Self, mpsc::UnboundedReceiver<Delivery>) {
        let (deliveries, inbox) = mpsc::unbounded_channel();
        let (set_online, online) = watch::channel(false);
        let outbox = Arc::new(Outbox::default());
        let task = tokio::spawn(stay_connected(settings, Arc::clone(&outbox), set_online, deliveries));
        (Self { outbox, online, task }, inbox)
    }

    /// Whether the device is subscribed now; changes can be awaited.
    pub fn online(&self) -> watch::Receiver<bool> {
        self.online.clone()
    }

    /// Sends a message, over as many connections as it takes; returns when the broker has acknowledged it.
    pub async fn publish(&self, publication: Publication) {
        // The sender lives as long as the message is queued, and that is until it is acknowledged.
        let _ = self.outbox.push(publication).await;
    }

    /// Closes the connection after what has been sent and acknowledged so far, and opens the next one after
    /// `away`. Does nothing without a connection.
    pub fn leave(&self, away: Duration) {
        self.outbox.leave(away);
    }

    /// Queues a message without waiting for its acknowledgement.
    pub fn post(&self, publication: Publication) {
        drop(self.outbox.push(publication));
    }

    /// Takes the next message as a broker does.
    #[cfg(feature = "test-util")]
    pub async fn acknowledge_next(&self) -> Publication {
        loop {
            let next = self.outbox.lock().queue.front().map(|(publication, _)| publication.clone());
            if let Some(publication) = next {
                self.outbox.acknowledged();
                return publication;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The same, if there is a connection now and nothing else waits: for what is old news a moment later.
    pub fn post_if_idle(&self, publication: Publication) {
        if *self.online.borrow() && self.outbox.lock().queue.is_empty() {
            self.post(publication);
        }
    }
}

/// What is to be sent over a connection: acknowledgements, and one publish at a time. Nothing comes of it once that is gone.
#[derive(Clone)]
struct Requests(mpsc::UnboundedSender<Box<Packet>>);

impl Requests {
    fn send(&self, packet: Packet) {
        let _ = self.0.send(Box::new(packet));
    }
}

/// Messages that the broker has not acknowledged. Only the first is on its way, so that order is kept and
/// every acknowledgement is for that one.
#[derive(Default)]
struct Outbox(Mutex<Queued>);

#[derive(Default)]
struct Queued {
    queue: VecDeque<(Publication, oneshot::Sender<()>)>,
    requests: Option<Requests>,
    /// The packet id of the message that is on its way.
    packet_id: u16,
    /// How long the device stays away once its connection is closed, when it closes it on purpose.
    away: Option<Duration>,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queued> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, publication: Publication) -> oneshot::Receiver<()> {
        let (acknowledged, receiver) = oneshot::channel();
        let mut queued = self.lock();
        queued.queue.push_back((publication, acknowledged));
        if queued.queue.len() == 1 {
            queued.send_first();
        }
        receiver
    }

    fn connected(&self, requests: &Requests) {
        let mut queued = self.lock();
        queued.requests = Some(requests.clone());
        queued.send_first();
    }

    fn leave(&self, away: Duration) {
        let mut queued = self.lock();
        let Some(requests) = &queued.requests else { return };
        requests.send(Packet::Disconnect);
        queued.away = Some(away);
    }

    /// Returns how long the device meant to stay away, if it did.
    fn disconnected(&self) -> Option<Duration> {
        let mut queued = self.lock();
        queued.requests = None;
        queued.away.take()
    }

    /// The broker has a message; one that is not on its way does not count.
    fn acknowledged_by(&self, packet_id: u16) {
        if self.lock().packet_id == packet_id {
            self.acknowledged();
        }
    }

    fn acknowledged(&self) {
        let mut queued = self.lock();
        if let Some((_, sender)) = queued.queue.pop_front() {
            // Nobody waits for a message that was only posted.
            let _ = sender.send(());
        }
        queued.send_first();
    }
}

impl Queued {
    fn send_first(&mut self) {
        if let (Some(requests), Some((publication, _))) = (&self.requests, self.queue.front()) {
            // Zero is no packet id, and one is the subscription's.
            self.packet_id = self.packet_id.wrapping_add(1).max(SUBSCRIPTION + 1);
            let mut publish = Publish::new(&publication.topic, QoS::AtLeastOnce, publication.payload.clone());
            publish.pkid = self.packet_id;
            requests.send(Packet::Publish(publish));
        }
    }
}

async fn stay_connected(
    settings: Arc<ConnectionSettings>,
    outbox: Arc<Outbox>,
    online: watch::Sender<bool>,
    deliveries: mpsc::UnboundedSender<Delivery>,
) {
    let mut retry = FIRST_RETRY;
    loop {
        let Err(error) = session(&settings, &outbox, &online, &deliveries).await;
        let away = outbox.disconnected();
        if online.send_replace(false) {
            retry = FIRST_RETRY;
        }
        if let Some(away) = away {
            tracing::info!("{}: connection closed, back in {away:?}", settings.client_id);
            tokio::time::sleep(away).await;
            continue;
        }
        (settings.on_failure)(&format!("{} at {}: {error}", settings.client_id, settings.endpoint));
        // Full jitter: a fleet that lost its broker must not come back as one.
        let wait = rand::rng().random_range(retry / 2..retry);
        tokio::time::sleep(wait).await;
        retry = (retry * 2).min(LONGEST_RETRY);
    }
}

/// One connection from handshake to loss. What was not acknowledged is in the outbox.
async fn session(
    settings: &ConnectionSettings,
    outbox: &Outbox,
    online: &watch::Sender<bool>,
    deliveries: &mpsc::UnboundedSender<Delivery>,
) -> Result<Infallible, String> {
    // The semaphore is never closed.
    let mut handshake = settings.handshakes.acquire().await.ok();
    let mut wire = Wire::open(settings, KEEP_ALIVE).await?;
    let (sender, mut requests) = mpsc::unbounded_channel();
    let sender = Requests(sender);
    sender.send(subscription(settings));
    let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    // The broker has as long for its answer after a pause of this process as ever.
    keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_alive = true;
    loop {
        let packet = select! {
            packet = wire.read() => packet?,
            Some(packet) = requests.recv() => {
                wire.write(&packet).await?;
                if matches!(*packet, Packet::Disconnect) {
                    return Err("the device has closed the connection".into());
                }
                continue;
            }
            _ = keep_alive.tick() => {
                if !std::mem::replace(&mut is_alive, false) {
                    return Err("the broker does not answer any more".into());
                }
                wire.write(&Packet::PingReq).await?;
                continue;
            }
        };
        match packet {
            Packet::SubAck(answer) => {
                let mut answers = settings.filters.iter().zip(&answer.return_codes);
                if let Some((filter, _)) = answers.find(|(_, code)| **code == SubscribeReasonCode::Failure) {
                    return Err(format!("the broker refused the subscription to {filter}"));
                }
                drop(handshake.take());
                outbox.connected(&sender);
                online.send_replace(true);
            }
            Packet::Publish(publish) => {
                // The device has gone when nobody receives; then this task ends with it.
                let _ = deliveries.send(Delivery { publish: Box::new(publish), requests: sender.clone() });
            }
            Packet::PubAck(ack) => outbox.acknowledged_by(ack.pkid),
            Packet::PingResp => is_alive = true,
            _ => {}
        }
    }
}

fn subscription(settings: &ConnectionSettings) -> Packet {
    let filters = settings.filters.iter().cloned();
    let mut subscribe = Subscribe::new_many(filters.map(|filter| SubscribeFilter::new(filter, QoS::AtLeastOnce)));
    subscribe.pkid = SUBSCRIPTION;
    Packet::Subscribe(subscribe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_wait_for_their_acknowledgement_in_order() {
        let outbox = Outbox::default();
        let message = |topic: &str| Publication { topic: topic.into(), payload: vec![] };
        let (mut first, mut second) = (outbox.push(message("1")), outbox.push(message("2")));
        assert!(first.try_recv().is_err());
        outbox.acknowledged();
        assert!(first.try_recv().is_ok());
        assert!(second.try_recv().is_err());
        outbox.acknowledged();
        assert!(second.try_recv().is_ok());
    }
}
