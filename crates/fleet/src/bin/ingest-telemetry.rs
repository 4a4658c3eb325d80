//! `IngestTelemetryFunction`

use fleet::telemetry::ingest_telemetry::{self, Adapters, Places};
use fleet::{aws, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        Ok((Adapters::new(&aws, Places::from_environment()?), DeadLetters::from_environment(&aws)?))
    })
    .await?;
    lambda::run_batches(dead_letters, move |messages, deadline| async move {
        ingest_telemetry::handle(adapters, &messages, aws::now_millis(), deadline).await
    })
    .await
}
