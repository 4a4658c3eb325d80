//! `StoreTaskTokenFunction`

use fleet::device_registry::DeviceRegistry;
use fleet::workflows::{rendezvous::Rendezvous, store_task_token};
use fleet::{aws, config, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async {
        let aws = aws::load().await;
        let rendezvous = Rendezvous::new(&aws, config::required("RENDEZVOUS_TABLE")?);
        Ok(store_task_token::Adapters {
            rendezvous,
            registry: DeviceRegistry::new(&aws, config::owns_device_topics()?),
        })
    })
    .await?;
    lambda::run(move |input| store_task_token::handle(adapters, input)).await
}
