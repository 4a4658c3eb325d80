//! `RetryCounterFunction`

use fleet::allowance::Allowances;
use fleet::queue::{DeadLetters, Queue};
use fleet::recovery::{Limits, RecoveryTable, retry_counter};
use fleet::{aws, config, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        let limits =
            Limits { attempts: config::number("RECOVERY_ATTEMPTS")?, cycles: config::number("RECOVERY_CYCLES")? };
        Ok((
            retry_counter::Adapters {
                table: RecoveryTable::new(&aws, config::required("RECOVERY_TABLE")?),
                iot: aws_sdk_iot::Client::new(&aws),
                allowances: Allowances::from_environment(&aws)?,
                recoveries: Queue::new(&aws, config::required("RECOVERIES_QUEUE_URL")?),
                successes: Queue::new(&aws, config::required("SUCCEEDED_UPDATES_QUEUE_URL")?),
                limits,
            },
            DeadLetters::from_environment(&aws)?,
        ))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { retry_counter::handle(adapters, &body).await }).await
}
