//! `RetryCounterFunction`

use fleet::recovery::{Limits, RecoveryTable, retry_counter};
use fleet::{aws, config, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async {
        let table = RecoveryTable::new(&aws::load().await, config::required("RECOVERY_TABLE")?);
        let limits =
            Limits { attempts: config::number("RECOVERY_ATTEMPTS")?, cycles: config::number("RECOVERY_CYCLES")? };
        Ok(retry_counter::Adapters { table, limits })
    })
    .await?;
    lambda::run(move |failure| retry_counter::handle(adapters, failure)).await
}
