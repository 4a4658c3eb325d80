//! An agent of another make: what OB-USP-AGENT sends over MQTT 3.1.1 at its default settings, as its source and TR-369 show it.

use crate::MqttDevice;
use device_simulator::DeviceSpec;
use protocol::{ProtocolName, Publication};
use rumqttc::QoS;
use rusp_lib::usp::mod_Body::OneOfmsg_body::request;
use rusp_lib::usp::mod_Request::OneOfreq_type::{get, operate};
use rusp_lib::usp::{Body, Operate};
use rusp_lib::usp_builder::{
    GetReqPathResultBuilder, GetRespBuilder, MsgBuilder, NotifyBuilder, OperateRespBuilder, OperateRespResultBuilder,
    RecordBuilder, ResolvedPathResultBuilder,
};
use rusp_lib::usp_decoder::{try_decode_msg, try_decode_record};
use rusp_lib::usp_record::Record;
use rusp_lib::usp_record::mod_MQTTConnectRecord::MQTTVersion;
use rusp_lib::usp_record::mod_Record::OneOfrecord_type::no_session_context;

const CONTROLLER: &str = "self::aws-dm-controller";
const DEVICE_INFO: &str = "Device.DeviceInfo.";

/// A message to the agent.
pub struct UspMessage {
    /// Its id.
    pub id: String,
    /// What it says.
    pub body: Body,
}

impl UspMessage {
    /// The command in it.
    pub fn operate(&self) -> Option<&Operate> {
        let request(asked) = &self.body.msg_body else { return None };
        let operate(command) = &asked.req_type else { return None };
        Some(command)
    }

    /// Whether it asks for a value.
    pub fn is_get(&self) -> bool {
        matches!(&self.body.msg_body, request(asked) if matches!(asked.req_type, get(_)))
    }
}

/// An agent that is called otherwise than its thing, and listens to nothing else.
pub struct UspAgent {
    device: MqttDevice,
    /// What came while something else was waited for.
    unheard: Vec<UspMessage>,
    /// Who it is.
    pub endpoint_id: String,
}

impl UspAgent {
    /// Connects and says so.
    pub async fn connect(spec: &DeviceSpec, endpoint_id: &str) -> Self {
        let mut device = MqttDevice::connect(spec, false).await;
        device.subscribe(ProtocolName::Usp.encoding().command_filter(&spec.thing), QoS::AtLeastOnce).await;
        let agent = Self { device, unheard: Vec::new(), endpoint_id: endpoint_id.to_owned() };
        let record = agent.record().as_mqtt_connect_record(MQTTVersion::V3_1_1, agent.topic());
        agent.publish(&agent.said_on(), record.build().expect("a record")).await;
        agent
    }

    /// Says that it goes, and is gone.
    pub async fn disconnect(self) {
        let record = self.record().as_disconnect_record("reboot".into(), 0).build().expect("a record");
        self.publish(&self.said_on(), record).await;
    }

    fn topic(&self) -> String {
        format!("agents/{}/usp/request", self.device.thing)
    }

    fn said_on(&self) -> String {
        format!("controllers/{CONTROLLER}/agents/{}/response", self.device.thing)
    }

    fn record(&self) -> RecordBuilder {
        let record = RecordBuilder::new().with_version("1.3".into()).with_to_id(CONTROLLER.into());
        record.with_from_id(self.endpoint_id.clone())
    }

    /// With each message it says where it listens.
    async fn publish(&self, topic: &str, record: Record) {
        let topic = format!("{topic}/reply-to={}", self.topic().replace('/', "%2F"));
        self.device.publish(Publication { topic, payload: record.to_vec().expect("a record") }).await;
    }

    async fn say(&self, topic: &str, id: &str, body: Body) {
        let message = MsgBuilder::new().with_msg_id(id.into()).with_body(body).build().expect("a message");
        let record = self.record().with_no_session_context_payload(&message).build();
        self.publish(topic, record.expect("a record")).await;
    }

    /// Says something unasked, and waits for the acknowledgement: without one it would say it again and again.
    pub async fn notify(&mut self, id: &str, notify: NotifyBuilder) {
        self.say(&self.said_on(), id, notify.build().expect("a notification")).await;
        self.hear(|message| message.id == id).await;
    }

    /// An event with these arguments, to be notified.
    pub fn event(object: &str, name: &str, arguments: &[(&str, &str)]) -> NotifyBuilder {
        let arguments = arguments.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        NotifyBuilder::new("subscription-1".into()).with_send_resp(true).with_event(
            object.into(),
            name.into(),
            arguments,
        )
    }

    /// The next message to it that is such a one. What is addressed to others it drops.
    pub async fn hear(&mut self, is_wanted: impl Fn(&UspMessage) -> bool) -> UspMessage {
        if let Some(place) = self.unheard.iter().position(&is_wanted) {
            return self.unheard.remove(place);
        }
        loop {
            let record = try_decode_record(&self.device.message().await.payload).expect("a record");
            let no_session_context(content) = record.record_type else { panic!("a record without a message") };
            let message = try_decode_msg(&content.payload).expect("a message");
            let message =
                UspMessage { id: message.header.expect("a header").msg_id, body: message.body.expect("a body") };
            if record.to_id != self.endpoint_id {
                continue;
            }
            if is_wanted(&message) {
                return message;
            }
            self.unheard.push(message);
        }
    }

    /// Accepts a command, with the path of its request as TR-369 lets an agent.
    pub async fn accept(&self, command: &UspMessage) {
        let path = command.operate().expect("a command").command.clone();
        let result = OperateRespResultBuilder::new(path).set_path("Device.LocalAgent.Request.1".into());
        let body = OperateRespBuilder::new().with_operation_results(vec![result]).build();
        self.say(&format!("controllers/{CONTROLLER}/reply"), &command.id, body.expect("an answer")).await;
    }

    /// Answers the question for the version.
    pub async fn tell_version(&mut self, version: &str) {
        let question = self.hear(UspMessage::is_get).await;
        let parameters = vec![("SoftwareVersion".to_owned(), version.to_owned())];
        let resolved = ResolvedPathResultBuilder::new(DEVICE_INFO.into()).with_result_params(parameters);
        let path = format!("{DEVICE_INFO}SoftwareVersion");
        let result = GetReqPathResultBuilder::new(path).with_res_path_results(vec![resolved]);
        let body = GetRespBuilder::new().with_req_path_results(vec![result]).build();
        self.say(&format!("controllers/{CONTROLLER}/reply"), &question.id, body.expect("an answer")).await;
    }
}
