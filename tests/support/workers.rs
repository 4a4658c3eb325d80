//! Jobs on premises: their executions, credentials for workers, and a worker that does no more than the contract says.

use crate::{Cloud, MqttDevice, PATIENCE, Pushed, eventually, look, saw};
use protocol::on_premises::{JobMessage, WorkerMessage, WorkerResult, answers_topic, jobs_topic};
use protocol::{Publication, Tenant};
use rumqttc::QoS;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

impl Cloud {
    /// Starts a job: its execution's ARN.
    pub async fn start_job(&self, input: &Value) -> String {
        self.start_job_of(&input.to_string()).await
    }

    /// The same with an input as text.
    pub async fn start_job_of(&self, input: &str) -> String {
        let name = format!("job-{}", uuid::Uuid::new_v4().simple());
        let start = self.step_functions.start_execution().state_machine_arn(self.output("OnPremisesJobArn"));
        start.name(name).input(input).send().await.expect("the job starts").execution_arn
    }

    /// A key and a certificate with a tenant's policy, in a folder of their own.
    pub async fn worker_credentials(&self, tenant: &Tenant) -> PathBuf {
        let made = self.iot.create_keys_and_certificate().set_as_active(true).send().await.expect("a certificate");
        let policy = self.output(&format!("{}WorkerPolicyName", tenant.as_str().replacen('t', "T", 1)));
        let attach = self.iot.attach_policy().policy_name(policy);
        let arn = made.certificate_arn.expect("an ARN");
        attach.target(&arn).send().await.expect("the policy is attached");
        let folder = Self::folder(&format!("worker-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let key = made.key_pair.and_then(|pair| pair.private_key).expect("a key");
        let certificate = made.certificate_pem.expect("a certificate");
        for (name, content) in [("certificate.pem", certificate), ("private.key", key), ("arn", arn)] {
            std::fs::write(folder.join(name), content).expect("written");
        }
        // The worker takes no key that everybody can read.
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(folder.join("private.key"), owner_only).expect("its mode");
        folder
    }
}

impl Cloud {
    /// The address under which the functions sign those of large inputs and results: here it has the bucket in its path.
    fn job_data_address(&self) -> String {
        let endpoint = std::env::var("FLEETFLOW_PROXY").or_else(|_| std::env::var("AWS_ENDPOINT_URL"));
        format!("{}/{}/", endpoint.expect("an endpoint"), self.output("JobDataBucketName"))
    }

    /// Gives the certificate in a folder a policy of that name instead of its tenant's.
    pub async fn replace_worker_policy(&self, folder: &Path, name: &str, document: &Value) {
        let create = self.iot.create_policy().policy_name(name).policy_document(document.to_string());
        if let Err(error) = create.send().await {
            saw(format!("{:?}", error.into_service_error()));
        }
        let principal = std::fs::read_to_string(folder.join("arn")).expect("the certificate's ARN");
        let attached = self.iot.list_attached_policies().target(&principal).send().await.expect("its policies");
        for policy in attached.policies.unwrap_or_default() {
            let detach = self.iot.detach_policy().target(&principal).set_policy_name(policy.policy_name);
            detach.send().await.expect("detached");
        }
        self.iot.attach_policy().policy_name(name).target(&principal).send().await.expect("attached");
    }
}

/// Waits until no other test of this process has a tenant's workers, which would get this one's jobs.
pub async fn alone(tenant: &str) -> tokio::sync::MutexGuard<'static, ()> {
    static TENANTS: [tokio::sync::Mutex<()>; 2] =
        [tokio::sync::Mutex::const_new(()), tokio::sync::Mutex::const_new(())];
    TENANTS[usize::from(tenant == "tenant2")].lock().await
}

/// Waits until a job's execution has ended.
pub async fn await_job(cloud: &Cloud, arn: &str) -> Pushed {
    cloud.ended_push(arn).await
}

/// A client that takes jobs and answers them, without lease and heartbeat.
pub struct PlainWorker {
    /// Its connection.
    pub client: MqttDevice,
    /// Whose worker it is.
    pub tenant: Tenant,
}

impl PlainWorker {
    /// Connects in a persistent session and listens for its tenant's jobs.
    pub async fn connect(cloud: &Cloud, tenant: &str) -> Self {
        let tenant: Tenant = tenant.parse().expect("a tenant");
        let folder = cloud.worker_credentials(&tenant).await;
        let name = folder.file_name().and_then(|name| name.to_str()).expect("a name");
        // The policy wants a tenant's workers to connect under its name.
        let client_id = format!("{tenant}.{name}");
        let mut client = MqttDevice::connect_as(name.parse().expect("a name"), &client_id, &folder, false).await;
        client.subscribe(jobs_topic(&tenant), QoS::AtLeastOnce).await;
        Self { client, tenant }
    }

    /// The next job.
    pub async fn job(&mut self) -> JobMessage {
        JobMessage::decode(&self.client.message().await.payload).expect("a job")
    }

    /// Answers with this payload, whatever it is.
    pub async fn say(&self, payload: &Value) {
        self.say_text(&payload.to_string()).await;
    }

    /// The same with a text, which may be no JSON.
    pub async fn say_text(&self, payload: &str) {
        let payload = payload.as_bytes().to_owned();
        self.client.publish(Publication { topic: answers_topic(&self.tenant), payload }).await;
    }

    /// Answers a job with a result.
    pub async fn answer(&self, job: &JobMessage, result: Value) {
        self.say(&json!({"result": result, "TaskToken": job.task_token})).await;
    }

    /// Says something as a worker with a lease does.
    pub async fn tell(&self, job: &JobMessage, message: &WorkerMessage) {
        self.client.publish(message.encode(&self.tenant, &job.task_token)).await;
    }

    /// A result in a message.
    pub fn value(result: Value) -> WorkerResult {
        WorkerResult::Value(result.into())
    }
}

/// The real worker, as a process with credentials, configuration and journal of its own.
pub struct WorkerProcess {
    folder: PathBuf,
    process: Child,
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

impl WorkerProcess {
    /// Writes the configuration, with handlers as `worker.toml` has them, and starts the worker.
    pub async fn start(cloud: &Cloud, tenant: &str, name: &str, handlers: &str) -> Self {
        let folder = cloud.worker_credentials(&tenant.parse().expect("a tenant")).await;
        let (endpoint, ca) = (Cloud::endpoint(), Cloud::ca());
        let config = format!(
            "tenant = \"{tenant}\"\nworker = \"{name}\"\nendpoint = \"{endpoint}\"\ncertificate = \"certificate.pem\"\n\
             private_key = \"private.key\"\nca = \"{}\"\nstorage = \"{}\"\njournal = \"journal\"\nconcurrency = 8\n\
             {handlers}",
            ca.display(),
            cloud.job_data_address()
        );
        std::fs::write(folder.join("worker.toml"), config).expect("written");
        let process = Self::spawn(&folder);
        let worker = Self { folder, process };
        worker.await_log("online=true").await;
        worker
    }

    fn spawn(folder: &Path) -> Child {
        // Cargo builds the programs of the workspace beside the tests' folder.
        let test = std::env::current_exe().expect("this test");
        let program = test.ancestors().nth(2).expect("the target folder").join("on-premises-worker");
        let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).expect("a log");
        let mut command = Command::new(&program);
        command.arg("run").arg("--config").arg(folder.join("worker.toml")).stderr(log);
        command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }

    /// Starts it again, after it has ended.
    pub fn restart(&mut self) {
        self.process = Self::spawn(&self.folder);
    }

    /// A file in its folder.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file where its programs run.
    pub fn work(&self, name: &str) -> PathBuf {
        self.file("journal/work").join(name)
    }

    /// Waits until the log holds that.
    pub async fn await_log(&self, text: &str) {
        let log = self.file("log");
        eventually(&format!("{text} in {}", log.display()), || async {
            saw(self.last_words());
            std::fs::read_to_string(&log).unwrap_or_default().contains(text).then_some(())
        })
        .await;
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let log = self.file("log");
        let text = std::fs::read_to_string(&log).unwrap_or_else(|error| error.to_string());
        format!("{} ends with {:?}", log.display(), &text[text.ceil_char_boundary(text.len().saturating_sub(1500))..])
    }

    /// Kills it without a warning.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Lets it end what it is doing: how it ended.
    pub async fn drain(&mut self) -> ExitStatus {
        let id = self.process.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &id]).status().expect("kill");
        assert!(sent.success(), "the worker has ended before");
        let ended = look(PATIENCE, Duration::from_millis(100), "the worker ends", || {
            saw(self.last_words());
            std::future::ready(self.process.try_wait().expect("a child"))
        });
        ended.await.unwrap_or_else(|sentence| panic!("{sentence}"))
    }
}
