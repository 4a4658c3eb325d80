//! `TrackPresenceFunction`

use fleet::{aws, devices::presence, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let aws = aws::load().await;
    let adapters = &presence::Adapters::from_environment(&aws)?;
    let dead_letters = DeadLetters::from_environment(&aws)?;
    lambda::run_queue(&dead_letters, move |body| async move { presence::track(adapters, &body).await }).await
}
