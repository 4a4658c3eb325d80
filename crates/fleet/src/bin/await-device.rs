//! `AwaitDeviceFunction`

use fleet::{aws, devices::presence, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async { presence::Adapters::from_environment(&aws::load().await) }).await?;
    lambda::run(move |input| presence::await_device(adapters, input)).await
}
