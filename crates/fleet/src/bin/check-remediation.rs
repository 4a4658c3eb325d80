//! `CheckRemediationFunction`

use fleet::telemetry::check_remediation;
use fleet::telemetry::remediate::{Adapters, Places, Rules};
use fleet::{aws, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        Ok((
            Adapters::new(&aws, aws::iot_data_client(&aws)?, Places::from_environment()?, Rules::from_environment()?),
            DeadLetters::from_environment(&aws)?,
        ))
    })
    .await?;
    let handle = move |body: String| async move { check_remediation::handle(adapters, &body, aws::now_millis()).await };
    lambda::run_queue(dead_letters, handle).await
}
