//! `PublishToDeviceFunction`

use fleet::device_registry::DeviceRegistry;
use fleet::devices::{agents::Agents, publish_to_device, settings::SettingsTable, worker_jobs::WorkerJobs};
use fleet::{aws, config, lambda, workflows::rendezvous::Rendezvous};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async {
        let aws = aws::load().await;
        let owns_device_topics = config::owns_device_topics()?;
        Ok(publish_to_device::Adapters {
            rendezvous: Rendezvous::new(&aws, config::required("RENDEZVOUS_TABLE")?),
            agents: Agents::new(&aws, config::required("RENDEZVOUS_TABLE")?),
            settings: SettingsTable::from_environment(&aws)?,
            registry: DeviceRegistry::new(&aws, owns_device_topics),
            mqtt: aws::iot_data_client(&aws)?,
            s3: aws_sdk_s3::Client::new(&aws),
            firmware_bucket: config::required("FIRMWARE_BUCKET")?,
            worker_jobs: WorkerJobs::from_environment(&aws)?,
            owns_device_topics,
        })
    })
    .await?;
    lambda::run(move |input| publish_to_device::handle(adapters, input)).await
}
