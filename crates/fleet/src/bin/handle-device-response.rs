//! `HandleDeviceResponseFunction`

use fleet::allowance::Allowances;
use fleet::device_registry::DeviceRegistry;
use fleet::devices::{agents::Agents, handle_device_response, settings::SettingsTable, worker_jobs::WorkerJobs};
use fleet::{aws, config, lambda, queue::DeadLetters, workflows::rendezvous::Rendezvous};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        let owns_device_topics = config::owns_device_topics()?;
        Ok((
            handle_device_response::Adapters {
                owns_device_topics,
                rendezvous: Rendezvous::new(&aws, config::required("RENDEZVOUS_TABLE")?),
                agents: Agents::new(&aws, config::required("RENDEZVOUS_TABLE")?),
                settings: SettingsTable::from_environment(&aws)?,
                registry: DeviceRegistry::new(&aws, owns_device_topics),
                allowances: Allowances::from_environment(&aws)?,
                sns: aws_sdk_sns::Client::new(&aws),
                events_topic_arn: config::required("EVENTS_TOPIC_ARN")?,
                mqtt: aws::iot_data_client(&aws)?,
                worker_jobs: WorkerJobs::from_environment(&aws)?,
            },
            DeadLetters::from_environment(&aws)?,
        ))
    })
    .await?;
    let handle = move |body: String| async move { handle_device_response::handle(adapters, &body).await };
    lambda::run_queue(dead_letters, handle).await
}
