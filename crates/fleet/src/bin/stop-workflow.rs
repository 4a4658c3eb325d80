//! `StopWorkflowFunction`

use fleet::queue::{DeadLetters, Queue};
use fleet::workflows::{rendezvous::Rendezvous, started::StartedOperations, stop_workflow};
use fleet::{aws, config, job_executions::JobExecutions, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        let table = config::required("RENDEZVOUS_TABLE")?;
        let dynamodb = aws_sdk_dynamodb::Client::new(&aws);
        Ok((
            stop_workflow::Adapters {
                rendezvous: Rendezvous::new(&aws, table.clone()),
                started: StartedOperations::new(dynamodb, table),
                executions: JobExecutions::new(aws::jobs_data_client(&aws)?),
                notifications: Queue::new(&aws, config::required("JOB_NOTIFICATIONS_QUEUE_URL")?),
            },
            DeadLetters::from_environment(&aws)?,
        ))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { stop_workflow::handle(adapters, &body).await }).await
}
