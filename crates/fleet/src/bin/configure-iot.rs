//! `ConfigureIotFunction`

use fleet::{aws, devices::configure_iot, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let iot = &aws_sdk_iot::Client::new(&aws::load().await);
    lambda::run(move |input| configure_iot::handle(iot, input)).await
}
