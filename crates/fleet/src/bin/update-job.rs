//! `UpdateJobFunction`

use fleet::{aws, jobs::update_job, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let aws = aws::load().await;
    let jobs = &aws_sdk_iotjobsdataplane::Client::new(&aws);
    let dead_letters = DeadLetters::from_environment(&aws)?;
    lambda::run_queue(&dead_letters, move |body| async move { update_job::handle(jobs, &body).await }).await
}
