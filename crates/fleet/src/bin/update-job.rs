//! `UpdateJobFunction`

use fleet::device_registry::DeviceRegistry;
use fleet::queue::{DeadLetters, Queue};
use fleet::{aws, config, job_executions::JobExecutions, jobs::update_job, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        let jobs = aws::jobs_data_client(&aws)?;
        let adapters = update_job::Adapters {
            executions: JobExecutions::new(jobs.clone()),
            jobs,
            // What it records is of its own jobs, whoever hears the devices.
            registry: DeviceRegistry::new(&aws, true),
            notifications: Queue::new(&aws, config::required("JOB_NOTIFICATIONS_QUEUE_URL")?),
        };
        Ok((adapters, DeadLetters::from_environment(&aws)?))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { update_job::handle(adapters, &body).await }).await
}
