//! `TrackPresenceFunction`

use fleet::{aws, devices::presence, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        Ok((presence::Adapters::from_environment(&aws)?, DeadLetters::from_environment(&aws)?))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { presence::track(adapters, &body).await }).await
}
