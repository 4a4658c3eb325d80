//! `StopWorkflowFunction`

use fleet::workflows::{rendezvous::Rendezvous, stop_workflow};
use fleet::{aws, config, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let aws = aws::load().await;
    let rendezvous = Rendezvous::new(&aws, config::required("RENDEZVOUS_TABLE")?);
    let adapters = &stop_workflow::Adapters { rendezvous, iot: aws_sdk_iot::Client::new(&aws) };
    let dead_letters = DeadLetters::from_environment(&aws)?;
    lambda::run_queue(&dead_letters, move |body| async move { stop_workflow::handle(adapters, &body).await }).await
}
