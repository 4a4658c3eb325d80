//! For each document with commands: what its reader has, what he fills in, what he sees, and what is not run here, and why.

/// A document and its reader. A command is meant by a part of it.
pub(super) struct Document {
    /// Its path from the root of the checkout.
    pub(super) name: &'static str,
    /// What makes what the document takes for given, and what keeps other tests from being disturbed.
    pub(super) prepared: &'static str,
    /// What a reader puts in the place of something else; and names that other tests share, and names of this one.
    pub(super) replaced: &'static [(&'static str, &'static str)],
    /// Commands that go on until Ctrl-C, which is given at the end of their section.
    pub(super) endless: &'static [&'static str],
    /// What a command shows in the end; it is given again until then.
    pub(super) shown: &'static [(&'static str, &'static str)],
    /// What a command must not show.
    pub(super) hidden: &'static [(&'static str, &'static str)],
    /// Commands that are not run, and why.
    pub(super) left_out: &'static [(&'static str, &'static str)],
}

/// What a reader copies from what was printed before: a field of JSON, and the ARN of an execution.
pub(super) const HELPERS: &str = r#"
field() { printed | grep -o "\"$1\": *\"[^\"]*\"" | tail -1 | cut -d'"' -f4; }
execution() { printed | grep -o 'arn:aws:states:[^"[:space:]]*:execution:[^"[:space:]]*' | tail -1; }
endless=()
"#;

const DEMO: &str = "a demo is a whole run: a local cloud of its own, for minutes";
const ALL_TESTS: &str = "it runs this test, among all others";
const WATCHED: &str = "tests/end_to_end/watch.rs runs it";
const LONG_RUN: &str = "a run of hours";

pub(super) const DOCUMENTS: &[Document] = &[
    Document {
        name: "README.md",
        prepared: r#"
head -c 1000 /dev/urandom > image.bin
# The simulator removes policies that nobody else uses: these things keep those of all tests.
cargo run --bin device-simulator -- provision --thing gateway-1 --thing 3hwC2y7 --certificates other --policy "$(output DevicePolicyName)"
cargo run --bin device-simulator -- provision --thing documents-other --certificates other --policy "$(output MonitoringDevicePolicyName)"
# And this one is kept by a policy of its own, documents-device.
cargo run --bin device-simulator -- provision --prefix documents --count 1 --certificates other
notifications=$(aws sqs create-queue --queue-name documents-notifications --query QueueUrl --output text)
aws sqs send-message --queue-url "$notifications" --message-body 'a device was given up'
"#,
        replaced: &[
            ("output ThingGroupName", "echo documents"),
            (
                "output ThingGroupArn",
                "aws iot describe-thing-group --thing-group-name documents --query thingGroupArn --output text",
            ),
            ("--job-id JOB --thing-name THING", "--job-id $(field jobId) --thing-name sim-0001"),
            ("--execution-arn ARN", "--execution-arn $(execution)"),
            ("--name fleetflow-settings-api-key", "--name documents-settings-api-key"),
            ("output RecoveryNotificationsQueueUrl", "echo $notifications"),
            ("--prefix sensor", "--prefix documents-sensor"),
            ("sensor-0001", "documents-sensor-0001"),
            ("output $policy", "echo documents-device"),
        ],
        endless: &["device-simulator -- run", "device-simulator -- monitor", "on-premises-worker -- run"],
        shown: &[
            ("CreateJobFunction", "jobId"),
            ("describe-job-execution", "Upgraded"),
            ("list-executions --state-machine-arn \"$(output ConfigPushArn)\"", "sim-0001"),
            ("sqs receive-message", "a device was given up"),
            ("dynamodb get-item", "RETRY"),
            ("RestoreAttributesFunction", "RELEASED"),
            ("--query output --output text", r#""lambdaOutput": {"result": 57}"#),
            ("output MonitoringTableName", "documents-sensor-0001"),
            ("cleanup --thing-group", "removed: 3 things, 3 certificates, 0 policies, 1 thing groups, 3 folders"),
            ("cleanup --prefix", "removed: 3 things, 3 certificates, 0 policies, 0 thing groups, 3 folders"),
        ],
        hidden: &[],
        left_out: &[
            ("cargo xtask demo", DEMO),
            ("cargo xtask test", ALL_TESTS),
            ("sam build", "it builds for AWS; `cargo xtask test` does it for a function"),
            ("sam deploy", "the stack of all tests is deployed already"),
            ("sam delete", "the stack is that of all tests"),
            ("cargo xtask up", "the local cloud of all tests is up already"),
            ("cargo lambda watch", WATCHED),
            ("cargo lambda invoke", WATCHED),
        ],
    },
    Document {
        name: "docs/faults.md",
        prepared: "",
        replaced: &[],
        endless: &[],
        shown: &[],
        hidden: &[],
        left_out: &[("cargo xtask test --chaos", LONG_RUN)],
    },
    Document {
        name: "docs/first-deployment.md",
        prepared: r#"
head -c 1000 /dev/urandom > large.bin
cargo run --bin device-simulator -- provision --thing documents-thing --certificates certificates
JOB=documents THING=documents-thing
aws iot create-job --job-id "$JOB" --targets "arn:aws:iot:$AWS_REGION:$AWS_ACCESS_KEY_ID:thing/$THING" --document '{}' \
    --job-executions-retry-config '{"criteriaList": [{"failureType": "FAILED", "numberOfRetries": 1}]}'
aws iot-jobs-data update-job-execution --job-id "$JOB" --thing-name "$THING" --status IN_PROGRESS
version=$(aws iot create-policy-version --policy-name "$(output DevicePolicyName)" --query policyVersionId --output text \
    --policy-document '{"Version": "2012-10-17", "Statement": []}')
key=$(aws kms create-key --query KeyMetadata.Arn --output text)
aws stepfunctions start-execution --state-machine-arn "$(output ConfigPushArn)" --input '{"thingName": "documents-thing"}'
certificate=$(aws iot create-keys-and-certificate --set-as-active --query certificateId --output text)
URL=$(aws s3 presign "s3://$(output FirmwareBucketName)/firmware/9.9.9")
"#,
        replaced: &[
            ("--thing-name THING", "--thing-name documents-thing"),
            ("--policy-version-id OLDEST", "--policy-version-id $version"),
            ("--key-id ARN_OF_THE_KEY", "--key-id $key"),
            ("--execution-arn EXECUTION", "--execution-arn $(execution)"),
            ("--certificate-id ID", "--certificate-id $certificate"),
            (r#""S":"DEVICE""#, r#""S":"documents-thing""#),
            ("--thing-name DEVICE", "--thing-name documents-thing"),
        ],
        endless: &[],
        shown: &[
            ("for type in", "endpointAddress"),
            ("IOT_JOBS_ENDPOINT", "127.0.0.1:"),
            ("describe-index", "ACTIVE"),
            ("get-pending-job-executions", "documents"),
            ("list-job-executions-for-thing", r#""executionNumber": 2"#),
            ("get-key-policy", "kms:*"),
            ("If-Range", "206"),
            ("get-thing-connectivity-data", r#""connected": false"#),
        ],
        hidden: &[],
        left_out: &[
            ("openssl s_client", "it asks who has signed for AWS"),
            ("while curl", "it goes on for hours, until an address dies"),
            ("grep -o '\"url\"", "it wants to be given in the second in which a device downloads"),
            (
                "mosquitto_sub",
                "a program of others, which asks what AWS makes of a will; enforcement.rs asks the local broker",
            ),
            ("service-quotas", "the local cloud has no quotas"),
        ],
    },
    Document {
        name: "docs/operations.md",
        prepared: r#"
queue=$(aws sqs create-queue --queue-name documents-letters --query QueueUrl --output text)
arn="arn:aws:sqs:$AWS_REGION:$AWS_ACCESS_KEY_ID:documents-letters"
source=$(aws sqs create-queue --queue-name documents-source --query QueueUrl --output text --attributes \
    "{\"VisibilityTimeout\": \"0\", \"RedrivePolicy\": \"{\\\"deadLetterTargetArn\\\": \\\"$arn\\\", \\\"maxReceiveCount\\\": 1}\"}")
aws sqs send-message --queue-url "$source" --message-body letter
for attempt in 1 2; do aws sqs receive-message --queue-url "$source"; done
group=$(aws cloudformation describe-stack-resource --stack-name fleetflow --logical-resource-id FunctionLogs \
    --query StackResourceDetail.PhysicalResourceId --output text)
aws logs create-log-stream --log-group-name "$group" --log-stream-name documents
aws logs put-log-events --log-group-name "$group" --log-stream-name documents --log-events \
    "[{\"timestamp\": $(date +%s000), \"message\": \"{\\\"fields\\\": {\\\"error\\\": \\\"ServiceError\\\", \\\"message\\\": \\\"refused\\\"}}\"},
      {\"timestamp\": $(date +%s000), \"message\": \"{\\\"fields\\\": {\\\"error\\\": \\\"Throttled\\\", \\\"message\\\": \\\"unrelated\\\"}}\"}]"
"#,
        replaced: &[("output DeadLetterQueueUrl", "echo $queue")],
        endless: &[],
        shown: &[
            ("filter-log-events", "\"refused\""),
            ("list-message-move-tasks", r#""ApproximateNumberOfMessagesMoved": 1"#),
        ],
        hidden: &[("filter-log-events", "\"unrelated\"")],
        left_out: &[],
    },
    Document {
        name: "docs/security.md",
        prepared: r#"
cargo run --bin device-simulator -- provision --count 1 --prefix documents-client --certificates certificates
(exec cargo run --bin device-simulator -- run --certificates certificates --endpoint "$FLEETFLOW_MQTT_ENDPOINT") & endless+=($!)
until aws iot get-thing-connectivity-data --thing-name documents-client-0001 --query connected | grep true; do sleep 1; done
"#,
        replaced: &[("--client-id THING", "--client-id documents-client-0001")],
        endless: &[],
        shown: &[],
        hidden: &[],
        left_out: &[],
    },
    Document {
        name: "docs/testing.md",
        prepared: "",
        replaced: &[],
        endless: &[],
        shown: &[],
        hidden: &[],
        left_out: &[("PROPTEST_CASES", LONG_RUN)],
    },
];
