//! The proxy that disturbs AWS calls as rules say.

use aws_proxy::rules::{Effect, Rule, State};
use std::collections::HashMap;

/// The proxy before the local cloud.
pub struct Proxy {
    http: reqwest::Client,
    rules: String,
}

impl Proxy {
    /// The one that the environment names.
    pub fn from_environment() -> Self {
        let proxy = std::env::var("FLEETFLOW_PROXY").expect("FLEETFLOW_PROXY: run these tests with `cargo xtask test`");
        Self { http: reqwest::Client::new(), rules: format!("{proxy}/_proxy/rules") }
    }

    /// The rule that kills a function after a call about one of the things that have this prefix, once, when so many have passed.
    pub fn kill_after(prefix: &str, function: &str, operation: &str, skip: u32) -> Rule {
        Rule {
            name: prefix.to_owned(),
            contains: format!("{prefix}-"),
            function: Some(function.to_owned()),
            operation: Some(operation.to_owned()),
            skip,
            times: 1,
            lasts: None,
            effect: Effect::KillAfter,
        }
    }

    /// Disturbs from now on as these rules say.
    pub async fn disturb(&self, rules: &[Rule]) {
        let body = serde_json::to_vec(rules).expect("JSON");
        let post = self.http.post(&self.rules).header("content-type", "application/json").body(body).send().await;
        post.and_then(reqwest::Response::error_for_status).expect("the proxy takes the rules");
    }

    /// What the rules have done, by their names.
    pub async fn disturbed(&self) -> HashMap<String, Vec<String>> {
        let answer = self.http.get(&self.rules).send().await.expect("the proxy");
        let states: Vec<State> = serde_json::from_slice(&answer.bytes().await.expect("the proxy")).expect("its rules");
        let mut disturbed: HashMap<String, Vec<String>> = HashMap::new();
        for State { rule, disturbed: calls, .. } in states {
            disturbed.entry(rule.name).or_default().extend(calls);
        }
        disturbed
    }
}
