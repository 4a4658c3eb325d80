//! `RemediateFunction`

use fleet::telemetry::remediate::{self, Adapters};
use fleet::{aws, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &Adapters::from_environment(&aws::load().await)?;
    lambda::run(move |event| async move { Ok(remediate::handle(adapters, event, aws::now_millis()).await) }).await
}
