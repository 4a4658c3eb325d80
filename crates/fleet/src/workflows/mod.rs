//! In what order and how far: executions of the state machines, and where their waits meet devices' answers.

pub mod rendezvous;
pub mod start_workflow;
pub mod started;
pub mod stop_workflow;
pub mod store_task_token;
