//! `StopWorkflowFunction`

use fleet::workflows::{rendezvous::Rendezvous, stop_workflow};
use fleet::{aws, config, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (adapters, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        let rendezvous = Rendezvous::new(&aws, config::required("RENDEZVOUS_TABLE")?);
        Ok((
            stop_workflow::Adapters { rendezvous, iot: aws_sdk_iot::Client::new(&aws) },
            DeadLetters::from_environment(&aws)?,
        ))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { stop_workflow::handle(adapters, &body).await }).await
}
