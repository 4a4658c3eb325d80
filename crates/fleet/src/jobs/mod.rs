//! Who shall be updated: AWS IoT jobs and their executions.

pub mod create_job;
mod image;
pub mod update_job;
