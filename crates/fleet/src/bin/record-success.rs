//! `RecordSuccessFunction`

use fleet::allowance::Allowances;
use fleet::recovery::{RecoveryTable, Registry, record_success};
use fleet::{aws, config, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        let table = RecoveryTable::new(&aws, config::required("RECOVERY_TABLE")?);
        let registry = Registry { iot: aws_sdk_iot::Client::new(&aws), table };
        let allowances = Allowances::from_environment(&aws)?;
        Ok((record_success::Adapters { registry, allowances }, DeadLetters::from_environment(&aws)?))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { record_success::handle(adapters, &body).await }).await
}
