//! Each workflow under faults that are made up by a seed: messages that are early, late, twice or never, functions killed before
//! and after their calls, APIs that refuse, devices that come and go. After each case the same is asked of it: has everything
//! ended, as it should, with nothing lost and nothing done twice?
//!
//! `cargo xtask test` runs a slice of it, `cargo xtask test --chaos 500` the long run; they need its local cloud and its proxy.
#![allow(clippy::unwrap_used)]

mod config_push;
mod disturbance;
mod firmware;
mod harness;
mod on_premises;
mod recovery;
mod telemetry;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn firmware_upgrades_under_faults() {
    harness::prove(firmware::FirmwareUpgrade::connect().await).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn configuration_pushes_under_faults() {
    harness::prove(config_push::ConfigPush::connect().await).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn recoveries_under_faults() {
    harness::prove(recovery::Recovery::connect().await).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn jobs_on_premises_under_faults() {
    harness::prove(on_premises::OnPremises::connect().await).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the local cloud: cargo xtask test"]
async fn telemetry_under_faults() {
    harness::prove(telemetry::Telemetry::connect().await).await;
}
