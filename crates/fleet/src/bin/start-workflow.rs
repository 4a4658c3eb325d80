//! `StartWorkflowFunction`

use fleet::allowance::Allowances;
use fleet::workflows::{start_workflow, started::StartedOperations};
use fleet::{aws, config, job_executions::JobExecutions, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        Ok((
            start_workflow::Adapters {
                step_functions: aws_sdk_sfn::Client::new(&aws),
                iot: aws_sdk_iot::Client::new(&aws),
                firmware_upgrade_arn: config::required("FIRMWARE_UPGRADE_ARN")?,
                config_push_arn: config::required("CONFIG_PUSH_ARN")?,
                failed_update_recovery_arn: config::required("FAILED_UPDATE_RECOVERY_ARN")?,
                on_premises_job_arn: config::required("ON_PREMISES_JOB_ARN")?,
                executions: JobExecutions::new(aws::jobs_data_client(&aws)?),
                allowances: Allowances::from_environment(&aws)?,
                started: StartedOperations::new(
                    aws_sdk_dynamodb::Client::new(&aws),
                    config::required("RENDEZVOUS_TABLE")?,
                ),
                stack: config::required("STACK_NAME")?,
                owns_device_topics: config::owns_device_topics()?,
            },
            DeadLetters::from_environment(&aws)?,
        ))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { start_workflow::handle(adapters, &body).await }).await
}
