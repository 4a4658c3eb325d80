//! `CreateJobFunction`

use fleet::{aws, config, jobs::create_job, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let adapters = &lambda::configured(async {
        let aws = aws::load().await;
        let stack = create_job::Stack {
            account: config::required("ACCOUNT_ID")?,
            region: config::required("AWS_REGION")?,
            job_template: config::required("JOB_TEMPLATE")?,
            firmware_bucket: config::required("FIRMWARE_BUCKET")?,
        };
        let (iot, s3) = (aws_sdk_iot::Client::new(&aws), aws_sdk_s3::Client::new(&aws));
        Ok(create_job::Adapters { iot, s3, stack })
    })
    .await?;
    lambda::run(move |input| create_job::handle(adapters, input)).await
}
