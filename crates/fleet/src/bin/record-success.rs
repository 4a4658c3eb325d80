//! `RecordSuccessFunction`

use fleet::recovery::{RecoveryTable, Registry, record_success};
use fleet::{aws, config, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let aws = aws::load().await;
    let table = RecoveryTable::new(&aws, config::required("RECOVERY_TABLE")?);
    let registry = &Registry { iot: aws_sdk_iot::Client::new(&aws), table };
    let dead_letters = DeadLetters::from_environment(&aws)?;
    lambda::run_queue(&dead_letters, move |body| async move { record_success::handle(registry, &body).await }).await
}
