//! What must be refused is refused: on the broker by the policies of certificates, and by the roles of functions, state
//! machines and topic rules. Where the local cloud cannot refuse is said in docs/security.md.

use aws_config::SdkConfig;
use aws_config::sts::AssumeRoleProvider;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_iot::config::SharedCredentialsProvider;
use aws_sdk_iot::types::CertificateStatus;
use aws_sdk_lambda::types::InvocationType::DryRun;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use device_simulator::provision::{DevicePolicy, ProtocolMix};
use serde_json::json;
use std::collections::{BTreeSet, HashMap};
use tests::{Attempt, Cloud, Connection, Credential, allows, credential};

fn topic(name: impl Into<String>) -> String {
    name.into()
}

/// Each client may do what stands before the bar, and nothing of what stands behind it.
async fn check_client(credential: &Credential, allowed: &[(&str, Attempt)], refused: &[(&str, Attempt)]) {
    for (client, attempt) in allowed {
        assert!(allows(Some(credential), client, attempt).await, "{client} must be allowed to {attempt:?}");
    }
    for (client, attempt) in refused {
        assert!(!allows(Some(credential), client, attempt).await, "{client} must not {attempt:?}");
    }
}

/// Where a client speaks, and where it listens.
struct Topics {
    speaks: String,
    listens: String,
}

impl Topics {
    fn new(speaks: impl Into<String>, listens: impl Into<String>) -> Self {
        Self { speaks: speaks.into(), listens: listens.into() }
    }
}

/// The ways around a client's own topics. A retained message waits for whoever subscribes next, a will is published by
/// the broker, a shared subscription names its filter behind a prefix, Basic Ingest hands a message to a rule with
/// whatever topic the sender likes, past the filter of the rule, and by topics of AWS's own a client changes the shadow of
/// its thing, takes job executions, and makes certificates and things.
fn detours(stack: &Stack, client: &str, own: &Topics, others: &Topics) -> Vec<Attempt> {
    let mut detours = vec![
        Attempt::Retain(own.speaks.clone()),
        Attempt::Retain(own.listens.clone()),
        Attempt::Retain(others.speaks.clone()),
        Attempt::Retain(others.listens.clone()),
        Attempt::Will(own.listens.clone()),
        Attempt::Will(others.speaks.clone()),
        Attempt::Will(others.listens.clone()),
        Attempt::RetainedWill(own.speaks.clone()),
        Attempt::RetainedWill(others.listens.clone()),
        Attempt::Subscribe(topic("$aws/rules/#")),
        Attempt::Publish(format!("$aws/things/{client}/shadow/update")),
        Attempt::Publish(format!("$aws/things/{client}/jobs/start-next")),
        Attempt::Publish(topic("$aws/certificates/create/json")),
        Attempt::Publish(topic("$aws/provisioning-templates/none/provision/json")),
    ];
    for filter in [&own.listens, &others.listens, &others.speaks, "#"] {
        detours.push(Attempt::Subscribe(format!("$share/neighbours/{filter}")));
    }
    for rule in stack.names("AWS::IoT::TopicRule") {
        detours.push(Attempt::Publish(format!("$aws/rules/{rule}/{}", own.speaks)));
        detours.push(Attempt::Publish(format!("$aws/rules/{rule}/{}", others.speaks)));
    }
    detours
}

/// The client gets nowhere on any of the ways around. A will where it may speak anyway is its own word.
async fn check_detours(cloud: &Cloud, credential: &Credential, client: &str, own: &Topics, others: &Topics) {
    let stack = Stack::of(cloud).await;
    let detours = detours(&stack, client, own, others);
    assert!(detours.len() > 20, "the stack has rules");
    let refused: Vec<_> = detours.into_iter().map(|attempt| (client, attempt)).collect();
    check_client(credential, &[(client, Attempt::Will(own.speaks.clone()))], &refused).await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_devices_certificate_is_good_for_that_device_only() {
    use Attempt::{Connect, Publish, Subscribe};
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("refused", 2, ProtocolMix::Mixed).await;
    let [me, other] = [&devices[0], &devices[1]].map(|device| device.thing.as_str());
    let controller = "controllers/self::aws-dm-controller/agents";
    let allowed = [
        (me, Connect),
        (me, Subscribe(format!("devices/{me}/firmware_req"))),
        (me, Subscribe(format!("devices/{me}/config_req"))),
        (me, Subscribe(format!("agents/{me}/usp/request/#"))),
        (me, Publish(format!("devices/{me}/firmware_resp"))),
        (me, Publish(format!("devices/{me}/config_resp"))),
        (me, Publish(format!("{controller}/{me}/response"))),
        (me, Publish(format!("{controller}/{me}/reply"))),
        (me, Publish(topic("controllers/self::aws-dm-controller/reply"))),
        (me, Publish(format!("{controller}/{me}/response/reply-to=agents%2F{me}%2Fusp%2Frequest"))),
        (me, Publish(format!("controllers/self::aws-dm-controller/reply/reply-to=agents%2F{me}%2Fusp%2Frequest"))),
        (me, Publish(topic("iot/device/data"))),
    ];
    let refused = [
        // Whoever connects as another throws that one out, and gets what waits in its session.
        (other, Connect),
        ("nobody", Connect),
        (me, Subscribe(format!("devices/{other}/firmware_req"))),
        (me, Subscribe(format!("devices/{other}/config_req"))),
        (me, Subscribe(format!("agents/{other}/usp/request/#"))),
        (me, Subscribe(topic("devices/+/firmware_req"))),
        (me, Subscribe(topic("#"))),
        (me, Subscribe(topic("tenant1/to/worker"))),
        (me, Publish(format!("devices/{other}/firmware_resp"))),
        (me, Publish(format!("devices/{other}/config_resp"))),
        (me, Publish(format!("{controller}/{other}/response"))),
        (me, Publish(format!("{controller}/{other}/reply"))),
        (me, Publish(format!("{controller}/{other}/response/reply-to=agents%2F{me}%2Fusp%2Frequest"))),
        // Only the cloud gives commands.
        (me, Publish(format!("devices/{me}/firmware_req"))),
        (me, Publish(format!("devices/{other}/firmware_req"))),
        (me, Publish(topic("monitoring-device/building-1"))),
        (me, Publish(topic("tenant1/to/lambda"))),
    ];
    let credential = credential(&devices[0].certificates);
    check_client(&credential, &allowed, &refused).await;
    let topics =
        |thing: &str| Topics::new(format!("devices/{thing}/firmware_resp"), format!("devices/{thing}/firmware_req"));
    check_detours(&cloud, &credential, me, &topics(me), &topics(other)).await;
    for attempt in [Connect, Subscribe(topic("#")), Publish(format!("devices/{me}/firmware_resp"))] {
        assert!(!allows(None, me, &attempt).await, "a client without a certificate must not {attempt:?}");
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_sensors_certificate_is_good_for_its_building_only() {
    use Attempt::{Connect, Publish, Subscribe};
    let cloud = Cloud::connect().await;
    let policy = DevicePolicy::Existing(cloud.output("MonitoringDevicePolicyName").to_owned());
    let things = cloud.provision_with("sensor", 1, ProtocolMix::Mixed, |options| {
        options.policy = policy;
        options.attributes.insert("building".into(), "refused-7".into());
    });
    let devices = things.await.1;
    let me = devices[0].thing.as_str();
    let allowed = [
        (me, Connect),
        (me, Publish(topic("monitoring-device/building-refused-7"))),
        (me, Subscribe(topic("monitoring-device/remediation-refused-7"))),
    ];
    let refused = [
        ("nobody", Connect),
        (me, Publish(topic("monitoring-device/building-refused-8"))),
        (me, Publish(topic("monitoring-device/remediation-refused-7"))),
        (me, Subscribe(topic("monitoring-device/remediation-refused-8"))),
        (me, Subscribe(topic("monitoring-device/+"))),
        (me, Publish(format!("devices/{me}/firmware_resp"))),
    ];
    let credential = credential(&devices[0].certificates);
    check_client(&credential, &allowed, &refused).await;
    let topics = |building: u8| {
        let of = |what: &str| format!("monitoring-device/{what}-refused-{building}");
        Topics::new(of("building"), of("remediation"))
    };
    check_detours(&cloud, &credential, me, &topics(7), &topics(8)).await;
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_tenants_certificate_is_good_for_that_tenant_only() {
    use Attempt::{Connect, Publish, Subscribe};
    let cloud = Cloud::connect().await;
    let folder = cloud.worker_credentials(&"tenant1".parse().expect("a tenant")).await;
    let allowed = [
        ("tenant1.a", Connect),
        ("tenant1.b", Subscribe(topic("tenant1/to/worker"))),
        ("tenant1.c", Subscribe(topic("tenant1/to/worker/c"))),
        ("tenant1.d", Publish(topic("tenant1/to/lambda"))),
    ];
    let refused = [
        ("tenant2.a", Connect),
        ("tenant1", Connect),
        ("mqtt-container-client", Connect),
        ("tenant1.e", Subscribe(topic("tenant2/to/worker"))),
        ("tenant1.f", Subscribe(topic("+/to/worker"))),
        ("tenant1.g", Subscribe(topic("#"))),
        ("tenant1.h", Subscribe(topic("tenant1/to/lambda"))),
        ("tenant1.i", Publish(topic("tenant2/to/lambda"))),
        ("tenant1.j", Publish(topic("tenant1/to/worker"))),
        ("tenant1.k", Publish(topic("devices/gateway-1/firmware_resp"))),
    ];
    let credential = credential(&folder);
    check_client(&credential, &allowed, &refused).await;
    let topics = |tenant: &str| Topics::new(format!("{tenant}/to/lambda"), format!("{tenant}/to/worker"));
    check_detours(&cloud, &credential, "tenant1.l", &topics("tenant1"), &topics("tenant2")).await;
    // The other way round, and with the policy of plain workers besides.
    let second = credential_of(&cloud, "tenant2").await;
    check_detours(&cloud, &second, "tenant2.l", &topics("tenant2"), &topics("tenant1")).await;
    let plain = cloud.iot.attach_policy().policy_name(cloud.output("PlainWorkerPolicyName"));
    plain
        .target(std::fs::read_to_string(folder.join("arn")).expect("an ARN"))
        .send()
        .await
        .expect("the policy is attached");
    check_detours(&cloud, &credential, "mqtt-container-client", &topics("tenant1"), &topics("tenant2")).await;
}

async fn credential_of(cloud: &Cloud, tenant: &str) -> Credential {
    credential(&cloud.worker_credentials(&tenant.parse().expect("a tenant")).await)
}

/// What is refused above is refused by a policy, and by nothing else: a policy that allows everything lets it pass.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn only_a_policy_closes_the_ways_around() {
    let cloud = Cloud::connect().await;
    let policy = format!("everything-{}", uuid::Uuid::new_v4().simple());
    let everything =
        json!({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "iot:*", "Resource": "*"}});
    let create = cloud.iot.create_policy().policy_name(&policy);
    create.policy_document(everything.to_string()).send().await.expect("a policy");
    let options = DevicePolicy::Existing(policy);
    let change = |one: &mut device_simulator::provision::ProvisionOptions| one.policy = options;
    let devices = cloud.provision_with("unbound", 1, ProtocolMix::Mixed, change).await.1;
    let credential = credential(&devices[0].certificates);
    let of = |what: &str| format!("probes/{}/{what}", devices[0].thing);
    let no_stack = Stack(HashMap::from([("Rule".into(), ("AWS::IoT::TopicRule".into(), "no_such_rule".into()))]));
    let own = Topics::new(of("speaks"), of("listens"));
    let client = devices[0].thing.as_str();
    for attempt in detours(&no_stack, client, &own, &Topics::new(of("others-speak"), of("others-listen"))) {
        // Nobody may listen there, whatever policies say.
        let is_allowed = !matches!(&attempt, Attempt::Subscribe(filter) if filter.starts_with("$aws/rules/"));
        assert_eq!(allows(Some(&credential), client, &attempt).await, is_allowed, "{attempt:?}");
    }
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_certificate_that_is_not_active_is_good_for_nothing() {
    let cloud = Cloud::connect().await;
    let (_, devices) = cloud.provision("revoked", 2, ProtocolMix::Mixed).await;
    for (device, status) in devices.iter().zip([CertificateStatus::Inactive, CertificateStatus::Revoked]) {
        let (credential, client) = (credential(&device.certificates), device.thing.as_str());
        let certificate = certificate_id(&cloud, client).await;
        let set = |status: CertificateStatus| {
            cloud.iot.update_certificate().certificate_id(&certificate).new_status(status).send()
        };
        let connection = Connection::open(&credential, client).await;
        set(status.clone()).await.expect("the certificate's status is set");
        // AWS says within a few minutes; here it is at once.
        connection.ended().await;
        assert!(!allows(Some(&credential), client, &Attempt::Connect).await, "{status}");
        if status == CertificateStatus::Inactive {
            set(CertificateStatus::Active).await.expect("the certificate is active again");
            assert!(allows(Some(&credential), client, &Attempt::Connect).await);
        } else {
            assert!(set(CertificateStatus::Active).await.is_err(), "what is revoked stays revoked");
        }
    }
}

async fn certificate_id(cloud: &Cloud, thing: &str) -> String {
    let listed = cloud.iot.list_thing_principals().thing_name(thing).send().await.expect("the thing's certificates");
    let arn = listed.principals.unwrap_or_default().remove(0);
    arn.rsplit_once('/').expect("an ARN").1.to_owned()
}

/// What every role of the stack tries: an action on a resource of the stack, or on something else of that kind.
const CALLS: &[&str] = &[
    "cloudformation:DescribeStacks fleetflow",
    "cloudwatch:PutMetricData Device/Monitoring",
    "cloudwatch:PutMetricData Other/Namespace",
    "dynamodb:DeleteItem AllowancesTable",
    "dynamodb:DeleteItem ClimatesTable",
    "dynamodb:DeleteItem ConnectionsTable",
    "dynamodb:DeleteItem MonitoringTable",
    "dynamodb:DeleteItem RecoveryTable",
    "dynamodb:DeleteItem RemediationsTable",
    "dynamodb:DeleteItem RendezvousTable",
    "dynamodb:DeleteItem SettingsTable",
    "dynamodb:DeleteItem TelemetryBatchesTable",
    "dynamodb:DeleteItem WorkerJobsTable",
    "dynamodb:GetItem ClimatesTable",
    "dynamodb:GetItem ConnectionsTable",
    "dynamodb:GetItem MonitoringTable",
    "dynamodb:GetItem RecoveryTable",
    "dynamodb:GetItem RemediationsTable",
    "dynamodb:GetItem RendezvousTable",
    "dynamodb:GetItem SettingsTable",
    "dynamodb:GetItem TelemetryBatchesTable",
    "dynamodb:GetItem WorkerJobsTable",
    "dynamodb:PutItem ClimatesTable",
    "dynamodb:PutItem ConnectionsTable",
    "dynamodb:PutItem MonitoringTable",
    "dynamodb:PutItem RecoveryTable",
    "dynamodb:PutItem RemediationsTable",
    "dynamodb:PutItem RendezvousTable",
    "dynamodb:PutItem SettingsTable",
    "dynamodb:PutItem TelemetryBatchesTable",
    "dynamodb:PutItem WorkerJobsTable",
    "dynamodb:Scan MonitoringTable",
    "dynamodb:Scan RecoveryTable",
    "dynamodb:Scan RendezvousTable",
    "dynamodb:UpdateItem AllowancesTable",
    "dynamodb:UpdateItem ClimatesTable",
    "dynamodb:UpdateItem ConnectionsTable",
    "dynamodb:UpdateItem MonitoringTable",
    "dynamodb:UpdateItem RecoveryTable",
    "dynamodb:UpdateItem RemediationsTable",
    "dynamodb:UpdateItem RendezvousTable",
    "dynamodb:UpdateItem SettingsTable",
    "dynamodb:UpdateItem TelemetryBatchesTable",
    "dynamodb:UpdateItem WorkerJobsTable",
    "iot:AddThingToThingGroup DeviceGroup",
    "iot:AddThingToThingGroup FailedGroup",
    "iot:DeleteThing thing",
    "iot:DescribeJob job",
    "iot:DescribeJobExecution job",
    "iot:DescribeJobTemplate FirmwareJobTemplate",
    "iot:DescribeThing thing",
    "iot:GetIndexingConfiguration account",
    "iot:GetThingConnectivityData thing",
    "iot:Publish agents/thing/usp/request/1",
    "iot:Publish devices/thing/config_req",
    "iot:Publish devices/thing/firmware_req",
    "iot:Publish devices/thing/firmware_resp",
    "iot:Publish monitoring-device/building-refused",
    "iot:Publish monitoring-device/remediation-refused",
    "iot:Publish tenant9/to/lambda",
    "iot:Publish tenant9/to/worker",
    "iot:Publish tenant9/to/worker/1",
    "iot:RemoveThingFromThingGroup DeviceGroup",
    "iot:RemoveThingFromThingGroup FailedGroup",
    "iot:UpdateEventConfigurations account",
    "iot:UpdateThing thing",
    "iotjobsdata:UpdateJobExecution thing",
    "lambda:InvokeFunction AwaitDeviceFunction",
    "lambda:InvokeFunction CreateJobFunction",
    "lambda:InvokeFunction GetDeviceSettingsFunction",
    "lambda:InvokeFunction PublishToDeviceFunction",
    "lambda:InvokeFunction RestoreAttributesFunction",
    "lambda:InvokeFunction StoreTaskTokenFunction",
    "s3:DeleteObject FirmwareBucket",
    "s3:DeleteObject JobDataBucket",
    "s3:DeleteObject TelemetryBucket",
    "s3:GetObject FirmwareBucket",
    "s3:GetObject JobDataBucket",
    "s3:GetObject TelemetryBucket",
    "s3:GetObjectVersion FirmwareBucket",
    "s3:ListBucket FirmwareBucket",
    "s3:ListBucket JobDataBucket",
    "s3:ListBucket TelemetryBucket",
    "s3:PutObject FirmwareBucket",
    "s3:PutObject JobDataBucket",
    "s3:PutObject TelemetryBucket",
    "sns:Publish AlarmTopic",
    "sns:Publish EventsTopic",
    "sns:Publish QuarantineTopic",
    "sqs:ReceiveMessage DeadLetterQueue",
    "sqs:ReceiveMessage DeviceResponsesQueue",
    "sqs:ReceiveMessage FailedUpdatesQueue",
    "sqs:ReceiveMessage JobExecutionsQueue",
    "sqs:ReceiveMessage JobNotificationsQueue",
    "sqs:ReceiveMessage JobSchedulesQueue",
    "sqs:ReceiveMessage PresenceQueue",
    "sqs:ReceiveMessage QuarantineQueue",
    "sqs:ReceiveMessage RecoveriesQueue",
    "sqs:ReceiveMessage RemediationChecksQueue",
    "sqs:ReceiveMessage SessionsQueue",
    "sqs:ReceiveMessage SettingsRequestsQueue",
    "sqs:ReceiveMessage SucceededUpdatesQueue",
    "sqs:ReceiveMessage TelemetryQueue",
    "sqs:ReceiveMessage Tenant1AnswersQueue",
    "sqs:ReceiveMessage Tenant2AnswersQueue",
    "sqs:ReceiveMessage WorkflowReportsQueue",
    "sqs:SendMessage DeadLetterQueue",
    "sqs:SendMessage DeviceResponsesQueue",
    "sqs:SendMessage FailedUpdatesQueue",
    "sqs:SendMessage JobExecutionsQueue",
    "sqs:SendMessage JobNotificationsQueue",
    "sqs:SendMessage PresenceQueue",
    "sqs:SendMessage RecoveriesQueue",
    "sqs:SendMessage RemediationChecksQueue",
    "sqs:SendMessage SessionsQueue",
    "sqs:SendMessage SettingsRequestsQueue",
    "sqs:SendMessage SucceededUpdatesQueue",
    "sqs:SendMessage TelemetryQueue",
    "sqs:SendMessage Tenant1AnswersQueue",
    "sqs:SendMessage Tenant2AnswersQueue",
    "sqs:SendMessage WorkflowReportsQueue",
    "states:StartExecution ConfigPush",
    "states:StartExecution FailedUpdateRecovery",
    "states:StartExecution FirmwareUpgrade",
    "states:StartExecution OnPremisesJob",
];

/// Those of the calls that a role allows. All others it must refuse.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "AwaitDeviceFunctionRole",
        &[
            "dynamodb:UpdateItem ConnectionsTable",
            "dynamodb:UpdateItem RendezvousTable",
            "iot:GetThingConnectivityData thing",
        ],
    ),
    (
        "CheckRemediationFunctionRole",
        &[
            "cloudwatch:PutMetricData Device/Monitoring",
            "dynamodb:GetItem ClimatesTable",
            "dynamodb:PutItem ClimatesTable",
            "dynamodb:PutItem RemediationsTable",
            "iot:Publish monitoring-device/remediation-refused",
            "sns:Publish AlarmTopic",
            "sqs:ReceiveMessage RemediationChecksQueue",
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage RemediationChecksQueue",
        ],
    ),
    ("ConfigureIotFunctionRole", &["iot:GetIndexingConfiguration account", "iot:UpdateEventConfigurations account"]),
    (
        "CreateJobFunctionRole",
        &[
            "iot:DescribeJob job",
            "iot:DescribeJobTemplate FirmwareJobTemplate",
            "s3:GetObject FirmwareBucket",
            "s3:GetObjectVersion FirmwareBucket",
            "s3:ListBucket FirmwareBucket",
        ],
    ),
    (
        "GetDeviceSettingsFunctionRole",
        &[
            "dynamodb:UpdateItem SettingsTable",
            "sqs:ReceiveMessage SettingsRequestsQueue",
            "sqs:SendMessage DeadLetterQueue",
        ],
    ),
    (
        "HandleDeviceResponseFunctionRole",
        &[
            "dynamodb:GetItem RendezvousTable",
            "dynamodb:GetItem WorkerJobsTable",
            "dynamodb:PutItem WorkerJobsTable",
            "dynamodb:UpdateItem AllowancesTable",
            "dynamodb:UpdateItem RendezvousTable",
            "dynamodb:UpdateItem SettingsTable",
            "iot:DescribeThing thing",
            "iot:Publish agents/thing/usp/request/1",
            "iot:Publish tenant9/to/worker/1",
            "iot:UpdateThing thing",
            "s3:GetObject JobDataBucket",
            "s3:ListBucket JobDataBucket",
            "s3:PutObject JobDataBucket",
            "sns:Publish EventsTopic",
            "sqs:ReceiveMessage DeviceResponsesQueue",
            "sqs:ReceiveMessage Tenant1AnswersQueue",
            "sqs:ReceiveMessage Tenant2AnswersQueue",
            "sqs:SendMessage DeadLetterQueue",
        ],
    ),
    (
        "IngestTelemetryFunctionRole",
        &[
            "cloudwatch:PutMetricData Device/Monitoring",
            "dynamodb:GetItem TelemetryBatchesTable",
            "dynamodb:PutItem MonitoringTable",
            "dynamodb:PutItem TelemetryBatchesTable",
            "dynamodb:UpdateItem MonitoringTable",
            "iot:DescribeThing thing",
            "s3:GetObject TelemetryBucket",
            "s3:ListBucket TelemetryBucket",
            "s3:PutObject TelemetryBucket",
            "sqs:ReceiveMessage TelemetryQueue",
            "sqs:SendMessage DeadLetterQueue",
        ],
    ),
    (
        "PublishToDeviceFunctionRole",
        &[
            "dynamodb:GetItem RendezvousTable",
            "dynamodb:GetItem WorkerJobsTable",
            "dynamodb:PutItem WorkerJobsTable",
            "dynamodb:UpdateItem RendezvousTable",
            "dynamodb:UpdateItem SettingsTable",
            "iot:DescribeThing thing",
            "iot:Publish agents/thing/usp/request/1",
            "iot:Publish devices/thing/config_req",
            "iot:Publish devices/thing/firmware_req",
            "iot:Publish tenant9/to/worker",
            "iot:UpdateThing thing",
            "s3:GetObject FirmwareBucket",
            "s3:GetObject JobDataBucket",
            "s3:GetObjectVersion FirmwareBucket",
            "s3:ListBucket JobDataBucket",
            "s3:PutObject JobDataBucket",
        ],
    ),
    (
        "RecordSuccessFunctionRole",
        &[
            "dynamodb:GetItem RecoveryTable",
            "dynamodb:PutItem RecoveryTable",
            "dynamodb:UpdateItem AllowancesTable",
            "iot:DescribeThing thing",
            "iot:UpdateThing thing",
            "sqs:ReceiveMessage SucceededUpdatesQueue",
            "sqs:SendMessage DeadLetterQueue",
        ],
    ),
    (
        "RemediateFunctionRole",
        &[
            "cloudwatch:PutMetricData Device/Monitoring",
            "dynamodb:GetItem ClimatesTable",
            "dynamodb:PutItem ClimatesTable",
            "dynamodb:PutItem RemediationsTable",
            "iot:Publish monitoring-device/remediation-refused",
            "sns:Publish AlarmTopic",
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage RemediationChecksQueue",
        ],
    ),
    (
        "RestoreAttributesFunctionRole",
        &[
            "dynamodb:GetItem RecoveryTable",
            "dynamodb:PutItem RecoveryTable",
            "iot:DescribeThing thing",
            "iot:RemoveThingFromThingGroup FailedGroup",
            "iot:UpdateThing thing",
        ],
    ),
    (
        "RetryCounterFunctionRole",
        &[
            "dynamodb:GetItem RecoveryTable",
            "dynamodb:PutItem RecoveryTable",
            "dynamodb:UpdateItem AllowancesTable",
            "iot:DescribeThing thing",
            "sqs:ReceiveMessage FailedUpdatesQueue",
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage RecoveriesQueue",
            "sqs:SendMessage SucceededUpdatesQueue",
        ],
    ),
    (
        "StartWorkflowFunctionRole",
        &[
            "dynamodb:PutItem RendezvousTable",
            "dynamodb:UpdateItem AllowancesTable",
            "iot:DescribeThing thing",
            "sqs:ReceiveMessage JobNotificationsQueue",
            "sqs:ReceiveMessage JobSchedulesQueue",
            "sqs:ReceiveMessage RecoveriesQueue",
            "sqs:ReceiveMessage SessionsQueue",
            "sqs:SendMessage DeadLetterQueue",
            "states:StartExecution ConfigPush",
            "states:StartExecution FailedUpdateRecovery",
            "states:StartExecution FirmwareUpgrade",
            "states:StartExecution OnPremisesJob",
        ],
    ),
    (
        "StopWorkflowFunctionRole",
        &[
            "dynamodb:DeleteItem RendezvousTable",
            "dynamodb:UpdateItem RendezvousTable",
            "sqs:ReceiveMessage JobExecutionsQueue",
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage JobNotificationsQueue",
        ],
    ),
    (
        "StoreTaskTokenFunctionRole",
        &["dynamodb:UpdateItem RendezvousTable", "iot:DescribeThing thing", "iot:UpdateThing thing"],
    ),
    (
        "TrackPresenceFunctionRole",
        &[
            "dynamodb:GetItem ConnectionsTable",
            "dynamodb:UpdateItem ConnectionsTable",
            "dynamodb:UpdateItem RendezvousTable",
            "sqs:ReceiveMessage PresenceQueue",
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage SessionsQueue",
        ],
    ),
    (
        "UpdateJobFunctionRole",
        &[
            "iot:DescribeThing thing",
            "iot:UpdateThing thing",
            "iotjobsdata:UpdateJobExecution thing",
            "sqs:ReceiveMessage WorkflowReportsQueue",
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage JobNotificationsQueue",
        ],
    ),
    (
        "ConfigPushRole",
        &[
            "dynamodb:GetItem SettingsTable",
            "iot:DescribeThing thing",
            "lambda:InvokeFunction PublishToDeviceFunction",
            "sqs:SendMessage SettingsRequestsQueue",
        ],
    ),
    (
        "FailedUpdateRecoveryRole",
        &[
            "iot:AddThingToThingGroup FailedGroup",
            "lambda:InvokeFunction RestoreAttributesFunction",
            "sns:Publish QuarantineTopic",
        ],
    ),
    (
        "FirmwareUpgradeRole",
        &[
            "iot:DescribeThing thing",
            "lambda:InvokeFunction AwaitDeviceFunction",
            "lambda:InvokeFunction PublishToDeviceFunction",
            "lambda:InvokeFunction StoreTaskTokenFunction",
            "sns:Publish EventsTopic",
        ],
    ),
    ("OnPremisesJobRole", &["dynamodb:GetItem WorkerJobsTable", "lambda:InvokeFunction PublishToDeviceFunction"]),
    (
        "RuleRole",
        &[
            "sqs:SendMessage DeadLetterQueue",
            "sqs:SendMessage DeviceResponsesQueue",
            "sqs:SendMessage FailedUpdatesQueue",
            "sqs:SendMessage JobExecutionsQueue",
            "sqs:SendMessage JobNotificationsQueue",
            "sqs:SendMessage PresenceQueue",
            "sqs:SendMessage SucceededUpdatesQueue",
            "sqs:SendMessage TelemetryQueue",
        ],
    ),
    ("Tenant1AnswersRole", &["sqs:SendMessage Tenant1AnswersQueue"]),
    ("Tenant2AnswersRole", &["sqs:SendMessage Tenant2AnswersQueue"]),
];

/// The stack's resources by their logical names: their types, and the names by which they are called.
struct Stack(HashMap<String, (String, String)>);

impl Stack {
    async fn of(cloud: &Cloud) -> Self {
        let client = aws_sdk_cloudformation::Client::new(&cloud.config);
        let list = client.list_stack_resources().stack_name("fleetflow").into_paginator().items().send();
        let listed = list.collect::<Result<Vec<_>, _>>().await.expect("the stack's resources").into_iter();
        let mut resources: HashMap<_, _> = listed
            .filter_map(|one| Some((one.logical_resource_id?, (one.resource_type?, one.physical_resource_id?))))
            .collect();
        // Groups have another id there.
        for (group, output) in [("DeviceGroup", "ThingGroupName"), ("FailedGroup", "FailedThingGroupName")] {
            cloud.output(output).clone_into(&mut resources.get_mut(group).expect("a group").1);
        }
        Self(resources)
    }

    /// What a resource is called; what is none of the stack's is called as it is.
    fn name<'a>(&'a self, logical: &'a str) -> &'a str {
        self.0.get(logical).map_or(logical, |(_, name)| name)
    }

    /// What the resources of a type are called.
    fn names(&self, kind: &str) -> Vec<&str> {
        self.0.values().filter(|(one, _)| one == kind).map(|(_, name)| name.as_str()).collect()
    }

    fn roles(&self) -> BTreeSet<&str> {
        let roles = self.0.iter().filter(|(_, (kind, _))| kind == "AWS::IAM::Role");
        roles.map(|(name, _)| name.as_str()).collect()
    }
}

/// What calls AWS as a role, as a function or a state machine that has it does.
async fn with_role(config: &SdkConfig, stack: &Stack, role: &str) -> SdkConfig {
    let arn = format!("arn:aws:iam::000000000000:role/{}", stack.name(role));
    let provider = AssumeRoleProvider::builder(arn).session_name("test").configure(config).build().await;
    config.to_builder().credentials_provider(SharedCredentialsProvider::new(provider)).build()
}

fn code<T, E: ProvideErrorMetadata + std::fmt::Debug>(result: Result<T, E>) -> Option<String> {
    result.err().map(|error| error.code().map_or_else(|| format!("{error:?}"), str::to_owned))
}

/// Makes one of the calls, in a way that changes nothing: the error that answers it, if any.
async fn call(config: &SdkConfig, name: &str, target: &str) -> Option<String> {
    let (service, action) = name.split_once(':').expect("service:action");
    match service {
        "cloudformation" => {
            let client = aws_sdk_cloudformation::Client::new(config);
            code(client.describe_stacks().stack_name(target).send().await)
        }
        "cloudwatch" => {
            let datum = aws_sdk_cloudwatch::types::MetricDatum::builder().metric_name("Refused").value(0.0).build();
            code(
                aws_sdk_cloudwatch::Client::new(config)
                    .put_metric_data()
                    .namespace(target)
                    .metric_data(datum)
                    .send()
                    .await,
            )
        }
        "dynamodb" => call_dynamodb(config, action, target).await,
        "iot" => call_iot(config, action, target).await,
        "iotjobsdata" => {
            let update = aws_sdk_iotjobsdataplane::Client::new(config).update_job_execution();
            code(update.job_id("no-such-job").thing_name(target).status("SUCCEEDED".into()).send().await)
        }
        "lambda" => {
            let invoke = aws_sdk_lambda::Client::new(config).invoke().function_name(target);
            code(invoke.invocation_type(DryRun).send().await)
        }
        "s3" => call_s3(config, action, target).await,
        "sns" => code(aws_sdk_sns::Client::new(config).publish().topic_arn(target).message("").send().await),
        "sqs" => call_sqs(config, action, target).await,
        "states" => {
            let start = aws_sdk_sfn::Client::new(config).start_execution().state_machine_arn(target);
            code(start.name("not a name!").send().await)
        }
        _ => panic!("no such service: {service}"),
    }
}

async fn call_dynamodb(config: &SdkConfig, action: &str, table: &str) -> Option<String> {
    let client = aws_sdk_dynamodb::Client::new(config);
    let never = "attribute_exists(noSuchAttribute)";
    let key = || ("noSuchKey", AttributeValue::S("refused".into()));
    match action {
        "DeleteItem" => {
            let delete = client.delete_item().table_name(table).key(key().0, key().1);
            code(delete.condition_expression(never).send().await)
        }
        "GetItem" => code(client.get_item().table_name(table).key(key().0, key().1).send().await),
        "PutItem" => {
            let put = client.put_item().table_name(table).item(key().0, key().1);
            code(put.condition_expression(never).send().await)
        }
        "Scan" => code(client.scan().table_name(table).limit(1).send().await),
        "UpdateItem" => {
            let update = client.update_item().table_name(table).key(key().0, key().1);
            code(update.condition_expression(never).send().await)
        }
        _ => panic!("no such action: {action}"),
    }
}

async fn call_iot(config: &SdkConfig, action: &str, target: &str) -> Option<String> {
    let client = aws_sdk_iot::Client::new(config);
    match action {
        "AddThingToThingGroup" => {
            code(client.add_thing_to_thing_group().thing_group_name(target).thing_name("no-such-thing").send().await)
        }
        "DeleteThing" => code(client.delete_thing().thing_name("no-such-thing").send().await),
        "DescribeJob" => code(client.describe_job().job_id("no-such-job").send().await),
        "DescribeJobExecution" => {
            code(client.describe_job_execution().job_id("no-such-job").thing_name("no-such-thing").send().await)
        }
        "DescribeJobTemplate" => code(client.describe_job_template().job_template_id(target).send().await),
        "DescribeThing" => code(client.describe_thing().thing_name("no-such-thing").send().await),
        "GetIndexingConfiguration" => code(client.get_indexing_configuration().send().await),
        "GetThingConnectivityData" => {
            code(client.get_thing_connectivity_data().thing_name("no-such-thing").send().await)
        }
        "Publish" => code(aws_sdk_iotdataplane::Client::new(config).publish().topic(target).send().await),
        "RemoveThingFromThingGroup" => code(
            client.remove_thing_from_thing_group().thing_group_name(target).thing_name("no-such-thing").send().await,
        ),
        "UpdateEventConfigurations" => code(client.update_event_configurations().send().await),
        "UpdateThing" => code(client.update_thing().thing_name("no-such-thing").send().await),
        _ => panic!("no such action: {action}"),
    }
}

async fn call_s3(config: &SdkConfig, action: &str, bucket: &str) -> Option<String> {
    let client = aws_sdk_s3::Client::new(config);
    match action {
        "DeleteObject" => code(client.delete_object().bucket(bucket).key("no-such-key").send().await),
        "GetObject" => code(client.get_object().bucket(bucket).key("no-such-key").send().await),
        "GetObjectVersion" => {
            code(client.get_object().bucket(bucket).key("no-such-key").version_id("none").send().await)
        }
        "ListBucket" => code(client.list_objects_v2().bucket(bucket).max_keys(1).send().await),
        // Only an object that is not there would be replaced.
        "PutObject" => code(client.put_object().bucket(bucket).key("no-such-key").if_match("never").send().await),
        _ => panic!("no such action: {action}"),
    }
}

async fn call_sqs(config: &SdkConfig, action: &str, queue: &str) -> Option<String> {
    let client = aws_sdk_sqs::Client::new(config);
    match action {
        // Limits that there are not: the calls are refused, if not for the role then for these.
        "ReceiveMessage" => code(client.receive_message().queue_url(queue).max_number_of_messages(99).send().await),
        "SendMessage" => {
            code(client.send_message().queue_url(queue).message_body("refused").delay_seconds(99_999).send().await)
        }
        _ => panic!("no such action: {action}"),
    }
}

/// Whether an error says that the caller must not do that, in the words of whichever service.
fn is_refusal(error: Option<&String>) -> bool {
    let refusals = ["AccessDenied", "AccessDeniedException", "AuthorizationError", "ForbiddenException"];
    error.is_some_and(|error| refusals.contains(&error.as_str()))
}

#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn every_role_is_refused_what_it_does_not_name() {
    let cloud = Cloud::connect().await;
    let stack = Stack::of(&cloud).await;
    let roles: BTreeSet<&str> = ALLOWED.iter().map(|(role, _)| *role).collect();
    assert_eq!(stack.roles(), roles, "every role of the stack is in the table");
    let mut wrong = Vec::new();
    for (role, allowed) in ALLOWED {
        let config = with_role(&cloud.config, &stack, role).await;
        for name in CALLS {
            let (action, target) = name.split_once(' ').expect("an action and a resource");
            let error = call(&config, action, stack.name(target)).await;
            if is_refusal(error.as_ref()) == allowed.contains(name) {
                wrong.push(format!("{role}: {name}: {}", error.unwrap_or_else(|| "done".into())));
            }
        }
    }
    assert!(wrong.is_empty(), "allowed and refused, or the other way round:\n{}", wrong.join("\n"));
    let known: BTreeSet<&str> = CALLS.iter().copied().collect();
    for name in ALLOWED.iter().flat_map(|(_, allowed)| *allowed) {
        assert!(known.contains(name), "{name} is never tried");
    }
}

/// What the task fails with: a name that its state does not try again.
const ENDED: &str = "ResultMissing";

/// A task may be ended by the functions of its own workflow, and not by those of another.
#[tokio::test]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn a_function_ends_no_task_of_a_workflow_that_is_not_its_own() {
    let cloud = Cloud::connect().await;
    let stack = Stack::of(&cloud).await;
    let _alone = tests::alone("tenant1").await;
    // Nobody answers: its task waits for as long as this takes.
    let arn = cloud.start_job(&json!({"tenant": "tenant1", "a": 1, "b": 2})).await;
    let token = tests::eventually("the task has a token", || async {
        let history = cloud.step_functions.get_execution_history().execution_arn(&arn).send().await.expect("history");
        let types: Vec<_> = history.events.iter().map(|event| &event.r#type).collect();
        tests::saw(format!("its events: {types:?}"));
        let scheduled = history.events.iter().find_map(|event| event.task_scheduled_event_details.as_ref())?;
        let parameters: serde_json::Value = serde_json::from_str(&scheduled.parameters).expect("JSON");
        parameters["Payload"]["command"]["wait"]["taskToken"].as_str().map(str::to_owned)
    });
    let token = token.await;
    let end = |config: SdkConfig, token: String| async move {
        code(
            aws_sdk_sfn::Client::new(&config)
                .send_task_failure()
                .task_token(token)
                .error(ENDED)
                .cause("tried")
                .send()
                .await,
        )
    };
    for role in ["StoreTaskTokenFunctionRole", "TrackPresenceFunctionRole", "UpdateJobFunctionRole"] {
        let config = with_role(&cloud.config, &stack, role).await;
        let error = end(config, token.clone()).await;
        assert!(is_refusal(error.as_ref()), "{role}: {error:?}");
    }
    let config = with_role(&cloud.config, &stack, "HandleDeviceResponseFunctionRole").await;
    assert_eq!(end(config, token).await, None);
    let ended = tests::await_job(&cloud, &arn).await;
    assert_eq!(ended.error.0, ENDED);
}
