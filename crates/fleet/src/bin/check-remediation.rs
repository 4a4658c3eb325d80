//! `CheckRemediationFunction`

use fleet::telemetry::check_remediation;
use fleet::telemetry::remediate::{Adapters, Places, Rules};
use fleet::{aws, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let aws = aws::load().await;
    let adapters = &Adapters::new(&aws, Places::from_environment()?, Rules::from_environment()?);
    let dead_letters = DeadLetters::from_environment(&aws)?;
    let handle = move |body: String| async move { check_remediation::handle(adapters, &body, aws::now_millis()).await };
    lambda::run_queue(&dead_letters, handle).await
}
