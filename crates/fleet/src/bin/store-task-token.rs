//! `StoreTaskTokenFunction`

use fleet::workflows::{rendezvous::Rendezvous, store_task_token};
use fleet::{aws, config, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let rendezvous =
        &lambda::configured(async { Ok(Rendezvous::new(&aws::load().await, config::required("RENDEZVOUS_TABLE")?)) })
            .await?;
    lambda::run(move |input| store_task_token::handle(rendezvous, input)).await
}
