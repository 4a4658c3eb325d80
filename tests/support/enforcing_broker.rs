//! A broker that enforces IoT policies, as AWS does and the local cloud of the other tests does not: an emulator of its own.

use crate::Cloud;
use aws_sdk_iot::config::Credentials;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS, Transport};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long the broker has to end the connection of a client that does what it must not.
const GRACE: Duration = Duration::from_secs(20);

/// The emulator; it ends with this value.
pub struct EnforcingBroker {
    process: Child,
    port: u16,
    ca: Vec<u8>,
    iot: aws_sdk_iot::Client,
}

impl Drop for EnforcingBroker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

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

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

impl EnforcingBroker {
    /// Starts the emulator with these policies of the deployed stack.
    pub async fn start(cloud: &Cloud, policies: &[&str]) -> Self {
        let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name}: run with `cargo xtask test`"));
        let (gateway, port) = (free_port(), free_port());
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let folder = Cloud::folder(&format!("enforcing-{port}"));
        std::fs::create_dir_all(&folder).expect("a folder");
        let log = std::fs::File::create(folder.join("log")).expect("a log");
        let mut command = Command::new(Path::new(&variable("FLEETFLOW_VENV_CLOUD")).join("bin/python"));
        command.arg(root.join("local/ministack_local.py")).env("AUTH", "true").env("BIND_HOST", "127.0.0.1");
        command.env("GATEWAY_PORT", gateway.to_string()).env("IOT_MTLS_ENABLED", "1");
        command.env("IOT_MTLS_PORT", port.to_string()).env("MINISTACK_REGION", variable("AWS_REGION"));
        command.env("TMPDIR", &folder).env("STATE_DIR", folder.join("state")).env("S3_DATA_DIR", folder.join("s3"));
        command.stdout(Stdio::null()).stderr(log);
        let process = command.spawn().expect("the emulator starts");
        let endpoint = format!("http://127.0.0.1:{gateway}");
        let credentials = Credentials::new(variable("AWS_ACCESS_KEY_ID"), "test", None, None, "root");
        let config = aws_sdk_iot::config::Builder::from(&cloud.config).endpoint_url(&endpoint);
        let iot = aws_sdk_iot::Client::from_conf(config.credentials_provider(credentials).build());
        crate::eventually("the enforcing broker listens", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok().then_some(())
        })
        .await;
        for name in policies {
            let known = cloud.iot.get_policy().policy_name(*name).send().await.expect("the policy");
            let document = known.policy_document.expect("a document");
            iot.create_policy().policy_name(*name).policy_document(document).send().await.expect("the policy again");
        }
        let ca = reqwest::get(format!("{endpoint}/_ministack/iot/ca.pem")).await.expect("the broker's authority");
        Self { process, port, ca: ca.bytes().await.expect("PEM").to_vec(), iot }
    }

    /// A certificate with a policy.
    pub async fn credential(&self, policy: &str) -> Credential {
        let made = self.iot.create_keys_and_certificate().set_as_active(true).send().await.expect("a certificate");
        let attach = self.iot.attach_policy().policy_name(policy).target(made.certificate_arn.expect("an ARN"));
        attach.send().await.expect("the policy is attached");
        let key = made.key_pair.and_then(|pair| pair.private_key).expect("a key");
        (made.certificate_pem.expect("a certificate").into_bytes(), key.into_bytes())
    }

    /// Whether a client may do that.
    pub async fn allows(&self, credential: &Credential, client_id: &str, attempt: Attempt) -> bool {
        let mut options = MqttOptions::new(client_id, "127.0.0.1", self.port);
        options.set_transport(Transport::tls(self.ca.clone(), Some(credential.clone()), None));
        let (client, mut events) = AsyncClient::new(options, 8);
        let outcome = async {
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::ConnAck(_))) => match &attempt {
                        Attempt::Connect => return true,
                        Attempt::Subscribe(filter) => client.try_subscribe(filter, QoS::AtLeastOnce).expect("room"),
                        Attempt::Publish(topic) => {
                            client.try_publish(topic, QoS::AtLeastOnce, false, "{}").expect("room");
                        }
                    },
                    Ok(Event::Incoming(Packet::SubAck(answer))) => {
                        let refused = rumqttc::SubscribeReasonCode::Failure;
                        return !answer.return_codes.contains(&refused);
                    }
                    Ok(Event::Incoming(Packet::PubAck(_))) => return true,
                    Ok(_) => {}
                    Err(_) => return false,
                }
            }
        };
        tokio::time::timeout(GRACE, outcome).await.unwrap_or_else(|_| panic!("no word about {attempt:?}"))
    }
}
