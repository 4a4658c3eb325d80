//! `StoreTaskTokenFunction`

use fleet::workflows::{rendezvous::Rendezvous, store_task_token};
use fleet::{aws, config, lambda};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    let rendezvous = &Rendezvous::new(&aws::load().await, config::required("RENDEZVOUS_TABLE")?);
    lambda::run(move |input| store_task_token::handle(rendezvous, input)).await
}
