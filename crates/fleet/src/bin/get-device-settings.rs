//! `GetDeviceSettingsFunction`

use fleet::{aws, devices::get_device_settings, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        Ok((get_device_settings::Adapters::from_environment(&aws)?, DeadLetters::from_environment(&aws)?))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { get_device_settings::handle(adapters, &body).await }).await
}
