//! `GetDeviceSettingsFunction`

use fleet::{aws, devices::get_device_settings, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters =
        &lambda::configured(async { get_device_settings::Adapters::from_environment(&aws::load().await) }).await?;
    lambda::run(move |input| get_device_settings::handle(adapters, input)).await
}
