//! `UpdateJobFunction`

use fleet::{aws, jobs::update_job, lambda, queue::DeadLetters};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let (jobs, dead_letters) = &lambda::configured(async {
        let aws = aws::load().await;
        Ok((aws::jobs_data_client(&aws)?, DeadLetters::from_environment(&aws)?))
    })
    .await?;
    lambda::run_queue(dead_letters, move |body| async move { update_job::handle(jobs, &body).await }).await
}
