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
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::select;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use wire::Wire;

const KEEP_ALIVE: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How long the broker may take to acknowledge a subscription or a message. AWS IoT Core acknowledges nothing that it throttles, and
/// keeps the connection (<https://docs.aws.amazon.com/general/latest/gr/iot-core.html#iot-protocol-limits>).
const LONGEST_ANSWER: Duration = Duration::from_secs(30);
/// A connection that was subscribed for so long was a good one: the wait before the next begins anew. One on which nothing was
/// acknowledged ends before.
const GOOD_CONNECTION: Duration = LONGEST_ANSWER.saturating_mul(2);
/// After so many connections in a row that were not good ones the reason is looked for beyond the network.
const MANY_CUT: u32 = 3;
/// How often a message is sent without an answer before those behind it get their turn: AWS IoT Core cuts the connection of a client
/// that publishes what its policy does not allow, and does not say why.
const SENDS_IN_A_ROW: u32 = 3;
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
            let next = self.outbox.lock().queue.front().map(|first| first.publication.clone());
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

/// Messages that the broker has not acknowledged. Only the first is on its way, so that order is kept, unless the broker does not
/// take it, and every acknowledgement is for that one.
#[derive(Default)]
struct Outbox(Mutex<Queued>);

#[derive(Default)]
struct Queued {
    queue: VecDeque<Message>,
    requests: Option<Requests>,
    /// The packet id that was given last.
    last_packet_id: u16,
    /// How long the device stays away once its connection is closed, when it closes it on purpose.
    away: Option<Duration>,
}

struct Message {
    publication: Publication,
    acknowledged: oneshot::Sender<()>,
    /// None before it is sent for the first time.
    packet_id: Option<u16>,
    /// How often it has been sent, over as many connections, since others had their turn.
    sends: u32,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queued> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, publication: Publication) -> oneshot::Receiver<()> {
        let (acknowledged, receiver) = oneshot::channel();
        let mut queued = self.lock();
        queued.queue.push_back(Message { publication, acknowledged, packet_id: None, sends: 0 });
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
        if queued.queue.len() > 1 && queued.queue[0].sends >= SENDS_IN_A_ROW {
            let topic = &queued.queue[0].publication.topic;
            tracing::warn!(
                "{topic}: a message sent over {SENDS_IN_A_ROW} connections is not acknowledged: others go first"
            );
            queued.queue[0].sends = 0;
            queued.queue.rotate_left(1);
        }
        queued.away.take()
    }

    /// The broker has a message; false if that is not the one that is on its way.
    fn acknowledged_by(&self, packet_id: u16) -> bool {
        let is_current = self.lock().queue.front().is_some_and(|first| first.packet_id == Some(packet_id));
        if is_current {
            self.acknowledged();
        }
        is_current
    }

    fn acknowledged(&self) {
        let mut queued = self.lock();
        if let Some(first) = queued.queue.pop_front() {
            // Nobody waits for a message that was only posted.
            let _ = first.acknowledged.send(());
        }
        queued.send_first();
    }
}

impl Queued {
    fn send_first(&mut self) {
        let (Some(requests), Some(first)) = (&self.requests, self.queue.front_mut()) else { return };
        let mut publish = Publish::new(&first.publication.topic, QoS::AtLeastOnce, first.publication.payload.clone());
        // What is sent again has its packet id again (MQTT 3.1.1, 4.4).
        publish.dup = first.packet_id.is_some();
        publish.pkid = *first.packet_id.get_or_insert_with(|| {
            // Zero is no packet id, and one is the subscription's.
            self.last_packet_id = self.last_packet_id.wrapping_add(1).max(SUBSCRIPTION + 1);
            self.last_packet_id
        });
        first.sends += 1;
        requests.send(Packet::Publish(publish));
    }
}

async fn stay_connected(
    settings: Arc<ConnectionSettings>,
    outbox: Arc<Outbox>,
    online: watch::Sender<bool>,
    deliveries: mpsc::UnboundedSender<Delivery>,
) {
    let (mut retry, mut cut) = (FIRST_RETRY, 0);
    loop {
        let mut online_since = None;
        let Err(error) = session(&settings, &outbox, &online, &deliveries, &mut online_since).await;
        let away = outbox.disconnected();
        online.send_replace(false);
        match online_since.map(|since: Instant| since.elapsed() >= GOOD_CONNECTION) {
            Some(true) => (retry, cut) = (FIRST_RETRY, 0),
            Some(false) => cut += 1,
            None => cut = 0,
        }
        if let Some(away) = away {
            cut = 0;
            tracing::info!("{}: connection closed, back in {away:?}", settings.client_id);
            tokio::time::sleep(away).await;
            continue;
        }
        let client = &settings.client_id;
        let suspicion = if cut < MANY_CUT { String::new() } else { suspicion(client, cut) };
        (settings.on_failure)(&format!("{client} at {}: {error}{suspicion}", settings.endpoint));
        // Full jitter: a fleet that lost its broker must not come back as one.
        let wait = rand::rng().random_range(Duration::ZERO..retry);
        tokio::time::sleep(wait).await;
        retry = (retry * 2).min(LONGEST_RETRY);
    }
}

/// What may be the matter when the broker lets a client in and soon cuts its connection, again and again. It does not say.
fn suspicion(client: &str, cut: u32) -> String {
    format!(
        " ({cut} connections in a row were cut soon: does another client connect as {client}, or does this one publish what its \
         policy does not allow?)"
    )
}

/// One connection from handshake to loss. What was not acknowledged is in the outbox.
async fn session(
    settings: &ConnectionSettings,
    outbox: &Outbox,
    online: &watch::Sender<bool>,
    deliveries: &mpsc::UnboundedSender<Delivery>,
    online_since: &mut Option<Instant>,
) -> Result<Infallible, String> {
    // The semaphore is never closed.
    let handshake = settings.handshakes.acquire().await.ok();
    let wire = Wire::open(settings, KEEP_ALIVE).await?;
    drop(handshake);
    converse(wire, settings, outbox, deliveries, || {
        *online_since = Some(Instant::now());
        online.send_replace(true);
    })
    .await
}

/// Subscribes, says when that is done, and carries messages both ways.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut wire: Wire<S>,
    settings: &ConnectionSettings,
    outbox: &Outbox,
    deliveries: &mpsc::UnboundedSender<Delivery>,
    on_subscribed: impl FnOnce(),
) -> Result<Infallible, String> {
    let mut on_subscribed = Some(on_subscribed);
    // What the broker has to acknowledge, and until when: the subscription, then one message after the other.
    let mut awaited: Option<(&'static str, Instant)> = None;
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
                match *packet {
                    Packet::Disconnect => return Err("the device has closed the connection".into()),
                    Packet::Subscribe(_) => awaited = Some(("the subscription", Instant::now() + LONGEST_ANSWER)),
                    Packet::Publish(_) => awaited = Some(("a message", Instant::now() + LONGEST_ANSWER)),
                    _ => {}
                }
                continue;
            }
            what = overdue(awaited) => return Err(format!("the broker does not acknowledge {what}")),
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
                awaited = None;
                if let Some(on_subscribed) = on_subscribed.take() {
                    on_subscribed();
                    outbox.connected(&sender);
                }
            }
            Packet::Publish(publish) => {
                // The device has gone when nobody receives; then this task ends with it.
                let _ = deliveries.send(Delivery { publish: Box::new(publish), requests: sender.clone() });
            }
            Packet::PubAck(ack) if outbox.acknowledged_by(ack.pkid) => awaited = None,
            Packet::PingResp => is_alive = true,
            _ => {}
        }
    }
}

/// Returns when what is awaited has not come in time; never, if nothing is awaited.
async fn overdue(awaited: Option<(&'static str, Instant)>) -> &'static str {
    let Some((what, until)) = awaited else { return std::future::pending().await };
    sleep_until(until).await;
    what
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

    /// What the outbox has given to a connection.
    fn sent(requests: &mut mpsc::UnboundedReceiver<Box<Packet>>) -> Vec<(String, u16, bool)> {
        let mut sent = Vec::new();
        while let Ok(packet) = requests.try_recv() {
            if let Packet::Publish(publish) = *packet {
                sent.push((publish.topic, publish.pkid, publish.dup));
            }
        }
        sent
    }

    #[test]
    fn what_is_sent_again_has_its_packet_id_again_and_blocks_nothing_for_ever() {
        let outbox = Outbox::default();
        let _receivers =
            ["refused", "next"].map(|topic| outbox.push(Publication { topic: topic.into(), payload: vec![] }));
        let (sender, mut requests) = mpsc::unbounded_channel();
        let sender = Requests(sender);
        for (topic, id, dup) in
            [("refused", 2, false), ("refused", 2, true), ("refused", 2, true), ("next", 3, false), ("next", 3, true)]
        {
            outbox.connected(&sender);
            assert_eq!(sent(&mut requests), [(topic.to_owned(), id, dup)]);
            assert_eq!(outbox.disconnected(), None);
        }
        outbox.connected(&sender);
        assert!(!outbox.acknowledged_by(2) && outbox.acknowledged_by(3));
        assert_eq!(sent(&mut requests).last(), Some(&("refused".to_owned(), 2, true)));
    }

    fn settings() -> ConnectionSettings {
        install_crypto_provider();
        let tls = ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        ConnectionSettings {
            client_id: "gateway-1".into(),
            endpoint: "localhost".parse().unwrap(),
            tls: Arc::new(tls),
            clean_session: false,
            filters: vec!["a/b".into()],
            handshakes: Arc::new(Semaphore::new(1)),
            on_failure: Box::new(|_| {}),
        }
    }

    /// A broker that acknowledges what is asked of it, and every ping; with what the connection ends.
    async fn end_with(acknowledged: &[&str]) -> (Duration, String) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (outbox, (deliveries, _inbox)) = (Outbox::default(), mpsc::unbounded_channel());
        let _acknowledged = outbox.push(Publication { topic: "a/c".into(), payload: vec![] });
        let broker = async {
            let mut wire = Wire::new(theirs);
            while let Ok(packet) = wire.read().await {
                let answer = match packet {
                    Packet::Subscribe(_) if acknowledged.contains(&"subscription") => {
                        let granted = vec![SubscribeReasonCode::Success(QoS::AtLeastOnce)];
                        Packet::SubAck(rumqttc::SubAck::new(SUBSCRIPTION, granted))
                    }
                    Packet::PingReq => Packet::PingResp,
                    _ => continue,
                };
                wire.write(&answer).await.unwrap();
            }
        };
        let (began, settings) = (Instant::now(), settings());
        let client = converse(Wire::new(ours), &settings, &outbox, &deliveries, || {});
        let Err(end) = select! { end = client => end, () = broker => panic!("the broker has ended") };
        (began.elapsed(), end)
    }

    /// Before, a client waited for ever, and was mute.
    #[tokio::test(start_paused = true)]
    async fn a_broker_that_acknowledges_nothing_is_left() {
        for (acknowledged, what) in [(&[][..], "the subscription"), (&["subscription"], "a message")] {
            let (after, end) = end_with(acknowledged).await;
            assert_eq!(end, format!("the broker does not acknowledge {what}"));
            assert!(after >= LONGEST_ANSWER && after < LONGEST_ANSWER + KEEP_ALIVE, "{after:?}");
        }
    }
}
