//! A reverse proxy before the local cloud. It counts the calls of the AWS APIs ([`calls`]), and disturbs them as its rules say
//! ([`rules`]): throttled, unavailable, late, without an answer, or with the calling function killed before or after the call.
//!
//! Everything is plain HTTP on loopback. Besides AWS's paths it serves `/_proxy/rules` and `/_proxy/calls`.

mod caller;
pub mod calls;
mod refusal;
pub mod rules;
mod server;

pub use server::serve;
