//! `AwaitDeviceFunction`

use fleet::{aws, devices::presence, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &presence::Adapters::from_environment(&aws::load().await)?;
    lambda::run(move |input| presence::await_device(adapters, input)).await
}
