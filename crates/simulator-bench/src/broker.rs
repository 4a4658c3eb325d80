//! The broker, and the cloud's part in the conversation with the devices.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rumqttd::local::{LinkRx, LinkTx};
use rumqttd::{Config, ConnectionSettings, Notification, RouterConfig, ServerSettings, TlsConfig};
use serde_json::json;

use crate::certificates::Folder;

/// A running broker. It has no end but that of the process.
pub(crate) struct Broker {
    /// Where it listens, on the loopback interface.
    pub(crate) port: u16,
    sender: LinkTx,
    receiver: LinkRx,
    commands: u64,
}

impl Broker {
    /// Starts a broker for so many connections that asks for a certificate of the folder's authority.
    pub(crate) fn start(folder: &Folder, connections: usize) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut broker = rumqttd::Broker::new(config(folder, port, connections));
        let (mut sender, receiver) = broker.link("cloud")?;
        sender.subscribe("devices/+/config_resp")?;
        thread::spawn(move || {
            if let Err(error) = broker.start() {
                eprintln!("the broker has ended: {error}");
            }
        });
        Ok(Self { port, sender, receiver, commands: 0 })
    }

    /// Sends the next setting to a device.
    pub(crate) fn send_setting(&mut self, thing: &str) -> Result<()> {
        self.commands += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let operation = format!("bench-{}", self.commands);
        let command =
            json!({"operationId": operation, "name": "SET_TEMP", "type": "REQ", "value": 21.5, "timestamp": now});
        self.sender.publish(format!("devices/{thing}/config_req"), command.to_string())?;
        Ok(())
    }

    /// The device that answers next.
    pub(crate) fn next_answer(&mut self, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let notification = self.receiver.recv_deadline(deadline).context("then nothing more came")?;
            match notification {
                Some(Notification::Forward(forward)) => {
                    let topic = String::from_utf8_lossy(&forward.publish.topic);
                    if let Some(thing) =
                        topic.strip_prefix("devices/").and_then(|rest| rest.strip_suffix("/config_resp"))
                    {
                        return Ok(thing.to_owned());
                    }
                }
                // The router waits until we have taken what it had.
                Some(Notification::Unschedule) => self.receiver.ready()?,
                _ => {}
            }
        }
    }
}

fn config(folder: &Folder, port: u16, connections: usize) -> Config {
    let text = |path: &Path| path.display().to_string();
    let [certificate, key] = folder.broker();
    let tls = TlsConfig::Rustls { capath: Some(text(&folder.ca())), certpath: text(&certificate), keypath: text(&key) };
    let server = ServerSettings {
        name: "mqtt".to_owned(),
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        tls: Some(tls),
        next_connection_delay_ms: 0,
        connections: ConnectionSettings {
            connection_timeout_ms: 60_000,
            max_payload_size: 128 * 1024,
            max_inflight_count: 100,
            auth: None,
            external_auth: None,
            dynamic_filters: true,
        },
    };
    let router = RouterConfig {
        // One more is ours.
        max_connections: connections + 10,
        max_outgoing_packet_count: 200,
        max_segment_size: 1024 * 1024,
        max_segment_count: 2,
        ..RouterConfig::default()
    };
    Config { router, v4: Some(HashMap::from([("mqtt".to_owned(), server)])), ..Config::default() }
}
