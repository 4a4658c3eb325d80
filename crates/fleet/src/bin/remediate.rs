//! `RemediateFunction`

use fleet::telemetry::remediate::{self, Adapters, Places, Rules};
use fleet::{aws, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async {
        let aws = aws::load().await;
        Ok(Adapters::new(&aws, aws::iot_data_client(&aws)?, Places::from_environment()?, Rules::from_environment()?))
    })
    .await?;
    lambda::run_stream(move |event| async move { Ok(remediate::handle(adapters, event, aws::now_millis()).await) })
        .await
}
