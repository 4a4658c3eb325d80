//! Packets on a TLS connection, with no more memory than what is under way. `rumqttc`'s own client keeps 25 KiB in buffers for
//! each connection, which is most of what a simulated device needs; its packets and their encoding are used here.

use crate::{ConnectionSettings, with_causes};
use bytes::BytesMut;
use rumqttc::tokio_rustls::TlsConnector;
use rumqttc::tokio_rustls::client::TlsStream;
use rumqttc::{Connect, ConnectReturnCode, Packet, mqttbytes};
use rustls::pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long the broker may take to let a client in, and to take a packet.
const PATIENCE: Duration = Duration::from_secs(5);
/// Packets a little larger than the largest payload that the broker carries.
const PACKET_BYTES: usize = protocol::MAX_PAYLOAD_BYTES + 4096;
/// How much is read at once at least: most packets.
const READ_BYTES: usize = 512;

/// An open connection.
pub(crate) struct Wire<S = TlsStream<TcpStream>> {
    stream: S,
    /// What has come of packets that are not complete yet.
    incoming: BytesMut,
}

impl Wire {
    /// Connects, and returns when the broker has let the client in.
    pub(crate) async fn open(settings: &ConnectionSettings, keep_alive: Duration) -> Result<Self, String> {
        let open = async {
            let mut wire = Self::new(connect(settings).await?);
            let mut connect = Connect::new(&settings.client_id);
            connect.keep_alive = u16::try_from(keep_alive.as_secs()).unwrap_or(u16::MAX);
            connect.clean_session = settings.clean_session;
            wire.write(&Packet::Connect(connect)).await?;
            match wire.read().await? {
                Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => Ok(wire),
                Packet::ConnAck(answer) => Err(format!("Connection refused, return code: `{:?}`", answer.code)),
                packet => Err(format!("Expected ConnAck packet, received: {packet:?}")),
            }
        };
        timeout(PATIENCE, open).await.unwrap_or_else(|_| Err("Network timeout".to_owned()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, incoming: BytesMut::new() }
    }

    /// The next packet. Dropping the future loses nothing.
    pub(crate) async fn read(&mut self) -> Result<Packet, String> {
        loop {
            match Packet::read(&mut self.incoming, PACKET_BYTES) {
                Ok(packet) => {
                    if self.incoming.is_empty() {
                        self.incoming = BytesMut::new();
                    }
                    return Ok(packet);
                }
                Err(mqttbytes::Error::InsufficientBytes(missing)) => self.incoming.reserve(missing.max(READ_BYTES)),
                Err(error) => return Err(error.to_string()),
            }
            match self.stream.read_buf(&mut self.incoming).await {
                Ok(0) => return Err("the broker has closed the connection".to_owned()),
                Ok(_) => {}
                Err(error) => return Err(with_causes(&error)),
            }
        }
    }

    /// Sends a packet. A future that is dropped may have sent half of it: the connection is of no use then.
    pub(crate) async fn write(&mut self, packet: &Packet) -> Result<(), String> {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, PACKET_BYTES).map_err(|error| error.to_string())?;
        let write = async {
            self.stream.write_all(&bytes).await?;
            self.stream.flush().await
        };
        match timeout(PATIENCE, write).await {
            Ok(written) => written.map_err(|error| with_causes(&error)),
            Err(_) => Err("Flush timeout".to_owned()),
        }
    }
}

async fn connect(settings: &ConnectionSettings) -> Result<TlsStream<TcpStream>, String> {
    let host = settings.endpoint.host.clone();
    let name = ServerName::try_from(host.clone()).map_err(|error| error.to_string())?;
    let stream = TcpStream::connect((host, settings.endpoint.port)).await.map_err(|error| with_causes(&error))?;
    // An answer follows an acknowledgement at once, and must not wait for the broker's acknowledgement of that: 40 ms.
    stream.set_nodelay(true).map_err(|error| with_causes(&error))?;
    let connector = TlsConnector::from(Arc::clone(&settings.tls));
    connector.connect(name, stream).await.map_err(|error| format!("TLS: {}", with_causes(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rumqttc::{Publish, QoS};

    fn publish(payload: Vec<u8>) -> Packet {
        let mut publish = Publish::new("a/b", QoS::AtLeastOnce, payload);
        publish.pkid = 7;
        Packet::Publish(publish)
    }

    #[tokio::test]
    async fn packets_come_in_pieces_and_together() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (mut wire, mut broker) = (Wire::new(ours), theirs);
        let mut bytes = BytesMut::new();
        let packets = [publish(vec![1; 3]), publish(vec![2; 100_000]), Packet::PingResp];
        for packet in &packets {
            packet.write(&mut bytes, PACKET_BYTES).unwrap();
        }
        let (first, rest) = bytes.split_at(5);
        broker.write_all(first).await.unwrap();
        assert!(timeout(Duration::from_millis(20), wire.read()).await.is_err(), "it is not complete");
        broker.write_all(rest).await.unwrap();
        for packet in packets {
            assert_eq!(wire.read().await, Ok(packet));
        }
        assert_eq!(wire.incoming.capacity(), 0, "nothing is kept");
        drop(broker);
        assert_eq!(wire.read().await, Err("the broker has closed the connection".to_owned()));
    }

    #[tokio::test]
    async fn what_is_written_can_be_read() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (mut wire, mut broker) = (Wire::new(ours), Wire::new(theirs));
        wire.write(&publish(vec![3; 100_000])).await.unwrap();
        assert_eq!(broker.read().await, Ok(publish(vec![3; 100_000])));
        assert!(wire.write(&publish(vec![0; PACKET_BYTES])).await.is_err(), "no broker would take it");
    }
}
