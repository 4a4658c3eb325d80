//! `RestoreAttributesFunction`

use fleet::recovery::{RecoveryTable, Registry, restore_attributes};
use fleet::{aws, config, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async {
        let aws = aws::load().await;
        let table = RecoveryTable::new(&aws, config::required("RECOVERY_TABLE")?);
        let registry = Registry { iot: aws_sdk_iot::Client::new(&aws), table };
        let failed_group = config::required("FAILED_GROUP")?;
        Ok(restore_attributes::Adapters { registry, failed_group })
    })
    .await?;
    lambda::run(move |input| restore_attributes::handle(adapters, input)).await
}
