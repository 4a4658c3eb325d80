//! Whole workflows on the local cloud: the real template, the real programs, MQTT over TLS.
//!
//! One program, so that tests of all contexts wait beside each other, and those that need the machine for themselves can say so.

mod attempts;
mod config_push;
mod documents;
mod enforcement;
mod firmware;
mod floods;
mod images;
mod on_premises;
mod other_makes;
mod presence;
mod public_devices;
mod recovery;
mod stacks;
mod telemetry;
mod watch;
mod workflow;
